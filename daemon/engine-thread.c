/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Between any two steps the thread looks at what came in: new jobs are tokenised and become
 * generations, timelines are closed, jobs that shall stop are rolled back. Then it makes a step of
 * what is active: each job that decodes gives its one row, and the rows left go to prompts, in
 * chunks, beginning with another job each time. A chunk is as large as the machine can do in
 * STEP_USEC, because that is how long a cancellation and everybody else's next token have to wait.
 * What anybody gets does not depend on it: chunks of any size give the same bits.
 *
 * A job whose reader is slow stops being stepped while OUTPUT_PAUSE bytes of it wait; nothing else
 * about it changes. When no job can be stepped the thread sleeps on the condition, which is
 * signalled by submit, close, stop and by output that was taken.
 */

#include "daemon/engine-thread.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/model.h"
#include "engine/tokenizer.h"
#include "ipc/bus-error.h"
#include "ipc/record.h"

#define STEP_ROWS 256u /* of all jobs together */
#define PREFILL_ROWS_LEAST                                                                       \
    16u                        /* of all prompts together; fewer would waste each reading of the \
                                */
#define PREFILL_ROWS_MOST 256u /* weights */
#define STEP_USEC 200000u      /* what a step with a prompt in it should take */
#define OUTPUT_PAUSE 65536     /* bytes */

struct timeline {
    _Atomic uint32_t n_tokens; /* written by the engine thread, read by any */
    uint32_t n_ctx;

    /* engine thread */
    struct session *session;
    enum chat_position position;
    uint32_t tail; /* a token that was sampled and given out, but not evaluated */
    bool has_tail;

    struct timeline *next; /* engine_thread::closing */
};

enum thread_state {
    THREAD_STARTING,
    THREAD_RUNS,
    THREAD_FAILED,
};

struct engine_thread {
    pthread_t thread;
    const struct model *model;
    int news_fd; /* eventfd, written by the engine thread */

    pthread_mutex_t mutex; /* guards what follows, up to "engine thread", and job's part of it */
    pthread_cond_t changed;
    enum thread_state state;
    int start_result;
    struct error *start_error; /* engine_thread_new()'s, during the start only */
    bool quit;
    bool wakes; /* something came in since the engine thread last looked */
    struct job *submitted, **submitted_end;
    struct job *news, **news_end;
    struct timeline *closing;
    uint64_t kv_bytes_used, kv_bytes_max;

    /* engine thread; the options and the description are also read by the loop */
    struct engine_options options;
    struct engine *engine;
    char description[256];
    bool lost; /* the device */
    struct job **active;
    size_t n_active, active_allocated;
    size_t first;          /* of active, in the next step */
    uint32_t prefill_rows; /* of prompts in a step, by how long the last ones took */
    struct step_item *items;
    struct job **item_jobs;
};

/* ---- engine thread: what goes out ---- */

/* With the mutex held. */
static void announce(struct engine_thread *t, struct job *j)
{
    uint64_t one = 1;

    if (j->has_news)
        return;
    j->has_news = true;
    j->next = NULL;
    *t->news_end = j;
    t->news_end = &j->next;
    /* Nothing to do about a failure: the counter cannot be full, the descriptor is ours. */
    (void)!write(t->news_fd, &one, sizeof(one));
}

static void emit(struct engine_thread *t, struct job *j, const struct record *record)
{
    int r = 0;

    if (j->work.cut)
        return;
    pthread_mutex_lock(&t->mutex);
    if (j->request.format == JOB_RECORDS)
        r = record_write(&j->out, record);
    else if (record->type == RECORD_DELTA)
        r = buffer_append(&j->out, record->text, record->n_text);
    announce(t, j);
    pthread_mutex_unlock(&t->mutex);
    if (r < 0)
        j->work.cut = true;
}

static void emit_usage(struct engine_thread *t, struct job *j)
{
    struct generation_usage u;

    generation_usage(j->work.generation, &u);
    emit(t, j,
         &(struct record){.type = RECORD_USAGE,
                          .prompt_tokens = u.prompt_tokens,
                          .completion_tokens = u.completion_tokens,
                          .cached_tokens = u.cached_tokens});
}

