/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The loop's side of the engine thread for its tests: jobs, what came of them, and gates at which
 * the threads that work can be held, for the program is linked with the engine's steps,
 * tokenizer_encode() and the allocation functions wrapped. The second lane is one that computes
 * what it was given when its pass is let go, on the first one's backend: the bits are the same. Or
 * it is the engine's own, on a backend that behaves as a device (tests/queued-backend.h), and
 * cannot be held: `real`.
 */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "daemon/engine-thread.h"

#define CONTEXT 2048u
#define BIG_TEXT 70000u /* for the prompt thread's lane of big prompts */

struct gate {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool hold_steps, hold_encode;
    unsigned steps_allowed; /* while held */
    unsigned n_steps;       /* begun */
    int result;             /* what a step gives without being made; 0: it is made */
    bool step_waits, encode_waits;
    int encode_result; /* of the last big text */
};
extern struct gate gate;

/* The second lane; guarded by gate.mutex. */
struct second_lane {
    int joins;        /* engine_add_gpu()'s answer */
    bool real;        /* the engine's own */
    bool there;       /* joined, and not removed */
    bool hold;        /* passes go on until they are let go */
    unsigned allowed; /* while held */
    bool fails;       /* each pass begun or ended is -ENODEV */
    bool hangs;       /* and so it stays */
    bool under_way;
    bool is_waited_for; /* the engine thread has nothing else to do */
    unsigned n_joined, n_removed;
    unsigned n_ended;          /* passes, those that failed too */
    unsigned n_passes, n_rows; /* that came to their end */
    unsigned n_dropped;        /* session_drop_kv() of one that had K and V of any lane */
};
extern struct second_lane second;

/* Passes begun from now on go on (true), or come to their end at once. */
void hold_passes(bool hold);
/* Until one is under way; a pass that was let go until it has ended. */
void wait_for_pass(void);
/* Until one is under way and nothing else can be done; what there was to do has been. */
void wait_for_idle_pass(void);
void let_pass_end(void);

/* The fail_at-th allocation of threads other than the main one fails; 0: none. */
extern _Atomic int fail_at;
extern pthread_t main_thread;

extern const struct model *model;
extern struct engine_thread *engine;

/* A job and what came of it. */
struct run {
    struct job *job; /* NULL once over */
    bool reads;      /* takes its output */
    struct buffer out;
    int result;
    struct error error;
    const char *end_reason;
    struct generation_usage usage;
    uint32_t n_tokens;
    struct timeline *fork;
    struct buffer saved;
};

/* Lets n more steps begin, then holds the next; returns when it is held there. */
void allow_steps(unsigned n);
void hold_steps(bool hold);
void wait_for_held_step(void);
/* The same for texts of at least BIG_TEXT bytes. */
void hold_encode(bool hold);
void wait_for_held_encode(void);

void start_with(const struct engine_options *options);
void start_engine(uint64_t kv_bytes);
/* With the second lane, which has joined when this returns. */
void start_lanes(enum placement_mode mode, uint64_t kv_bytes);
void start_real_lanes(enum placement_mode mode, uint64_t kv_bytes);
void stop_engine(void);

/* Takes what news there are; waits for some first. */
void pump(void);
void wait_for(const struct run *r);
void wait_for_state(struct timeline *tl, enum timeline_state state);
/* All prompts submitted so far, one an account, have reached the engine thread: they went first. */
void wait_until_tokenised(void);
struct timeline_info info_of(struct timeline *tl);

struct timeline *timeline_for(uint64_t account);                        /* a new one */
void submit(struct run *r, struct timeline *tl, struct job_request *q); /* r's last one is over */
void take(struct run *r);
void came_back(struct run *r);
void run_done(struct run *r);

void add_message(struct job_request *q, enum chat_role role, const char *text, size_t n);
/* A chat's next turn, answered with max_tokens tokens that the seed chooses, as text. */
struct job_request question(const char *text, uint32_t max_tokens);
void ask(struct run *r, struct timeline *tl, const char *text, uint32_t max_tokens);
void do_kind(struct run *r, struct timeline *tl, enum job_kind kind); /* and waits for it */
/* What a request gives on an empty session when nobody else is there. */
void alone(struct run *r, const char *text, uint32_t max_tokens);

bool says(const struct buffer *b, const char *text); /* output has no NUL at its end */
bool same(const struct buffer *a, const struct buffer *b);
void expect_same(const struct buffer *a, const struct buffer *b);
char *long_text(size_t n);
