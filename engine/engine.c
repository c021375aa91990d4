/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A step: every item is checked and gets its pages, or its error; then the rows of all good items
 * go through one forward pass. Where a session has lost K and V, an item without tokens computes a
 * chunk of them again beside everybody else's rows; before an item with new tokens all that is
 * missing is computed, in passes of its own, so that it costs the step nothing but time.
 */

#include "engine/engine.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/model-file.h"
#include "engine/session.h"

#define DEFAULT_MAX_ROWS 256
#define DEFAULT_MAX_LOGITS 16
#define MOST_ROWS 65536u

/* A quarter of the machine's memory; at most one of what may be mapped, or be in a file. */
static uint64_t default_kv_bytes(void)
{
    static const int limits[] = {RLIMIT_AS, RLIMIT_FSIZE};
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    uint64_t bytes =
        pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size / 4 : (uint64_t)1 << 30;

    for (size_t i = 0; i < ARRAY_SIZE(limits); i++) {
        struct rlimit limit;

        if (getrlimit(limits[i], &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
            bytes = MIN(bytes, (uint64_t)limit.rlim_cur / 4);
    }
    return bytes;
}

/* Values in the widest row that any matrix reads. */
static uint32_t widest_input(const struct model_config *c)
{
    uint32_t n = MAX(MAX(c->hidden, c->n_heads * c->head_dim), MAX(c->laurel_rank, c->ple_width));

    for (uint32_t l = 0; l < c->n_layers; l++)
        n = MAX(n, c->layers[l].ffn_width);
    return ALIGN_UP(n, 64u);
}

static bool keeps_f16(const struct engine_options *o)
{
    switch (o->kv_type) {
    case KV_F16:
        return true;
    case KV_F32:
        return false;
    case KV_AUTO:
        break;
    }
    return o->activations != ACTIVATIONS_F32;
}

int engine_new(struct engine **ret, const struct model *m, const struct engine_options *options,
               struct error *err)
{
    CLEANUP(engine_freep) struct engine *e = NULL;
    const struct model_config *c = model_config(m);
    struct kv_shape shape = {c->n_heads_kv, c->head_dim, keeps_f16(options)};
    struct kv_kind kind = {.shape = {c->n_heads_kv, c->head_dim, KV_PAGE, shape.f16}};
    struct backend_limits limits;
    uint64_t kv_bytes = options->kv_bytes ? options->kv_bytes : default_kv_bytes();
    uint32_t n_threads;
    int r;

    if (options->max_rows > MOST_ROWS || options->max_logits > MOST_ROWS)
        return error_set(err, EINVAL, "at most %u rows and logits fit one step", MOST_ROWS);
    if (c->head_dim > BACKEND_MAX_HEAD_DIM)
        return error_set(err, EINVAL, "%s: head_dim %u is above what backends take, %u",
                         model_file_path(model_get_file(m)), c->head_dim, BACKEND_MAX_HEAD_DIM);
    e = calloc(1, sizeof(*e));
    if (!e)
        return error_set(err, ENOMEM, "no memory for the engine");
    e->model = m;
    e->config = c;
    e->weights = model_weights(m);
    e->activations =
        options->activations == ACTIVATIONS_AUTO ? ACTIVATIONS_INT8 : options->activations;
    e->max_rows = options->max_rows ? options->max_rows : DEFAULT_MAX_ROWS;
    e->max_logits = options->max_logits ? options->max_logits : DEFAULT_MAX_LOGITS;
    e->max_logits = MIN(e->max_logits, e->max_rows);
    e->widest = widest_input(c);

    if ((uint64_t)e->max_rows * c->n_heads > UINT32_MAX) /* backends count pairs of the two */
        return error_set(err, EINVAL, "%s: n_heads %u is too many for steps of %u rows",
                         model_file_path(model_get_file(m)), c->n_heads, e->max_rows);
    limits = (struct backend_limits){e->max_rows, MAX(e->widest, c->n_layers * c->ple_width),
                                     c->n_heads};
    r = backend_cpu_new(&e->backend, options->cpu_level, options->n_threads, &limits, err);
    if (r < 0)
        return r;
    if (!options->no_pinning)
        backend_cpu_pin(e->backend);
    r = forward_init(e);
    if (r < 0)
        return error_set(err, -r, "no memory for the activations of %u rows", e->max_rows);
    if (options->kv_identity)
        memcpy(kind.identity, options->kv_identity, sizeof(kind.identity));
    snprintf(kind.arithmetic, sizeof(kind.arithmetic), "%s/%s", e->backend->ops->name,
             e->activations == ACTIVATIONS_INT8 ? "int8" : "f32");
    r = kv_pool_new(&e->pool, &shape, &kind, kv_bytes, options->has_kv_fd ? options->kv_fd : -1);
    if (r == -EINVAL)
        return error_set(err, EINVAL, "a KV budget of %llu bytes does not hold one page of %zu",
                         (unsigned long long)kv_bytes, kv_page_bytes(&shape));
    if (r < 0)
        return error_set(err, -r, "no memory file for %llu bytes of KV cache: %s",
                         (unsigned long long)kv_bytes, strerror(-r));
    n_threads = e->backend->vtable->n_threads(e->backend);
    snprintf(e->description, sizeof(e->description), "cpu/%s, %u thread%s, %s activations, %s KV",
             e->backend->ops->name, n_threads, n_threads == 1 ? "" : "s",
             e->activations == ACTIVATIONS_INT8 ? "int8" : "f32", shape.f16 ? "f16" : "f32");
    *ret = TAKE_PTR(e);
    return 0;
}

struct engine *engine_free(struct engine *e)
{
    if (!e)
        return NULL;
    assert(e->n_sessions == 0);
    kv_pool_free(e->pool);
    forward_done(e);
    backend_free(e->backend);
    free(e);
    return NULL;
}

void engine_freep(struct engine **e)
{
    engine_free(*e);
}

const struct model *engine_model(const struct engine *e)
{
    return e->model;
}

uint32_t engine_max_rows(const struct engine *e)
{
    return e->max_rows;
}

uint32_t engine_max_logits(const struct engine *e)
{
    return e->max_logits;
}

const char *engine_description(const struct engine *e)
{
    return e->description;
}

void engine_memory(const struct engine *e, struct engine_memory *ret)
{
    *ret = (struct engine_memory){
        .kv_bytes_used = kv_pool_bytes_used(e->pool),
        .kv_bytes_max = kv_pool_bytes_max(e->pool),
        .scratch_bytes = e->scratch_bytes + e->backend->vtable->scratch_bytes(e->backend),
    };
}

int engine_add_gpu(struct engine *e, struct error *err)
{
    (void)e;
    return error_set(err, ENOSYS, "this build has no GPU lane");
}

bool engine_has_gpu(const struct engine *e)
{
    (void)e;
    return false;
}

void engine_remove_gpu(struct engine *e)
{
    (void)e;
}

struct backend *engine_lane_backend(const struct engine *e, enum engine_lane lane)
{
    return lane == LANE_CPU ? e->backend : NULL;
}

const char *engine_lane_failure(const struct engine *e, enum engine_lane lane)
{
    return lane == LANE_CPU ? backend_failure(e->backend) : NULL;
}

int engine_kv_fd(const struct engine *e)
{
    return kv_pool_fd(e->pool);
}

bool engine_kv_adopted(const struct engine *e)
{
    return kv_pool_is_adopted(e->pool);
}

void engine_adopted(struct engine *e)
{
    kv_pool_adopted_all(e->pool);
}

uint64_t engine_give_back(struct engine *e)
{
    return kv_pool_give_back(e->pool);
}

struct backend *engine_backend(const struct engine *e)
{
    return e->backend;
}

void engine_set_backend(struct engine *e, struct backend *b)
{
    e->backend = b;
}

uint64_t engine_kv_bytes(const struct engine *e, uint32_t n_tokens)
{
    return kv_cache_bytes_max(kv_pool_shape(e->pool), e->config, n_tokens, e->max_rows);
}

static uint32_t n_wanted(const struct step_item *item)
{
    switch (item->wanted) {
    case LOGITS_NONE:
        return 0;
    case LOGITS_LAST:
        return 1;
    case LOGITS_ALL:
        return item->n_tokens;
    }
    return 0;
}

/* Puts tokens [from, to) of a session into rows [at, ...); the last `wanted` have logits. */
static void add_rows(struct engine *e, uint32_t at, const struct session *s, uint32_t from,
                     uint32_t to, uint32_t wanted)
{
    for (uint32_t p = from; p < to; p++)
        e->buf.rows[at++] = (struct forward_row){
            .token = s->tokens[p], .pos = p, .kv = &s->kv, .wanted = to - p <= wanted};
}

/* Computes all that is missing, so that n_cached == n_tokens again. */
static int catch_up(struct engine *e, struct session *s)
{
    while (s->n_cached < s->n_tokens) {
        uint32_t n = MIN(s->n_tokens - s->n_cached, e->max_rows);
        int r = kv_cache_reserve(&s->kv, s->n_cached, s->n_cached + n);

        if (r < 0)
            return r;
        add_rows(e, 0, s, s->n_cached, s->n_cached + n, 0);
        r = forward(e, n);
        if (r < 0)
            return r;
        session_set_cached(s, s->n_cached + n);
        kv_cache_trim(&s->kv, s->n_cached, s->mark);
    }
    return 0;
}

/* Everything that can go wrong for one item, before anything of it is evaluated. */
static int prepare(struct engine *e, struct step_item *item)
{
    struct session *s = item->session;
    uint32_t n = s->n_tokens, end;
    int r;

    session_end_transfer(s);
    if (!item->tokens)
        return kv_cache_reserve(&s->kv, s->n_cached, s->n_cached + item->n_tokens);
    for (uint32_t i = 0; i < item->n_tokens; i++)
        if (item->tokens[i] >= e->config->vocab_size)
            return -EINVAL;
    if (ckd_add(&end, n, item->n_tokens) || end > s->n_ctx)
        return -EMSGSIZE;
    r = catch_up(e, s);
    if (r < 0)
        return r;
    r = kv_cache_reserve(&s->kv, n, end);
    if (r < 0)
        return r;
    session_put_tokens(s, item->tokens, item->n_tokens);
    return 0;
}

/* The whole step's limits, and that no session is in it twice. */
static int check_step(struct engine *e, struct step_item *items, size_t n_items)
{
    uint64_t rows = 0, wanted = 0;
    int r = 0;

    for (size_t i = 0; i < n_items; i++) {
        if (!items[i].tokens && (items[i].wanted != LOGITS_NONE ||
                                 items[i].n_tokens > session_n_missing(items[i].session)))
            r = -EINVAL;
        rows += items[i].n_tokens;
        wanted += n_wanted(&items[i]);
        if (items[i].n_tokens == 0 || items[i].session->in_step || items[i].session->engine != e)
            r = -EINVAL;
        items[i].session->in_step = true;
    }
    for (size_t i = 0; i < n_items; i++)
        items[i].session->in_step = false;
    if (rows > e->max_rows || wanted > e->max_logits || kv_pool_is_adopting(e->pool))
        return -EINVAL;
    return r;
}

int engine_step(struct engine *e, struct step_item *items, size_t n_items)
{
    const float *logits = e->buf.logits;
    uint32_t n = 0;
    int r = check_step(e, items, n_items);

    if (r < 0)
        return r;
    /* Catching up uses the row buffers, so rows are filled when all items are prepared. */
    for (size_t i = 0; i < n_items; i++) {
        items[i].ret_logits = NULL;
        items[i].ret_error = prepare(e, &items[i]);
        if (items[i].ret_error == -ENODEV || items[i].ret_error == -ENOTRECOVERABLE)
            return items[i].ret_error;
    }
    for (size_t i = 0; i < n_items; i++) {
        const struct step_item *item = &items[i];
        uint32_t from;

        if (item->ret_error < 0)
            continue;
        from = item->tokens ? item->session->n_tokens : item->session->n_cached;
        add_rows(e, n, item->session, from, from + item->n_tokens, n_wanted(item));
        n += item->n_tokens;
    }
    if (n == 0)
        return 0;
    r = forward(e, n);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n_items; i++) {
        struct session *s = items[i].session;

        if (items[i].ret_error < 0)
            continue;
        if (items[i].tokens)
            session_add_tokens(s, items[i].n_tokens);
        session_set_cached(s, s->n_cached + items[i].n_tokens);
        kv_cache_trim(&s->kv, s->n_cached, s->mark);
        if (n_wanted(&items[i]) > 0) {
            items[i].ret_logits = logits;
            logits += (size_t)n_wanted(&items[i]) * e->config->vocab_size;
        }
    }
    return 0;
}

int engine_start(struct engine *e, enum engine_lane lane, struct step_item *items, size_t n_items)
{
    int r;

    if (lane != LANE_CPU)
        return -ENODEV;
    if (e->is_under_way)
        return -EBUSY;
    r = engine_step(e, items, n_items);
    if (r == 0)
        e->is_under_way = true;
    return r;
}

int engine_wait(struct engine *e, enum engine_lane lane, uint64_t timeout_usec)
{
    (void)e, (void)lane, (void)timeout_usec;
    return 0;
}

int engine_end(struct engine *e, enum engine_lane lane)
{
    (void)lane;
    e->is_under_way = false;
    return 0;
}

int session_eval(struct session *s, const uint32_t *tokens, size_t n, const float **ret_logits)
{
    struct engine *e = s->engine;

    while (n > 0) {
        struct step_item item = {.session = s, .tokens = tokens};
        int r;

        item.n_tokens = (uint32_t)MIN(n, (size_t)e->max_rows);
        item.wanted = ret_logits && item.n_tokens == n ? LOGITS_LAST : LOGITS_NONE;
        r = engine_step(e, &item, 1);
        if (r == 0)
            r = item.ret_error;
        if (r < 0)
            return r;
        tokens += item.n_tokens;
        n -= item.n_tokens;
        if (n == 0 && ret_logits)
            *ret_logits = item.ret_logits;
    }
    return 0;
}
