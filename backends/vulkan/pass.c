/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Recording, replaying and waiting. At most one pass exists that was issued and not waited for: its
 * commands are being recorded, or ready, or under way. Whoever begins another first waits for it,
 * so tables and scratch memory need to be there once.
 */

#include "backends/vulkan/vulkan-backend.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "base/checked.h"
#include "base/clock.h"

static void pass_free(struct vulkan_backend *v, struct vulkan_pass *p)
{
    if (!p)
        return;
    vulkan_kv_free(v, &p->kv);
    if (p->commands)
        v->device->vk.FreeCommandBuffers(v->device->device, v->pool, 1, &p->commands);
    free(p);
}

static int pass_new(struct vulkan_backend *v, struct vulkan_pass **ret)
{
    VkCommandBufferAllocateInfo info = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
        .commandPool = v->pool,
        .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
        .commandBufferCount = 1,
    };
    struct vulkan_pass *p = calloc(1, sizeof(*p));
    int r;

    if (!p)
        return -ENOMEM;
    r = vulkan_errno(v->device->vk.AllocateCommandBuffers(v->device->device, &info, &p->commands));
    if (r < 0) {
        free(p);
        return r;
    }
    *ret = p;
    return 0;
}

int vulkan_passes_new(struct vulkan_backend *v)
{
    struct vulkan_device *d = v->device;
    VkCommandPoolCreateInfo pool = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
        .flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT,
        .queueFamilyIndex = d->queue_family,
    };
    VkSemaphoreTypeCreateInfo type = {
        .sType = VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO,
        .semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE,
    };
    VkSemaphoreCreateInfo semaphore = {
        .sType = VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO,
        .pNext = &type,
    };
    VkQueryPoolCreateInfo queries = {
        .sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO,
        .queryType = VK_QUERY_TYPE_TIMESTAMP,
        .queryCount = 2,
    };
    int r = vulkan_errno(d->vk.CreateCommandPool(d->device, &pool, NULL, &v->pool));

    if (r == 0)
        r = vulkan_errno(d->vk.CreateSemaphore(d->device, &semaphore, NULL, &v->done));
    if (r == 0 && d->timestamp_bits)
        r = vulkan_errno(d->vk.CreateQueryPool(d->device, &queries, NULL, &v->queries));
    if (r == 0)
        r = pass_new(v, &v->loose);
    return r;
}

void vulkan_passes_free(struct vulkan_backend *v)
{
    struct vulkan_device *d = v->device;

    for (int i = 0; i < VULKAN_PASSES; i++)
        pass_free(v, v->passes[i]);
    pass_free(v, v->loose);
    if (v->queries)
        d->vk.DestroyQueryPool(d->device, v->queries, NULL);
    if (v->done)
        d->vk.DestroySemaphore(d->device, v->done, NULL);
    if (v->pool)
        d->vk.DestroyCommandPool(d->device, v->pool, NULL);
}

/* ---- recording ---- */

static void barrier(struct vulkan_backend *v, VkPipelineStageFlags from, VkAccessFlags written,
                    VkPipelineStageFlags to, VkAccessFlags read)
{
    VkMemoryBarrier b = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
        .srcAccessMask = written,
        .dstAccessMask = read,
    };

    v->device->vk.CmdPipelineBarrier(v->current->commands, from, to, 0, 1, &b, 0, NULL, 0, NULL);
}

/* Commands from now on go to p. On failure nothing is current. */
static int record(struct vulkan_backend *v, struct vulkan_pass *p, bool once)
{
    VkCommandBufferBeginInfo info = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
        .flags = once ? VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT : 0,
    };
    int r = vulkan_errno(v->device->vk.BeginCommandBuffer(p->commands, &info));

    if (r < 0)
        return r;
    p->is_complete = false;
    vulkan_kv_clear(v, &p->kv);
    v->kv_pages_used = 0;
    v->current = p;
    v->stage = STAGE_RECORDING;
    v->bound = VULKAN_N_PIPELINES;
    v->since = (struct vulkan_accesses){.is_unknown = true}; /* what was before, and the host's */
    if (v->queries) {
        v->device->vk.CmdResetQueryPool(p->commands, v->queries, 0, 2);
        v->device->vk.CmdWriteTimestamp(p->commands, VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, v->queries,
                                        0);
    }
    return 0;
}

