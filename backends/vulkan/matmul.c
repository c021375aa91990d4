/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Products of weights and activations, rounding of activations, rows of tables.
 *
 * A product of few rows is bound by reading the weights: matvec.comp has a work group for 16
 * outputs, whose threads share the sum over k. Of many rows it is bound by multiplying:
 * mattile.comp decodes weights once for a tile of rows. Both add up in the same order, which
 * depends on k alone, so that a row's bits do not depend on n: k is cut into MATMUL_SEGMENTS
 * interleaved segments of whole blocks, each summed from front to back, and the segments' sums are
 * added in order. With rounded activations (coarse) the blocks' sums are exact integers; fine ones
 * take f32, as do weights that are not quantised.
 */

#include <assert.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/checked.h"
#include "shaders/push-matmul.h"

/* The shaders' constants are these (weights.glsl). */
_Static_assert(WEIGHT_F32 == 0 && WEIGHT_F16 == 1 && WEIGHT_BF16 == 2 && WEIGHT_Q8 == 3 &&
                   WEIGHT_Q4 == 4,
               "weights.glsl");
_Static_assert(LAYOUT_PLAIN == 0 && LAYOUT_TILE16 == 1 && LAYOUT_ROWS == 2 && LAYOUT_COLS == 3,
               "weights.glsl");

#define N_TYPES 5
#define N_LAYOUTS 4
#define MAX_MATVEC_ROWS 8
#define TILE_SHARED 26112 /* bytes of shared memory that mattile.comp needs */
#define TILE_THREADS 256

/* The first of a kind's pipelines, which follow each other as in pipelines.h. 0: no such kind */
static const uint16_t f32_pipelines[N_TYPES][N_LAYOUTS] = {
    [WEIGHT_F32] = {VULKAN_F32_PLAIN_1, VULKAN_F32_TILE16_1, VULKAN_F32_ROWS_1, VULKAN_F32_COLS_1},
    [WEIGHT_F16] = {0, VULKAN_F16_TILE16_1, VULKAN_F16_ROWS_1, VULKAN_F16_COLS_1},
    [WEIGHT_BF16] = {0, VULKAN_BF16_TILE16_1, VULKAN_BF16_ROWS_1, VULKAN_BF16_COLS_1},
    [WEIGHT_Q8] = {0, VULKAN_Q8_TILE16_1, VULKAN_Q8_ROWS_1, VULKAN_Q8_COLS_1},
    [WEIGHT_Q4] = {0, VULKAN_Q4_TILE16_1, VULKAN_Q4_ROWS_1, VULKAN_Q4_COLS_1},
};

static const uint16_t int8_pipelines[2][2][N_LAYOUTS] = {
    /* by dot_8 */
    {{0, VULKAN_INT8_Q8_TILE16_1, VULKAN_INT8_Q8_ROWS_1, VULKAN_INT8_Q8_COLS_1},
     {0, VULKAN_INT8_Q4_TILE16_1, VULKAN_INT8_Q4_ROWS_1, VULKAN_INT8_Q4_COLS_1}},
    {{0, VULKAN_DOT8_Q8_TILE16_1, VULKAN_DOT8_Q8_ROWS_1, VULKAN_DOT8_Q8_COLS_1},
     {0, VULKAN_DOT8_Q4_TILE16_1, VULKAN_DOT8_Q4_ROWS_1, VULKAN_DOT8_Q4_COLS_1}},
};

static const uint16_t get_rows_pipelines[N_TYPES][2] = {
    {VULKAN_GET_F32_TILE16, VULKAN_GET_F32_ROWS},   {VULKAN_GET_F16_TILE16, VULKAN_GET_F16_ROWS},
    {VULKAN_GET_BF16_TILE16, VULKAN_GET_BF16_ROWS}, {VULKAN_GET_Q8_TILE16, VULKAN_GET_Q8_ROWS},
    {VULKAN_GET_Q4_TILE16, VULKAN_GET_Q4_ROWS},
};

