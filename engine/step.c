/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A step: every item is checked and gets its pages, or its error; then the rows of all good items
 * go through one forward pass. Where a session has lost K and V, an item without tokens computes a
 * chunk of them again beside everybody else's rows; before an item with new tokens all that is
 * missing is computed, in passes of its own, so that it costs the step nothing but time.
 *
 * A step's results are given to its sessions when it has been waited for, by engine_end() or by
 * whoever wants to change one of the sessions before.
 */

#include "engine/engine.h"

#include <errno.h>

#include "base/checked.h"
#include "engine/engine-internal.h"
#include "engine/session.h"

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
static void add_rows(struct lane *l, uint32_t at, const struct session *s, uint32_t from,
                     uint32_t to, uint32_t wanted)
{
    for (uint32_t p = from; p < to; p++)
        l->buf.rows[at++] = (struct forward_row){
            .token = s->tokens[p], .pos = p, .kv = &s->kv, .wanted = to - p <= wanted};
}

/* A pass that was to compute tokens [from, to) failed, and may be under way still. */
static void give_up_pages(struct session *s, uint32_t from, uint32_t to)
{
    if (kv_cache_retire(&s->kv, from, to) == 0)
        return;
    /* No room to save what stands in the first of these pages. */
    session_set_cached(s, 0);
    kv_cache_retire(&s->kv, from / KV_PAGE * KV_PAGE, to);
    kv_cache_drop(&s->kv);
}

/* Tokens [n_cached, to) have been computed. */
static void count_cached(struct session *s, const struct lane *l, uint32_t to)
{
    bool changed = l->id == LANE_GPU && l->activations != l->engine->first_gpu_activations;

    session_add_lanes(s, 1u << l->id | (changed ? LANES_CHANGED : 0));
    session_set_cached(s, to);
    kv_cache_trim(&s->kv, to, s->mark);
}

/* Computes all that is missing, so that n_cached == n_tokens again. */
static int catch_up(struct lane *l, struct session *s)
{
    while (s->n_cached < s->n_tokens) {
        uint32_t n = MIN(s->n_tokens - s->n_cached, l->max_rows);
        int r = kv_cache_reserve(&s->kv, s->n_cached, s->n_cached + n);

        if (r < 0)
            return r;
        add_rows(l, 0, s, s->n_cached, s->n_cached + n, 0);
        r = forward(l, n);
        if (r == -ENODEV)
            give_up_pages(s, s->n_cached, s->n_cached + n);
        if (r < 0)
            return r;
        count_cached(s, l, s->n_cached + n);
    }
    return 0;
}

/* Everything that can go wrong for one item, before anything of it is evaluated. */
static int prepare(struct lane *l, struct step_item *item)
{
    struct session *s = item->session;
    uint32_t n = s->n_tokens, end;
    int r;

    session_end_transfer(s);
    if (!item->tokens)
        return kv_cache_reserve(&s->kv, s->n_cached, s->n_cached + item->n_tokens);
    for (uint32_t i = 0; i < item->n_tokens; i++)
        if (item->tokens[i] >= l->engine->config->vocab_size)
            return -EINVAL;
    if (ckd_add(&end, n, item->n_tokens) || end > s->n_ctx)
        return -EMSGSIZE;
    r = catch_up(l, s);
    if (r < 0)
        return r;
    r = kv_cache_reserve(&s->kv, n, end);
    if (r < 0)
        return r;
    session_put_tokens(s, item->tokens, item->n_tokens);
    return 0;
}

/* The whole step's limits, and that no session is in it twice. */
static int check_step(struct engine *e, enum engine_lane lane, struct step_item *items,
                      size_t n_items)
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
    if (rows > engine_lane_max_rows(e, lane) || wanted > e->max_logits ||
        kv_pool_is_adopting(e->pool))
        return -EINVAL;
    return r;
}

/* Puts the rows of all good items together. Returns how many there are. */
static uint32_t gather(struct lane *l, const struct step_item *items, size_t n_items)
{
    uint32_t n = 0;

    for (size_t i = 0; i < n_items; i++) {
        const struct step_item *item = &items[i];
        uint32_t from;

        if (item->ret_error < 0)
            continue;
        from = item->session->n_cached;
        add_rows(l, n, item->session, from, from + item->n_tokens, n_wanted(item));
        n += item->n_tokens;
    }
    return n;
}

