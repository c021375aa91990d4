/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* The object itself: made of its parts, freed, and what went wrong put into words. */

#include "backends/vulkan/vulkan-backend.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/cleanup.h"

void vulkan_fail(struct vulkan_backend *v, int r, const char *where)
{
    struct vulkan_device *d = v->device;

    if (v->failure[0])
        return;
    switch (r) {
    case -ENODEV:
        d->state = VULKAN_LOST;
        snprintf(v->failure, sizeof(v->failure), "%.80s is lost: its driver gave it up", d->name);
        break;
    case -ETIMEDOUT:
        d->state = VULKAN_HUNG;
        snprintf(v->failure, sizeof(v->failure), "%.80s is taken for lost: no answer for %.3g s",
                 d->name, (double)d->hang_usec / 1e6);
        break;
    case -ENOMEM:
        snprintf(v->failure, sizeof(v->failure), "%.80s is out of memory (%s)", d->name, where);
        break;
    default: /* whatever it means, it is an error that the device does not get over */
        d->state = VULKAN_LOST;
        snprintf(v->failure, sizeof(v->failure), "%.80s refuses %s", d->name, where);
        break;
    }
}

static const char *failure(const struct backend *b)
{
    const struct vulkan_backend *v = (const struct vulkan_backend *)b;

    return v->failure[0] ? v->failure : NULL;
}

static bool hangs(const struct backend *b)
{
    return vulkan_device_hangs(((const struct vulkan_backend *)b)->device);
}

/* What a hung device may still use, so that a search for leaks sees that it is kept on purpose. */
static struct vulkan_backend *abandoned;

static void release_all(struct backend *b)
{
    struct vulkan_backend *v = vulkan_backend(b);

    v->in_pass = false;
    if (v->stage == STAGE_SUBMITTED)
        vulkan_settle(v);
    if (v->device->state == VULKAN_HUNG) {
        v->next_abandoned = abandoned;
        abandoned = v;
        return;
    }
    vulkan_passes_free(v);
    vulkan_block_free(v->device, &v->kv_pages);
    vulkan_memory_free(v);
    v->device->n_backends--;
    free(v);
}

static size_t scratch_bytes(const struct backend *b)
{
    const struct vulkan_backend *v = (const struct vulkan_backend *)b;
    size_t sum = v->kv_pages.bytes;

    for (size_t i = 0; i < v->n_scratch; i++)
        sum += v->scratch[i].bytes;
    return sum;
}

static uint32_t n_threads(const struct backend *b)
{
    (void)b;
    return 1;
}

static const struct backend_vtable vtable = {
    .alloc = vulkan_alloc,
    .release = vulkan_release,
    .map_limit = vulkan_map_limit,
    .map = vulkan_map,
    .unmap = vulkan_unmap,
    .begin = vulkan_begin,
    .end = vulkan_end,
    .submit = vulkan_submit,
    .wait = vulkan_wait,
    .failure = failure,
    .hangs = hangs,
    .free = release_all,
    .scratch_bytes = scratch_bytes,
    .n_threads = n_threads,
};

int backend_vulkan_new(struct backend **ret, struct vulkan_device *d,
                       const struct backend_limits *limits, struct error *err)
{
    CLEANUP(backend_freep) struct backend *b = NULL;
    struct vulkan_backend *v;
    int r;

    (void)limits; /* scratch memory is made when it is asked for */
    r = vulkan_device_open(d, err);
    if (r < 0)
        return r;
    if (d->state != VULKAN_WELL)
        return error_set(err, ENODEV, "%s was lost before", d->name);
    v = calloc(1, sizeof(*v));
    if (!v)
        return error_set(err, ENOMEM, "out of memory");
    b = &v->base;
    b->ops = &v->ops;
    b->vtable = &vtable;
    v->device = d;
    d->n_backends++;
    v->ops.name = "vulkan";
    vulkan_use_matmul(&v->ops);
    vulkan_use_rows(&v->ops);
    vulkan_use_attention(&v->ops);
    vulkan_use_sparse(&v->ops);
    r = vulkan_passes_new(v);
    if (r < 0)
        return error_set(err, r == -ENOMEM ? ENOMEM : ENODEV, "%s: %s", d->name,
                         r == -ENOMEM ? "out of memory" : "its driver refuses a command buffer");
    *ret = TAKE_PTR(b);
    return 0;
}

uint64_t backend_vulkan_gpu_usec(const struct backend *b)
{
    return ((const struct vulkan_backend *)b)->gpu_usec;
}
