/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * device: what lies behind struct vulkan_device, and memory of it. For the files of this folder and
 * their tests.
 */

#include <sched.h>

#include "backends/vulkan/functions.h"
#include "backends/vulkan/pipelines.h"
#include "backends/vulkan/vulkan.h"

/* What the device can do beyond what is required. Features named here are enabled. */
struct vulkan_capabilities {
    uint32_t shared_bytes;    /* of a work group: at least 32768 */
    uint32_t max_invocations; /* in a work group: at least 256 */
    bool dot_8;               /* integer dot products (OpSDot and so on) */
};

enum vulkan_state {
    VULKAN_WELL,
    VULKAN_LOST, /* the driver said so: what it holds can be given back, nothing else works */
    VULKAN_HUNG, /* it may still be at work: what it holds must be left to it */
};

/* A buffer with memory of its own, and the address by which shaders find it. */
struct vulkan_block {
    VkBuffer buffer;
    VkDeviceMemory memory;
    VkDeviceAddress address;
    void *host; /* NULL: the host cannot see it */
    size_t bytes;
    bool is_cached; /* by the host; else reading it is slow */
};

struct vulkan_device {
    struct vulkan_functions vk;
    void *library;
    VkInstance instance;
    VkPhysicalDevice physical;
    VkPhysicalDeviceType type;
    VkPhysicalDeviceMemoryProperties memory;
    char name[VK_MAX_PHYSICAL_DEVICE_NAME_SIZE];
    char identity[2 * (2 * VK_UUID_SIZE + 4) + 1];
    struct vulkan_capabilities has;
    cpu_set_t cpus; /* where the caller might run when the device was found; n_cpus 0: not known */
    int n_cpus;
    bool has_node;
    unsigned node_major, node_minor;
    uint32_t api_version;
    uint32_t queue_family;
    const char *priority; /* extension by which a queue has one beside other processes', or NULL */
    uint32_t timestamp_bits; /* 0: the queue has no timestamps */
    double timestamp_nsec;   /* between two ticks */
    uint64_t max_piece;      /* bytes of one allocation and one buffer */
    size_t import_align;     /* 0: memory cannot be imported */
    bool copy_weights, imports_weights;
    uint64_t hang_usec;
    void *first_cache; /* as given; freed when opened */
    size_t first_cache_bytes;

    VkDevice device; /* NULL until opened */
    VkQueue queue;
    VkPipelineCache cache;
    VkPipelineLayout layout; /* one for all: 128 bytes of push constants */
    VkPipeline pipelines[VULKAN_N_PIPELINES];
    bool shares, has_tried[2]; /* by enum backend_memory: whether it can be imported */
    enum vulkan_state state;
    unsigned n_backends; /* that are there, or were left to a device that hangs */
    struct vulkan_block tried[2]; /* of a trial after which the device did not answer */
    struct vulkan_device *next_abandoned;
};

/* 0, -ENOMEM, -ENODEV, ... of vulkan_errno() */
int vulkan_device_pipeline(struct vulkan_device *d, enum vulkan_pipeline p, VkPipeline *ret);

enum vulkan_place {
    VULKAN_HOST,   /* host-visible and coherent, cached where there is such; content undefined */
    VULKAN_DEVICE, /* the device's own where it has any; the host may not see it */
    VULKAN_UPLOAD, /* the device's own, and host-visible: no device but an integrated one has much
                    */
};

/* All: 0 or what vulkan_errno() makes of the driver's answer; *ret is untouched on failure. */
int vulkan_block_new(struct vulkan_device *d, size_t bytes, enum vulkan_place place,
                     struct vulkan_block *ret);
/* p and bytes are multiples of d->import_align; the memory stays the caller's. */
int vulkan_block_import(struct vulkan_device *d, void *p, size_t bytes, struct vulkan_block *ret);
/* Nothing that is under way may use it: after a hang, nobody calls this. */
void vulkan_block_free(struct vulkan_device *d, struct vulkan_block *b);

/* try-import.c: whether the device can use memory of a memfd that is mapped, for reading alone or
 * for both. Where it cannot, d->state may be another afterwards. */
bool vulkan_try_import(struct vulkan_device *d, bool writable);
