/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The memfd has its full size from the start: what was never touched costs nothing, and one mapping
 * serves for good. Pages that were never used come in order of their numbers; those that came back
 * go first, the last one first.
 */

#include "engine/kv-pool.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/sealed-memory.h"
#include "base/whole-io.h"

#define MAGIC "llmd-kv\n"
#define VERSION 1u
#define DATA_AT ((uint64_t)2 << 20) /* pages begin where a huge page may */
#define MEMORY_PAGE 4096u

struct header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t page_bytes, n_pages;
    struct kv_kind kind;
    uint64_t id;
};

struct page {
    uint32_t refs;
    uint32_t next_free; /* kv_pool::free */
    bool dirty;         /* may have memory that is not zero */
};

struct kv_pool {
    struct kv_shape shape;
    size_t page_bytes;
    uint32_t n_max, n_used;
    uint32_t n_begun;   /* pages from here on were never taken, and have no memory */
    uint32_t free;      /* the first of a list, or KV_NO_PAGE */
    struct page *pages; /* [n_max], touched up to n_begun */
    bool is_adopted, left;
    struct kv_claim *claims; /* [n_max] while adopting, else NULL */
    int fd;
    struct header *header; /* the mapping */
    size_t map_bytes;
    char *data;
};

/* True: fd is a pool of just this header, but for its id. */
static bool fits(int fd, const struct header *want, uint64_t size)
{
    struct header got;
    uint64_t got_size;

    if (sealed_memory_check(fd, &got_size) < 0 || got_size != size)
        return false;
    if (read_whole(fd, &got, sizeof(got), 0) < 0 || got.id == 0)
        return false;
    got.id = 0;
    return memcmp(&got, want, sizeof(got)) == 0;
}

/* Maps fd so that the pages are aligned to huge pages. */
static int map(struct kv_pool *p, uint64_t size)
{
    size_t room;
    char *at, *start;

    if (ckd_add(&room, size, DATA_AT))
        return -ENOMEM;
    at = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return -ENOMEM;
    start = at + (-(uintptr_t)at & (DATA_AT - 1));
    if (mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, p->fd,
             0) == MAP_FAILED) {
        (void)munmap(at, room);
        return -ENOMEM;
    }
    if (start > at)
        (void)munmap(at, (size_t)(start - at));
    if (start + size < at + room)
        (void)munmap(start + size, (size_t)(at + room - start) - size);
    (void)madvise(start, size, MADV_DONTDUMP); /* conversations */
    (void)madvise(start, size, MADV_HUGEPAGE); /* a wish, where shared memory has them */
    p->header = (struct header *)(void *)start;
    p->map_bytes = size;
    p->data = start + DATA_AT;
    return 0;
}

int kv_pool_new(struct kv_pool **ret, const struct kv_shape *shape, const struct kv_kind *kind,
                uint64_t bytes_max, int fd)
{
    struct kv_pool *p;
    size_t bytes = kv_page_bytes(shape);
    struct header want = {
        .version = VERSION, .header_bytes = sizeof(want), .page_bytes = bytes, .kind = *kind};
    uint64_t size;
    int r;

    memcpy(want.magic, MAGIC, sizeof(want.magic));
    want.n_pages = MIN(bytes_max / bytes, (uint64_t)KV_NO_PAGE - 1);
    if (want.n_pages == 0)
        return -EINVAL;
    size = ALIGN_UP(DATA_AT + want.n_pages * bytes, (uint64_t)MEMORY_PAGE);
    p = calloc(1, sizeof(*p));
    if (!p)
        return -ENOMEM;
    *p = (struct kv_pool){.shape = *shape,
                          .page_bytes = bytes,
                          .n_max = (uint32_t)want.n_pages,
                          .free = KV_NO_PAGE,
                          .fd = -EBADF};
    p->pages = calloc(p->n_max, sizeof(*p->pages));
    r = p->pages ? 0 : -ENOMEM;
    if (r == 0 && fd >= 0 && fits(fd, &want, size)) {
        p->is_adopted = true;
        p->claims = calloc(p->n_max, sizeof(*p->claims));
        p->fd = p->claims ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -EBADF;
        r = p->fd < 0 ? (p->claims ? -errno : -ENOMEM) : 0;
    } else if (r == 0) {
        do
            r = getrandom(&want.id, sizeof(want.id), 0) == (ssize_t)sizeof(want.id) ? 0 : -EIO;
        while (r == 0 && want.id == 0);
        p->fd = r == 0 ? sealed_memory_new("llmd-kv", size) : r;
        r = p->fd < 0 ? p->fd : 0;
    }
    if (r == 0)
        r = map(p, size);
    if (r < 0) {
        kv_pool_free(p);
        return r;
    }
    if (!p->is_adopted)
        *p->header = want;
    *ret = p;
    return 0;
}

struct kv_pool *kv_pool_free(struct kv_pool *p)
{
    if (!p)
        return NULL;
    assert(p->n_used == 0 || p->left);
    if (p->header)
        (void)munmap(p->header, p->map_bytes);
    if (p->fd >= 0)
        close(p->fd);
    free(p->claims);
    free(p->pages);
    free(p);
    return NULL;
}

const struct kv_shape *kv_pool_shape(const struct kv_pool *p)
{
    return &p->shape;
}

const struct kv_kind *kv_pool_kind(const struct kv_pool *p)
{
    return &p->header->kind;
}

uint64_t kv_pool_bytes_used(const struct kv_pool *p)
{
    return (uint64_t)p->n_used * p->page_bytes;
}

