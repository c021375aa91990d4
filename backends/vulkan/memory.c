/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Which memory the device sees, and where: a table of pieces by host address. Most are the host's
 * own memory, seen by both; where the driver cannot import it, weights are copied once.
 */

#include "backends/vulkan/vulkan-backend.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"

#define PAGE 4096

/* Of weights on their way to memory that the host does not see. */
#define STAGING ((size_t)4 << 20)

/* Drivers that import more at once have not been seen, and offsets in shaders are 32 bits. */
#define MAX_PIECE ((uint64_t)2 << 30)

struct vulkan_region {
    uintptr_t start; /* as operations name it */
    size_t bytes;
    VkDeviceAddress address; /* of start */
    struct vulkan_block block;
};

/* The first region that starts above p. */
static size_t upper(const struct vulkan_backend *v, uintptr_t p)
{
    size_t low = 0, high = v->n_regions;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (v->regions[middle].start <= p)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Makes room in the table, so that insert() cannot fail. */
static int reserve(struct vulkan_backend *v)
{
    size_t max = v->max_regions ? 2 * v->max_regions : 64;
    struct vulkan_region *more;

    if (v->n_regions < v->max_regions)
        return 0;
    more = reallocarray(v->regions, max, sizeof(*more));
    if (!more)
        return -ENOMEM;
    v->regions = more;
    v->max_regions = max;
    return 0;
}

static void insert(struct vulkan_backend *v, const struct vulkan_region *region)
{
    size_t i = upper(v, region->start);

    memmove(&v->regions[i + 1], &v->regions[i], (v->n_regions - i) * sizeof(*v->regions));
    v->regions[i] = *region;
    v->n_regions++;
    v->last_region = 0;
}

static bool holds(const struct vulkan_region *r, uintptr_t p, size_t bytes)
{
    return p >= r->start && !range_outside(p - r->start, bytes, r->bytes);
}

struct address vulkan_address(struct vulkan_backend *v, const void *p, size_t bytes)
{
    uintptr_t a = (uintptr_t)p;
    size_t i = v->last_region;

    if (!p)
        return (struct address){};
    if (i >= v->n_regions || !holds(&v->regions[i], a, bytes)) {
        /* Pieces may overlap, those that a caller mapped twice: then any before may hold it. */
        for (i = upper(v, a); i > 0 && !holds(&v->regions[i - 1], a, bytes); i--)
            ;
        assert(i > 0 && "memory that the device was never told of");
        if (i == 0)
            return (struct address){};
        v->last_region = --i;
    }

    uint64_t address = v->regions[i].address + (a - v->regions[i].start);

    return (struct address){(uint32_t)address, (uint32_t)(address >> 32)};
}

/*
 * Drivers mostly give fresh memory, which is zero. That is looked at rather than written, so that
 * memory of which little is used costs little; where the host has no cache for it, reading is what
 * would be slow.
 */
static void clear(const struct vulkan_block *b)
{
    static const char zero[PAGE];

    if (!b->is_cached) {
        memset(b->host, 0, b->bytes);
        return;
    }
    for (size_t i = 0; i < b->bytes; i += PAGE) {
        size_t n = MIN(b->bytes - i, (size_t)PAGE);

        if (memcmp((char *)b->host + i, zero, n) != 0)
            memset((char *)b->host + i, 0, n);
    }
}

void *vulkan_alloc(struct backend *backend, size_t bytes)
{
    struct vulkan_backend *v = vulkan_backend(backend);
    struct vulkan_region region = {.bytes = MAX(bytes, (size_t)1)};
    size_t all;

    /* What drivers map is aligned to 64 at least, mostly to a page. */
    if (v->failure[0] || ckd_add(&all, region.bytes, PAGE) || reserve(v) < 0 ||
        vulkan_block_new(v->device, all, VULKAN_HOST, &region.block) < 0)
        return NULL;
    clear(&region.block);
    region.start = ALIGN_UP((uintptr_t)region.block.host, (uintptr_t)PAGE);
    region.address = region.block.address + (region.start - (uintptr_t)region.block.host);
    insert(v, &region);
    return (void *)region.start;
}

void vulkan_unmap(struct backend *backend, const void *p)
{
    struct vulkan_backend *v = vulkan_backend(backend);
    size_t i = upper(v, (uintptr_t)p);

    assert(i > 0 && v->regions[i - 1].start == (uintptr_t)p);
    i--;
    if (v->device->state == VULKAN_HUNG)
        return; /* it may still be written to */
    vulkan_block_free(v->device, &v->regions[i].block);
    v->n_regions--;
    memmove(&v->regions[i], &v->regions[i + 1], (v->n_regions - i) * sizeof(*v->regions));
    v->last_region = 0;
}

void vulkan_release(struct backend *backend, void *p, size_t bytes)
{
    (void)bytes;
    vulkan_settle(vulkan_backend(backend)); /* a failure is told by whoever asks for results */
    vulkan_unmap(backend, p);
}

size_t vulkan_map_limit(const struct backend *backend)
{
    const struct vulkan_device *d = ((const struct vulkan_backend *)backend)->device;
    uint64_t align = MAX(d->import_align, (size_t)PAGE);

    /* What lies around p up to the driver's alignment comes with it, and buffers end below 4 GiB */
    return (size_t)((MIN(d->max_piece, MAX_PIECE) & ~(align - 1)) - 2 * align);
}

static int import(struct vulkan_backend *v, struct vulkan_region *region)
{
    uintptr_t align = v->device->import_align;
    uintptr_t start = region->start & ~(align - 1);
    size_t bytes = ALIGN_UP(region->start + region->bytes, align) - start;
    int r = vulkan_block_import(v->device, (void *)start, bytes, &region->block);

    if (r < 0)
        return r;
    region->address = region->block.address + (region->start - start);
    return 0;
}

/* Through a small buffer, piece by piece: what comes from a file is never there twice as a whole.
 */
static int upload(struct vulkan_backend *v, struct vulkan_region *region, size_t lead)
{
    struct vulkan_block staging;
    int r = vulkan_block_new(v->device, MIN(STAGING, region->bytes), VULKAN_HOST, &staging);

    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < region->bytes; i += STAGING) {
        size_t n = MIN(STAGING, region->bytes - i);

        memcpy(staging.host, (const char *)region->start + i, n);
        r = vulkan_copy(v, &staging, &region->block, lead + i, n);
    }
    if (v->device->state != VULKAN_HUNG) /* else left to it, on purpose */
        vulkan_block_free(v->device, &staging);
    return r;
}

