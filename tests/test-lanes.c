/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Two lanes: steps that are under way on both at once give the bits of steps one after another,
 * whatever happens to the sessions meanwhile; a device that is lost in the middle changes nothing,
 * not even when it goes on writing. The device is tests/queued-backend.h, which computes as the
 * processor does, so that every comparison is of bits.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/model-file.h"
#include "engine/session.h"
#include "tests/model-builder.h"
#include "tests/must.h"
#include "tests/queued-backend.h"

#define WINDOW 70 /* not a multiple of a page */
#define CONTEXT 600
#define MAX_ROWS 90
#define MAX_LOGITS 6
#define N_SESSIONS 5

static uint32_t state = 1, vocab, context;

static uint32_t below(uint32_t n)
{
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % n;
}

static struct model *build(const char *path, enum weight_type type)
{
    struct model_builder b = {.type = type, .seed = 3};
    struct model *m;

    model_builder_config(&b.config, 10, 5, WINDOW);
    b.config.context_max = CONTEXT;
    model_builder_write(&b, path);
    m = must_open(path);
    vocab = b.config.vocab_size;
    context = b.config.context_max;
    return m;
}

static struct engine *engine_on(const struct model *m, uint64_t kv_bytes)
{
    struct engine_options o = {
        .gpu_activations = ACTIVATIONS_INT8, /* as the processor's, for the same bits */
        .n_threads = 1,
        .max_rows = MAX_ROWS,
        .max_logits = MAX_LOGITS,
        .kv_bytes = kv_bytes,
    };

    return must_engine(m, &o);
}

#define PLENTY ((uint64_t)32 << 20)

static struct queued_backend *add_device(struct engine *e, struct queued_options o)
{
    struct queued_backend *q = queued_backend_new(&e->limits, &o);
    struct error err = {""};

