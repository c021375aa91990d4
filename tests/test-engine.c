/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The invariants of gemma3n.md §10.2 that need no reference: whichever way tokens reach a session
 * (one by one, in chunks, beside others, after a fork or a rewind), its logits are the same bits.
 * Run for both activation modes, several weight types and every CPU level.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/session.h"
#include "tests/model-builder.h"
#include "tests/must.h"

#define WINDOW 70 /* not a multiple of a page */
#define LONGEST 300

static const char *path; /* where models are written */
static uint32_t tokens[8192];
static uint32_t vocab;

static struct model *build(struct model_builder *b)
{

    model_builder_write(b, path);
    return must_open(path);
}

static struct engine *engine_on(const struct model *m, struct engine_options o)
{

    if (!o.kv_bytes)
        o.kv_bytes = (uint64_t)64 << 20;
    return must_engine(m, &o);
}

static struct session *session_on(struct engine *e)
{
    struct session *s;

    assert(session_new(&s, e, 0, NULL) == 0);
    return s;
}

/* Feeds t[n] in chunks of the given size; returns a copy of the last token's logits. */
static float *run(struct session *s, const uint32_t *t, uint32_t n, uint32_t chunk)
{
    float *copy = calloc(vocab, sizeof(*copy));
    const float *l = NULL;

    for (uint32_t at = 0; at < n; at += chunk)
        assert(session_eval(s, t + at, MIN(chunk, n - at), &l) == 0);
    memcpy(copy, l, vocab * sizeof(*copy));
    return copy;
}

static float *run_fresh(struct engine *e, const uint32_t *t, uint32_t n, uint32_t chunk)
{
    CLEANUP(session_freep) struct session *s = session_on(e);

    return run(s, t, n, chunk);
}

static bool same(const float *a, const float *b)
{
    return memcmp(a, b, vocab * sizeof(*a)) == 0;
}

static double distance(const float *a, const float *b)
{
    double d = 0;

    for (uint32_t i = 0; i < vocab; i++)
        d = fmax(d, fabs((double)a[i] - (double)b[i]));
    return d;
}

/* 1, 2: any chunking gives the bits of one shot, at lengths around the window and pages. */
static void check_chunks(struct engine *e)
{
    static const uint32_t lengths[] = {1, 2, 64, 65, WINDOW, WINDOW + 1, 141, LONGEST};
    static const uint32_t chunks[] = {1, 7, 100};

    for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
        CLEANUP(freep) float *whole = run_fresh(e, tokens, lengths[i], LONGEST);

        for (uint32_t v = 0; v < vocab; v++)
            assert(fabsf(whole[v]) < 30); /* 13 */
        for (size_t c = 0; c < ARRAY_SIZE(chunks); c++) {
            CLEANUP(freep) float *pieces = run_fresh(e, tokens, lengths[i], chunks[c]);

            assert(same(whole, pieces));
        }
    }
}

/* 3: sequences of different lengths in one step, one ending early, equal themselves alone. */
static void check_batch(struct engine *e)
{
    enum { N = 5 };
    static const uint32_t lengths[N] = {1, 20, 64, 65, 90};
    struct session *s[N];
    struct step_item items[N];
    float *alone[N];

    for (int i = 0; i < N; i++) {
        s[i] = session_on(e);
        items[i] = (struct step_item){.session = s[i],
                                      .tokens = tokens + 31 * i,
                                      .n_tokens = lengths[i],
                                      .wanted = LOGITS_LAST};
    }
    assert(engine_step(e, items, N) == 0);
    for (int i = 0; i < N; i++) {
        alone[i] = run_fresh(e, tokens + 31 * i, lengths[i], LONGEST);
        assert(items[i].ret_error == 0 && same(items[i].ret_logits, alone[i]));
        free(alone[i]);
    }
    /* Decode them together for a while, the first leaves after three. */
    for (int t = 0; t < 10; t++) {
        int n = t < 3 ? 0 : 1;

        for (int i = n; i < N; i++)
            items[i] = (struct step_item){.session = s[i],
                                          .tokens = tokens + 1000 + 10 * i + t,
                                          .n_tokens = 1,
                                          .wanted = LOGITS_LAST};
        assert(engine_step(e, items + n, (size_t)(N - n)) == 0);
    }
    for (int i = 1; i < N; i++) {
        CLEANUP(freep) uint32_t *all = calloc(lengths[i] + 10, sizeof(*all));
        CLEANUP(freep) float *want = NULL;

        memcpy(all, tokens + 31 * i, lengths[i] * sizeof(*all));
        memcpy(all + lengths[i], tokens + 1000 + 10 * i, 10 * sizeof(*all));
        want = run_fresh(e, all, lengths[i] + 10, LONGEST);
        assert(same(items[i].ret_logits, want));
    }
    for (int i = 0; i < N; i++)
        session_free(s[i]);
}

