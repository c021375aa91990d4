/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmctl run: one prompt, one answer. Until the request is made, Ctrl-C and the time limit simply
 * end the process; while the answer comes they are blocked and waited for together with the
 * stream, so that the daemon is told.
 */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"
#include "client/llmctl.h"
#include "ipc/buffer.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

static void help(void)
{
    puts("Usage: llmctl run [OPTION...] [PROMPT...]\n"
         "Answers a prompt. What comes through a pipe is added to it after a newline.\n"
         "\n"
         "  llmctl run \"Why is the sky blue?\"\n"
         "  git diff | llmctl run \"Write a commit message\"\n"
         "\n"
         "      --instructions TEXT        how to answer, for the model\n"
         "      --raw                      the prompt as it is, without chat template\n"
         "  -n, --no-stdin                 do not read standard input\n"
         "      --max-tokens N             most tokens of the answer\n"
         "      --temperature X            0: always the most probable token\n"
         "      --top-k N, --top-p X, --min-p X\n"
         "      --repetition-penalty X, --presence-penalty X, --frequency-penalty X\n"
         "      --penalty-last-n N         tokens that the penalties look back\n"
         "      --seed N                   the same answer again\n"
         "      --stop TEXT                end before this text; may be given several times\n"
         "      --logprobs                 with --json: each token's log-probability\n"
         "      --top-logprobs N           and so many alternatives\n"
         "      --ignore-end               go on past the end of the answer\n"
         "      --context N                tokens the conversation may hold\n"
         "      --model FILE               the model for a daemon that is started (default:\n"
         "                                 $LLMD_MODEL, else the installed one)\n"
         "      --no-start                 do not start a daemon\n" GLOBAL_HELP);
}

enum {
    OPT_INSTRUCTIONS = 256,
    OPT_RAW,
    OPT_MODEL,
    OPT_NO_START,
    OPT_CONTEXT,
    OPT_BUS, /* and up: options that go to the daemon as they are, by place in bus_options */
};

static const struct {
    const char *name; /* on the bus and here */
    char type;        /* of a{sv}: d, u, t, b; A: as */
} bus_options[] = {
    {"max-tokens", 'u'},
    {"temperature", 'd'},
    {"top-k", 'u'},
    {"top-p", 'd'},
    {"min-p", 'd'},
    {"repetition-penalty", 'd'},
    {"presence-penalty", 'd'},
    {"frequency-penalty", 'd'},
    {"penalty-last-n", 'u'},
    {"seed", 't'},
    {"stop", 'A'},
    {"logprobs", 'b'},
    {"top-logprobs", 'u'},
    {"ignore-end", 'b'},
};

#define N_BUS_OPTIONS (sizeof(bus_options) / sizeof(bus_options[0]))

struct run {
    struct start_options start;
    struct llm_options *options, *session_options;
    struct buffer prompt;
    bool raw, no_stdin;
    const char *instructions;
};

static int set_bus_option(struct run *run, size_t i, const char *value)
{
    const char *name = bus_options[i].name;
    uint64_t integer;
    double number;
    int r = 0;

    switch (bus_options[i].type) {
    case 'u':
        if (!parse_unsigned(value, UINT32_MAX, &integer))
            return usage_error("--%s wants a whole number, not %s", name, value);
        r = llm_options_set_uint32(run->options, name, (uint32_t)integer);
        break;
    case 't':
        if (!parse_unsigned(value, UINT64_MAX, &integer))
            return usage_error("--%s wants a whole number, not %s", name, value);
        r = llm_options_set_uint64(run->options, name, integer);
        break;
    case 'd':
        if (!parse_double(value, &number))
            return usage_error("--%s wants a number, not %s", name, value);
        r = llm_options_set_double(run->options, name, number);
        break;
    case 'b':
        r = llm_options_set_bool(run->options, name, true);
        break;
    case 'A':
        r = llm_options_add_string(run->options, name, value);
        break;
    }
    return r < 0 ? complain(STATUS_FAILED, "%s", strerror(-r)) : STATUS_OK;
}