    if (engine_add_lane(e, queued_backend_base(q), &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    assert(engine_has_gpu(e));
    return q;
}

static float *copy_logits(const float *l)
{
    float *copy = malloc(vocab * sizeof(*copy));

    assert(copy && l);
    memcpy(copy, l, vocab * sizeof(*copy));
    return copy;
}

/* What all of a session's tokens give, on the processor alone. */
static float *expected(struct engine *reference, const uint32_t *tokens, uint32_t n)
{
    struct session *s;
    const float *l = NULL;
    float *r;

    assert(session_new(&s, reference, 0, NULL) == 0);
    assert(session_eval(s, tokens, n, &l) == 0);
    r = copy_logits(l);
    session_free(s);
    return r;
}

static void check_session(struct engine *reference, struct session *s, enum engine_lane lane)
{
    uint32_t n = session_n_tokens(s), next = below(vocab);
    CLEANUP(freep) uint32_t *all = calloc(n + 1, sizeof(*all));
    CLEANUP(freep) float *want = NULL;
    struct step_item item = {.session = s, .tokens = &next, .n_tokens = 1, .wanted = LOGITS_LAST};

    if (n == session_n_ctx(s))
        return;
    memcpy(all, session_tokens(s), n * sizeof(*all));
    all[n] = next;
    want = expected(reference, all, n + 1);
    assert(engine_start(session_engine(s), lane, &item, 1) == 0);
    assert(engine_end(session_engine(s), lane) == 0 && item.ret_error == 0);
    assert(memcmp(item.ret_logits, want, vocab * sizeof(*want)) == 0);
    assert(session_n_tokens(s) == n + 1 && session_n_missing(s) == 0);
    assert(session_lanes(s) & 1u << lane);
}

/* ---- whatever may happen ---- */

/* A step of some of the sessions; what was put into it, to be looked at when it is over. */
struct round {
    struct step_item items[N_SESSIONS];
    uint32_t tokens[N_SESSIONS][MAX_ROWS], before[N_SESSIONS];
    size_t n;
    bool is_under_way;
};

static void start(struct engine *e, enum engine_lane lane, struct round *r,
                  struct session *sessions[N_SESSIONS], unsigned which)
{
    uint32_t rows = engine_lane_max_rows(e, lane), logits = MAX_LOGITS;

    r->n = 0;
    for (uint32_t i = 0; i < N_SESSIONS; i++) {
        struct session *s = sessions[i];
        struct step_item *item = &r->items[r->n];
        uint32_t room = session_n_ctx(s) - session_n_tokens(s);

        if (!(which & 1u << i) || rows == 0)
            continue;
        *item = (struct step_item){.session = s};
        if (session_n_missing(s) > 0 && below(2)) {
            item->n_tokens = 1 + below(MIN(session_n_missing(s), rows));
        } else {
            if (room == 0)
                continue;
            item->tokens = r->tokens[i];
            item->n_tokens = below(2) ? 1 : 1 + below(MIN(rows, room));
            for (uint32_t k = 0; k < item->n_tokens; k++)
                r->tokens[i][k] = below(vocab);
            item->wanted = logits == 0                                 ? LOGITS_NONE
                           : item->n_tokens <= logits && below(3) == 0 ? LOGITS_ALL
                           : below(2)                                  ? LOGITS_LAST
                                                                       : LOGITS_NONE;
            logits -= item->wanted == LOGITS_ALL ? item->n_tokens : item->wanted == LOGITS_LAST;
        }
        rows -= item->n_tokens;
        r->before[r->n++] = session_n_tokens(s);
    }
    r->is_under_way = r->n > 0;
    if (r->n > 0)
        assert(engine_start(e, lane, r->items, r->n) == 0);
    if (r->n > 0) {
        assert(engine_start(e, lane, r->items, r->n) == -EBUSY);
        for (size_t i = 0; i < r->n; i++)
            assert(session_is_busy(r->items[i].session) &&
                   session_n_tokens(r->items[i].session) == r->before[i]);
    }
}

static void end(struct engine *e, enum engine_lane lane, struct round *r)
{
    uint32_t n_delays = 0;

    if (!r->is_under_way) {
        assert(engine_end(e, lane) == -EINVAL);
        return;
    }
    while (engine_wait(e, lane, 0) == -ETIMEDOUT)
        n_delays++;
    assert(lane == LANE_GPU || n_delays == 0);
    assert(engine_end(e, lane) == 0);
    for (size_t i = 0; i < r->n; i++) {
        const struct step_item *item = &r->items[i];

        assert(item->ret_error == 0 && !item->ret_logits == (item->wanted == LOGITS_NONE));
    }
    r->is_under_way = false;
}

/* Something that changes or copies a session, busy or not, and so waits for it. */
static void disturb(struct engine *e, struct session *sessions[N_SESSIONS])
{
    uint32_t i = below(N_SESSIONS), k = below(N_SESSIONS);
    struct session *s = sessions[i];
    char name[] = "/tmp/test-lanes-XXXXXX";
    int fd;

    switch (below(8)) {
    case 0:
        session_set_mark(s, 0);
        session_rewind(s, below(session_n_tokens(s) + 1));
        break;
    case 1:
        session_rewind(s, session_n_tokens(s) - MIN(session_n_tokens(s), below(90)));
        break;
    case 2:
        session_set_mark(s, session_n_tokens(s));
        break;
    case 3:
        session_drop_kv(s);
        assert(session_lanes(s) == 0);
        break;
    case 4:
        if (i == k)
            return;
        session_free(sessions[k]);
        assert(session_fork(&sessions[k], s, NULL) == 0);
        assert(session_lanes(sessions[k]) == session_lanes(s));
        break;
    case 5: {
        unsigned lanes;

        fd = mkstemp(name);
        assert(fd >= 0 && unlink(name) == 0);
        session_set_mark(s, SESSION_NO_MARK); /* whatever is in its pass counts from here on */
        lanes = session_lanes(s);
        assert(session_spill(s, fd, UINT64_MAX) == 0 && session_lanes(s) == 0);
        assert(session_unspill(s, fd, UINT64_MAX) == 0 && session_lanes(s) == lanes);
        close(fd);
        break;
    }
    case 6:
        session_free(s);
        assert(session_new(&sessions[i], e, 0, NULL) == 0);
        break;
    default:
        return;
    }
    assert(!session_is_busy(sessions[i]));
}

/* Puts a pool as asked for in the place of the engine's. */
static void change_pool(struct engine *e, struct kv_pool_options o)
{
    struct kv_shape shape = *kv_pool_shape(e->pool);
    struct kv_kind kind = *kv_pool_kind(e->pool);

    o.bytes_max = PLENTY;
    kv_pool_free(e->pool);
    assert(kv_pool_new(&e->pool, &shape, &kind, &o) == 0);
}

/* K and V lie in memory of the device's. */
static struct queued_backend *add_device_with_pool(struct engine *e, uint32_t map_limit)
{
    struct queued_options o = {.map_limit = map_limit, .refuses_shared = true};
    struct queued_backend *q = queued_backend_new(&e->limits, &o);
    struct error err;

    change_pool(e, (struct kv_pool_options){.fd = -1, .memory = queued_backend_base(q)});
    e->pool_backend = queued_backend_base(q);
    assert(engine_kv_fd(e) < 0 && !engine_kv_adopted(e) && engine_give_back(e) == 0);
    assert(engine_add_lane(e, queued_backend_base(q), &err) == 0);
    return q;
}

static void check_at_random(const struct model *m, struct engine *reference, bool has_pool)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    struct queued_backend *q = has_pool
                                   ? add_device_with_pool(e, 65536)
                                   : add_device(e, (struct queued_options){.map_limit = 65536});
    uint64_t given_back = 0;
    struct session *sessions[N_SESSIONS];
    struct round cpu = {0}, gpu = {0};
    struct queued_counts c;

    for (uint32_t i = 0; i < N_SESSIONS; i++)
        assert(session_new(&sessions[i], e, 0, NULL) == 0);
    for (uint32_t i = 0; i < 150; i++) {
        unsigned mine = below(1u << N_SESSIONS);

        queued_backend_delay(q, below(3));
        start(e, LANE_GPU, &gpu, sessions, mine);
        start(e, LANE_CPU, &cpu, sessions, ~mine);
        if (below(3) == 0)
            disturb(e, sessions);
        if (below(4) == 0)
            given_back += engine_give_back(e);
        if (below(2)) {
            end(e, LANE_CPU, &cpu);
            end(e, LANE_GPU, &gpu);
        } else {
            end(e, LANE_GPU, &gpu);
            end(e, LANE_CPU, &cpu);
        }
        if (i % 10 == 9)
            check_session(reference, sessions[below(N_SESSIONS)], (enum engine_lane)below(2));
    }
    for (uint32_t i = 0; i < N_SESSIONS; i++) {
        check_session(reference, sessions[i], (enum engine_lane)(i % 2));
        session_free(sessions[i]);
    }
    c = queued_backend_counts(q);
    assert(c.n_replayed > 0 && c.n_recorded > 0 && c.n_maps > 3 && given_back > 0);
    given_back = engine_give_back(e);
    assert(given_back > 0 && queued_backend_counts(q).bytes_shared == 0);
}

/* ---- keys ---- */

static void step_on(struct session *s, enum engine_lane lane, uint32_t n, enum logits_wanted wanted,
                    struct step_item *ret)
{
    uint32_t tokens[MAX_ROWS];

