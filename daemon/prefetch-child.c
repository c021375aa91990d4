/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The ring is made, and restricted, before the child is told of any file. Then the child gives up
 * what it has and what it could do, and only after that takes the model's descriptor.
 *
 * What is queued is MADV_POPULATE_READ: it reads as fast as anything (llm-bench load), brings any
 * length whatever the device's read-ahead is, and leaves huge pages in the page cache where the
 * mapping asks for them, which WILLNEED does not. A piece is one of those: of what is wanted first
 * no more is read than that and what the kernel adds to a fault, another one.
 *
 * The file is read while the daemon still opens it. Opening looks at small tensors of all layers;
 * if each of them were a fault behind what is being read ahead, it would last as long as reading
 * half of the file. So they come first.
 */

#include "daemon/prefetch-child.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/log.h"
#include "daemon/prefetch-ring.h"
#include "daemon/sandbox.h"
#include "engine/model.h"

#define DEPTH 8
#define TELL_BYTES ((uint64_t)16 << 20)
#define MOST_FIRST 8192 /* a message's; of what is beyond, nothing comes first */

/* To the child, with the file's descriptor; n_first numbers of pieces follow. */
struct order {
    uint64_t size, not_from, not_to;
    uint32_t n_first;
};

/* From the child. */
struct report {
    uint64_t bytes;
    int32_t result; /* 1, 0 or an error */
};

struct prefetch_child {
    pid_t pid;
    int fd;
};

/* ---- in the child ---- */

struct reader {
    int fd; /* the daemon */
    struct prefetch_ring *ring;
    const char *map;
    struct order order;
    uint32_t first[MOST_FIRST];
    uint32_t n_taken;    /* of those */
    uint64_t next;       /* piece, front to back */
    bool *is_taken;      /* [pieces] */
    uint64_t done, told; /* bytes: read; of which the daemon knows */
};

/* Progress that nobody takes is not waited for, the end is. */
static void tell(const struct reader *r, int result)
{
    struct report report = {.bytes = r->done, .result = result};

    (void)!send(r->fd, &report, sizeof(report), result == 1 ? MSG_DONTWAIT : 0);
}

static _Noreturn void end(const struct reader *r, int result)
{
    tell(r, result);
    _exit(EXIT_SUCCESS);
}

/* There is no daemon any more, or it wants no more. */
static _Noreturn void end_unheard(void)
{
    _exit(EXIT_SUCCESS);
}

/* But for standard error, where the sandbox tells what it refuses. */
static void close_others(int a, int b)
{
    int low = MIN(a, b), high = MAX(a, b);

    close(STDIN_FILENO);
    close(STDOUT_FILENO);
    if (low > STDERR_FILENO + 1)
        syscall(SYS_close_range, STDERR_FILENO + 1, low - 1, 0);
    if (high - low > 1)
        syscall(SYS_close_range, low + 1, high - 1, 0);
    syscall(SYS_close_range, high + 1, ~0u, 0);
}

/* No file has a name any more, and there are hardly any system calls. 0, -errno */
static int enter_sandbox(void)
{
    CLEANUP(sandbox_freep) struct sandbox *s = NULL;
    int r;

    if ((r = sandbox_new(&s, SANDBOX_STRICT)) < 0 ||
        (r = sandbox_allow_calls(s, &seccomp_prefetch)) < 0)
        return r;
    sandbox_tell_stderr(s, "llmd", log_has_prefixes());
    return sandbox_enter(s, NULL, NULL);
}

/* The descriptor that comes with the order. */
static int take_order(struct reader *r)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov[] = {{.iov_base = &r->order, .iov_len = sizeof(r->order)},
                          {.iov_base = r->first, .iov_len = sizeof(r->first)}};
    struct msghdr message = {.msg_iov = iov,
                             .msg_iovlen = 2,
                             .msg_control = &control,
                             .msg_controllen = sizeof(control)};
    const struct cmsghdr *c;
    int fd = -EBADF;
    ssize_t n;

    do
        n = recvmsg(r->fd, &message, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    c = CMSG_FIRSTHDR(&message);
    if (n < (ssize_t)sizeof(r->order) || !c || c->cmsg_type != SCM_RIGHTS)
        end_unheard();
    memcpy(&fd, CMSG_DATA(c), sizeof(fd));
    return fd;
}

/* Whether the daemon still wants it. */
static bool is_wanted(const struct reader *r)
{
    char byte;

    return recv(r->fd, &byte, 1, MSG_DONTWAIT) < 0;
}

static void map_file(struct reader *r, int fd)
{
    void *map = mmap(NULL, r->order.size, PROT_READ, MAP_SHARED, fd, 0);

    if (map == MAP_FAILED)
        end(r, -errno);
    /* As engine/read-ahead.c asks for the daemon's mapping: pages get their size when read. */
    (void)madvise(map, r->order.size, MADV_HUGEPAGE);
    r->map = map;
}

static bool next_number(struct reader *r, uint64_t *ret)
{
    while (r->n_taken < r->order.n_first) {
        uint64_t n = r->first[r->n_taken++];

        if (n * PREFETCH_PIECE_BYTES < r->order.size && !r->is_taken[n]) {
            *ret = n;
            return true;
        }
    }
    while (r->next * PREFETCH_PIECE_BYTES < r->order.size) {
        uint64_t n = r->next++;

        if (!r->is_taken[n]) {
            *ret = n;
            return true;
        }
    }
    return false;
}

