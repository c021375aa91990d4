/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * kv_store and attention (op-test.h), against the softmax written out here in double.
 */

#undef NDEBUG
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "backends/op-test.h"
#include "base/checked.h"

#define MAX_PAGES 80

struct attention_case {
    struct attention_args a;
    struct kv_row rows[N_MAX];
};

static void run_attention(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct attention_case *c = args;
    struct attention_args a = c->a;

    a.n = n;
    a.q += first * a.ld;
    a.rows = c->rows + first;
    a.out = y;
    ISSUE(b, attention(b, &a));
}

static double kv_value(const struct kv_shape *s, const void *page, size_t at)
{
    return (double)(s->f16 ? half_to_float(((const uint16_t *)page)[at])
                           : ((const float *)page)[at]);
}

/* Positions to be written, of any sequences, in batches of all sizes. */
struct store {
    struct kv_shape shape;
    struct array k, v;
    struct kv_row rows[N_MAX];
    uint32_t n, batch; /* so far, and to be issued at once */
};

static struct store store_new(const struct kv_shape *shape)
{
    size_t width = (size_t)shape->n_heads_kv * shape->head_dim;

    return (struct store){.shape = *shape,
                          .k = array_new(N_MAX, width, 5),
                          .v = array_new(N_MAX, width, 5),
                          .batch = 1};
}

static void store_free(struct store *s)
{
    array_free(&s->k);
    array_free(&s->v);
}

static void check_stored(const struct store *s, uint32_t row)
{
    const struct kv_row *at = &s->rows[row];
    const void *page = at->pages[at->pos / KV_PAGE];
    uint32_t dim = s->shape.head_dim, p = at->pos % KV_PAGE;

    for (uint32_t h = 0; h < s->shape.n_heads_kv; h++)
        for (uint32_t k = 0; k < dim; k++) {
            size_t v_from = (size_t)s->shape.n_heads_kv * dim * KV_PAGE;
            float fk = s->k.p[row * s->k.ld + h * dim + k];
            float fv = s->v.p[row * s->v.ld + h * dim + k];

            if (s->shape.f16) {
                fk = half_to_float(half_from_float(fk));
                fv = half_to_float(half_from_float(fv));
            }
            assert(kv_value(&s->shape, page, ((size_t)h * dim + k) * KV_PAGE + p) == (double)fk);
            assert(kv_value(&s->shape, page, v_from + ((size_t)h * KV_PAGE + p) * dim + k) ==
                   (double)fv);
        }
}

static void store_flush(struct store *s)
{
    struct kv_store_args a = {
        .n = s->n, .shape = s->shape, .k = s->k.p, .v = s->v.p, .ld = s->k.ld, .rows = s->rows};

    if (s->n > 0)
        ISSUE(two, kv_store(two, &a));
    for (uint32_t i = 0; i < s->n; i++)
        check_stored(s, i);
    s->n = 0;
    s->batch = batches[next_random() % N_BATCHES];
}

static void store_add(struct store *s, void **pages, uint32_t pos)
{
    size_t bytes = kv_page_bytes(&s->shape);

    if (!pages[pos / KV_PAGE]) {
        pages[pos / KV_PAGE] = op_page(bytes);
        /* NaN, or large: 61296 in a half, 1.3e36 in a float */
        memset(pages[pos / KV_PAGE], next_random() % 2 ? 0xff : 0x7b, bytes);
    }
    for (size_t k = 0; k < s->k.width; k++) {
        s->k.p[s->n * s->k.ld + k] = uniform();
        s->v.p[s->n * s->v.ld + k] = uniform();
    }
    s->rows[s->n++] = (struct kv_row){pages, pos};
    if (s->n == s->batch)
        store_flush(s);
}

/* Every half, what lies around it and half-way to the next, what is too large, and NaN: bits of
 * number i. */
static uint32_t near_half(uint32_t i)
{
    static const uint32_t special[] = {0x33000000, 0x33000001, 0x32ffffff, 1,
                                       0x477fefff, 0x477ff000, 0x477fffff, 0x7f7fffff,
                                       0x7f800000, 0x7f800001, 0x7fc12345, 0x00800000};
    union {
        float f;
        uint32_t u;
    } v = {.f = half_to_float((uint16_t)(i / 4 % 0x7c00))};
    union {
        float f;
        uint32_t u;
    } next = {.f = half_to_float((uint16_t)(i / 4 % 0x7c00 + 1))}, tie;

    tie.f = i / 4 % 0x7c00 == 0x7bff ? 65520 : (v.f + next.f) / 2;
    if (i / 4 >= 0x7c00)
        v.u = special[(i / 4 - 0x7c00) % ARRAY_SIZE(special)];
    else
        v.u = i % 4 == 0 ? v.u : tie.u + i % 4 - 2;
    return v.u | (next_random() % 2) << 31;
}

