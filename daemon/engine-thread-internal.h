/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * What the engine thread's own files share: engine-thread.c (the queues, what the loop calls),
 * job-output.c (what goes back to the loop), job-work.c (requests: admission, what a step gave,
 * memory), job-pass.c (steps of the lanes, and the GPU that comes and goes), job-calibrate.c (how
 * fast they are) and job-simple.c (what is done between two steps).
 *
 * Two lanes. A pass of the GPU goes on while this thread makes steps of the CPU, and does whatever
 * else it does. The sessions in it are left alone until it is over, which is soon: their jobs have
 * work.task.is_under_way, and are not stopped, finished, preempted, parked, nor robbed of their KV
 * meanwhile; nor is their generation advanced. All others hold no such session: a timeline's jobs
 * come one after the other, so what is done to timelines without a request (fork, rewind, save,
 * restore, spill, release, end) never meets one in a pass.
 */

#include <pthread.h>
#include <stdatomic.h>

#include "daemon/engine-thread.h"
#include "daemon/session-record.h"
#include "engine/calibration.h"
#include "engine/engine.h"
#include "engine/placement.h"
#include "engine/scheduler.h"
#include "ipc/record.h"

struct prompt_thread;

struct timeline {
    struct timeline_options options;
    _Atomic uint32_t n_tokens; /* the tail counts; written by the engine thread, read by any */

    /* guarded by engine_thread::mutex */
    struct timeline_info info;
    enum chat_position position; /* between two jobs */
    /* The last token of an answer that was cut: sampled and given out, but not evaluated. It is
     * part of the conversation, not of the session: the next prompt begins with it. */
    bool has_tail;
    uint32_t tail;
    uint32_t n_settled;    /* the session's tokens then */
    uint64_t last_request; /* that came to its end here */
    struct job *jobs;      /* submitted and not let go, by job::timeline_next */
    bool is_listed, is_closed;
    bool is_released;                 /* its KV is to be given up: engine_thread_release() */
    struct timeline *previous, *next; /* engine_thread::timelines */

    /* engine thread */
    struct session *session;
    bool is_used;       /* a request is at work; its KV is not to be given away as an idle one's */
    uint64_t last_used; /* engine_thread::n_uses then */
    bool is_to_spill;   /* its KV is to go to a file */
    int spill_fd;       /* the file that has its KV, all of it; negative: none has */
    uint64_t spilled_bytes;
};

enum thread_state {
    THREAD_STARTING,
    THREAD_RUNS,
    THREAD_FAILED,
};

struct weight_change {
    struct weight_change *next;
    uint64_t account;
    uint32_t weight;
};

/* A step of one lane: chosen, and under way. */
struct lane_pass {
    struct scheduler_pick *picks; /* [max_rows] */
    struct step_item *items;
    size_t n;            /* 0: none is under way */
    uint64_t start_usec; /* when it began */
    uint64_t seen_usec;  /* when it was last known to go on; of one that was waited for, its end */
};

enum gpu_state {
    GPU_NONE,  /* there is none, or it is not wanted */
    GPU_WAITS, /* for the model to be loaded */
    GPU_WORKS,
    GPU_FAILED, /* could not be had, or was lost */
};

enum gpu_trial {
    GPU_TRY_NOT,
    GPU_TRY_IDLE, /* it is time, but nobody is to wait for it */
    GPU_TRY_NOW,
};

enum calibration_state {
    CALIBRATION_NONE, /* not wanted, or given up */
    CALIBRATION_WANTED,
    CALIBRATION_DONE, /* or known before */
};

/* What engine_thread_set_calibration() was given. */
struct calibration_wish {
    enum calibration_state state;
    struct calibration_result known; /* DONE */
    void (*done)(void *userdata, const struct calibration_result *c);
    void *userdata;
    uint64_t quiet_usec, pause_usec;
};

#define DESCRIPTIONS 4 /* without a GPU, with one, and that in another mode */

struct engine_thread {
    pthread_t thread;
    const struct model *model;
    struct prompt_thread *prompts;
    int news_fd; /* eventfd, written by the threads that work */