/* 7: asking for every position, which forbids the skip, changes neither cache nor last logits. */
static void check_skip(struct engine *e)
{
    CLEANUP(session_freep) struct session *all = session_on(e), *last = session_on(e);
    struct step_item items[2] = {
        {.session = all, .tokens = tokens, .n_tokens = 100, .wanted = LOGITS_ALL},
        {.session = last, .tokens = tokens, .n_tokens = 100, .wanted = LOGITS_LAST}};
    CLEANUP(freep) float *l = calloc(vocab, sizeof(*l));
    size_t bytes = kv_page_bytes(kv_pool_shape(e->pool));

    assert(engine_step(e, items, 1) == 0);
    memcpy(l, items[0].ret_logits + (size_t)99 * vocab, vocab * sizeof(*l));
    assert(engine_step(e, items + 1, 1) == 0);
    assert(same(l, items[1].ret_logits));
    for (uint32_t i = 0; i < all->kv.n_layers; i++)
        for (uint32_t p = 0; p < 2; p++)
            assert(memcmp(all->kv.layers[i].data[p], last->kv.layers[i].data[p], bytes) == 0);
}

/* 5: a cache that let go of what lies before the window equals one that kept everything. */
static void check_ring(struct engine *e)
{
    CLEANUP(freep) float *ring = run_fresh(e, tokens, LONGEST, 50);
    struct kv_cache whole;

    assert(kv_cache_init(&whole, e->pool, e->config, NULL) == 0);
    for (uint32_t at = 0; at < LONGEST; at += 50) {
        assert(kv_cache_reserve(&whole, at, at + 50) == 0);
        for (uint32_t i = 0; i < 50; i++)
            e->lanes[LANE_CPU]->buf.rows[i] = (struct forward_row){
                .token = tokens[at + i], .pos = at + i, .kv = &whole, .wanted = i == 49};
        assert(forward(e->lanes[LANE_CPU], 50) == 0);
    }
    assert(same(ring, e->lanes[LANE_CPU]->buf.logits));
    for (uint32_t l = 0; l < whole.n_layers; l++)
        assert(whole.layers[l].data[0]);
    kv_cache_done(&whole);
}

/* Copies must not feel each other, before and after the page they share. */
static void check_fork(struct engine *e)
{
    static const uint32_t at[] = {1, 63, 64, 100, LONGEST};

    for (size_t i = 0; i < ARRAY_SIZE(at); i++) {
        CLEANUP(session_freep) struct session *a = session_on(e), *b = NULL;
        CLEANUP(freep) uint32_t *other = calloc(at[i] + 50, sizeof(*other));
        CLEANUP(freep) float *la = NULL, *lb = NULL, *wa = NULL, *wb = NULL;
        struct engine_memory before, after;

        free(run(a, tokens, at[i], LONGEST));
        engine_memory(e, &before);
        assert(session_fork(&b, a, NULL) == 0 && session_n_tokens(b) == at[i] &&
               b->n_cached == at[i]);
        engine_memory(e, &after);
        assert(before.kv_bytes_used == after.kv_bytes_used);
        memcpy(other, tokens, at[i] * sizeof(*other));
        memcpy(other + at[i], tokens + 2000, 50 * sizeof(*other));
        free(run(b, tokens + 2000, 40, 13));
        la = run(a, tokens + at[i], 50, 50); /* writes where b has written */
        lb = run(b, tokens + 2040, 10, 10);
        wa = run_fresh(e, tokens, at[i] + 50, LONGEST + 50);
        wb = run_fresh(e, other, at[i] + 50, LONGEST + 50);
        assert(same(la, wa) && same(lb, wb) && !same(la, lb));
    }
}