/* What the pass computed is the sessions' from now on; or nothing of it. */
static void settle(struct lane *l)
{
    const float *logits = l->buf.logits;

    for (size_t i = 0; i < l->n_items; i++) {
        struct step_item *item = &l->items[i];
        struct session *s = item->session;
        uint32_t end = s->n_cached + item->n_tokens;

        if (item->ret_error < 0)
            continue;
        s->busy = NULL;
        if (l->result == -ENODEV)
            give_up_pages(s, s->n_cached, end);
        if (l->result < 0)
            continue;
        if (item->tokens)
            session_add_tokens(s, item->n_tokens);
        count_cached(s, l, end);
        if (n_wanted(item) > 0) {
            item->ret_logits = logits;
            logits += (size_t)n_wanted(item) * l->engine->config->vocab_size;
        }
    }
    l->state = STEP_SETTLED;
}

void engine_settle(struct engine *e, enum engine_lane lane)
{
    struct lane *l = e->lanes[lane];

    if (!l || l->state != STEP_WORKS)
        return;
    l->result = forward_finish(l);
    settle(l);
}

int engine_start(struct engine *e, enum engine_lane lane, struct step_item *items, size_t n_items)
{
    struct lane *l = e->lanes[lane];
    uint32_t n;
    int r;

    if (!l)
        return -ENODEV;
    if (l->state != STEP_NONE)
        return -EBUSY;
    for (size_t i = 0; i < n_items; i++)
        session_settle(items[i].session);
    r = check_step(e, lane, items, n_items);
    if (r < 0)
        return r;
    if (lane_failure(l))
        return -ENODEV;
    if (lane == LANE_GPU)
        e->has_removed = false;
    /* Catching up uses the row buffers, so rows are filled when all items are prepared. */
    for (size_t i = 0; i < n_items; i++) {
        items[i].ret_logits = NULL;
        items[i].ret_error = prepare(l, &items[i]);
        if (items[i].ret_error == -ENODEV || items[i].ret_error == -ENOTRECOVERABLE)
            return items[i].ret_error;
    }
    n = gather(l, items, n_items);
    l->items = items;
    l->n_items = n_items;
    l->result = 0;
    if (n == 0) {
        l->state = STEP_SETTLED;
        return 0;
    }
    for (size_t i = 0; i < n_items; i++)
        if (items[i].ret_error == 0)
            items[i].session->busy = l;
    l->state = STEP_WORKS;
    r = forward_start(l, n);
    if (r < 0) {
        l->result = r;
        settle(l);
        l->state = STEP_NONE;
    }
    return r;
}

int engine_wait(struct engine *e, enum engine_lane lane, uint64_t timeout_usec)
{
    struct lane *l = e->lanes[lane];

    if (!l || l->state != STEP_WORKS)
        return 0;
    return backend_wait(l->backend, timeout_usec) == -ETIMEDOUT ? -ETIMEDOUT : 0;
}

int engine_end(struct engine *e, enum engine_lane lane)
{
    struct lane *l = e->lanes[lane];

    if (lane == LANE_GPU && e->has_removed) {
        e->has_removed = false;
        return e->removed_result;
    }
    if (!l || l->state == STEP_NONE)
        return -EINVAL;
    engine_settle(e, lane);
    l->state = STEP_NONE;
    return l->result;
}

int engine_step(struct engine *e, struct step_item *items, size_t n_items)
{
    int r = engine_start(e, e->home, items, n_items);

    return r < 0 ? r : engine_end(e, e->home);
}

int session_eval(struct session *s, const uint32_t *tokens, size_t n, const float **ret_logits)
{
    struct engine *e = s->engine;

    while (n > 0) {
        struct step_item item = {.session = s, .tokens = tokens};
        int r;

        item.n_tokens = (uint32_t)MIN(n, (size_t)engine_max_rows(e));
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
