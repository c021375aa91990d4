/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * What the matrix kernels of all instruction sets share: the task that threads work on, and rounded
 * activations rearranged for the case of many rows.
 */

#include <string.h>

#include "backends/cpu/cpu.h"
#include "base/checked.h"

/*
 * Fine activations: what q counts where q_low counts one. Levels give the same bits, so all take
 *   acc = fma((float)(254 * sum of w q + sum of w q_low), (d_w * FINE_SCALE) * d_x, acc)
 * with 32-bit integer sums: 254 * 32 * 128 * 127 fits, with an offset of 128 as well.
 */
#define FINE 254
#define FINE_SCALE (1.0f / FINE)

/* f(type, ...) with the type as a constant, so that each has a copy of f's loops to itself. */
#define WITH_WEIGHT_TYPE(type, f, ...) \
    switch (type) {                    \
    case WEIGHT_F32:                   \
        f(WEIGHT_F32, __VA_ARGS__);    \
        break;                         \
    case WEIGHT_F16:                   \
        f(WEIGHT_F16, __VA_ARGS__);    \
        break;                         \
    case WEIGHT_BF16:                  \
        f(WEIGHT_BF16, __VA_ARGS__);   \
        break;                         \
    case WEIGHT_Q8:                    \
        f(WEIGHT_Q8, __VA_ARGS__);     \
        break;                         \
    case WEIGHT_Q4:                    \
        f(WEIGHT_Q4, __VA_ARGS__);     \
        break;                         \
    }

struct matmul_task {
    const struct weight *w;
    const struct activations *x;
    float *y;
    size_t ld_y;
};

/* The product takes one plane of rounded activations; else two of them, or f32. */
static inline bool is_coarse(const struct matmul_task *t)
{
    return t->x->q && !t->x->q_low && weight_type_is_quantized(t->w->type);
}

/* Rows of activations that are worked on together, so that a line of weights is unpacked once for
 * all of them. Their rounded values for the longest matrix should fit a second-level cache. */
#define PACK_ROWS 32

/*
 * Up to PACK_ROWS planes of rounded activations, block by block: rows of a matrix lie a power of
 * two apart and would share a few sets of the first-level cache. A coarse row is one plane, a fine
 * one two, side by side.
 */
struct packed_rows {
    int8_t *q;     /* [n_blocks][PACK_ROWS][32]: of each row q, then q_low */
    float *d;      /* [n_blocks][PACK_ROWS], by row */
    int32_t *bias; /* [n_blocks][PACK_ROWS], by row: -(offset) * sum of the integers */
};

static inline size_t packed_bytes(size_t width)
{
    return DIV_ROUND_UP(width, (size_t)WEIGHT_BLOCK) * PACK_ROWS * (WEIGHT_BLOCK + 8);
}

/* offset: what a weight is stored with more than its value. scratch aligned to 64 */
static inline struct packed_rows pack_rows(const struct activations *x, uint32_t first, uint32_t n,
                                           int32_t offset, void *scratch)
{
    uint32_t n_blocks = x->k / WEIGHT_BLOCK, n_planes = x->q_low ? 2 : 1;
    size_t ld_d = x->ld_q / WEIGHT_BLOCK;
    struct packed_rows p;

    p.q = scratch;
    p.d = (float *)(p.q + (size_t)n_blocks * PACK_ROWS * WEIGHT_BLOCK);
    p.bias = (int32_t *)(p.d + (size_t)n_blocks * PACK_ROWS);
    for (uint32_t i = 0; i < n; i++) {
        const int8_t *q = x->q + (first + i) * x->ld_q;
        const int8_t *low = x->q_low ? x->q_low + (first + i) * x->ld_q : NULL;
        const float *d = x->d + (first + i) * ld_d;
        const int32_t *sum = x->sum + (first + i) * ld_d;
        const int32_t *sum_low = x->q_low ? x->sum_low + (first + i) * ld_d : NULL;

        for (uint32_t b = 0; b < n_blocks; b++) {
            size_t at = (size_t)b * PACK_ROWS;
            int8_t *to = p.q + (at + (size_t)i * n_planes) * WEIGHT_BLOCK;

            memcpy(to, q + (size_t)b * WEIGHT_BLOCK, WEIGHT_BLOCK);
            if (low)
                memcpy(to + WEIGHT_BLOCK, low + (size_t)b * WEIGHT_BLOCK, WEIGHT_BLOCK);
            p.d[at + i] = d[b];
            p.bias[at + i] = -offset * (low ? FINE * sum[b] + sum_low[b] : sum[b]);
        }
    }
    return p;
}

/*
 * Panels: rounded activations rearranged once for all threads, in the shared scratch. Groups of a
 * few rows, block by block, so that a kernel reads one stream and finds every row at a constant
 * distance. A block of a group of n rows:
 *   int8_t q[n][32], q_low[n][32] if fine; float d[n]; int32_t bias[n]
 * where bias is what the offset of the weights adds to the integer sum, negated.
 */
static inline size_t panel_bytes(bool fine, uint32_t n)
{
    return (size_t)n * ((fine ? 2 : 1) * WEIGHT_BLOCK + 8);
}

/* Rounded values that are in panels at a time: they meet a pair of stripes before the next pair
 * does, so they should stay in a second-level cache, and weights be read seldom. Of more rows than
 * CHUNK_ROWS_MIN at most CHUNK_BLOCKS blocks, of fewer all. */
#define CHUNK_BYTES ((uint32_t)384 << 10)
#define CHUNK_ROWS_MIN 16
#define CHUNK_BLOCKS 64

/* Bytes of shared scratch for the panels of the longest rows. */
static inline size_t panels_bytes(size_t width)
{
    return MAX((size_t)CHUNK_BYTES, ALIGN_UP(width, (size_t)WEIGHT_BLOCK) * CHUNK_ROWS_MIN) /
           WEIGHT_BLOCK * panel_bytes(true, 1);
}

/* Bytes of scratch for one stripe of the longest rows. */
static inline size_t stripe_scratch(size_t width)
{
    return ALIGN_UP(width * WEIGHT_STRIPE + width / WEIGHT_BLOCK * WEIGHT_STRIPE * 2, (size_t)64);
}

/* Where the scales of a stripe begin: [n_in / 32][16] f16. */
static inline const uint16_t *stripe_scales(const struct weight *w, const uint8_t *stripe)
{
    return (const uint16_t *)(stripe +
                              (size_t)w->n_in * (w->type == WEIGHT_Q4 ? 8 : WEIGHT_STRIPE));
}

/*
 * How far ahead, in bytes, weights are asked for. The processor's own prefetching ends at every
 * 4096 bytes and starts anew for the scales behind a stripe; with this, one core reads q4 a third
 * faster (24 to 32 GB/s on a Zen 5 whose cores read at most 36).
 */
#define PREFETCH_LINES 2048
#define PREFETCH_SCALES 512

static inline void prefetch(const void *p, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)p + i, 0, 3);
}