static void emit_error(struct engine_thread *t, struct job *j, int code, const struct error *err)
{
    const struct timeline *tl = j->timeline;
    uint32_t used = tl->session ? session_n_tokens(tl->session) : 0;
    struct record record = {
        .type = RECORD_ERROR,
        .name = bus_error_name(code),
        .message = err->text[0] ? err->text : strerror(abs(code)),
    };

    if (code == -EMSGSIZE && j->work.prompt_tokens > 0) {
        record.has_sizes = true;
        record.requested = j->work.prompt_tokens;
        record.available = tl->n_ctx > used ? tl->n_ctx - used : 0;
    }
    emit(t, j, &record);
}

/* The job leaves the engine thread; the caller has taken it out of active or never put it there. */
static void let_go(struct engine_thread *t, struct job *j)
{
    if (j->work.generation)
        generation_usage(j->work.generation, &j->usage);
    j->work.generation = generation_free(j->work.generation);
    pthread_mutex_lock(&t->mutex);
    j->finished = true;
    announce(t, j);
    pthread_mutex_unlock(&t->mutex);
}

static void note_tokens(struct timeline *tl)
{
    atomic_store(&tl->n_tokens, tl->session ? session_n_tokens(tl->session) : 0);
}

/* ---- engine thread: ends of a job ---- */

static void finish_error(struct engine_thread *t, struct job *j, int code, const struct error *err)
{
    if (j->work.generation)
        generation_cancel(j->work.generation);
    note_tokens(j->timeline);
    j->result = code;
    j->error = *err;
    emit_error(t, j, code, err);
    let_go(t, j);
}

static void finish_stopped(struct engine_thread *t, struct job *j)
{
    enum job_stop why = atomic_load(&j->stop);

    j->end_reason = why == JOB_SHUTDOWN ? "shutdown" : why == JOB_CLOSED ? "closed" : "cancelled";
    if (j->work.generation) {
        generation_cancel(j->work.generation);
        emit_usage(t, j);
    }
    note_tokens(j->timeline);
    emit(t, j, &(struct record){.type = RECORD_END, .reason = j->end_reason});
    let_go(t, j);
}

static void finish_well(struct engine_thread *t, struct job *j, enum finish_reason reason)
{
    struct timeline *tl = j->timeline;

    j->end_reason = finish_reason_name(reason);
    emit_usage(t, j);
    emit(t, j, &(struct record){.type = RECORD_END, .reason = j->end_reason});
    /*
     * The session has everything but the last token. Where that one belongs to the answer, it goes
     * before the next prompt; the end of the turn is the chat template's business.
     */
    tl->position = CHAT_OPEN_MODEL;
    tl->has_tail = reason == FINISH_LENGTH && j->work.n_sampled > 0;
    tl->tail = j->work.last_id;
    note_tokens(tl);
    let_go(t, j);
}

/* ---- engine thread: the beginning of a job ---- */

static int encode_prompt(struct engine_thread *t, struct job *j, struct token_array *ids,
                         struct error *err)
{
    const struct tokenizer *tokenizer = model_tokenizer(t->model);
    const struct job_request *q = &j->request;
    struct timeline *tl = j->timeline;
    bool continuing = tl->has_tail || session_n_tokens(tl->session) > 0;
    CLEANUP(freep) struct chat_message *messages = NULL;
    int r;

    if (!tokenizer)
        return error_set(err, EOPNOTSUPP, "the model has no tokenizer");
    if (tl->has_tail) {
        r = token_array_append(ids, &tl->tail, 1);
        if (r < 0)
            return r;
    }
    if (q->raw) {
        struct encode_options options = {.bos = !continuing};

        r = tokenizer_encode(tokenizer, q->messages[0].text, q->messages[0].n, &options, ids);
        return r == 0 && ids->n == 0 ? error_set(err, EBADF, "the prompt is empty") : r;
    }

    messages = calloc(q->n_messages, sizeof(*messages));
    if (!messages)
        return -ENOMEM;
    for (size_t i = 0; i < q->n_messages; i++)
        messages[i] =
            (struct chat_message){q->messages[i].role, q->messages[i].text, q->messages[i].n};
    if (tokenizer_table(tokenizer)->start_of_turn == TOKENIZER_NONE ||
        tokenizer_table(tokenizer)->end_of_turn == TOKENIZER_NONE)
        return error_set(err, EOPNOTSUPP,
                         "the model's vocabulary has no turns: it takes raw prompts only");
    r = chat_encode(tokenizer, messages, q->n_messages,
                    &(struct chat_options){.position = tl->position, .generate = true}, ids, NULL,
                    err);
    return r == -EINVAL ? -EBADF : r; /* what can be wrong is the order of the roles */
}

