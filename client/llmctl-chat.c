/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmctl chat: a conversation, with a person or with a program.
 *
 * At a terminal, Ctrl-C is held back all the time but while the daemon is called: it is an event of
 * the editor or of the answer that comes. An answer that is cancelled is waited for to its end, so
 * that the session is known to be as it was before its message; a second Ctrl-C does not wait.
 *
 * In a pipe, an answer is printed when it is whole: a line is an answer, or is not there.
 */

#include "client/llmctl-chat.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "client/llmctl-bus.h"
#include "client/llmctl-editor.h"
#include "client/llmctl-exchange.h"
#include "client/llmctl-output.h"
#include "ipc/names.h"

#define READ_BYTES 65536

DEFINE_CLEANUP(struct llm_options *, llm_options_free)
DEFINE_CLEANUP(struct editor *, editor_free)

static void help(void)
{
    puts("Usage: llmctl chat [OPTION...]\n"
         "Holds a conversation. At a terminal, /help lists what can be done in it, Ctrl-C cancels "
         "an\n"
         "answer, and Ctrl-D leaves. From a pipe each line is a message and each answer a line: a "
         "line\n"
         "feed in it is written \\n, a backslash \\\\; with -0 messages and answers are as they "
         "are and\n"
         "end with NUL.\n"
         "\n"
         "  llmctl chat\n"
         "  printf '%s\\n' \"My name is Anna.\" \"What is my name?\" | llmctl chat\n"
         "\n"
         "  -0, --null                 in a pipe: NUL in the place of line feeds, in and out\n"
         "      --no-history           do not keep what is typed\n"
         "      --json                 in a pipe: an object for each message: index, input, "
         "output,\n"
         "                             reason, usage\n"
         "      --session=ID           go on with this session\n"
         "      --timeout=SECONDS      the most that one answer may take\n" REQUEST_HELP
             GLOBAL_HELP);
}

struct chat_arguments {
    bool null, no_history;
};

/* -1: go on; else the exit status. */
static int parse_arguments(struct chat *c, struct chat_arguments *a, int argc, char **argv)
{
    enum { OPT_NO_HISTORY = 256 };
    struct option table[REQUEST_N_OPTIONS + 2] = {
        {"null", no_argument, NULL, '0'},
        {"no-history", no_argument, NULL, OPT_NO_HISTORY},
    };
    const struct verb_options options = {.letters = "0", .options = table, .help = help};
    int o, status = STATUS_OK;

    request_options(table + 2);
    while ((o = next_option(&options, argc, argv, &status)) >= 0) {
        if (o == '0')
            a->null = true;
        else if (o == OPT_NO_HISTORY)
            a->no_history = true;
        else
            status = request_take(&c->request, o, optarg);
        if (status != STATUS_OK)
            return status;
    }
    if (o == OPTION_STOP)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s (llmctl run answers one prompt)", argv[optind]);
    status = request_check(&c->request);
    return status == STATUS_OK ? -1 : status;
}

/* ---- turns ---- */

static int get_number(struct chat *c, const char *property, uint32_t *ret)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    int r, status;

    status = bus_new(c->connection, llm_session_path(c->session), "org.freedesktop.DBus.Properties",
                     "Get", &m);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_append(m, "ss", LLM_SESSION_INTERFACE, property);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    r = bus_try(c->connection, m, &reply, &e);
    if (sd_bus_error_has_name(&e, LLM_ERROR_PREFIX "NoSuchSession"))
        c->lost = true;
    if (r != 0)
        return status_of_call(r, &e);
    return sd_bus_message_read(reply, "v", "u", ret) < 0 ? complain_of_answer() : STATUS_OK;
}

int chat_context(struct chat *c, uint32_t *ret_used, uint32_t *ret_max)
{
    int status = get_number(c, "ContextUsed", ret_used);

    return status == STATUS_OK ? get_number(c, "ContextMax", ret_max) : status;
}

static void cancel(void *userdata)
{
    struct chat *c = userdata;

    deadlines_release(); /* should the daemon not answer, Ctrl-C ends us */
    llm_session_cancel(c->session, NULL);
    deadlines_hold();
}

static int add_mark(struct chat *c, uint32_t used)
{
    uint32_t *grown = reallocarray(c->marks, c->n_marks + 1, sizeof(*grown));

    if (!grown)
        return complain(STATUS_FAILED, "out of memory");
    c->marks = grown;
    grown[c->n_marks++] = used;
    return STATUS_OK;
}

/*
 * Sends a message and reads the answer. STATUS_OK; a status, and the conversation is as before.
 * That it was cancelled is told by the caller.
 */
