/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/common/engine-args.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "base/cleanup.h"
#include "base/number.h"

#define MAX_THREADS 1024

/* One for all engines of the process, until it ends. */
static const char *device_name;
static struct vulkan_device *device;

static void free_device(void)
{
    device = vulkan_device_free(device);
}

static int find_device(struct error *err)
{
    int r;

    if (device)
        return 0;
    r = vulkan_device_find(&device, &(struct vulkan_options){.name = device_name}, err);
    if (r == 0)
        atexit(free_device);
    return r;
}

int parse_number(const char *name, const char *text, uint32_t low, uint32_t high, uint32_t *ret,
                 struct error *err)
{
    uint64_t n;

    if (number_parse(text, high, &n) < 0 || n < low)
        return error_set(err, EINVAL, "%s '%s': a number from %u to %u expected", name, text, low,
                         high);
    *ret = (uint32_t)n;
    return 0;
}

int engine_args_take(struct engine_options *o, int option, const char *value, struct error *err)
{
    static const char *const levels[] = {"reference", "avx2", "avx512", "amx"};
    int r;

    switch (option) {
    case ENGINE_ARG_ACTIVATIONS:
        if (strcmp(value, "f32") == 0)
            o->activations = o->gpu_activations = ACTIVATIONS_F32;
        else if (strcmp(value, "int8") == 0)
            o->activations = o->gpu_activations = ACTIVATIONS_INT8;
        else
            return error_set(err, EINVAL, "--activations '%s': f32 or int8 expected", value);
        return 1;
    case ENGINE_ARG_BACKEND:
        if (strcmp(value, "vulkan") == 0)
            o->home = LANE_GPU;
        else if (strcmp(value, "cpu") == 0)
            o->home = LANE_CPU;
        else
            return error_set(err, EINVAL, "--backend '%s': cpu or vulkan expected", value);
        return 1;
    case ENGINE_ARG_CPU_LEVEL:
        for (size_t i = 0; i < ARRAY_SIZE(levels); i++)
            if (strcmp(value, levels[i]) == 0) {
                o->cpu_level = levels[i];
                return 1;
            }
        return error_set(err, EINVAL, "--cpu-level '%s': reference, avx2, avx512 or amx expected",
                         value);
    case ENGINE_ARG_DEVICE:
        device_name = value;
        o->home = LANE_GPU;
        return 1;
    case ENGINE_ARG_KV:
        if (strcmp(value, "f16") == 0)
            o->kv_type = KV_F16;
        else if (strcmp(value, "f32") == 0)
            o->kv_type = KV_F32;
        else
            return error_set(err, EINVAL, "--kv '%s': f16 or f32 expected", value);
        return 1;
    case ENGINE_ARG_PIN_THREADS:
        o->no_pinning = strcmp(value, "no") == 0;
        if (!o->no_pinning && strcmp(value, "yes") != 0)
            return error_set(err, EINVAL, "--pin-threads '%s': yes or no expected", value);
        return 1;
    case ENGINE_ARG_THREADS:
        r = parse_number("--threads", value, 1, MAX_THREADS, &o->n_threads, err);
        return r < 0 ? r : 1;
    }
    return 0;
}

int make_engine(struct engine **ret, const struct model *m, const struct engine_options *options,
                struct error *err)
{
    CLEANUP(engine_freep) struct engine *e = NULL;
    struct engine_options o = *options;
    int r = o.home == LANE_GPU ? find_device(err) : 0;

    if (r == 0) {
        o.gpu = o.home == LANE_GPU ? device : NULL;
        r = engine_new(&e, m, &o, err);
    }
    if (r == 0 && o.gpu)
        r = engine_add_gpu(e, err);
    if (r == 0)
        *ret = TAKE_PTR(e);
    return r;
}

int open_engine(struct model **ret_model, struct engine **ret_engine, const char *path,
                const struct engine_options *options, struct error *err)
{
    CLEANUP(model_freep) struct model *m = NULL;
    struct error why = {""};
    int r;

    r = model_open(&m, path, &why);
    if (r == 0)
        r = make_engine(ret_engine, m, options, &why);
    if (r < 0)
        return error_set(err, -r, "%s", why.text[0] ? why.text : strerror(-r));
    *ret_model = TAKE_PTR(m);
    return 0;
}
