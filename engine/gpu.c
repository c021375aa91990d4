/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <assert.h>
#include <errno.h>
#include <openssl/evp.h>
#include <stdio.h>

#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "engine/engine-internal.h"

/* What a device must have to spare at the least for the pool to lie in its memory. */
#define POOL_TRIAL ((size_t)4 << 20)

void gpu_prepare(struct engine *e)
{
    void *p;

    if (vulkan_device_open(e->gpu, NULL) < 0 || vulkan_device_shares(e->gpu))
        return;
    if (backend_vulkan_new(&e->pool_backend, e->gpu, &e->limits, NULL) < 0) {
        e->pool_backend = NULL;
        return;
    }
    /* Of a device that has no memory to give the pool must not hang: the CPU needs it as well. */
    p = backend_alloc(e->pool_backend, POOL_TRIAL);
    if (p)
        backend_release(e->pool_backend, p, POOL_TRIAL);
    else
        e->pool_backend = backend_free(e->pool_backend);
}

int gpu_identify(const struct engine *e, uint8_t ret[KV_IDENTITY])
{
    char text[512];
    int n = snprintf(text, sizeof(text), "%s %s", vulkan_device_identity(e->gpu),
                     activations_name(e->first_gpu_activations));

    _Static_assert(KV_IDENTITY == 32, "SHA-256");
    return EVP_Digest(text, MIN((size_t)n, sizeof(text) - 1), ret, NULL, EVP_sha256(), NULL) == 1
               ? 0
               : -ENOMEM;
}

const char *gpu_name(const struct engine *e)
{
    return vulkan_device_name(e->gpu);
}

void engine_set_gpu_activations(struct engine *e, enum activation_type a)
{
    assert(!e->lanes[LANE_GPU] && a != ACTIVATIONS_AUTO);
    e->gpu_activations = a;
}

enum activation_type engine_gpu_activations(const struct engine *e)
{
    return e->gpu_activations;
}

int engine_add_gpu(struct engine *e, struct error *err)
{
    struct backend *b = e->pool_backend;
    int r;

    if (e->lanes[LANE_GPU])
        return error_set(err, EALREADY, "the engine has a GPU already");
    if (!e->gpu)
        return error_set(err, ENOENT, "the engine was made without a GPU");
    if (!b) {
        r = backend_vulkan_new(&b, e->gpu, &e->limits, err);
        if (r < 0)
            return r;
    }
    return engine_add_lane(e, b, err);
}

bool engine_may_add_gpu(const struct engine *e)
{
    return e->gpu && !vulkan_device_hangs(e->gpu) &&
           !(e->pool_backend && backend_failure(e->pool_backend));
}