    /* guards what follows, up to "engine thread", and jobs' and timelines' part of it; the prompt
     * thread's mutex may be taken within */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    enum thread_state state;
    int start_result;
    struct error *start_error; /* engine_thread_new()'s, during the start only */
    bool quit;
    bool wakes; /* something came in since the engine thread last looked */
    bool sleeps;
    uint64_t n_turns, n_turns_seen; /* for the watchdog */
    struct job *submitted, **submitted_end;
    struct job *news, **news_end;
    struct timeline *timelines;
    bool has_closed;            /* some of them are */
    struct adoption *adoptions; /* [n_adoptions], to be done before anything else; NULL: none */
    size_t n_adoptions;
    bool is_loading;
    bool is_loaded;    /* the loop has said that all is read that will be */
    bool mode_changed; /* mode is to be looked at */
    enum placement_mode mode;
    struct calibration_wish wish; /* likewise */
    bool lanes_changed;           /* the loop does not know yet */
    uint64_t gpu_due_usec;        /* when a GPU that was lost may be tried again; 0: not at all */
    enum gpu_trial gpu_trial;     /* asked for by the loop */
    uint64_t busy_until_usec;     /* for the watchdog: no turn is expected before */
    struct lane_info lanes[ENGINE_LANES];
    void (*gpu_rests)(void *userdata);
    void *gpu_rests_userdata;
    char placement_text[256];
    struct placement_info placement_info;
    bool on_battery;
    struct weight_change *weights, **weights_end;
    unsigned relief;   /* the level of the last event; 0: none to be looked at */
    bool has_released; /* some timelines are */
    struct engine_statistics statistics;
    uint64_t record_interval_usec;

    /* engine thread; the options and the description are also read by the loop */
    struct engine_options options;
    struct engine *engine;
    struct scheduler *scheduler;
    char descriptions[DESCRIPTIONS][256];
    unsigned n_descriptions; /* none is written again */
    atomic_uint description; /* the one that holds */
    int lost; /* 0; -ENODEV: the device; -ENOTRECOVERABLE: the model's file has changed; for good */
    struct job *active; /* requests, by job_work::next */
    uint64_t n_uses;
    uint64_t positions_usec; /* when places in the queue were last looked at */
    bool queue_changed;      /* since then */
    uint64_t due_usec;       /* when there will be something to say about the queue; 0: never */
    struct lane_pass pass[ENGINE_LANES];
    struct placement placement;
    struct placement_choice choice; /* of this turn */
    struct {
        enum calibration_state state;
        struct calibration_result result; /* DONE */
        struct calibration *work;         /* NULL: not begun */
        uint64_t due_usec;                /* when others are not waited for any more */
        struct calibration_wish wish;
    } calibration;
    enum gpu_state gpu;
    bool gpu_has_worked;     /* since gpu_rests() was last called */
    unsigned gpu_losses;     /* one soon after the other */
    uint64_t gpu_since_usec; /* when it joined */
    uint64_t preemptions, kv_given_back;
    struct {
        int folder_fd; /* borrowed; -EBADF: there is none, -errno: why it cannot be had */
        struct timeline *timeline; /* whose KV is being written; NULL: nobody's */
        int fd;                    /* where to */
        bool failure_said;
    } spill;
};

/* With the mutex held: what its record has of it between two requests. */
void timeline_commit(struct timeline *tl);

/* With the mutex held: the timeline is one of those that are known here. */
void engine_thread_list(struct engine_thread *t, struct timeline *tl);

/* ---- job-output.c ---- */

/* With the mutex held: the loop is to look at the job. */
void job_announce(struct engine_thread *t, struct job *j);

/* With the mutex held: engine_thread_fd() becomes readable. */
void engine_thread_ring(struct engine_thread *t);

/* For the client. Counts, should this process be killed, when committed. */
void job_append(struct job *j, const struct record *record);
/* All that was appended, and all tokens sampled: this is how far the request is, and may be sent.
 */
void job_commit(struct engine_thread *t, struct job *j);
void job_emit(struct engine_thread *t, struct job *j, const struct record *record); /* both */

/* The last record, and how the request ended: commit.phase and what belongs to it are set. */
void job_emit_last(struct engine_thread *t, struct job *j, const struct record *record);

/*
 * What the timeline's next job finds. The job must not be touched afterwards; its timeline neither,
 * by others than the engine thread.
 */
void job_let_go(struct engine_thread *t, struct job *j);

/* What there is to say to requests when nothing can be computed any more: a code of ::lost. */
int lost_error(struct error *err, int code);

/* Ends of any job, which let it go. What it has done to its session is undone or stays by then. */
void job_finish_error(struct engine_thread *t, struct job *j, int code, const struct error *err);
void job_finish_stopped(struct engine_thread *t, struct job *j);

/* Output that the client has not read keeps the request from going on. With the mutex held. */
bool job_is_paused(const struct job *j);

/* ---- job-work.c: engine thread ---- */

int work_init(struct engine_thread *t, struct error *err); /* 0, -ENOMEM */
void work_done(struct engine_thread *t);

/* A tokenised request. It is let go when it is over. */
void work_begin(struct engine_thread *t, struct job *j);

/* Ends those that have been asked to, and are in no pass. */
void work_stop_where_asked(struct engine_thread *t);

