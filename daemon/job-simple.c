/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* What needs no step of the model and is done between two of them. */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "daemon/engine-thread-internal.h"
#include "daemon/saved-session.h"
#include "engine/model.h"

static int do_fork(struct engine_thread *t, struct job *j, struct error *err)
{
    struct timeline *tl = j->timeline, *f;
    struct timeline_options options = j->request.fork;
    int r;

    options.n_ctx = tl->options.n_ctx;
    r = timeline_new(&f, &options);
    if (r < 0)
        return error_set(err, -r, "out of memory");
    j->request.fork.record = NULL;
    if (tl->session) {
        r = session_fork(&f->session, tl->session,
                         options.record ? session_record_memory(options.record) : NULL);
        if (r < 0) {
            timeline_free(f);
            return error_set(err, -r, "out of memory");
        }
        if (options.record)
            session_record_set_has_engine(options.record);
    }
    spill_share(t, tl, f);
    f->last_used = ++t->n_uses;
    tl->last_used = f->last_used; /* as long as its KV is there, forks are cheap */
    pthread_mutex_lock(&t->mutex);
    f->position = tl->position;
    f->has_tail = tl->has_tail;
    f->tail = tl->tail;
    f->n_settled = tl->n_settled;
    timeline_commit(f);
    engine_thread_list(t, f);
    pthread_mutex_unlock(&t->mutex);
    work_publish_timeline(t, f);
    j->n_tokens = timeline_n_tokens(f);
    j->fork = f;
    return 0;
}

static int do_rewind(struct engine_thread *t, struct job *j, struct error *err)
{
    struct timeline *tl = j->timeline;
    uint32_t used = work_n_tokens(tl), keep = j->request.rewind_to;
    enum chat_position position = CHAT_START;

    if (keep > used)
        return error_set(err, EINVAL, "tokens: %u are to stay, and the session has %u", keep, used);
    if (keep < used) {
        if (keep < session_n_tokens(tl->session))
            spill_forget(t, tl);
        session_rewind(tl->session, keep); /* nothing, when the tail alone goes */
        if (keep > 0 && model_tokenizer(t->model))
            position =
                chat_position_find(model_tokenizer(t->model), session_tokens(tl->session), keep);
        else if (keep > 0)
            position = CHAT_OPEN_MODEL;
        pthread_mutex_lock(&t->mutex);
        tl->position = position;
        tl->has_tail = false;
        pthread_mutex_unlock(&t->mutex);
        work_publish_timeline(t, tl);
    }
    j->n_tokens = keep;
    return 0;
}

static int model_identity(struct engine_thread *t, uint8_t ret[SAVED_MODEL_BYTES],
                          struct error *err)
{
    int r = saved_session_model(model_get_file(t->model), ret);

    return r < 0 ? error_set(err, EOPNOTSUPP, "the model file has no hash to know it by") : 0;
}

static int do_save(struct engine_thread *t, struct job *j, struct error *err)
{
    struct timeline *tl = j->timeline;
    struct saved_session s = {.position = j->position, .has_tail = j->has_tail, .tail = j->tail};
    int r = model_identity(t, s.model, err);

    if (r < 0)
        return r;
    if (tl->session) {
        s.n_tokens = session_n_tokens(tl->session);
        s.tokens = (uint32_t *)session_tokens(tl->session); /* borrowed, only read */
    }
    r = saved_session_write(&j->saved, &s);
    if (r < 0)
        return error_set(err, -r, r == -ENOMEM ? "out of memory" : "libcrypto: SHA-256 failed");
    j->n_tokens = work_n_tokens(tl);
    return 0;
}

static int do_restore(struct engine_thread *t, struct job *j, struct error *err)
{
    CLEANUP(saved_session_done) struct saved_session s = {0};
    struct timeline *tl = j->timeline;
    uint8_t model[SAVED_MODEL_BYTES];
    int r;

    if (timeline_n_tokens(tl) > 0)
        return error_set(err, EPROTO, "only an empty session takes a saved one; this has %u tokens",
                         timeline_n_tokens(tl));
    r = model_identity(t, model, err);
    if (r < 0)
        return r;
    r = saved_session_read(&s, j->request.saved.data, j->request.saved.n, model,
                           model_config(t->model)->vocab_size, tl->options.n_ctx, err);
    if (r < 0)
        return r;
    r = work_make_session(t, tl);
    if (r == 0)
        r = session_set_tokens(tl->session, s.tokens, s.n_tokens);
    if (r < 0)
        return error_set(err, -r, "out of memory");
    pthread_mutex_lock(&t->mutex);
    tl->position = s.position;
    tl->has_tail = s.has_tail;
    tl->tail = s.tail;
    pthread_mutex_unlock(&t->mutex);
    work_publish_timeline(t, tl);
    j->n_tokens = work_n_tokens(tl);
    return 0;
}

void simple_run(struct engine_thread *t, struct job *j)
{
    struct error err = {0};
    int r = -EINVAL;

    switch (j->request.kind) {
    case JOB_FORK:
        r = do_fork(t, j, &err);
        break;
    case JOB_REWIND:
        r = do_rewind(t, j, &err);
        break;
    case JOB_SAVE:
        r = do_save(t, j, &err);
        break;
    case JOB_RESTORE:
        r = do_restore(t, j, &err);
        break;
    case JOB_GENERATE:
    case JOB_APPEND:
    case JOB_MEASURE:
        break;
    }
    if (r < 0)
        job_finish_error(t, j, r, &err);
    else
        job_let_go(t, j);
}
