/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Attention as the vector levels do it, page by page with a running maximum: scores of a page's 64
 * positions, the maximum so far, what was summed before scaled down to it, then the page's values.
 * Query heads that share a KV head are worked on together, so that K and V are read and widened
 * once for all; so are consecutive rows, which mostly are of one sequence: a page that several see
 * comes into the first-level cache once. While the last row works on K its V is fetched, and so on
 * from page to page: the processor's own prefetching does not see through rows of a page, and
 * without it a single row reads its cache at a quarter of the memory's speed.
 *
 * Pages are summed up in runs of RUN_PAGES, and runs one after the other. Runs are absolute
 * positions, so a row's result depends on its position alone; and where rows are few, as when one
 * session decodes, threads can share a row's runs.
 *
 * Positions that the row does not see may hold anything, NaN of another session's hostile weights
 * included: their scores are replaced before use and their values not read.
 *
 * A level's file includes this and defines the steps in its own registers.
 */

#include <assert.h>
#include <math.h>
#include <string.h>

#include "backends/cpu/cpu.h"
#include "base/checked.h"

/* Query heads worked on together. */
#define GROUP CPU_ATTENTION_GROUP

/* Rows worked on together: their queries, sums and scores should stay in a second-level cache. */
#define BLOCK_ROWS CPU_ATTENTION_ROWS

/* Pages of a run. Each run costs a thread another look at the sums. */
#define RUN_PAGES 4

/* What takes constants must be inlined where they are given, or registers become arrays. */
#define ALWAYS_INLINE inline __attribute__((always_inline))

/* Terms of a score that are summed before they are added to the rest (see the bound). */
#define SCORE_RUN 16

/*
 * Scores of the page's positions; k [head_dim][KV_PAGE]. ahead: an array of the same size that is
 * wanted next, or NULL.
 */
static ALWAYS_INLINE void page_scores(const void *k, bool f16, const float *q, uint32_t dim,
                                      uint32_t n, uint32_t first, uint32_t last,
                                      float (*score)[KV_PAGE], const char *ahead);

/* Scores to weights in place, 0 where not seen; the new maximum and what the past is worth now. */
static inline float page_weights(float *score, uint32_t first, uint32_t last, float *max,
                                 double *sum);

/* out [n][dim] = out * scale + the page's values by their weights; v [KV_PAGE][head_dim] */
static ALWAYS_INLINE void page_values(const void *v, bool f16, uint32_t dim, uint32_t n,
                                      uint32_t first, uint32_t last, const float (*weight)[KV_PAGE],
                                      const float *scale, float *out, const char *ahead);

/* exp(x) for x <= 0 */
static inline float exp_one(float x);

/* Lines of 64 bytes, as many as `bytes` are, at an offset of what is wanted next. */
static ALWAYS_INLINE void fetch(const char *ahead, size_t at, size_t bytes)
{
    if (ahead)
        for (size_t i = 0; i < bytes; i += 64)
            __builtin_prefetch(ahead + at + i, 0, 3);
}

/* What positions add up to, for the heads of a group. */
struct attention_sums {
    float *out; /* [n][dim] */
    float max[GROUP];
    double sum[GROUP];
};

/* What a row sees of a page; page NULL: nothing. */
struct attention_view {
    const char *page;
    uint32_t first, last;
};

static inline uint32_t first_seen(const struct attention_args *a, uint32_t row)
{
    uint32_t pos = a->rows[row].pos;

    return a->window && pos >= a->window ? pos - a->window + 1 : 0;
}

static inline struct attention_view view_of(const struct attention_args *a, uint32_t row,
                                            uint32_t page)
{
    uint32_t pos = a->rows[row].pos, begin = first_seen(a, row);

    if (page < begin / KV_PAGE || page > pos / KV_PAGE)
        return (struct attention_view){0};
    return (struct attention_view){
        .page = a->rows[row].pages[page],
        .first = page == begin / KV_PAGE ? begin % KV_PAGE : 0,
        .last = page == pos / KV_PAGE ? pos % KV_PAGE + 1 : KV_PAGE,
    };
}

/*
 * What to fetch while row r works on its page: the next page that is another one, or the first of
 * what comes then; nothing where the row before did that.
 */
static inline const char *ahead_of(const struct attention_view *now, uint32_t r, size_t at,
                                   const struct attention_view *then, size_t then_at, uint32_t n)
{
    if (r > 0 && now[r].page == now[r - 1].page)
        return NULL;
    for (uint32_t i = r + 1; i < n; i++)
        if (now[i].page && now[i].page != now[r].page)
            return now[i].page + at;
    for (uint32_t i = 0; i < n; i++)
        if (then[i].page)
            return then[i].page + then_at;
    return NULL;
}

