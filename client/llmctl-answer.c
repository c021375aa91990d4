/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "client/llmctl-answer.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "client/llmctl-output.h"
#include "ipc/names.h"

DEFINE_CLEANUP(struct llm_stream *, llm_stream_free)

struct reading {
    struct answer *answer;
    bool over;
    int status;
};

void answer_done(struct answer *a)
{
    buffer_done(&a->text);
}

void answer_clear(struct answer *a)
{
    buffer_consume(&a->text, a->text.n);
    *a = (struct answer){.output = a->output, .hint = a->hint, .text = a->text};
}

const char *answer_error_text(const struct llm_event *e, const char *hint)
{
    static char text[700];

    /* The daemon's own line tells the two numbers, but not to whom it speaks. */
    if (e->has_sizes)
        snprintf(text, sizeof(text),
                 "the prompt has %" PRIu64 " tokens and the session has room for %" PRIu64
                 "; nothing was cut: %s",
                 e->requested, e->available, hint);
    else
        snprintf(text, sizeof(text), "%s", e->message);
    return text;
}

const char *answer_refusal_text(const struct llm_error *err, const char *hint)
{
    static char text[700];

    if (strcmp(err->name, LLM_ERROR_PREFIX "ContextFull") != 0)
        return err->message;
    snprintf(text, sizeof(text), "%s; nothing was cut: %s", err->message, hint);
    return text;
}

static int show(struct answer *a, const char *text, size_t n)
{
    if (n == 0)
        return STATUS_OK;
    switch (a->output) {
    case ANSWER_TEXT:
    case ANSWER_TERMINAL:
        status_line_clear();
        a->newline_due = text[n - 1] != '\n';
        return a->output == ANSWER_TEXT ? output_put(text, n) : output_put_on_terminal(text, n);
    case ANSWER_RECORDS:
        break; /* they are shown as they come */
    case ANSWER_COLLECT:
        if (buffer_append(&a->text, text, n) < 0)
            return complain(STATUS_FAILED, "out of memory");
        break;
    }
    return STATUS_OK;
}

static void take_event(struct reading *g, const struct llm_event *e)
{
    struct answer *a = g->answer;

    switch (e->type) {
    case LLM_DELTA:
        g->status = show(a, e->text, e->n_text);
        break;
    case LLM_USAGE:
        a->prompt_tokens = e->prompt_tokens;
        a->completion_tokens = e->completion_tokens;
        a->cached_tokens = e->cached_tokens;
        break;
    case LLM_QUEUED:
        if (e->estimated_usec > 0)
            status_line("waiting: place %" PRIu32 ", about %.0f s", e->position,
                        (double)e->estimated_usec / 1e6 + 0.5);
        else
            status_line("waiting: place %" PRIu32, e->position);
        break;
    case LLM_PROGRESS:
        status_line("reading the prompt: %" PRIu64 " of %" PRIu64 " tokens", e->done, e->total);
        break;
    case LLM_END:
        g->over = true;
        snprintf(a->reason, sizeof(a->reason), "%s", e->reason);
        if (strcmp(e->reason, "shutdown") == 0)
            g->status = complain(STATUS_FAILED, "the daemon ended before the answer did");
        else if (strcmp(e->reason, "closed") == 0)
            g->status = complain(STATUS_FAILED, "the session was closed");
        break;
    case LLM_ERROR:
        g->over = true;
        snprintf(a->error_name, sizeof(a->error_name), "%s", e->name);
        status_line_clear();
        g->status =
            complain(status_of(-llm_error_number(e->name)), "%s", answer_error_text(e, a->hint));
        break;
    }
}

static int copy_out(const void *data, size_t n, void *userdata)
{
    struct reading *g = userdata;

    status_line_clear();
    g->status = output_put(data, n);
    return g->status == STATUS_OK ? 0 : -EIO;
}

/* All that is there now. */
static void read_events(struct reading *g, struct llm_stream *stream)
{
    struct llm_event event;
    int r;

    while (!g->over && g->status == STATUS_OK) {
        r = llm_stream_next(stream, &event);
        if (r == -EAGAIN || r == -EINTR)
            return;
        if (r > 0)
            take_event(g, &event);
        else if (r == 0)
            g->over = true;
        else if (r == -EPIPE) {
            g->answer->broken = true;
            g->status = complain(STATUS_FAILED, "the daemon went away before the answer's end");
        } else if (g->status == STATUS_OK)
            g->status = complain(STATUS_FAILED, "the stream cannot be read: %s", strerror(-r));
    }
}

int answer_read(struct answer *a, int fd, answer_cancel cancel, void *userdata)
{
    CLEANUP(llm_stream_freep) struct llm_stream *stream = NULL;
    struct reading g = {.answer = a};
    int interruption = STATUS_OK;

    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0) { /* our end only */
        close(fd);
        return complain(STATUS_FAILED, "%s", strerror(errno));
    }
    if (llm_stream_new(&stream, fd) < 0)
        return complain(STATUS_FAILED, "out of memory");
    if (a->output == ANSWER_RECORDS)
        llm_stream_tap(stream, copy_out, &g);
    deadlines_hold();
    while (!g.over && g.status == STATUS_OK) {
        g.status = deadlines_wait(llm_stream_fd(stream), POLLIN);
        read_events(&g, stream);
        if (cancel && interruption == STATUS_OK &&
            (g.status == STATUS_INTERRUPTED || g.status == STATUS_TIMEOUT)) {
            interruption = g.status;
            g.status = STATUS_OK;
            deadlines_clear();
            cancel(userdata);
        }
    }
    status_line_clear();
    return g.status == STATUS_OK ? interruption : g.status;
}
