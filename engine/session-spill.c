/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * K and V of a session in a file: header, list of the pages' places, the pages, and SHA-256 of all
 * of it. Numbers are the machine's: the file never leaves it. What is being transferred is
 * remembered in the session between two pieces.
 */

#include <errno.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/whole-io.h"
#include "engine/engine-internal.h"
#include "engine/session.h"

#define MAGIC "llmd-sp\n"
#define VERSION 2u
#define DIGEST 32u

struct header {
    char magic[8];
    uint32_t version, header_bytes;
    struct kv_kind kind;
    uint32_t n_layers, window;
    uint32_t n_cached; /* tokens whose K and V these are */
    uint32_t check;    /* of these tokens */
    uint32_t n_pages;
    uint32_t lanes;           /* session_lanes() */
    uint8_t gpu[KV_IDENTITY]; /* where one was among them: which */
};

struct place {
    uint32_t layer, index; /* ascending in this order */
};

struct session_transfer {
    bool writes;
    struct header header;
    struct place *places; /* [n_pages] */
    uint32_t *pages;      /* [n_read]: read so far, held by the transfer; NULL when writing */
    uint32_t n_done;
    EVP_MD_CTX *hash;
    struct kv_pool *pool; /* the engine's */
};

static void transfer_free(struct session_transfer *t)
{
    if (t->pages)
        for (uint32_t i = 0; i < t->n_done; i++)
            kv_pool_unref(t->pool, t->pages[i]);
    free(t->places);
    free(t->pages);
    EVP_MD_CTX_free(t->hash);
    free(t);
}

DEFINE_CLEANUP(struct session_transfer *, transfer_free)

void session_end_transfer(struct session *s)
{
    if (s->transfer)
        transfer_free(TAKE_PTR(s->transfer));
}

static int new_transfer(struct session_transfer **ret, struct session *s, bool writes)
{
    CLEANUP(transfer_freep) struct session_transfer *t = calloc(1, sizeof(*t));

    if (!t)
        return -ENOMEM;
    t->writes = writes;
    t->pool = s->engine->pool;
    t->hash = EVP_MD_CTX_new();
    if (!t->hash || EVP_DigestInit_ex(t->hash, EVP_sha256(), NULL) != 1)
        return -ENOMEM;
    *ret = TAKE_PTR(t);
    return 0;
}

/* What the file begins with, but for the number of pages. */
static void fill_header(struct header *h, const struct session *s, uint32_t n_cached,
                        uint32_t lanes)
{
    memset(h, 0, sizeof(*h));
    memcpy(h->magic, MAGIC, sizeof(h->magic));
    h->version = VERSION;
    h->header_bytes = sizeof(*h);
    h->kind = *kv_pool_kind(s->engine->pool);
    h->n_layers = s->kv.n_layers;
    h->window = s->kv.window;
    h->n_cached = n_cached;
    h->check = session_memory_check(&s->memory, n_cached);
    h->lanes = lanes;
    if (lanes & 1u << LANE_GPU)
        memcpy(h->gpu, kv_pool_gpu(s->engine->pool), sizeof(h->gpu));
}

static uint64_t page_at(const struct session_transfer *t, uint32_t page)
{
    return sizeof(struct header) + (uint64_t)t->header.n_pages * sizeof(struct place) +
           page * (uint64_t)kv_pool_page_bytes(t->pool);
}

static int write_at(struct session_transfer *t, int fd, const void *data, size_t n, uint64_t at)
{
    if (EVP_DigestUpdate(t->hash, data, n) != 1)
        return -EIO;
    return write_whole(fd, data, n, at);
}

/* -EBADMSG: the file is shorter */
static int read_at(struct session_transfer *t, int fd, void *data, size_t n, uint64_t at)
{
    int r = read_whole(fd, data, n, at);

    if (r < 0)
        return r == -ENODATA ? -EBADMSG : r;
    return EVP_DigestUpdate(t->hash, data, n) == 1 ? 0 : -EIO;
}