/* For one more active job, and its part of a step. */
static int make_room(struct engine_thread *t)
{
    size_t n = t->active_allocated ? 2 * t->active_allocated : 16;
    struct step_item *items;
    struct job **jobs;

    if (t->n_active < t->active_allocated)
        return 0;
    jobs = reallocarray(t->active, n, sizeof(*jobs));
    if (!jobs)
        return -ENOMEM;
    t->active = jobs;
    jobs = reallocarray(t->item_jobs, n, sizeof(*jobs));
    if (!jobs)
        return -ENOMEM;
    t->item_jobs = jobs;
    items = reallocarray(t->items, n, sizeof(*items));
    if (!items)
        return -ENOMEM;
    t->items = items;
    t->active_allocated = n;
    return 0;
}

static int begin(struct engine_thread *t, struct job *j, struct error *err)
{
    struct timeline *tl = j->timeline;
    struct token_array ids = {0};
    int r;

    if (t->lost)
        return error_set(err, ENODEV, "what computes has failed; restart the daemon");
    r = make_room(t);
    if (r < 0)
        return r;
    if (!tl->session) {
        r = session_new(&tl->session, t->engine, tl->n_ctx);
        if (r < 0)
            return r;
    }

    r = encode_prompt(t, j, &ids, err);
    if (r == 0) {
        uint32_t used = session_n_tokens(tl->session);

        j->work.prompt_tokens = (uint32_t)MIN(ids.n, UINT32_MAX);
        if (ids.n > tl->n_ctx - used)
            r = error_set(err, EMSGSIZE,
                          "the prompt has %zu tokens and the session has room for %u of %u", ids.n,
                          tl->n_ctx - used, tl->n_ctx);
        else
            r = generation_new(&j->work.generation, tl->session, ids.data, ids.n,
                               &j->request.options, err);
    }
    if (ids.data)
        explicit_bzero(ids.data, ids.n * sizeof(ids.data[0]));
    free(ids.data);
    if (r == 0)
        t->active[t->n_active++] = j;
    return r;
}

/* ---- engine thread: steps ---- */

static void remove_active(struct engine_thread *t, struct job *j)
{
    for (size_t i = 0; i < t->n_active; i++) {
        if (t->active[i] == j) {
            memmove(t->active + i, t->active + i + 1, (t->n_active - i - 1) * sizeof(j));
            t->n_active--;
            if (i < t->first)
                t->first--;
            return;
        }
    }
}

/* An alternative's own text: the piece decoded by itself, of which half a character stays. */
static size_t alternative_text(const struct tokenizer *tokenizer, uint32_t id, char *out)
{
    struct decoder d = {0};
    size_t n = decoder_push(&d, tokenizer, id, true, out);

    return n + decoder_finish(&d, out + n);
}

static void emit_delta(struct engine_thread *t, struct job *j, const struct generation_delta *delta)
{
    const struct tokenizer *tokenizer = model_tokenizer(t->model);
    struct record record = {.type = RECORD_DELTA, .text = delta->text, .n_text = delta->n};
    CLEANUP(freep) char *texts = NULL;

    if (j->request.options.logprobs) {
        size_t room = decoder_room(tokenizer) + 12;

        record.has_token = true;
        record.id = delta->sample.id;
        record.logprob = (double)delta->sample.logprob;
        record.entropy = (double)delta->sample.entropy;
        record.n_top = MIN(delta->sample.n_top, RECORD_TOP_MAX);
        if (record.n_top > 0)
            texts = calloc(record.n_top, room);
        if (record.n_top > 0 && !texts) {
            j->work.cut = true;
            return;
        }
        for (size_t i = 0; i < record.n_top; i++) {
            record.top[i] = (struct record_top){
                .id = delta->sample.top[i].id,
                .logprob = (double)delta->sample.top[i].logprob,
                .text = texts + i * room,
                .n_text = alternative_text(tokenizer, delta->sample.top[i].id, texts + i * room),
            };
        }
    } else if (delta->n == 0) {
        return;
    }
    emit(t, j, &record);
}

