/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * "Read" means something else to each method: MADV_WILLNEED returns when the reads are asked for,
 * read() when a copy was made. What they are compared by is the time until somebody has seen every
 * page of a mapping, so each is followed by that.
 */

#include "tools/llm-bench/read-methods.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "daemon/prefetch-ring.h"

#ifndef MADV_POPULATE_READ /* glibc older than Linux 5.14 */
#define MADV_POPULATE_READ 22
#endif

#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)4096) /* at most what the system has */

static const struct {
    const char *name, *field;
    bool huge;
    int ring; /* enum ring_method, -1: none */
    uint32_t depth;
    size_t piece_bytes;
} methods[N_READ_METHODS] = {
    [READ_FAULTS] = {"faults", "faults", false, -1, 0, 0},
    [READ_FAULTS_HUGE] = {"faults, huge pages", "faults_huge_pages", true, -1, 0, 0},
    [READ_POPULATE] = {"POPULATE_READ 8 MiB, a thread", "populate_thread", true, -1, 0, 8 * MIB},
    [READ_RING_POPULATE] = {"io_uring POPULATE_READ 2 MiB x 8", "ring_populate", true,
                            RING_POPULATE, 8, 2 * MIB},
    [READ_RING_WILLNEED] = {"io_uring WILLNEED 1 MiB x 16", "ring_willneed", true, RING_WILLNEED,
                            16, MIB},
    [READ_RING_READ] = {"io_uring read 2 MiB x 4", "ring_read", true, RING_READ, 4, 2 * MIB},
    [READ_PLAIN] = {"read() 1 MiB", "read", true, -1, 0, MIB},
    [READ_DIRECT] = {"disk: O_DIRECT 1 MiB x 16", "direct", false, RING_READ, 16, MIB},
};

const char *read_method_name(enum read_method m)
{
    return methods[m].name;
}

const char *read_method_field(enum read_method m)
{
    return methods[m].field;
}

uint64_t read_file_bytes(const struct read_file *f)
{
    return f->size - (f->skip_to - f->skip_from);
}

static double processor_seconds(void)
{
    struct rusage u;

    getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_utime.tv_sec + (double)u.ru_stime.tv_sec +
           1e-6 * ((double)u.ru_utime.tv_usec + (double)u.ru_stime.tv_usec);
}

/* ---- one file, open ---- */

struct opened {
    int fd;
    const char *map; /* NULL: not mapped */
    uint64_t size;
};

static void close_file(struct opened *o)
{
    if (o->map)
        munmap((void *)o->map, o->size);
    closep(&o->fd);
}

static int map_file(struct opened *o, const struct read_file *f, bool huge, struct error *err)
{
    void *map = mmap(NULL, f->size, PROT_READ, MAP_SHARED, o->fd, 0);

    if (map == MAP_FAILED)
        return error_set(err, errno, "%s: cannot map it: %s", f->path, strerror(errno));
    o->map = map;
    o->size = f->size;
    if (huge) { /* as engine/read-ahead.c: not the table */
        madvise(map, f->skip_from, MADV_HUGEPAGE);
        madvise((char *)map + f->skip_to, f->size - f->skip_to, MADV_HUGEPAGE);
    }
    return 0;
}

static int open_file(struct opened *o, const struct read_file *f, int flags, struct error *err)
{
    o->fd = open(f->path, O_RDONLY | O_CLOEXEC | flags);
    return o->fd < 0 ? error_set(err, errno, "%s: cannot open: %s", f->path, strerror(errno)) : 0;
}

/* The next piece from *at on; *at goes behind it. */
static bool next_piece(const struct read_file *f, size_t most, uint64_t *at, uint64_t *ret_from,
                       size_t *ret_n)
{
    uint64_t from = *at == f->skip_from ? f->skip_to : *at;
    uint64_t end = from < f->skip_from ? f->skip_from : f->size;

    if (from >= end)
        return false;
    *ret_from = from;
    *ret_n = (size_t)MIN((uint64_t)most - from % most, end - from);
    *at = from + *ret_n;
    return true;
}

/* ---- the methods ---- */

static void touch(const struct opened *o, const struct read_file *f)
{
    uint64_t at = 0, from;
    size_t n;

    while (next_piece(f, MIB, &at, &from, &n))
        for (size_t i = 0; i < n; i += PAGE)
            (void)*(const volatile char *)(o->map + from + i);
}

static int populate(const struct opened *o, const struct read_file *f, size_t piece_bytes,
                    struct error *err)
{
    uint64_t at = 0, from;
    size_t n;

    while (next_piece(f, piece_bytes, &at, &from, &n))
        if (madvise((char *)o->map + from, n, MADV_POPULATE_READ) < 0)
            return error_set(err, errno == EINVAL ? ENOSYS : errno, "MADV_POPULATE_READ: %s",
                             strerror(errno));
    return 0;
}

static int read_plainly(const struct opened *o, const struct read_file *f, size_t piece_bytes,
                        struct error *err)
{
    CLEANUP(freep) char *piece = malloc(piece_bytes);
    uint64_t at = 0, from;
    size_t n;

    if (!piece)
        return error_set(err, ENOMEM, "out of memory");
    while (next_piece(f, piece_bytes, &at, &from, &n)) {
        ssize_t got = pread(o->fd, piece, n, (off_t)from);

        if (got <= 0)
            return error_set(err, got < 0 ? errno : EIO, "%s: cannot read: %s", f->path,
                             got < 0 ? strerror(errno) : "it ends too early");
        at = from + (size_t)got;
    }
    return 0;
}

