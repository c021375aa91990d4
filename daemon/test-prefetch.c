/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A model is read ahead to its end: by a child with a ring, and by a thread where there is no
 * child, where the child was killed, where it may have no ring. Nobody stays behind as a zombie. A
 * file that was shortened ends it quietly. The child can open nothing and the ring can do one
 * thing.
 *
 *   test-prefetch MODEL (written here)
 */

#undef NDEBUG
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/prefetch-child.h"
#include "daemon/prefetch-ring.h"
#include "daemon/prefetch.h"
#include "engine/model-file.h"
#include "engine/model.h"
#include "tests/model-builder.h"

#ifndef MADV_POPULATE_READ /* glibc older than Linux 5.14 */
#define MADV_POPULATE_READ 22
#endif

static const char *path;

struct watcher {
    struct prefetch *prefetch;
    sd_event *event;
    double last;
    unsigned n_calls;
};

static void on_progress(void *userdata)
{
    struct watcher *w = userdata;
    double now = prefetch_progress(w->prefetch);

    assert(now >= w->last && now <= 1);
    w->last = now;
    w->n_calls++;
    if (prefetch_is_over(w->prefetch)) {
        w->prefetch = prefetch_free(w->prefetch); /* as the service does */
        sd_event_exit(w->event, 0);
    }
}

/* Reads it with that child, or without; returns the progress at the end. */
static double read_ahead(const struct model *m, struct prefetch_child *child)
{
    struct watcher w = {.n_calls = 0};

    assert(sd_event_new(&w.event) >= 0);
    assert(prefetch_new(&w.prefetch, w.event, m, child, on_progress, &w) == 0);
    assert(sd_event_loop(w.event) == 0 && w.n_calls > 0 && !w.prefetch);
    sd_event_unref(w.event);
    return w.last;
}

static bool has_child(void)
{
    return waitpid(-1, NULL, WNOHANG) >= 0 || errno != ECHILD;
}

/* Our child's number: there is one. */
static pid_t child_of_ours(void)
{
    char name[64];
    FILE *f;
    int pid = 0;

    snprintf(name, sizeof(name), "/proc/self/task/%d/children", (int)getpid());
    f = fopen(name, "re");
    assert(f && fscanf(f, "%d", &pid) == 1);
    fclose(f);
    return pid;
}

static void tell(struct prefetch_child *c, const struct model_file *f)
{
    CLEANUP(read_order_done) struct read_order order = {0};

    assert(model_read_order(&order, f, PREFETCH_PIECE_BYTES) == 0);
    assert(order.n_first > 0 && order.not_to - order.not_from < (uint64_t)1 << 40);
    (void)prefetch_child_open(c, model_file_fd(f), &order);
}

/* *ret: how it ended; the bytes it had read by then. */
static uint64_t wait_for_end(struct prefetch_child *c, int *ret)
{
    struct pollfd p = {.fd = prefetch_child_fd(c), .events = POLLIN};
    uint64_t bytes = 0;

    while ((*ret = prefetch_child_read(c, &bytes)) == 1)
        assert(poll(&p, 1, -1) == 1);
    return bytes;
}

/* ---- what is read ---- */

static void whole_file(const struct model *m)
{
    const struct model_file *f = model_get_file(m);
    CLEANUP(read_order_done) struct read_order order = {0};
    struct prefetch_child *c;
    uint64_t bytes;
    size_t size;
    int r;

    model_file_map(f, &size);
    assert(model_read_order(&order, f, PREFETCH_PIECE_BYTES) == 0);
    assert(order.not_from < order.not_to && order.not_to <= size);
    assert(prefetch_child_new(&c) == 0);
    tell(c, f);
    bytes = wait_for_end(c, &r);
    prefetch_child_free(c);
    assert(!has_child());
    if (r == -EPERM || r == -ENOSYS) {
        puts("there is no io_uring here");
        return;
    }
    /* All but the table; the two pieces that it shares with others, as far as they are others'. */
    assert(r == 0 && bytes == size - (order.not_to - order.not_from));
}

/* Pieces are asked for once each, whatever the order says, and numbers beyond the file not at all.
 */
