/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Operations on rows of activations that meet no matrix. */

#include "backends/vulkan/vulkan-backend.h"

#include <assert.h>

#include "base/checked.h"
#include "shaders/push-rows.h"

#define SOFTCAP_GROUP 64 /* pipelines.h */

static void softcap(struct backend *b, float *x, size_t n, float c)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct softcap_push push = {
        .x = vulkan_address(v, x, n * sizeof(*x)),
        .n = (uint32_t)n,
        .c = c,
    };

    assert(n <= (size_t)65535 * SOFTCAP_GROUP);
    vulkan_dispatch(v, VULKAN_SOFTCAP, &push, sizeof(push),
                    (uint32_t)DIV_ROUND_UP(n, (size_t)SOFTCAP_GROUP), 1, 1);
}

void vulkan_use_rows(struct backend_ops *ops)
{
    ops->softcap = softcap;
}
