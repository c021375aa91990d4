/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Attention as the vector levels do it, page by page with a running maximum: scores of a page's 64
 * positions, the maximum so far, what was summed before scaled down to it, then the page's values.
 * Page boundaries are absolute positions, so a row's result depends on its position alone. Query
 * heads that share a KV head are worked on together, so that K and V are read and widened once for
 * all.
 *
 * Positions that the row does not see may hold anything, NaN of another session's hostile weights
 * included: their scores are replaced before use and their values not read.
 *
 * A level's file includes this and defines the three steps in its own registers.
 */

#include <assert.h>
#include <math.h>
#include <string.h>

#include "backends/cpu/cpu.h"
#include "base/checked.h"

/* Query heads worked on together: two registers of positions or dimensions for each. */
#define GROUP 4

/* Terms of a score that are summed before they are added to the rest (see the bound). */
#define SCORE_RUN 16

/* Scores of the page's positions; k [head_dim][KV_PAGE] */
static inline void page_scores(const void *k, bool f16, const float *q, uint32_t dim, uint32_t n,
                               uint32_t first, uint32_t last, float (*score)[KV_PAGE]);

/* Scores to weights in place, 0 where not seen; the new maximum and what the past is worth now. */
static inline float page_weights(float *score, uint32_t first, uint32_t last, float *max,
                                 double *sum);

/* out [n][dim] = out * scale + the page's values by their weights; v [KV_PAGE][head_dim] */
static inline void page_values(const void *v, bool f16, uint32_t dim, uint32_t n, uint32_t first,
                               uint32_t last, const float (*weight)[KV_PAGE], const float *scale,
                               float *out);

/* n heads from head on, all of one KV head. n and f16 are constants where this is used. */
static inline __attribute__((always_inline)) void attend(const struct attention_args *a,
                                                         uint32_t row, uint32_t head, uint32_t n,
                                                         uint32_t head_kv, bool f16)
{
    uint32_t dim = a->shape.head_dim, size = f16 ? 2 : 4, pos = a->rows[row].pos;
    uint32_t begin = a->window && pos >= a->window ? pos - a->window + 1 : 0;
    const float *q = a->q + row * a->ld + (size_t)head * dim;
    float *out = a->out + row * a->ld + (size_t)head * dim;
    size_t k_from = (size_t)head_kv * dim * KV_PAGE * size;
    size_t v_from = (size_t)a->shape.n_heads_kv * dim * KV_PAGE * size + k_from;
    float score[GROUP][KV_PAGE] __attribute__((aligned(64)));
    float max[GROUP], scale[GROUP];
    double sum[GROUP];

    memset(score, 0, sizeof(score));
    memset(out, 0, (size_t)n * dim * sizeof(*out));
    for (uint32_t g = 0; g < n; g++) {
        max[g] = -INFINITY;
        sum[g] = 0;
    }
    for (uint32_t page = begin / KV_PAGE; page <= pos / KV_PAGE; page++) {
        const char *data = a->rows[row].pages[page];
        uint32_t first = page == begin / KV_PAGE ? begin % KV_PAGE : 0;
        uint32_t last = page == pos / KV_PAGE ? pos % KV_PAGE + 1 : KV_PAGE;

        page_scores(data + k_from, f16, q, dim, n, first, last, score);
        for (uint32_t g = 0; g < n; g++)
            scale[g] = page_weights(score[g], first, last, &max[g], &sum[g]);
        page_values(data + v_from, f16, dim, n, first, last, score, scale, out);
    }
    for (uint32_t g = 0; g < n; g++) {
        float r = (float)(1 / sum[g]);

        for (uint32_t i = 0; i < dim; i++)
            out[(size_t)g * dim + i] *= r;
    }
}

/* Items are pairs of a row and a KV head. */
static void attention_groups(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct attention_args *a = args;
    uint32_t n_kv = a->shape.n_heads_kv;

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        uint32_t row = item / n_kv, j = item % n_kv;
        uint32_t head = (uint32_t)DIV_ROUND_UP((uint64_t)j * a->n_heads, n_kv);
        uint32_t end = (uint32_t)DIV_ROUND_UP((uint64_t)(j + 1) * a->n_heads, n_kv);

        if (a->shape.f16) {
            for (; head + GROUP <= end; head += GROUP)
                attend(a, row, head, GROUP, j, true);
            for (; head < end; head++)
                attend(a, row, head, 1, j, true);
        } else {
            for (; head + GROUP <= end; head += GROUP)
                attend(a, row, head, GROUP, j, false);
            for (; head < end; head++)
                attend(a, row, head, 1, j, false);
        }
    }
}

/* The operation; lanes: values that a register of this level holds, for the cost. */
static inline void attention_over_pages(struct backend *b, const struct attention_args *a,
                                        uint32_t lanes)
{
    uint64_t positions = 0;

    assert(a->shape.head_dim <= BACKEND_MAX_HEAD_DIM && a->n_heads >= a->shape.n_heads_kv);
    for (uint32_t i = 0; i < a->n; i++)
        positions += a->window ? MIN(a->rows[i].pos + 1, a->window) : a->rows[i].pos + 1;
    if (a->n)
        cpu_parallel(cpu_backend(b), a->n * a->shape.n_heads_kv,
                     (size_t)(positions / a->n) * a->shape.head_dim *
                         (a->n_heads / a->shape.n_heads_kv) / lanes,
                     attention_groups, a);
}