static void odd_orders(const struct model *m)
{
    const struct model_file *f = model_get_file(m);
    uint32_t first[] = {1, 0, 1, 1u << 30, 0};
    struct read_order order = {.first = first, .n_first = ARRAY_SIZE(first)};
    struct prefetch_child *c;
    uint64_t bytes;
    size_t size;
    int r;

    model_file_map(f, &size);
    order.not_from = order.not_to = size;
    assert(prefetch_child_new(&c) == 0);
    assert(prefetch_child_open(c, model_file_fd(f), &order) == 0);
    bytes = wait_for_end(c, &r);
    assert(r == -EPERM || r == -ENOSYS || (r == 0 && bytes == size));
    prefetch_child_free(c);
    /* One that was told nothing ends when it is no longer wanted. */
    assert(prefetch_child_new(&c) == 0);
    prefetch_child_free(c);
    assert(!has_child());
}

/* ---- where it cannot go on ---- */

/* Nothing of it is mapped any more; it stays in the page cache. */
static void unmap(const struct model *m)
{
    size_t size;
    const char *map = model_file_map(model_get_file(m), &size);

    assert(madvise((void *)map, size, MADV_DONTNEED) == 0);
}

/*
 * Whether all that is read ahead is mapped here: the thread does that, a child cannot. Not known
 * (true) where the kernel has no MADV_POPULATE_READ: reading ahead maps nothing then.
 */
static bool thread_has_read(const struct model *m)
{
    CLEANUP(read_order_done) struct read_order order = {0};
    CLEANUP(closep) int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    size_t size, page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t map = (uintptr_t)model_file_map(model_get_file(m), &size);

    assert(fd >= 0 && model_read_order(&order, model_get_file(m), PREFETCH_PIECE_BYTES) == 0);
    for (size_t at = 0; at < size; at += page) {
        uint64_t entry;

        if (at >= order.not_from && at < order.not_to)
            continue;
        assert(pread(fd, &entry, sizeof(entry), (off_t)((map + at) / page * sizeof(entry))) ==
               sizeof(entry));
        if (!(entry >> 63)) {
            bool populates = madvise((void *)map, page, MADV_POPULATE_READ) == 0;

            return !populates && errno == EINVAL;
        }
    }
    return true;
}

/* A child that was stopped before it was told of the file has read nothing of it. */
static void killed(const struct model *m)
{
    struct prefetch_child *c;

    for (int told = 0; told < 2; told++) {
        unmap(m);
        assert(prefetch_child_new(&c) == 0);
        kill(child_of_ours(), SIGSTOP);
        if (told)
            tell(c, model_get_file(m));
        kill(child_of_ours(), SIGKILL);
        assert(read_ahead(m, c) == 1);
        assert(thread_has_read(m));
        assert(!has_child());
    }
}

