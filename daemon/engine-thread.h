/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * engine_thread: the one thread that enters the engine, and the two queues between it and the loop.
 *
 * Jobs go in through engine_thread_submit(); what they produce comes back as news: the descriptor
 * becomes readable, engine_thread_news() names the jobs, engine_thread_output() takes their bytes.
 * A job is its submitter's again when engine_thread_news() says that it is finished.
 * Every function here is for the loop thread, and none waits for a step of the model, except
 * engine_thread_new() (for the engine's start) and engine_thread_free() (for its end).
 *
 * Memory: a pool of KV pages serves all timelines. When it runs short, those without a job give
 * theirs back, the least recently used first, then requests wait in the queue again, and go on
 * later where they were. What had been given back is computed again, by the same lane to the same
 * bits, so nobody notices but by the time it takes; a request fails (-ENOBUFS) only when it alone
 * does not fit.
 */

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "daemon/job.h"
#include "engine/calibration.h"
#include "engine/engine.h"
#include "engine/placement.h"
#include "engine/scheduler.h"

struct engine_thread;
struct model;

/* m must outlive it. 0, or engine_new()'s failure, -errno */
int engine_thread_new(struct engine_thread **ret, const struct model *m,
                      const struct engine_options *options, struct error *err);

/* All jobs must have come back and all timelines be closed. */
struct engine_thread *engine_thread_free(struct engine_thread *t);

const struct model *engine_thread_model(const struct engine_thread *t);

/* What computes, for people: changes when engine_thread_lanes_changed() says so. What was returned
 * stays as long as the engine thread. */
const char *engine_thread_description(const struct engine_thread *t);

/*
 * Who is to work: options.gpu's lane joins (engine_add_gpu()) when the model has been loaded, and
 * not at all with PLACE_CPU. Before the first job; else it is PLACE_AUTO. Where it cannot join, or
 * is lost, the processor does all: that is logged, once, and no request is lost.
 */
void engine_thread_set_placement(struct engine_thread *t, enum placement_mode mode);

/*
 * A GPU that was lost, or could not join, joins again, if it is time: a minute after the first
 * loss, twice as long after each that comes soon after it, an hour at most; and then when there are
 * no requests and the machine is not on battery, or ten minutes later. now: without waiting for any
 * of this. Not where it hangs, or was lost before it was measured for PLACE_AUTO. Called every now
 * and then.
 */
void engine_thread_retry_gpu(struct engine_thread *t, bool now);

/* By the engine thread, when it has nothing to do and the GPU has worked since the last time.
 * Before the first job; no step waits for it. */
void engine_thread_set_gpu_rests(struct engine_thread *t, void (*rests)(void *userdata),
                                 void *userdata);

/*
 * Whether a lane has joined or was lost since this was last asked: engine_thread_fd() is readable
 * then, and this is to be asked before engine_thread_news().
 */
bool engine_thread_lanes_changed(struct engine_thread *t);

struct lane_info {
    bool works;
    char failure[256]; /* why it does not, in words; empty: there is none, or not yet */
};
void engine_thread_get_lanes(struct engine_thread *t, struct lane_info ret[ENGINE_LANES]);

/*
 * How fast the lanes are, for PLACE_AUTO, which uses no GPU before that is known. known: by an
 * earlier process; its activations are the GPU's. NULL: it is measured when the GPU has joined and
 * nobody waits (engine/calibration.h), and done() is then called by the engine thread. Before the
 * first job, after engine_thread_set_placement(); else nothing is measured.
 */
void engine_thread_set_calibration(struct engine_thread *t, const struct calibration_result *known,
                                   void (*done)(void *userdata, const struct calibration_result *c),
                                   void *userdata);

/*
 * For so long a quiet moment is waited for, and where somebody always waits for something so much
 * time passes between two turns of the measurement. Half a minute and 2 s unless told otherwise;
 * for tests. Before the GPU joins.
 */
void engine_thread_set_calibration_patience(struct engine_thread *t, uint64_t quiet_usec,
                                            uint64_t pause_usec);

/* The machine is on battery, and the GPU is not to be used there (engine/placement.h). */
void engine_thread_set_on_battery(struct engine_thread *t, bool on_battery);

struct placement_info {
    enum placement_mode mode;
    enum placement_state state;       /* now */
    uint64_t until_usec;              /* when it backs off: until then */
    struct placement_rates rates;     /* 0: not known */
    enum activation_type activations; /* the GPU's; AUTO: it was not there yet */
    bool is_measured;                 /* the rates are, by this process or an earlier one */
};
void engine_thread_get_placement(struct engine_thread *t, struct placement_info *ret);

/* Who does what, one line for people: placement_explain(). Returns buf. */
const char *engine_thread_explain(struct engine_thread *t, char *buf, size_t n);

/* Bytes in KV pages after the last step; the limit. */
void engine_thread_kv_bytes(struct engine_thread *t, uint64_t *ret_used, uint64_t *ret_max);

/* KV of all timelines of the account; what two of them share counts for both. */
uint64_t engine_thread_account_kv_bytes(struct engine_thread *t, uint64_t account);

/* The part of it that could be given up: of those without a job, but for `except` (or NULL). */
uint64_t engine_thread_idle_kv_bytes(struct engine_thread *t, uint64_t account,
                                     const struct timeline *except);

/* Has a timeline without a job give its KV up: it no longer counts at once. */
void engine_thread_release(struct engine_thread *t, struct timeline *tl);

/*
 * Where KV may be written to when memory is short: a folder, borrowed. -EBADF, as it is at first:
 * nowhere, and it is given up instead; another -errno: likewise, and that is said. Before the first
 * job.
 */
void engine_thread_set_spill_folder(struct engine_thread *t, int fd);

/*
 * Memory is short on the machine. Level 1: what is free goes back to the system; from 2 on: KV of
 * timelines that are without a request now goes to files, in the background, and comes back when
 * they have one.
 */
void engine_thread_relieve(struct engine_thread *t, unsigned level);

/* Whether the model's file is still being read (engine/scheduler.h); false at first. Not before it
 * has been told to be over does a GPU join. */
void engine_thread_set_loading(struct engine_thread *t, bool is_loading);

/* The account's share in comparison with others' (engine/scheduler.h). 1 to 10000; 100 if not set.
 * 0, -ENOMEM */
int engine_thread_set_weight(struct engine_thread *t, uint64_t account, uint32_t weight);

struct engine_statistics {
    /* totals since the start */
    uint64_t requests; /* generate and append that came back, however they ended */
    uint64_t requests_cancelled, requests_failed;
    uint64_t prompt_tokens, completion_tokens;
    uint64_t steps, preemptions;
    uint64_t kv_given_back;           /* sessions whose KV was given up for others */
    uint64_t kv_spilled, kv_restored; /* sessions whose KV went to a file, came back from one */
    /* now */
    uint32_t queued, running;
    uint64_t kv_bytes_used, kv_bytes_max;
    uint64_t kv_bytes_spilled;        /* in files; what two share counts for both */
    double prefill_rate, decode_rate; /* tokens per second over the last 10 s of work */
    struct lane_statistics lanes[ENGINE_LANES];
};
void engine_thread_get_statistics(struct engine_thread *t, struct engine_statistics *ret);

/* Whether it has nothing to do, or has done something since this was last asked: the watchdog's. */
bool engine_thread_is_alive(struct engine_thread *t);

/*
 * What is certain about a request before it is submitted, so that the method call can say it rather
 * than the stream: options that the model cannot take, roles out of order, a prompt that cannot fit
 * by its size alone (other prompts that do not fit are found when they are tokenised). tl: NULL for
 * a measure of what stands alone. Its timeline must be idle. Cheap.
 * 0, -EINVAL, -EBADF (roles, empty prompt), -EOPNOTSUPP, -EMSGSIZE
 */
int engine_thread_check(struct engine_thread *t, struct timeline *tl, const struct job_request *q,
                        struct error *err);

/* Takes it over; jobs of it that are still there are stopped first (and still come back). */
void engine_thread_close(struct engine_thread *t, struct timeline *tl);

/*
 * Between two `queued` or `progress` records of a job at least so much time passes, and so much
 * before the first. 250 ms unless told otherwise; for tests.
 */
void engine_thread_set_record_interval(struct engine_thread *t, uint64_t usec);

/*
 * Makes the record of a job with a stream, which is then submitted. Its timeline must be idle.
 * 0, -errno: there is no memory for it
 */
int engine_thread_prepare(struct engine_thread *t, struct job *j);

/* A session that another process left. */
struct adoption {
    struct timeline *timeline;  /* made with its record; the engine thread's on success */
    struct session_state state; /* what it is to be: as it was, or as a request left it */
    bool continues;             /* a request will be resumed: the session keeps its tokens */
    uint32_t n_tokens;          /* told: those it has */
    int result;                 /* told: 0; -EBADMSG: it is not sound: timeline_free(); -errno */
    struct error error;
};

/*
 * Takes sessions back, and waits for it: a moment. Once, before anything is submitted, also with
 * none; a pool of another process has no free pages before.
 */
void engine_thread_adopt(struct engine_thread *t, struct adoption *adoptions, size_t n);

/* The pool's memory, borrowed; whether it is the one of the options, with what was in it. */
int engine_thread_kv_fd(const struct engine_thread *t);
bool engine_thread_kv_adopted(const struct engine_thread *t);

/* The job is the engine thread's until engine_thread_news() says that it is finished. */
void engine_thread_submit(struct engine_thread *t, struct job *j);

/* Asks for its end within one step. It still comes back as finished. */
void engine_thread_stop(struct engine_thread *t, struct job *j, enum job_stop why);

/* Readable when there are news. */
int engine_thread_fd(const struct engine_thread *t);

/*
 * The next job with news (output, its timeline's state or queue position has changed, finished)
 * since it was last returned here, oldest first; NULL: no more, and the descriptor is readable
 * again only after others. *ret_finished: the engine thread has let it go, and it will not be
 * returned again; what it still holds is to be taken, then it is to be freed.
 */
struct job *engine_thread_news(struct engine_thread *t, bool *ret_finished);

/*
 * Up to where the log of the job's record may be sent, of which `sent` is; lets the engine thread
 * go on with a job that had paused because too much of it waited.
 */
uint64_t engine_thread_output(struct engine_thread *t, struct job *j, uint64_t sent);
