/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Leads sparse_ffn() through its three passes: over rows (the cut), over neurons (up) and over
 * outputs (down). For the few rows of decoding it is bound by memory, in pieces of some kilobyte at
 * places that only the cut tells: so lists are made first, and what comes next in them is asked for
 * while this is worked on.
 */

#include "backends/cpu/sparse.h"

#include <assert.h>
#include <string.h>

#include "backends/cpu/matmul.h"

/* Rows of up asked for ahead: at about 150 cycles a row, as long as memory takes to answer. */
#define ROWS_AHEAD 4

/* Panels of outputs for each thread when rows are few: a column's piece should be long. */
#define PANELS_PER_THREAD 2

/* Rows of masks lie so many words more apart, when there are many rows: at multiples of 4096 bytes
 * they would share a few sets of the caches. */
#define SKEW 16

size_t sparse_scratch_each(const struct backend_limits *limits)
{
    size_t width = ALIGN_UP((size_t)limits->max_width, (size_t)512);
    size_t n = limits->max_rows;
    size_t up = width * 4 + 32 * n * sizeof(struct sparse_use) + width * 5;
    size_t few = width * 4 + width * (SPARSE_FEW + 1) * 4;
    size_t many = (SPARSE_COLUMNS + n) * SPARSE_OUTPUTS * sizeof(float);

    return MAX(up, MAX(few, many)) + 4096;
}

size_t sparse_scratch_shared(const struct backend_limits *limits)
{
    return DIV_ROUND_UP((size_t)limits->max_width, (size_t)SPARSE_GROUP * WEIGHT_BLOCK) *
           sizeof(struct sparse_x) * limits->max_rows;
}

static void pack_row(const struct sparse_task *t, uint32_t row)
{
    const struct activations *x = t->a->x;
    int32_t offset = t->a->up->type == WEIGHT_Q4 ? 8 : t->kernels->offset_q8;
    uint32_t n_blocks = x->k / WEIGHT_BLOCK;
    const int8_t *q = x->q + row * x->ld_q;
    const float *d = x->d + row * (x->ld_q / WEIGHT_BLOCK);
    const int32_t *sum = x->sum + row * (x->ld_q / WEIGHT_BLOCK);

    for (uint32_t g = 0; g < t->n_groups; g++) {
        struct sparse_x *to = &t->x[(size_t)row * t->n_groups + g];

        for (uint32_t lane = 0; lane < SPARSE_GROUP; lane++) {
            uint32_t b = g * SPARSE_GROUP + sparse_block(lane);

            if (b >= n_blocks) {
                for (uint32_t w = 0; w < WEIGHT_BLOCK / 4; w++)
                    memset(to->q[w][lane], 0, 4);
                to->d[lane] = 0;
                to->bias[lane] = 0;
                continue;
            }
            for (uint32_t w = 0; w < WEIGHT_BLOCK / 4; w++)
                memcpy(to->q[w][lane], q + (size_t)b * WEIGHT_BLOCK + w * 4, 4);
            to->d[lane] = d[b];
            to->bias[lane] = -offset * sum[b];
        }
    }
}

static void cut_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct sparse_task *t = args;

    (void)scratch;
    for (uint32_t i = first; i < last; i++) {
        if (t->rounded)
            pack_row(t, i);
        t->kernels->cut(t, i);
    }
}

static uint32_t low_bit(uint32_t mask)
{
    return (uint32_t)__builtin_ctz(mask);
}

/* Which rows have the neurons of a block: uses[32][n], counts[32]. */
static void find_uses(const struct sparse_task *t, uint32_t b, struct sparse_use *uses,
                      uint32_t *counts)
{
    memset(counts, 0, WEIGHT_BLOCK * sizeof(*counts));
    for (uint32_t i = 0; i < t->n; i++) {
        uint32_t at = t->starts[b * t->ld + i];

        for (uint32_t m = t->masks[b * t->ld + i]; m; m &= m - 1) {
            uint32_t j = low_bit(m);

            uses[(size_t)j * t->n + counts[j]++] = (struct sparse_use){i, at++};
        }
    }
}