static int digest(struct session_transfer *t, uint8_t ret[DIGEST])
{
    return EVP_DigestFinal_ex(t->hash, ret, NULL) == 1 ? 0 : -EIO;
}

/* The list of places, and the file's beginning. */
static int begin_spill(struct session *s, int fd)
{
    CLEANUP(transfer_freep) struct session_transfer *t = NULL;
    uint32_t n = 0, n_entries = DIV_ROUND_UP(s->n_cached, KV_PAGE);
    int r = new_transfer(&t, s, true);

    if (r < 0)
        return r;
    fill_header(&t->header, s, s->n_cached, s->lanes);
    for (uint32_t l = 0; l < s->kv.n_layers; l++)
        n += s->kv.layers[l].n_pages;
    t->places = reallocarray(NULL, MAX(n, 1u), sizeof(*t->places));
    if (!t->places)
        return -ENOMEM;
    n = 0;
    for (uint32_t l = 0; l < s->kv.n_layers; l++)
        for (uint32_t i = 0; i < MIN(n_entries, s->kv.layers[l].n); i++)
            if (s->kv.layers[l].data[i])
                t->places[n++] = (struct place){l, i};
    t->header.n_pages = n;
    if (ftruncate(fd, 0) < 0)
        return -errno;
    r = write_at(t, fd, &t->header, sizeof(t->header), 0);
    if (r == 0)
        r = write_at(t, fd, t->places, n * sizeof(*t->places), sizeof(t->header));
    if (r == 0)
        s->transfer = TAKE_PTR(t);
    return r;
}

static int spill(struct session *s, int fd, uint64_t n_bytes)
{
    struct session_transfer *t = s->transfer;
    size_t bytes = kv_pool_page_bytes(t->pool);
    uint8_t sum[DIGEST];
    uint64_t n = 0;
    int r;

    while (t->n_done < t->header.n_pages) {
        struct place p = t->places[t->n_done];

        if (n > 0 && n + bytes > n_bytes)
            return 1;
        r = write_at(t, fd, s->kv.layers[p.layer].data[p.index], bytes, page_at(t, t->n_done));
        if (r < 0)
            return r;
        t->n_done++;
        n += bytes;
    }
    r = digest(t, sum);
    if (r == 0)
        r = write_at(t, fd, sum, sizeof(sum), page_at(t, t->n_done));
    return r;
}

/* What has been written so far is there: whoever gave up may come again with another file. */
static bool goes_on(const struct session_transfer *t, int fd)
{
    struct stat st;

    return t->writes && fstat(fd, &st) == 0 && st.st_size >= 0 &&
           (uint64_t)st.st_size == page_at(t, t->n_done);
}

int session_spill(struct session *s, int fd, uint64_t n_bytes)
{
    int r;

    session_settle(s);
    if (s->transfer && !goes_on(s->transfer, fd))
        session_end_transfer(s);
    r = s->transfer ? 0 : begin_spill(s, fd);
    if (r == 0)
        r = spill(s, fd, n_bytes);
    if (r < 0)
        session_end_transfer(s);
    else if (r == 0)
        session_drop_kv(s);
    return r;
}

/* Only places that a session of n_cached tokens may have, each once. */
static bool places_sound(const struct session *s, const struct session_transfer *t)
{
    uint32_t n_entries = DIV_ROUND_UP(t->header.n_cached, KV_PAGE);

    for (uint32_t i = 0; i < t->header.n_pages; i++) {
        const struct place *p = &t->places[i];

        if (p->layer >= s->kv.n_layers || p->index >= n_entries)
            return false;
        if (i > 0 &&
            (p->layer < p[-1].layer || (p->layer == p[-1].layer && p->index <= p[-1].index)))
            return false;
    }
    return true;
}

