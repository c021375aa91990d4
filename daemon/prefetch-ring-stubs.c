/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Without liburing: nobody ever has a ring. */

#include <errno.h>
#include <stdlib.h>

#include "daemon/prefetch-ring.h"

bool prefetch_ring_is_built(void)
{
    return false;
}

int prefetch_ring_new(struct prefetch_ring **ret, enum ring_method method, uint32_t depth,
                      size_t piece_bytes)
{
    (void)ret;
    (void)method;
    (void)depth;
    (void)piece_bytes;
    return -ENOSYS;
}

struct prefetch_ring *prefetch_ring_free(struct prefetch_ring *r)
{
    (void)r;
    return NULL;
}

void prefetch_ring_freep(struct prefetch_ring **r)
{
    *r = NULL;
}

int prefetch_ring_begin(struct prefetch_ring *r, const char *map, int fd, uint64_t offset, size_t n)
{
    (void)r;
    (void)map;
    (void)fd;
    (void)offset;
    (void)n;
    return -ENOSYS;
}

uint32_t prefetch_ring_n(const struct prefetch_ring *r)
{
    (void)r;
    return 0;
}

int prefetch_ring_wait(struct prefetch_ring *r)
{
    (void)r;
    return -ENOSYS;
}

int prefetch_ring_fd(const struct prefetch_ring *r)
{
    (void)r;
    return -EBADF;
}
