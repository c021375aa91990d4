/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * sparse_ffn() in three dispatches: a workgroup for each row cuts its gates and lists the neurons
 * that are left, in the work memory; others turn these gates into h, in place; and others add up
 * the columns of down by the list. How many neurons a row has only the device knows, so there are
 * as many workgroups as are to be busy, and each takes what it finds.
 */

#include <assert.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/checked.h"
#include "shaders/push-sparse.h"

/* Workgroups of up that a device is to have, and among how many a row's are divided. */
#define UP_WORKGROUPS 4096
#define UP_SHARES_MIN 16
#define UP_SHARES_MAX 128

/* One in so many is left, about: of normally distributed gates with z = 1.64 that is one in 20. */
#define NEURONS_LEFT 16

static_assert(WEIGHT_F32 == SPARSE_F32 && WEIGHT_F16 == SPARSE_F16 && WEIGHT_BF16 == SPARSE_BF16 &&
                  WEIGHT_Q8 == SPARSE_Q8 && WEIGHT_Q4 == SPARSE_Q4,
              "as in shaders");

static enum vulkan_pipeline up_pipeline(enum weight_type type, bool rounded)
{
    switch (type) {
    case WEIGHT_F32:
        return VULKAN_SPARSE_UP_F32;
    case WEIGHT_F16:
        return VULKAN_SPARSE_UP_F16;
    case WEIGHT_BF16:
        return VULKAN_SPARSE_UP_BF16;
    case WEIGHT_Q8:
        return rounded ? VULKAN_SPARSE_UP_Q8_ROUNDED : VULKAN_SPARSE_UP_Q8;
    case WEIGHT_Q4:
    default:
        return rounded ? VULKAN_SPARSE_UP_Q4_ROUNDED : VULKAN_SPARSE_UP_Q4;
    }
}

static enum vulkan_pipeline down_pipeline(enum weight_type type)
{
    switch (type) {
    case WEIGHT_F32:
        return VULKAN_SPARSE_DOWN_F32;
    case WEIGHT_F16:
        return VULKAN_SPARSE_DOWN_F16;
    case WEIGHT_BF16:
        return VULKAN_SPARSE_DOWN_BF16;
    case WEIGHT_Q8:
        return VULKAN_SPARSE_DOWN_Q8;
    case WEIGHT_Q4:
    default:
        return VULKAN_SPARSE_DOWN_Q4;
    }
}

static uint32_t outputs_of_word(enum weight_type type)
{
    switch (type) {
    case WEIGHT_F32:
        return 1;
    case WEIGHT_F16:
    case WEIGHT_BF16:
        return 2;
    case WEIGHT_Q8:
        return 4;
    case WEIGHT_Q4:
    default:
        return 8;
    }
}

static struct address weight_address(struct vulkan_backend *v, const struct weight *w)
{
    size_t bytes = 0;
    int r = weight_size(w->type, w->layout, w->n_out, w->n_in, &bytes);

    assert(r == 0);
    (void)r;
    return vulkan_address(v, w->data, bytes);
}

static void vulkan_sparse_ffn(struct backend *b, const struct sparse_ffn_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    const struct activations *x = a->x;
    const struct weight *up = a->up, *down = a->down;
    bool rounded = x->q && weight_type_is_quantized(up->type);
    uint32_t n = x->n, ffn = up->n_out;
    size_t ld_work = ALIGN_UP((size_t)ffn, (size_t)64) + SPARSE_LIST;
    uint32_t n_shares, n_panels;
    struct sparse_push push;

    assert(up->layout == LAYOUT_ROWS && down->layout == LAYOUT_COLS && a->z > 0);
    assert(!x->q_low && x->k == up->n_in && down->n_in == ffn);
    if (n == 0)
        return;
    push = (struct sparse_push){
        .gate = vulkan_rows_address(v, a->gate, n, ffn, a->ld_gate),
        .y = vulkan_rows_address(v, a->y, n, down->n_out, a->ld_y),
        .work = vulkan_address(v, a->work, sparse_ffn_work_bytes(n, ffn)),
        .up = weight_address(v, up),
        .down = weight_address(v, down),
        .ld_x = (uint32_t)x->ld,
        .ld_q = (uint32_t)x->ld_q,
        .ld_gate = (uint32_t)a->ld_gate,
        .ld_y = (uint32_t)a->ld_y,
        .ld_work = (uint32_t)ld_work,
        .n_in = up->n_in,
        .ffn = ffn,
        .n_out = down->n_out,
        .up_row = (uint32_t)(weight_row_bytes(up->type, up->n_in) / 4),
        .down_line = (uint32_t)(weight_column_bytes(down->type, down->n_out) / 4),
        .z = a->z,
    };
    if (weight_type_is_quantized(down->type))
        push.down_block = (uint32_t)(weight_col_block_bytes(down->type, down->n_out) / 4);
    if (rounded) {
        push.q = vulkan_address(v, x->q, n * x->ld_q);
        push.d = vulkan_address(v, x->d, n * (x->ld_q / WEIGHT_BLOCK) * sizeof(*x->d));
    } else {
        push.x = vulkan_rows_address(v, x->f32, n, x->k, x->ld);
    }
    n_shares = MIN(MAX(UP_WORKGROUPS / n, UP_SHARES_MIN), UP_SHARES_MAX);
    n_panels = DIV_ROUND_UP(down->n_out, SPARSE_DOWN_WORDS * outputs_of_word(down->type));
    vulkan_dispatch(v, VULKAN_SPARSE_CUT, &push, sizeof(push), n, 1, 1);
    vulkan_dispatch(v, up_pipeline(up->type, rounded), &push, sizeof(push), n,
                    MIN(n_shares, DIV_ROUND_UP(ffn, (uint32_t)SPARSE_UP_NEURONS)), 1);
    vulkan_dispatch(v, down_pipeline(down->type), &push, sizeof(push), n, n_panels, 1);
    vulkan_work(v, (uint64_t)n * ffn / NEURONS_LEFT * (up->n_in + down->n_out));
}

void vulkan_use_sparse(struct backend_ops *ops)
{
    ops->sparse_ffn = vulkan_sparse_ffn;
}