    for (uint32_t i = 0; i < n; i++)
        tokens[i] = below(vocab);
    for (uint32_t i = 0, here; i < n; i += here) {
        here = MIN(n - i, engine_lane_max_rows(session_engine(s), lane));
        *ret = (struct step_item){
            .session = s, .tokens = tokens + i, .n_tokens = here, .wanted = wanted};
        assert(engine_start(session_engine(s), lane, ret, 1) == 0);
        assert(engine_end(session_engine(s), lane) == 0 && ret->ret_error == 0);
    }
    ret->tokens = NULL;
}

/* A pass is recorded once for each (rows, wanted rows), and what it gives is this time's. */
static void check_keys(const struct model *m, struct engine *reference)
{
    static const struct {
        uint32_t n;
        enum logits_wanted wanted;
    } steps[] = {{1, LOGITS_LAST}, {1, LOGITS_NONE}, {5, LOGITS_ALL},
                 {5, LOGITS_LAST}, {5, LOGITS_NONE}, {60, LOGITS_LAST}};
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    struct queued_backend *q = add_device(e, (struct queued_options){0});
    CLEANUP(session_freep) struct session *s = NULL;
    struct step_item item;

    assert(session_new(&s, e, 0, NULL) == 0);
    for (int i = 0; i < 3; i++)
        for (size_t k = 0; k < ARRAY_SIZE(steps); k++) {
            step_on(s, LANE_GPU, steps[k].n, steps[k].wanted, &item);
            if (steps[k].wanted != LOGITS_NONE) {
                uint32_t n = steps[k].wanted == LOGITS_ALL ? steps[k].n : 1;
                CLEANUP(freep)
                float *want = expected(reference, session_tokens(s), session_n_tokens(s));

                assert(memcmp(item.ret_logits + (size_t)(n - 1) * vocab, want,
                              vocab * sizeof(*want)) == 0);
            }
        }
    assert(queued_backend_counts(q).n_recorded == ARRAY_SIZE(steps));
    assert(queued_backend_counts(q).n_replayed == 2 * ARRAY_SIZE(steps));
    session_free(TAKE_PTR(s));
}

/* ---- loss ---- */

struct before {
    uint32_t n_tokens, n_missing;
    uint64_t kv_bytes;
    unsigned lanes;
};

static struct before look(const struct session *s)
{
    return (struct before){session_n_tokens(s), session_n_missing(s), 0, session_lanes(s)};
}

/*
 * Two sessions are in the device's step when it is lost, one of them in the middle of a page, one
 * recomputing; a third is on the processor. `full`: there is no page left to save anything in.
 */
static void check_loss(const struct model *m, struct engine *reference, bool full, bool removes)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    struct queued_backend *q = add_device(e, (struct queued_options){0});
    struct session *s[3], *hog = NULL;
    struct step_item items[2], other, item;
    struct before before[2];
    uint32_t t[2][30];
    struct error err;

