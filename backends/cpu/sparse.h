/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * sparse_ffn() of the instruction sets: what their kernels and sparse.c, which leads them, share.
 *
 * Neurons come in blocks of 32, as their scales do. The cut leaves of each row of gates a list of
 * the neurons above it, rising: their values lie in front in the gate's own row, beside it a mask
 * of each block and where the block's part of the list begins. Kernels of up turn the values into
 * h, and those of down take the lists as they are.
 *
 * The order of sums is fixed by the row alone:
 *   up, rounded   16 lanes; lane l sums blocks 16 g + sparse_block(l) of the input, g rising, as
 *                 acc = fma((float)integer sum, d_w * d_x, acc); then lanes l and l + 8, 4, 2, 1
 *   up, f32       64 lanes, lane l sums inputs l, l + 64, ... by fma; then l and l + 32, 16, ...
 *   down          acc = fma(h, w, acc) over the list, w = d q being exact in float
 */

#include "backends/cpu/cpu.h"
#include "base/checked.h"

#define SPARSE_FEW 16      /* rows up to which down's columns are used as they are read */
#define SPARSE_COLUMNS 128 /* that many rows meet columns unpacked for so many, */
#define SPARSE_OUTPUTS 64  /* and so many outputs: the size of a first-level cache */

#define SPARSE_GROUP 16 /* blocks of an input whose integer sums share a register */

/* Rounded activations, so that word t of lane l holds values 4 t.. of block sparse_block(l). */
struct sparse_x {
    int8_t q[WEIGHT_BLOCK / 4][SPARSE_GROUP][4];
    float d[SPARSE_GROUP];
    int32_t bias[SPARSE_GROUP]; /* what the sum of products begins with: weights have an offset */
};

/* A row of weights in the same order. */
struct sparse_w {
    uint8_t q[WEIGHT_BLOCK / 4][SPARSE_GROUP][4];
    float d[SPARSE_GROUP];
};

/* Lanes of a group are ordered by what four-way transposes of registers leave. */
static inline uint32_t sparse_block(uint32_t lane)
{
    return lane % 4 * 4 + lane / 4;
}

/* A row of activations that has a neuron, and where in its list. */
struct sparse_use {
    uint32_t row, at;
};

struct sparse_task {
    const struct sparse_ffn_args *a;
    const struct sparse_kernels *kernels;
    uint32_t n, ffn, n_blocks;
    bool rounded;       /* up's products are of integers */
    struct sparse_x *x; /* [n][n_groups], when rounded */
    uint32_t n_groups;  /* of the input */
    uint32_t *masks;    /* [n_blocks][ld]: neurons of the block above the row's cut */
    uint32_t *starts;   /* [n_blocks + 1][ld]: where they are in the row's list */
    uint32_t *unions;   /* [n_blocks]: neurons of the block above any row's cut */
    size_t ld;
    uint8_t *columns; /* [n][ld_columns]: neuron % SPARSE_COLUMNS of a list's entries */
    size_t ld_columns;
    uint32_t panel; /* outputs of an item of down */
};

static inline float *sparse_list(const struct sparse_task *t, uint32_t row)
{
    return t->a->gate + row * t->a->ld_gate;
}

struct sparse_kernels {
    int32_t offset_q8; /* what a q8 weight is taken with more than its value */

    /* Row i of the gate: fills masks, starts and columns, and its list with gelu of the rest. */
    void (*cut)(const struct sparse_task *t, uint32_t i);

    /* Multiplies neuron j's values in the lists of its rows with its up . x. */
    void (*up)(const struct sparse_task *t, uint32_t j, const struct sparse_use *uses, uint32_t n,
               void *scratch);

    /* Outputs o..o + n_out - 1 of all rows. o: a multiple of 32; many: of SPARSE_OUTPUTS, which
     * n_out does not pass; few: n at most SPARSE_FEW */
    void (*down_few)(const struct sparse_task *t, uint32_t o, uint32_t n_out, void *scratch);
    void (*down_many)(const struct sparse_task *t, uint32_t o, uint32_t n_out, void *scratch);
};

void cpu_sparse_ffn(struct backend *b, const struct sparse_ffn_args *a,
                    const struct sparse_kernels *kernels);

/* Bytes of scratch of a thread, and of all together. */
size_t sparse_scratch_each(const struct backend_limits *limits);
size_t sparse_scratch_shared(const struct backend_limits *limits);
