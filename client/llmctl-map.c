/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmctl map: one instruction, many inputs. The instruction is read by the model once, into a base
 * session; each input gets a fork of it, some at a time. Items live in the order of their inputs,
 * from the oldest that is not printed yet; that list is bounded, so that one slow answer, or a
 * reader that does not read, stops us from reading more.
 *
 * SIGINT and the time limit wait for poll(), except while the daemon is called: then they simply
 * end the process, and the daemon ends what belongs to the connection.
 */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/number.h"
#include "client/llmctl-answer.h"
#include "client/llmctl-exchange.h"
#include "client/llmctl-output.h"
#include "client/llmctl-request.h"
#include "client/llmctl.h"
#include "ipc/names.h"

#define JOBS_DEFAULT 8
#define JOBS_MAX 256
#define ITEMS_PER_JOB 8 /* items in memory: read, running, or waiting to be printed in order */
#define READ_BYTES 65536

DEFINE_CLEANUP(struct llm_options *, llm_options_free)

enum item_state {
    ITEM_WAITING,
    ITEM_RUNNING,
    ITEM_DONE,
};

struct item {
    uint64_t index; /* of the input, from 1 */
    enum item_state state;
    struct buffer input, output;
    struct llm_session *session;
    struct llm_stream *stream;
    char reason[32];
    uint32_t prompt_tokens, completion_tokens, cached_tokens;
    char *error; /* NULL: none */
    char error_name[96];
};

struct map {
    struct request request;
    char *instructions; /* all of them; NULL: none */
    size_t jobs;        /* 0: as the quota has it */
    bool null, unordered, fail_fast;

    struct llm_connection *connection;
    struct llm_session *base; /* NULL: there is nothing to share */
    struct llm_options *session_options;

    struct buffer in; /* read, from in_start on not yet items */
    size_t in_start, in_scanned;
    bool eof, overlong; /* the input that is being read is too long: skip to its end */
    uint64_t n_inputs;

    struct item **items; /* [items_max], n_items of them, oldest first */
    size_t items_max, n_items, n_running;
    size_t allowed; /* jobs that the daemon lets us have: less than `jobs` after a refusal */
    struct pollfd *polls;
    uint64_t n_done, n_failed;
};

static void help(void)
{
    puts(
        "Usage: llmctl map [OPTION...] [INSTRUCTION...]\n"
        "Answers many inputs, each on its own, in parallel: lines of standard input, or with -0 "
        "what\n"
        "is between NUL bytes. The model reads the instruction once. Answers come in the order of\n"
        "the inputs, one line each: a line feed is written \\n, a backslash \\\\; with -0 as they "
        "are,\n"
        "each followed by NUL. An input that fails gets an empty line, and a line on standard "
        "error.\n"
        "\n"
        "  llmctl map \"Translate to French:\" < words\n"
        "  printf '%s\\0' *.txt | llmctl map -0 \"What is this file for?\" | xargs -0 -n1 echo\n"
        "\n"
        "  -0, --null                 NUL in the place of line feeds, in and out\n"
        "  -j, --jobs=N               answers in the making at a time (default: 8, or what the\n"
        "                             quota allows)\n"
        "      --unordered            print each answer when it is there\n"
        "      --fail-fast            stop at the first input that fails\n"
        "      --keep-going           go on with the others (default)\n"
        "      --json                 an object for each input: index, input, output, reason,\n"
        "                             usage, or error\n"
        "      --session=ID           each input goes on with a copy of this session\n" REQUEST_HELP
            GLOBAL_HELP);
}

