/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * cpu_backend: what the files of backends/cpu share. Each level is one file that fills or overrides
 * a table of operations: the reference fills all of it, a level for an instruction set replaces
 * what it does better, and backend_cpu_new() applies them in that order, once.
 *
 * Only cpu_parallel() knows of threads. A level's file is compiled for its instruction set, so
 * nothing in it but cpu_use_*() may be visible outside, and whatever it shares with other levels
 * is static inline: otherwise the linker might take its copy for everybody.
 */

#include "backends/backend.h"
#include "backends/cpu/cores.h"

struct cpu_backend {
    struct backend base;
    struct backend_ops ops; /* what base.ops points to */
    /* matmul of the reference, for layouts that no level has kernels for */
    void (*reference_matmul)(struct backend *b, const struct weight *w, const struct activations *x,
                             float *y, size_t ld_y);
    /* matmul of the level below, for a level that has kernels for some layouts only */
    void (*lower_matmul)(struct backend *b, const struct weight *w, const struct activations *x,
                         float *y, size_t ld_y);
    /* matmul of the level below the tiles, which has the same sums and is faster for few rows */
    void (*few_rows_matmul)(struct backend *b, const struct weight *w, const struct activations *x,
                            float *y, size_t ld_y);
    void (*lower_gate)(struct backend *b, const struct gate_args *a); /* likewise */
    struct backend_limits limits;
    struct cores cores;
    struct team *team;
    uint32_t n_threads; /* of the team */
    char *scratch; /* scratch_each bytes for each thread, aligned to 64, then the shared part */
    size_t scratch_each, scratch_shared, scratch_total; /* cpu_use_*() may raise the first two */
};

static inline struct cpu_backend *cpu_backend(struct backend *b)
{
    return (struct cpu_backend *)b;
}

/* Memory that all threads of one operation see; scratch_shared bytes. */
static inline void *cpu_shared(struct cpu_backend *c)
{
    return c->scratch + c->scratch_each * c->n_threads;
}

/*
 * Part of an operation: items first..last - 1. Which thread runs which items, and in how many
 * pieces, is not defined, so what an item gives must not depend on it. scratch is the thread's
 * own, with undefined content.
 */
typedef void (*cpu_body)(const void *args, uint32_t first, uint32_t last, void *scratch);

/*
 * Runs body over items 0..n - 1, on several threads when it pays. cost: of one item, about the
 * number of multiplications.
 */
void cpu_parallel(struct cpu_backend *c, uint32_t n, size_t cost, cpu_body body, const void *args);

/* Bytes of scratch for each thread that the operations of all levels need within the limits. */
size_t cpu_scratch_each(const struct backend_limits *limits);
size_t cpu_scratch_shared(const struct backend_limits *limits); /* likewise, for all together */

/* Scratch memory of the sizes that c names now, in place of what it had. 0, -ENOMEM */
int cpu_map_scratch(struct cpu_backend *c);

/*
 * What attention.h works in: for each thread sums and scores of so many rows and heads; and shared
 * by threads that work on the same row the sums of its runs, for as many as fit.
 */
#define CPU_ATTENTION_ROWS 16
#define CPU_ATTENTION_GROUP 4
#define CPU_ATTENTION_SCRATCH                                                              \
    ((size_t)CPU_ATTENTION_ROWS * CPU_ATTENTION_GROUP * (BACKEND_MAX_HEAD_DIM + KV_PAGE) * \
     sizeof(float))
#define CPU_ATTENTION_SHARED ((size_t)4 << 20)

void cpu_use_reference(struct cpu_backend *c);
void cpu_use_avx2(struct cpu_backend *c);   /* AVX2, FMA, F16C */
void cpu_use_avx512(struct cpu_backend *c); /* AVX-512 F, BW, DQ, VL, VNNI */
void cpu_use_amx(struct cpu_backend *c);    /* AMX tiles, int8 and bf16, and GFNI */