/* The next bytes to be read; false: that was all. */
static bool next_piece(struct reader *r, uint64_t *ret_from, uint64_t *ret_to)
{
    const struct order *o = &r->order;
    uint64_t n;

    while (next_number(r, &n)) {
        uint64_t from = n * PREFETCH_PIECE_BYTES, to = MIN(from + PREFETCH_PIECE_BYTES, o->size);

        r->is_taken[n] = true;
        /* Of a piece in the middle of which the part to be left out lies, all is read. */
        if (from >= o->not_from && from < o->not_to)
            from = o->not_to;
        else if (to > o->not_from && to <= o->not_to)
            to = o->not_from;
        if (from < to) {
            *ret_from = from;
            *ret_to = to;
            return true;
        }
    }
    return false;
}

static _Noreturn void read_pieces(struct reader *r)
{
    uint64_t from, to;
    int k;

    for (;;) {
        while (prefetch_ring_n(r->ring) < DEPTH && next_piece(r, &from, &to)) {
            k = prefetch_ring_begin(r->ring, r->map, -EBADF, from, to - from);
            if (k < 0)
                end(r, k);
        }
        if (prefetch_ring_n(r->ring) == 0)
            end(r, 0);
        k = prefetch_ring_wait(r->ring);
        if (k < 0)
            end(r, k);
        r->done += (uint64_t)k;
        if (r->done - r->told >= TELL_BYTES) {
            r->told = r->done;
            tell(r, 1);
        }
        if (!is_wanted(r))
            end_unheard();
    }
}

static _Noreturn void run(int fd)
{
    static struct reader r;
    int k, file;

    r.fd = fd;

    prctl(PR_SET_PDEATHSIG, SIGKILL); /* the socket's end tells it too, but not within a piece */
    prctl(PR_SET_NAME, "prefetch");
    k = prefetch_ring_new(&r.ring, RING_POPULATE, DEPTH, PREFETCH_PIECE_BYTES);
    if (k < 0)
        end(&r, k);
    close_others(fd, prefetch_ring_fd(r.ring));
    k = enter_sandbox();
    if (k < 0)
        end(&r, k);
    file = take_order(&r);
    r.is_taken = calloc(r.order.size / PREFETCH_PIECE_BYTES + 1, sizeof(*r.is_taken));
    if (!r.is_taken)
        end(&r, -ENOMEM);
    map_file(&r, file);
    read_pieces(&r);
}

/* ---- in the daemon ---- */

int prefetch_child_new(struct prefetch_child **ret)
{
    CLEANUP(prefetch_child_freep) struct prefetch_child *c = NULL;
    int ends[2];

    if (!prefetch_ring_is_built())
        return -ENOSYS;
    c = calloc(1, sizeof(*c));
    if (!c)
        return -ENOMEM;
    c->fd = -EBADF;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
        return -errno;
    c->fd = ends[0];
    c->pid = fork();
    if (c->pid == 0)
        run(ends[1]);
    close(ends[1]);
    if (c->pid < 0)
        return -errno;
    *ret = TAKE_PTR(c);
    return 0;
}

struct prefetch_child *prefetch_child_free(struct prefetch_child *c)
{
    if (!c)
        return NULL;
    closep(&c->fd);
    if (c->pid > 0)
        while (waitpid(c->pid, NULL, 0) < 0 && errno == EINTR)
            ;
    free(c);
    return NULL;
}

void prefetch_child_freep(struct prefetch_child **c)
{
    *c = prefetch_child_free(*c);
}

int prefetch_child_open(struct prefetch_child *c, int fd, const struct read_order *o)
{
    struct order order = {.not_from = o->not_from,
                          .not_to = o->not_to,
                          .n_first = (uint32_t)MIN(o->n_first, (size_t)MOST_FIRST)};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {.space = {0}};
    struct iovec iov[] = {{.iov_base = &order, .iov_len = sizeof(order)},
                          {.iov_base = o->first, .iov_len = order.n_first * sizeof(*o->first)}};
    struct msghdr message = {.msg_iov = iov,
                             .msg_iovlen = 2,
                             .msg_control = &control,
                             .msg_controllen = sizeof(control)};
    struct stat st;

    if (fstat(fd, &st) < 0)
        return -errno;
    order.size = (uint64_t)st.st_size;
    control.header = (struct cmsghdr){
        .cmsg_len = CMSG_LEN(sizeof(fd)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
    return sendmsg(c->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

int prefetch_child_fd(const struct prefetch_child *c)
{
    return c->fd;
}

int prefetch_child_read(struct prefetch_child *c, uint64_t *ret_bytes)
{
    struct report report = {.result = 1};
    bool was_reset = false;
    ssize_t n;

    /* Only the last one counts. That it ended without taking the order is told first, once. */
    while ((n = recv(c->fd, &report, sizeof(report), MSG_DONTWAIT)) == sizeof(report) ||
           (n < 0 && errno == ECONNRESET && !was_reset)) {
        if (n < 0) {
            was_reset = true;
            continue;
        }
        *ret_bytes = report.bytes;
        if (report.result != 1)
            return report.result;
    }
    return n < 0 && (errno == EAGAIN || errno == EINTR) ? 1 : -EPIPE;
}
