/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Steps of the lanes. The GPU is given a pass first, when it has none; it goes on by itself while
 * this thread makes a step of the CPU, if there is anything for that to do, and looks again
 * afterwards. So a pass that is over waits for one step of the CPU at most, and a request that is
 * to stop for what is left of a pass.
 *
 * A GPU that fails gives its requests back: nothing of the pass is kept, and the CPU computes the
 * same rows. Whatever took it away (others' work that made the driver reset it, memory that was
 * short) may be over a while later: then it joins again.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/backend.h"
#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "base/clock.h"
#include "daemon/engine-thread-internal.h"
#include "daemon/log.h"
#include "daemon/request-record.h"

#define LOOK_USEC 2000u                /* while nothing but a pass is under way */
#define BUSY_USEC (300u * 1000 * 1000) /* of a driver that compiles, or copies, at the worst */

/* A GPU that was lost is tried again after so long; after each loss that follows soon, after twice
 * as long, up to what is soon. Whoever has requests then is not disturbed, for a while. */
#define RETRY_USEC (60u * (uint64_t)1000000)
#define SOON_USEC (60u * RETRY_USEC)
#define PATIENCE_USEC (10u * RETRY_USEC)

/* ---- what people are told ---- */

void pass_describe_placement(struct engine_thread *t)
{
    const struct placement *p = &t->placement;
    char text[sizeof(t->placement_text)];

    placement_explain(p, text, sizeof(text));
    pthread_mutex_lock(&t->mutex);
    memcpy(t->placement_text, text, sizeof(text));
    t->placement_info = (struct placement_info){
        .mode = p->mode,
        .state = p->state,
        .until_usec = p->until_usec,
        .rates = p->rates,
        .activations = t->gpu == GPU_WORKS ? engine_gpu_activations(t->engine) : ACTIVATIONS_AUTO,
        .is_measured = t->calibration.state == CALIBRATION_DONE};
    t->lanes[LANE_CPU].works = true;
    t->lanes[LANE_GPU].works = t->gpu == GPU_WORKS;
    pthread_mutex_unlock(&t->mutex);
}

void pass_describe(struct engine_thread *t)
{
    const char *text = engine_description(t->engine);
    unsigned i = 0;

    while (i < t->n_descriptions &&
           strncmp(t->descriptions[i], text, sizeof(t->descriptions[i]) - 1) != 0)
        i++;
    if (i == t->n_descriptions && i < DESCRIPTIONS) {
        strncpy(t->descriptions[i], text, sizeof(t->descriptions[i]) - 1);
        t->n_descriptions++;
    }
    if (i < DESCRIPTIONS)
        atomic_store(&t->description, i);
    pass_describe_placement(t);
}

void pass_tell_loop(struct engine_thread *t)
{
    pthread_mutex_lock(&t->mutex);
    t->lanes_changed = true;
    engine_thread_ring(t);
    pthread_mutex_unlock(&t->mutex);
}

/* ---- the GPU ---- */

static void fail_gpu(struct engine_thread *t, const char *why, uint64_t due_usec)
{
    t->gpu = GPU_FAILED;
    calibrate_end(t);
    placement_set_gpu(&t->placement, false);
    pthread_mutex_lock(&t->mutex);
    snprintf(t->lanes[LANE_GPU].failure, sizeof(t->lanes[LANE_GPU].failure), "%s", why);
    t->gpu_due_usec = due_usec;
    pthread_mutex_unlock(&t->mutex);
    pass_describe(t);
    pass_tell_loop(t);
    for (struct job *j = t->active; j; j = j->work.next)
        work_choose_lane(t, j);
}

uint64_t pass_retry_usec(unsigned n_losses)
{
    uint64_t usec = RETRY_USEC;

    while (n_losses-- > 1 && usec < SOON_USEC)
        usec *= 2;
    return MIN(usec, SOON_USEC);
}

/* When the GPU, which has just failed, may be tried again; 0: not at all. What was not measured is
 * not used, and not measured where that fails. */
static uint64_t retry_time(struct engine_thread *t)
{
    if (!engine_may_add_gpu(t->engine) ||
        (t->placement.mode == PLACE_AUTO && t->calibration.state != CALIBRATION_DONE))
        return 0;
    return now_usec() + pass_retry_usec(++t->gpu_losses);
}

static void lose_gpu(struct engine_thread *t, const char *said)
{
    const char *failure = said ? said : engine_lane_failure(t->engine, LANE_GPU);
    char why[sizeof(t->lanes[LANE_GPU].failure)] = "it gives no reason", later[64] = "";
    uint64_t due;

    if (failure)
        strncpy(why, failure, sizeof(why) - 1);
    engine_remove_gpu(t->engine);
    if (now_usec() - t->gpu_since_usec >= SOON_USEC)
        t->gpu_losses = 0;
    due = retry_time(t);
    if (due > 0)
        snprintf(later, sizeof(later), "; it is tried again in %u min, or on a reload",
                 (unsigned)(pass_retry_usec(t->gpu_losses) / RETRY_USEC));
    log_with(LOG_WARNING, &(struct log_fields){.message_id = LOG_ID_GPU},
             "the GPU has failed (%s); the CPU goes on with its requests%s", why, later);
    fail_gpu(t, why, due);
}

