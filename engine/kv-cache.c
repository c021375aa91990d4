/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Pages come from slabs of about a megabyte, so that a growing session costs few system calls, and
 * go back to a free list. Slabs live as long as the pool: memory that was touched stays, at most
 * the budget, which is what the budget is for.
 */

#include "engine/kv-cache.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

#define SLAB_BYTES ((size_t)1 << 20)

struct kv_page {
    void *data; /* backend_alloc, inside its slab */
    uint32_t refs;
    struct kv_page *next_free; /* kv_pool::free */
};

struct slab {
    struct slab *next; /* kv_pool::slabs */
    void *data;
    uint32_t n;
    struct kv_page pages[];
};

struct kv_pool {
    struct backend *backend; /* the engine's */
    struct kv_shape shape;
    size_t page_bytes;
    uint64_t n_max, n_used, n_slab_pages;
    struct slab *slabs;
    struct kv_page *free;
};

int kv_pool_new(struct kv_pool **ret, struct backend *b, const struct kv_shape *shape,
                uint64_t bytes_max)
{
    struct kv_pool *p;
    size_t bytes = kv_page_bytes(shape);

    if (bytes_max < bytes)
        return -EINVAL;
    p = calloc(1, sizeof(*p));
    if (!p)
        return -ENOMEM;
    *p = (struct kv_pool){
        .backend = b, .shape = *shape, .page_bytes = bytes, .n_max = bytes_max / bytes};
    *ret = p;
    return 0;
}

struct kv_pool *kv_pool_free(struct kv_pool *p)
{
    if (!p)
        return NULL;
    assert(p->n_used == 0);
    for (struct slab *s = p->slabs, *next; s; s = next) {
        next = s->next;
        backend_release(p->backend, s->data, s->n * p->page_bytes);
        free(s);
    }
    free(p);
    return NULL;
}

const struct kv_shape *kv_pool_shape(const struct kv_pool *p)
{
    return &p->shape;
}

uint64_t kv_pool_bytes_used(const struct kv_pool *p)
{
    return p->n_used * p->page_bytes;
}

uint64_t kv_pool_bytes_max(const struct kv_pool *p)
{
    return p->n_max * p->page_bytes;
}

static int add_slab(struct kv_pool *p)
{
    uint64_t n = MAX(SLAB_BYTES / p->page_bytes, (size_t)1);
    struct slab *s;

    n = MIN(n, p->n_max - p->n_slab_pages);
    s = calloc(1, sizeof(*s) + n * sizeof(s->pages[0]));
    if (!s)
        return -ENOMEM;
    s->data = backend_alloc(p->backend, n * p->page_bytes);
    if (!s->data) {
        free(s);
        return -ENOMEM;
    }
    s->n = (uint32_t)n;
    for (uint64_t i = n; i-- > 0;) {
        s->pages[i].data = (char *)s->data + i * p->page_bytes;
        s->pages[i].next_free = p->free;
        p->free = &s->pages[i];
    }
    s->next = p->slabs;
    p->slabs = s;
    p->n_slab_pages += n;
    return 0;
}

static int page_get(struct kv_pool *p, struct kv_page **ret)
{
    struct kv_page *page;
    int r;

    if (p->n_used == p->n_max)
        return -ENOBUFS;
    if (!p->free) {
        r = add_slab(p);
        if (r < 0)
            return r;
    }
    page = p->free;
    p->free = page->next_free;
    page->refs = 1;
    p->n_used++;
    *ret = page;
    return 0;
}

static void page_unref(struct kv_pool *p, struct kv_page *page)
{
    if (!page || --page->refs > 0)
        return;
    page->next_free = p->free;
    p->free = page;
    p->n_used--;
}

int kv_cache_init(struct kv_cache *c, struct kv_pool *pool, const struct model_config *config)
{
    struct kv_layer *layers = calloc(config->n_layers_kv, sizeof(*layers));

    if (!layers)
        return -ENOMEM;
    for (uint32_t l = 0; l < config->n_layers_kv; l++)
        layers[l].sliding = config->layers[l].sliding;
    *c = (struct kv_cache){
        .pool = pool, .n_layers = config->n_layers_kv, .window = config->window, .layers = layers};
    return 0;
}

static void set_page(struct kv_layer *l, uint32_t i, struct kv_page *page)
{
    if (page)
        l->n_pages++;
    if (l->pages[i])
        l->n_pages--;
    l->pages[i] = page;
    l->data[i] = page ? page->data : NULL;
}

/* Drops pages [from, to) of the table. */
static void drop_pages(struct kv_cache *c, struct kv_layer *l, uint32_t from, uint32_t to)
{
    for (uint32_t i = from; i < to && i < l->n; i++) {
        page_unref(c->pool, l->pages[i]);
        set_page(l, i, NULL);
    }
}

static void shrink_to(struct kv_cache *c, struct kv_layer *l, uint32_t n)
{
    drop_pages(c, l, n, l->n);
    l->n = MIN(l->n, n);
}

void kv_cache_done(struct kv_cache *c)
{
    for (uint32_t i = 0; i < c->n_layers; i++) {
        shrink_to(c, &c->layers[i], 0);
        free(c->layers[i].pages);
        free(c->layers[i].data);
    }
    free(c->layers);
    *c = (struct kv_cache){0};
}

