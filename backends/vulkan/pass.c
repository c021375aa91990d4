/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Recording, replaying and waiting. At most one pass exists that was issued and not waited for: its
 * commands are being recorded, or ready, or under way. Whoever begins another first waits for it,
 * so tables and scratch memory need to be there once.
 *
 * A pass of many rows may take a device seconds. It is handed over in parts, so that the display
 * and others get their turn in between, no part lasts as long as a kernel lets one, and a device
 * that is slow can be told from one that hangs.
 */

#include "backends/vulkan/vulkan-backend.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/clock.h"

/* Multiplications of a part: some ms of a fast integrated GPU, less than 0.1 s of a slow one. */
#define PART_WORK ((uint64_t)4 << 30)

static void pass_free(struct vulkan_backend *v, struct vulkan_pass *p)
{
    if (!p)
        return;
    vulkan_kv_free(v, &p->kv);
    for (uint32_t i = 0; i < p->max_parts; i++)
        v->device->vk.FreeCommandBuffers(v->device->device, v->pool, 1, &p->parts[i].commands);
    free(p->parts);
    free(p->submits);
    free(p);
}

/* Makes room for a part more than there ever were. */
static int add_part(struct vulkan_backend *v, struct vulkan_pass *p)
{
    VkCommandBufferAllocateInfo info = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
        .commandPool = v->pool,
        .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
        .commandBufferCount = 1,
    };
    struct vulkan_part *parts;
    VkSubmitInfo *submits;
    int r;

    parts = reallocarray(p->parts, p->max_parts + 1, sizeof(*parts));
    if (!parts)
        return -ENOMEM;
    p->parts = parts;
    submits = reallocarray(p->submits, p->max_parts + 1, sizeof(*submits));
    if (!submits)
        return -ENOMEM;
    p->submits = submits;
    r = vulkan_errno(v->device->vk.AllocateCommandBuffers(v->device->device, &info,
                                                          &parts[p->max_parts].commands));
    if (r == 0)
        p->max_parts++;
    return r;
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
        .queryCount = 2 * VULKAN_PARTS,
    };
    int r = vulkan_errno(d->vk.CreateCommandPool(d->device, &pool, NULL, &v->pool));

    if (r == 0)
        r = vulkan_errno(d->vk.CreateSemaphore(d->device, &semaphore, NULL, &v->done));
    if (r == 0 && d->timestamp_bits)
        r = vulkan_errno(d->vk.CreateQueryPool(d->device, &queries, NULL, &v->queries));
    if (r == 0) {
        v->loose = calloc(1, sizeof(*v->loose));
        r = v->loose ? 0 : -ENOMEM;
    }
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

    v->device->vk.CmdPipelineBarrier(v->commands, from, to, 0, 1, &b, 0, NULL, 0, NULL);
}

/* Commands from now on go to one part more of p. */
static int begin_part(struct vulkan_backend *v, struct vulkan_pass *p)
{
    VkCommandBufferBeginInfo info = {
        .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
        .flags = p == v->loose ? VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT : 0,
    };
    uint32_t i = p->n_parts;
    int r = i < p->max_parts ? 0 : add_part(v, p);

    if (r == 0)
        r = vulkan_errno(v->device->vk.BeginCommandBuffer(p->parts[i].commands, &info));
    if (r < 0)
        return r;
    v->commands = p->parts[i].commands;
    v->bound = VULKAN_N_PIPELINES;
    v->work = 0;
    p->n_parts++;
    if (v->queries) {
        v->device->vk.CmdResetQueryPool(v->commands, v->queries, 2 * i, 2);
        v->device->vk.CmdWriteTimestamp(v->commands, VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, v->queries,
                                        2 * i);
    }
    return 0;
}

static int end_part(struct vulkan_backend *v)
{
    if (v->queries)
        v->device->vk.CmdWriteTimestamp(v->commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT,
                                        v->queries, 2 * v->current->n_parts - 1);
    return vulkan_errno(v->device->vk.EndCommandBuffer(v->commands));
}

/* Commands from now on go to p. On failure nothing is current. */
static int record(struct vulkan_backend *v, struct vulkan_pass *p)
{
    int r;

    p->is_complete = false;
    p->n_parts = 0;
    r = begin_part(v, p);
    if (r < 0)
        return r;
    vulkan_kv_clear(v, &p->kv);
    v->kv_pages_used = 0;
    v->current = p;
    v->stage = STAGE_RECORDING;
    v->since = (struct vulkan_accesses){.is_unknown = true}; /* what was before, and the host's */
    return 0;
}

