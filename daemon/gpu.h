/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * gpu: the device that computes beside the processor, as the service has it: looked for before the
 * sandbox, what its driver needs of that, and the file in which compiled shaders are kept for the
 * next process. That there is none costs speed, never service; the log says why. Nor does a driver
 * that crashes while it computes, but for a while: the third time it is left alone for a day.
 */

#include "base/error.h"
#include "daemon/service.h"
#include "engine/placement.h"

struct gpu;
struct sandbox;
struct vulkan_device;

struct gpu_options {
    enum placement_mode mode;
    const char *device; /* part of its name; NULL: the best that is hardware */
    enum service_scope scope;
    const char *cache_folder; /* made when there is a device; NULL: nothing is kept */
    unsigned patience_msec;   /* with a driver that does not answer; 0: 20 s */
};

/*
 * Looks for it. Called by the one thread there is, which is the only one afterwards as well. From
 * then on the environment is as drivers are to find it. The cache's folder stays the caller's until
 * gpu_free(). 0: *ret, which may have no device, and that was logged; NULL: nobody asked for one;
 * -errno: threads are there that no sandbox would reach, or there is no memory
 */
int gpu_find(struct gpu **ret, const struct gpu_options *options, struct error *err);

/* Who uses the device must be gone. NULL is one without, here and below. */
struct gpu *gpu_free(struct gpu *g);

/* NULL: there is none. */
struct vulkan_device *gpu_device(const struct gpu *g);

/* Why there is none, one line for people; NULL: there is one, or nobody asked. */
const char *gpu_failure(const struct gpu *g);

/* What the driver opens and calls when the device is opened and used. 0, -ENOMEM */
int gpu_allow(const struct gpu *g, struct sandbox *b);

/*
 * Keeps what was compiled since the last time, if anything. By the thread that computes, or when
 * there is none; a failure is logged, once.
 */
void gpu_save_cache(struct gpu *g);

/* It has worked, and all is well. By the thread that computes. */
void gpu_rests(struct gpu *g);