/* Makes the tables at least n entries long; what is new is NULL. */
static int grow_tables(struct kv_layer *l, uint32_t n)
{
    uint32_t allocated = MAX(n, l->allocated + l->allocated / 2);
    struct kv_page **pages;
    void **data;

    if (n <= l->allocated)
        return 0;
    pages = reallocarray(l->pages, allocated, sizeof(*pages));
    if (!pages)
        return -ENOMEM;
    l->pages = pages;
    data = reallocarray(l->data, allocated, sizeof(*data));
    if (!data)
        return -ENOMEM;
    l->data = data;
    for (uint32_t i = l->allocated; i < allocated; i++) {
        pages[i] = NULL;
        data[i] = NULL;
    }
    l->allocated = allocated;
    return 0;
}

int kv_cache_fork(struct kv_cache *dst, const struct kv_cache *src)
{
    for (uint32_t i = 0; i < src->n_layers; i++) {
        int r = grow_tables(&dst->layers[i], src->layers[i].n);

        if (r < 0)
            return r;
    }
    for (uint32_t i = 0; i < src->n_layers; i++) {
        const struct kv_layer *from = &src->layers[i];
        struct kv_layer *to = &dst->layers[i];

        for (uint32_t p = 0; p < from->n; p++) {
            if (from->pages[p])
                from->pages[p]->refs++;
            set_page(to, p, from->pages[p]);
        }
        to->n = from->n;
    }
    return 0;
}

/* One page made this layer's alone, with its contents kept. */
static int own_page(struct kv_cache *c, struct kv_layer *l, uint32_t i)
{
    struct kv_page *old = l->pages[i], *page;
    int r;

    if (old && old->refs == 1)
        return 0;
    r = page_get(c->pool, &page);
    if (r < 0)
        return r;
    if (old)
        memcpy(page->data, old->data, c->pool->page_bytes);
    else
        memset(page->data, 0, c->pool->page_bytes); /* kernels may load, and mask, what is unset */
    page_unref(c->pool, old);
    set_page(l, i, page);
    return 0;
}

int kv_cache_reserve(struct kv_cache *c, uint32_t from, uint32_t to)
{
    uint32_t first = from / KV_PAGE, n = DIV_ROUND_UP(to, KV_PAGE);
    uint32_t kept = DIV_ROUND_UP(from, KV_PAGE);
    int r = 0;

    for (uint32_t i = 0; i < c->n_layers && r == 0; i++) {
        struct kv_layer *l = &c->layers[i];

        r = grow_tables(l, n);
        if (r < 0)
            break;
        l->n = MAX(l->n, n);
        for (uint32_t p = first; p < n && r == 0; p++)
            r = own_page(c, l, p);
    }
    if (r < 0) /* only what lies wholly behind `from` was added and goes; a copied page may stay */
        for (uint32_t i = 0; i < c->n_layers; i++)
            shrink_to(c, &c->layers[i], kept);
    return r;
}

/* The first position that a token at n looks at in a sliding layer. */
static uint32_t window_start(const struct kv_cache *c, uint32_t n)
{
    return n >= c->window ? n - c->window + 1 : 0;
}

void kv_cache_trim(struct kv_cache *c, uint32_t n, uint32_t mark)
{
    uint32_t keep = window_start(c, n > KV_SLACK ? n - KV_SLACK : 0) / KV_PAGE;
    uint32_t mark_first = 0, mark_end = 0;

    if (mark != KV_NO_MARK) {
        mark_first = window_start(c, mark) / KV_PAGE;
        mark_end = DIV_ROUND_UP(mark, KV_PAGE);
    }
    for (uint32_t i = 0; i < c->n_layers; i++) {
        struct kv_layer *l = &c->layers[i];

        if (!l->sliding)
            continue;
        for (uint32_t p = 0; p < keep && p < l->n; p++)
            if (p < mark_first || p >= mark_end)
                drop_pages(c, l, p, p + 1);
    }
}

bool kv_cache_rewind(struct kv_cache *c, uint32_t n)
{
    bool whole = true;

    for (uint32_t i = 0; i < c->n_layers && whole; i++) {
        struct kv_layer *l = &c->layers[i];
        uint32_t first = l->sliding ? window_start(c, n) / KV_PAGE : 0;

        for (uint32_t p = first; p < DIV_ROUND_UP(n, KV_PAGE) && whole; p++)
            whole = p < l->n && l->pages[p];
    }
    for (uint32_t i = 0; i < c->n_layers; i++)
        shrink_to(c, &c->layers[i], whole ? DIV_ROUND_UP(n, KV_PAGE) : 0);
    return whole;
}

void kv_cache_drop(struct kv_cache *c)
{
    for (uint32_t i = 0; i < c->n_layers; i++)
        shrink_to(c, &c->layers[i], 0);
}

uint64_t kv_cache_bytes(const struct kv_cache *c)
{
    uint64_t n = 0;

    for (uint32_t i = 0; i < c->n_layers; i++)
        n += c->layers[i].n_pages;
    return n * c->pool->page_bytes;
}

/* Pages that n consecutive positions touch wherever they begin. */
static uint64_t pages_of_run(uint64_t n)
{
    return n == 0 ? 0 : (n + KV_PAGE - 2) / KV_PAGE + 1;
}

uint64_t kv_cache_bytes_max(const struct kv_shape *shape, const struct model_config *config,
                            uint32_t n, uint32_t n_rows)
{
    uint64_t whole = DIV_ROUND_UP((uint64_t)n, KV_PAGE), pages = 0, window = config->window;
    /* A sliding layer has, within a step, the window before what may be rewound, that and the
     * step's rows; and the window before the mark. */
    uint64_t sliding = pages_of_run(window + KV_SLACK + n_rows) + pages_of_run(window);

    for (uint32_t l = 0; l < config->n_layers_kv; l++)
        pages += config->layers[l].sliding ? MIN(whole, sliding) : whole;
    return pages * kv_page_bytes(shape);
}
