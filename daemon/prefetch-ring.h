/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * prefetch_ring: an io_uring that reads pieces of a file into the page cache and can do nothing
 * else: it is restricted to one operation before it is enabled, and takes no more descriptors,
 * buffers or restrictions afterwards. One thread.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum ring_method {
    RING_POPULATE, /* MADV_POPULATE_READ of a mapping; since Linux 5.14 */
    RING_WILLNEED, /* MADV_WILLNEED of a mapping: a call fetches a read-ahead at most */
    RING_READ,     /* reads of a descriptor, thrown away; a mapping is not needed */
};

struct prefetch_ring;

bool prefetch_ring_is_built(void); /* false: prefetch_ring_new() answers -ENOSYS always */

/*
 * For depth pieces at a time, each of at most piece_bytes. 0, -ENOSYS: this system or this build
 * has no io_uring, -EPERM: it is forbidden, -EINVAL: it is too old, -errno
 */
int prefetch_ring_new(struct prefetch_ring **ret, enum ring_method method, uint32_t depth,
                      size_t piece_bytes);
struct prefetch_ring *prefetch_ring_free(struct prefetch_ring *r); /* waits for what goes on */
void prefetch_ring_freep(struct prefetch_ring **r);

/*
 * Begins to read n bytes: of map, or of file fd, at offset. There must be room: fewer than depth
 * pieces go on. 0, -errno
 */
int prefetch_ring_begin(struct prefetch_ring *r, const char *map, int fd, uint64_t offset,
                        size_t n);

uint32_t prefetch_ring_n(const struct prefetch_ring *r); /* pieces that go on */

/*
 * Waits for a piece to end. >= 0: its bytes; -EFAULT: the file ends before it, -EINVAL: the kernel
 * does not know the method, -errno
 */
int prefetch_ring_wait(struct prefetch_ring *r);

int prefetch_ring_fd(const struct prefetch_ring *r); /* for who closes all others */