static bool same_half(uint16_t a, uint16_t b)
{
    return a == b || ((a & 0x7fff) > 0x7c00 && (b & 0x7fff) > 0x7c00); /* NaNs differ in payload */
}

/* Rows of adjacent positions share words of a page: each half is exact, and no other is touched. */
static void test_kv_store(void)
{
    for (uint32_t f16 = 0; f16 < 2; f16++) {
        struct kv_shape shape = {3, 34, f16};
        uint32_t width = 3 * 34, first = 7, n = N_MAX, done = 0;
        struct array k = array_new(n, width, 3), v = array_new(n, width, 3);
        void *pages[1] = {op_page(kv_page_bytes(&shape))};
        struct kv_row rows[N_MAX];
        struct kv_store_args a = {
            .n = n, .shape = shape, .k = k.p, .v = v.p, .ld = k.ld, .rows = rows};

        for (uint32_t i = 0; i < n; i++)
            rows[i] = (struct kv_row){pages, first + i};
        while (done < 4 * 0x7c10) {
            memset(pages[0], 0xa5, kv_page_bytes(&shape));
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t d = 0; d < width; d++) {
                    uint32_t bits = near_half(done++);

                    memcpy(&k.p[i * k.ld + d], &bits, 4);
                    bits = near_half(done++);
                    memcpy(&v.p[i * v.ld + d], &bits, 4);
                }
            ISSUE(two, kv_store(two, &a));
            for (uint32_t p = 0; p < KV_PAGE; p++)
                for (uint32_t d = 0; d < 2 * width; d++) {
                    const float *from = d < width ? &k.p[(p - first) * k.ld + d]
                                                  : &v.p[(p - first) * v.ld + d - width];
                    size_t at = d < width ? (size_t)d * KV_PAGE + p
                                          : (size_t)width * KV_PAGE +
                                                ((d - width) / 34 * KV_PAGE + p) * 34 + d % 34;
                    bool stored = p >= first && p < first + n;

                    if (f16)
                        assert(same_half(((uint16_t *)pages[0])[at],
                                         stored ? half_from_float(*from) : 0xa5a5));
                    else if (stored)
                        assert(memcmp((float *)pages[0] + at, from, 4) == 0);
                    else
                        assert(((uint32_t *)pages[0])[at] == 0xa5a5a5a5u);
                }
        }
        op_pages_free();
        array_free(&k);
        array_free(&v);
    }
}

/*
 * Pages are filled by kv_store, and all that a row must not see is NaN, large, or missing. Each row
 * is of its own sequence (1791 fills its pages to the last position), or all follow one another in
 * one sequence, whose last position is then `last`.
 */
static void check_attention(uint32_t heads, uint32_t heads_kv, uint32_t dim, uint32_t window,
                            bool f16, float q_scale, uint32_t last)
{
    static const uint32_t apart[] = {0, 1, 63, 64, 127, 1000, 65, 300, 511, 62, 128, 1791};
    uint32_t n = last ? N_MAX : ARRAY_SIZE(apart);
    struct kv_shape shape = {heads_kv, dim, f16};
    struct array q = array_random(n, (size_t)heads * dim, 3, q_scale);
    struct array y = array_new(n, (size_t)heads * dim, 3);
    struct store stored = store_new(&shape);
    struct attention_case c = {
        .a = {.n_heads = heads, .shape = shape, .window = window, .q = q.p, .ld = q.ld}};
    size_t v_from = (size_t)heads_kv * dim * KV_PAGE;
    void *tables[N_MAX][MAX_PAGES] = {0}, **pages[N_MAX];
    char what[96];

    snprintf(what, sizeof(what), "attention %u/%u heads of %u, window %u, %s, last %u", heads,
             heads_kv, dim, window, f16 ? "f16" : "f32", last);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t pos = last ? last - n + 1 + i : apart[i];
        uint32_t begin = window && pos + 1 > window ? pos + 1 - window : 0;

        pages[i] = tables[last ? 0 : i];
        c.rows[i] = (struct kv_row){pages[i], pos};
        for (uint32_t p = last && i > 0 ? pos : begin; p <= pos; p++)
            store_add(&stored, pages[i], p);
    }
    store_flush(&stored);
    check_batches(what, run_attention, &c, &y);
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t h = 0; h < heads; h++) {
            uint32_t pos = c.rows[i].pos, begin = window && pos + 1 > window ? pos + 1 - window : 0;
            uint32_t head_kv = h * heads_kv / heads;
            double score[MAX_PAGES * KV_PAGE], max = -INFINITY, sum = 0, largest = 0, bound;

            for (uint32_t p = begin; p <= pos; p++) {
                double s = 0, magnitude = 0;

                for (uint32_t k = 0; k < dim; k++) {
                    double product = (double)q.p[i * q.ld + (size_t)h * dim + k] *
                                     kv_value(&shape, pages[i][p / KV_PAGE],
                                              ((size_t)head_kv * dim + k) * KV_PAGE + p % KV_PAGE);

                    s += product;
                    magnitude += fabs(product);
                }
                largest = fmax(largest, magnitude);
                score[p] = s;
                max = fmax(max, s);
            }
            bound = 0x1p-17 * (largest + 1) + 0x1p-22 * (pos / KV_PAGE - begin / KV_PAGE + 1);
            for (uint32_t p = begin; p <= pos; p++) {
                score[p] = exp(score[p] - max);
                sum += score[p];
            }
            for (uint32_t k = 0; k < dim; k++) {
                double v = 0;

                for (uint32_t p = begin; p <= pos; p++)
                    v += score[p] / sum *
                         kv_value(&shape, pages[i][p / KV_PAGE],
                                  v_from + ((size_t)head_kv * KV_PAGE + p % KV_PAGE) * dim + k);
                check_near(what, i, (size_t)h * dim + k,
                           (double)y.p[i * y.ld + (size_t)h * dim + k], v, bound);
            }
        }
    op_pages_free();
    store_free(&stored);
    array_free(&q);
    array_free(&y);
}