static int copy(struct vulkan_backend *v, struct vulkan_region *region)
{
    bool shared = vulkan_device_is_integrated(v->device);
    /* Shaders read 16 bytes at once where the host's address is aligned to that. */
    size_t lead = region->start % WEIGHT_ALIGN;
    size_t bytes = ALIGN_UP(lead + region->bytes, (size_t)4);
    int r = -EOPNOTSUPP;

    if (shared)
        r = vulkan_block_new(v->device, bytes, VULKAN_UPLOAD, &region->block);
    if (r == 0) {
        memcpy((char *)region->block.host + lead, (const void *)region->start, region->bytes);
    } else {
        r = vulkan_block_new(v->device, bytes, VULKAN_DEVICE, &region->block);
        if (r < 0)
            return r;
        r = upload(v, region, lead);
        if (r < 0) {
            if (v->device->state != VULKAN_HUNG)
                vulkan_block_free(v->device, &region->block);
            return r;
        }
    }
    region->address = region->block.address + lead;
    return 0;
}

int vulkan_map(struct backend *backend, const void *p, size_t bytes, enum backend_memory kind)
{
    struct vulkan_backend *v = vulkan_backend(backend);
    struct vulkan_region region = {.start = (uintptr_t)p, .bytes = bytes};
    bool copied = kind == BACKEND_WEIGHTS && !v->device->imports_weights;
    int r;

    if (bytes == 0)
        return 0;
    if (bytes > vulkan_map_limit(backend))
        return -E2BIG;
    if (vulkan_settle(v) < 0)
        return -ENODEV;
    r = reserve(v);
    if (r == 0)
        r = copied ? -EOPNOTSUPP : import(v, &region);
    if (r < 0 && r != -ENODEV && kind == BACKEND_WEIGHTS)
        r = copy(v, &region);
    if (r == 0)
        insert(v, &region);
    else if (r == -EIO)
        r = -EOPNOTSUPP;
    return r;
}

struct address vulkan_scratch(struct vulkan_backend *v, size_t bytes)
{
    struct vulkan_block *more;
    size_t have = v->n_scratch ? v->scratch[v->n_scratch - 1].bytes : 0;
    int r = 0;

    /* Before anything fails: what is under way has to be waited for first. */
    if (vulkan_is_recording(v) && bytes > have) {
        /* Passes that are kept go on using what they were recorded with. */
        more = reallocarray(v->scratch, v->n_scratch + 1, sizeof(*more));
        if (more)
            v->scratch = more;
        r = more ? vulkan_block_new(v->device, MAX(bytes, 2 * have), VULKAN_DEVICE,
                                    &v->scratch[v->n_scratch])
                 : -ENOMEM;
        if (r == 0)
            v->n_scratch++;
        else
            vulkan_fail(v, r, "memory for an operation");
    }
    if (v->failure[0])
        return (struct address){};

    VkDeviceAddress a = v->scratch[v->n_scratch - 1].address;

    return (struct address){(uint32_t)a, (uint32_t)(a >> 32)};
}

void vulkan_memory_free(struct vulkan_backend *v)
{
    for (size_t i = 0; i < v->n_scratch; i++)
        vulkan_block_free(v->device, &v->scratch[i]);
    for (size_t i = 0; i < v->n_regions; i++)
        vulkan_block_free(v->device, &v->regions[i].block);
    free(v->scratch);
    free(v->regions);
}
