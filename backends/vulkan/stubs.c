/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* What a build without Vulkan has in place of the backend: nobody else needs to know. */

#include "backends/vulkan/vulkan.h"

#include <errno.h>

#define ABSENT "this build has no Vulkan backend; build llmd with -Dvulkan=enabled for one"

int vulkan_device_find(struct vulkan_device **ret, const struct vulkan_options *o,
                       struct error *err)
{
    (void)ret;
    (void)o;
    return error_set(err, ENOSYS, ABSENT);
}

int vulkan_device_open(struct vulkan_device *d, struct error *err)
{
    (void)d;
    return error_set(err, ENOSYS, ABSENT);
}

struct vulkan_device *vulkan_device_free(struct vulkan_device *d)
{
    (void)d;
    return NULL;
}

const char *vulkan_device_name(const struct vulkan_device *d)
{
    (void)d;
    return "none";
}

bool vulkan_device_is_software(const struct vulkan_device *d)
{
    (void)d;
    return false;
}

bool vulkan_device_is_integrated(const struct vulkan_device *d)
{
    (void)d;
    return false;
}

bool vulkan_device_render_node(const struct vulkan_device *d, unsigned *ret_major,
                               unsigned *ret_minor)
{
    (void)d;
    (void)ret_major;
    (void)ret_minor;
    return false;
}

const char *vulkan_device_identity(const struct vulkan_device *d)
{
    (void)d;
    return "";
}

bool vulkan_device_hangs(const struct vulkan_device *d)
{
    (void)d;
    return false;
}

bool vulkan_device_shares(const struct vulkan_device *d)
{
    (void)d;
    return false;
}

int vulkan_device_cache(struct vulkan_device *d, void **ret, size_t *ret_bytes)
{
    (void)d;
    (void)ret;
    (void)ret_bytes;
    return -ENOSYS;
}

int backend_vulkan_new(struct backend **ret, struct vulkan_device *d,
                       const struct backend_limits *limits, struct error *err)
{
    (void)ret;
    (void)d;
    (void)limits;
    return error_set(err, ENOSYS, ABSENT);
}

uint64_t backend_vulkan_gpu_usec(const struct backend *b)
{
    (void)b;
    return 0;
}
