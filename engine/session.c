/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "engine/session.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"

size_t session_memory_bytes(const struct model_config *c, uint32_t n_ctx)
{
    struct session_memory m;

    if (n_ctx == 0)
        n_ctx = c->context_max;
    return session_memory_lay_out(&m, NULL, n_ctx, c->n_layers_kv) ? m.bytes : 0;
}

/* All but what is in the memory, which is laid out only. */
static int new_session(struct session **ret, struct engine *e, uint32_t n_ctx, void *memory)
{
    CLEANUP(freep) struct session *s = NULL;
    struct session_memory m;
    void *own = NULL;
    int r;

    if (n_ctx > e->config->context_max)
        return -EINVAL;
    if (n_ctx == 0)
        n_ctx = e->config->context_max;
    s = calloc(1, sizeof(*s));
    if (!s || !session_memory_lay_out(&m, NULL, n_ctx, e->config->n_layers_kv))
        return -ENOMEM;
    r = kv_cache_init(&s->kv, e->pool, e->config, &s->memory);
    if (r < 0)
        return r;
    if (!memory) {
        own = mmap(NULL, m.bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (own == MAP_FAILED) {
            kv_cache_done(&s->kv);
            return -ENOMEM;
        }
    }
    session_memory_lay_out(&s->memory, own ? own : memory, n_ctx, e->config->n_layers_kv);
    s->engine = e;
    s->n_ctx = n_ctx;
    s->tokens = s->memory.tokens;
    s->mark = KV_NO_MARK;
    s->own_memory = own != NULL;
    e->n_sessions++;
    *ret = TAKE_PTR(s);
    return 0;
}

int session_new(struct session **ret, struct engine *e, uint32_t n_ctx, void *memory)
{
    int r = new_session(ret, e, n_ctx, memory);

    if (r == 0)
        session_memory_init(&(*ret)->memory, kv_pool_id(e->pool));
    return r;
}

/* The struct, when its pages are gone or left. */
static struct session *done(struct session *s)
{
    session_end_transfer(s);
    s->kv.memory = NULL;
    kv_cache_done(&s->kv);
    if (s->own_memory)
        (void)munmap(s->memory.header, s->memory.bytes);
    s->engine->n_sessions--;
    free(s);
    return NULL;
}

struct session *session_free(struct session *s)
{
    if (!s)
        return NULL;
    session_drop_kv(s); /* and waits, if it is busy */
    return done(s);
}

void session_freep(struct session **s)
{
    session_free(*s);
}

struct session *session_leave(struct session *s)
{
    if (!s)
        return NULL;
    session_settle(s);
    kv_pool_leave(s->engine->pool);
    kv_cache_leave(&s->kv);
    return done(s);
}

void session_put_tokens(struct session *s, const uint32_t *tokens, uint32_t n)
{
    session_memory_put_tokens(&s->memory, s->n_tokens, tokens, n);
}

void session_add_tokens(struct session *s, uint32_t n)
{
    s->n_tokens += n;
    session_memory_set_n_tokens(&s->memory, s->n_tokens);
}

void session_set_cached(struct session *s, uint32_t n)
{
    s->n_cached = n;
    session_memory_set_n_cached(&s->memory, n);
    if (n == 0 && s->lanes != 0) {
        s->lanes = 0;
        session_memory_set_lanes(&s->memory, 0);
    }
}

void session_add_lanes(struct session *s, unsigned lanes)
{
    if ((s->lanes | lanes) == s->lanes)
        return;
    s->lanes |= lanes;
    session_memory_set_lanes(&s->memory, s->lanes);
}

void session_settle(struct session *s)
{
    if (s->busy)
        engine_settle(s->engine, s->busy->id);
}

int session_fork(struct session **ret, struct session *s, void *memory)
{
    CLEANUP(session_freep) struct session *f = NULL;
    int r;

    session_settle(s);
    r = session_new(&f, s->engine, s->n_ctx, memory);
    if (r < 0)
        return r;
    r = kv_cache_fork(&f->kv, &s->kv);
    if (r < 0)
        return r;
    session_put_tokens(f, s->tokens, s->n_tokens);
    session_add_tokens(f, s->n_tokens);
    session_add_lanes(f, s->lanes);
    session_set_cached(f, s->n_cached);
    *ret = TAKE_PTR(f);
    return 0;
}

int session_adopt(struct session **ret, struct engine *e, uint32_t n_ctx, void *memory,
                  struct error *err)
{
    CLEANUP(freep) struct session *s = NULL;
    struct session_found found;
    int r;

    r = new_session(&s, e, n_ctx, memory);
    if (r == -EINVAL)
        return error_set(err, EBADMSG, "session memory: for %u tokens, the model takes %u", n_ctx,
                         e->config->context_max);
    if (r < 0)
        return error_set(err, -r, "out of memory");
    r = session_memory_find(&s->memory, e->config->vocab_size, &found, err);
    if (r == 0 && found.pool_id == kv_pool_id(e->pool) && kv_pool_is_adopting(e->pool) &&
        (!(found.lanes & 1u << LANE_GPU) || kv_pool_adopts_gpu(e->pool))) {
        r = kv_cache_adopt(&s->kv, found.n_cached);
        if (r == 0)
            found.n_cached = 0;
        else if (r < 0)
            r = error_set(err, ENOMEM, "out of memory");
    } else {
        found.n_cached = 0;
    }
    if (r < 0) {
        done(TAKE_PTR(s));
        return r;
    }

    /* Sound at each step, as everything else: what no longer counts first, then its tables. */
    s->n_tokens = found.n_tokens;
    s->lanes = found.lanes;
    session_set_cached(s, found.n_cached);
    session_set_mark(s, found.mark);
    kv_cache_write_tables(&s->kv);
    session_memory_set_pool(&s->memory, kv_pool_id(e->pool));
    *ret = TAKE_PTR(s);
    return 0;
}

void session_rewind(struct session *s, uint32_t n)
{
    session_settle(s);
    if (n >= s->n_tokens)
        return;
    session_end_transfer(s);
    if (n < s->n_cached)
        session_set_cached(s, kv_cache_holds(&s->kv, n) ? n : 0);
    s->n_tokens = n;
    session_memory_set_n_tokens(&s->memory, n);
    if (s->mark != KV_NO_MARK && s->mark > n)
        session_set_mark(s, n);
    kv_cache_cut(&s->kv, s->n_cached);
}

void session_set_mark(struct session *s, uint32_t n)
{
    session_settle(s);
    s->mark = n <= s->n_tokens ? n : KV_NO_MARK;
    session_memory_set_mark(&s->memory, s->mark);
}

void session_drop_kv(struct session *s)
{
    session_settle(s);
    session_end_transfer(s);
    session_set_cached(s, 0);
    kv_cache_drop(&s->kv);
}

int session_set_tokens(struct session *s, const uint32_t *tokens, uint32_t n)
{
    session_settle(s);
    if (s->n_tokens > 0)
        return -EINVAL;
    if (n > s->n_ctx)
        return -EMSGSIZE;
    for (uint32_t i = 0; i < n; i++)
        if (tokens[i] >= s->engine->config->vocab_size)
            return -EINVAL;
    session_end_transfer(s);
    session_put_tokens(s, tokens, n);
    session_add_tokens(s, n);
    return 0;
}

uint32_t session_n_missing(const struct session *s)
{
    return s->n_tokens - s->n_cached;
}

uint64_t session_kv_bytes(const struct session *s)
{
    return kv_cache_bytes(&s->kv);
}

bool session_is_busy(const struct session *s)
{
    return s->busy != NULL;
}

unsigned session_lanes(const struct session *s)
{
    return s->lanes;
}

uint32_t session_n_tokens(const struct session *s)
{
    return s->n_tokens;
}

uint32_t session_n_ctx(const struct session *s)
{
    return s->n_ctx;
}

const uint32_t *session_tokens(const struct session *s)
{
    return s->tokens;
}

struct engine *session_engine(const struct session *s)
{
    return s->engine;
}