/* 17: back a little, back to a mark, back too far, back to nothing: as if it had never been. */
static void check_rewind(struct engine *e)
{
    static const struct {
        uint32_t to, mark;
        bool keeps;
    } cases[] = {
        {LONGEST - 1, KV_NO_MARK, true}, {LONGEST - KV_SLACK, KV_NO_MARK, true},
        {150, KV_NO_MARK, false},        {150, 150, true},
        {3, KV_NO_MARK, false},          {3, 3, true},
        {0, KV_NO_MARK, true},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        CLEANUP(session_freep) struct session *s = session_on(e);
        CLEANUP(freep) uint32_t *want = calloc(cases[i].to + 33, sizeof(*want));
        CLEANUP(freep) float *l = NULL, *expected = NULL;
        uint32_t mark = cases[i].mark == KV_NO_MARK ? 0 : cases[i].mark;

        if (mark > 0)
            free(run(s, tokens, mark, 64));
        session_set_mark(s, cases[i].mark == KV_NO_MARK ? SESSION_NO_MARK : mark);
        free(run(s, tokens + mark, LONGEST - mark, 64));
        session_rewind(s, cases[i].to);
        assert(session_n_tokens(s) == cases[i].to);
        assert((s->n_cached == cases[i].to) == cases[i].keeps);
        l = run(s, tokens + 3000, 33, 8);
        memcpy(want, tokens, cases[i].to * sizeof(*want));
        memcpy(want + cases[i].to, tokens + 3000, 33 * sizeof(*want));
        expected = run_fresh(e, want, cases[i].to + 33, LONGEST + 33);
        assert(same(l, expected));
        assert(memcmp(session_tokens(s), want, (cases[i].to + 33) * sizeof(*want)) == 0);
    }
}

/* Computes up to n of the missing tokens again, in one step with a new token of another session. */
static void recompute(struct session *s, uint32_t n, struct session *beside, const uint32_t *token)
{
    uint32_t missing = session_n_missing(s), size = session_n_tokens(s);
    struct step_item items[2] = {{.session = s, .n_tokens = MIN(n, missing)},
                                 {.session = beside, .tokens = token, .n_tokens = 1}};

    assert(engine_step(s->engine, items, beside ? 2 : 1) == 0);
    assert(items[0].ret_error == 0 && items[1].ret_error == 0 && !items[0].ret_logits);
    assert(session_n_missing(s) == missing - MIN(n, missing) && session_n_tokens(s) == size);
}

static uint64_t kv_used(const struct engine *e)
{
    struct engine_memory memory;

    engine_memory(e, &memory);
    return memory.kv_bytes_used;
}