/* What became of one job's share of a step. */
static void after_step(struct engine_thread *t, struct job *j, const struct step_item *item)
{
    struct generation_delta delta = {0};
    struct error err = {0};
    int r;

    if (item->ret_error < 0) {
        remove_active(t, j);
        if (item->ret_error == -ENOBUFS)
            error_set(&err, ENOBUFS, "no memory is left for the conversation's KV cache");
        finish_error(t, j, item->ret_error, &err);
        return;
    }
    generation_advance(j->work.generation, item->n_tokens);
    note_tokens(j->timeline);
    if (item->wanted == LOGITS_NONE)
        return;

    r = generation_accept(j->work.generation, item->ret_logits, &delta);
    if (r < 0) {
        remove_active(t, j);
        if (r == -EDOM)
            error_set(&err, EDOM, "the model gave no finite number");
        finish_error(t, j, r, &err);
        return;
    }
    j->work.last_id = delta.sample.id;
    j->work.n_sampled++;
    emit_delta(t, j, &delta);
    if (j->work.cut) {
        remove_active(t, j);
        finish_error(t, j, -ENOMEM, &err);
    } else if (delta.finish != FINISH_NONE) {
        remove_active(t, j);
        finish_well(t, j, delta.finish);
    }
}

static bool is_paused(struct engine_thread *t, struct job *j)
{
    bool paused;

    pthread_mutex_lock(&t->mutex);
    paused = j->out.n >= OUTPUT_PAUSE;
    pthread_mutex_unlock(&t->mutex);
    return paused;
}

/* Which rows of which jobs; decode first. Returns how many items; *ret_prefill: rows of prompts. */
static size_t choose(struct engine_thread *t, uint32_t *ret_prefill)
{
    uint32_t rows = MIN(STEP_ROWS, engine_max_rows(t->engine));
    uint32_t logits = engine_max_logits(t->engine), prefill_rows = 0;
    size_t n_items = 0;

    for (int prefill = 0; prefill <= 1; prefill++) {
        uint32_t left = prefill ? MIN(rows, t->prefill_rows) : rows;

        for (size_t i = 0; i < t->n_active && left > 0; i++) {
            struct job *j = t->active[(t->first + i) % t->n_active];
            size_t n_pending;
            const uint32_t *pending = generation_pending(j->work.generation, &n_pending);
            uint32_t n = (uint32_t)MIN(n_pending, left);
            bool last = n == n_pending;

            if ((n_pending > 1) != (prefill == 1) || (last && logits == 0) || is_paused(t, j))
                continue;
            t->items[n_items] = (struct step_item){
                .session = j->timeline->session,
                .tokens = pending,
                .n_tokens = n,
                .wanted = last ? LOGITS_LAST : LOGITS_NONE,
            };
            t->item_jobs[n_items++] = j;
            left -= n;
            logits -= last;
            if (prefill)
                prefill_rows += n;
            else
                rows -= n;
        }
    }
    if (t->n_active > 0)
        t->first = (t->first + 1) % t->n_active;
    *ret_prefill = prefill_rows;
    return n_items;
}