static void up_blocks(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct sparse_task *t = args;
    const struct weight *w = t->a->up;
    size_t bytes = weight_row_bytes(w->type, w->n_in);
    uint32_t *neurons = scratch, n_neurons = 0, counts[WEIGHT_BLOCK], block = UINT32_MAX;
    struct sparse_use *uses =
        (struct sparse_use *)(neurons + ALIGN_UP((last - first) * WEIGHT_BLOCK, 16u));
    char *rest = (char *)ALIGN_UP((uintptr_t)(uses + (size_t)WEIGHT_BLOCK * t->n), (uintptr_t)64);

    for (uint32_t b = first; b < last; b++) {
        uint32_t all = 0;

        for (uint32_t i = 0; i < t->n; i++)
            all |= t->masks[b * t->ld + i];
        t->unions[b] = all;
        for (; all; all &= all - 1)
            neurons[n_neurons++] = b * WEIGHT_BLOCK + low_bit(all);
    }
    for (uint32_t k = 0; k < n_neurons; k++) {
        uint32_t j = neurons[k];

        for (uint32_t ahead = k ? ROWS_AHEAD : 1; ahead <= ROWS_AHEAD; ahead++)
            if (k + ahead < n_neurons)
                prefetch((const char *)w->data + neurons[k + ahead] * bytes, bytes);
        if (j / WEIGHT_BLOCK != block) {
            block = j / WEIGHT_BLOCK;
            find_uses(t, block, uses, counts);
        }
        t->kernels->up(t, j, uses + (size_t)(j % WEIGHT_BLOCK) * t->n, counts[j % WEIGHT_BLOCK],
                       rest);
    }
}

static void down_panels(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct sparse_task *t = args;

    for (uint32_t p = first; p < last; p++) {
        uint32_t o = p * t->panel, n_out = MIN(t->a->down->n_out - o, t->panel);

        if (t->n <= SPARSE_FEW)
            t->kernels->down_few(t, o, n_out, scratch);
        else
            t->kernels->down_many(t, o, n_out, scratch);
    }
}

/* The next bytes of the work memory. */
static void *take(char **at, size_t bytes)
{
    char *p = *at;

    *at += ALIGN_UP(bytes, (size_t)64);
    return p;
}

void cpu_sparse_ffn(struct backend *b, const struct sparse_ffn_args *a,
                    const struct sparse_kernels *kernels)
{
    struct cpu_backend *c = cpu_backend(b);
    struct sparse_task t = {
        .a = a,
        .kernels = kernels,
        .n = a->x->n,
        .ffn = a->up->n_out,
        .n_blocks = DIV_ROUND_UP(a->up->n_out, (uint32_t)WEIGHT_BLOCK),
        .rounded = a->x->q && weight_type_is_quantized(a->up->type),
        .x = cpu_shared(c),
        .n_groups = DIV_ROUND_UP(a->up->n_in, (uint32_t)SPARSE_GROUP * WEIGHT_BLOCK),
    };
    uint32_t n_out = a->down->n_out;
    char *at = a->work;
    uint64_t entries = 0, neurons = 0;

    assert(a->up->layout == LAYOUT_ROWS && a->down->layout == LAYOUT_COLS && a->z > 0);
    assert(!a->x->q_low);
    assert(a->x->k == a->up->n_in && a->down->n_in == t.ffn && t.n <= c->limits.max_rows);
    assert(MAX(MAX(t.ffn, a->x->k), n_out) <= c->limits.max_width);
    t.ld = t.n < 4 * SKEW ? t.n : ALIGN_UP((size_t)t.n, (size_t)SKEW) + SKEW;
    t.ld_columns = ALIGN_UP((size_t)t.ffn, (size_t)64) + 64;
    t.masks = take(&at, t.n_blocks * t.ld * sizeof(*t.masks));
    t.starts = take(&at, (t.n_blocks + 1) * t.ld * sizeof(*t.starts));
    t.unions = take(&at, t.n_blocks * sizeof(*t.unions));
    t.columns = take(&at, t.n * t.ld_columns);
    assert(at <= (char *)a->work + sparse_ffn_work_bytes(t.n, t.ffn));

    cpu_parallel(c, t.n, (size_t)t.ffn * 2, cut_rows, &t);
    for (uint32_t i = 0; i < t.n; i++)
        entries += t.starts[t.n_blocks * t.ld + i];
    cpu_parallel(c, t.n_blocks, entries * a->x->k / t.n_blocks / 8, up_blocks, &t);
    for (uint32_t i = 0; i < t.n_blocks; i++)
        neurons += (uint32_t)__builtin_popcount(t.unions[i]);

    t.panel = t.n > SPARSE_FEW
                  ? SPARSE_OUTPUTS
                  : ALIGN_UP(DIV_ROUND_UP(n_out, c->n_threads * PANELS_PER_THREAD), 128u);
    cpu_parallel(c, DIV_ROUND_UP(n_out, t.panel), entries * t.panel / 8, down_panels, &t);
    if (a->ret_neurons)
        *a->ret_neurons = neurons;
}