static void test_attention(void)
{
    static const uint32_t windows[] = {0, 1, 3, 63, 64, 65, 512};
    static const uint32_t shapes[][3] = {{8, 2, 16}, {4, 2, 72}, {4, 4, 34}, {3, 1, 24},
                                         {2, 1, 2},  {7, 1, 8},  {7, 3, 8},  {9, 2, 8}};

    for (size_t s = 0; s < ARRAY_SIZE(shapes); s++)
        for (size_t w = 0; w < ARRAY_SIZE(windows); w++) {
            float q_scale = w == 0 ? 3 : 0.25f; /* small: each position counts */

            if (op_leave_out(2 * s + w, 9))
                continue;
            if (w == 0)
                check_attention(shapes[s][0], shapes[s][1], shapes[s][2], 0, s % 2, q_scale, 0);
            check_attention(shapes[s][0], shapes[s][1], shapes[s][2], windows[w], (s + w + 1) % 2,
                            q_scale, 0);
        }
    for (size_t s = 0; s < ARRAY_SIZE(shapes); s++)
        for (size_t w = 0; w < ARRAY_SIZE(windows); w += 2)
            if (!op_leave_out(s + w / 2, 7))
                check_attention(shapes[s][0], shapes[s][1], shapes[s][2], windows[w], s % 2, 0.25f,
                                s % 2 ? 511 : 280);
    check_attention(8, 2, 256, 512, true, 0.05f, 550);
    if (op_leave_out(0, 2))
        return;
    check_attention(8, 2, 256, 512, true, 0.05f, 0);
    check_attention(8, 2, 256, 0, false, 1.5f, 0);

    /* so long that whatever shares out a row's pages comes around more than once */
    check_attention(4, 2, 8, 0, true, 0.25f, 5000);
    check_attention(8, 2, 4, 4000, false, 3, 5103);

    /* larger heads than models have */
    check_attention(2, 1, 258, 70, false, 0.05f, 0);
    check_attention(4, 2, 512, 65, true, 0.05f, 300);
    check_attention(3, 1, 516, 64, true, 0.05f, 0);
    check_attention(2, 1, 1024, 70, true, 0.03f, 300);
}

