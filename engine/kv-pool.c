/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The memfd has its full size from the start: what was never touched costs nothing, and one mapping
 * serves for good. Pages that were never used come in order of their numbers; those that came back
 * go first, the last one first.
 *
 * In a device's memory, which is there from when it is allocated, pages come in chunks as they are
 * wanted. Once the device has failed, chunks are the process's own.
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
#define CHUNK ((size_t)32 << 20) /* bytes that a device sees, or gives, at a time */

struct header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t page_bytes, n_pages;
    struct kv_kind kind;
    uint64_t id;
    uint8_t gpu[KV_IDENTITY]; /* zeros: none has computed anything here */
};

struct page {
    uint32_t refs;
    uint32_t next_free; /* kv_pool::free */
    bool dirty;         /* may have memory that is not zero */
    bool retired;       /* never free again */
};

struct kv_pool {
    struct kv_shape shape;
    size_t page_bytes;
    uint32_t n_max, n_used, n_retired; /* retired ones are used as well */
    uint32_t n_begun;                  /* pages from here on were never taken, and have no memory */
    uint32_t free;                     /* the first of a list, or KV_NO_PAGE */
    struct page *pages;                /* [n_max], touched up to n_begun */
    bool is_adopted, left;
    struct kv_claim *claims; /* [n_max] while adopting, else NULL */
    int fd;
    struct header *header; /* the mapping; or malloc'ed */
    size_t map_bytes;
    uint8_t gpu[KV_IDENTITY]; /* this process's; zeros: none */

    struct backend *memory; /* gives the chunks; NULL: one chunk, in the mapping */
    char **chunks;          /* [n_chunks]; NULL: not wanted yet, or not any more */
    bool *is_ours;          /* [n_chunks] the chunk is the process's: `memory` has failed */
    uint32_t n_chunks, chunk_pages;

    struct backend *device; /* is told of the pages, in pieces; NULL: there is none */
    bool *told;             /* [pieces], with it */
    uint32_t piece_pages;
    bool must_tell; /* a page was taken that it does not see */
};

/* True: fd is a pool of just this header, but for its id and the GPU. */
static bool fits(int fd, const struct header *want, uint64_t size)
{
    struct header got;
    uint64_t got_size;

    if (sealed_memory_check(fd, &got_size) < 0 || got_size != size)
        return false;
    if (read_whole(fd, &got, sizeof(got), 0) < 0 || got.id == 0)
        return false;
    got.id = 0;
    memset(got.gpu, 0, sizeof(got.gpu));
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
    p->chunks[0] = start + DATA_AT;
    return 0;
}

static bool is_none(const uint8_t gpu[KV_IDENTITY])
{
    static const uint8_t none[KV_IDENTITY];

    return memcmp(gpu, none, sizeof(none)) == 0;
}

/* Where the pages lie; chunks of a device's come as they are wanted. */
static int new_chunks(struct kv_pool *p)
{
    p->chunk_pages = p->n_max;
    if (p->memory) {
        size_t limit = MIN(CHUNK, backend_map_limit(p->memory));

        p->chunk_pages = (uint32_t)MIN(MAX(limit / p->page_bytes, (size_t)1), (size_t)p->n_max);
    }
    p->n_chunks = DIV_ROUND_UP(p->n_max, p->chunk_pages);
    p->chunks = calloc(p->n_chunks, sizeof(*p->chunks));
    p->is_ours = calloc(p->n_chunks, sizeof(*p->is_ours));
    return p->chunks && p->is_ours ? 0 : -ENOMEM;
}

static int new_id(uint64_t *ret)
{
    do
        if (getrandom(ret, sizeof(*ret), 0) != (ssize_t)sizeof(*ret))
            return -EIO;
    while (*ret == 0);
    return 0;
}