/*
 * Sums of a run for rows row..row + n_rows - 1 and n heads of one KV head. n and f16 are constants
 * where this is used.
 */
static ALWAYS_INLINE void attend_run(const struct attention_args *a, uint32_t row, uint32_t n_rows,
                                     uint32_t run, uint32_t head, uint32_t n, uint32_t head_kv,
                                     bool f16, struct attention_sums *sums,
                                     float (*score)[GROUP][KV_PAGE])
{
    uint32_t dim = a->shape.head_dim, size = f16 ? 2 : 4;
    size_t k_at = (size_t)head_kv * dim * KV_PAGE * size;
    size_t v_at = (size_t)a->shape.n_heads_kv * dim * KV_PAGE * size + k_at;
    struct attention_view views[2][BLOCK_ROWS], *now = views[0], *then = views[1], *other;
    float scale[GROUP];

    for (uint32_t r = 0; r < n_rows; r++) {
        then[r] = view_of(a, row + r, run * RUN_PAGES);
        memset(sums[r].out, 0, (size_t)n * dim * sizeof(*sums[r].out));
        for (uint32_t g = 0; g < n; g++) {
            sums[r].max[g] = -INFINITY;
            sums[r].sum[g] = 0;
        }
    }
    for (uint32_t page = run * RUN_PAGES; page < (run + 1) * RUN_PAGES; page++) {
        other = now;
        now = then;
        then = other;
        for (uint32_t r = 0; r < n_rows; r++)
            then[r] = view_of(a, row + r, page + 1);
        for (uint32_t r = 0; r < n_rows; r++)
            if (now[r].page)
                page_scores(now[r].page + k_at, f16, a->q + (row + r) * a->ld + (size_t)head * dim,
                            dim, n, now[r].first, now[r].last, score[r],
                            ahead_of(now, r, k_at, now, v_at, n_rows));
        for (uint32_t r = 0; r < n_rows; r++) {
            if (!now[r].page)
                continue;
            for (uint32_t g = 0; g < n; g++)
                scale[g] = page_weights(score[r][g], now[r].first, now[r].last, &sums[r].max[g],
                                        &sums[r].sum[g]);
            page_values(now[r].page + v_at, f16, dim, n, now[r].first, now[r].last, score[r], scale,
                        sums[r].out, ahead_of(now, r, v_at, then, k_at, n_rows));
        }
    }
}

/* to := to and part together. */
static inline void add_sums(struct attention_sums *to, const struct attention_sums *part,
                            uint32_t n, uint32_t dim)
{
    for (uint32_t g = 0; g < n; g++) {
        float max = fmaxf(to->max[g], part->max[g]);
        float old = exp_one(to->max[g] - max), new = exp_one(part->max[g] - max);
        float *x = to->out + (size_t)g * dim;
        const float *y = part->out + (size_t)g * dim;

        for (uint32_t i = 0; i < dim; i++)
            x[i] = fmaf(y[i], new, x[i] * old);
        to->max[g] = max;
        to->sum[g] = to->sum[g] * (double)old + part->sum[g] * (double)new;
    }
}

static inline void finish_sums(struct attention_sums *s, uint32_t n, uint32_t dim)
{
    for (uint32_t g = 0; g < n; g++) {
        float r = (float)(1 / s->sum[g]);

        for (uint32_t i = 0; i < dim; i++)
            s->out[(size_t)g * dim + i] *= r;
    }
}

/* What a thread works on. */
struct attention_task {
    const struct attention_args *a;
    uint32_t n_groups;   /* of a KV head */
    uint32_t block_rows; /* of an item */

    /* Where a row's runs are items of their own: sums of all rows' runs first_run.. */
    uint32_t first_run, n_runs;
    float *out;  /* [n_runs][n][n_heads * head_dim] */
    float *max;  /* [n_runs][n][n_heads] */
    double *sum; /* likewise */
};

struct attention_scratch {
    float score[BLOCK_ROWS][GROUP][KV_PAGE];
    float out[BLOCK_ROWS][GROUP * BACKEND_MAX_HEAD_DIM];
};

static_assert(sizeof(struct attention_scratch) <= CPU_ATTENTION_SCRATCH, "scratch");

/* Group number `group` of all KV heads' groups: its heads, and which KV head they share. */
struct attention_group {
    uint32_t head, n, head_kv;
};

static inline struct attention_group group_of(const struct attention_task *t, uint32_t group)
{
    uint32_t n_kv = t->a->shape.n_heads_kv, n_heads = t->a->n_heads, j = group / t->n_groups;
    uint32_t begin = (uint32_t)DIV_ROUND_UP((uint64_t)j * n_heads, n_kv);
    uint32_t end = (uint32_t)DIV_ROUND_UP((uint64_t)(j + 1) * n_heads, n_kv);
    uint32_t head = begin + group % t->n_groups * GROUP;

    return (struct attention_group){head, head < end ? MIN(end - head, (uint32_t)GROUP) : 0, j};
}

