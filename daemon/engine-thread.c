/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The queues. A job with a prompt goes from the loop to the prompt thread, which tokenises it, and
 * from there to the engine thread; others go there at once. Between any two steps the engine thread
 * looks at what came in: tokenised requests are begun (job-work.c), what needs no step is done
 * (job-simple.c), timelines are closed, requests that shall stop are rolled back. A step is short
 * (the scheduler sees to that), because that is how long a cancellation has to wait. A GPU's passes
 * (job-pass.c) go on meanwhile, and are looked at between two steps as well.
 *
 * A job that is to stop and still waits for the prompt thread is taken from there; one that is
 * being tokenised stops by itself. Both come to their end through the engine thread like all
 * others, but for JOB_MEASURE, which the prompt thread answers.
 *
 * When nothing can be computed the engine thread sleeps on the condition, which is signalled by
 * whatever comes in, and by output that was taken; while a pass is under way it waits for that, and
 * looks up some hundred times a second.
 */

#include "daemon/engine-thread.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/utf8.h"
#include "daemon/engine-thread-internal.h"
#include "daemon/prompt-thread.h"
#include "engine/model.h"
#include "engine/tokenizer.h"

#define RECORD_INTERVAL_USEC 250000u
#define CALIBRATION_QUIET_USEC 30000000u
#define CALIBRATION_PAUSE_USEC 2000000u

/* With the mutex held. */
static void wake(struct engine_thread *t)
{
    t->wakes = true;
    pthread_cond_broadcast(&t->changed);
}

/* With the mutex held. */
static void hand_to_engine(struct engine_thread *t, struct job *j)
{
    j->next = NULL;
    *t->submitted_end = j;
    t->submitted_end = &j->next;
    wake(t);
}

/* ---- prompt thread ---- */

static void on_prompt_done(struct job *j, void *userdata)
{
    struct engine_thread *t = userdata;

    if (j->request.kind == JOB_MEASURE) {
        j->n_tokens = (uint32_t)MIN(j->ids.n - MIN(j->ids.n, (size_t)j->has_tail), UINT32_MAX);
        if (atomic_load(&j->stop) != JOB_GOES_ON)
            job_finish_stopped(t, j);
        else if (j->result < 0)
            job_finish_error(t, j, j->result, &j->error);
        else
            job_let_go(t, j);
        return;
    }
    pthread_mutex_lock(&t->mutex);
    hand_to_engine(t, j);
    pthread_mutex_unlock(&t->mutex);
}

/* ---- engine thread ---- */

static void start_job(struct engine_thread *t, struct job *j)
{
    switch (j->request.kind) {
    case JOB_GENERATE:
    case JOB_APPEND:
        work_begin(t, j);
        break;
    case JOB_MEASURE: /* taken back from the prompt thread, and for nothing else */
        job_finish_stopped(t, j);
        break;
    case JOB_FORK:
    case JOB_REWIND:
    case JOB_SAVE:
    case JOB_RESTORE:
        if (atomic_load(&j->stop) != JOB_GOES_ON)
            job_finish_stopped(t, j);
        else
            simple_run(t, j);
        break;
    }
}

/* Frees the timelines that are closed and have no job any more. */
static void free_closed(struct engine_thread *t)
{
    struct timeline *next, *gone = NULL;

    pthread_mutex_lock(&t->mutex);
    t->has_closed = false;
    for (struct timeline *tl = t->timelines; tl; tl = next) {
        next = tl->next;
        if (!tl->is_closed)
            continue;
        if (tl->jobs) {
            t->has_closed = true;
            continue;
        }
        if (tl->previous)
            tl->previous->next = tl->next;
        else
            t->timelines = tl->next;
        if (tl->next)
            tl->next->previous = tl->previous;
        tl->next = gone;
        gone = tl;
    }
    pthread_mutex_unlock(&t->mutex);

    for (; gone; gone = next) {
        next = gone->next;
        spill_forget(t, gone);
        timeline_free(gone);
    }
}