    for (int i = 0; i < 3; i++) {
        assert(session_new(&s[i], e, 0, NULL) == 0);
        step_on(s[i], LANE_GPU, 50, LOGITS_NONE, &item);
        step_on(s[i], LANE_CPU, 50, LOGITS_NONE, &item);
    }
    session_drop_kv(s[1]);
    for (uint32_t k = 0; k < 30; k++) {
        t[0][k] = below(vocab);
        t[1][k] = below(vocab);
    }
    items[0] =
        (struct step_item){.session = s[0], .tokens = t[0], .n_tokens = 30, .wanted = LOGITS_LAST};
    items[1] = (struct step_item){.session = s[1], .n_tokens = 34};
    other =
        (struct step_item){.session = s[2], .tokens = t[1], .n_tokens = 30, .wanted = LOGITS_LAST};
    if (full) { /* the budget is used up between the reservation and the loss */
        assert(session_new(&hog, e, 0, NULL) == 0);
        step_on(hog, LANE_CPU, 1, LOGITS_NONE, &item);
    }
    for (int i = 0; i < 2; i++)
        before[i] = look(s[i]);
    queued_backend_lose(q, 1);
    assert(engine_start(e, LANE_GPU, items, 2) == 0);
    if (full) {
        uint32_t page;

        while (kv_pool_get(e->pool, false, &page) == 0)
            ; /* never given back: see kv_pool_leave() below */
        kv_pool_leave(e->pool);
    } else {
        assert(engine_start(e, LANE_CPU, &other, 1) == 0);
        assert(engine_end(e, LANE_CPU) == 0);
    }
    if (removes) {
        engine_remove_gpu(e);
        assert(!engine_has_gpu(e) && !engine_lane_backend(e, LANE_GPU));
        assert(!session_is_busy(s[0]));
    }
    assert(engine_end(e, LANE_GPU) == -ENODEV);
    if (!removes) {
        assert(strstr(engine_lane_failure(e, LANE_GPU), "on purpose"));
        assert(engine_start(e, LANE_GPU, items, 2) == -ENODEV);
    }
    for (int i = 0; i < 2; i++) {
        struct before now = look(s[i]);

        assert(now.n_tokens == before[i].n_tokens && !session_is_busy(s[i]));
        assert(full || (now.n_missing == before[i].n_missing && now.lanes == before[i].lanes));
    }
    /* s[0]'s position 100 is in a page, and there was none for a copy of it */
    assert(session_n_missing(s[0]) == (full ? 100 : 0));
    if (!full) {
        /* The same items, on the processor; then the device wakes up and writes. */
        assert(engine_start(e, LANE_CPU, items, 2) == 0);
        assert(engine_end(e, LANE_CPU) == 0);
        if (!removes)
            queued_backend_finish_late(q);
        for (int i = 0; i < 3; i++) {
            assert(session_n_tokens(s[i]) == (i == 1 ? 100u : 130u));
            check_session(reference, s[i], LANE_CPU);
        }
        /* Nobody gets the pages that it may still write to. */
        assert(engine_give_back(e) == 0 || removes);
        if (removes) {
            q = add_device(e, (struct queued_options){0});
            for (int i = 0; i < 3; i++)
                check_session(reference, s[i], LANE_GPU);
            assert(engine_add_lane(e,
                                   queued_backend_base(
                                       queued_backend_new(&e->limits, &(struct queued_options){0})),
                                   &err) == -EALREADY);
        }
    }
    for (int i = 0; i < 3; i++)
        session_free(s[i]);
    session_free(hog);
}

