/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * prefetch_child: a process that reads one model file into the page cache through io_uring. A ring
 * is not seen by seccomp, so it lives there and not in the daemon: the child has no privileges, no
 * descriptors but the model's, the ring's and a socket to the daemon, and can open nothing. What it
 * has read is in memory for the daemon's mapping of the same file too, in the same huge pages.
 *
 * It ends by itself when all is read, when it cannot go on, and when the daemon goes.
 */

#include <stdbool.h>
#include <stdint.h>

#define PREFETCH_PIECE_BYTES ((uint64_t)2 << 20) /* a huge page */

struct prefetch_child;
struct read_order;

/*
 * Forks; while the process has one thread, and before it confines itself. Whether there can be a
 * ring turns out later, in prefetch_child_read(). 0, -ENOSYS: not in this build, -errno
 */
int prefetch_child_new(struct prefetch_child **ret);
struct prefetch_child *prefetch_child_free(struct prefetch_child *c); /* ends it within a piece */
void prefetch_child_freep(struct prefetch_child **c);

/*
 * Which file, and in which order, in pieces of PREFETCH_PIECE_BYTES; it begins at once. fd, of a
 * regular file, and o stay the caller's. Once; any thread, but none beside another call. 0, -errno
 */
int prefetch_child_open(struct prefetch_child *c, int fd, const struct read_order *o);

int prefetch_child_fd(const struct prefetch_child *c); /* readable: prefetch_child_read() */

/*
 * Takes what it has told. *ret_bytes: read so far. 1: it goes on; 0: all is read; -EPIPE: it died;
 * -ENOSYS, -EPERM: there is no ring for us; -EFAULT: the file ends earlier than it did; -errno
 */
int prefetch_child_read(struct prefetch_child *c, uint64_t *ret_bytes);
