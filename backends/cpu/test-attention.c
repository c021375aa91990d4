/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * kv_store and attention (op-test.h), against the softmax written out here in double.
 */

#undef NDEBUG
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/cpu/op-test.h"
#include "base/checked.h"

#define MAX_PAGES 28

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
    b->ops->attention(b, &a);
}

static double kv_value(const struct kv_shape *s, const void *page, size_t at)
{
    return (double)(s->f16 ? half_to_float(((const uint16_t *)page)[at])
                           : ((const float *)page)[at]);
}

/*
 * Pages are filled by kv_store, and everything that a row must not see is NaN or missing. Each row
 * is of its own sequence (1791 fills its pages to the last position), or all follow one another in
 * one sequence, whose last position is then `last`.
 */
static void check_attention(uint32_t heads, uint32_t heads_kv, uint32_t dim, uint32_t window,
                            bool f16, float q_scale, uint32_t last)
{
    static const uint32_t apart[] = {0, 1, 63, 64, 127, 1000, 65, 300, 511, 62, 128, 1791};
    uint32_t n = last ? N_MAX : ARRAY_SIZE(apart), positions[N_MAX];
    struct kv_shape shape = {heads_kv, dim, f16};
    struct array q = array_random(n, (size_t)heads * dim, 3, q_scale);
    struct array y = array_new(n, (size_t)heads * dim, 3);
    struct array kv = array_random(1, (size_t)heads_kv * dim * 2, 0, 1);
    struct attention_case c = {
        .a = {.n_heads = heads, .shape = shape, .window = window, .q = q.p, .ld = q.ld}};
    size_t bytes = kv_page_bytes(&shape), v_from = (size_t)heads_kv * dim * KV_PAGE;
    void *tables[N_MAX][MAX_PAGES] = {0}, **pages[N_MAX];
    char what[96];

    snprintf(what, sizeof(what), "attention %u/%u heads of %u, window %u, %s, last %u", heads,
             heads_kv, dim, window, f16 ? "f16" : "f32", last);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t pos = last ? last - n + 1 + i : apart[i];
        uint32_t begin = window && pos + 1 > window ? pos + 1 - window : 0;

        positions[i] = pos;
        pages[i] = tables[last ? 0 : i];
        for (uint32_t p = last && i > 0 ? pos : begin; p <= pos; p++) {
            struct kv_row at = {pages[i], p};
            struct kv_store_args store = {.n = 1,
                                          .shape = shape,
                                          .k = kv.p,
                                          .v = kv.p + (size_t)heads_kv * dim,
                                          .ld = 1,
                                          .rows = &at};

            if (!pages[i][p / KV_PAGE]) {
                pages[i][p / KV_PAGE] = malloc(bytes);
                memset(pages[i][p / KV_PAGE], 0xff, bytes);
            }
            for (size_t k = 0; k < (size_t)heads_kv * dim * 2; k++)
                kv.p[k] = uniform();
            two->ops->kv_store(two, &store);
            for (uint32_t h = 0; h < heads_kv; h++)
                for (uint32_t k = 0; k < dim; k++) {
                    size_t k_at = ((size_t)h * dim + k) * KV_PAGE + p % KV_PAGE;
                    size_t v_at = v_from + ((size_t)h * KV_PAGE + p % KV_PAGE) * dim + k;
                    float fk = kv.p[h * dim + k], fv = kv.p[(heads_kv + h) * dim + k];

                    if (f16) {
                        fk = half_to_float(half_from_float(fk));
                        fv = half_to_float(half_from_float(fv));
                    }
                    assert(kv_value(&shape, pages[i][p / KV_PAGE], k_at) == (double)fk);
                    assert(kv_value(&shape, pages[i][p / KV_PAGE], v_at) == (double)fv);
                }
        }
        c.rows[i] = (struct kv_row){pages[i], pos};
    }
    check_batches(what, run_attention, &c, &y);
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t h = 0; h < heads; h++) {
            uint32_t pos = positions[i], begin = window && pos + 1 > window ? pos + 1 - window : 0;
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
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t p = 0; p < MAX_PAGES; p++)
            free(tables[i][p]);
    array_free(&q);
    array_free(&y);
    array_free(&kv);
}

static void test_attention(void)
{
    static const uint32_t windows[] = {0, 1, 3, 63, 64, 65, 512};
    static const uint32_t shapes[][3] = {{8, 2, 16}, {4, 2, 72}, {4, 4, 34}, {3, 1, 24},
                                         {2, 1, 2},  {7, 1, 8},  {7, 3, 8},  {9, 2, 8}};

    for (size_t s = 0; s < ARRAY_SIZE(shapes); s++)
        for (size_t w = 0; w < ARRAY_SIZE(windows); w++) {
            float q_scale = w == 0 ? 3 : 0.25f; /* small: each position counts */

            if (w == 0)
                check_attention(shapes[s][0], shapes[s][1], shapes[s][2], 0, s % 2, q_scale, 0);
            check_attention(shapes[s][0], shapes[s][1], shapes[s][2], windows[w], (s + w + 1) % 2,
                            q_scale, 0);
        }
    for (size_t s = 0; s < ARRAY_SIZE(shapes); s++)
        for (size_t w = 0; w < ARRAY_SIZE(windows); w += 2)
            check_attention(shapes[s][0], shapes[s][1], shapes[s][2], windows[w], s % 2, 0.25f,
                            s % 2 ? 511 : 280);
    check_attention(8, 2, 256, 512, true, 0.05f, 0);
    check_attention(8, 2, 256, 0, false, 1.5f, 0);
    check_attention(8, 2, 256, 512, true, 0.05f, 550);
}

/* The largest score may come first, last or in the middle page; a sum may vanish beside it. */
static void test_attention_peaks(void)
{
    for (uint32_t peak = 0; peak < 200; peak += 33) {
        struct kv_shape shape = {1, 8, false};
        void *pages[4];
        struct kv_row row = {pages, 199};
        float q[8] = {1}, y[8];
        struct attention_args a = {
            .n = 1, .n_heads = 1, .shape = shape, .q = q, .out = y, .ld = 8, .rows = &row};

        for (uint32_t i = 0; i < 4; i++)
            pages[i] = calloc(1, kv_page_bytes(&shape));
        for (uint32_t p = 0; p < 200; p++) {
            float k[8] = {p == peak ? 90 : -90}, v[8] = {(float)p, 1};
            struct kv_row at = {pages, p};
            struct kv_store_args store = {
                .n = 1, .shape = shape, .k = k, .v = v, .ld = 8, .rows = &at};

            two->ops->kv_store(two, &store);
        }
        two->ops->attention(two, &a);
        /* scores are 180 apart: exact softmax weights of all others are 0 in float */
        assert(fabsf(y[0] - (float)peak) <= 200 * 0x1p-16f && fabsf(y[1] - 1) <= 0x1p-16f);
        for (uint32_t i = 0; i < 4; i++)
            free(pages[i]);
    }
}

static void tests(void)
{
    test_attention();
    test_attention_peaks();
}

int main(void)
{
    return op_test_levels(tests);
}