static uint32_t u32(size_t n)
{
    assert(n <= UINT32_MAX);
    return (uint32_t)n;
}

/* Bytes of n rows. Shaders count elements in 31 bits. */
static size_t rows_bytes(size_t n, size_t ld, size_t k, size_t size)
{
    assert(n > 0 && n * ld <= INT32_MAX);
    return ((n - 1) * ld + k) * size;
}

static struct weight_push weight_push(struct vulkan_backend *v, const struct weight *w)
{
    struct weight_push p = {.n_out = w->n_out, .n_in = w->n_in};
    size_t bytes;
    int r = weight_size(w->type, w->layout, w->n_out, w->n_in, &bytes);

    assert(r == 0 && (uintptr_t)w->data % WEIGHT_ALIGN == 0);
    (void)r;
    p.data = vulkan_address(v, w->data, bytes);
    switch (w->layout) {
    case LAYOUT_PLAIN:
        p.step = w->n_in * 4;
        break;
    case LAYOUT_TILE16:
        p.step = u32(weight_stripe_bytes(w->type, w->n_in));
        break;
    case LAYOUT_ROWS:
        p.step = u32(weight_row_bytes(w->type, w->n_in));
        break;
    case LAYOUT_COLS:
        p.step = u32(weight_column_bytes(w->type, w->n_out));
        if (weight_type_is_quantized(w->type))
            p.block_step = u32(weight_col_block_bytes(w->type, w->n_out));
        break;
    }
    return p;
}

static void quantize(struct backend *b, const struct activations *x)
{
    struct vulkan_backend *v = vulkan_backend(b);
    size_t ld_d = x->ld_q / WEIGHT_BLOCK;
    struct quantize_push p;

    if (x->n == 0)
        return;
    assert((uintptr_t)x->q % 4 == 0 && (uintptr_t)x->q_low % 4 == 0);
    p = (struct quantize_push){
        .x = vulkan_address(v, x->f32, rows_bytes(x->n, x->ld, x->k, sizeof(float))),
        .q = vulkan_address(v, x->q, rows_bytes(x->n, x->ld_q, x->ld_q, 1)),
        .d = vulkan_address(v, x->d, rows_bytes(x->n, ld_d, ld_d, sizeof(float))),
        .sum = vulkan_address(v, x->sum, rows_bytes(x->n, ld_d, ld_d, sizeof(int32_t))),
        .k = x->k,
        .ld_x = u32(x->ld),
        .ld_q = u32(x->ld_q),
    };
    if (x->q_low) {
        p.q_low = vulkan_address(v, x->q_low, rows_bytes(x->n, x->ld_q, x->ld_q, 1));
        p.sum_low = vulkan_address(v, x->sum_low, rows_bytes(x->n, ld_d, ld_d, sizeof(int32_t)));
    }
    /* a thread has four values */
    vulkan_dispatch(v, VULKAN_QUANTIZE, &p, sizeof(p),
                    u32(DIV_ROUND_UP(x->ld_q, (size_t)4 * VULKAN_QUANTIZE_THREADS)), x->n, 1);
}

/* A work group has `outputs` of `rows`. A vocabulary may need more than one dimension can have. */
static void dispatch_product(struct vulkan_backend *v, uint32_t pipeline,
                             const struct matmul_push *p, uint32_t outputs, uint32_t rows)
{
    uint32_t groups = DIV_ROUND_UP(p->w.n_out, outputs), z = DIV_ROUND_UP(groups, 65535u);

    vulkan_dispatch(v, (enum vulkan_pipeline)pipeline, p, sizeof(*p), DIV_ROUND_UP(groups, z),
                    DIV_ROUND_UP(p->n, rows), z);
}