static uint64_t now_usec(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

/* Doubles or halves the chunk where a step with so many rows of prompts was far off its time. */
static void adapt(struct engine_thread *t, uint32_t prefill_rows, uint64_t took_usec)
{
    if (took_usec > 2 * STEP_USEC && prefill_rows > PREFILL_ROWS_LEAST)
        t->prefill_rows = MAX(PREFILL_ROWS_LEAST, prefill_rows / 2);
    else if (took_usec < STEP_USEC / 2 && prefill_rows == t->prefill_rows)
        t->prefill_rows = MIN(PREFILL_ROWS_MOST, prefill_rows * 2);
}

static void fail_all(struct engine_thread *t, int code)
{
    struct error err;

    error_set(&err, -code,
              code == -ENODEV ? "what computes has failed; restart the daemon" : "the step failed");
    while (t->n_active > 0) {
        struct job *j = t->active[t->n_active - 1];

        remove_active(t, j);
        finish_error(t, j, code, &err);
    }
}

static void note_kv(struct engine_thread *t)
{
    struct engine_memory m;

    engine_memory(t->engine, &m);
    pthread_mutex_lock(&t->mutex);
    t->kv_bytes_used = m.kv_bytes_used;
    t->kv_bytes_max = m.kv_bytes_max;
    pthread_mutex_unlock(&t->mutex);
}

/* False when there was nothing to do. */
static bool step(struct engine_thread *t)
{
    uint32_t prefill_rows;
    uint64_t start;
    size_t n;
    int r;

    n = choose(t, &prefill_rows);
    if (n == 0)
        return false;
    start = now_usec();
    r = engine_step(t->engine, t->items, n);
    adapt(t, prefill_rows, now_usec() - start);
    if (r < 0) {
        t->lost = t->lost || r == -ENODEV;
        fail_all(t, r);
        return true;
    }
    for (size_t i = 0; i < n; i++)
        after_step(t, t->item_jobs[i], &t->items[i]);
    note_kv(t);
    return true;
}

/* ---- engine thread: what comes in ---- */

static void stop_where_asked(struct engine_thread *t)
{
    for (size_t i = 0; i < t->n_active;) {
        struct job *j = t->active[i];

        if (atomic_load(&j->stop) != JOB_GOES_ON) {
            remove_active(t, j);
            finish_stopped(t, j);
        } else {
            i++;
        }
    }
}

static void start_job(struct engine_thread *t, struct job *j)
{
    struct error err = {0};
    int r;

    if (atomic_load(&j->stop) != JOB_GOES_ON) {
        finish_stopped(t, j);
        return;
    }
    if (j->request.kind != JOB_GENERATE)
        r = error_set(&err, EOPNOTSUPP, "only generate is there yet");
    else
        r = begin(t, j, &err);
    if (r < 0)
        finish_error(t, j, r, &err);
}

static void close_timeline(struct engine_thread *t, struct timeline *tl)
{
    for (size_t i = 0; i < t->n_active;) {
        struct job *j = t->active[i];

        if (j->timeline == tl) {
            remove_active(t, j);
            atomic_compare_exchange_strong(&j->stop, &(int){JOB_GOES_ON}, JOB_CLOSED);
            finish_stopped(t, j);
        } else {
            i++;
        }
    }
    tl->session = session_free(tl->session);
    free(tl);
}

/* Waits for something to do when idle. False at the end. */
static bool take_in(struct engine_thread *t, bool idle)
{
    struct job *jobs;
    struct timeline *closing;
    bool quit;

    pthread_mutex_lock(&t->mutex);
    while (idle && !t->wakes && !t->quit)
        pthread_cond_wait(&t->changed, &t->mutex);
    t->wakes = false;
    jobs = t->submitted;
    t->submitted = NULL;
    t->submitted_end = &t->submitted;
    closing = t->closing;
    t->closing = NULL;
    quit = t->quit;
    pthread_mutex_unlock(&t->mutex);

    while (jobs) {
        struct job *j = jobs;

        jobs = j->next;
        j->next = NULL;
        start_job(t, j);
    }
    stop_where_asked(t);
    if (closing) {
        while (closing) {
            struct timeline *tl = closing;

            closing = tl->next;
            close_timeline(t, tl);
        }
        note_kv(t);
    }
    return !quit;
}

static void *engine_thread_run(void *userdata)
{
    struct engine_thread *t = userdata;
    bool idle = true;
    int r;

    pthread_setname_np(pthread_self(), "llmd-engine");
    r = engine_new(&t->engine, t->model, &t->options, t->start_error);
    if (r == 0) {
        const char *description = engine_description(t->engine);

        strncpy(t->description, description, sizeof(t->description) - 1);
        note_kv(t);
    }
    pthread_mutex_lock(&t->mutex);
    t->start_result = r;
    t->start_error = NULL;
    t->state = r == 0 ? THREAD_RUNS : THREAD_FAILED;
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->mutex);
    if (r < 0)
        return NULL;

    while (take_in(t, idle))
        idle = !step(t);

    assert(t->n_active == 0);
    t->engine = engine_free(t->engine);
    return NULL;
}

/* ---- loop thread ---- */

static void wake(struct engine_thread *t)
{
    t->wakes = true;
    pthread_cond_broadcast(&t->changed);
}

