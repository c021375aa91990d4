/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * kv_cache: one session's page tables, one per layer that owns K and V. Embedded in the session.
 *
 * A page holds KV_PAGE consecutive positions of one layer (backends/backend.h). Full-attention
 * layers keep all pages. Sliding layers keep those that overlap the window before the next token
 * (and KV_SLACK tokens more, and the window before a mark), which makes the table a ring of pages:
 * no position is ever overwritten while a token of the same step may still look at it.
 *
 * Pages are reference-counted (engine/kv-pool.h). Forking shares them all; kv_cache_reserve()
 * copies a shared page before its first write.
 *
 * Of each table there is a second one in the session's memory, for the process that takes it over
 * (engine/session-memory.h). A page is entered there when its contents are right, and taken out
 * before its reference is given up: no page that somebody else may get is ever named. Whoever calls
 * sees to it that the number of tokens cached in that memory is no larger than what will be left,
 * before pages go. Engine thread.
 */

#include <stdbool.h>
#include <stdint.h>

#include "backends/backend.h"
#include "engine/kv-pool.h"
#include "engine/model-config.h"
#include "engine/session-memory.h"

#define KV_SLACK 64 /* tokens a session may always rewind without recomputing */
#define KV_NO_MARK UINT32_MAX

struct kv_layer {
    bool sliding;
    uint32_t n; /* entries of the tables: pages up to the last position reserved */
    uint32_t allocated;
    uint32_t n_pages; /* entries that are a page */
    void **data;      /* [allocated], pages' memory; NULL: dropped or not there yet */
};

struct kv_cache {
    struct kv_pool *pool; /* the engine's */
    uint32_t n_layers;    /* owners of K and V */
    uint32_t window;
    struct kv_layer *layers;       /* [n_layers] */
    struct session_memory *memory; /* the session's; NULL: nobody takes it over */
};

int kv_cache_init(struct kv_cache *c, struct kv_pool *pool, const struct model_config *config,
                  struct session_memory *memory);
void kv_cache_done(struct kv_cache *c); /* on a zeroed one as well */

/* dst, initialised and empty, gets all of src's pages. 0 or -ENOMEM, dst then still empty */
int kv_cache_fork(struct kv_cache *dst, const struct kv_cache *src);

/*
 * Makes positions [from, to) writable in every layer: pages exist and are this cache's alone.
 * 0; -ENOBUFS: the pool's budget, -ENOMEM: memory; positions before `from` are unchanged
 */
int kv_cache_reserve(struct kv_cache *c, uint32_t from, uint32_t to);

/* Lets go of sliding pages that neither the token at n nor a rewind to mark will look at. */
void kv_cache_trim(struct kv_cache *c, uint32_t n, uint32_t mark);

/* What the token at n will look at is all there. */
bool kv_cache_holds(const struct kv_cache *c, uint32_t n);

/* Lets go of pages that lie wholly at n or behind. */
void kv_cache_cut(struct kv_cache *c, uint32_t n);

/*
 * What was written to positions [from, to) since they were reserved, and may still be, is of no
 * use: other pages take the place of those, with what stood before `from`, and they are retired. 0;
 * -ENOBUFS: no page for that, nothing has changed; not where `from` is at a page's begin
 */
int kv_cache_retire(struct kv_cache *c, uint32_t from, uint32_t to);

/* Lets go of every page. */
void kv_cache_drop(struct kv_cache *c);

/*
 * An empty cache takes the pages of the tables in its memory, n positions of them, while the pool
 * is being adopted. 1: all that a token at n needs is there; 0: it is not, or a table is not sound:
 * the cache is empty again. Neither changes the memory. -ENOMEM
 */
int kv_cache_adopt(struct kv_cache *c, uint32_t n);

/* Makes the tables in memory say what the cache holds. */
void kv_cache_write_tables(struct kv_cache *c);

/* For whoever brings pages from elsewhere: the entry, empty until now, is this page from now on,
 * whose reference is the cache's then. 0 or -ENOMEM */
int kv_cache_put(struct kv_cache *c, uint32_t layer, uint32_t index, uint32_t page);

/* Forgets the pages without giving them back: another process will have them. */
void kv_cache_leave(struct kv_cache *c);

/* Of the pages it holds, shared ones in full. */
uint64_t kv_cache_bytes(const struct kv_cache *c);

/*
 * The most that a cache of n tokens ever takes when steps are of at most n_rows tokens: with a mark
 * wherever it costs most.
 */
uint64_t kv_cache_bytes_max(const struct kv_shape *shape, const struct model_config *config,
                            uint32_t n, uint32_t n_rows);

/* Where a token at pos finds the K and V of layer (an owner). Valid until the next reserve. */
static inline struct kv_row kv_cache_row(const struct kv_cache *c, uint32_t layer, uint32_t pos)
{
    return (struct kv_row){c->layers[layer].data, pos};
}
