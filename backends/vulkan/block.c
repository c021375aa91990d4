/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Memory of the device's: a buffer each, whole, with an address for shaders. */

#include "backends/vulkan/device.h"

#include <errno.h>

#include "base/checked.h"

#define USAGE                                                                \
    (VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT | \
     VK_BUFFER_USAGE_TRANSFER_DST_BIT | VK_BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT)

/* What is known here; others need features that are not enabled, or are slow on purpose. */
#define KNOWN_FLAGS                                                              \
    (VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT | VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | \
     VK_MEMORY_PROPERTY_HOST_COHERENT_BIT | VK_MEMORY_PROPERTY_HOST_CACHED_BIT)

#define HOST_FLAGS (VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT)

/* 0: of no use for this; else higher is better. */
static int fitness(VkMemoryPropertyFlags flags, enum vulkan_place place)
{
    bool cached = flags & VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
    bool local = flags & VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;

    if (flags & ~(VkMemoryPropertyFlags)KNOWN_FLAGS)
        return 0;
    if (place == VULKAN_DEVICE)
        return local ? 2 : 1;
    if ((flags & HOST_FLAGS) != HOST_FLAGS || (place == VULKAN_UPLOAD && !local))
        return 0;
    return place == VULKAN_HOST ? 1 + 2 * cached + local : 1 + cached;
}

/*
 * Memory for b->buffer of one of the types in `bits`, the fittest first: one with little of it left
 * (the part of a discrete GPU's memory that the host sees) gives way to the next. `next` is
 * chained.
 */
static int allocate(struct vulkan_device *d, struct vulkan_block *b, VkDeviceSize size,
                    uint32_t bits, enum vulkan_place place, const void *next)
{
    VkMemoryAllocateFlagsInfo flags = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_FLAGS_INFO,
        .pNext = next,
        .flags = VK_MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT,
    };
    VkMemoryAllocateInfo info = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO,
        .pNext = &flags,
        .allocationSize = size,
    };
    int r = -EOPNOTSUPP;

    for (int wanted = 4; wanted > 0; wanted--) {
        for (uint32_t i = 0; i < d->memory.memoryTypeCount; i++) {
            if (!(bits >> i & 1) ||
                fitness(d->memory.memoryTypes[i].propertyFlags, place) != wanted)
                continue;
            info.memoryTypeIndex = i;
            r = vulkan_errno(d->vk.AllocateMemory(d->device, &info, NULL, &b->memory));
            if (r == 0) {
                b->is_cached =
                    d->memory.memoryTypes[i].propertyFlags & VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
                return 0;
            }
            b->memory = VK_NULL_HANDLE;
            if (r != -ENOMEM)
                return r;
        }
    }
    return r;
}

static int create_buffer(struct vulkan_device *d, size_t bytes, const void *next, VkBuffer *ret)
{
    VkBufferCreateInfo info = {
        .sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO,
        .pNext = next,
        .size = bytes,
        .usage = USAGE,
    };
    VkBuffer buffer;
    int r = vulkan_errno(d->vk.CreateBuffer(d->device, &info, NULL, &buffer));

    if (r == 0)
        *ret = buffer;
    return r;
}

static int bind(struct vulkan_device *d, struct vulkan_block *b)
{
    VkBufferDeviceAddressInfo info = {.sType = VK_STRUCTURE_TYPE_BUFFER_DEVICE_ADDRESS_INFO,
                                      .buffer = b->buffer};
    int r = vulkan_errno(d->vk.BindBufferMemory(d->device, b->buffer, b->memory, 0));

    if (r < 0)
        return r;
    b->address = d->vk.GetBufferDeviceAddress(d->device, &info);
    return 0;
}

int vulkan_block_new(struct vulkan_device *d, size_t bytes, enum vulkan_place place,
                     struct vulkan_block *ret)
{
    struct vulkan_block b = {.bytes = bytes};
    VkMemoryRequirements needs;
    int r;

    if (bytes > d->max_piece)
        return -ENOMEM;
    r = create_buffer(d, bytes, NULL, &b.buffer);
    if (r < 0)
        return r;
    d->vk.GetBufferMemoryRequirements(d->device, b.buffer, &needs);
    r = allocate(d, &b, needs.size, needs.memoryTypeBits, place, NULL);
    if (r == 0)
        r = bind(d, &b);
    if (r == 0 && place != VULKAN_DEVICE)
        r = vulkan_errno(d->vk.MapMemory(d->device, b.memory, 0, VK_WHOLE_SIZE, 0, &b.host));
    if (r < 0) {
        vulkan_block_free(d, &b);
        return r;
    }
    *ret = b;
    return 0;
}

int vulkan_block_import(struct vulkan_device *d, void *p, size_t bytes, struct vulkan_block *ret)
{
    VkExternalMemoryBufferCreateInfo external = {
        .sType = VK_STRUCTURE_TYPE_EXTERNAL_MEMORY_BUFFER_CREATE_INFO,
        .handleTypes = VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT,
    };
    VkImportMemoryHostPointerInfoEXT import = {
        .sType = VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT,
        .handleType = VK_EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT,
        .pHostPointer = p,
    };
    VkMemoryHostPointerPropertiesEXT types = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_HOST_POINTER_PROPERTIES_EXT};
    struct vulkan_block b = {.bytes = bytes};
    VkMemoryRequirements needs;
    int r;

    if (d->import_align == 0)
        return -EOPNOTSUPP;
    r = vulkan_errno(
        d->vk.GetMemoryHostPointerPropertiesEXT(d->device, import.handleType, p, &types));
    if (r < 0)
        return r;
    r = create_buffer(d, bytes, &external, &b.buffer);
    if (r < 0)
        return r;
    d->vk.GetBufferMemoryRequirements(d->device, b.buffer, &needs);
    if (needs.size > bytes)
        r = -EOPNOTSUPP; /* the driver wants more behind a buffer than there is */
    else
        r = allocate(d, &b, bytes, needs.memoryTypeBits & types.memoryTypeBits, VULKAN_HOST,
                     &import);
    if (r == 0)
        r = bind(d, &b);
    if (r < 0) {
        vulkan_block_free(d, &b);
        return r;
    }
    b.host = p;
    *ret = b;
    return 0;
}

void vulkan_block_free(struct vulkan_device *d, struct vulkan_block *b)
{
    if (b->buffer)
        d->vk.DestroyBuffer(d->device, b->buffer, NULL);
    if (b->memory)
        d->vk.FreeMemory(d->device, b->memory, NULL);
    *b = (struct vulkan_block){};
}