/* A weight that there is no memory for is tried again later. With the mutex held. */
static void set_weights(struct engine_thread *t)
{
    struct weight_change *c;

    while ((c = t->weights) && scheduler_set_weight(t->scheduler, c->account, c->weight) == 0) {
        t->weights = c->next;
        if (!t->weights)
            t->weights_end = &t->weights;
        free(c);
    }
}

/* With the mutex held: before the first job, so no GPU is there. */
static void set_mode(struct engine_thread *t)
{
    if (!t->mode_changed)
        return;
    t->mode_changed = false;
    placement_init(&t->placement, t->mode);
    t->calibration.wish = t->wish;
    t->calibration.state = t->mode == PLACE_AUTO ? t->wish.state : CALIBRATION_NONE;
    t->calibration.result = t->wish.known;
    if (t->calibration.state == CALIBRATION_DONE)
        placement_set_rates(&t->placement, &t->wish.known.rates);
    t->gpu = t->mode == PLACE_CPU ? GPU_NONE : GPU_WAITS;
}

/* With the mutex held: until something comes in, or something is to be said. */
static void sleep_until_changed(struct engine_thread *t)
{
    struct timespec until = {.tv_sec = (time_t)(t->due_usec / 1000000),
                             .tv_nsec = (long)(t->due_usec % 1000000) * 1000};

    t->sleeps = true;
    while (!t->wakes && !t->quit) {
        if (t->due_usec == 0)
            pthread_cond_wait(&t->changed, &t->mutex);
        else if (pthread_cond_timedwait(&t->changed, &t->mutex, &until) == ETIMEDOUT)
            break;
    }
    t->sleeps = false;
}

/* Nothing is to be done now. */
static void rest(struct engine_thread *t)
{
    void (*rests)(void *userdata) = NULL;
    void *userdata;

    if (!t->gpu_has_worked)
        return;
    pthread_mutex_lock(&t->mutex);
    if (!t->wakes)
        rests = t->gpu_rests;
    userdata = t->gpu_rests_userdata;
    pthread_mutex_unlock(&t->mutex);
    if (!rests)
        return;
    t->gpu_has_worked = false;
    rests(userdata);
}

/* Waits for something to do when idle. False at the end. */
static bool take_in(struct engine_thread *t, bool idle)
{
    bool waits = idle && pass_is_under_way(t);
    struct job *jobs;
    bool quit, has_closed, adopts;

    if (waits)
        pass_wait(t);
    else if (idle)
        rest(t);
    pthread_mutex_lock(&t->mutex);
    if (idle && !waits)
        sleep_until_changed(t);
    t->n_turns++;
    t->wakes = false;
    jobs = t->submitted;
    t->submitted = NULL;
    t->submitted_end = &t->submitted;
    quit = t->quit;
    set_mode(t);
    set_weights(t);
    scheduler_set_loading(t->scheduler, t->is_loading);
    adopts = t->adoptions;
    pthread_mutex_unlock(&t->mutex);

    pass_collect(t);
    if (adopts)
        recover_adopt(t);
    while (jobs) {
        struct job *j = jobs;

        jobs = j->next;
        j->next = NULL;
        start_job(t, j);
    }
    work_stop_where_asked(t);
    pthread_mutex_lock(&t->mutex);
    has_closed = t->has_closed;
    pthread_mutex_unlock(&t->mutex);
    if (has_closed)
        free_closed(t);
    return !quit;
}

static int start(struct engine_thread *t)
{
    int r = engine_new(&t->engine, t->model, &t->options, t->start_error);

    if (r < 0)
        return r;
    r = work_init(t, t->start_error);
    if (r < 0)
        t->engine = engine_free(t->engine);
    return r;
}

