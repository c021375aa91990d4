/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Operations of a ring are not seen by seccomp, so the ring itself is restricted. It is made
 * disabled, told which operation it may take and that it may be told nothing more, and enabled; who
 * got hold of its descriptor could have it read files ahead.
 *
 * liburing 2.3 declares io_uring_register_restrictions() and io_uring_enable_rings() and does not
 * export them; io_uring_register(), which it exports, does the same.
 */

#include "daemon/prefetch-ring.h"

#include <errno.h>
#include <liburing.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/checked.h"
#include "base/cleanup.h"

#ifndef MADV_POPULATE_READ /* glibc older than Linux 5.14 */
#define MADV_POPULATE_READ 22
#endif

#define SCRATCH_ALIGN ((size_t)2 << 20) /* also for descriptors that bypass the page cache */

struct prefetch_ring {
    struct io_uring ring;
    bool has_ring;
    enum ring_method method;
    uint32_t depth, n;
    size_t piece_bytes;
    void *scratch; /* RING_READ: what is read, by all pieces, and nobody looks at */
};

static int restrict_to(struct prefetch_ring *r, uint8_t operation)
{
    struct io_uring_restriction only = {.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = operation};
    int k;

    k = io_uring_register((unsigned)r->ring.ring_fd, IORING_REGISTER_RESTRICTIONS, &only, 1);
    if (k < 0)
        return k;
    return io_uring_register((unsigned)r->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

bool prefetch_ring_is_built(void)
{
    return true;
}

int prefetch_ring_new(struct prefetch_ring **ret, enum ring_method method, uint32_t depth,
                      size_t piece_bytes)
{
    CLEANUP(prefetch_ring_freep) struct prefetch_ring *r = calloc(1, sizeof(*r));
    int k;

    if (!r)
        return -ENOMEM;
    if (piece_bytes > INT_MAX) /* what a completion can tell */
        return -EINVAL;
    r->method = method;
    r->depth = depth;
    r->piece_bytes = piece_bytes;
    if (method == RING_READ) {
        if (posix_memalign(&r->scratch, SCRATCH_ALIGN, piece_bytes) != 0)
            return -ENOMEM;
    }
    k = io_uring_queue_init(depth, &r->ring, IORING_SETUP_R_DISABLED);
    if (k < 0)
        return k;
    r->has_ring = true;
    k = restrict_to(r, method == RING_READ ? IORING_OP_READ : IORING_OP_MADVISE);
    if (k < 0)
        return k;
    *ret = TAKE_PTR(r);
    return 0;
}

struct prefetch_ring *prefetch_ring_free(struct prefetch_ring *r)
{
    if (!r)
        return NULL;
    while (r->n > 0 && prefetch_ring_wait(r) != -EBADFD)
        ;
    if (r->has_ring)
        io_uring_queue_exit(&r->ring);
    free(r->scratch);
    free(r);
    return NULL;
}

void prefetch_ring_freep(struct prefetch_ring **r)
{
    *r = prefetch_ring_free(*r);
}

int prefetch_ring_begin(struct prefetch_ring *r, const char *map, int fd, uint64_t offset, size_t n)
{
    struct io_uring_sqe *sqe =
        r->n < r->depth && n <= r->piece_bytes ? io_uring_get_sqe(&r->ring) : NULL;
    int k;

    if (!sqe)
        return -EBUSY;
    switch (r->method) {
    case RING_POPULATE:
        io_uring_prep_madvise(sqe, (char *)map + offset, (off_t)n, MADV_POPULATE_READ);
        break;
    case RING_WILLNEED:
        io_uring_prep_madvise(sqe, (char *)map + offset, (off_t)n, MADV_WILLNEED);
        break;
    case RING_READ:
        io_uring_prep_read(sqe, fd, r->scratch, (unsigned)n, offset);
        break;
    }
    sqe->user_data = n;
    do
        k = io_uring_submit(&r->ring);
    while (k == -EINTR || k == -EAGAIN);
    if (k < 0)
        return k;
    r->n++;
    return 0;
}

uint32_t prefetch_ring_n(const struct prefetch_ring *r)
{
    return r->n;
}

int prefetch_ring_wait(struct prefetch_ring *r)
{
    struct io_uring_cqe *cqe;
    int k;

    do
        k = io_uring_wait_cqe(&r->ring, &cqe);
    while (k == -EINTR);
    if (k < 0)
        return -EBADFD; /* the ring itself: nothing more comes */
    /* advice answers 0; a read what it has read, 0 at the end of the file */
    k = r->method == RING_READ ? cqe->res : cqe->res < 0 ? cqe->res : (int)cqe->user_data;
    if (r->method == RING_READ && k == 0)
        k = -EFAULT;
    io_uring_cqe_seen(&r->ring, cqe);
    r->n--;
    return k;
}

int prefetch_ring_fd(const struct prefetch_ring *r)
{
    return r->ring.ring_fd;
}