/* Header and places, checked for what they ask for; what they say is trusted only at the end. */
static int begin_unspill(struct session *s, int fd)
{
    CLEANUP(transfer_freep) struct session_transfer *t = NULL;
    struct header want, *h;
    uint64_t most, size;
    struct stat st;
    int r = new_transfer(&t, s, false);

    if (r < 0)
        return r;
    h = &t->header;
    if (fstat(fd, &st) < 0)
        return -errno;
    r = read_at(t, fd, h, sizeof(*h), 0);
    if (r < 0)
        return r;
    if (h->n_cached > s->n_tokens)
        return -EBADMSG;
    if (h->lanes & 1u << LANE_GPU && !kv_pool_takes_gpu(t->pool, h->gpu))
        return -EBADMSG;
    fill_header(&want, s, h->n_cached, h->lanes);
    want.n_pages = h->n_pages;
    most = (uint64_t)s->kv.n_layers * DIV_ROUND_UP(h->n_cached, KV_PAGE);
    if (memcmp(h, &want, sizeof(want)) != 0 || h->n_pages > most)
        return -EBADMSG;
    size = page_at(t, h->n_pages) + DIGEST;
    if (st.st_size < 0 || (uint64_t)st.st_size != size)
        return -EBADMSG;
    t->places = reallocarray(NULL, MAX(h->n_pages, 1u), sizeof(*t->places));
    t->pages = reallocarray(NULL, MAX(h->n_pages, 1u), sizeof(*t->pages));
    if (!t->places || !t->pages)
        return -ENOMEM;
    r = read_at(t, fd, t->places, h->n_pages * sizeof(*t->places), sizeof(*h));
    if (r < 0)
        return r;
    if (!places_sound(s, t))
        return -EBADMSG;
    s->transfer = TAKE_PTR(t);
    return 0;
}

/* All of the file has been checked: its pages become the session's. */
static int take_pages(struct session *s)
{
    struct session_transfer *t = s->transfer;
    uint32_t n_cached = t->header.n_cached, lanes = t->header.lanes;
    int r = 0;

    for (uint32_t i = 0; i < t->header.n_pages && r == 0; i++) {
        kv_pool_ref(t->pool, t->pages[i]); /* the transfer's own goes with it */
        r = kv_cache_put(&s->kv, t->places[i].layer, t->places[i].index, t->pages[i]);
        if (r < 0)
            kv_pool_unref(t->pool, t->pages[i]);
    }
    if (r == 0 && !kv_cache_holds(&s->kv, n_cached))
        r = -EBADMSG;
    session_end_transfer(s);
    if (r < 0) {
        kv_cache_drop(&s->kv);
        return r;
    }
    session_add_lanes(s, lanes);
    session_set_cached(s, n_cached);
    return 0;
}

static int unspill(struct session *s, int fd, uint64_t n_bytes)
{
    struct session_transfer *t = s->transfer;
    size_t bytes = kv_pool_page_bytes(t->pool);
    uint8_t sum[DIGEST], got[DIGEST];
    uint64_t n = 0;
    int r;

    while (t->n_done < t->header.n_pages) {
        uint32_t page;

        if (n > 0 && n + bytes > n_bytes)
            return 1;
        r = kv_pool_get(t->pool, false, &page);
        if (r < 0)
            return r;
        t->pages[t->n_done] = page;
        r = read_at(t, fd, kv_pool_data(t->pool, page), bytes, page_at(t, t->n_done++));
        if (r < 0)
            return r;
        n += bytes;
    }
    r = digest(t, sum);
    if (r < 0)
        return r;
    switch (pread(fd, got, sizeof(got), (off_t)page_at(t, t->n_done))) {
    case sizeof(got):
        break;
    case -1:
        return -errno;
    default:
        return -EBADMSG;
    }
    if (memcmp(sum, got, sizeof(sum)) != 0)
        return -EBADMSG;
    return take_pages(s);
}

int session_unspill(struct session *s, int fd, uint64_t n_bytes)
{
    int r;

    session_settle(s);
    if (s->n_cached > 0 || kv_pool_is_adopting(s->engine->pool))
        return -EINVAL;
    if (s->transfer && s->transfer->writes)
        session_end_transfer(s);
    if (!s->transfer)
        kv_cache_drop(&s->kv);
    r = s->transfer ? 0 : begin_unspill(s, fd);
    if (r == 0)
        r = unspill(s, fd, n_bytes);
    if (r < 0)
        session_end_transfer(s);
    return r;
}