static void *engine_thread_run(void *userdata)
{
    struct engine_thread *t = userdata;
    bool idle = false;
    int r;

    pthread_setname_np(pthread_self(), "llmd-engine");
    r = start(t);
    pthread_mutex_lock(&t->mutex);
    t->start_result = r;
    t->start_error = NULL;
    t->state = r == 0 ? THREAD_RUNS : THREAD_FAILED;
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->mutex);

    if (r == 0) {
        while (take_in(t, idle)) {
            pass_look_at_gpu(t);
            idle = !pass_step(t);
            idle = !spill_turn(t) && idle;
            idle = !calibrate_turn(t, idle) && idle;
            work_publish(t);
        }
        free_closed(t);
        assert(!t->active && !t->timelines);
    }
    calibrate_end(t);
    work_done(t);
    t->engine = engine_free(t->engine);
    return NULL;
}

/* ---- loop thread ---- */

static void free_all(struct engine_thread *t)
{
    struct weight_change *next;

    for (struct weight_change *c = t->weights; c; c = next) {
        next = c->next;
        free(c);
    }
    prompt_thread_free(t->prompts);
    closep(&t->news_fd);
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->mutex);
    free(t);
}

static int start_threads(struct engine_thread *t, struct error *err)
{
    int r;

    t->news_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (t->news_fd < 0)
        return error_set(err, errno, "eventfd: %s", strerror(errno));
    r = prompt_thread_new(&t->prompts, t->model, on_prompt_done, t, err);
    if (r < 0)
        return r;
    r = pthread_create(&t->thread, NULL, engine_thread_run, t);
    if (r > 0)
        return error_set(err, r, "cannot start the engine's thread: %s", strerror(r));

    pthread_mutex_lock(&t->mutex);
    while (t->state == THREAD_STARTING)
        pthread_cond_wait(&t->changed, &t->mutex);
    r = t->start_result;
    pthread_mutex_unlock(&t->mutex);
    if (r < 0)
        pthread_join(t->thread, NULL);
    return r;
}