/* What the host reads afterwards is made visible to it. */
static int stop_recording(struct vulkan_backend *v)
{
    int r;

    barrier(v, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
            VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT, VK_PIPELINE_STAGE_HOST_BIT,
            VK_ACCESS_HOST_READ_BIT | VK_ACCESS_HOST_WRITE_BIT);
    if (v->queries)
        v->device->vk.CmdWriteTimestamp(v->current->commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT,
                                        v->queries, 1);
    r = vulkan_errno(v->device->vk.EndCommandBuffer(v->current->commands));
    if (r < 0)
        return r;
    v->stage = STAGE_READY;
    return 0;
}

bool vulkan_is_recording(struct vulkan_backend *v)
{
    int r;

    if (v->failure[0] == '\0' && !v->in_pass && v->stage != STAGE_RECORDING &&
        vulkan_settle(v) == 0) {
        r = record(v, v->loose, true);
        if (r < 0)
            vulkan_fail(v, r, "recording");
    }
    return v->failure[0] == '\0';
}

void vulkan_dispatch(struct vulkan_backend *v, enum vulkan_pipeline p, const void *push,
                     size_t push_bytes, uint32_t x, uint32_t y, uint32_t z)
{
    const struct vulkan_functions *vk = &v->device->vk;
    VkPipeline pipeline;
    int r;

    assert(push_bytes <= 128 && push_bytes % 4 == 0);
    assert(x <= 65535 && y <= 65535 && z <= 65535);
    if (x == 0 || y == 0 || z == 0 || !vulkan_is_recording(v)) {
        v->next = (struct vulkan_accesses){};
        return;
    }
    r = vulkan_device_pipeline(v->device, p, &pipeline);
    if (r < 0) {
        vulkan_fail(v, r, "a pipeline");
        return;
    }
    if (vulkan_must_wait(v))
        barrier(v, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
                VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
                VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT,
                VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT);
    if (p != v->bound)
        vk->CmdBindPipeline(v->current->commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
    v->bound = p;
    vk->CmdPushConstants(v->current->commands, v->device->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0,
                         (uint32_t)push_bytes, push);
    vk->CmdDispatch(v->current->commands, x, y, z);
}

/* ---- passes that are kept ---- */

/* The pass of this key, or a place for it: a free one, else that of the pass used longest ago. */
static struct vulkan_pass **find(struct vulkan_backend *v, uint64_t key)
{
    struct vulkan_pass **place = NULL;

    for (int i = 0; i < VULKAN_PASSES; i++) {
        struct vulkan_pass **p = &v->passes[i];

        if (*p && (*p)->key == key)
            return p;
        if (!place || (*place && (!*p || (*p)->last_used < (*place)->last_used)))
            place = p;
    }
    return place;
}

bool vulkan_begin(struct backend *b, uint64_t key)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct vulkan_pass **place;
    int r;

    assert(!v->in_pass);
    r = vulkan_settle(v);
    v->in_pass = true;
    if (r < 0)
        return true;
    place = find(v, key);
    if (*place && (*place)->key == key && (*place)->is_complete) {
        (*place)->last_used = ++v->n_begun;
        v->current = *place;
        v->stage = STAGE_READY;
        v->in_pass = false;
        vulkan_kv_refresh(v, &v->current->kv);
        return false;
    }
    if (!*place)
        r = pass_new(v, place);
    if (r == 0) {
        (*place)->key = key;
        (*place)->last_used = ++v->n_begun;
        r = record(v, *place, false);
    }
    if (r < 0)
        vulkan_fail(v, r, "recording");
    return true;
}

void vulkan_end(struct backend *b)
{
    struct vulkan_backend *v = vulkan_backend(b);
    int r;

    if (!v->in_pass) /* replayed: it was never open */
        return;
    v->in_pass = false;
    if (v->failure[0])
        return;
    r = stop_recording(v);
    if (r < 0)
        vulkan_fail(v, r, "recording");
    else
        v->current->is_complete = true;
}

/* ---- submitting and waiting ---- */

