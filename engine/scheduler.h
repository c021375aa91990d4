/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * scheduler: which rows of whom make up the next step. It knows neither models nor clients: it is
 * told tasks, picks rows, and is told what they took.
 *
 * Lanes: two steps may be under way at once, one in each lane, on different tasks. Every task says
 * which lanes may take it now. A lane is shared out by itself: what steps of it take is learned
 * apart, accounts have a virtual time in each, and compete for it with those only that it could
 * pick. So who is served by one lane alone loses nothing of the other, and no lane waits for
 * fairness' sake while it is the only one that could do the work.
 *
 * Engine thread. Nothing but scheduler_add()
 * and scheduler_set_weight() allocates.
 *
 * A task is one request at work. It counts against an account (the daemon: a uid) and a flow (a
 * session). Work is measured in units of one decoded token; a row of a prompt costs what it was
 * measured to take in comparison. Each account has a virtual time: work received / weight
 * (virtual-time fair queueing, VTC, arXiv 2401.00588); among an account's flows likewise. An
 * account that comes back from having nothing to do starts at the least virtual time of those that
 * have, so that nobody saves up; after an absence of a few steps, as between two requests, a little
 * behind. An account whose virtual time leads that least one by more than a constant is passed over
 * until the others have caught up: two accounts with 1 and 7 greedy flows get half each. Decoding
 * is passed over only for others that decode: it would not make a prompt any faster.
 *
 * Classes: idle tasks are picked only when no other is runnable, and keep accounts of their own.
 * Batch counts as a quarter of the weight: of a flow within its account, and of an account as long
 * as it has nothing better to run.
 *
 * Within a step decoding tasks come first; the rows left, up to a budget, go to prompts in order of
 * virtual time. The budget adapts to what steps take: where an interactive task of another account
 * decodes, a step with prompts in it shall take at most 2.5 times one without; otherwise 0.2 s, or
 * that if it is more.
 *
 * Admission: added tasks are queued until there is KV memory for what they need and fewer than
 * max_running run; order: class, then virtual time (in which each request of the account that runs
 * or waits before counts in advance), then age. Nobody overtakes whoever lacks memory. What waits
 * knows its position and an estimate.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct scheduler;

#define SCHEDULER_LANES 2u /* numbers from 0; engine.h has names for them */

enum scheduler_class {
    CLASS_INTERACTIVE,
    CLASS_BATCH,
    CLASS_IDLE,
};
const char *scheduler_class_name(enum scheduler_class c); /* "interactive", "batch", "idle" */
int scheduler_class_parse(const char *name, enum scheduler_class *ret); /* 0, -EINVAL */

/* Embedded in whatever runs. The driver fills and keeps up to date the first part. */
struct scheduler_task {
    uint64_t account, flow;
    enum scheduler_class class;
    uint32_t n_pending; /* rows that could run now: 1 decodes, more is (the rest of) a prompt or of
                           what is computed again; 0: nothing at the moment */
    bool is_prompt;     /* one row may be the rest of a prompt as well: for statistics */
    bool is_blocked;   /* its reader is slow: not to be picked, and no reason to hold others back */
    unsigned lanes;    /* bits, 1 << lane: those that may take it now */
    bool is_under_way; /* picked, and its step goes on: no lane picks it, it is no victim, and must
                          not be requeued nor removed. Runnable all the same: idle ones wait for it
                        */
    uint64_t kv_bytes; /* beyond those it holds, that it will take at most soon: prompt and some
                          headroom; for admission, so less and less while it runs */
    uint32_t max_tokens; /* it may still generate, 0: not known; for estimates */

    struct scheduler_entry *entry; /* the scheduler's own */
};

struct scheduler_options {
    uint32_t max_rows, max_logits; /* of a step, as the engine's */
    uint32_t lane_rows[SCHEDULER_LANES]; /* of a lane's steps, where they are fewer; 0: max_rows */
    uint32_t max_running;          /* 0: 64 */
    unsigned even_lanes; /* bits, 1 << lane: a step is cheaper there with as many rows as one before
                            had: where prompts fill it up, their number is rounded down */
};

int scheduler_new(struct scheduler **ret, const struct scheduler_options *options); /* 0, -ENOMEM */
struct scheduler *scheduler_free(struct scheduler *s); /* all tasks must be removed */
void scheduler_freep(struct scheduler **s);

/* Weight of an account, 1 to 10000; those never told have 100. 0, -ENOMEM */
int scheduler_set_weight(struct scheduler *s, uint64_t account, uint32_t weight);

/*
 * While the model is still being read into memory (true; false at first), a step takes as long as
 * its pages do, whatever is in it: prompts get all the rows there are, and nothing is learnt from
 * how long steps take.
 */
void scheduler_set_loading(struct scheduler *s, bool is_loading);

/* Queues it. The task must stay where it is until removed. 0, -ENOMEM */
int scheduler_add(struct scheduler *s, struct scheduler_task *task);
void scheduler_remove(struct scheduler *s, struct scheduler_task *task); /* queued or running */

/*
 * Lets in what there is room for. kv_bytes_free: of the pool, with what the driver could take from
 * sessions at rest; what those that run will still take (kv_bytes) is subtracted here. When nothing
 * runs the first is let in whatever it needs. Returns the next task that came from queued to
 * running; call until NULL.
 */
struct scheduler_task *scheduler_admit(struct scheduler *s, uint64_t kv_bytes_free);

/* The task that scheduler_admit() considers next, NULL: none is queued. */
struct scheduler_task *scheduler_next_queued(struct scheduler *s);

/* Takes a running task back into the queue, at its place by age: it was preempted. */
void scheduler_requeue(struct scheduler *s, struct scheduler_task *task);

/*
 * Who gives way when memory runs out for `task`: the lowest class, then the account that leads
 * most, then the youngest; never the oldest running of the highest class; NULL: nobody else runs.
 * May be `task`. For a task that is queued only those of a lower class, NULL: there is none.
 */
struct scheduler_task *scheduler_victim(struct scheduler *s, const struct scheduler_task *task);

struct scheduler_pick {
    struct scheduler_task *task;
    uint32_t n_rows; /* <= n_pending */
};

/* The lane's next step: at most max_rows rows, at most max_logits tasks whose n_rows reach
 * n_pending. picks[max_picks], max_picks >= 1. Returns how many; 0: nothing is runnable. */
size_t scheduler_choose(struct scheduler *s, unsigned lane, struct scheduler_pick *picks,
                        size_t max_picks);

/* Charges the picks that the lane last chose (those that failed with n_rows 0) and learns from the
 * time. Right after the step: before its tasks are changed, requeued or removed. A step that came
 * to nothing as a whole need not be accounted for. */
void scheduler_account(struct scheduler *s, unsigned lane, const struct scheduler_pick *picks,
                       size_t n_picks, uint64_t took_usec);

/* 0: it runs; 1: the next to be let in. *ret_estimate_usec from now; 0 when not known yet. */
uint32_t scheduler_position(struct scheduler *s, const struct scheduler_task *task,
                            uint64_t *ret_estimate_usec);

struct lane_statistics {
    uint64_t passes, prompt_rows, decoded_rows, usec; /* since the start; usec: of its passes */
    double prefill_rate, decode_rate; /* tokens per second over its last 10 s of work */
};

struct scheduler_statistics {
    uint32_t n_queued, n_running;
    uint64_t n_steps;
    double prefill_rate, decode_rate; /* of all lanes together */
    struct lane_statistics lanes[SCHEDULER_LANES];
};
void scheduler_get_statistics(const struct scheduler *s, struct scheduler_statistics *ret);
