/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/kept.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

void *kept_map(int fd, size_t n)
{
    void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

    if (p == MAP_FAILED)
        return NULL;
    (void)madvise(p, n, MADV_DONTDUMP);
    return p;
}

/* Each step is a bijection of what came before and of what is added, so no single change is lost.
 */
static uint64_t mix(uint64_t h, uint64_t word)
{
    h = (h ^ word) * UINT64_C(0xff51afd7ed558ccd);
    return h ^ (h >> 32);
}

uint64_t kept_check(uint64_t before, const void *data, size_t n)
{
    const unsigned char *p = data;
    uint64_t h = mix(before, UINT64_C(0x9e3779b97f4a7c15) + n), word;

    for (; n >= sizeof(word); n -= sizeof(word), p += sizeof(word)) {
        memcpy(&word, p, sizeof(word));
        h = mix(h, word);
    }
    word = 0;
    if (n > 0)
        memcpy(&word, p, n);
    return mix(h, word);
}

void kept_commit(_Atomic uint64_t *sequence, uint64_t *slots, const void *data, size_t size)
{
    uint64_t n = atomic_load_explicit(sequence, memory_order_relaxed) + 1;
    uint64_t *slot = slots + (n & 1) * (size / 8 + 1);

    memcpy(slot, data, size);
    slot[size / 8] = kept_check(n, data, size);
    atomic_store_explicit(sequence, n, memory_order_release);
}

int kept_read(const _Atomic uint64_t *sequence, const uint64_t *slots, void *ret, size_t size)
{
    uint64_t n = atomic_load_explicit(sequence, memory_order_acquire);
    const uint64_t *slot = slots + (n & 1) * (size / 8 + 1);

    if (n == 0)
        return -ENODATA;
    if (slot[size / 8] != kept_check(n, slot, size))
        return -EBADMSG;
    memcpy(ret, slot, size);
    return 0;
}