/* Before a choice: who may be picked, and by whom. */
void work_prepare(struct engine_thread *t);

/* The request's share of the next step. */
void work_make_item(const struct scheduler_pick *pick, struct step_item *item);

/* What became of it; the pass is over. The job may be gone then. */
void work_after_step(struct engine_thread *t, struct job *j, const struct step_item *item);

/* Nothing can be computed any more: all requests end. No pass is under way. */
void work_fail_all(struct engine_thread *t, int code);

/* A deterministic request that no longer has its lane: the session begins anew on another. */
void work_choose_lane(struct engine_thread *t, struct job *j);

/* Brings what the loop sees of timelines, queue and memory up to date. */
void work_publish(struct engine_thread *t);
void work_publish_timeline(struct engine_thread *t, struct timeline *tl);
/* Tokens of the conversation between two jobs, the tail included; at most its n_ctx. */
uint32_t work_n_tokens(const struct timeline *tl);

/* Its KV is given up, to be computed again when it is needed. */
void work_drop_kv(struct engine_thread *t, struct timeline *tl);

/* The pool is full: others without a claim give theirs up. False: there are none. */
bool work_find_memory_quietly(struct engine_thread *t, struct job *j);

/* Its timeline's KV is back, or lost: it goes on. */
void work_restored(struct engine_thread *t, struct job *j);

int work_make_session(struct engine_thread *t, struct timeline *tl); /* 0, -ENOMEM */

/* Came to its end while it was in this process, or before: job_let_go(). */
void work_finish_well(struct engine_thread *t, struct job *j, const char *reason, bool has_tail);

/* ---- job-pass.c: engine thread ---- */

int pass_init(struct engine_thread *t, struct error *err); /* 0, -ENOMEM */
void pass_done(struct engine_thread *t);

/* Steps of the lanes: what is free is given work. False when there was nothing to do. */
bool pass_step(struct engine_thread *t);

/* A pass under way that is over: its results. */
void pass_collect(struct engine_thread *t);
bool pass_is_under_way(const struct engine_thread *t);

/* Until it is over, something has come in, or something is to be said. */
void pass_wait(struct engine_thread *t);

/* What computes, and who does what, has changed: it is published. */
void pass_describe(struct engine_thread *t);
void pass_describe_placement(struct engine_thread *t); /* who does what */
void pass_tell_loop(struct engine_thread *t);

/* The GPU, or all, can compute no more: -ENODEV, -ENOTRECOVERABLE. why: NULL: the lane knows */
void pass_failed(struct engine_thread *t, int r, const char *why);

/* What a driver may take long for begins, and is over: the watchdog waits longer. */
void pass_set_busy(struct engine_thread *t, bool is_busy);

/* The GPU joins as soon as it may. */
void pass_look_at_gpu(struct engine_thread *t);

/* After the nth loss, each soon after the one before: until the GPU may be tried again. */
uint64_t pass_retry_usec(unsigned n_losses);

struct job *job_of(struct scheduler_task *task);

/* ---- job-calibrate.c: engine thread ---- */

void calibrate_begin(struct engine_thread *t); /* the GPU has joined */
void calibrate_end(struct engine_thread *t);   /* it goes, or the engine will */

/* Memory is short: what it holds of the pool is free. False: it holds nothing. */
bool calibrate_give_way(struct engine_thread *t);

/* A piece of it, if it is due. True: there may be more. */
bool calibrate_turn(struct engine_thread *t, bool idle);

/* ---- job-recover.c: engine thread ---- */

void recover_adopt(struct engine_thread *t);

/*
 * The session is there and may have tokens of the request: makes j->work what it was. The same
 * failures as generation_new(), -ESTALE: the conversation is no longer what it was
 */
int recover_generation(struct job *j, struct error *err);
int recover_append(struct job *j, struct error *err);
/* The request will not go on: the session is as it was before. */
void recover_nothing(struct job *j);

/* ---- job-simple.c: engine thread ---- */

/* Fork, rewind, save, restore: done, and let go. */
void simple_run(struct engine_thread *t, struct job *j);

/* ---- job-spill.c: engine thread ---- */

/* What is to be done for want of memory, a piece of it. True: there may be more. */
bool spill_turn(struct engine_thread *t);

/* Whether its KV is in a file, from where it comes back before its request computes anything. */
bool spill_is_away(const struct timeline *tl);

/* A fork has the tokens that the file's KV is of, so it has that as well. */
void spill_share(struct engine_thread *t, const struct timeline *tl, struct timeline *fork);

/* The file's KV is no longer this timeline's, which is changed or closed. */
void spill_forget(struct engine_thread *t, struct timeline *tl);