static int turn(struct chat *c, const char *text, size_t n, struct answer *a)
{
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    uint32_t used, most;
    struct llm_error err;
    int fd = -EBADF, r, status;

    answer_clear(a);
    status =
        request_make(&c->request, c->begun || c->request.raw ? NULL : c->system, text, n, &options);
    if (status != STATUS_OK)
        return status;
    deadlines_restart(global.timeout_usec);
    deadlines_release();
    status = chat_context(c, &used, &most);
    if (status == STATUS_OK) {
        r = llm_session_generate(c->session, options, &fd, NULL, &err);
        if (r < 0)
            status = complain(status_of(r), "%s", answer_refusal_text(&err, a->hint));
        c->lost = r == -ESTALE;
    }
    deadlines_hold();
    if (status == STATUS_OK)
        status = answer_read(a, fd, cancel, c);
    deadlines_restart(0);
    if (a->reason[0] == 0 || strcmp(a->reason, "cancelled") == 0)
        return status;
    /* It came to its end, perhaps just before it was to be cancelled. */
    c->begun = true;
    return add_mark(c, used);
}

/* ---- at a terminal ---- */

static bool has_ended(int status)
{
    return status == STATUS_NOT_RUNNING;
}

/* Whether the conversation goes on. */
static bool say(struct chat *c, const char *text, struct answer *a)
{
    int status = turn(c, text, strlen(text), a);

    if (a->newline_due)
        output_put("\n", 1);
    if (status == STATUS_OK && request_is_cut(&c->request, a->reason))
        note("the answer is cut: the context is full; /undo or /reset makes room");
    if (strcmp(a->reason, "cancelled") == 0)
        note("%s: the conversation is as it was before your message",
             status == STATUS_TIMEOUT ? "out of time" : "cancelled");
    else if (status == STATUS_INTERRUPTED && a->reason[0] == 0)
        return false; /* twice, and the daemon has not said that it ended */
    return !has_ended(status) && !c->lost && !a->broken && strcmp(a->reason, "shutdown") != 0 &&
           strcmp(a->reason, "closed") != 0;
}

static void greet(struct chat *c)
{
    struct llm_status s;

    if (llm_get_status(c->connection, &s, NULL) == 0)
        note("%s answers; /help lists commands, Ctrl-D leaves", s.model);
}

static int converse(struct chat *c, bool history)
{
    CLEANUP(editor_freep) struct editor *editor = NULL;
    CLEANUP(answer_done)
    struct answer answer = {
        .output = ANSWER_TERMINAL,
        .hint = "shorten it, or make room with /undo or /reset",
    };
    bool had_text;
    int r;

    greet(c);
    deadlines_hold();
    r = editor_new(&editor, history);
    if (r < 0)
        return complain(STATUS_FAILED, "the terminal cannot be used: %s", strerror(-r));
    while (!c->leave) {
        CLEANUP(freep) char *text = NULL;
        const char *message;

        r = editor_read(editor, &text, &had_text);
        if (r == -EINTR && !had_text)
            note("Ctrl-D or /quit leaves");
        if (r == -EINTR)
            continue;
        if (r < 0)
            return complain(STATUS_FAILED, "cannot read the terminal: %s", strerror(-r));
        if (r == 0) {
            output_put("\n", 1);
            break;
        }
        message = text;
        if (text[0] == '/' && text[1] != '/') {
            deadlines_release();
            chat_command(c, text);
            deadlines_hold();
            continue;
        }
        if (text[0] == '/')
            message++;
        if (text[strspn(text, " \t\n")] == 0)
            continue;
        if (!say(c, message, &answer))
            return STATUS_FAILED;
    }
    return STATUS_OK;
}

/* ---- in a pipe ---- */

struct lines {
    struct buffer in;
    size_t taken;    /* the bytes of `in` that were the last line, its delimiter included */
    size_t searched; /* so many have no delimiter */
    int delimiter;
    bool eof;
};

/* 1: [*ret, *ret_n), valid until the next call; 0: no more; -1: *ret_status, and a complaint */
static int next_line(struct lines *l, const char **ret, size_t *ret_n, int *ret_status)
{
    ssize_t n;

    if (l->taken > 0)
        buffer_consume(&l->in, l->taken);
    l->taken = l->searched = 0;
    for (;;) {
        const char *end = NULL;

        if (l->in.n > l->searched)
            end = memchr(l->in.data + l->searched, l->delimiter, l->in.n - l->searched);
        if (!end && l->eof && l->in.n == 0)
            return 0;
        if (end || l->eof) {
            *ret = l->in.data;
            *ret_n = end ? (size_t)(end - l->in.data) : l->in.n;
            l->taken = *ret_n + (end ? 1 : 0);
            if (*ret_n <= LLM_PROMPT_BYTES_MAX)
                return 1;
        }
        l->searched = l->in.n;
        *ret_status = STATUS_FAILED;
        if (l->in.n > LLM_PROMPT_BYTES_MAX) {
            complain(STATUS_FAILED, "a message has more than %u bytes", LLM_PROMPT_BYTES_MAX);
            return -1;
        }
        if (buffer_reserve(&l->in, READ_BYTES) < 0) {
            complain(STATUS_FAILED, "out of memory");
            return -1;
        }
        *ret_status = deadlines_wait(STDIN_FILENO, POLLIN);
        if (*ret_status != STATUS_OK)
            return -1;
        n = read(STDIN_FILENO, l->in.data + l->in.n, READ_BYTES);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n < 0 && errno != EBADF) {
            *ret_status =
                complain(STATUS_FAILED, "cannot read standard input: %s", strerror(errno));
            return -1;
        }
        if (n <= 0)
            l->eof = true;
        else
            l->in.n += (size_t)n;
    }
}

