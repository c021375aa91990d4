/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "engine/kv-cache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

int kv_cache_init(struct kv_cache *c, struct kv_pool *pool, const struct model_config *config,
                  struct session_memory *memory)
{
    struct kv_layer *layers = calloc(config->n_layers_kv, sizeof(*layers));

    if (!layers)
        return -ENOMEM;
    for (uint32_t l = 0; l < config->n_layers_kv; l++)
        layers[l].sliding = config->layers[l].sliding;
    *c = (struct kv_cache){.pool = pool,
                           .n_layers = config->n_layers_kv,
                           .window = config->window,
                           .layers = layers,
                           .memory = memory};
    return 0;
}

/* The store to memory comes after all that make the page's contents. */
static void write_entry(struct kv_cache *c, uint32_t layer, uint32_t i)
{
    struct session_memory *m = c->memory;
    const void *data = c->layers[layer].data[i];

    if (m)
        atomic_store_explicit(&m->tables[(size_t)layer * m->n_entries + i],
                              data ? kv_entry(kv_pool_page_of(c->pool, data), layer, i) : 0,
                              memory_order_release);
}

/* Gives the entry another page, or none (KV_NO_PAGE). Returns the one it had, or NULL: the caller's
 * to let go of. */
static void *change_page(struct kv_cache *c, uint32_t layer, uint32_t i, uint32_t page)
{
    struct kv_layer *l = &c->layers[layer];
    void *old = l->data[i];

    l->data[i] = page == KV_NO_PAGE ? NULL : kv_pool_data(c->pool, page);
    if (l->data[i])
        l->n_pages++;
    write_entry(c, layer, i);
    if (old)
        l->n_pages--;
    /* Another session may be given and fill it: only after this one has stopped to name it. */
    atomic_signal_fence(memory_order_seq_cst);
    return old;
}

/* The same, and lets go of the one it had. */
static void set_page(struct kv_cache *c, uint32_t layer, uint32_t i, uint32_t page)
{
    void *old = change_page(c, layer, i, page);

    if (old)
        kv_pool_unref(c->pool, kv_pool_page_of(c->pool, old));
}

/* Drops pages [from, to) of the table. */
static void drop_pages(struct kv_cache *c, uint32_t layer, uint32_t from, uint32_t to)
{
    for (uint32_t i = from; i < to && i < c->layers[layer].n; i++)
        if (c->layers[layer].data[i])
            set_page(c, layer, i, KV_NO_PAGE);
}

static void shrink_to(struct kv_cache *c, uint32_t layer, uint32_t n)
{
    struct kv_layer *l = &c->layers[layer];

    drop_pages(c, layer, n, l->n);
    l->n = MIN(l->n, n);
}

void kv_cache_done(struct kv_cache *c)
{
    for (uint32_t i = 0; i < c->n_layers; i++) {
        shrink_to(c, i, 0);
        free(c->layers[i].data);
    }
    free(c->layers);
    *c = (struct kv_cache){0};
}

/* Makes the tables at least n entries long; what is new is NULL. */
static int grow_tables(struct kv_layer *l, uint32_t n)
{
    uint32_t allocated = MAX(n, l->allocated + l->allocated / 2);
    void **data;

    if (n <= l->allocated)
        return 0;
    data = reallocarray(l->data, allocated, sizeof(*data));
    if (!data)
        return -ENOMEM;
    l->data = data;
    for (uint32_t i = l->allocated; i < allocated; i++)
        data[i] = NULL;
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

        for (uint32_t p = 0; p < from->n; p++) {
            uint32_t page;

            if (!from->data[p])
                continue;
            page = kv_pool_page_of(src->pool, from->data[p]);
            kv_pool_ref(src->pool, page);
            set_page(dst, i, p, page);
        }
        dst->layers[i].n = from->n;
    }
    return 0;
}

/* One page made this layer's alone, with its contents kept. */
static int own_page(struct kv_cache *c, uint32_t layer, uint32_t i)
{
    void *old = c->layers[layer].data[i];
    uint32_t page;
    int r;

    if (old && !kv_pool_is_shared(c->pool, kv_pool_page_of(c->pool, old)))
        return 0;
    /* Zeroed when new: kernels may load, and mask, what is unset. */
    r = kv_pool_get(c->pool, !old, &page);
    if (r < 0)
        return r;
    if (old)
        memcpy(kv_pool_data(c->pool, page), old, kv_pool_page_bytes(c->pool));
    set_page(c, layer, i, page);
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
            r = own_page(c, i, p);
    }
    if (r < 0) /* only what lies wholly behind `from` was added and goes; a copied page may stay */
        for (uint32_t i = 0; i < c->n_layers; i++)
            shrink_to(c, i, kept);
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
                drop_pages(c, i, p, p + 1);
    }
}

bool kv_cache_holds(const struct kv_cache *c, uint32_t n)
{
    for (uint32_t i = 0; i < c->n_layers; i++) {
        const struct kv_layer *l = &c->layers[i];
        uint32_t first = l->sliding ? window_start(c, n) / KV_PAGE : 0;

        for (uint32_t p = first; p < DIV_ROUND_UP(n, KV_PAGE); p++)
            if (p >= l->n || !l->data[p])
                return false;
    }
    return true;
}