static void matmul(struct backend *b, const struct weight *w, const struct activations *x, float *y,
                   size_t ld_y)
{
    struct vulkan_backend *v = vulkan_backend(b);
    const struct vulkan_capabilities *has = vulkan_has(v);
    bool coarse = x->q && !x->q_low && weight_type_is_quantized(w->type);
    bool tiles = has->max_invocations >= TILE_THREADS && has->shared_bytes >= TILE_SHARED;
    uint32_t first, max_rows = has->shared_bytes >= TILE_SHARED ? MAX_MATVEC_ROWS : 4;
    struct matmul_push p;

    assert(x->k == w->n_in);
    if (x->n == 0)
        return;
    p = (struct matmul_push){
        .w = weight_push(v, w),
        .y = vulkan_address(v, y, rows_bytes(x->n, ld_y, w->n_out, sizeof(float))),
        .n = x->n,
        .ld_y = u32(ld_y),
    };
    if (coarse) {
        size_t ld_d = x->ld_q / WEIGHT_BLOCK, n_blocks = w->n_in / WEIGHT_BLOCK;

        assert((uintptr_t)x->q % 4 == 0);
        vulkan_reads(v, x->q, rows_bytes(x->n, x->ld_q, x->k, 1));
        vulkan_reads(v, x->d, rows_bytes(x->n, ld_d, n_blocks, sizeof(float)));
        vulkan_reads(v, x->sum, rows_bytes(x->n, ld_d, n_blocks, sizeof(int32_t)));
        p.x = vulkan_address(v, x->q, rows_bytes(x->n, x->ld_q, x->k, 1));
        p.d = vulkan_address(v, x->d, rows_bytes(x->n, ld_d, n_blocks, sizeof(float)));
        p.sum = vulkan_address(v, x->sum, rows_bytes(x->n, ld_d, n_blocks, sizeof(int32_t)));
        p.ld_x = u32(x->ld_q);
        first = int8_pipelines[has->dot_8][w->type == WEIGHT_Q4][w->layout];
    } else {
        vulkan_reads(v, x->f32, rows_bytes(x->n, x->ld, x->k, sizeof(float)));
        p.x = vulkan_address(v, x->f32, rows_bytes(x->n, x->ld, x->k, sizeof(float)));
        p.ld_x = u32(x->ld);
        first = f32_pipelines[w->type][w->layout];
    }
    assert(first);
    vulkan_writes(v, y, rows_bytes(x->n, ld_y, w->n_out, sizeof(float)));
    if (x->n <= MAX_MATVEC_ROWS || !tiles) {
        uint32_t rows = 1, pipeline = first;

        for (; rows < x->n && rows < max_rows; rows *= 2)
            pipeline++;
        dispatch_product(v, pipeline, &p, WEIGHT_STRIPE, rows);
    } else {
        uint32_t rows = x->n <= 32 ? 32 : 64;

        dispatch_product(v, first + (rows == 32 ? 4 : 5), &p, MATMUL_TILE, rows);
    }
    /* reading the weights takes about as long as eight rows */
    vulkan_work(v, (uint64_t)w->n_out * w->n_in * MAX(x->n, (uint32_t)MAX_MATVEC_ROWS));
}

static void get_rows(struct backend *b, const struct weight *w, const uint32_t *ids, uint32_t n,
                     float scale, float *y, size_t ld_y)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct get_rows_push p;

    assert(w->layout == LAYOUT_TILE16 || w->layout == LAYOUT_ROWS);
    if (n == 0)
        return;
    p = (struct get_rows_push){
        .w = weight_push(v, w),
        .ids = vulkan_address(v, ids, (size_t)n * sizeof(*ids)),
        .y = vulkan_address(v, y, rows_bytes(n, ld_y, w->n_in, sizeof(float))),
        .ld_y = u32(ld_y),
        .scale = scale,
    };
    vulkan_dispatch(v, (enum vulkan_pipeline)get_rows_pipelines[w->type][w->layout == LAYOUT_ROWS],
                    &p, sizeof(p), DIV_ROUND_UP(w->n_in, (uint32_t)VULKAN_GET_THREADS), n, 1);
}

void vulkan_use_matmul(struct backend_ops *ops)
{
    ops->quantize = quantize;
    ops->matmul = matmul;
    ops->get_rows = get_rows;
}
