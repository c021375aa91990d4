/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * worker: one client of the daemon as a process of its own, so that it may have a uid of its own
 * and its clock waits for nobody else. It writes what it sees into memory that its parent reads at
 * any time.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

enum worker_kind {
    WORKER_STATUS, /* asks for the daemon's status again and again */
    WORKER_ONCE,   /* one request */
    WORKER_REPEAT, /* requests without end, each in a new session when the last one's is full */
};

struct worker_task {
    enum worker_kind kind;
    const char *socket;
    bool has_uid;
    uid_t uid;
    uint32_t n_words;  /* of the prompt */
    uint32_t n_tokens; /* at most, of an answer; 0: until the context is full */
};

/* What happened at a time. */
struct worker_event {
    uint64_t at;   /* CLOCK_MONOTONIC, ns */
    uint64_t took; /* status: of the call; token: since the one before, 0 for a request's first */
};

#define WORKER_EVENTS_MAX (1u << 18)

/* Shared memory. A worker that has filled it goes on counting. */
struct worker_log {
    atomic_uint_fast64_t n_events;   /* tokens or calls, whether there was room for them or not */
    atomic_uint_fast64_t began_at;   /* when the first request was made; 0: not yet */
    atomic_uint_fast64_t started_at; /* the last request's; 0: none yet */
    atomic_uint_fast64_t first_at;   /* its first token's; 0: none yet */
    atomic_uint prompt_tokens;       /* of the last request that ended */
    atomic_bool failed;
    char message[512]; /* when failed */
    struct worker_event events[WORKER_EVENTS_MAX];
};

struct worker {
    pid_t pid; /* 0: none */
    struct worker_log *log;
};

uint64_t worker_now(void);

/* 0, -errno */
int worker_start(struct worker *w, const struct worker_task *task, struct error *err);

/* Waits until it ends by itself. 0; -EIO: it failed, err says how */
int worker_wait(struct worker *w, struct error *err);

/* Waits until its current request has given a token. 0, -EIO */
int worker_wait_first(struct worker *w, struct error *err);

/* Ends it: to the daemon it vanishes. Nothing for a worker of zeros. */
void worker_done(struct worker *w);