/* attend_run() with its constants. */
static void attend(const struct attention_args *a, uint32_t row, uint32_t n_rows, uint32_t run,
                   struct attention_group g, struct attention_sums *sums,
                   float (*score)[GROUP][KV_PAGE])
{
    switch (a->shape.f16 ? g.n : g.n + GROUP) {
    case 1:
        attend_run(a, row, n_rows, run, g.head, 1, g.head_kv, true, sums, score);
        break;
    case 2:
        attend_run(a, row, n_rows, run, g.head, 2, g.head_kv, true, sums, score);
        break;
    case 3:
        attend_run(a, row, n_rows, run, g.head, 3, g.head_kv, true, sums, score);
        break;
    case 4:
        attend_run(a, row, n_rows, run, g.head, 4, g.head_kv, true, sums, score);
        break;
    case GROUP + 1:
        attend_run(a, row, n_rows, run, g.head, 1, g.head_kv, false, sums, score);
        break;
    case GROUP + 2:
        attend_run(a, row, n_rows, run, g.head, 2, g.head_kv, false, sums, score);
        break;
    case GROUP + 3:
        attend_run(a, row, n_rows, run, g.head, 3, g.head_kv, false, sums, score);
        break;
    case GROUP + 4:
        attend_run(a, row, n_rows, run, g.head, 4, g.head_kv, false, sums, score);
        break;
    }
}

static inline float *out_of(const struct attention_args *a, uint32_t row, uint32_t head)
{
    return a->out + row * a->ld + (size_t)head * a->shape.head_dim;
}

/* Whether the row sees something of the run. */
static inline bool sees(const struct attention_args *a, uint32_t row, uint32_t run)
{
    return run >= first_seen(a, row) / KV_PAGE / RUN_PAGES &&
           run <= a->rows[row].pos / KV_PAGE / RUN_PAGES;
}

/* Items are pairs of a block of rows and a group of heads. */
static void attend_blocks(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct attention_task *t = args;
    const struct attention_args *a = t->a;
    struct attention_scratch *s = scratch;
    uint32_t n_groups = t->n_groups * a->shape.n_heads_kv, dim = a->shape.head_dim;

    memset(s->score, 0, sizeof(s->score)); /* not all scores of a page are computed */
    for (uint32_t item = first; item < last; item++) {
        struct attention_group g = group_of(t, item % n_groups);
        uint32_t row = item / n_groups * t->block_rows, n = MIN(a->n - row, t->block_rows);
        struct attention_sums total[BLOCK_ROWS], part[BLOCK_ROWS];
        uint32_t begin = UINT32_MAX, end = 0;

        if (g.n == 0)
            continue;
        for (uint32_t r = 0; r < n; r++) {
            begin = MIN(begin, first_seen(a, row + r) / KV_PAGE / RUN_PAGES);
            end = MAX(end, a->rows[row + r].pos / KV_PAGE / RUN_PAGES);
            total[r].out = NULL;
        }
        for (uint32_t run = begin; run <= end; run++) {
            for (uint32_t r = 0; r < n; r++) /* the first run of each row goes where it belongs */
                part[r].out =
                    !total[r].out && sees(a, row + r, run) ? out_of(a, row + r, g.head) : s->out[r];
            attend(a, row, n, run, g, part, s->score);
            for (uint32_t r = 0; r < n; r++) {
                if (!sees(a, row + r, run))
                    continue;
                if (total[r].out)
                    add_sums(&total[r], &part[r], g.n, dim);
                else
                    total[r] = part[r];
            }
        }
        for (uint32_t r = 0; r < n; r++)
            finish_sums(&total[r], g.n, dim);
    }
}

/* Sums of a row's run for a group of heads, in the shared memory. */
static inline struct attention_sums sums_of(const struct attention_task *t, uint32_t row,
                                            uint32_t run, uint32_t head)
{
    const struct attention_args *a = t->a;
    size_t at = ((size_t)(run - t->first_run) * a->n + row) * a->n_heads + head;
    struct attention_sums s = {.out = t->out + at * a->shape.head_dim};

    memcpy(s.max, t->max + at, sizeof(s.max));
    memcpy(s.sum, t->sum + at, sizeof(s.sum));
    return s;
}