/* What was dropped comes back as it was, in chunks of any size and beside others. */
static void check_drop(struct engine *e)
{
    static const uint32_t at[] = {1, 63, 64, 65, 141, LONGEST};
    static const uint32_t chunks[] = {1, 7, 64, LONGEST, 0 /* all, before the next new token */};

    for (size_t i = 0; i < ARRAY_SIZE(at); i++) {
        CLEANUP(freep) float *want = run_fresh(e, tokens, at[i] + 40, LONGEST + 40);

        for (size_t c = i % 2; c < ARRAY_SIZE(chunks); c += 2) {
            CLEANUP(session_freep) struct session *s = session_on(e), *fork = NULL, *late = NULL;
            CLEANUP(freep) float *whole = NULL, *kept = NULL, *copied = NULL;
            struct step_item wrong = {.session = s, .n_tokens = at[i] + 1};
            uint64_t used;
            uint32_t n = 0;

            free(run(s, tokens, at[i], 50));
            assert(session_n_missing(s) == 0);
            wrong.n_tokens = 1;
            assert(engine_step(e, &wrong, 1) == -EINVAL); /* nothing is missing */
            used = kv_used(e);
            assert(session_kv_bytes(s) == used && used > 0);
            assert(used <= engine_kv_bytes(e, at[i]));

            assert(session_fork(&fork, s, NULL) == 0 && session_kv_bytes(fork) == used);
            session_drop_kv(s);
            assert(session_kv_bytes(s) == 0 && session_kv_bytes(fork) == used);
            assert(kv_used(e) == used); /* the fork's */
            assert(session_n_tokens(s) == at[i] && session_n_missing(s) == at[i]);
            assert(memcmp(session_tokens(s), tokens, at[i] * sizeof(*tokens)) == 0);
            wrong.n_tokens = at[i] + 1;
            assert(engine_step(e, &wrong, 1) == -EINVAL);
            wrong = (struct step_item){.session = s, .n_tokens = 1, .wanted = LOGITS_LAST};
            assert(engine_step(e, &wrong, 1) == -EINVAL);
            assert(session_n_missing(s) == at[i]);

            for (; chunks[c] > 0 && session_n_missing(s) > 0; n++) {
                if (n == 1)
                    assert(session_fork(&late, s, NULL) == 0); /* half of it is back */
                recompute(s, chunks[c], n < 20 ? fork : NULL, tokens + at[i] + n);
            }
            whole = run(s, tokens + at[i], 40, 13);
            n = MIN(n, 20u);
            kept = run(fork, tokens + at[i] + n, 40 - n, 13);
            assert(session_n_missing(s) == 0 && same(whole, want) && same(kept, want));
            if (late) {
                assert(session_n_missing(late) == at[i] - chunks[c]);
                copied = run(late, tokens + at[i], 40, 40);
                assert(same(copied, want));
            }
            s = session_free(s);
            session_drop_kv(fork);
            late = session_free(late);
            assert(kv_used(e) == 0);
        }
    }
}

/* Dropping, rewinding and marks: each order leaves what is there, and no more, to be computed. */
static void check_drop_rewind(struct engine *e)
{
    static const struct {
        uint32_t mark, computed, to, missing;
    } cases[] = {
        {150, LONGEST, 150, 0}, /* all is back, and so is what the mark keeps */
        {KV_NO_MARK, LONGEST, 150, 150},
        {KV_NO_MARK, LONGEST, LONGEST - KV_SLACK, 0},
        {150, 0, 150, 150},
        {150, 0, 0, 0},
        {150, 100, 150, 50},
        {150, 100, 100, 0},
        {150, 100, 70, 0},
        {150, 100, 40, 0}, /* within what a rewind may reach */
        {3, 250, 3, 0},
        {3, 1, 3, 2},
        {3, 250, 2, 0}, /* in the page that the mark keeps */
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        CLEANUP(session_freep) struct session *s = session_on(e);
        CLEANUP(freep) uint32_t *want = calloc(cases[i].to + 33, sizeof(*want));
        CLEANUP(freep) float *l = NULL, *expected = NULL;

        free(run(s, tokens, LONGEST, 64));
        session_set_mark(s, cases[i].mark);
        session_drop_kv(s);
        while (LONGEST - session_n_missing(s) < cases[i].computed)
            recompute(s, MIN(40u, cases[i].computed - (LONGEST - session_n_missing(s))), NULL,
                      NULL);
        session_rewind(s, cases[i].to);
        assert(session_n_tokens(s) == cases[i].to);
        assert(session_n_missing(s) == cases[i].missing);
        if (cases[i].missing > 1)
            recompute(s, cases[i].missing / 2, NULL, NULL);
        l = run(s, tokens + 3000, 33, 8);
        memcpy(want, tokens, cases[i].to * sizeof(*want));
        memcpy(want + cases[i].to, tokens + 3000, 33 * sizeof(*want));
        expected = run_fresh(e, want, cases[i].to + 33, LONGEST + 33);
        assert(same(l, expected));
    }
    assert(kv_used(e) == 0);
}

/* A pool of engine_kv_bytes() is enough whatever the chunks and wherever the mark; and where it is
 * not, computing again says so and goes on later. */
