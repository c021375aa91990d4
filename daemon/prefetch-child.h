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

struct prefetch_child;

/*
 * Forks; while the process has one thread, and before it confines itself. Whether there can be a
 * ring turns out later, in prefetch_child_read(). 0, -ENOSYS: not in this build, -errno
 */
int prefetch_child_new(struct prefetch_child **ret);
struct prefetch_child *prefetch_child_free(struct prefetch_child *c); /* ends it within a piece */
void prefetch_child_freep(struct prefetch_child **c);

/*
 * Which file: it begins with the front, although nobody knows yet whether the file is a model. fd,
 * of a regular file, stays the caller's. Once; any thread, but none beside another call. 0, -errno
 */
int prefetch_child_open(struct prefetch_child *c, int fd);

/*
 * The rest too, but for [skip_from, skip_to), which begins and ends with a page. Once, after
 * prefetch_child_open(). 0, -errno
 */
int prefetch_child_go_on(struct prefetch_child *c, uint64_t skip_from, uint64_t skip_to);

int prefetch_child_fd(const struct prefetch_child *c); /* readable: prefetch_child_read() */

/*
 * Takes what it has told. *ret_bytes: read so far, the part to be skipped included if the front
 * has some of it. 1: it goes on; 0: all is read; -EPIPE: it died; -ENOSYS, -EPERM: there is no
 * ring for us; -EFAULT: the file ends earlier than it did; -errno
 */
int prefetch_child_read(struct prefetch_child *c, uint64_t *ret_bytes);