/* Items are a row, a group of heads and a run; runs that the row does not see stay undefined. */
static void attend_runs(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct attention_task *t = args;
    const struct attention_args *a = t->a;
    struct attention_scratch *s = scratch;
    uint32_t n_groups = t->n_groups * a->shape.n_heads_kv;

    memset(s->score[0], 0, sizeof(s->score[0]));
    for (uint32_t item = first; item < last; item++) {
        uint32_t run = t->first_run + item % t->n_runs, pair = item / t->n_runs;
        struct attention_group g = group_of(t, pair % n_groups);
        uint32_t row = pair / n_groups;
        struct attention_sums sums;
        size_t at = ((size_t)(run - t->first_run) * a->n + row) * a->n_heads + g.head;

        if (!sees(a, row, run) || g.n == 0)
            continue;
        sums.out = t->out + at * a->shape.head_dim;
        attend(a, row, 1, run, g, &sums, s->score);
        memcpy(t->max + at, sums.max, g.n * sizeof(sums.max[0]));
        memcpy(t->sum + at, sums.sum, g.n * sizeof(sums.sum[0]));
    }
}

/* Items are pairs of a row and a group of heads: their runs are there, and added up in order. */
static void join_runs(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct attention_task *t = args;
    const struct attention_args *a = t->a;
    uint32_t n_groups = t->n_groups * a->shape.n_heads_kv, dim = a->shape.head_dim;

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        struct attention_group g = group_of(t, item % n_groups);
        uint32_t row = item / n_groups, run = first_seen(a, row) / KV_PAGE / RUN_PAGES;
        struct attention_sums total;

        if (g.n == 0)
            continue;
        total = sums_of(t, row, run, g.head);
        memcpy(out_of(a, row, g.head), total.out, (size_t)g.n * dim * sizeof(*total.out));
        total.out = out_of(a, row, g.head);
        while (sees(a, row, ++run)) {
            struct attention_sums part = sums_of(t, row, run, g.head);

            add_sums(&total, &part, g.n, dim);
        }
        finish_sums(&total, g.n, dim);
    }
}

/* Whether the rows' runs are to be items of their own, and where their sums are then. */
static inline bool split_runs(struct cpu_backend *c, struct attention_task *t)
{
    const struct attention_args *a = t->a;
    uint32_t n_items = a->n * t->n_groups * a->shape.n_heads_kv, begin = UINT32_MAX, end = 0;
    size_t slots;

    if (c->n_threads == 1 || n_items >= c->n_threads * 4)
        return false;
    for (uint32_t i = 0; i < a->n; i++) {
        begin = MIN(begin, first_seen(a, i) / KV_PAGE / RUN_PAGES);
        end = MAX(end, a->rows[i].pos / KV_PAGE / RUN_PAGES);
    }
    t->first_run = begin;
    t->n_runs = end - begin + 1;
    if (t->n_runs == 1 || (n_items >= c->n_threads && t->n_runs < 6))
        return false; /* joining them costs more than threads that wait */

    /* GROUP more, since sums are read group by group */
    slots = (size_t)t->n_runs * a->n * a->n_heads + GROUP;
    if (slots > CPU_ATTENTION_SHARED / (a->shape.head_dim * sizeof(float) + 12))
        return false;
    t->sum = cpu_shared(c);
    t->max = (float *)(t->sum + slots);
    t->out = t->max + slots;
    return true;
}

/* The operation; lanes: values that a register of this level holds, for the cost. */
static inline void attention_over_pages(struct backend *b, const struct attention_args *a,
                                        uint32_t lanes)
{
    struct cpu_backend *c = cpu_backend(b);
    uint32_t n_groups, n_heads_kv = a->shape.n_heads_kv;
    struct attention_task t = {.a = a};
    uint64_t positions = 0;
    size_t cost; /* of a row and a group */

    assert(a->shape.head_dim <= BACKEND_MAX_HEAD_DIM && a->n_heads >= n_heads_kv);
    if (a->n == 0)
        return;
    t.n_groups = DIV_ROUND_UP(DIV_ROUND_UP(a->n_heads, n_heads_kv), GROUP);
    n_groups = t.n_groups * n_heads_kv;
    for (uint32_t i = 0; i < a->n; i++)
        positions += a->rows[i].pos + 1 - first_seen(a, i);
    cost = (size_t)(positions / a->n) * a->shape.head_dim * (8 * a->n_heads / n_groups) / lanes;

    if (split_runs(c, &t)) {
        cpu_parallel(c, a->n * n_groups * t.n_runs, cost / t.n_runs, attend_runs, &t);
        cpu_parallel(c, a->n * n_groups,
                     (size_t)t.n_runs * a->shape.head_dim * (a->n_heads / n_groups), join_runs, &t);
        return;
    }
    t.block_rows = MIN(MAX(a->n * n_groups / (c->n_threads * 4), 1u), (uint32_t)BLOCK_ROWS);
    cpu_parallel(c, DIV_ROUND_UP(a->n, t.block_rows) * n_groups, cost * t.block_rows, attend_blocks,
                 &t);
}
