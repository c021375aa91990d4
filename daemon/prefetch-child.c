/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The ring is made, and restricted, before the child is told of any file. Then the child gives up
 * what it has and what it could do, and only after that takes the model's descriptor.
 *
 * What is queued is MADV_POPULATE_READ: it reads as fast as anything (llm-bench load), brings any
 * length whatever the device's read-ahead is, and leaves huge pages in the page cache where the
 * mapping asks for them, which WILLNEED does not. A fault in such a mapping fetches two huge pages,
 * so a piece is that; four of them keep the device busy.
 *
 * The front of the file is read while the daemon still opens it, which takes as long as reading
 * some hundred megabytes: opening touches the small tensors of all layers. The socket keeps the
 * borders of what is told.
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

#define PIECE_BYTES ((size_t)4 << 20)
#define DEPTH 4
#define FRONT_BYTES ((uint64_t)1 << 30)
#define TELL_BYTES ((uint64_t)16 << 20)

/* To the child. The first one comes with the file's descriptor, and is not final. */
struct order {
    uint64_t size, skip_from, skip_to;
    bool is_final;
};

/* From the child. */
struct report {
    uint64_t bytes;
    int32_t result; /* 1, 0 or an error */
};

struct prefetch_child {
    pid_t pid;
    int fd;
    uint64_t size; /* the file's, once it is open */
};

/* ---- in the child ---- */

struct reader {
    int fd; /* the daemon */
    struct prefetch_ring *ring;
    const char *map;
    struct order order;
    uint64_t next, done, told; /* bytes: begun up to here; read; of which the daemon knows */
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

/* Waits, or looks only. The descriptor that comes with an order, else -EBADF. */
static int take_order(struct reader *r, bool wait)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct order order;
    struct iovec iov = {.iov_base = &order, .iov_len = sizeof(order)};
    struct msghdr message = {.msg_iov = &iov,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof(control)};
    const struct cmsghdr *c;
    int fd = -EBADF;
    ssize_t n;

    do
        n = recvmsg(r->fd, &message, MSG_CMSG_CLOEXEC | (wait ? 0 : MSG_DONTWAIT));
    while (n < 0 && errno == EINTR);
    if (n < 0 && errno == EAGAIN)
        return -EBADF;
    if (n != sizeof(order))
        end_unheard();
    r->order = order;
    c = CMSG_FIRSTHDR(&message);
    if (c && c->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(c), sizeof(fd));
    return fd;
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

/* The next piece of what is to be read; false: there is none now. */
static bool next_piece(struct reader *r, uint64_t *ret_from, uint64_t *ret_to)
{
    const struct order *o = &r->order;
    uint64_t limit = o->is_final ? o->size : MIN(o->size, FRONT_BYTES);
    uint64_t from = r->next, to;

    if (from >= o->skip_from && from < o->skip_to)
        from = o->skip_to;
    if (from >= limit)
        return false;
    to = MIN((from / PIECE_BYTES + 1) * PIECE_BYTES, limit);
    if (from < o->skip_from && o->skip_from < o->skip_to)
        to = MIN(to, o->skip_from);
    *ret_from = from;
    *ret_to = to;
    return true;
}

static void read_pieces(struct reader *r)
{
    uint64_t from, to;
    int k;

    for (;;) {
        while (prefetch_ring_n(r->ring) < DEPTH && next_piece(r, &from, &to)) {
            k = prefetch_ring_begin(r->ring, r->map, -EBADF, from, to - from);
            if (k < 0)
                end(r, k);
            r->next = to;
        }
        if (prefetch_ring_n(r->ring) == 0) {
            if (r->order.is_final)
                end(r, 0);
            take_order(r, /* wait= */ true);
            continue;
        }
        k = prefetch_ring_wait(r->ring);
        if (k < 0)
            end(r, k);
        r->done += (uint64_t)k;
        if (r->done - r->told >= TELL_BYTES) {
            r->told = r->done;
            tell(r, 1);
        }
        take_order(r, /* wait= */ false);
    }
}

static _Noreturn void run(int fd)
{
    struct reader r = {.fd = fd};
    int k, file;

    prctl(PR_SET_PDEATHSIG, SIGKILL); /* the socket's end tells it too, but not within a piece */
    prctl(PR_SET_NAME, "prefetch");
    k = prefetch_ring_new(&r.ring, RING_POPULATE, DEPTH, PIECE_BYTES);
    if (k < 0)
        end(&r, k);
    close_others(fd, prefetch_ring_fd(r.ring));
    k = enter_sandbox();
    if (k < 0)
        end(&r, k);
    file = take_order(&r, /* wait= */ true);
    if (file < 0)
        end_unheard();
    map_file(&r, file);
    read_pieces(&r);
    end_unheard();
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

static int send_order(const struct prefetch_child *c, const struct order *order, int fd)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {.space = {0}};
    struct iovec iov = {.iov_base = (void *)order, .iov_len = sizeof(*order)};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};

    if (fd >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof(control);
        control.header = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof(fd)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
    }
    return sendmsg(c->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
}

int prefetch_child_open(struct prefetch_child *c, int fd)
{
    struct stat st;

    if (fstat(fd, &st) < 0)
        return -errno;
    c->size = (uint64_t)st.st_size;
    return send_order(c, &(struct order){.size = c->size}, fd);
}

int prefetch_child_go_on(struct prefetch_child *c, uint64_t skip_from, uint64_t skip_to)
{
    struct order order = {
        .size = c->size, .skip_from = skip_from, .skip_to = skip_to, .is_final = true};

    return send_order(c, &order, -EBADF);
}

int prefetch_child_fd(const struct prefetch_child *c)
{
    return c->fd;
}

int prefetch_child_read(struct prefetch_child *c, uint64_t *ret_bytes)
{
    struct report report = {.result = 1};
    ssize_t n;

    /* Only the last one counts. */
    while ((n = recv(c->fd, &report, sizeof(report), MSG_DONTWAIT)) == sizeof(report)) {
        *ret_bytes = report.bytes;
        if (report.result != 1)
            return report.result;
    }
    return n < 0 && (errno == EAGAIN || errno == EINTR) ? 1 : -EPIPE;
}