static int print_answer(const struct chat_arguments *arguments, const struct answer *a,
                        const struct exchange *x)
{
    CLEANUP(buffer_done) struct buffer line = {0};
    int r;

    if (global.json != JSON_OFF)
        return exchange_print(x);
    r = arguments->null ? buffer_append(&line, a->text.data, a->text.n)
                        : output_escape(&line, a->text.data, a->text.n);
    if (r == 0)
        r = buffer_append(&line, arguments->null ? "" : "\n", 1);
    if (r < 0)
        return complain(STATUS_FAILED, "out of memory");
    return isatty(STDOUT_FILENO) ? output_put_on_terminal(line.data, line.n)
                                 : output_put(line.data, line.n);
}

/* One message of a pipe. STATUS_OK, or the conversation ends with this status. */
static int answer_line(struct chat *c, const struct chat_arguments *arguments, struct answer *a,
                       uint64_t index, const char *text, size_t n)
{
    struct buffer input = {.data = (char *)text, .n = n}; /* borrowed */
    struct exchange x;
    int status = STATUS_OK;

    answer_clear(a);
    if (n > 0)
        status = turn(c, text, n, a);
    if (status == STATUS_OK && strcmp(a->reason, "cancelled") == 0)
        status = complain(STATUS_FAILED, "the request was cancelled");
    if (status == STATUS_TIMEOUT)
        complain(status, "no answer within the time given");
    if (status != STATUS_OK)
        return status;
    if (request_is_cut(&c->request, a->reason))
        note("the answer is cut: the context is full");
    x = (struct exchange){
        .index = index,
        .input = &input,
        .output = &a->text,
        .reason = a->reason,
        .prompt_tokens = a->prompt_tokens,
        .completion_tokens = a->completion_tokens,
        .cached_tokens = a->cached_tokens,
    };
    return print_answer(arguments, a, &x);
}

static int answer_lines(struct chat *c, const struct chat_arguments *arguments)
{
    CLEANUP(answer_done)
    struct answer answer = {
        .output = ANSWER_COLLECT,
        .hint = "shorten it, or ask for more with --context",
    };
    struct lines lines = {.delimiter = arguments->null ? 0 : '\n'};
    const char *text;
    uint64_t index = 0;
    size_t n;
    int status = STATUS_OK;

    deadlines_hold();
    while (status == STATUS_OK && next_line(&lines, &text, &n, &status) > 0)
        status = answer_line(c, arguments, &answer, ++index, text, n);
    buffer_done(&lines.in);
    return status;
}

/* ---- both ---- */

static int begin(struct chat *c)
{
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    uint32_t used, most;
    struct llm_error err;
    int r, status;

    if (c->request.instructions) {
        c->system = strdup(c->request.instructions);
        if (!c->system)
            return complain(STATUS_FAILED, "out of memory");
    }
    if (global.session) {
        status = request_connect(&c->request, &c->connection, &c->session);
        if (status == STATUS_OK)
            status = chat_context(c, &used, &most);
        if (status != STATUS_OK)
            return status;
        c->begun = used > 0;
        if (c->begun && c->system)
            return complain(STATUS_FAILED,
                            "--instructions stand before the first message, and this "
                            "session has begun");
        return STATUS_OK;
    }
    status = connect_or_start(&c->request.start, &c->connection, &c->model);
    if (status == STATUS_OK)
        status = request_make_session(&c->request, c->model, &options);
    if (status != STATUS_OK)
        return status;
    r = llm_session_new(&c->session, c->connection, options, &err);
    return r < 0 ? complain(status_of(r), "%s", err.message) : STATUS_OK;
}

static void chat_done(struct chat *c)
{
    llm_session_free(c->session);
    llm_disconnect(c->connection);
    for (size_t i = 0; i < c->n_values; i++)
        free(c->values[i]);
    free(c->values);
    free(c->marks);
    free(c->model);
    free(c->system);
    free(c->file);
    request_done(&c->request);
}

int verb_chat(int argc, char **argv)
{
    struct chat_arguments arguments = {0};
    struct chat c = {0};
    int status;

    status = parse_arguments(&c, &arguments, argc, argv);
    if (status == -1) {
        deadlines_begin(0); /* the time limit is each answer's */
        status = begin(&c);
        if (status == STATUS_OK && isatty(STDIN_FILENO) && isatty(STDOUT_FILENO))
            status = converse(&c, !arguments.no_history);
        else if (status == STATUS_OK)
            status = answer_lines(&c, &arguments);
    }
    chat_done(&c);
    return status;
}