static void check_kv_bytes(const struct model *m, const struct engine_options *options)
{
    struct engine_options small = *options;
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(session_freep) struct session *s = NULL, *other = NULL;
    CLEANUP(freep) float *l = NULL, *want = NULL;
    struct step_item item;

    small.max_rows = 50;
    e = engine_on(m, small);
    assert(engine_kv_bytes(e, 0) == 0);
    small.kv_bytes = engine_kv_bytes(e, 1000);
    e = engine_free(e);
    e = engine_on(m, small);
    s = session_on(e);
    for (uint32_t i = 0; i < 1000; i += 25) { /* a mark that stays far behind, and chunks of both */
        if (i == 200)
            session_set_mark(s, 200);
        if (i % 50 == 0)
            assert(session_eval(s, tokens + i, i % 100 ? 50 : 25, NULL) == 0);
        else if (i % 100 == 25)
            assert(session_eval(s, tokens + i, 25, NULL) == 0);
    }
    assert(session_n_tokens(s) == 1000 && session_kv_bytes(s) <= small.kv_bytes);

    /* Two of them have no room; the second gets as far as it goes. */
    other = session_on(e);
    assert(session_eval(other, tokens, 1000, NULL) == -ENOBUFS);
    session_drop_kv(s);
    session_rewind(s, 500);
    assert(session_eval(other, tokens + session_n_tokens(other), 900 - session_n_tokens(other),
                        NULL) == 0);
    do {
        uint32_t missing = session_n_missing(s);

        item = (struct step_item){.session = s, .n_tokens = MIN(40u, missing)};
        assert(engine_step(e, &item, 1) == 0);
        if (item.ret_error < 0)
            assert(session_n_missing(s) == missing && session_n_tokens(s) == 500);
    } while (item.ret_error == 0);
    assert(item.ret_error == -ENOBUFS && session_n_missing(s) > 0);
    session_drop_kv(other);
    while (session_n_missing(s) > 0)
        recompute(s, 40, NULL, NULL);
    l = run(s, tokens + 500, 10, 10);
    session_drop_kv(s);
    want = run_fresh(e, tokens, 510, 510);
    assert(same(l, want));
    assert(kv_used(e) == 0);
}

/* Nobody else's bits depend on the errors of an item, and the item's session stays as it was. */
static void check_errors(const struct model *m, const struct engine_options *options)
{
    struct engine_options small = *options;
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(session_freep) struct session *good = NULL, *bad = NULL, *tight = NULL;
    CLEANUP(freep) float *want = NULL, *alone = NULL, *first = calloc(vocab, sizeof(*first));
    uint32_t wrong[2] = {1, 0}, held;
    struct engine_memory memory;
    struct step_item items[3];
    const float *l;

    small.kv_bytes = 40 * kv_page_bytes(&(struct kv_shape){2, 32, options->kv_type == KV_F16});
    e = engine_on(m, small);
    wrong[1] = vocab;
    good = session_on(e);
    bad = session_on(e);
    assert(session_new(&tight, e, 10, NULL) == 0);
    assert(session_new(&(struct session *){NULL}, e, 8193, NULL) == -EINVAL);
    items[0] =
        (struct step_item){.session = bad, .tokens = wrong, .n_tokens = 2, .wanted = LOGITS_LAST};
    items[1] = (struct step_item){
        .session = good, .tokens = tokens, .n_tokens = 30, .wanted = LOGITS_LAST};
    items[2] = (struct step_item){.session = tight, .tokens = tokens, .n_tokens = 11};
    assert(engine_step(e, items, 3) == 0);
    assert(items[0].ret_error == -EINVAL && items[1].ret_error == 0);
    assert(items[2].ret_error == -EMSGSIZE && session_n_tokens(tight) == 0);
    memcpy(first, items[1].ret_logits, vocab * sizeof(*first));
    want = run_fresh(e, tokens, 30, LONGEST);
    assert(same(first, want) && session_n_tokens(good) == 30);
    items[1] = (struct step_item){.session = good, .tokens = tokens, .n_tokens = 1};
    items[2] = items[1];
    assert(engine_step(e, items + 1, 2) == -EINVAL); /* one session twice */
    assert(session_n_tokens(good) == 30);

    /* The pool holds 40 pages, five layers own K and V: the ninth page of the full layer is too
     * much some time; what is there goes on working once another session has left. */
    while (session_eval(bad, tokens, 64, &l) == 0)
        ;
    engine_memory(e, &memory);
    assert(memory.kv_bytes_used <= memory.kv_bytes_max);
    held = session_n_tokens(bad);
    assert(held > 0 && session_eval(bad, tokens, 64, &l) == -ENOBUFS);
    assert(session_n_tokens(bad) == held);
    free(want);
    want = run(good, tokens + 30, 20, 20);
    bad = session_free(bad);
    alone = run_fresh(e, tokens, 50, 50);
    assert(same(want, alone));
    good = session_free(good);
    tight = session_free(tight);
    engine_memory(e, &memory);
    assert(memory.kv_bytes_used == 0);
}