/* What a lost device can write to no more is free again, however often that happens. */
static void check_losses(const struct model *m, struct engine *reference)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    struct session *s;
    struct step_item item;
    uint64_t used = 0;

    assert(session_new(&s, e, 0, NULL) == 0);
    for (int i = 0; i < 5; i++) {
        struct queued_backend *q = add_device(e, (struct queued_options){.lets_go = true});
        uint32_t t = below(vocab);

        session_rewind(s, 0);
        step_on(s, LANE_GPU, 80, LOGITS_NONE, &item);
        item = (struct step_item){.session = s, .tokens = &t, .n_tokens = 1};
        queued_backend_lose(q, 1);
        assert(engine_start(e, LANE_GPU, &item, 1) == 0);
        assert(engine_end(e, LANE_GPU) == -ENODEV);
        assert(i == 0 || kv_pool_bytes_used(e->pool) > used);
        engine_remove_gpu(e);
        check_session(reference, s, LANE_CPU);
        assert(i == 0 || kv_pool_bytes_used(e->pool) == used);
        used = kv_pool_bytes_used(e->pool);
    }
    session_free(s);
    assert(kv_pool_bytes_used(e->pool) == 0);
}

/* While tokens that are missing are computed before new ones, and within the start itself. */
static void check_loss_at_start(const struct model *m, struct engine *reference)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    struct queued_backend *q = add_device(e, (struct queued_options){0});
    struct session *s;
    struct step_item item;
    uint32_t t = below(vocab);

    assert(session_new(&s, e, 0, NULL) == 0);
    for (int i = 0; i < 5; i++)
        step_on(s, LANE_CPU, 40, LOGITS_NONE, &item);
    session_drop_kv(s);
    item = (struct step_item){.session = s, .tokens = &t, .n_tokens = 1, .wanted = LOGITS_LAST};
    queued_backend_lose(q, 2); /* 200 tokens are several passes */
    assert(engine_start(e, LANE_GPU, &item, 1) == -ENODEV);
    assert(engine_end(e, LANE_GPU) == -EINVAL);
    assert(session_n_tokens(s) == 200 &&
           session_n_missing(s) == 200 - engine_lane_max_rows(e, LANE_GPU));
    assert(session_lanes(s) == 1u << LANE_GPU && !session_is_busy(s));
    step_on(s, LANE_CPU, 1, LOGITS_NONE, &item);
    assert(session_lanes(s) == (1u << LANE_GPU | 1u << LANE_CPU));
    queued_backend_finish_late(q);
    check_session(reference, s, LANE_CPU);
    session_free(s);
}

/* ---- memory ---- */

static void check_refusals(const struct model *m)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    struct queued_options no_sharing = {.refuses_shared = true}, small = {.map_limit = 64};
    struct error err = {""};
    struct session *s;
    struct step_item item;

    assert(engine_add_lane(e, queued_backend_base(queued_backend_new(&e->limits, &no_sharing)),
                           &err) == -ENODEV);
    assert(strstr(err.text, "KV cache") && !engine_has_gpu(e));
    assert(engine_add_lane(e, queued_backend_base(queued_backend_new(&e->limits, &small)), &err) ==
           -E2BIG);
    assert(strstr(err.text, "at once") && !engine_has_gpu(e));
    assert(engine_add_gpu(e, &err) == -ENOENT);
    assert(session_new(&s, e, 0, NULL) == 0);
    item = (struct step_item){.session = s, .tokens = &(uint32_t){1}, .n_tokens = 1};
    assert(engine_start(e, LANE_GPU, &item, 1) == -ENODEV);
    step_on(s, LANE_CPU, 1, LOGITS_LAST, &item);
    session_free(s);
}