static int read_by_ring(const struct opened *o, const struct read_file *f, enum read_method m,
                        struct error *err)
{
    CLEANUP(prefetch_ring_freep) struct prefetch_ring *ring = NULL;
    uint64_t at = 0, from;
    size_t n;
    int r;

    r = prefetch_ring_new(&ring, (enum ring_method)methods[m].ring, methods[m].depth,
                          methods[m].piece_bytes);
    if (r < 0)
        return error_set(err, r == -ENOMEM ? ENOMEM : ENOSYS, "io_uring: %s", strerror(-r));
    for (;;) {
        while (prefetch_ring_n(ring) < methods[m].depth &&
               next_piece(f, methods[m].piece_bytes, &at, &from, &n)) {
            /* past the page cache whole sectors only; it ends where the file does */
            r = prefetch_ring_begin(ring, o->map, o->fd, from,
                                    m == READ_DIRECT ? ALIGN_UP(n, PAGE) : n);
            if (r < 0)
                return error_set(err, -r, "io_uring: %s", strerror(-r));
        }
        if (prefetch_ring_n(ring) == 0)
            return 0;
        r = prefetch_ring_wait(ring);
        if (r < 0)
            return error_set(err, r == -EINVAL ? ENOSYS : -r, "io_uring: %s", strerror(-r));
    }
}

static uint64_t huge_bytes(void)
{
    CLEANUP(fclosep) FILE *f = fopen("/proc/self/smaps_rollup", "re");
    unsigned long long kib = 0;
    char line[256];

    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "FilePmdMapped: %llu kB", &kib) == 1)
            break;
    return kib * 1024;
}

static int read_once(enum read_method m, const struct read_file *f, struct read_time *ret,
                     struct error *err)
{
    CLEANUP(close_file) struct opened o = {.fd = -EBADF};
    double start;
    int r;

    r = open_file(&o, f, m == READ_DIRECT ? O_DIRECT : 0, err);
    if (r == -EINVAL)
        r = error_set(err, ENOSYS, "%s: O_DIRECT is not possible there", f->path);
    if (r == 0 && methods[m].ring != RING_READ && m != READ_PLAIN)
        r = map_file(&o, f, methods[m].huge, err);
    if (r < 0)
        return r;
    start = now_seconds();
    if (methods[m].ring >= 0)
        r = read_by_ring(&o, f, m, err);
    else if (m == READ_POPULATE)
        r = populate(&o, f, methods[m].piece_bytes, err);
    else if (m == READ_PLAIN)
        r = read_plainly(&o, f, methods[m].piece_bytes, err);
    else
        touch(&o, f);
    ret->read = now_seconds() - start;
    return r;
}

int read_file_by(enum read_method m, const struct read_file *f, struct read_time *ret,
                 struct error *err)
{
    CLEANUP(close_file) struct opened o = {.fd = -EBADF};
    double start, processor = processor_seconds();
    struct read_time t = {0};
    int r;

    r = read_once(m, f, &t, err);
    if (r == 0 && m != READ_DIRECT) {
        r = open_file(&o, f, 0, err);
        if (r == 0)
            r = map_file(&o, f, methods[m].huge, err);
        if (r < 0)
            return r;
        start = now_seconds();
        touch(&o, f);
        t.touch = now_seconds() - start;
        t.huge_bytes = huge_bytes();
    }
    t.processor = processor_seconds() - processor;
    if (r == 0)
        *ret = t;
    return r;
}

/* ---- forgetting ---- */

/* Of what is to be read. The kernel tells the owner, and who may write; else it says "all". */
static int resident_bytes(const struct read_file *f, uint64_t *ret, struct error *err)
{
    CLEANUP(close_file) struct opened o = {.fd = -EBADF};
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n_pages = (size_t)(f->size / page + 1);
    CLEANUP(freep) unsigned char *pages = calloc(n_pages, 1);
    uint64_t n = 0;
    int r;

    if (!pages)
        return error_set(err, ENOMEM, "out of memory");
    *ret = 0;
    if (access(f->path, W_OK) < 0)
        return 0;
    r = open_file(&o, f, 0, err);
    if (r == 0)
        r = map_file(&o, f, false, err);
    if (r < 0)
        return r;
    if (mincore((void *)o.map, f->size, pages) < 0)
        return 0;
    for (size_t i = 0; i < n_pages; i++)
        if (pages[i] & 1 && (i * page < f->skip_from || i * page >= f->skip_to))
            n += page;
    *ret = n;
    return 0;
}

static bool drop_everything(void)
{
    CLEANUP(closep) int fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);

    return fd >= 0 && write(fd, "3", 1) == 1;
}

int read_file_forget(const struct read_file *f, bool *ret_everything, uint64_t *ret_left,
                     struct error *err)
{
    CLEANUP(close_file) struct opened o = {.fd = -EBADF};
    int r;

    r = open_file(&o, f, 0, err);
    if (r < 0)
        return r;
    fdatasync(o.fd); /* what is not on the disk yet cannot be forgotten */
    *ret_everything = drop_everything();
    if (!*ret_everything && (r = posix_fadvise(o.fd, 0, 0, POSIX_FADV_DONTNEED)) != 0)
        return error_set(err, r, "%s: the kernel does not forget it: %s", f->path, strerror(r));
    return resident_bytes(f, ret_left, err);
}
