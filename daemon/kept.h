/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * kept: memory that outlives the process: memfds (base/sealed-memory.h) that the service manager
 * holds too, and how they are written so that whoever reads them after a kill finds something whole. Any thread.
 *
 * A process that is killed loses none of its stores, and they were made in program order; what can
 * be torn is a group of words. So a group has two slots and a sequence number: the slot that is not
 * valid is written, then the number, one word, says that it is. A check value beside each finds
 * what was damaged otherwise. Layout and byte order are this machine's: the memory never leaves it.
 */

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* Where mapped parts begin in a file: a multiple of any page size. */
#define KEPT_ALIGN 65536u

/* The first n bytes, shared, not in core dumps. NULL: no memory */
void *kept_map(int fd, size_t n);

/* Of n more bytes: of any byte changed it is another. Begins with 0. */
uint64_t kept_check(uint64_t before, const void *data, size_t n);

/* The slots hold `size` bytes each and their check values: KEPT_SLOTS(size) 64-bit words in all. */
#define KEPT_SLOTS(size) (2 * ((size) / 8 + 1))

/* The last numbers that were given out: of sessions, of requests. */
struct kept_ids {
    _Atomic uint64_t sequence;
    uint64_t slots[KEPT_SLOTS(2 * sizeof(uint64_t))];
};

/* size: a multiple of 8. One writer at a time. */
void kept_commit(_Atomic uint64_t *sequence, uint64_t *slots, const void *data, size_t size);
/* 0; -ENODATA: nothing was ever committed; -EBADMSG */
int kept_read(const _Atomic uint64_t *sequence, const uint64_t *slots, void *ret, size_t size);