/* Pages are told to the device as they are taken, and are its own until they are given back. */
static void check_mapping(const struct model *m, struct engine *reference)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, (uint64_t)1 << 30);
    struct queued_backend *q = add_device(e, (struct queued_options){.map_limit = 1 << 18});
    struct queued_counts first = queued_backend_counts(q), then;
    const struct weight *table = &model_weights(m)->ple_embed;
    size_t file_bytes, table_bytes;
    struct session *s[40];
    struct step_item item;
    uint32_t free_pages[64], n_free;
    struct stat st;

    (void)model_file_map(model_get_file(m), &file_bytes);
    assert(weight_size(table->type, table->layout, table->n_out, table->n_in, &table_bytes) == 0);
    assert(first.bytes_weights <= file_bytes - table_bytes);
    assert(first.bytes_shared > 0 && first.bytes_shared <= 1 << 18);
    for (int i = 0; i < 40; i++) {
        assert(session_new(&s[i], e, 0, NULL) == 0);
        step_on(s[i], LANE_GPU, 70, LOGITS_NONE, &item);
    }
    then = queued_backend_counts(q);
    assert(then.bytes_shared >= kv_pool_bytes_used(e->pool) && then.bytes_shared < 1 << 28);
    assert(then.bytes_weights == first.bytes_weights);
    for (int i = 0; i < 40; i++)
        if (i != 20)
            session_free(s[i]);
    assert(engine_give_back(e) > 0);
    then = queued_backend_counts(q);
    assert(then.bytes_shared >= kv_pool_bytes_used(e->pool) && then.bytes_shared <= 2 << 18);
    assert(fstat(engine_kv_fd(e), &st) == 0);
    assert((uint64_t)st.st_blocks * 512 >=
           then.bytes_shared); /* free pages that it sees included */
    assert((uint64_t)st.st_blocks * 512 <= then.bytes_shared + 8192);
    n_free =
        (uint32_t)((then.bytes_shared - kv_pool_bytes_used(e->pool)) / kv_pool_page_bytes(e->pool));
    assert(n_free > 1 && n_free <= ARRAY_SIZE(free_pages));
    for (uint32_t i = 0; i < n_free; i++) /* what it sees comes first */
        assert(kv_pool_get(e->pool, false, &free_pages[i]) == 0);
    assert(kv_pool_map(e->pool, queued_backend_base(q)) == 0);
    assert(queued_backend_counts(q).bytes_shared == then.bytes_shared);
    for (uint32_t i = 0; i < n_free; i++)
        kv_pool_unref(e->pool, free_pages[i]);
    assert(session_new(&s[0], e, 0, NULL) == 0);
    for (int i = 0; i <= 20; i += 20) {
        step_on(s[i], LANE_GPU, 70, LOGITS_NONE, &item);
        check_session(reference, s[i], LANE_GPU);
        session_free(s[i]);
    }
    assert(engine_give_back(e) > 0 && queued_backend_counts(q).bytes_shared == 0);
    assert(fstat(engine_kv_fd(e), &st) == 0 && st.st_blocks * 512 <= 4096 + 8192);
    assert(engine_give_back(e) == 0);
}

/* A device's memory goes back when nothing in it is taken, and what is left of it comes first. */
static void check_chunks(struct kv_pool *p, size_t chunk)
{
    uint32_t n = (uint32_t)(chunk / kv_pool_page_bytes(p)), first, page;

    assert(n > 1 && kv_pool_get(p, true, &first) == 0 && first == 0);
    for (uint32_t i = 1; i < 2 * n; i++) {
        assert(kv_pool_get(p, true, &page) == 0 && page == i);
        memset(kv_pool_data(p, i), 0xff, kv_pool_page_bytes(p));
    }
    for (uint32_t i = 1; i < 2 * n; i++)
        kv_pool_unref(p, i);
    assert(kv_pool_give_back(p) == n * kv_pool_page_bytes(p));
    for (uint32_t i = 1; i < n; i++)
        assert(kv_pool_get(p, false, &page) == 0 && page < n);
    assert(kv_pool_give_back(p) == 0);
    assert(kv_pool_get(p, true, &page) == 0 && page >= n);
    for (size_t i = 0; i < kv_pool_page_bytes(p); i++)
        assert(((const char *)kv_pool_data(p, page))[i] == 0);
    kv_pool_unref(p, page);
    for (uint32_t i = 0; i < n; i++)
        kv_pool_unref(p, i);
    assert(kv_pool_give_back(p) == 2 * n * kv_pool_page_bytes(p));
}