void kv_cache_cut(struct kv_cache *c, uint32_t n)
{
    for (uint32_t i = 0; i < c->n_layers; i++)
        shrink_to(c, i, DIV_ROUND_UP(n, KV_PAGE));
}

int kv_cache_retire(struct kv_cache *c, uint32_t from, uint32_t to)
{
    uint32_t first = from / KV_PAGE, copies[MODEL_MAX_LAYERS], n = 0;
    int r = 0;

    /* A copy of what stands before `from` in each layer: all of them, or none is of use. */
    for (; from % KV_PAGE != 0 && n < c->n_layers && r == 0; n++)
        r = kv_pool_get(c->pool, false, &copies[n]);
    if (r < 0) {
        for (n--; n-- > 0;)
            kv_pool_unref(c->pool, copies[n]);
        return r;
    }
    for (uint32_t i = 0; i < c->n_layers; i++) {
        struct kv_layer *l = &c->layers[i];

        for (uint32_t p = first; p < MIN(l->n, DIV_ROUND_UP(to, KV_PAGE)); p++) {
            bool is_kept = p == first && n > 0;
            void *old = l->data[p];

            if (!old) {
                if (is_kept)
                    kv_pool_unref(c->pool, copies[i]);
                continue;
            }
            if (is_kept)
                memcpy(kv_pool_data(c->pool, copies[i]), old, kv_pool_page_bytes(c->pool));
            change_page(c, i, p, is_kept ? copies[i] : KV_NO_PAGE);
            kv_pool_retire(c->pool, kv_pool_page_of(c->pool, old));
        }
    }
    return 0;
}

void kv_cache_drop(struct kv_cache *c)
{
    kv_cache_cut(c, 0);
}

/* Takes one entry's page over. False: it is not sound. */
static bool claim(struct kv_cache *c, uint32_t layer, uint32_t i, uint32_t n)
{
    const struct session_memory *m = c->memory;
    uint64_t entry = atomic_load(&m->tables[(size_t)layer * m->n_entries + i]);
    uint32_t end = MIN(n, (i + 1) * KV_PAGE), page;
    struct kv_claim what = {
        .layer = layer,
        .index = i,
        .n_valid = end - i * KV_PAGE,
        .before = session_memory_check(m, i * KV_PAGE),
        .behind = session_memory_check(m, end),
    };

    if (entry == 0)
        return true;
    if (!kv_entry_page(entry, layer, i, &page) || !kv_pool_claim(c->pool, page, &what))
        return false;
    c->layers[layer].data[i] = kv_pool_data(c->pool, page);
    c->layers[layer].n_pages++;
    return true;
}

int kv_cache_adopt(struct kv_cache *c, uint32_t n)
{
    uint32_t n_entries = DIV_ROUND_UP(n, KV_PAGE);
    struct session_memory *memory = c->memory;
    bool sound = true;

    for (uint32_t i = 0; i < c->n_layers; i++) {
        int r = grow_tables(&c->layers[i], n_entries);

        if (r < 0)
            return r;
    }
    for (uint32_t i = 0; i < c->n_layers; i++) {
        c->layers[i].n = n_entries;
        for (uint32_t p = 0; p < n_entries && sound; p++)
            sound = claim(c, i, p, n);
    }
    if (sound && kv_cache_holds(c, n))
        return 1;
    c->memory = NULL; /* which stays as it was */
    kv_cache_drop(c);
    c->memory = memory;
    return 0;
}

void kv_cache_write_tables(struct kv_cache *c)
{
    struct session_memory *m = c->memory;

    for (uint32_t i = 0; i < c->n_layers; i++)
        for (uint32_t p = 0; p < m->n_entries; p++) {
            _Atomic uint64_t *entry = &m->tables[(size_t)i * m->n_entries + p];

            if (p < c->layers[i].n)
                write_entry(c, i, p);
            else if (atomic_load_explicit(entry, memory_order_relaxed) != 0)
                atomic_store_explicit(entry, 0, memory_order_release);
        }
}

int kv_cache_put(struct kv_cache *c, uint32_t layer, uint32_t index, uint32_t page)
{
    struct kv_layer *l = &c->layers[layer];
    int r = grow_tables(l, index + 1);

    if (r < 0)
        return r;
    l->n = MAX(l->n, index + 1);
    set_page(c, layer, index, page);
    return 0;
}

void kv_cache_leave(struct kv_cache *c)
{
    for (uint32_t i = 0; i < c->n_layers; i++)
        c->layers[i].n = c->layers[i].n_pages = 0;
}

uint64_t kv_cache_bytes(const struct kv_cache *c)
{
    uint64_t n = 0;

    for (uint32_t i = 0; i < c->n_layers; i++)
        n += c->layers[i].n_pages;
    return n * kv_pool_page_bytes(c->pool);
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
