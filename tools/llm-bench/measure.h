/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * measure: what llm-bench finds out about a model: cases (a prompt to read, sessions to decode),
 * limits of the machine, memory, accuracy. Texts and JSON are report.h's.
 */

#include <stdbool.h>
#include <stdint.h>

#include "backends/cpu/probe.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "tools/llm-bench/timed-backend.h"

#define MAX_SESSIONS 64
#define MAX_LIST 16
#define MAX_CASES (MAX_LIST * 3 * MAX_LIST)

struct list {
    uint32_t values[MAX_LIST];
    size_t n;
};

struct bench_options {
    struct list prompts, depths, sessions; /* ascending; what passes the context is left out */
    struct list threads;                   /* none: one run with as many as there are cores */
    uint32_t n_decode, n_repetitions, probe_mib, n_positions;
    struct engine_options engine;
};

/* One case. A step is all of the prompt, or one token of each session. */
struct result {
    bool is_decode;
    uint32_t n_threads;
    uint32_t n_tokens; /* the prompt's; of each session, before the first step */
    uint32_t n_sessions;
    uint32_t n_steps;                /* of a repetition */
    uint32_t n_repetitions;          /* those that were finished */
    double median, least, most;      /* seconds of a step */
    double timed;                    /* seconds of a step of the repetition that was looked into */
    struct op_sum ops[N_OP_CLASSES]; /* of a step of that repetition */
};

struct limits {
    uint32_t n_threads;
    bool has_read, has_read_after;
    struct probe_rate read_before, read_after;
    bool has_multiplier[N_PROBE_MULTIPLIERS];
    struct probe_rate multiply[N_PROBE_MULTIPLIERS];
};

struct memory {
    uint64_t anonymous, file; /* resident, when K and V took most */
    uint64_t peak;            /* resident, of all runs, without the probes */
    struct engine_memory engine;
};

struct accuracy {
    uint32_t n_positions; /* 0: not measured */
    double mean, most;    /* KLD, nats */
    uint32_t n_agree;     /* positions where the most probable token is the same */
    bool is_text;         /* else random tokens */
};

struct measurements {
    char description[128]; /* the engine's */
    char level[16];
    uint32_t n_threads; /* of the run that goes on */
    bool is_f32, is_complete;
    struct result results[MAX_CASES];
    size_t n_results;
    struct limits limits[MAX_LIST]; /* by number of threads */
    size_t n_limits;
    struct memory memory;
    struct accuracy accuracy;
};

/*
 * Asked when the engine's description and level are known, before anything is measured; a negative
 * answer, with err set, ends it.
 */
typedef int (*measure_check)(const struct measurements *m, void *userdata, struct error *err);

/*
 * Measures what the options say; ret is filled as far as it came also when something failed.
 * SIGINT ends it early: 0, and is_complete is false. 0, -errno: err says what went wrong
 */
int measure(struct measurements *ret, const struct model *m, const struct bench_options *o,
            measure_check check, void *userdata, struct error *err);

/* Bytes per second, the larger of both; 0: not known. */
double limits_read(const struct limits *l);

/* Seconds that the operations take at least: reading, and multiplying. 0: not known. */
double limits_read_seconds(const struct limits *l, const struct op_sum *s);
double limits_multiply_seconds(const struct limits *l, const struct op_sum *s);

struct op_sum result_total(const struct result *r); /* of a step; without sampling */