/* What follows gets that errno from io_uring_setup(), in this process and its children. */
static void forbid_rings(int error)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = ARRAY_SIZE(code), .filter = code};

    assert(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    assert(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

/* In a process of its own: what is forbidden stays so. */
static void forbidden(const struct model *m)
{
    static const int errors[] = {EPERM, ENOSYS, ENOMEM}; /* ENOMEM: of RLIMIT_MEMLOCK, once */

    for (size_t i = 0; i < ARRAY_SIZE(errors); i++) {
        int status;
        pid_t pid = fork();

        assert(pid >= 0);
        if (pid == 0) {
            struct prefetch_child *c;
            int r;

            forbid_rings(errors[i]);
            assert(prefetch_child_new(&c) == 0);
            tell(c, model_get_file(m));
            wait_for_end(c, &r);
            assert(r == -errors[i]);
            prefetch_child_free(c);
            assert(prefetch_child_new(&c) == 0);
            tell(c, model_get_file(m));
            unmap(m);
            assert(read_ahead(m, c) == 1);
            assert(thread_has_read(m));
            assert(!has_child());
            _exit(0);
        }
        assert(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
}

/* Shortened after it was opened: the rest is not read, and nobody is hurt. */
static void shortened(const char *copy)
{
    struct model_file *f;
    struct prefetch_child *c;
    size_t size;
    uint64_t bytes;
    int r;

    assert(model_file_open(&f, copy, NULL) == 0);
    model_file_map(f, &size);
    assert(prefetch_child_new(&c) == 0);
    kill(child_of_ours(), SIGSTOP); /* before it knows of the file */
    tell(c, f);
    assert(truncate(copy, (off_t)(size / 2)) == 0);
    kill(child_of_ours(), SIGCONT);
    bytes = wait_for_end(c, &r);
    assert(r == -EFAULT || r == -EPERM || r == -ENOSYS);
    assert(bytes < size);
    prefetch_child_free(c);
    model_file_free(f);
    assert(!has_child());
}

/* ---- what the child has ---- */

static char *read_link(pid_t pid, const char *name)
{
    static char target[256];
    char link[512];
    ssize_t n;

    snprintf(link, sizeof(link), "/proc/%d/fd/%s", (int)pid, name);
    n = readlink(link, target, sizeof(target) - 1);
    target[n > 0 ? n : 0] = 0;
    return target;
}

/* Waits for it, on the way it goes by itself: it is confined when it waits for its file. */
static void wait_until_confined(pid_t pid)
{
    char name[64], line[128];
    int filters = 0;

    snprintf(name, sizeof(name), "/proc/%d/status", (int)pid);
    while (filters == 0) {
        FILE *f = fopen(name, "re");

        assert(f);
        while (fgets(line, sizeof(line), f))
            (void)sscanf(line, "Seccomp: %d", &filters);
        fclose(f);
        sched_yield();
    }
}

static void belongings(const struct model *m)
{
    struct prefetch_child *c;
    size_t n_rings = 0, n_sockets = 0;
    struct dirent *e;
    char name[64];
    pid_t pid;
    DIR *d;

    assert(prefetch_child_new(&c) == 0);
    pid = child_of_ours();
    wait_until_confined(pid);
    snprintf(name, sizeof(name), "/proc/%d/fd", (int)pid);
    d = opendir(name);
    assert(d);
    while ((e = readdir(d))) {
        const char *what = e->d_name[0] == '.' ? NULL : read_link(pid, e->d_name);

        if (!what)
            continue;
        if (strcmp(what, "anon_inode:[io_uring]") == 0)
            n_rings++;
        else if (strncmp(what, "socket:", 7) == 0)
            n_sockets++;
        else /* where the sandbox tells what it refuses */
            assert(strcmp(e->d_name, "2") == 0);
    }
    closedir(d);
    assert(n_rings == 1 && n_sockets == 1);
    /* The daemon has none. */
    d = opendir("/proc/self/fd");
    assert(d);
    while ((e = readdir(d)))
        assert(e->d_name[0] == '.' || !strstr(read_link(getpid(), e->d_name), "io_uring"));
    closedir(d);
    tell(c, model_get_file(m));
    assert(read_ahead(m, c) == 1 && !has_child());
}

/* Made as the child makes it, a ring can do nothing but what it is for. */
static void restricted(void)
{
    struct prefetch_ring *ring;
    int fds[2], one = 0;

    assert(prefetch_ring_new(&ring, RING_POPULATE, 2, 1 << 20) == 0);
    assert(pipe(fds) == 0);
    one = fds[0];
    /* 2: IORING_REGISTER_FILES, which would give the ring descriptors */
    assert(syscall(SYS_io_uring_register, prefetch_ring_fd(ring), 2, &one, 1) < 0);
    assert(errno == EACCES);
    close(fds[0]);
    close(fds[1]);
    prefetch_ring_free(ring);
}

static bool has_ring(void)
{
    struct prefetch_ring *ring;

    if (prefetch_ring_new(&ring, RING_POPULATE, 1, 4096) < 0)
        return false;
    prefetch_ring_free(ring);
    return true;
}

static void write_model(const char *where)
{
    struct model_builder b = {.type = WEIGHT_F32, .seed = 1};

    model_builder_config(&b.config, 5, 5, 64);
    b.config.vocab_size_ple = 2001;
    b.config.vocab_size = 2016;
    b.config.ple_width = 128;
    model_builder_write(&b, where);
}

int main(int argc, char **argv)
{
    struct prefetch_child *c;
    struct model *m;

    assert(argc == 2);
    path = argv[1];
    write_model(path);
    assert(model_open(&m, path, NULL) == 0);
    unmap(m);
    assert(read_ahead(m, NULL) == 1 && thread_has_read(m));
    if (prefetch_ring_is_built()) {
        whole_file(m);
        odd_orders(m);
        killed(m);
        forbidden(m);
        if (has_ring()) {
            restricted();
            belongings(m);
        }
        model_free(m);
        shortened(path);
    } else {
        assert(prefetch_child_new(&c) == -ENOSYS);
        model_free(m);
    }
    assert(unlink(path) == 0);
    return 0;
}