static void submit(struct vulkan_backend *v)
{
    uint64_t value = v->n_submitted + 1;
    VkTimelineSemaphoreSubmitInfo timeline = {
        .sType = VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO,
        .signalSemaphoreValueCount = 1,
        .pSignalSemaphoreValues = &value,
    };
    VkSubmitInfo info = {
        .sType = VK_STRUCTURE_TYPE_SUBMIT_INFO,
        .pNext = &timeline,
        .commandBufferCount = 1,
        .pCommandBuffers = &v->current->commands,
        .signalSemaphoreCount = 1,
        .pSignalSemaphores = &v->done,
    };
    int r = vulkan_errno(v->device->vk.QueueSubmit(v->device->queue, 1, &info, VK_NULL_HANDLE));

    if (r < 0) {
        vulkan_fail(v, r, "submitting");
        return;
    }
    v->n_submitted = value;
    v->submitted_usec = now_usec();
    v->stage = STAGE_SUBMITTED;
}

int vulkan_submit(struct backend *b)
{
    struct vulkan_backend *v = vulkan_backend(b);
    int r;

    assert(!v->in_pass);
    if (v->failure[0] == '\0' && v->stage == STAGE_RECORDING) {
        r = stop_recording(v);
        if (r < 0)
            vulkan_fail(v, r, "recording");
    }
    if (v->failure[0] == '\0' && v->stage == STAGE_READY)
        submit(v);
    return v->failure[0] ? -ENODEV : 0;
}

/* Of the two timestamps of what is done. Counters wrap at timestamp_bits. */
static void read_clock(struct vulkan_backend *v)
{
    struct vulkan_device *d = v->device;
    uint64_t t[2] = {};

    v->gpu_usec = 0;
    if (!v->queries ||
        d->vk.GetQueryPoolResults(d->device, v->queries, 0, 2, sizeof(t), t, sizeof(t[0]),
                                  VK_QUERY_RESULT_64_BIT) != VK_SUCCESS)
        return;

    uint64_t ticks = t[1] - t[0];

    if (d->timestamp_bits < 64)
        ticks &= ((uint64_t)1 << d->timestamp_bits) - 1;
    v->gpu_usec = (uint64_t)((double)ticks * d->timestamp_nsec / 1000) + 1;
}

int vulkan_wait(struct backend *b, uint64_t timeout_usec)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct vulkan_device *d = v->device;
    VkSemaphoreWaitInfo info = {
        .sType = VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO,
        .semaphoreCount = 1,
        .pSemaphores = &v->done,
        .pValues = &v->n_submitted,
    };

    if (v->failure[0])
        return -ENODEV;
    if (v->stage != STAGE_SUBMITTED)
        return 0;

    uint64_t since = now_usec() - v->submitted_usec;
    uint64_t left = since < d->hang_usec ? d->hang_usec - since : 0;
    int r = vulkan_errno(d->vk.WaitSemaphores(d->device, &info, 1000 * MIN(timeout_usec, left)));

    if (r == 0) {
        read_clock(v);
        v->stage = STAGE_IDLE;
        v->current = NULL;
        return 0;
    }
    if (r == -ETIMEDOUT && timeout_usec < left)
        return -ETIMEDOUT;
    /* Whatever it was, what is under way cannot be told to be over. */
    vulkan_fail(v, r == -ENODEV ? r : -ETIMEDOUT, "waiting");
    return -ENODEV;
}

int vulkan_settle(struct vulkan_backend *v)
{
    int r = 0;

    if (v->failure[0])
        return -ENODEV;
    if (v->stage != STAGE_IDLE) {
        r = vulkan_submit(&v->base);
        if (r == 0)
            r = vulkan_wait(&v->base, UINT64_MAX);
    }
    return r;
}

int vulkan_copy(struct vulkan_backend *v, const struct vulkan_block *from,
                const struct vulkan_block *to, size_t to_offset, size_t bytes)
{
    VkBufferCopy part = {.dstOffset = to_offset, .size = bytes};

    if (!vulkan_is_recording(v))
        return -ENODEV;
    v->since.is_unknown = true;
    v->device->vk.CmdCopyBuffer(v->current->commands, from->buffer, to->buffer, 1, &part);
    return vulkan_settle(v);
}