/* The memfd, a former process's or a new one, and its mapping. */
static int open_memfd(struct kv_pool *p, const struct header *want, int fd)
{
    uint64_t size = ALIGN_UP(DATA_AT + p->n_max * (uint64_t)p->page_bytes, (uint64_t)MEMORY_PAGE);
    int r = 0;

    if (fd >= 0 && fits(fd, want, size)) {
        p->is_adopted = true;
        p->claims = calloc(p->n_max, sizeof(*p->claims));
        if (!p->claims)
            return -ENOMEM;
        p->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        r = p->fd < 0 ? -errno : 0;
    } else {
        p->fd = sealed_memory_new("llmd-kv", size);
        r = p->fd < 0 ? p->fd : 0;
    }
    return r < 0 ? r : map(p, size);
}

int kv_pool_new(struct kv_pool **ret, const struct kv_shape *shape, const struct kv_kind *kind,
                const struct kv_pool_options *options)
{
    struct kv_pool *p;
    size_t bytes = kv_page_bytes(shape);
    struct header want = {
        .version = VERSION, .header_bytes = sizeof(want), .page_bytes = bytes, .kind = *kind};
    int r;

    memcpy(want.magic, MAGIC, sizeof(want.magic));
    want.n_pages = MIN(options->bytes_max / bytes, (uint64_t)KV_NO_PAGE - 1);
    if (want.n_pages == 0)
        return -EINVAL;
    p = calloc(1, sizeof(*p));
    if (!p)
        return -ENOMEM;
    *p = (struct kv_pool){.shape = *shape,
                          .page_bytes = bytes,
                          .n_max = (uint32_t)want.n_pages,
                          .free = KV_NO_PAGE,
                          .fd = -EBADF,
                          .memory = options->memory};
    if (options->gpu)
        memcpy(p->gpu, options->gpu, sizeof(p->gpu));
    p->pages = calloc(p->n_max, sizeof(*p->pages));
    r = p->pages ? new_chunks(p) : -ENOMEM;
    if (r == 0 && p->memory) {
        p->header = calloc(1, sizeof(*p->header));
        r = p->header ? 0 : -ENOMEM;
    } else if (r == 0) {
        r = open_memfd(p, &want, options->fd);
    }
    if (r == 0 && !p->is_adopted) {
        r = new_id(&want.id);
        memcpy(want.gpu, p->gpu, sizeof(want.gpu));
        if (r == 0)
            *p->header = want;
    }
    if (r < 0) {
        kv_pool_free(p);
        return r;
    }
    *ret = p;
    return 0;
}

static void release_chunk(struct kv_pool *p, uint32_t chunk)
{
    size_t bytes = p->chunk_pages * p->page_bytes;

    if (p->is_ours[chunk])
        (void)munmap(p->chunks[chunk], bytes);
    else
        backend_release(p->memory, p->chunks[chunk], bytes);
    p->chunks[chunk] = NULL;
    p->is_ours[chunk] = false;
}

struct kv_pool *kv_pool_free(struct kv_pool *p)
{
    if (!p)
        return NULL;
    assert(p->n_used == p->n_retired || p->left);
    for (uint32_t i = 0; p->memory && p->chunks && p->is_ours && i < p->n_chunks; i++)
        release_chunk(p, i);
    if (p->memory)
        free(p->header);
    else if (p->header)
        (void)munmap(p->header, p->map_bytes);
    if (p->fd >= 0)
        close(p->fd);
    free(p->told);
    free(p->is_ours);
    free(p->chunks);
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
    return p->chunks[page / p->chunk_pages] + page % p->chunk_pages * p->page_bytes;
}

uint32_t kv_pool_page_of(const struct kv_pool *p, const void *data)
{
    uintptr_t at = (uintptr_t)data;
    uint32_t chunk = 0;

    for (; chunk + 1 < p->n_chunks; chunk++) {
        uintptr_t begin = (uintptr_t)p->chunks[chunk];

        if (begin && at >= begin && at - begin < p->chunk_pages * p->page_bytes)
            break;
    }
    return chunk * p->chunk_pages + (uint32_t)((at - (uintptr_t)p->chunks[chunk]) / p->page_bytes);
}

size_t kv_pool_page_bytes(const struct kv_pool *p)
{
    return p->page_bytes;
}