/* -1: go on; else the exit status. */
static int parse_arguments(struct map *m, int argc, char **argv)
{
    enum { OPT_UNORDERED = 256, OPT_FAIL_FAST, OPT_KEEP_GOING };
    struct option table[REQUEST_N_OPTIONS + 5] = {
        {"null", no_argument, NULL, '0'},
        {"jobs", required_argument, NULL, 'j'},
        {"unordered", no_argument, NULL, OPT_UNORDERED},
        {"fail-fast", no_argument, NULL, OPT_FAIL_FAST},
        {"keep-going", no_argument, NULL, OPT_KEEP_GOING},
    };
    const struct verb_options options = {.letters = "0j:", .options = table, .help = help};
    int c, status = STATUS_OK;
    uint64_t jobs;

    request_options(table + 5);
    while ((c = next_option(&options, argc, argv, &status)) >= 0) {
        switch (c) {
        case '0':
            m->null = true;
            break;
        case 'j':
            if (number_parse(optarg, JOBS_MAX, &jobs) < 0 || jobs == 0)
                return usage_error("--jobs wants a number from 1 to %d, not %s", JOBS_MAX, optarg);
            m->jobs = (size_t)jobs;
            break;
        case OPT_UNORDERED:
            m->unordered = true;
            break;
        case OPT_FAIL_FAST:
            m->fail_fast = true;
            break;
        case OPT_KEEP_GOING:
            m->fail_fast = false;
            break;
        default:
            status = request_take(&m->request, c, optarg);
            if (status != STATUS_OK)
                return status;
        }
    }
    if (c == OPTION_STOP)
        return status;
    status = request_check(&m->request);
    return status == STATUS_OK ? -1 : status;
}

/* --instructions, a blank line, and the words of the command line. */
static int join_instructions(struct map *m, int argc, char **argv)
{
    CLEANUP(buffer_done) struct buffer b = {0};
    const char *option = m->request.instructions;
    int r = 0;

    if (option) {
        r = buffer_append(&b, option, strlen(option));
        if (r == 0 && optind < argc)
            r = buffer_append(&b, "\n\n", 2);
    }
    for (int i = optind; i < argc && r == 0; i++) {
        if (i > optind)
            r = buffer_append(&b, " ", 1);
        if (r == 0)
            r = buffer_append(&b, argv[i], strlen(argv[i]));
    }
    if (r == 0 && b.n > 0) {
        m->instructions = strndup(b.data, b.n);
        r = m->instructions ? 0 : -ENOMEM;
    }
    return r < 0 ? complain(STATUS_FAILED, "out of memory") : STATUS_OK;
}

/* ---- items ---- */

static const char *unit(const struct map *m)
{
    return m->null ? "input" : "line";
}

static void item_free(struct item *item)
{
    llm_stream_free(item->stream); /* cancels, where it runs */
    llm_session_free(item->session);
    buffer_done(&item->input);
    buffer_done(&item->output);
    free(item->error);
    free(item);
}

static void finish(struct map *m, struct item *item)
{
    if (item->state == ITEM_RUNNING) {
        m->n_running--;
        m->allowed = m->jobs; /* another may be let in now */
    }
    item->state = ITEM_DONE;
    llm_stream_free(item->stream);
    llm_session_free(item->session);
    item->stream = NULL;
    item->session = NULL;
    m->n_done++;
}

