/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "engine/session-memory.h"

#include <errno.h>
#include <string.h>

#include "backends/backend.h"
#include "base/checked.h"
#include "engine/engine.h"

#define MAGIC "llmd-se\n"
#define VERSION 1u
#define TOKENS_AT 4096u /* the header has a page of its own */

struct session_header {
    _Atomic uint64_t magic; /* the last to be written of a new session's */
    _Atomic uint64_t shape; /* check of the following four */
    uint32_t version, n_ctx, n_layers, kv_page;
    _Atomic uint64_t pool_id;
    _Atomic uint64_t n_tokens, n_cached, mark; /* sealed */
    _Atomic uint64_t lanes; /* sealed; 0: of a process that knew of the processor alone */
};

enum {
    SALT_SHAPE = 1,
    SALT_N_TOKENS,
    SALT_N_CACHED,
    SALT_MARK,
    SALT_ENTRY,
    SALT_TOKENS,
    SALT_LANES,
};

/* Bijective in x for any h: one changed word always shows. */
static uint32_t mix(uint32_t h, uint32_t x)
{
    h = (h ^ x) * 0x9e3779b1u;
    h = (h ^ h >> 15) * 0x85ebca77u;
    return h ^ h >> 13;
}

static uint64_t seal(uint32_t value, uint32_t salt)
{
    return value | (uint64_t)(mix(mix(0x6c6c6d64u, salt), value) | 1) << 32; /* never 0 */
}

static bool unseal(uint64_t word, uint32_t salt, uint32_t *ret)
{
    if (seal((uint32_t)word, salt) != word)
        return false;
    *ret = (uint32_t)word;
    return true;
}

static uint64_t magic(void)
{
    uint64_t m;

    memcpy(&m, MAGIC, sizeof(m));
    return m;
}

static uint64_t shape_of(const struct session_header *h)
{
    return seal(mix(mix(mix(h->version, h->n_ctx), h->n_layers), h->kv_page), SALT_SHAPE);
}

bool session_memory_lay_out(struct session_memory *m, void *memory, uint32_t n_ctx,
                            uint32_t n_layers)
{
    uint32_t n_entries = n_ctx / KV_PAGE + (n_ctx % KV_PAGE != 0);
    size_t tokens, tables, checks_at, tables_at, bytes;

    if (ckd_mul(&tokens, n_ctx, sizeof(uint32_t)) || ckd_align(&tokens, tokens, 8) ||
        ckd_mul(&tables, n_entries, n_layers) || ckd_mul(&tables, tables, sizeof(uint64_t)) ||
        ckd_add(&checks_at, TOKENS_AT, tokens) || ckd_add(&tables_at, checks_at, tokens) ||
        ckd_add(&bytes, tables_at, tables) || ckd_align(&bytes, bytes, 4096))
        return false;
    *m = (struct session_memory){
        .n_ctx = n_ctx, .n_layers = n_layers, .n_entries = n_entries, .bytes = bytes};
    if (memory) {
        char *at = memory;

        m->header = memory;
        m->tokens = (uint32_t *)(void *)(at + TOKENS_AT);
        m->checks = (uint32_t *)(void *)(at + checks_at);
        m->tables = (_Atomic uint64_t *)(void *)(at + tables_at);
    }
    return true;
}

void session_memory_init(struct session_memory *m, uint64_t pool_id)
{
    struct session_header *h = m->header;

    h->version = VERSION;
    h->n_ctx = m->n_ctx;
    h->n_layers = m->n_layers;
    h->kv_page = KV_PAGE;
    atomic_store_explicit(&h->shape, shape_of(h), memory_order_release);
    session_memory_set_n_cached(m, 0);
    session_memory_set_n_tokens(m, 0);
    session_memory_set_mark(m, UINT32_MAX);
    session_memory_set_lanes(m, 0);
    session_memory_set_pool(m, pool_id);
    atomic_store_explicit(&h->magic, magic(), memory_order_release);
}

/*
 * Release keeps earlier stores before this one, the fence later ones behind it: what the count no
 * longer covers may be overwritten next.
 */
