/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * kv_pool: the pages of all sessions of an engine, counted against one byte budget.
 *
 * Pages lie in one memfd, sealed in its size, which may outlive the process: a header that says
 * what they are, then page 0, 1, ... one behind the other. A page is its number. Who holds which is
 * told by the sessions' tables alone; references are counted in the process, and counted again by
 * the one that takes the memfd over: kv_pool_claim() for each entry of each table, then
 * kv_pool_adopted_all(). Engine thread.
 *
 * A device beside the processor sees the memfd where it can: kv_pool_map(). Where it cannot, the
 * pages lie in memory of the device's, which both see and which goes with the process.
 */

#include <stdbool.h>
#include <stdint.h>

#include "backends/backend.h"

#define KV_NO_PAGE UINT32_MAX
#define KV_IDENTITY 32

struct kv_pool;

/* What K and V depend on besides the tokens. Compared byte by byte: zeroed before it is filled. */
struct kv_kind {
    uint8_t identity[KV_IDENTITY]; /* of the model */
    char arithmetic[24];           /* what computes, NUL-padded */
    struct {
        uint32_t n_heads_kv, head_dim, page, f16;
    } shape;
};

struct kv_pool_options {
    uint64_t bytes_max;
    int fd; /* of a former process's pool, negative: none; taken where kind and size are the same.
               Stays the caller's */
    struct backend *memory; /* pages lie in its memory, and outlive nothing; NULL: in a memfd */
    const uint8_t *gpu; /* [KV_IDENTITY]: what computes K and V beside the processor; NULL: none */
};

/* 0, -ENOMEM, -EINVAL: not even one page fits, -errno of memfd_create() and the like */
int kv_pool_new(struct kv_pool **ret, const struct kv_shape *shape, const struct kv_kind *kind,
                const struct kv_pool_options *options);

/* Every page must be back, retired or left. Before the backend whose memory it uses. */
struct kv_pool *kv_pool_free(struct kv_pool *p);

const struct kv_shape *kv_pool_shape(const struct kv_pool *p);
const struct kv_kind *kv_pool_kind(const struct kv_pool *p);
uint64_t kv_pool_bytes_used(const struct kv_pool *p);
uint64_t kv_pool_bytes_max(const struct kv_pool *p);
int kv_pool_fd(const struct kv_pool *p);      /* the pool's; negative: its pages are no memfd */
uint64_t kv_pool_id(const struct kv_pool *p); /* of this memfd: random, not 0 */
bool kv_pool_is_adopted(const struct kv_pool *p);
bool kv_pool_is_adopting(const struct kv_pool *p); /* adopted, before kv_pool_adopted_all() */

void *kv_pool_data(const struct kv_pool *p, uint32_t page);
uint32_t kv_pool_page_of(const struct kv_pool *p, const void *data); /* the inverse */
size_t kv_pool_page_bytes(const struct kv_pool *p);

/* A page with one reference, its memory zeroed if asked for. 0, -ENOBUFS: the budget */
int kv_pool_get(struct kv_pool *p, bool zero, uint32_t *ret);
void kv_pool_ref(struct kv_pool *p, uint32_t page);
void kv_pool_unref(struct kv_pool *p, uint32_t page);
bool kv_pool_is_shared(const struct kv_pool *p, uint32_t page);

/* In the place of kv_pool_unref(): a device may still write to the page, which is used no more
 * until it is known that none does: kv_pool_reclaim(), for all there are. */
void kv_pool_retire(struct kv_pool *p, uint32_t page);
void kv_pool_reclaim(struct kv_pool *p);

/*
 * All pages that are taken, and some more, are told to b by backend_map(), a few MiB at a time:
 * what a device sees may be kept in memory, used or not. Nothing while adopting. One device at a
 * time; kv_pool_unmap() before it is gone. 0, or what backend_map() says
 */
int kv_pool_map(struct kv_pool *p, struct backend *b);
void kv_pool_unmap(struct kv_pool *p);

/*
 * Whether K and V that this GPU had a part in may stand beside those computed here: they were
 * computed by the one of this process, or there is none. A pool that has nothing of a GPU's, in a
 * process without one, is such a GPU's from then on.
 */
bool kv_pool_takes_gpu(struct kv_pool *p, const uint8_t gpu[KV_IDENTITY]);
const uint8_t *kv_pool_gpu(const struct kv_pool *p); /* [KV_IDENTITY]; zeros: none */

/* As kv_pool_takes_gpu(), of what the process before computed. */
bool kv_pool_adopts_gpu(const struct kv_pool *p);

/* What a table says of a page. Two that share it must agree, as far as both can know. */
struct kv_claim {
    uint32_t layer, index;   /* the entry */
    uint32_t n_valid;        /* positions in the page that count, 1 to KV_PAGE */
    uint32_t before, behind; /* checks of all tokens before the page; up to its n_valid-th */
};

/* A reference of a former process's table. False: there is no such page, or the claim contradicts
 * another's. While adopting only; kv_pool_unref() takes it back. */
bool kv_pool_claim(struct kv_pool *p, uint32_t page, const struct kv_claim *claim);
void kv_pool_adopted_all(struct kv_pool *p); /* see engine_adopted() */

uint64_t kv_pool_give_back(struct kv_pool *p); /* see engine_give_back() */
void kv_pool_leave(struct kv_pool *p);         /* what is taken need not be back at its end */
