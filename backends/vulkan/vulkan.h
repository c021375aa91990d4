/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * vulkan: a GPU as a backend. The loader (libvulkan.so.1) is opened at run time, so one binary runs
 * with and without; a build without the Vulkan headers has the same functions (stubs.c), which find
 * nothing.
 *
 * struct vulkan_device is the machine's side: instance, device, queue, pipelines. Any number of
 * backends may be made of one, one after another or side by side, all used by one thread. It must
 * outlive them.
 *
 * What is required: Vulkan 1.2 with buffer device addresses, a queue that computes, and work groups
 * of 256 with 32 KiB of shared memory. Everything else is used where it is there (vulkan-backend.h,
 * struct vulkan_capabilities).
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backends/backend.h"
#include "base/error.h"

struct vulkan_device;

struct vulkan_options {
    const char *name;   /* part of a device's name, in any case; NULL: the best that is hardware,
                           integrated before discrete. Software devices are used by name only */
    const void *cache;  /* what vulkan_device_cache() gave an earlier process, or NULL; */
    size_t cache_bytes; /* copied. Another device's or driver's is ignored */
    uint64_t hang_usec; /* after so long without getting on a device is taken for lost; 0: 10 s, or
                           10 minutes for a software device */
    bool copy_weights;  /* for tests: as if the driver could not import memory for weights */
};

/*
 * Loads loader and drivers, and chooses. No thread exists afterwards that was not there before, so
 * it can come before a sandbox. 0; -ENOSYS: a build without; -ENOENT: no loader, no driver, or no
 * such device (err names those that are there); -ENODEV: it lacks something (err says what);
 * -ENOMEM
 */
int vulkan_device_find(struct vulkan_device **ret, const struct vulkan_options *o,
                       struct error *err);

/*
 * Makes the logical device and its queue, and tries what memory it can share; may start threads of
 * the driver's. Nothing happens where it is open, but for one that was lost and has no backends any
 * more: that is made anew. Pipelines are made when they are first used. 0, -ENODEV, -ENOMEM
 */
int vulkan_device_open(struct vulkan_device *d, struct error *err);

/* Returns NULL. After a hang everything of the driver's is left as it is: it may still be used. */
struct vulkan_device *vulkan_device_free(struct vulkan_device *d);

static inline void vulkan_device_freep(struct vulkan_device **d)
{
    vulkan_device_free(*d);
}

const char *vulkan_device_name(const struct vulkan_device *d);
bool vulkan_device_is_software(const struct vulkan_device *d);
bool vulkan_device_is_integrated(const struct vulkan_device *d); /* shares the CPU's memory */

/* The number by which the kernel knows its render node (/dev/dri/renderD*); false: it has none, or
 * the driver does not say. */
bool vulkan_device_render_node(const struct vulkan_device *d, unsigned *ret_major,
                               unsigned *ret_minor);

/* Hex: device and driver UUID, driver version. Names caches of what was measured or compiled. */
const char *vulkan_device_identity(const struct vulkan_device *d);

/* After a failure: it has not answered, and is of no use for the life of the process. */
bool vulkan_device_hangs(const struct vulkan_device *d);

/* After open: whether a mapping of a memfd can be given to backend_map() as BACKEND_SHARED. */
bool vulkan_device_shares(const struct vulkan_device *d);

/* After open, by the thread that computes: the pipelines made so far, for the next process. *ret is
 * the caller's to free(). 0, -ENOMEM, -ENODEV */
int vulkan_device_cache(struct vulkan_device *d, void **ret, size_t *ret_bytes);

/*
 * A backend on the device, which is opened if need be. Its ops->name is "vulkan". backend_alloc()
 * gives host-visible coherent memory of the driver's. One pass is under way at a time: who issues
 * anything while one is waits for it. Passes are kept for the 32 keys used last.
 * 0, -ENODEV, -ENOMEM, -ENOSYS
 */
int backend_vulkan_new(struct backend **ret, struct vulkan_device *d,
                       const struct backend_limits *limits, struct error *err);

/* How long the device itself worked on what was waited for last; 0: not known. What is missing to
 * the time on the clock was spent waiting for the device, or for others who use it. */
uint64_t backend_vulkan_gpu_usec(const struct backend *b);