int engine_thread_new(struct engine_thread **ret, const struct model *m,
                      const struct engine_options *options, struct error *err)
{
    struct engine_thread *t;
    int r;

    t = calloc(1, sizeof(*t));
    if (!t)
        return error_set(err, ENOMEM, "out of memory");
    t->model = m;
    t->options = *options;
    t->prefill_rows = 2 * PREFILL_ROWS_LEAST;
    t->start_error = err;
    t->submitted_end = &t->submitted;
    t->news_end = &t->news;
    pthread_mutex_init(&t->mutex, NULL);
    pthread_cond_init(&t->changed, NULL);
    t->news_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->news_fd < 0) {
        r = error_set(err, errno, "eventfd: %s", strerror(errno));
        goto fail;
    }
    r = pthread_create(&t->thread, NULL, engine_thread_run, t);
    if (r > 0) {
        r = error_set(err, r, "cannot start the engine's thread: %s", strerror(r));
        goto fail;
    }

    pthread_mutex_lock(&t->mutex);
    while (t->state == THREAD_STARTING)
        pthread_cond_wait(&t->changed, &t->mutex);
    r = t->start_result;
    pthread_mutex_unlock(&t->mutex);
    if (r < 0) {
        pthread_join(t->thread, NULL);
        goto fail;
    }
    *ret = t;
    return 0;

fail:
    closep(&t->news_fd);
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->mutex);
    free(t);
    return r;
}

struct engine_thread *engine_thread_free(struct engine_thread *t)
{
    if (!t)
        return NULL;
    pthread_mutex_lock(&t->mutex);
    t->quit = true;
    wake(t);
    pthread_mutex_unlock(&t->mutex);
    pthread_join(t->thread, NULL);

    assert(!t->submitted && !t->news && !t->closing);
    closep(&t->news_fd);
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->mutex);
    free(t->active);
    free(t->items);
    free(t->item_jobs);
    free(t);
    return NULL;
}

void engine_thread_freep(struct engine_thread **t)
{
    *t = engine_thread_free(*t);
}

const struct model *engine_thread_model(const struct engine_thread *t)
{
    return t->model;
}

const char *engine_thread_description(const struct engine_thread *t)
{
    return t->description;
}

void engine_thread_kv_bytes(struct engine_thread *t, uint64_t *ret_used, uint64_t *ret_max)
{
    pthread_mutex_lock(&t->mutex);
    *ret_used = t->kv_bytes_used;
    *ret_max = t->kv_bytes_max;
    pthread_mutex_unlock(&t->mutex);
}

int timeline_new(struct timeline **ret, const struct timeline_options *options)
{
    struct timeline *tl = calloc(1, sizeof(*tl));

    if (!tl)
        return -ENOMEM;
    tl->n_ctx = options->n_ctx;
    *ret = tl;
    return 0;
}

uint32_t timeline_n_tokens(const struct timeline *tl)
{
    return atomic_load(&tl->n_tokens);
}

void engine_thread_close(struct engine_thread *t, struct timeline *tl)
{
    pthread_mutex_lock(&t->mutex);
    tl->next = t->closing;
    t->closing = tl;
    wake(t);
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_submit(struct engine_thread *t, struct job *j)
{
    pthread_mutex_lock(&t->mutex);
    j->next = NULL;
    *t->submitted_end = j;
    t->submitted_end = &j->next;
    wake(t);
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_stop(struct engine_thread *t, struct job *j, enum job_stop why)
{
    int none = JOB_GOES_ON;

    atomic_compare_exchange_strong(&j->stop, &none, why);
    pthread_mutex_lock(&t->mutex);
    wake(t);
    pthread_mutex_unlock(&t->mutex);
}

int engine_thread_fd(const struct engine_thread *t)
{
    return t->news_fd;
}

struct job *engine_thread_news(struct engine_thread *t, bool *ret_finished)
{
    struct job *j;
    uint64_t count;

    pthread_mutex_lock(&t->mutex);
    j = t->news;
    if (j) {
        t->news = j->next;
        if (!t->news)
            t->news_end = &t->news;
        j->next = NULL;
        j->has_news = false;
        *ret_finished = j->finished;
    } else {
        (void)!read(t->news_fd, &count, sizeof(count)); /* under the mutex: none slips between */
    }
    pthread_mutex_unlock(&t->mutex);
    return j;
}

int engine_thread_output(struct engine_thread *t, struct job *j, struct buffer *out)
{
    bool paused;
    int r = 0;

    pthread_mutex_lock(&t->mutex);
    paused = j->out.n >= OUTPUT_PAUSE;
    if (out->n == 0) {
        struct buffer empty = *out;

        *out = j->out; /* the usual case: nothing is copied */
        j->out = empty;
    } else {
        r = buffer_append(out, j->out.data, j->out.n);
    }
    j->out.n = 0;
    if (paused && !j->finished)
        wake(t);
    pthread_mutex_unlock(&t->mutex);
    return r;
}