uint64_t kv_pool_bytes_max(const struct kv_pool *p)
{
    return (uint64_t)p->n_max * p->page_bytes;
}

int kv_pool_fd(const struct kv_pool *p)
{
    return p->fd;
}

uint64_t kv_pool_id(const struct kv_pool *p)
{
    return p->header->id;
}

bool kv_pool_is_adopted(const struct kv_pool *p)
{
    return p->is_adopted;
}

bool kv_pool_is_adopting(const struct kv_pool *p)
{
    return p->claims != NULL;
}

void *kv_pool_data(const struct kv_pool *p, uint32_t page)
{
    return p->data + page * p->page_bytes;
}

uint32_t kv_pool_page_of(const struct kv_pool *p, const void *data)
{
    return (uint32_t)((size_t)((const char *)data - p->data) / p->page_bytes);
}

size_t kv_pool_page_bytes(const struct kv_pool *p)
{
    return p->page_bytes;
}

int kv_pool_get(struct kv_pool *p, bool zero, uint32_t *ret)
{
    uint32_t n = p->free;

    assert(!p->claims);
    if (n != KV_NO_PAGE)
        p->free = p->pages[n].next_free;
    else if (p->n_begun < p->n_max)
        n = p->n_begun++;
    else
        return -ENOBUFS;
    if (zero && p->pages[n].dirty)
        memset(kv_pool_data(p, n), 0, p->page_bytes);
    p->pages[n].refs = 1;
    p->pages[n].dirty = true;
    p->n_used++;
    *ret = n;
    return 0;
}

void kv_pool_ref(struct kv_pool *p, uint32_t page)
{
    p->pages[page].refs++;
}

static void put_free(struct kv_pool *p, uint32_t page)
{
    p->pages[page].next_free = p->free;
    p->free = page;
}

void kv_pool_unref(struct kv_pool *p, uint32_t page)
{
    if (--p->pages[page].refs > 0)
        return;
    p->n_used--;
    if (!p->claims) /* else the list is made at the end */
        put_free(p, page);
}

bool kv_pool_is_shared(const struct kv_pool *p, uint32_t page)
{
    return p->pages[page].refs > 1;
}

bool kv_pool_claim(struct kv_pool *p, uint32_t page, const struct kv_claim *claim)
{
    struct kv_claim *c;

    if (!p->claims || page >= p->n_max)
        return false;
    c = &p->claims[page];
    if (p->pages[page].refs == 0) {
        *c = *claim;
        p->n_used++;
    } else if (c->layer != claim->layer || c->index != claim->index || c->before != claim->before ||
               (c->n_valid == claim->n_valid && c->behind != claim->behind)) {
        return false;
    }
    p->pages[page].refs++;
    return true;
}

/* Returns the memory of pages [from, to), none of them taken. */
static void punch(struct kv_pool *p, uint32_t from, uint32_t to)
{
    uint64_t start = DATA_AT + from * (uint64_t)p->page_bytes;
    uint64_t end = DATA_AT + to * (uint64_t)p->page_bytes;

    start = ALIGN_UP(start, (uint64_t)MEMORY_PAGE);
    end &= ~(uint64_t)(MEMORY_PAGE - 1);
    if (start >= end || fallocate(p->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start,
                                  (off_t)(end - start)) < 0)
        return; /* a page smaller than the system's; the rest cannot fail but for a filter */
    for (uint32_t i = from; i < to; i++) {
        uint64_t at = DATA_AT + i * (uint64_t)p->page_bytes;

        p->pages[i].dirty = at < start || at + p->page_bytes > end;
    }
}

static uint64_t bytes_held(const struct kv_pool *p)
{
    struct stat st;

    return fstat(p->fd, &st) < 0 ? 0 : (uint64_t)st.st_blocks * 512;
}

uint64_t kv_pool_give_back(struct kv_pool *p)
{
    uint64_t before = bytes_held(p), after;
    uint32_t from = 0;

    if (p->claims)
        return 0;
    for (uint32_t i = 0; i <= p->n_begun; i++) {
        if (i < p->n_begun && p->pages[i].refs == 0 && p->pages[i].dirty)
            continue;
        if (i > from)
            punch(p, from, i);
        from = i + 1;
    }
    after = bytes_held(p);
    return before > after ? before - after : 0;
}

void kv_pool_adopted_all(struct kv_pool *p)
{
    uint64_t end;

    if (!p->claims)
        return;
    free(TAKE_PTR(p->claims));
    for (p->n_begun = p->n_max; p->n_begun > 0 && p->pages[p->n_begun - 1].refs == 0; p->n_begun--)
        ;
    for (uint32_t i = p->n_begun; i-- > 0;) {
        p->pages[i].dirty = true;
        if (p->pages[i].refs == 0)
            put_free(p, i);
    }
    /* What was never begun counts as zeroed: to the end of the file, with the page's own edge. */
    end = DATA_AT + p->n_begun * (uint64_t)p->page_bytes;
    memset(p->data + (end - DATA_AT), 0,
           MIN(ALIGN_UP(end, (uint64_t)MEMORY_PAGE), (uint64_t)p->map_bytes) - end);
    end = ALIGN_UP(end, (uint64_t)MEMORY_PAGE);
    if (end < p->map_bytes && fallocate(p->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                        (off_t)end, (off_t)(p->map_bytes - end)) < 0)
        for (uint32_t i = p->n_begun; i < p->n_max; i++)
            p->pages[i].dirty = true;
    kv_pool_give_back(p);
}

void kv_pool_leave(struct kv_pool *p)
{
    p->left = true;
}