/* Where a device sees no memory of others', K and V lie in its own; which outlives the lane. */
static void check_pool_of_device(const struct model *m, struct engine *reference)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    struct queued_backend *q = add_device_with_pool(e, 1 << 16);
    struct session *s[8];
    struct step_item item;

    assert(queued_backend_counts(q).bytes_shared == 0);
    check_chunks(e->pool, 1 << 16);
    for (uint32_t i = 0; i < 4; i++) {
        assert(session_new(&s[i], e, 0, NULL) == 0);
        step_on(s[i], LANE_GPU, 80, LOGITS_NONE, &item);
        step_on(s[i], LANE_CPU, 80, LOGITS_NONE, &item);
        check_session(reference, s[i], LANE_GPU);
    }
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t t = below(vocab);

        if (i == 2) {
            item = (struct step_item){.session = s[i], .tokens = &t, .n_tokens = 1};
            queued_backend_lose(q, 1);
            assert(engine_start(e, LANE_GPU, &item, 1) == 0);
            assert(engine_end(e, LANE_GPU) == -ENODEV);
            engine_remove_gpu(e);
        }
        check_session(reference, s[i], LANE_CPU);
        session_drop_kv(s[i]);
        check_session(reference, s[i], LANE_CPU);
    }
    for (uint32_t i = 4; i < 8; i++) { /* more than the device ever gave */
        assert(session_new(&s[i], e, 0, NULL) == 0);
        step_on(s[i], LANE_CPU, 80, LOGITS_NONE, &item);
        step_on(s[i], LANE_CPU, 80, LOGITS_NONE, &item);
        check_session(reference, s[i], LANE_CPU);
    }
    for (uint32_t i = 0; i < 8; i++)
        session_free(s[i]);
}

/* A GPU that computes with something else than the options said leaves a mark. */
static void check_changed(const struct model *m)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    unsigned gpu = 1u << LANE_GPU;
    struct step_item item;
    struct session *s, *f;

    add_device(e, (struct queued_options){0});
    assert(session_new(&s, e, 0, NULL) == 0);
    step_on(s, LANE_GPU, 20, LOGITS_NONE, &item);
    assert(session_lanes(s) == gpu);
    engine_remove_gpu(e);
    engine_set_gpu_activations(e, ACTIVATIONS_F32);
    add_device(e, (struct queued_options){0});
    assert(session_lanes(s) == gpu);
    step_on(s, LANE_GPU, 20, LOGITS_NONE, &item);
    assert(session_lanes(s) == (gpu | LANES_CHANGED));
    assert(session_fork(&f, s, NULL) == 0 && session_lanes(f) == (gpu | LANES_CHANGED));
    session_drop_kv(s);
    step_on(s, LANE_CPU, 1, LOGITS_NONE, &item);
    session_free(f);
    engine_remove_gpu(e);
    engine_set_gpu_activations(e, ACTIVATIONS_INT8);
    add_device(e, (struct queued_options){0});
    session_drop_kv(s);
    step_on(s, LANE_GPU, 1, LOGITS_NONE, &item);
    assert(session_lanes(s) == gpu);
    session_free(s);
}

/* ---- processes after this one ---- */

#define GPU_OF(n) ((const uint8_t[KV_IDENTITY]){n})

static void *new_memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    assert(p != MAP_FAILED);
    return p;
}

