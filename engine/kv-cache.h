/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * kv_pool: the pages of all sessions of an engine, counted against one byte budget.
 * kv_cache: one session's page tables, one per layer that owns K and V. Embedded in the session.
 *
 * A page holds KV_PAGE consecutive positions of one layer (backends/backend.h). Full-attention
 * layers keep all pages. Sliding layers keep those that overlap the window before the next token
 * (and KV_SLACK tokens more, and the window before a mark), which makes the table a ring of pages:
 * no position is ever overwritten while a token of the same step may still look at it.
 *
 * Pages are reference-counted. Forking shares them all; kv_cache_reserve() copies a shared page
 * before its first write. Engine thread.
 */

#include <stdbool.h>
#include <stdint.h>

#include "backends/backend.h"
#include "engine/model-config.h"

#define KV_SLACK 64 /* tokens a session may always rewind without recomputing */
#define KV_NO_MARK UINT32_MAX

struct kv_pool;
struct kv_page;

int kv_pool_new(struct kv_pool **ret, struct backend *b, const struct kv_shape *shape,
                uint64_t bytes_max); /* 0, -ENOMEM, -EINVAL: not even one page fits */
struct kv_pool *kv_pool_free(struct kv_pool *p); /* every page must be back */
const struct kv_shape *kv_pool_shape(const struct kv_pool *p);
uint64_t kv_pool_bytes_used(const struct kv_pool *p);
uint64_t kv_pool_bytes_max(const struct kv_pool *p);

struct kv_layer {
    bool sliding;
    uint32_t n; /* entries of the tables: pages up to the last position reserved */
    uint32_t allocated;
    uint32_t n_pages;       /* entries that are a page */
    struct kv_page **pages; /* [allocated], counted; NULL: dropped or not there yet */
    void **data;            /* [allocated], the same pages' memory, for kernels */
};

struct kv_cache {
    struct kv_pool *pool; /* the engine's */
    uint32_t n_layers;    /* owners of K and V */
    uint32_t window;
    struct kv_layer *layers; /* [n_layers] */
};

int kv_cache_init(struct kv_cache *c, struct kv_pool *pool, const struct model_config *config);
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

/*
 * Forgets positions from n on. True when what the token at n will look at is all there; false when
 * sliding layers have lost part of it: then everything is dropped and must be computed again.
 */
bool kv_cache_rewind(struct kv_cache *c, uint32_t n);

/* Lets go of every page. */
void kv_cache_drop(struct kv_cache *c);

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
