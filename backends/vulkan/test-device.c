/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The core of the Vulkan backend: devices, memory, passes and their ends. The device is lavapipe,
 * a software driver, which every machine with mesa has; 77 without.
 */

#undef NDEBUG

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/cleanup.h"

static const struct backend_limits limits = {.max_rows = 8, .max_width = 1024, .max_heads = 4};

static struct vulkan_device *find_device(const struct vulkan_options *o)
{
    struct vulkan_options named = *o;
    struct vulkan_device *d;
    struct error err = {};
    int r;

    named.name = "llvmpipe";
    r = vulkan_device_find(&d, &named, &err);
    if (r == -ENOENT || r == -ENOSYS) {
        fprintf(stderr, "skipped: %s\n", err.text);
        exit(77);
    }
    assert(r == 0);
    return d;
}

static struct backend *new_backend(struct vulkan_device *d)
{
    struct backend *b;
    struct error err = {};

    assert(backend_vulkan_new(&b, d, &limits, &err) == 0);
    return b;
}

static void test_dispatch(void)
{
    CLEANUP(vulkan_device_freep)
    struct vulkan_device *d = find_device(&(struct vulkan_options){});
    CLEANUP(backend_freep) struct backend *b = new_backend(d);
    float *x = backend_alloc(b, 1000 * sizeof(*x));

    assert(x && (uintptr_t)x % 4096 == 0);
    for (int i = 0; i < 1000; i++) {
        assert(x[i] == 0);
        x[i] = (float)(i - 500);
    }
    b->ops->softcap(b, x, 999, 30);
    assert(backend_finish(b) == 0);
    for (int i = 0; i < 999; i++)
        assert(fabs((double)x[i] - 30 * tanh((i - 500) / 30.0)) <= 30 * 0x1p-21);
    assert(x[999] == 499);
    assert(backend_vulkan_gpu_usec(b) > 0);
    backend_release(b, x, 1000 * sizeof(*x));
}

int main(void)
{
    test_dispatch();
    return 0;
}
