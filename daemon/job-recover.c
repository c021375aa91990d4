/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Sessions and requests of a process that is gone, in the engine thread. A session has in its
 * record how it was between two requests (struct session_state), and in the engine's memory the
 * tokens at the moment of the kill. Where a request goes on the tokens beyond the state are its
 * own; else they are of something that was never answered, and go.
 */

#include <errno.h>
#include <string.h>

#include "base/checked.h"
#include "daemon/engine-thread-internal.h"
#include "engine/model.h"

/* ---- sessions ---- */

static int clear(struct session_record *record, struct error *err)
{
    int r = session_record_clear_memory(record);

    return r < 0 ? error_set(err, -r, "its memory cannot be cleared: %s", strerror(-r)) : 0;
}

/* Of a rewind that was not answered the tokens are gone and the state is not yet told. */
static void fit_state(struct engine_thread *t, struct session *s, struct session_state *state)
{
    uint32_t n = session_n_tokens(s);

    if (n > state->n_tokens)
        session_rewind(s, state->n_tokens);
    if (n >= state->n_tokens)
        return;
    state->n_tokens = n;
    state->has_tail = false;
    state->position = CHAT_START;
    if (n > 0 && model_tokenizer(t->model))
        state->position = chat_position_find(model_tokenizer(t->model), session_tokens(s), n);
    else if (n > 0)
        state->position = CHAT_OPEN_MODEL;
}

static int adopt(struct engine_thread *t, struct adoption *a)
{
    struct timeline *tl = a->timeline;
    struct session_record *record = tl->options.record;
    struct session_state *state = &a->state;
    int r;

    if (state->has_tail && state->tail >= model_config(t->model)->vocab_size)
        return error_set(&a->error, EBADMSG, "the record is not sound: its last token");
    if (!session_record_has_engine(record)) {
        if (state->n_tokens > 0)
            return error_set(&a->error, EBADMSG, "the record is not sound: its tokens are missing");
        r = clear(record, &a->error);
    } else {
        r = session_adopt(&tl->session, t->engine, tl->options.n_ctx, session_record_memory(record),
                          &a->error);
    }
    if (r < 0)
        return r;
    if (tl->session && a->continues && session_n_tokens(tl->session) < state->n_tokens)
        a->continues = false; /* it was being taken back */
    if (tl->session && !a->continues)
        fit_state(t, tl->session, state);
    a->n_tokens = tl->session ? session_n_tokens(tl->session) : 0;
    return 0;
}

static void enter(struct engine_thread *t, struct adoption *a)
{
    struct timeline *tl = a->timeline;
    const struct session_state *state = &a->state;

    pthread_mutex_lock(&t->mutex);
    tl->position = state->position;
    tl->has_tail = state->has_tail;
    tl->tail = state->tail;
    tl->n_settled = state->n_tokens;
    tl->last_request = state->last_request;
    tl->info.prompt_tokens = state->prompt_tokens;
    tl->info.completion_tokens = state->completion_tokens;
    tl->info.kv_bytes = tl->session ? session_kv_bytes(tl->session) : 0;
    tl->last_used = ++t->n_uses;
    atomic_store(&tl->n_tokens, MIN(state->n_tokens + state->has_tail, tl->options.n_ctx));
    timeline_commit(tl);
    engine_thread_list(t, tl);
    pthread_mutex_unlock(&t->mutex);
}

void recover_adopt(struct engine_thread *t)
{
    for (size_t i = 0; i < t->n_adoptions; i++) {
        struct adoption *a = &t->adoptions[i];

        a->result = adopt(t, a);
        if (a->result >= 0)
            enter(t, a);
    }
    engine_adopted(t->engine);
    pthread_mutex_lock(&t->mutex);
    t->adoptions = NULL;
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->mutex);
}

/* ---- requests ---- */

static bool take_commit(struct job *j, const uint32_t **ret_sampled)
{
    struct job_work *w = &j->work;

    bool committed = request_record_last_commit(j->record, &w->commit, ret_sampled);

    w->log_bytes = w->commit.log_bytes;
    w->n_sampled = w->commit.n_sampled;
    if (w->n_sampled > 0)
        w->last_id = (*ret_sampled)[w->n_sampled - 1];
    return committed;
}

static int changed(struct error *err)
{
    return error_set(err, ESTALE,
                     "the request could not be gone on with after a restart of the daemon: the "
                     "conversation is no longer what it was");
}

int recover_generation(struct job *j, struct error *err)
{
    struct job_work *w = &j->work;
    const uint32_t *sampled;
    int r;

    if (!take_commit(j, &sampled)) { /* it had not begun: nothing there is its own */
        session_rewind(j->timeline->session, request_record_before(j->record)->n_tokens);
        return generation_new(&w->generation, j->timeline->session, j->ids.data, j->ids.n,
                              &j->request.options, err);
    }
    r = generation_resume(&w->generation, j->timeline->session,
                          request_record_before(j->record)->n_tokens, j->ids.data, j->ids.n,
                          sampled, w->n_sampled, &j->request.options, &w->commit.generation, err);
    return r == -EINVAL ? changed(err) : r;
}

int recover_append(struct job *j, struct error *err)
{
    struct session *s = j->timeline->session;
    uint32_t start = request_record_before(j->record)->n_tokens;
    const uint32_t *sampled;
    uint32_t n;

    take_commit(j, &sampled);
    n = session_n_tokens(s) - MIN(start, session_n_tokens(s));
    if (n > j->ids.n || memcmp(session_tokens(s) + start, j->ids.data, n * sizeof(uint32_t)) != 0)
        return changed(err);
    if (n == j->ids.n && n > 0) /* all was computed, and it was not yet told: one row leads there */
        session_rewind(s, start + --n);
    j->work.n_done = n;
    return 0;
}

void recover_nothing(struct job *j)
{
    struct session *s = j->timeline->session;
    const uint32_t *sampled;

    if (!j->resumes)
        return;
    take_commit(j, &sampled);
    if (s && session_n_tokens(s) > request_record_before(j->record)->n_tokens)
        session_rewind(s, request_record_before(j->record)->n_tokens);
}