int engine_thread_new(struct engine_thread **ret, const struct model *m,
                      const struct engine_options *options, struct error *err)
{
    pthread_condattr_t attributes;
    struct engine_thread *t;
    int r;

    t = calloc(1, sizeof(*t));
    if (!t)
        return error_set(err, ENOMEM, "out of memory");
    t->model = m;
    t->options = *options;
    t->start_error = err;
    t->news_fd = -EBADF;
    t->spill.folder_fd = t->spill.fd = -EBADF;
    t->submitted_end = &t->submitted;
    t->news_end = &t->news;
    t->weights_end = &t->weights;
    t->record_interval_usec = RECORD_INTERVAL_USEC;
    t->wish.quiet_usec = CALIBRATION_QUIET_USEC;
    t->wish.pause_usec = CALIBRATION_PAUSE_USEC;
    t->mode_changed = true;
    pthread_mutex_init(&t->mutex, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&t->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    r = start_threads(t, err);
    if (r < 0) {
        free_all(t);
        return r;
    }
    *ret = t;
    return 0;
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

    assert(!t->submitted && !t->news);
    free_all(t);
    return NULL;
}

const struct model *engine_thread_model(const struct engine_thread *t)
{
    return t->model;
}

const char *engine_thread_description(const struct engine_thread *t)
{
    return t->descriptions[atomic_load(&t->description)];
}

void engine_thread_set_placement(struct engine_thread *t, enum placement_mode mode)
{
    pthread_mutex_lock(&t->mutex);
    t->mode = mode;
    t->mode_changed = true;
    wake(t);
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_retry_gpu(struct engine_thread *t, bool now)
{
    pthread_mutex_lock(&t->mutex);
    if (t->gpu_due_usec > 0 && (now || now_usec() >= t->gpu_due_usec)) {
        t->gpu_trial = MAX(t->gpu_trial, now ? GPU_TRY_NOW : GPU_TRY_IDLE);
        wake(t);
    }
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_set_gpu_rests(struct engine_thread *t, void (*rests)(void *userdata),
                                 void *userdata)
{
    pthread_mutex_lock(&t->mutex);
    t->gpu_rests = rests;
    t->gpu_rests_userdata = userdata;
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_set_calibration(struct engine_thread *t, const struct calibration_result *known,
                                   void (*done)(void *userdata, const struct calibration_result *c),
                                   void *userdata)
{
    pthread_mutex_lock(&t->mutex);
    t->wish.state = known ? CALIBRATION_DONE : CALIBRATION_WANTED;
    t->wish.done = done;
    t->wish.userdata = userdata;
    if (known)
        t->wish.known = *known;
    t->mode_changed = true;
    wake(t);
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_set_calibration_patience(struct engine_thread *t, uint64_t quiet_usec,
                                            uint64_t pause_usec)
{
    pthread_mutex_lock(&t->mutex);
    t->wish.quiet_usec = quiet_usec;
    t->wish.pause_usec = pause_usec;
    t->mode_changed = true;
    wake(t);
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_set_on_battery(struct engine_thread *t, bool on_battery)
{
    pthread_mutex_lock(&t->mutex);
    if (t->on_battery != on_battery)
        wake(t);
    t->on_battery = on_battery;
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_get_placement(struct engine_thread *t, struct placement_info *ret)
{
    pthread_mutex_lock(&t->mutex);
    *ret = t->placement_info;
    pthread_mutex_unlock(&t->mutex);
    if (ret->state == PLACEMENT_BACKS_OFF && now_usec() >= ret->until_usec)
        ret->state = PLACEMENT_WORKS; /* nothing came that would have seen it */
}

bool engine_thread_lanes_changed(struct engine_thread *t)
{
    bool changed;

    pthread_mutex_lock(&t->mutex);
    changed = t->lanes_changed;
    t->lanes_changed = false;
    pthread_mutex_unlock(&t->mutex);
    return changed;
}

void engine_thread_get_lanes(struct engine_thread *t, struct lane_info ret[ENGINE_LANES])
{
    pthread_mutex_lock(&t->mutex);
    memcpy(ret, t->lanes, sizeof(t->lanes));
    pthread_mutex_unlock(&t->mutex);
}

const char *engine_thread_explain(struct engine_thread *t, char *buf, size_t n)
{
    pthread_mutex_lock(&t->mutex);
    snprintf(buf, n, "%s", t->placement_text);
    pthread_mutex_unlock(&t->mutex);
    return buf;
}

void engine_thread_kv_bytes(struct engine_thread *t, uint64_t *ret_used, uint64_t *ret_max)
{
    pthread_mutex_lock(&t->mutex);
    *ret_used = t->statistics.kv_bytes_used;
    *ret_max = t->statistics.kv_bytes_max;
    pthread_mutex_unlock(&t->mutex);
}

uint64_t engine_thread_account_kv_bytes(struct engine_thread *t, uint64_t account)
{
    uint64_t n = 0;

    pthread_mutex_lock(&t->mutex);
    for (const struct timeline *tl = t->timelines; tl; tl = tl->next)
        if (tl->options.account == account)
            n += tl->info.kv_bytes;
    pthread_mutex_unlock(&t->mutex);
    return n;
}

uint64_t engine_thread_idle_kv_bytes(struct engine_thread *t, uint64_t account,
                                     const struct timeline *except)
{
    uint64_t n = 0;

    pthread_mutex_lock(&t->mutex);
    for (const struct timeline *tl = t->timelines; tl; tl = tl->next)
        if (tl->options.account == account && !tl->jobs && tl != except)
            n += tl->info.kv_bytes;
    pthread_mutex_unlock(&t->mutex);
    return n;
}

void engine_thread_release(struct engine_thread *t, struct timeline *tl)
{
    pthread_mutex_lock(&t->mutex);
    if (tl->info.kv_bytes > 0 && !tl->jobs) {
        tl->info.kv_bytes = 0;
        tl->is_released = t->has_released = true;
        wake(t);
    }
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_set_spill_folder(struct engine_thread *t, int fd)
{
    t->spill.folder_fd = fd; /* published with the first job */
}

void engine_thread_relieve(struct engine_thread *t, unsigned level)
{
    pthread_mutex_lock(&t->mutex);
    t->relief = MAX(t->relief, level);
    wake(t);
    pthread_mutex_unlock(&t->mutex);
}

void engine_thread_set_loading(struct engine_thread *t, bool is_loading)
{
    pthread_mutex_lock(&t->mutex);
    t->is_loading = is_loading; /* seen before the next step */
    t->is_loaded = !is_loading;
    if (!is_loading)
        wake(t); /* for the GPU */
    pthread_mutex_unlock(&t->mutex);
}

int engine_thread_set_weight(struct engine_thread *t, uint64_t account, uint32_t weight)
{
    struct weight_change *c = calloc(1, sizeof(*c));

    if (!c)
        return -ENOMEM;
    c->account = account;
    c->weight = weight;
    pthread_mutex_lock(&t->mutex);
    *t->weights_end = c;
    t->weights_end = &c->next;
    wake(t);
    pthread_mutex_unlock(&t->mutex);
    return 0;
}

void engine_thread_get_statistics(struct engine_thread *t, struct engine_statistics *ret)
{
    pthread_mutex_lock(&t->mutex);
    *ret = t->statistics;
    pthread_mutex_unlock(&t->mutex);
}

bool engine_thread_is_alive(struct engine_thread *t)
{
    bool alive;

    pthread_mutex_lock(&t->mutex);
    alive = t->sleeps || t->n_turns != t->n_turns_seen || now_usec() < t->busy_until_usec;
    t->n_turns_seen = t->n_turns;
    pthread_mutex_unlock(&t->mutex);
    return alive;
}

void engine_thread_set_record_interval(struct engine_thread *t, uint64_t usec)
{
    pthread_mutex_lock(&t->mutex);
    t->record_interval_usec = usec;
    pthread_mutex_unlock(&t->mutex);
}

/* With the mutex held. */
static uint32_t room_of(const struct timeline *tl)
{
    return tl->options.n_ctx - atomic_load(&tl->n_tokens);
}

int engine_thread_check(struct engine_thread *t, struct timeline *tl, const struct job_request *q,
                        struct error *err)
{
    uint32_t vocab_size = model_config(t->model)->vocab_size, room = UINT32_MAX;
    enum chat_position position = CHAT_START;

    switch (q->kind) {
    case JOB_GENERATE:
        for (size_t i = 0; i < q->options.sampler.n_bias; i++)
            if (q->bias[i].id >= vocab_size)
                return error_set(err, EINVAL, "logit-bias: token %u: the vocabulary ends at %u",
                                 q->bias[i].id, vocab_size - 1);
        for (size_t i = 0; i < q->options.n_stop; i++)
            if (!utf8_valid(q->stop[i], strlen(q->stop[i])))
                return error_set(err, EINVAL, "stop: text %zu is not valid UTF-8", i + 1);
        break;
    case JOB_APPEND:
    case JOB_MEASURE:
        break;
    case JOB_REWIND:
        if (q->rewind_to > timeline_n_tokens(tl))
            return error_set(err, EINVAL, "tokens: %u are to stay, and the session has %u",
                             q->rewind_to, timeline_n_tokens(tl));
        return 0;
    case JOB_FORK:
    case JOB_SAVE:
        return 0;
    case JOB_RESTORE:
        if (timeline_n_tokens(tl) > 0)
            return error_set(err, EPROTO, "only an empty session takes a saved one");
        return 0;
    }
    if (tl) {
        pthread_mutex_lock(&t->mutex);
        position = tl->position;
        room = room_of(tl);
        pthread_mutex_unlock(&t->mutex);
    }
    return prompt_check(t->model, q, position, room, err);
}

void engine_thread_list(struct engine_thread *t, struct timeline *tl)
{
    if (tl->is_listed)
        return;
    tl->is_listed = true;
    tl->next = t->timelines;
    if (tl->next)
        tl->next->previous = tl;
    t->timelines = tl;
}

/* With the mutex held: one that waits to be tokenised need not wait for that. */
static void stop_job(struct engine_thread *t, struct job *j, enum job_stop why)
{
    int none = JOB_GOES_ON;

    if (atomic_compare_exchange_strong(&j->stop, &none, (int)why) && j->record)
        request_record_set_stopped(j->record, (int)why);
    if (prompt_thread_withdraw(t->prompts, j))
        hand_to_engine(t, j);
    wake(t);
}

void engine_thread_close(struct engine_thread *t, struct timeline *tl)
{
    pthread_mutex_lock(&t->mutex);
    engine_thread_list(t, tl);
    tl->is_closed = true;
    t->has_closed = true;
    for (struct job *j = tl->jobs; j; j = j->timeline_next)
        stop_job(t, j, JOB_CLOSED);
    wake(t);
    pthread_mutex_unlock(&t->mutex);
}

int engine_thread_prepare(struct engine_thread *t, struct job *j)
{
    struct timeline *tl = j->timeline;
    struct request_facts facts = {.id = j->id,
                                  .session = tl->options.flow,
                                  .uid = (uid_t)tl->options.account,
                                  .n_ctx = tl->options.n_ctx};
    struct request_before before;

    pthread_mutex_lock(&t->mutex);
    before = (struct request_before){.n_tokens = tl->n_settled,
                                     .position = tl->position,
                                     .has_tail = tl->has_tail,
                                     .tail = tl->tail};
    pthread_mutex_unlock(&t->mutex);
    return request_record_new(&j->record, &facts, &before, &j->request);
}

void engine_thread_adopt(struct engine_thread *t, struct adoption *adoptions, size_t n)
{
    static struct adoption none;

    pthread_mutex_lock(&t->mutex);
    t->adoptions = n > 0 ? adoptions : &none;
    t->n_adoptions = n;
    wake(t);
    while (t->adoptions)
        pthread_cond_wait(&t->changed, &t->mutex);
    pthread_mutex_unlock(&t->mutex);
}

/* Set before the thread was known to run, and never again. */
int engine_thread_kv_fd(const struct engine_thread *t)
{
    return engine_kv_fd(t->engine);
}

bool engine_thread_kv_adopted(const struct engine_thread *t)
{
    return engine_kv_adopted(t->engine);
}

void engine_thread_submit(struct engine_thread *t, struct job *j)
{
    struct timeline *tl = j->timeline;
    uint64_t account = tl ? tl->options.account : j->request.account;
    bool has_prompt = job_kind_streams(j->request.kind) || j->request.kind == JOB_MEASURE;

    j->work.noticed_usec = now_usec();
    j->position = CHAT_START;
    j->room = UINT32_MAX;
    pthread_mutex_lock(&t->mutex);
    if (tl) {
        engine_thread_list(t, tl);
        j->timeline_next = tl->jobs;
        tl->jobs = j;
        j->position = tl->position;
        j->has_tail = tl->has_tail;
        j->tail = tl->tail;
        j->room = room_of(tl);
        if (job_kind_streams(j->request.kind)) {
            tl->info.state = TIMELINE_QUEUED;
            job_announce(t, j);
        }
    }
    if (atomic_load(&j->stop) != JOB_GOES_ON)
        has_prompt = false; /* nobody will want it */
    if (!has_prompt)
        hand_to_engine(t, j);
    pthread_mutex_unlock(&t->mutex);
    if (has_prompt)
        prompt_thread_submit(t->prompts, j, account);
}

void engine_thread_stop(struct engine_thread *t, struct job *j, enum job_stop why)
{
    pthread_mutex_lock(&t->mutex);
    stop_job(t, j, why);
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
        t->news = j->news_next;
        if (!t->news)
            t->news_end = &t->news;
        j->news_next = NULL;
        j->has_news = false;
        *ret_finished = j->finished;
        if (j->finished)
            j->sendable = j->work.log_bytes;
    } else {
        (void)!read(t->news_fd, &count, sizeof(count)); /* under the mutex: none slips between */
    }
    pthread_mutex_unlock(&t->mutex);
    return j;
}

uint64_t engine_thread_output(struct engine_thread *t, struct job *j, uint64_t sent)
{
    uint64_t end;
    bool paused;

    pthread_mutex_lock(&t->mutex);
    paused = job_is_paused(j);
    j->sent = sent;
    end = j->sendable;
    if (paused && !j->finished)
        wake(t);
    pthread_mutex_unlock(&t->mutex);
    return end;
}
