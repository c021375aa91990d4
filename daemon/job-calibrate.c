/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The lanes are measured when nobody waits for anything. Where somebody always does, a turn of it
 * (engine/calibration.h) is done every two seconds, from half a minute after the GPU joined on.
 */

#include <errno.h>
#include <string.h>

#include "base/clock.h"
#include "daemon/engine-thread-internal.h"
#include "daemon/log.h"

void calibrate_begin(struct engine_thread *t)
{
    if (t->calibration.state == CALIBRATION_WANTED)
        t->calibration.due_usec = now_usec() + t->calibration.wish.quiet_usec;
}

void calibrate_end(struct engine_thread *t)
{
    t->calibration.work = calibration_free(t->calibration.work);
    if (t->calibration.state == CALIBRATION_WANTED)
        t->calibration.state = CALIBRATION_NONE;
}

static void give_up(struct engine_thread *t, const char *why)
{
    log_with(LOG_NOTICE, &(struct log_fields){.message_id = LOG_ID_GPU},
             "the GPU is not used: how fast it is cannot be measured: %s", why);
    calibrate_end(t);
}

static void done(struct engine_thread *t)
{
    struct calibration_result result = *calibration_result(t->calibration.work);

    calibrate_end(t);
    t->calibration.state = CALIBRATION_DONE;
    t->calibration.result = result;
    placement_set_rates(&t->placement, &result.rates);
    pass_describe(t);
    log_with(LOG_INFO, &(struct log_fields){.message_id = LOG_ID_GPU}, "measured: %s",
             t->placement_text);
    if (t->calibration.wish.done)
        t->calibration.wish.done(t->calibration.wish.userdata, &result);
    pass_tell_loop(t);
}

static int turn(struct engine_thread *t, struct error *err)
{
    int r = 0;

    if (!t->calibration.work)
        r = calibration_new(&t->calibration.work, t->engine, calibration_may_choose(&t->options));
    return r < 0 ? r : calibration_turn(t->calibration.work, err);
}

bool calibrate_give_way(struct engine_thread *t)
{
    return t->calibration.work && calibration_give_way(t->calibration.work);
}

/* Not in the middle of a request's step, and not instead of it; nor on battery, where the GPU is to
 * be left alone and both are slower than they will be. */
static bool is_due(struct engine_thread *t, bool idle)
{
    bool wakes, on_battery;

    if (t->calibration.state != CALIBRATION_WANTED || t->gpu != GPU_WORKS || t->lost < 0 ||
        pass_is_under_way(t))
        return false;
    pthread_mutex_lock(&t->mutex);
    wakes = t->wakes || t->quit;
    on_battery = t->on_battery;
    pthread_mutex_unlock(&t->mutex);
    return !on_battery && (idle ? !wakes : now_usec() >= t->calibration.due_usec);
}

bool calibrate_turn(struct engine_thread *t, bool idle)
{
    struct error err = {0};
    int r;

    if (!is_due(t, idle))
        return false;
    pass_set_busy(t, true);
    r = turn(t, &err);
    pass_set_busy(t, false);
    t->gpu_has_worked = true;
    if (!idle)
        t->calibration.due_usec = now_usec() + t->calibration.wish.pause_usec;
    if (r == 0)
        done(t);
    else if (r == -ENODEV || r == -ENOTRECOVERABLE)
        pass_failed(t, r, err.text[0] ? err.text : NULL);
    else if (r < 0)
        give_up(t, err.text[0] ? err.text : strerror(-r));
    return true;
}