/* The largest score may come first, last or in the middle page; a sum may vanish beside it. */
static void test_attention_peaks(void)
{
    for (uint32_t peak = 0; peak < 200; peak += 33) {
        struct kv_shape shape = {1, 8, false};
        void *pages[4];
        struct kv_row rows[200];
        struct array q = array_new(1, 8, 0), y = array_new(1, 8, 0);
        struct array k = array_new(200, 8, 0), v = array_new(200, 8, 0);
        struct kv_store_args store = {
            .n = 200, .shape = shape, .k = k.p, .v = v.p, .ld = 8, .rows = rows};
        struct attention_args a = {.n = 1,
                                   .n_heads = 1,
                                   .shape = shape,
                                   .q = q.p,
                                   .out = y.p,
                                   .ld = 8,
                                   .rows = &rows[199]};

        for (uint32_t i = 0; i < 4; i++) {
            pages[i] = op_page(kv_page_bytes(&shape));
            memset(pages[i], 0, kv_page_bytes(&shape));
        }
        for (uint32_t p = 0; p < 200; p++) {
            memcpy(k.p + (size_t)p * 8, (float[8]){p == peak ? 90 : -90}, 32);
            memcpy(v.p + (size_t)p * 8, (float[8]){(float)p, 1}, 32);
            rows[p] = (struct kv_row){pages, p};
        }
        memcpy(q.p, (float[8]){1}, 32);
        ISSUE(two, kv_store(two, &store));
        ISSUE(two, attention(two, &a));
        /* scores are 180 apart: exact softmax weights of all others are 0 in float */
        assert(fabsf(y.p[0] - (float)peak) <= 200 * 0x1p-16f);
        assert(fabsf(y.p[1] - 1) <= 0x1p-16f);
        op_pages_free();
        array_free(&q);
        array_free(&y);
        array_free(&k);
        array_free(&v);
    }
}

/*
 * Two sequences decode by passes of one key: positions and page tables move on between them, and a
 * session may be given other pages and go back. Each has the bits of the operations issued anew.
 */
static void test_attention_repeated(void)
{
    enum { N = 2, WIDTH = 2 * 24, END = 150 };
    struct kv_shape shape = {2, 24, true};
    void *pages[N][4] = {0}, *others[4] = {0};
    struct kv_row rows[N];
    struct array q = array_new(N, (size_t)2 * WIDTH, 1), kv = array_new(N, (size_t)2 * WIDTH, 0);
    struct array y = array_new(N, (size_t)2 * WIDTH, 1), again = array_new(N, (size_t)2 * WIDTH, 1);
    struct kv_store_args store = {
        .n = N, .shape = shape, .k = kv.p, .v = kv.p + WIDTH, .ld = kv.ld, .rows = rows};
    struct attention_args a = {.n = N,
                               .n_heads = 4,
                               .shape = shape,
                               .window = 70,
                               .q = q.p,
                               .out = y.p,
                               .ld = q.ld,
                               .rows = rows};

    for (uint32_t pos = 0; pos < END; pos++) {
        for (uint32_t i = 0; i < N; i++) {
            uint32_t p = i == 0 ? pos : pos / 2;

            if (!pages[i][p / KV_PAGE]) {
                pages[i][p / KV_PAGE] = op_page(kv_page_bytes(&shape));
                memset(pages[i][p / KV_PAGE], 0xff, kv_page_bytes(&shape));
            }
            rows[i] = (struct kv_row){pages[i], p};
            for (uint32_t k = 0; k < 2 * WIDTH; k++) {
                q.p[i * q.ld + k] = uniform();
                kv.p[i * kv.ld + k] = uniform();
            }
        }
        if (pos == 100) { /* as a fork's: what was there lies elsewhere */
            for (uint32_t p = 0; p < 2; p++) {
                others[p] = op_page(kv_page_bytes(&shape));
                memcpy(others[p], pages[0][p], kv_page_bytes(&shape));
                memset(pages[0][p], 0xff, kv_page_bytes(&shape));
            }
        }
        if (pos >= 100) {
            others[pos / KV_PAGE] =
                others[pos / KV_PAGE] ? others[pos / KV_PAGE] : pages[0][pos / KV_PAGE];
            rows[0].pages = others;
        }
        array_mark(&y);
        if (pos == 0)
            op_record();
        else
            op_repeat();
        if (op_begin(two)) {
            two->ops->kv_store(two, &store);
            two->ops->attention(two, &a);
            op_end(two);
        }
        op_finish(two);
        op_single();
        check_guards(&y, N);
        array_mark(&again);
        a.out = again.p;
        ISSUE(two, attention(two, &a));
        a.out = y.p;
        for (uint32_t i = 0; i < N; i++)
            check_same("attention of a repeated pass", y.p + i * y.ld, again.p + i * again.ld,
                       y.width);
        for (uint32_t i = 0; i < N && pos == 0; i++) /* alone it sees its own V */
            for (uint32_t k = 0; k < y.width; k++) {
                float v = kv.p[i * kv.ld + WIDTH + k / 48 * 24 + k % 24];

                assert(y.p[i * y.ld + k] == half_to_float(half_from_float(v)));
            }
    }
    op_pages_free();
    array_free(&q);
    array_free(&kv);
    array_free(&y);
    array_free(&again);
}

static void tests(void)
{
    test_kv_store();
    test_attention();
    test_attention_peaks();
    test_attention_repeated();
}

int main(int argc, char **argv)
{
    return op_test_main(argc, argv, tests);
}