static void store(_Atomic uint64_t *at, uint64_t word)
{
    atomic_store_explicit(at, word, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
}

void session_memory_set_n_tokens(struct session_memory *m, uint32_t n)
{
    store(&m->header->n_tokens, seal(n, SALT_N_TOKENS));
}

void session_memory_set_n_cached(struct session_memory *m, uint32_t n)
{
    store(&m->header->n_cached, seal(n, SALT_N_CACHED));
}

void session_memory_set_mark(struct session_memory *m, uint32_t n)
{
    store(&m->header->mark, seal(n, SALT_MARK));
}

void session_memory_set_lanes(struct session_memory *m, uint32_t lanes)
{
    store(&m->header->lanes, seal(lanes, SALT_LANES));
}

void session_memory_set_pool(struct session_memory *m, uint64_t pool_id)
{
    store(&m->header->pool_id, pool_id);
}

static uint32_t first_check(void)
{
    return mix(0, SALT_TOKENS);
}

uint32_t session_memory_check(const struct session_memory *m, uint32_t n)
{
    return n == 0 ? first_check() : m->checks[n - 1];
}

void session_memory_put_tokens(struct session_memory *m, uint32_t at, const uint32_t *tokens,
                               uint32_t n)
{
    uint32_t check = session_memory_check(m, at);

    for (uint32_t i = 0; i < n; i++) {
        check = mix(check, tokens[i]);
        m->tokens[at + i] = tokens[i];
        m->checks[at + i] = check;
    }
}

int session_memory_find(const struct session_memory *m, uint32_t vocab_size,
                        struct session_found *ret, struct error *err)
{
    const struct session_header *h = m->header;
    uint32_t check = first_check();
    struct session_found f;

    if (atomic_load(&h->magic) != magic())
        return error_set(err, EBADMSG, "session memory: never completed, or damaged at its begin");
    if (atomic_load(&h->shape) != shape_of(h))
        return error_set(err, EBADMSG, "session memory: the header is damaged");
    if (h->version != VERSION || h->n_ctx != m->n_ctx || h->n_layers != m->n_layers ||
        h->kv_page != KV_PAGE)
        return error_set(err, EBADMSG,
                         "session memory: version %u, %u tokens, %u layers with pages of %u; "
                         "expected %u, %u, %u, %u",
                         h->version, h->n_ctx, h->n_layers, h->kv_page, VERSION, m->n_ctx,
                         m->n_layers, KV_PAGE);
    if (!unseal(atomic_load(&h->n_tokens), SALT_N_TOKENS, &f.n_tokens) || f.n_tokens > m->n_ctx)
        return error_set(err, EBADMSG, "session memory: the number of tokens is damaged");
    for (uint32_t i = 0; i < f.n_tokens; i++) {
        check = mix(check, m->tokens[i]);
        if (check != m->checks[i] || m->tokens[i] >= vocab_size)
            return error_set(err, EBADMSG, "session memory: damaged at token %u of %u", i,
                             f.n_tokens);
    }
    if (!unseal(atomic_load(&h->n_cached), SALT_N_CACHED, &f.n_cached) || f.n_cached > f.n_tokens)
        f.n_cached = 0;
    if (!unseal(atomic_load(&h->mark), SALT_MARK, &f.mark) || f.mark > f.n_tokens)
        f.mark = UINT32_MAX;
    if (atomic_load(&h->lanes) == 0)
        f.lanes = 1u << LANE_CPU;
    else if (!unseal(atomic_load(&h->lanes), SALT_LANES, &f.lanes))
        f.n_cached = 0;
    if (f.n_cached == 0)
        f.lanes = 0;
    f.pool_id = atomic_load(&h->pool_id);
    *ret = f;
    return 0;
}

static uint32_t entry_salt(uint32_t layer, uint32_t index)
{
    return mix(mix(SALT_ENTRY, layer), index);
}

uint64_t kv_entry(uint32_t page, uint32_t layer, uint32_t index)
{
    return seal(page, entry_salt(layer, index));
}

bool kv_entry_page(uint64_t entry, uint32_t layer, uint32_t index, uint32_t *ret_page)
{
    return unseal(entry, entry_salt(layer, index), ret_page);
}
