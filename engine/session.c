/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "engine/session.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"

int session_new(struct session **ret, struct engine *e, uint32_t n_ctx, void *memory)
{
    CLEANUP(session_freep) struct session *s = NULL;
    int r;

    (void)memory;
    if (n_ctx > e->config->context_max)
        return -EINVAL;
    s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    s->engine = e;
    s->n_ctx = n_ctx ? n_ctx : e->config->context_max;
    s->mark = KV_NO_MARK;
    r = kv_cache_init(&s->kv, e->pool, e->config);
    if (r < 0)
        return r;
    e->n_sessions++;
    *ret = TAKE_PTR(s);
    return 0;
}

struct session *session_free(struct session *s)
{
    if (!s)
        return NULL;
    if (s->kv.layers)
        s->engine->n_sessions--;
    kv_cache_done(&s->kv);
    free(s->tokens);
    free(s);
    return NULL;
}

void session_freep(struct session **s)
{
    session_free(*s);
}

int session_grow(struct session *s, uint32_t n)
{
    uint32_t allocated = MIN(MAX(n, s->n_allocated + s->n_allocated / 2 + 64), s->n_ctx);
    uint32_t *tokens;

    if (n <= s->n_allocated)
        return 0;
    tokens = reallocarray(s->tokens, allocated, sizeof(*tokens));
    if (!tokens)
        return -ENOMEM;
    s->tokens = tokens;
    s->n_allocated = allocated;
    return 0;
}

int session_fork(struct session **ret, struct session *s, void *memory)
{
    CLEANUP(session_freep) struct session *f = NULL;
    int r;

    r = session_new(&f, s->engine, s->n_ctx, memory);
    if (r < 0)
        return r;
    r = session_grow(f, s->n_tokens);
    if (r < 0)
        return r;
    r = kv_cache_fork(&f->kv, &s->kv);
    if (r < 0)
        return r;
    if (s->n_tokens > 0)
        memcpy(f->tokens, s->tokens, s->n_tokens * sizeof(*s->tokens));
    f->n_tokens = s->n_tokens;
    f->n_cached = s->n_cached;
    *ret = TAKE_PTR(f);
    return 0;
}

void session_rewind(struct session *s, uint32_t n)
{
    if (n >= s->n_tokens)
        return;
    s->n_tokens = n;
    if (n < s->n_cached)
        s->n_cached = kv_cache_rewind(&s->kv, n) ? n : 0;
    if (s->mark != KV_NO_MARK && s->mark > n)
        s->mark = n;
}

void session_set_mark(struct session *s, uint32_t n)
{
    s->mark = n <= s->n_tokens ? n : KV_NO_MARK;
}

void session_drop_kv(struct session *s)
{
    kv_cache_drop(&s->kv);
    s->n_cached = 0;
}

int session_set_tokens(struct session *s, const uint32_t *tokens, uint32_t n)
{
    int r;

    if (s->n_tokens > 0)
        return -EINVAL;
    if (n > s->n_ctx)
        return -EMSGSIZE;
    for (uint32_t i = 0; i < n; i++)
        if (tokens[i] >= s->engine->config->vocab_size)
            return -EINVAL;
    r = session_grow(s, n);
    if (r < 0)
        return r;
    if (n > 0)
        memcpy(s->tokens, tokens, n * sizeof(*tokens));
    s->n_tokens = n;
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

size_t session_memory_bytes_of(const struct model_config *c, uint32_t n_ctx)
{
    return ALIGN_UP((size_t)(n_ctx ? n_ctx : c->context_max) * 16 + 65536, (size_t)4096);
}

size_t session_memory_bytes(const struct engine *e, uint32_t n_ctx)
{
    return session_memory_bytes_of(e->config, n_ctx);
}

int session_adopt(struct session **ret, struct engine *e, uint32_t n_ctx, void *memory,
                  struct error *err)
{
    (void)ret;
    (void)e;
    (void)n_ctx;
    (void)memory;
    return error_set(err, EBADMSG, "sessions cannot be adopted yet");
}

struct session *session_leave(struct session *s)
{
    return session_free(s);
}

int session_spill(struct session *s, int fd, uint64_t n_bytes)
{
    (void)s;
    (void)fd;
    (void)n_bytes;
    return -EOPNOTSUPP;
}

int session_unspill(struct session *s, int fd, uint64_t n_bytes)
{
    (void)s;
    (void)fd;
    (void)n_bytes;
    return -EOPNOTSUPP;
}