/* Of a device that has failed nothing more can be had, and it need not see what the processor
 * computes then. */
static char *new_own_chunk(size_t bytes)
{
    char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED)
        return NULL;
    (void)madvise(at, bytes, MADV_DONTDUMP); /* conversations */
    return at;
}

/* Whether the page has memory, which is had if need be. */
static bool have_chunk(struct kv_pool *p, uint32_t page)
{
    uint32_t i = page / p->chunk_pages;
    size_t bytes = p->chunk_pages * p->page_bytes;

    if (p->chunks[i])
        return true;
    if (!backend_failure(p->memory)) {
        p->chunks[i] = backend_alloc(p->memory, bytes);
    } else {
        p->chunks[i] = new_own_chunk(bytes);
        p->is_ours[i] = p->chunks[i];
    }
    return p->chunks[i];
}

int kv_pool_get(struct kv_pool *p, bool zero, uint32_t *ret)
{
    uint32_t n = p->free;

    assert(!p->claims);
    if (n != KV_NO_PAGE && have_chunk(p, n))
        p->free = p->pages[n].next_free;
    else if (p->n_begun < p->n_max && have_chunk(p, p->n_begun))
        n = p->n_begun++;
    else
        return -ENOBUFS;
    if (p->device && !p->told[n / p->piece_pages])
        p->must_tell = true;
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

void kv_pool_retire(struct kv_pool *p, uint32_t page)
{
    assert(p->pages[page].refs == 1);
    p->pages[page].refs = 0;
    p->pages[page].retired = true;
    p->n_retired++;
}

void kv_pool_reclaim(struct kv_pool *p)
{
    for (uint32_t i = 0; i < p->n_begun && p->n_retired > 0; i++) {
        if (!p->pages[i].retired)
            continue;
        p->pages[i].retired = false;
        p->n_retired--;
        p->n_used--;
        put_free(p, i);
    }
}

/* Whether somebody has a page of [from, to), or may still write to it. */
static bool has_taken(const struct kv_pool *p, uint32_t from, uint32_t to)
{
    for (uint32_t i = from; i < MIN(to, p->n_begun); i++)
        if (p->pages[i].refs > 0 || p->pages[i].retired)
            return true;
    return false;
}

/* The page behind the last of n from `from` on, as many as there are. */
static uint32_t end_of(const struct kv_pool *p, uint32_t from, uint32_t n)
{
    return from + MIN(n, p->n_max - from);
}

static int tell(struct kv_pool *p, uint32_t piece)
{
    uint32_t from = piece * p->piece_pages, n = end_of(p, from, p->piece_pages) - from;
    int r = backend_map(p->device, kv_pool_data(p, from), n * p->page_bytes, BACKEND_SHARED);

    if (r == 0)
        p->told[piece] = true;
    return r;
}

/* And whether it can be told of any page at all. */
static int begin_telling(struct kv_pool *p, struct backend *b)
{
    size_t limit = MIN(CHUNK, backend_map_limit(b));

    /* whose own pages of memory may not be whole ones */
    limit = limit > 2 * MEMORY_PAGE ? limit - 2 * MEMORY_PAGE : 0;
    p->piece_pages = (uint32_t)MIN(MAX(limit / p->page_bytes, (size_t)1), (size_t)p->n_max);
    p->told = calloc(DIV_ROUND_UP(p->n_max, p->piece_pages), sizeof(*p->told));
    if (!p->told)
        return -ENOMEM;
    p->device = b;
    p->must_tell = true;
    return tell(p, 0);
}

int kv_pool_map(struct kv_pool *p, struct backend *b)
{
    int r = 0;

    if (p->claims || p->memory == b)
        return 0;
    if (!p->device)
        r = begin_telling(p, b);
    for (uint32_t from = 0; r == 0 && p->must_tell && from < p->n_begun;
         from = end_of(p, from, p->piece_pages))
        if (!p->told[from / p->piece_pages] && has_taken(p, from, end_of(p, from, p->piece_pages)))
            r = tell(p, from / p->piece_pages);
    if (r == 0)
        p->must_tell = false;
    return r;
}

void kv_pool_unmap(struct kv_pool *p)
{
    free(TAKE_PTR(p->told));
    p->device = NULL;
}

bool kv_pool_takes_gpu(struct kv_pool *p, const uint8_t gpu[KV_IDENTITY])
{
    if (is_none(p->header->gpu))
        memcpy(p->header->gpu, gpu, sizeof(p->header->gpu));
    return memcmp(p->header->gpu, gpu, sizeof(p->header->gpu)) == 0;
}

const uint8_t *kv_pool_gpu(const struct kv_pool *p)
{
    return p->header->gpu;
}

bool kv_pool_adopts_gpu(const struct kv_pool *p)
{
    return is_none(p->gpu) || memcmp(p->header->gpu, p->gpu, sizeof(p->gpu)) == 0;
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

/* It has memory, which the device sees if there is one. */
static bool is_ready(const struct kv_pool *p, uint32_t page)
{
    return p->device ? p->told[page / p->piece_pages] : p->chunks[page / p->chunk_pages] != NULL;
}

/* Free pages that are come first, so that few stretches of memory are used. */
static void sort_free(struct kv_pool *p)
{
    p->free = KV_NO_PAGE;
    for (int ready = 0; ready < 2; ready++)
        for (uint32_t i = p->n_begun; i-- > 0;)
            if (p->pages[i].refs == 0 && !p->pages[i].retired && is_ready(p, i) == ready)
                put_free(p, i);
}

/* What it was told of, and has no page that is taken, is the device's no more. */
static void untell(struct kv_pool *p)
{
    for (uint32_t i = 0; i < DIV_ROUND_UP(p->n_max, p->piece_pages); i++) {
        uint32_t from = i * p->piece_pages;

        if (!p->told[i] || has_taken(p, from, end_of(p, from, p->piece_pages)))
            continue;
        backend_unmap(p->device, kv_pool_data(p, from));
        p->told[i] = false;
    }
    sort_free(p);
}

/* Those of which no page is taken. What a device gave that has failed since it may still write to.
 */
static uint64_t release_chunks(struct kv_pool *p)
{
    uint64_t bytes = 0;

    for (uint32_t c = 0; c < p->n_chunks; c++) {
        uint32_t from = c * p->chunk_pages, to = end_of(p, from, p->chunk_pages);

        if (!p->chunks[c] || has_taken(p, from, to) ||
            (backend_failure(p->memory) && !p->is_ours[c]))
            continue;
        release_chunk(p, c);
        bytes += p->chunk_pages * p->page_bytes;
        for (uint32_t i = from; i < MIN(to, p->n_begun); i++)
            p->pages[i].dirty = false;
    }
    if (bytes > 0)
        sort_free(p);
    return bytes;
}

uint64_t kv_pool_give_back(struct kv_pool *p)
{
    uint64_t before, after;
    uint32_t from = 0;

    if (p->claims)
        return 0;
    if (p->memory)
        return release_chunks(p);
    if (p->device)
        untell(p);
    before = bytes_held(p);
    for (uint32_t i = 0; i <= p->n_begun; i++) {
        if (i < p->n_begun && p->pages[i].refs == 0 && p->pages[i].dirty && !p->pages[i].retired &&
            !(p->device && p->told[i / p->piece_pages]))
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
    if (!is_none(p->gpu))
        memcpy(p->header->gpu, p->gpu, sizeof(p->gpu));
    for (p->n_begun = p->n_max; p->n_begun > 0 && p->pages[p->n_begun - 1].refs == 0; p->n_begun--)
        ;
    for (uint32_t i = p->n_begun; i-- > 0;) {
        p->pages[i].dirty = true;
        if (p->pages[i].refs == 0)
            put_free(p, i);
    }
    /* What was never begun counts as zeroed: to the end of the file, with the page's own edge. */
    end = DATA_AT + p->n_begun * (uint64_t)p->page_bytes;
    memset(p->chunks[0] + (end - DATA_AT), 0,
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
