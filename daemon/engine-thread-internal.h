/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * What the engine thread's own files share: engine-thread.c (the queues, what the loop calls),
 * job-output.c (what goes back to the loop), job-work.c (requests: admission, steps, memory) and
 * job-simple.c (what is done between two steps).
 */

#include <pthread.h>
#include <stdatomic.h>

#include "daemon/engine-thread.h"
#include "daemon/session-record.h"
#include "engine/engine.h"
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
    struct weight_change *weights, **weights_end;
    unsigned relief;   /* the level of the last event; 0: none to be looked at */
    bool has_released; /* some timelines are */
    struct engine_statistics statistics;
    uint64_t record_interval_usec;

    /* engine thread; the options and the description are also read by the loop */
    struct engine_options options;
    struct engine *engine;
    struct scheduler *scheduler;
    char description[256];
    int lost; /* 0; -ENODEV: the device; -ENOTRECOVERABLE: the model's file has changed; for good */
    struct job *active; /* requests, by job_work::next */
    uint64_t n_uses;
    uint64_t positions_usec; /* when places in the queue were last looked at */
    bool queue_changed;      /* since then */
    uint64_t due_usec;       /* when there will be something to say about the queue; 0: never */
    struct scheduler_pick *picks; /* [max_rows], a step's */
    struct step_item *items;
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

/* Ends those that have been asked to. */
void work_stop_where_asked(struct engine_thread *t);

/* A step. False when there was nothing to do. */
bool work_step(struct engine_thread *t);

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
