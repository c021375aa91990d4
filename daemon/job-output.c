/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* What goes from the threads that work to the loop: records, and jobs that are over. */

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "daemon/engine-thread-internal.h"
#include "engine/model-file.h"
#include "engine/model.h"
#include "ipc/bus-error.h"
#include "ipc/record.h"

#define OUTPUT_PAUSE 65536 /* bytes */

void engine_thread_ring(struct engine_thread *t)
{
    uint64_t one = 1;

    /* Nothing to do about a failure: the counter cannot be full, the descriptor is ours. */
    (void)!write(t->news_fd, &one, sizeof(one));
}

void job_announce(struct engine_thread *t, struct job *j)
{
    if (j->has_news)
        return;
    j->has_news = true;
    j->news_next = NULL;
    *t->news_end = j;
    t->news_end = &j->news_next;
    engine_thread_ring(t);
}

bool job_is_paused(const struct job *j)
{
    return j->sendable - MIN(j->sent, j->sendable) >= OUTPUT_PAUSE;
}

void job_append(struct job *j, const struct record *record)
{
    struct job_work *w = &j->work;
    const char *data = NULL;
    size_t n = 0;
    int r = 0;

    if (w->cut || !j->record)
        return;
    if (j->request.format == JOB_RECORDS) {
        w->line.n = 0;
        r = record_write(&w->line, record);
        data = w->line.data;
        n = w->line.n;
    } else if (record->type == RECORD_DELTA) {
        data = record->text;
        n = record->n_text;
    }
    if (r >= 0 && n > 0)
        r = request_record_append(j->record, w->log_bytes, data, n);
    if (r < 0)
        w->cut = true;
    else
        w->log_bytes += n;
}

static void commit(struct engine_thread *t, struct job *j, uint64_t sendable)
{
    struct job_work *w = &j->work;

    if (!j->record)
        return;
    w->commit.n_sampled = w->n_sampled;
    w->commit.log_bytes = w->log_bytes;
    if (w->generation)
        generation_get_state(w->generation, &w->commit.generation);
    request_record_commit(j->record, &w->commit);
    pthread_mutex_lock(&t->mutex);
    if (j->sendable != sendable) {
        j->sendable = sendable;
        job_announce(t, j);
    }
    pthread_mutex_unlock(&t->mutex);
}

void job_commit(struct engine_thread *t, struct job *j)
{
    commit(t, j, j->work.log_bytes);
}

void job_emit(struct engine_thread *t, struct job *j, const struct record *record)
{
    job_append(j, record);
    job_commit(t, j);
}

/*
 * Whoever has read the end may ask the next at once, and must not find the session busy: so it is
 * kept back until the loop knows.
 */
void job_emit_last(struct engine_thread *t, struct job *j, const struct record *record)
{
    uint64_t before = j->work.log_bytes;

    job_append(j, record);
    commit(t, j, before);
}

static void unlink_from_timeline(struct timeline *tl, struct job *j)
{
    struct job **link = &tl->jobs;

    while (*link != j)
        link = &(*link)->timeline_next;
    *link = j->timeline_next;
    j->timeline_next = NULL;
}

/* With the mutex held. */
static void count(struct engine_thread *t, const struct job *j)
{
    struct engine_statistics *s = &t->statistics;

    if (!job_kind_streams(j->request.kind))
        return;
    s->requests++;
    s->prompt_tokens += j->usage.prompt_tokens;
    s->completion_tokens += j->usage.completion_tokens;
    if (j->result < 0)
        s->requests_failed++;
    else if (j->was_stopped)
        s->requests_cancelled++;
}

/* With the mutex held: between two requests this is the session. */
static void settle(struct timeline *tl, const struct job *j)
{
    tl->n_settled = tl->session ? session_n_tokens(tl->session) : 0;
    tl->last_request = j->id;
    timeline_commit(tl);
}