/* -1: go on; else the exit status. */
static int parse_arguments(struct run *run, int argc, char **argv)
{
    struct option table[8 + N_BUS_OPTIONS] = {
        {"instructions", required_argument, NULL, OPT_INSTRUCTIONS},
        {"raw", no_argument, NULL, OPT_RAW},
        {"no-stdin", no_argument, NULL, 'n'},
        {"model", required_argument, NULL, OPT_MODEL},
        {"no-start", no_argument, NULL, OPT_NO_START},
        {"context", required_argument, NULL, OPT_CONTEXT},
    };
    const struct verb_options options = {.letters = "n", .options = table, .help = help};
    size_t n = 6;
    uint64_t integer;
    int c, status = STATUS_FAILED;

    for (size_t i = 0; i < N_BUS_OPTIONS; i++)
        table[n++] = (struct option){bus_options[i].name,
                                     bus_options[i].type == 'b' ? no_argument : required_argument,
                                     NULL, OPT_BUS + (int)i};

    while ((c = next_option(&options, argc, argv, &status)) >= 0) {
        switch (c) {
        case OPT_INSTRUCTIONS:
            run->instructions = optarg;
            break;
        case OPT_RAW:
            run->raw = true;
            break;
        case 'n':
            run->no_stdin = true;
            break;
        case OPT_MODEL:
            run->start.model = optarg;
            break;
        case OPT_NO_START:
            run->start.no_start = true;
            break;
        case OPT_CONTEXT:
            if (!parse_unsigned(optarg, UINT32_MAX, &integer) || integer == 0)
                return usage_error("--context wants a number of tokens, not %s", optarg);
            if (llm_options_set_uint32(run->session_options, "context", (uint32_t)integer) < 0)
                return complain(STATUS_FAILED, "out of memory");
            break;
        default:
            status = set_bus_option(run, (size_t)(c - OPT_BUS), optarg);
            if (status != STATUS_OK)
                return status;
        }
    }
    if (c == OPTION_STOP)
        return status;
    if (run->raw && run->instructions)
        return usage_error("--raw and --instructions exclude each other");
    return -1;
}

/* ---- the prompt ---- */

static int add_to_prompt(struct run *run, const char *data, size_t n)
{
    if (n > LLM_PROMPT_BYTES_MAX - run->prompt.n)
        return complain(STATUS_FAILED, "the prompt has more than %u bytes; nothing was sent",
                        LLM_PROMPT_BYTES_MAX);
    return buffer_append(&run->prompt, data, n) < 0 ? complain(STATUS_FAILED, "out of memory")
                                                    : STATUS_OK;
}

static int read_prompt(struct run *run, int argc, char **argv)
{
    bool first = true;
    char block[65536];
    ssize_t n;
    int status;

    for (int i = optind; i < argc; i++) {
        if (i > optind && (status = add_to_prompt(run, " ", 1)) != STATUS_OK)
            return status;
        status = add_to_prompt(run, argv[i], strlen(argv[i]));
        if (status != STATUS_OK)
            return status;
    }
    if (!run->no_stdin && !isatty(STDIN_FILENO)) {
        while ((n = read(STDIN_FILENO, block, sizeof(block))) != 0) {
            if (n < 0 && errno == EINTR)
                continue;
            if (n < 0 && errno == EBADF)
                break; /* closed: as good as empty */
            if (n < 0)
                return complain(STATUS_FAILED, "cannot read standard input: %s", strerror(errno));
            if (first && run->prompt.n > 0 && (status = add_to_prompt(run, "\n", 1)) != STATUS_OK)
                return status;
            first = false;
            status = add_to_prompt(run, block, (size_t)n);
            if (status != STATUS_OK)
                return status;
        }
    }
    if (run->prompt.n == 0)
        return usage_error("there is no prompt");
    return STATUS_OK;
}

/* ---- the answer ---- */

/*
 * Nobody may be reading, and while write() waited, Ctrl-C and the time limit would, too. So it is
 * called when there is room, and with no more than a pipe then takes without waiting.
 */