/* brief: without what neither a level nor a type of weights has a part in. */
static void check_all(const struct model *m, const struct engine_options *options, bool brief)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, *options);

    printf("%s\n", engine_description(e));
    fflush(stdout);
    check_batch(e);
    check_skip(e);
    check_errors(m, options);
    check_kv_bytes(m, options);
    if (brief)
        return;
    check_chunks(e);
    check_ring(e);
    check_fork(e);
    check_rewind(e);
    check_drop(e);
    check_drop_rewind(e);
}

/* 4: up to the window nobody can tell its size; beyond it everybody can. */
static void check_window(void)
{
    struct model_builder b = {.type = WEIGHT_F32, .seed = 3};
    struct engine_options o = {
        .activations = ACTIVATIONS_F32, .kv_type = KV_F32, .max_rows = LONGEST};
    float *l[2][2];

    for (int i = 0; i < 2; i++) {
        CLEANUP(model_freep) struct model *m = NULL;
        CLEANUP(engine_freep) struct engine *e = NULL;

        model_builder_config(&b.config, 10, 5, i ? 4096 : WINDOW);
        m = build(&b);
        e = engine_on(m, o);
        l[i][0] = run_fresh(e, tokens, WINDOW, WINDOW);
        l[i][1] = run_fresh(e, tokens, WINDOW + 1, WINDOW + 1);
    }
    assert(same(l[0][0], l[1][0]));
    assert(!same(l[0][1], l[1][1]));
    for (int i = 0; i < 4; i++)
        free(l[i / 2][i % 2]);
}

/* 6: K and V of layers up to the first full one depend on the last window - 1 tokens per layer. */
static void check_dependence(void)
{
    enum { W = 5, N = 60, CHANGED = 20 };
    struct model_builder b = {.type = WEIGHT_F32, .seed = 4};
    struct engine_options o = {.activations = ACTIVATIONS_F32, .kv_type = KV_F32};
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(engine_freep) struct engine *e = NULL;
    struct session *s[2];
    uint32_t t[N];

    model_builder_config(&b.config, 10, 10, W);
    m = build(&b);
    e = engine_on(m, o);
    memcpy(t, tokens, sizeof(t));
    for (int i = 0; i < 2; i++) {
        s[i] = session_on(e);
        t[CHANGED] ^= (uint32_t)i;
        free(run(s[i], t, N, N));
    }
    for (uint32_t l = 0; l < 10; l++)
        for (uint32_t p = 0; p < N; p++) {
            /* V [head 0][p]; the page holds K first */
            const float *v[2];
            bool differs;

            for (int i = 0; i < 2; i++)
                v[i] = (const float *)s[i]->kv.layers[l].data[0] + 2 * 32 * KV_PAGE + p * 32;
            differs = memcmp(v[0], v[1], 32 * sizeof(float)) != 0;
            if (l <= 4)
                assert(differs == (p >= CHANGED && p <= CHANGED + (W - 1) * l));
            else
                assert(differs == (p >= CHANGED));
        }
    session_free(s[0]);
    session_free(s[1]);
}

