/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Attention: a workgroup for each row and group of query heads that share a KV head. Where these
 * are too few to fill a device, as when one session decodes, each part of a row's pages has one,
 * and a second dispatch adds the parts up; the bits are the same (attention.comp).
 */

#include <assert.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/checked.h"
#include "shaders/push-attention.h"

/* Workgroups of whole rows from which on these will do. */
#define ENOUGH 33

/* Where no window says how many positions a row sees: so many, about. */
#define POSITIONS 4096

/* Up to so many values of a head the shader needs less shared memory and fewer registers. */
#define SMALL_DIM 256

static_assert(BACKEND_MAX_HEAD_DIM == 1024 && KV_PAGE == 64, "as in attention.comp");

struct attention_pipelines {
    enum vulkan_pipeline whole[2], part[2], merge; /* pages of f32, f16 */
};

static const struct attention_pipelines small = {
    {VULKAN_ATTENTION_F32_256, VULKAN_ATTENTION_F16_256},
    {VULKAN_ATTENTION_PART_F32_256, VULKAN_ATTENTION_PART_F16_256},
    VULKAN_ATTENTION_MERGE_256,
};

static const struct attention_pipelines large = {
    {VULKAN_ATTENTION_F32_1024, VULKAN_ATTENTION_F16_1024},
    {VULKAN_ATTENTION_PART_F32_1024, VULKAN_ATTENTION_PART_F16_1024},
    VULKAN_ATTENTION_MERGE_1024,
};

/* Of how many parts a row sees a page at most. */
static uint32_t parts_seen(uint32_t window)
{
    uint64_t pages = DIV_ROUND_UP((uint64_t)window + KV_PAGE - 1, KV_PAGE);

    return window && pages < ATTENTION_PARTS ? (uint32_t)pages : ATTENTION_PARTS;
}

static void vulkan_attention(struct backend *b, const struct attention_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    bool is_small = a->shape.head_dim <= SMALL_DIM;
    const struct attention_pipelines *p = is_small ? &small : &large;
    uint32_t n_kv = a->shape.n_heads_kv, n_groups, n_workgroups;
    size_t row_floats = (size_t)a->n_heads * a->shape.head_dim;
    struct attention_push push;

    assert(a->shape.head_dim <= BACKEND_MAX_HEAD_DIM && a->shape.head_dim % 2 == 0);
    assert(n_kv > 0 && a->n_heads >= n_kv);
    if (a->n == 0)
        return;
    n_groups = DIV_ROUND_UP(DIV_ROUND_UP(a->n_heads, n_kv), (uint32_t)ATTENTION_HEADS);
    n_workgroups = a->n * n_kv * n_groups;
    push = (struct attention_push){
        .rows = vulkan_kv_rows(v, a->rows, a->n, a->window),
        .q = vulkan_rows_address(v, a->q, a->n, row_floats, a->ld),
        .y = vulkan_rows_address(v, a->out, a->n, row_floats, a->ld),
        .ld = (uint32_t)a->ld,
        .n_heads = a->n_heads,
        .n_heads_kv = n_kv,
        .head_dim = a->shape.head_dim,
        .window = a->window,
        .n_groups = n_groups,
    };
    if (n_workgroups >= ENOUGH) {
        vulkan_dispatch(v, p->whole[a->shape.f16], &push, sizeof(push), n_workgroups, 1, 1);
        vulkan_work(v, 2 * a->n * row_floats * (a->window ? a->window : POSITIONS));
        return;
    }
    push.parts = vulkan_scratch(v, (size_t)n_workgroups * ATTENTION_PARTS * sizeof(float) *
                                       ATTENTION_PART_FLOATS(is_small ? 1 : 2));
    vulkan_dispatch(v, p->part[a->shape.f16], &push, sizeof(push), n_workgroups,
                    parts_seen(a->window), 1);
    vulkan_dispatch(v, p->merge, &push, sizeof(push), n_workgroups, 1, 1);
}

void vulkan_use_attention(struct backend_ops *ops)
{
    ops->attention = vulkan_attention;
}