static void fail(struct map *m, struct item *item, const char *name, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static void fail(struct map *m, struct item *item, const char *name, const char *format, ...)
{
    char text[700];
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    status_line_clear();
    complain(STATUS_FAILED, "%s %" PRIu64 ": %s", unit(m), item->index, text);
    item->error = strdup(text); /* without memory: the object says no more than that */
    snprintf(item->error_name, sizeof(item->error_name), "%s", name);
    buffer_done(&item->output);
    m->n_failed++;
    finish(m, item);
}

/* Of so many bytes at data; too_long: they are not there. STATUS_OK, or a complaint was made. */
static int add_item(struct map *m, const char *data, size_t n, bool too_long)
{
    struct item *item = calloc(1, sizeof(*item));

    if (!item || buffer_append(&item->input, data, n) < 0) {
        free(item);
        return complain(STATUS_FAILED, "out of memory");
    }
    item->index = ++m->n_inputs;
    m->items[m->n_items++] = item;
    if (too_long)
        fail(m, item, LLM_ERROR_PREFIX "PromptTooLong",
             "more than %u bytes; nothing of it was sent", LLM_PROMPT_BYTES_MAX);
    else if (n == 0)
        finish(m, item); /* nothing to be asked */
    return STATUS_OK;
}

/* Makes items of what was read, as far as there is room. */
static int take_inputs(struct map *m)
{
    int delimiter = m->null ? 0 : '\n', status = STATUS_OK;

    while (m->n_items < m->items_max && status == STATUS_OK) {
        const char *start = m->in.data + m->in_start, *end = NULL;
        size_t n = m->in.n - m->in_start;

        if (n > m->in_scanned)
            end = memchr(start + m->in_scanned, delimiter, n - m->in_scanned);
        if (end) {
            bool too_long = m->overlong || (size_t)(end - start) > LLM_PROMPT_BYTES_MAX;

            status = add_item(m, start, too_long ? 0 : (size_t)(end - start), too_long);
            m->in_start += (size_t)(end - start) + 1;
            m->in_scanned = 0;
            m->overlong = false;
            continue;
        }
        m->in_scanned = n;
        if (n > LLM_PROMPT_BYTES_MAX || m->overlong) {
            m->overlong = true;
            m->in_start = m->in.n;
            m->in_scanned = 0;
            n = 0;
        }
        if (m->eof && (n > 0 || m->overlong)) { /* the last one, without a delimiter */
            status = add_item(m, start, n, m->overlong);
            m->in_start = m->in.n;
            m->in_scanned = 0;
            m->overlong = false;
        }
        break;
    }
    if (m->in_start > 0) {
        buffer_consume(&m->in, m->in_start);
        m->in_start = 0;
    }
    return status;
}

static bool wants_input(const struct map *m)
{
    size_t waiting = 0;

    for (size_t i = 0; i < m->n_items; i++)
        waiting += m->items[i]->state == ITEM_WAITING;
    return !m->eof && m->n_items < m->items_max && waiting < m->jobs;
}

static int read_input(struct map *m)
{
    ssize_t n;

    if (buffer_reserve(&m->in, READ_BYTES) < 0)
        return complain(STATUS_FAILED, "out of memory");
    n = read(STDIN_FILENO, m->in.data + m->in.n, READ_BYTES);
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return STATUS_OK;
    if (n < 0 && errno != EBADF) /* closed: as good as empty */
        return complain(STATUS_FAILED, "cannot read standard input: %s", strerror(errno));
    if (n <= 0)
        m->eof = true;
    else
        m->in.n += (size_t)n;
    return STATUS_OK;
}

/* ---- the daemon ---- */

static bool is_gone(int r)
{
    return r == -ENOTCONN || r == -ECONNRESET || r == -EPIPE;
}

/* How many answers at a time the quota has room for. */
static size_t default_jobs(struct map *m)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    uint32_t most = UINT32_MAX, used = 0, value;
    const char *name;
    int r;

    r = sd_bus_call_method(
        llm_connection_bus(m->connection), llm_connection_destination(m->connection), LLM_ROOT_PATH,
        LLM_MANAGER_INTERFACE, "GetQuota", NULL, &reply, "u", (uint32_t)geteuid());
    if (r >= 0)
        r = sd_bus_message_enter_container(reply, 'a', "{sv}");
    while (r >= 0 && (r = sd_bus_message_enter_container(reply, 'e', "sv")) > 0) {
        r = sd_bus_message_read(reply, "s", &name);
        if (r >= 0 && (strcmp(name, "max-sessions") == 0 || strcmp(name, "sessions") == 0)) {
            r = sd_bus_message_read(reply, "v", "u", &value);
            if (r >= 0 && name[0] == 's')
                used = value;
            else if (r >= 0 && value > 0)
                most = value;
        } else if (r >= 0) {
            r = sd_bus_message_skip(reply, "v");
        }
        if (r >= 0)
            r = sd_bus_message_exit_container(reply);
    }
    if (most <= used)
        return 1;
    return MIN((size_t)JOBS_DEFAULT, (size_t)(most - used));
}