/* What the host reads afterwards is made visible to it. */
static int stop_recording(struct vulkan_backend *v)
{
    int r;

    barrier(v, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
            VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT, VK_PIPELINE_STAGE_HOST_BIT,
            VK_ACCESS_HOST_READ_BIT | VK_ACCESS_HOST_WRITE_BIT);
    r = end_part(v);
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
        r = record(v, v->loose);
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
    /* What is remembered for barriers holds beyond a part: they reach back over all of the queue.
     */
    if (v->work >= PART_WORK && v->current->n_parts < VULKAN_PARTS) {
        r = end_part(v);
        if (r == 0)
            r = begin_part(v, v->current);
        if (r < 0) {
            vulkan_fail(v, r, "recording");
            return;
        }
    }
    if (vulkan_must_wait(v))
        barrier(v, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
                VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
                VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT,
                VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT);
    if (p != v->bound)
        vk->CmdBindPipeline(v->commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipeline);
    v->bound = p;
    vk->CmdPushConstants(v->commands, v->device->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0,
                         (uint32_t)push_bytes, push);
    vk->CmdDispatch(v->commands, x, y, z);
}

void vulkan_work(struct vulkan_backend *v, uint64_t multiplications)
{
    v->work += multiplications;
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
        *place = calloc(1, sizeof(**place));
    if (*place) {
        (*place)->key = key;
        (*place)->last_used = ++v->n_begun;
        r = record(v, *place);
    } else {
        r = -ENOMEM;
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

/* In one call, which does all or nothing. Each part says when it is done, so none are merged. */
static void submit(struct vulkan_backend *v)
{
    struct vulkan_pass *p = v->current;
    int r;

    for (uint32_t i = 0; i < p->n_parts; i++) {
        struct vulkan_part *part = &p->parts[i];

        part->value = v->n_submitted + i + 1;
        part->timeline = (VkTimelineSemaphoreSubmitInfo){
            .sType = VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO,
            .signalSemaphoreValueCount = 1,
            .pSignalSemaphoreValues = &part->value,
        };
        p->submits[i] = (VkSubmitInfo){
            .sType = VK_STRUCTURE_TYPE_SUBMIT_INFO,
            .pNext = &part->timeline,
            .commandBufferCount = 1,
            .pCommandBuffers = &part->commands,
            .signalSemaphoreCount = 1,
            .pSignalSemaphores = &v->done,
        };
    }
    r = vulkan_errno(
        v->device->vk.QueueSubmit(v->device->queue, p->n_parts, p->submits, VK_NULL_HANDLE));
    if (r < 0) {
        vulkan_fail(v, r, "submitting");
        return;
    }
    v->n_done = v->n_submitted;
    v->n_submitted += p->n_parts;
    v->alive_usec = now_usec();
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

/* Of the timestamps of what is done: what lies between two parts may be others'. Counters wrap at
 * timestamp_bits. */
static void read_clock(struct vulkan_backend *v)
{
    struct vulkan_device *d = v->device;
    uint64_t t[2 * VULKAN_PARTS], ticks = 0;
    uint64_t mask = d->timestamp_bits < 64 ? ((uint64_t)1 << d->timestamp_bits) - 1 : UINT64_MAX;
    uint32_t n = v->current->n_parts;

    v->gpu_usec = 0;
    if (!v->queries ||
        d->vk.GetQueryPoolResults(d->device, v->queries, 0, 2 * n, 2 * n * sizeof(t[0]), t,
                                  sizeof(t[0]), VK_QUERY_RESULT_64_BIT) != VK_SUCCESS)
        return;
    for (uint32_t i = 0; i < n; i++)
        ticks += (t[2 * i + 1] - t[2 * i]) & mask;
    v->gpu_usec = (uint64_t)((double)ticks * d->timestamp_nsec / 1000) + 1;
}

/* Whether a part more is done than when this was asked last. */
static bool gets_on(struct vulkan_backend *v)
{
    uint64_t n_done;

    if (v->device->vk.GetSemaphoreCounterValue(v->device->device, v->done, &n_done) != VK_SUCCESS ||
        n_done == v->n_done)
        return false;
    v->n_done = n_done;
    v->alive_usec = now_usec();
    return true;
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
    int r;

    if (v->failure[0])
        return -ENODEV;
    if (v->stage != STAGE_SUBMITTED)
        return 0;

    for (;;) {
        uint64_t since = now_usec() - v->alive_usec;
        uint64_t left = since < d->hang_usec ? d->hang_usec - since : 0;

        r = vulkan_errno(d->vk.WaitSemaphores(d->device, &info, 1000 * MIN(timeout_usec, left)));
        if (r == 0) {
            read_clock(v);
            v->stage = STAGE_IDLE;
            v->current = NULL;
            return 0;
        }
        if (r != -ETIMEDOUT || (!gets_on(v) && timeout_usec >= left))
            break;
        if (timeout_usec <= left)
            return -ETIMEDOUT;
        timeout_usec -= left;
    }
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
    v->device->vk.CmdCopyBuffer(v->commands, from->buffer, to->buffer, 1, &part);
    return vulkan_settle(v);
}