/* A process with that GPU takes over copies of both sessions. */
static void take_over(const struct model *m, int fd, const uint8_t *gpu, void *const memory[2],
                      bool has_first)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    size_t bytes = session_memory_bytes(e->config, 0);
    struct error err = {""};

    change_pool(e, (struct kv_pool_options){.fd = fd, .gpu = gpu});
    assert(engine_kv_adopted(e));
    for (int i = 0; i < 2; i++) {
        void *copy = new_memory(bytes);
        struct session *s;

        memcpy(copy, memory[i], bytes);
        assert(session_adopt(&s, e, 0, copy, &err) == 0);
        if (i == 0 && !has_first) {
            assert(session_n_missing(s) == session_n_tokens(s) && session_lanes(s) == 0);
        } else {
            assert(session_n_missing(s) == 0);
            assert(session_lanes(s) == (1u << LANE_CPU | (i == 0 ? 1u << LANE_GPU : 0)));
        }
        session_leave(s);
        (void)munmap(copy, bytes);
    }
    engine_adopted(e);
}

/* K and V that a GPU had a part in are of use where there is no other GPU. */
static void check_adoption(const struct model *m)
{
    CLEANUP(engine_freep) struct engine *e = engine_on(m, PLENTY);
    size_t bytes = session_memory_bytes(e->config, 0);
    void *memory[2] = {new_memory(bytes), new_memory(bytes)};
    char name[] = "/tmp/test-lanes-XXXXXX";
    int fd, spilled = mkstemp(name);
    struct step_item item;
    struct session *s[2];

    assert(spilled >= 0 && unlink(name) == 0);
    change_pool(e, (struct kv_pool_options){.fd = -1, .gpu = GPU_OF(1)});
    add_device(e, (struct queued_options){0});
    for (int i = 0; i < 2; i++) {
        assert(session_new(&s[i], e, 0, memory[i]) == 0);
        step_on(s[i], i == 0 ? LANE_GPU : LANE_CPU, 80, LOGITS_NONE, &item);
    }
    assert(session_spill(s[0], spilled, UINT64_MAX) == 0 && session_lanes(s[0]) == 0);
    assert(session_unspill(s[0], spilled, UINT64_MAX) == 0);
    step_on(s[0], LANE_CPU, 1, LOGITS_NONE, &item);
    session_leave(s[0]);
    session_leave(s[1]);
    fd = fcntl(engine_kv_fd(e), F_DUPFD_CLOEXEC, 3);
    assert(fd >= 0);
    take_over(m, fd, NULL, memory, true);
    take_over(m, fd, GPU_OF(1), memory, true);
    take_over(m, fd, GPU_OF(2), memory, false);
    take_over(m, fd, GPU_OF(1), memory, false); /* the pool is the other one's by now */
    take_over(m, fd, NULL, memory, true);
    close(fd);

    /* and so are files */
    for (uint8_t gpu = 0; gpu < 3; gpu++) {
        CLEANUP(engine_freep) struct engine *next = engine_on(m, PLENTY);
        CLEANUP(freep) uint32_t *tokens = calloc(80, sizeof(*tokens));
        struct session *again;

        change_pool(next, (struct kv_pool_options){.fd = -1, .gpu = gpu ? GPU_OF(gpu) : NULL});
        memcpy(tokens, (const char *)memory[0] + 4096, 80 * sizeof(*tokens));
        assert(session_new(&again, next, 0, NULL) == 0);
        assert(session_set_tokens(again, tokens, 80) == 0);
        assert(session_unspill(again, spilled, UINT64_MAX) == (gpu == 2 ? -EBADMSG : 0));
        assert(session_lanes(again) == (gpu == 2 ? 0 : 1u << LANE_GPU));
        session_free(again);
    }
    close(spilled);
    for (int i = 0; i < 2; i++)
        (void)munmap(memory[i], bytes);
}

int main(int argc, char **argv)
{
    static const enum weight_type types[] = {WEIGHT_Q4, WEIGHT_BF16};

    assert(argc >= 2);
    for (size_t i = 0; i < ARRAY_SIZE(types); i++) {
        CLEANUP(model_freep) struct model *m = build(argv[1], types[i]);
        struct engine *reference = engine_on(m, PLENTY);

        state = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 1;
        for (int has_pool = 0; has_pool < 2; has_pool++)
            check_at_random(m, reference, has_pool);
        check_keys(m, reference);
        for (int k = 0; k < 4; k++)
            check_loss(m, reference, k & 1, k & 2);
        check_losses(m, reference);
        check_loss_at_start(m, reference);
        check_refusals(m);
        check_mapping(m, reference);
        check_pool_of_device(m, reference);
        check_changed(m);
        check_adoption(m);
        engine_free(reference);
    }
    unlink(argv[1]);
    return 0;
}