static const char *hint(void)
{
    return global.session ? "shorten it, or begin with another session"
                          : "shorten it, or ask for more with --context";
}

/* The model reads the instruction. */
static int append_instructions(struct map *m)
{
    CLEANUP(answer_done) struct answer answer = {.output = ANSWER_COLLECT, .hint = hint()};
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    struct llm_error err;
    int fd, r;

    r = llm_options_new(&options);
    if (r == 0 && m->request.raw)
        r = llm_options_set_bool(options, "raw", true);
    if (r == 0 && request_is_deterministic(&m->request)) /* else each input would read it again */
        r = llm_options_set_bool(options, "deterministic", true);
    if (r == 0)
        r = m->request.raw ? llm_options_set_string(options, "prompt", m->instructions)
                           : llm_options_add_message(options, "system", m->instructions);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    r = llm_session_append(m->base, options, &fd, NULL, &err);
    if (r < 0)
        return complain(status_of(r), "%s", answer_refusal_text(&err, hint()));
    r = answer_read(&answer, fd, NULL, NULL);
    deadlines_release();
    if (r == STATUS_TIMEOUT)
        complain(r, "the instruction was not read within the time given");
    return r;
}

static int prepare(struct map *m)
{
    CLEANUP(freep) char *model = NULL;
    struct llm_error err;
    int r, status;

    if (global.session) {
        status = request_connect(&m->request, &m->connection, &m->base);
    } else {
        status = connect_or_start(&m->request.start, &m->connection, &model);
        if (status == STATUS_OK)
            status = request_make_session(&m->request, model, &m->session_options);
    }
    if (status != STATUS_OK)
        return status;
    if (!global.session && m->instructions) {
        r = llm_session_new(&m->base, m->connection, m->session_options, &err);
        if (r < 0)
            return complain(status_of(r), "%s", err.message);
        status = append_instructions(m);
        if (status != STATUS_OK)
            return status;
    }
    if (m->jobs == 0)
        m->jobs = default_jobs(m);
    m->allowed = m->jobs;
    m->items_max = m->jobs * ITEMS_PER_JOB;
    m->items = calloc(m->items_max, sizeof(struct item *));
    m->polls = calloc(m->jobs + 1, sizeof(*m->polls));
    if (buffer_reserve(&m->in, READ_BYTES) < 0)
        return complain(STATUS_FAILED, "out of memory");
    return m->items && m->polls ? STATUS_OK : complain(STATUS_FAILED, "out of memory");
}

/* With a session of another's making, the instruction is part of each prompt. */
static int make_prompt(const struct map *m, const struct item *item, struct buffer *ret)
{
    if (global.session && m->instructions &&
        (buffer_append(ret, m->instructions, strlen(m->instructions)) < 0 ||
         buffer_append(ret, "\n", 1) < 0))
        return -ENOMEM;
    return buffer_append(ret, item->input.data, item->input.n);
}

static int start_request(struct map *m, struct item *item, struct llm_error *err)
{
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    CLEANUP(buffer_done) struct buffer prompt = {0};
    int fd, r;

    r = make_prompt(m, item, &prompt);
    if (r == 0)
        r = request_make(&m->request, NULL, prompt.data, prompt.n, &options) == STATUS_OK ? 0
                                                                                          : -ENOMEM;
    if (r < 0) {
        *err = (struct llm_error){.message = "out of memory"};
        return r;
    }
    r = m->base ? llm_session_fork(&item->session, m->base, NULL, err)
                : llm_session_new(&item->session, m->connection, m->session_options, err);
    if (r == 0)
        r = llm_session_generate(item->session, options, &fd, NULL, err);
    if (r < 0) {
        llm_session_free(item->session);
        item->session = NULL;
        return r;
    }
    r = llm_stream_new(&item->stream, fd);
    if (r == 0 && fcntl(fd, F_SETFL, O_NONBLOCK) < 0) /* our end only */
        r = -errno;
    if (r < 0) {
        *err = (struct llm_error){0};
        snprintf(err->message, sizeof(err->message), "%s", strerror(-r));
    }
    return r;
}

