/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef LLMD_PUSH_MATMUL_H /* glslc knows no #pragma once */
#define LLMD_PUSH_MATMUL_H

#include "shaders/push.h"

/* All sums are over `MATMUL_SEGMENTS` segments of k: block b of 32 is in segment b % 16. */
#define MATMUL_SEGMENTS 16

/* mattile.comp, mattile_int8.comp: outputs of a work group */
#define MATMUL_TILE 128

/* A weight, as weight.h describes it: where it lies, and the distances between its pieces. */
struct weight_push {
    ADDRESS data;
    uint n_out, n_in;
    uint step;       /* bytes of a stripe, a row, or a column's line */
    uint block_step; /* LAYOUT_COLS: bytes of 32 columns */
};

#ifdef VULKAN
#define WEIGHT_PUSH weight_push
#else
#define WEIGHT_PUSH struct weight_push
#endif

struct matmul_push {
    WEIGHT_PUSH w;
    ADDRESS x;      /* f32 [n][ld_x], or int8 [n][ld_x] */
    ADDRESS d, sum; /* of int8: [n][ld_x / 32] */
    ADDRESS y;      /* [n][ld_y] */
    uint n, ld_x, ld_y;
    uint pad;
};
PUSH_FITS(matmul_push);

struct get_rows_push {
    WEIGHT_PUSH w;
    ADDRESS ids; /* [n] */
    ADDRESS y;   /* [n][ld_y] */
    uint ld_y;
    float scale;
};
PUSH_FITS(get_rows_push);

struct quantize_push {
    ADDRESS x; /* [n][ld_x] */
    ADDRESS q, d, sum;
    ADDRESS q_low, sum_low; /* 0: none */
    uint k, ld_x, ld_q;
    uint pad;
};
PUSH_FITS(quantize_push);

#endif
