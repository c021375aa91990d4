/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* K and V of new positions into their pages. */

#include <assert.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/checked.h"
#include "shaders/push-rows.h"

#define GROUP 64 /* of pipelines.h */

void vulkan_kv_store(struct backend *b, const struct kv_store_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    const struct kv_shape *s = &a->shape;
    uint32_t width = s->n_heads_kv * s->head_dim;
    struct kv_store_push push;

    assert(s->head_dim % 2 == 0); /* two halves share a word */
    if (!a->n)
        return;
    push = (struct kv_store_push){
        .k = vulkan_rows_address(v, a->k, a->n, width, a->ld),
        .v = vulkan_rows_address(v, a->v, a->n, width, a->ld),
        .rows = vulkan_kv_rows(v, a->rows, a->n, 1),
        .ld = (uint)a->ld,
        .n_heads_kv = s->n_heads_kv,
        .head_dim = s->head_dim,
    };
    vulkan_dispatch(v, s->f16 ? VULKAN_KV_STORE_F16 : VULKAN_KV_STORE_F32, &push, sizeof(push),
                    DIV_ROUND_UP(width / 2, GROUP), a->n, 1);
}