static void join_gpu(struct engine_thread *t)
{
    struct error err = {0};
    int r;

    if (t->placement.mode == PLACE_AUTO && t->calibration.state == CALIBRATION_DONE)
        engine_set_gpu_activations(t->engine, t->calibration.result.gpu_activations);
    r = engine_add_gpu(t->engine, &err);
    if (r == -ENOENT && !t->options.gpu) {
        t->gpu = GPU_NONE;
        for (struct job *j = t->active; j; j = j->work.next)
            work_choose_lane(t, j); /* those that waited for it */
        return;
    }
    if (r < 0) {
        if (strcmp(t->lanes[LANE_GPU].failure, err.text) != 0) /* it may be tried for days */
            log_with(LOG_WARNING, &(struct log_fields){.message_id = LOG_ID_GPU},
                     "the GPU is not used: %s; the CPU does all", err.text);
        fail_gpu(t, err.text, retry_time(t));
        return;
    }
    t->gpu = GPU_WORKS;
    t->gpu_since_usec = now_usec();
    pthread_mutex_lock(&t->mutex);
    t->lanes[LANE_GPU].failure[0] = 0;
    t->gpu_due_usec = 0;
    pthread_mutex_unlock(&t->mutex);
    placement_set_gpu(&t->placement, true);
    calibrate_begin(t);
    pass_describe(t);
    log_with(LOG_INFO, &(struct log_fields){.message_id = LOG_ID_GPU}, "the GPU takes part: %s; %s",
             engine_description(t->engine), t->placement_text);
    pass_tell_loop(t);
}

void pass_set_busy(struct engine_thread *t, bool is_busy)
{
    pthread_mutex_lock(&t->mutex);
    t->busy_until_usec = is_busy ? now_usec() + BUSY_USEC : 0;
    pthread_mutex_unlock(&t->mutex);
}

/* With the mutex held: a GPU that has failed is tried again in this turn. */
static bool is_to_retry(struct engine_thread *t)
{
    enum gpu_trial trial = t->gpu_trial;

    t->gpu_trial = GPU_TRY_NOT;
    if (trial != GPU_TRY_IDLE)
        return trial == GPU_TRY_NOW;
    return (!t->active && !t->on_battery) || now_usec() >= t->gpu_due_usec + PATIENCE_USEC;
}

void pass_look_at_gpu(struct engine_thread *t)
{
    bool now;

    if (t->gpu != GPU_WAITS && t->gpu != GPU_FAILED)
        return;
    pthread_mutex_lock(&t->mutex);
    now = t->is_loaded && !t->quit && (t->gpu == GPU_WAITS || is_to_retry(t));
    pthread_mutex_unlock(&t->mutex);
    if (!now)
        return;
    pass_set_busy(t, true);
    join_gpu(t);
    pass_set_busy(t, false);
}

/* ---- passes ---- */

static void mark(struct engine_thread *t, struct lane_pass *p, bool is_under_way)
{
    (void)t;
    for (size_t i = 0; i < p->n; i++) {
        p->picks[i].task->is_under_way = is_under_way;
        request_record_set_working(job_of(p->picks[i].task)->record, is_under_way);
    }
}

/* It is over: its requests are like others. Their number. */
static size_t unmark(struct engine_thread *t, struct lane_pass *p)
{
    size_t n = p->n;

    mark(t, p, false);
    p->n = 0;
    for (struct job *j = t->active; j; j = j->work.next)
        j->work.waits_for_pass = false;
    return n;
}

static void failed(struct engine_thread *t, enum engine_lane lane, int r, const char *why)
{
    if (lane == LANE_GPU && r == -ENODEV) {
        lose_gpu(t, why);
        return;
    }
    if (r == -ENODEV || r == -ENOTRECOVERABLE)
        t->lost = r;
    for (int l = 0; l < ENGINE_LANES; l++) {
        if (t->pass[l].n == 0)
            continue;
        (void)engine_end(t->engine, (enum engine_lane)l); /* whatever it gives is worth nothing */
        unmark(t, &t->pass[l]);
    }
    work_fail_all(t, r);
}

void pass_failed(struct engine_thread *t, int r, const char *why)
{
    failed(t, LANE_GPU, r, why);
}

/* Time that the device itself worked on the lane's last pass; 0: not known. */
static uint64_t device_usec(struct engine_thread *t, enum engine_lane lane)
{
    const struct backend *b = lane == LANE_GPU ? engine_lane_backend(t->engine, lane) : NULL;

    return b && strcmp(b->ops->name, "vulkan") == 0 ? backend_vulkan_gpu_usec(b) : 0;
}