void job_let_go(struct engine_thread *t, struct job *j)
{
    struct timeline *tl = j->timeline;

    pthread_mutex_lock(&t->mutex);
    count(t, j);
    if (tl) {
        unlink_from_timeline(tl, j);
        if (job_kind_streams(j->request.kind)) {
            tl->info.prompt_tokens += j->usage.prompt_tokens;
            tl->info.completion_tokens += j->usage.completion_tokens;
            tl->info.state = TIMELINE_IDLE;
            tl->info.queue_position = 0;
            tl->info.estimate_usec = 0;
        }
        if (j->request.kind != JOB_MEASURE)
            settle(tl, j);
        if (tl->is_closed && !tl->jobs) {
            t->wakes = true; /* the engine thread frees it, whichever thread this is */
            pthread_cond_broadcast(&t->changed);
        }
    }
    j->finished = true;
    job_announce(t, j);
    pthread_mutex_unlock(&t->mutex);
}

static void emit_error(struct engine_thread *t, struct job *j)
{
    struct record record = {
        .type = RECORD_ERROR,
        .name = bus_error_name(j->result),
        .message = j->error.text[0] ? j->error.text : strerror(-j->result),
    };

    if (j->result == -EMSGSIZE && j->n_wanted > 0) {
        record.has_sizes = true;
        record.requested = j->n_wanted;
        record.available = j->room;
    }
    j->work.commit.phase = REQUEST_UNDONE;
    j->work.commit.usage = j->usage;
    job_emit_last(t, j, &record);
}

void job_finish_error(struct engine_thread *t, struct job *j, int code, const struct error *err)
{
    j->result = code;
    if (err && err != &j->error)
        j->error = *err;
    emit_error(t, j);
    job_let_go(t, j);
}

int lost_error(struct error *err, int code)
{
    switch (code) {
    case -ENODEV:
        return error_set(err, ENODEV, "what computes has failed; restart the daemon");
    case -ENOTRECOVERABLE:
        return error_set(
            err, ENOTRECOVERABLE,
            "the model's file changed while it was in use, or cannot be read any more; "
            "nothing that was computed from it since is given out");
    default:
        return error_set(err, -code, "the step failed");
    }
}

static void finish_stopped_simple(struct engine_thread *t, struct job *j, enum job_stop why)
{
    struct error err;
    int code;

    if (why == JOB_SHUTDOWN)
        code = error_set(&err, ESHUTDOWN, "the daemon is about to end");
    else if (why == JOB_CLOSED)
        code = error_set(&err, ESRCH, "the session was closed");
    else
        code = error_set(&err, ECANCELED, "the request was cancelled");
    job_finish_error(t, j, code, &err);
}

void job_finish_stopped(struct engine_thread *t, struct job *j)
{
    enum job_stop why = (enum job_stop)atomic_load(&j->stop);
    struct error err;

    if (why == JOB_LOST) {
        job_finish_error(t, j,
                         error_set(&err, ESTALE,
                                   "the daemon ended several times while it was at work on this "
                                   "request, which is given up; the session is as it was before"),
                         &err);
        return;
    }
    /* That is why the daemon ends, and the engine thread may not have come across it yet. */
    if (why == JOB_SHUTDOWN && !model_file_is_intact(model_get_file(t->model))) {
        lost_error(&err, -ENOTRECOVERABLE);
        job_finish_error(t, j, -ENOTRECOVERABLE, &err);
        return;
    }
    if (!job_kind_streams(j->request.kind)) {
        finish_stopped_simple(t, j, why);
        return;
    }
    j->result = 0;
    j->was_stopped = true;
    j->end_reason = why == JOB_SHUTDOWN ? "shutdown" : why == JOB_CLOSED ? "closed" : "cancelled";
    j->work.commit.phase = REQUEST_UNDONE;
    j->work.commit.usage = j->usage;
    job_emit_last(t, j, &(struct record){.type = RECORD_END, .reason = j->end_reason});
    job_let_go(t, j);
}