/* STATUS_OK, also when it failed alone; else nothing goes on. */
static int start_item(struct map *m, struct item *item)
{
    struct llm_error err;
    int r;

    deadlines_release();
    r = start_request(m, item, &err);
    deadlines_hold();
    if (r == 0) {
        item->state = ITEM_RUNNING;
        m->n_running++;
        return STATUS_OK;
    }
    if (is_gone(r) && m->n_running == 0)
        return complain(STATUS_NOT_RUNNING, "%s", err.message);
    if (is_gone(r)) { /* the answers in the making tell of it, where they were cut short */
        m->allowed = m->n_running;
        return STATUS_OK;
    }
    if (status_of(r) == STATUS_BUSY) {
        if (m->n_running == 0)
            return complain(STATUS_BUSY, "%s %" PRIu64 ": %s", unit(m), item->index, err.message);
        m->allowed = m->n_running; /* until one of ours is through */
        return STATUS_OK;
    }
    fail(m, item, err.name, "%s", answer_refusal_text(&err, hint()));
    return STATUS_OK;
}

static int start_items(struct map *m)
{
    int status = STATUS_OK;

    for (size_t i = 0; i < m->n_items && status == STATUS_OK; i++) {
        if (m->n_running >= m->allowed || (m->fail_fast && m->n_failed > 0))
            break;
        if (m->items[i]->state == ITEM_WAITING)
            status = start_item(m, m->items[i]);
    }
    return status;
}

static void take_event(struct map *m, struct item *item, const struct llm_event *e)
{
    switch (e->type) {
    case LLM_DELTA:
        if (buffer_append(&item->output, e->text, e->n_text) < 0)
            fail(m, item, LLM_ERROR_PREFIX "OutOfMemory", "out of memory");
        break;
    case LLM_USAGE:
        item->prompt_tokens = e->prompt_tokens;
        item->completion_tokens = e->completion_tokens;
        item->cached_tokens = e->cached_tokens;
        break;
    case LLM_QUEUED:
    case LLM_PROGRESS:
        break;
    case LLM_END:
        snprintf(item->reason, sizeof(item->reason), "%s", e->reason);
        if (strcmp(e->reason, "stop") == 0 || strcmp(e->reason, "length") == 0)
            finish(m, item);
        else
            fail(m, item, LLM_ERROR_PREFIX "Failed", "the answer was ended: %s", e->reason);
        break;
    case LLM_ERROR:
        fail(m, item, e->name, "%s", answer_error_text(e, hint()));
        break;
    }
}

static int read_events(struct map *m, struct item *item)
{
    struct llm_event event;
    int r = 1;

    while (item->state == ITEM_RUNNING && r > 0) {
        r = llm_stream_next(item->stream, &event);
        if (r > 0)
            take_event(m, item, &event);
        else if (r == -EPIPE)
            return complain(STATUS_FAILED, "the daemon went away before %s %" PRIu64 "'s answer",
                            unit(m), item->index);
        else if (r != -EAGAIN && r != -EINTR)
            fail(m, item, LLM_ERROR_PREFIX "Failed", "the stream cannot be read: %s", strerror(-r));
    }
    return STATUS_OK;
}

/* ---- output ---- */

static int print_json(const struct item *item)
{
    struct exchange x = {
        .index = item->index,
        .input = &item->input,
        .output = &item->output,
        .reason = item->reason,
        .prompt_tokens = item->prompt_tokens,
        .completion_tokens = item->completion_tokens,
        .cached_tokens = item->cached_tokens,
        .failed = item->error_name[0] || item->error,
        .error_name = item->error_name,
        .error = item->error ? item->error : "",
    };

    return exchange_print(&x);
}