/* 12: directions matter, lengths do not, for what is normalised right after. */
static void check_scaling(void)
{
    static const char *const names[] = {NULL, "altup_projections.1", "altup_unembed_projections.2",
                                        "v_proj"};
    struct engine_options o = {.activations = ACTIVATIONS_F32, .kv_type = KV_F32};
    CLEANUP(freep) float *plain = NULL;

    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        struct model_builder b = {.type = WEIGHT_F32, .seed = 5, .scaled = names[i], .scale = 4};
        CLEANUP(model_freep) struct model *m = NULL;
        CLEANUP(engine_freep) struct engine *e = NULL;
        CLEANUP(freep) float *l = NULL;

        model_builder_config(&b.config, 10, 5, WINDOW);
        m = build(&b);
        e = engine_on(m, o);
        l = run_fresh(e, tokens, 40, 40);
        if (!plain)
            plain = TAKE_PTR(l);
        else
            assert(distance(plain, l) < 2e-3);
    }
}

/* 21, and more: threads change nothing. */
static void check_threads(const struct model *m, struct engine_options o)
{
    float *l[2];

    for (uint32_t i = 0; i < 2; i++) {
        CLEANUP(engine_freep) struct engine *e = NULL;

        o.n_threads = i + 1;
        e = engine_on(m, o);
        l[i] = run_fresh(e, tokens, 200, 90);
    }
    assert(same(l[0], l[1]));
    free(l[0]);
    free(l[1]);
}

/* Where no file may be as large as a quarter of the memory is, the default is less. */
static void check_default_kv_bytes(const struct model *m)
{
    const rlim_t limit = (rlim_t)256 << 20;
    pid_t child = fork();
    int status;

    assert(child >= 0);
    if (child == 0) {
        const struct engine_options options = {.n_threads = 1};
        struct engine_memory memory;
        struct engine *e;
        struct error err = {""};

        signal(SIGXFSZ, SIG_IGN);
        assert(setrlimit(RLIMIT_FSIZE, &(struct rlimit){limit, limit}) == 0);
        if (engine_new(&e, m, &options, &err) < 0) {
            fprintf(stderr, "%s\n", err.text);
            _exit(1);
        }
        engine_memory(e, &memory);
        _exit(memory.kv_bytes_max == 0 || memory.kv_bytes_max > limit / 4);
    }
    assert(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv)
{
    static const char *const levels[] = {"reference", "avx2", "avx512"};
    uint32_t x = 12345;

    assert(argc == 2);
    path = argv[1];
    vocab = 272;
    for (size_t i = 0; i < ARRAY_SIZE(tokens); i++) {
        x = x * 1664525u + 1013904223u;
        tokens[i] = (x >> 8) % vocab;
    }

    check_window();
    check_dependence();
    check_scaling();
    for (int t = WEIGHT_F32; t <= WEIGHT_Q4; t++) {
        struct model_builder b = {.type = (enum weight_type)t, .seed = 1};
        CLEANUP(model_freep) struct model *m = NULL;

        model_builder_config(&b.config, 10, 5, WINDOW);
        m = build(&b);
        if (t == WEIGHT_F32)
            check_default_kv_bytes(m);
        for (size_t i = 0; i < ARRAY_SIZE(levels); i++)
            for (int mode = 0; mode < 2; mode++) {
                struct engine_options o = {
                    .activations = mode ? ACTIVATIONS_F32 : ACTIVATIONS_INT8,
                    .kv_type = mode ? KV_F32 : KV_F16,
                    .cpu_level = levels[i],
                    .n_threads = 1, /* check_threads() tries more; two only wait here */
                    .max_rows = LONGEST + 90,
                    .max_logits = 128,
                };
                struct backend_limits limits = {1, 64, 1};
                struct backend *probe;

                if (i == 0 && t != (mode ? WEIGHT_F32 : WEIGHT_Q4))
                    continue;
                if (mode == 0 && !weight_type_is_quantized(b.type))
                    continue;
                if (backend_cpu_new(&probe, levels[i], 1, &limits, NULL) < 0)
                    continue;
                backend_free(probe);
                check_all(m, &o, i == 0 || (i == 1 && t != WEIGHT_F32 && t != WEIGHT_Q4));
                check_threads(m, o);
            }
    }
    unlink(path);
    return 0;
}
