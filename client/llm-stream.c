/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "client/llm-internal.h"
#include "ipc/record.h"

struct llm_stream {
    int fd;
    struct record_reader reader;
    struct record record;
    struct llm_alternative top[RECORD_TOP_MAX]; /* of that record */
    bool over;                                  /* end or error was given out */
    llm_tap tap;
    void *tap_userdata;
};

int llm_stream_new(struct llm_stream **ret, int fd)
{
    struct llm_stream *s = calloc(1, sizeof(*s));

    if (!s) {
        closep(&fd);
        return -ENOMEM;
    }
    s->fd = fd;
    *ret = s;
    return 0;
}

void llm_stream_free(struct llm_stream *s)
{
    if (!s)
        return;
    closep(&s->fd);
    record_reader_done(&s->reader);
    free(s);
}

int llm_stream_fd(const struct llm_stream *s)
{
    return s->fd;
}

void llm_stream_tap(struct llm_stream *s, llm_tap tap, void *userdata)
{
    s->tap = tap;
    s->tap_userdata = userdata;
}

/* False for records that this version does not know. */
static bool to_event(struct llm_stream *s, struct llm_event *ret)
{
    const struct record *record = &s->record;
    struct llm_event e = {0};

    switch (record->type) {
    case RECORD_UNKNOWN:
        return false;
    case RECORD_DELTA:
        e.type = LLM_DELTA;
        e.text = record->text;
        e.n_text = record->n_text;
        e.has_token = record->has_token;
        e.id = record->id;
        e.logprob = record->logprob;
        e.entropy = record->entropy;
        for (size_t i = 0; i < record->n_top; i++)
            s->top[i] = (struct llm_alternative){
                .id = record->top[i].id,
                .logprob = record->top[i].logprob,
                .text = record->top[i].text,
                .n_text = record->top[i].n_text,
            };
        e.top = s->top;
        e.n_top = record->n_top;
        break;
    case RECORD_USAGE:
        e.type = LLM_USAGE;
        e.prompt_tokens = record->prompt_tokens;
        e.completion_tokens = record->completion_tokens;
        e.cached_tokens = record->cached_tokens;
        break;
    case RECORD_END:
        e.type = LLM_END;
        e.reason = record->reason;
        break;
    case RECORD_ERROR:
        e.type = LLM_ERROR;
        e.name = record->name;
        e.message = record->message;
        e.has_sizes = record->has_sizes;
        e.requested = record->requested;
        e.available = record->available;
        break;
    case RECORD_QUEUED:
        e.type = LLM_QUEUED;
        e.position = record->position;
        e.estimated_usec = record->estimated_usec;
        break;
    case RECORD_PROGRESS:
        e.type = LLM_PROGRESS;
        e.done = record->done;
        e.total = record->total;
        break;
    }
    *ret = e;
    return true;
}

int llm_stream_next(struct llm_stream *s, struct llm_event *ret)
{
    char block[16384];

    for (;;) {
        ssize_t n;
        int r;

        while ((r = s->over ? 0 : record_reader_next(&s->reader, &s->record)) > 0) {
            if (to_event(s, ret)) {
                s->over = ret->type == LLM_END || ret->type == LLM_ERROR;
                return 1;
            }
        }
        if (r < 0)
            return r;
        if (s->over)
            return 0;
        n = read(s->fd, block, sizeof(block));
        if (n < 0)
            return -errno;
        if (n == 0)
            return -EPIPE;
        r = s->tap ? s->tap(block, (size_t)n, s->tap_userdata) : 0;
        if (r >= 0)
            r = record_reader_feed(&s->reader, block, (size_t)n);
        if (r < 0)
            return r;
    }
}