static int print_item(struct map *m, const struct item *item)
{
    CLEANUP(buffer_done) struct buffer line = {0};
    int r;

    status_line_clear();
    if (global.json != JSON_OFF)
        return print_json(item);
    if (m->null)
        r = buffer_append(&line, item->output.data, item->output.n);
    else
        r = output_escape(&line, item->output.data, item->output.n);
    if (r == 0)
        r = buffer_append(&line, m->null ? "" : "\n", 1);
    if (r < 0)
        return complain(STATUS_FAILED, "out of memory");
    return isatty(STDOUT_FILENO) ? output_put_on_terminal(line.data, line.n)
                                 : output_put(line.data, line.n);
}

static int print_items(struct map *m)
{
    size_t kept = 0;
    int status = STATUS_OK;

    for (size_t i = 0; i < m->n_items; i++) {
        struct item *item = m->items[i];

        if (status == STATUS_OK && item->state == ITEM_DONE && (m->unordered || kept == 0)) {
            status = print_item(m, item);
            item_free(item);
        } else {
            m->items[kept++] = item;
        }
    }
    m->n_items = kept;
    return status;
}

/* ---- all together ---- */

static int wait_for_news(struct map *m)
{
    size_t n = 0, n_streams;
    int status;

    for (size_t i = 0; i < m->n_items; i++)
        if (m->items[i]->state == ITEM_RUNNING)
            m->polls[n++] =
                (struct pollfd){.fd = llm_stream_fd(m->items[i]->stream), .events = POLLIN};
    n_streams = n;
    if (wants_input(m))
        m->polls[n++] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
    status_line("%" PRIu64 " answered, %zu running", m->n_done, m->n_running);
    status = deadlines_poll(m->polls, n);
    if (status == STATUS_OK && n > n_streams && m->polls[n_streams].revents)
        status = read_input(m);
    n = 0;
    for (size_t i = 0; i < m->n_items && status == STATUS_OK && n < n_streams; i++)
        if (m->items[i]->state == ITEM_RUNNING && m->polls[n++].revents)
            status = read_events(m, m->items[i]);
    return status;
}

static int work(struct map *m)
{
    int status = STATUS_OK;

    deadlines_hold();
    while (status == STATUS_OK) {
        status = take_inputs(m);
        if (status == STATUS_OK)
            status = start_items(m);
        if (status == STATUS_OK)
            status = print_items(m);
        if (status != STATUS_OK || (m->fail_fast && m->n_failed > 0))
            break;
        if (m->n_items == 0 && m->eof && m->in.n == 0)
            break;
        /* Items that were done at once make room for inputs that are there already. */
        if (m->n_running > 0 || wants_input(m))
            status = wait_for_news(m);
    }
    status_line_clear();
    if (status == STATUS_TIMEOUT)
        complain(status, "not all was answered within the time given");
    return status == STATUS_OK && m->n_failed > 0 ? STATUS_FAILED : status;
}

int verb_map(int argc, char **argv)
{
    struct map m = {0};
    int status;

    status = parse_arguments(&m, argc, argv);
    if (status == -1) {
        deadlines_begin(global.timeout_usec);
        status = join_instructions(&m, argc, argv);
        if (status == STATUS_OK)
            status = prepare(&m);
        if (status == STATUS_OK)
            status = work(&m);
        deadlines_hold(); /* nothing is to be cut short any more */
    }
    for (size_t i = 0; i < m.n_items; i++)
        item_free(m.items[i]);
    free(m.items);
    free(m.polls);
    free(m.instructions);
    buffer_done(&m.in);
    llm_session_free(m.base);
    llm_options_free(m.session_options);
    llm_disconnect(m.connection);
    request_done(&m.request);
    return status;
}