static int put_all(const char *data, size_t n)
{
    while (n > 0) {
        struct pollfd p = {.fd = STDOUT_FILENO, .events = POLLOUT};
        ssize_t w;
        int status;

        if (poll(&p, 1, 0) == 0) {
            status = deadlines_wait(STDOUT_FILENO, POLLOUT);
            if (status != STATUS_OK)
                return status;
        }
        w = write(STDOUT_FILENO, data, MIN(n, PIPE_BUF));
        if (w < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (w < 0)
            return complain(STATUS_FAILED, "cannot write: %s", strerror(errno));
        data += w;
        n -= (size_t)w;
    }
    return STATUS_OK;
}

/* On a terminal the model must not speak to the terminal: no control characters but these two. */
static int put_on_terminal(const char *text, size_t n)
{
    size_t start = 0;
    int status;

    for (size_t i = 0; i < n;) {
        uint32_t c;
        size_t used = utf8_next(text + i, n - i, &c); /* a record's text is valid */

        if ((c < 0x20 && c != '\n' && c != '\t') || (c >= 0x7f && c < 0xa0)) {
            status = put_all(text + start, i - start);
            if (status == STATUS_OK)
                status = put_all("\xef\xbf\xbd", 3);
            if (status != STATUS_OK)
                return status;
            start = i + used;
        }
        i += used;
    }
    return put_all(text + start, n - start);
}

struct answer {
    bool json, terminal;
    bool newline_due; /* the text so far does not end with one */
    bool over;
    int status;
};

static void take_event(struct answer *a, const struct llm_event *e)
{
    switch (e->type) {
    case LLM_DELTA:
        if (!a->json && e->n_text > 0) {
            a->status =
                a->terminal ? put_on_terminal(e->text, e->n_text) : put_all(e->text, e->n_text);
            a->newline_due = e->text[e->n_text - 1] != '\n';
        }
        break;
    case LLM_USAGE:
    case LLM_QUEUED:
    case LLM_PROGRESS:
        break;
    case LLM_END:
        a->over = true;
        if (strcmp(e->reason, "shutdown") == 0)
            a->status = complain(STATUS_FAILED, "the daemon ended before the answer did");
        else if (strcmp(e->reason, "cancelled") == 0)
            a->status = complain(STATUS_FAILED, "the request was cancelled");
        break;
    case LLM_ERROR:
        a->over = true;
        a->status = complain(status_of(-bus_error_code(e->name)), "%s", e->message);
        break;
    }
}

/* With --json: the stream's bytes as they come. */
static int copy_out(const void *data, size_t n, void *userdata)
{
    struct answer *a = userdata;

    a->status = put_all(data, n);
    return a->status == STATUS_OK ? 0 : -EIO;
}

/* That the request is cancelled, where the answer is not over, follows from the stream's end. */
static int read_answer(struct llm_stream *stream, struct answer *a)
{
    deadlines_hold();
    while (!a->over && a->status == STATUS_OK) {
        struct llm_event event;
        int r;

        a->status = deadlines_wait(llm_stream_fd(stream), POLLIN);
        while (!a->over && a->status == STATUS_OK) {
            r = llm_stream_next(stream, &event);
            if (r == -EAGAIN || r == -EINTR)
                break;
            if (r == -EPIPE)
                return complain(STATUS_FAILED, "the daemon went away before the answer's end");
            if (r < 0 && a->status == STATUS_OK)
                return complain(STATUS_FAILED, "the stream cannot be read: %s", strerror(-r));
            if (r > 0)
                take_event(a, &event);
        }
    }
    if (a->status == STATUS_TIMEOUT)
        complain(a->status, "no answer within the time given");
    return a->status;
}

static int ask(struct run *run, struct answer *a)
{
    CLEANUP(freep) char *model = NULL;
    struct llm_connection *connection = NULL;
    struct llm_session *session = NULL;
    struct llm_stream *stream = NULL;
    struct llm_error err;
    int status, fd, r;

    status = connect_or_start(&run->start, &connection, &model);
    if (status != STATUS_OK)
        return status;
    r = model ? llm_options_set_string(run->session_options, "model", model) : 0;
    if (r == 0)
        r = llm_session_new(&session, connection, run->session_options, &err);
    else
        snprintf(err.message, sizeof(err.message), "%s", strerror(-r));
    if (r == 0)
        r = llm_session_generate(session, run->options, &fd, NULL, &err);
    if (r == 0 && fcntl(fd, F_SETFL, O_NONBLOCK) < 0) /* our end only */
        r = -errno;
    if (r == 0)
        r = llm_stream_new(&stream, fd);
    if (r == 0) {
        if (a->json)
            llm_stream_tap(stream, copy_out, a);
        status = read_answer(stream, a);
    } else {
        status = complain(status_of(r), "%s", err.message);
    }
    llm_stream_free(stream);
    llm_session_free(session);
    llm_disconnect(connection);
    return status;
}

static int make_options(struct run *run)
{
    int r = 0;

    if (run->instructions)
        r = llm_options_add_message(run->options, "system", run->instructions);
    if (r == 0 && run->raw)
        r = llm_options_set_bool(run->options, "raw", true);
    if (r == 0)
        r = llm_options_set_memory(run->options, "prompt-fd", run->prompt.data, run->prompt.n);
    return r < 0 ? complain(STATUS_FAILED, "%s", strerror(-r)) : STATUS_OK;
}

int verb_run(int argc, char **argv)
{
    struct run run = {0};
    struct answer answer = {0};
    int status = STATUS_FAILED;

    if (llm_options_new(&run.options) < 0 || llm_options_new(&run.session_options) < 0)
        complain(STATUS_FAILED, "out of memory");
    else
        status = parse_arguments(&run, argc, argv);
    if (status == -1) {
        deadlines_begin(global.timeout_usec);
        answer.json = global.json != JSON_OFF;
        answer.terminal = isatty(STDOUT_FILENO);
        status = read_prompt(&run, argc, argv);
        if (status == STATUS_OK)
            status = make_options(&run);
        if (status == STATUS_OK)
            status = ask(&run, &answer);
        if (answer.terminal && answer.newline_due)
            put_all("\n", 1);
    }
    buffer_done(&run.prompt);
    llm_options_free(run.options);
    llm_options_free(run.session_options);
    return status;
}
