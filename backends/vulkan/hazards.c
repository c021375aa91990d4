/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Which dispatches must wait for those before them. A device runs what stands between two barriers
 * at once, so the products of the same rows by three matrices need one barrier, not three. Only who
 * says what it reads and writes may go without: all others wait, and are waited for.
 */

#include "backends/vulkan/vulkan-backend.h"

static bool overlap(const struct vulkan_range *a, uint32_t n_a, const struct vulkan_range *b,
                    uint32_t n_b)
{
    for (uint32_t i = 0; i < n_a; i++)
        for (uint32_t k = 0; k < n_b; k++)
            if (a[i].start < b[k].end && b[k].start < a[i].end)
                return true;
    return false;
}

static void add(struct vulkan_accesses *a, struct vulkan_range *ranges, uint32_t *n,
                const struct vulkan_range *more, uint32_t n_more)
{
    for (uint32_t i = 0; i < n_more; i++) {
        if (*n == VULKAN_RANGES) {
            a->is_unknown = true;
            return;
        }
        ranges[(*n)++] = more[i];
    }
}

void vulkan_reads(struct vulkan_backend *v, const void *p, size_t bytes)
{
    struct vulkan_range range = {(uintptr_t)p, (uintptr_t)p + bytes};

    add(&v->next, v->next.reads, &v->next.n_reads, &range, 1);
}

void vulkan_writes(struct vulkan_backend *v, const void *p, size_t bytes)
{
    struct vulkan_range range = {(uintptr_t)p, (uintptr_t)p + bytes};

    add(&v->next, v->next.writes, &v->next.n_writes, &range, 1);
}

bool vulkan_must_wait(struct vulkan_backend *v)
{
    struct vulkan_accesses *since = &v->since, next = v->next;
    /* Nobody computes without writing: who said nothing of it said nothing. */
    bool unknown = next.is_unknown || next.n_writes == 0;
    bool wait = unknown || since->is_unknown ||
                overlap(next.writes, next.n_writes, since->writes, since->n_writes) ||
                overlap(next.writes, next.n_writes, since->reads, since->n_reads) ||
                overlap(next.reads, next.n_reads, since->writes, since->n_writes);

    if (wait)
        *since = (struct vulkan_accesses){};
    since->is_unknown = unknown;
    add(since, since->reads, &since->n_reads, next.reads, next.n_reads);
    add(since, since->writes, &since->n_writes, next.writes, next.n_writes);
    v->next = (struct vulkan_accesses){};
    return wait;
}