static void learn(struct engine_thread *t, enum engine_lane lane, const struct lane_pass *p,
                  size_t n, uint64_t now)
{
    uint64_t gpu_usec = device_usec(t, lane);
    uint32_t rows = 0;

    for (size_t i = 0; i < n; i++)
        rows += p->picks[i].n_rows;
    scheduler_account(t->scheduler, lane, p->picks, n, gpu_usec ? gpu_usec : now - p->start_usec);
    if (rows > 0)
        placement_learn(&t->placement, lane, rows, p->seen_usec - p->start_usec, gpu_usec, now);
}

static void end_pass(struct engine_thread *t, enum engine_lane lane)
{
    struct lane_pass *p = &t->pass[lane];
    int r = engine_end(t->engine, lane);
    uint64_t now = now_usec();
    size_t n = unmark(t, p);

    if (r < 0) {
        failed(t, lane, r, NULL);
        return;
    }
    if (lane == LANE_GPU)
        t->gpu_has_worked = true;
    if (lane == LANE_CPU)
        p->seen_usec = now;
    for (size_t i = 0; i < n; i++)
        if (p->items[i].ret_error < 0)
            p->picks[i].n_rows = 0;
    learn(t, lane, p, n, now);
    /* One that is over must not be touched again; each is there but once. */
    for (size_t i = 0; i < n; i++)
        work_after_step(t, job_of(p->picks[i].task), &p->items[i]);
}

/* False: there is nothing for the lane to do. */
static bool start_pass(struct engine_thread *t, enum engine_lane lane)
{
    struct lane_pass *p = &t->pass[lane];
    int r;

    p->n = scheduler_choose(t->scheduler, lane, p->picks, engine_lane_max_rows(t->engine, lane));
    if (p->n == 0)
        return false;
    for (size_t i = 0; i < p->n; i++)
        work_make_item(&p->picks[i], &p->items[i]);
    mark(t, p, true);
    p->start_usec = p->seen_usec = now_usec();
    if (lane == LANE_GPU) /* whose driver compiles what it meets for the first time */
        pass_set_busy(t, true);
    r = engine_start(t->engine, lane, p->items, p->n);
    if (lane == LANE_GPU)
        pass_set_busy(t, false);
    if (r < 0) {
        unmark(t, p);
        failed(t, lane, r, NULL);
    }
    return true;
}

bool pass_step(struct engine_thread *t)
{
    bool worked = false;

    work_prepare(t);
    if (t->gpu == GPU_WORKS && t->pass[LANE_GPU].n == 0)
        worked = start_pass(t, LANE_GPU);
    if (!start_pass(t, LANE_CPU))
        return worked;
    if (t->pass[LANE_CPU].n > 0)
        end_pass(t, LANE_CPU);
    return true;
}

bool pass_is_under_way(const struct engine_thread *t)
{
    return t->pass[LANE_GPU].n > 0;
}

/* Whether it is over, within so much time. */
static bool is_over(struct engine_thread *t, uint64_t timeout_usec)
{
    if (engine_wait(t->engine, LANE_GPU, timeout_usec) != -ETIMEDOUT)
        return true;
    t->pass[LANE_GPU].seen_usec = now_usec();
    return false;
}

void pass_collect(struct engine_thread *t)
{
    if (pass_is_under_way(t) && is_over(t, 0))
        end_pass(t, LANE_GPU);
}

void pass_wait(struct engine_thread *t)
{
    for (;;) {
        bool wakes;

        pthread_mutex_lock(&t->mutex);
        t->n_turns++;
        wakes = t->wakes || t->quit;
        pthread_mutex_unlock(&t->mutex);
        if (wakes || (t->due_usec > 0 && now_usec() >= t->due_usec))
            return;
        if (is_over(t, LOOK_USEC)) {
            t->pass[LANE_GPU].seen_usec = now_usec();
            return;
        }
    }
}

int pass_init(struct engine_thread *t, struct error *err)
{
    for (int l = 0; l < ENGINE_LANES; l++) {
        uint32_t max_rows = engine_lane_max_rows(t->engine, (enum engine_lane)l);
        struct lane_pass *p = &t->pass[l];

        p->picks = calloc(max_rows, sizeof(*p->picks));
        p->items = calloc(max_rows, sizeof(*p->items));
        if (!p->picks || !p->items)
            return error_set(err, ENOMEM, "out of memory");
    }
    pass_describe(t);
    return 0;
}

void pass_done(struct engine_thread *t)
{
    for (int l = 0; l < ENGINE_LANES; l++) {
        free(t->pass[l].picks);
        free(t->pass[l].items);
        t->pass[l] = (struct lane_pass){0};
    }
}
