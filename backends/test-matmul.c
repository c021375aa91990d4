/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Matrix products, rounding of activations and rows of tables (op-test.h). The reference itself is
 * checked by what does not share its code: weight_get_row() for the layouts, and sums worked out
 * here.
 */

#undef NDEBUG
#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/op-test.h"
#include "base/checked.h"

/* The bits of two roundings of the same row. */
static void check_same_rounding(const struct activations *got, const struct activations *want)
{
    size_t blocks = got->ld_q / WEIGHT_BLOCK * 4;

    assert(memcmp(got->q, want->q, got->ld_q) == 0);
    assert(memcmp(got->d, want->d, blocks) == 0);
    assert(memcmp(got->sum, want->sum, blocks) == 0);
    if (!got->q_low || !want->q_low)
        return;
    assert(memcmp(got->q_low, want->q_low, got->ld_q) == 0);
    assert(memcmp(got->sum_low, want->sum_low, blocks) == 0);
}

/* Before q and q_low lie a word and a byte, or four bytes; behind them three bytes or more. */
static void check_quantize_guards(const struct rows *r)
{
    const int8_t *planes[] = {r->a.q, r->a.q_low};
    const char *memory[] = {r->memory, r->low};

    for (int p = 0; p < (r->low ? 2 : 1); p++) {
        for (int i = 0; i < 4; i++)
            assert(memory[p][i] == 0x5a);
        assert(planes[p][-1] == 0x5a);
        for (size_t i = 0; i < 3; i++)
            assert(planes[p][r->a.n * r->a.ld_q + i] == 0x5a);
    }
}

static void check_quantize(uint32_t n, uint32_t k, enum rounding rounding)
{
    struct rows got = rows_new(n, k, rounding), want = rows_new(n, k, ROUND_FINE);
    size_t n_blocks = got.a.ld_q / WEIGHT_BLOCK;

    rows_fill(&got);
    memcpy(want.f32.memory, got.f32.memory, got.f32.total * 4);
    memset(got.memory, 0x5a, got.memory_bytes);
    if (got.low)
        memset(got.low, 0x5a, got.low_bytes);
    ISSUE(two, quantize(two, &got.a));
    ISSUE(ref, quantize(ref, &want.a));
    check_quantize_guards(&got);

    for (uint32_t i = 0; i < n; i++) {
        struct activations a = rows_from(&got.a, i, 1), same = rows_from(&want.a, i, 1);

        for (size_t b = 0; b < n_blocks; b++) {
            float d = got.a.d[i * n_blocks + b], max = 0;
            const int8_t *q = got.a.q + i * got.a.ld_q + b * WEIGHT_BLOCK;
            const int8_t *low = a.q_low ? a.q_low + b * WEIGHT_BLOCK : NULL;
            int32_t sum = 0, sum_low = 0;

            for (size_t j = 0; j < WEIGHT_BLOCK; j++) {
                size_t at = b * WEIGHT_BLOCK + j;
                double x = at < k ? (double)got.f32.p[i * got.f32.ld + at] : 0;

                assert(q[j] >= -127 && (at < k || q[j] == 0));
                assert(fabs(x - (double)d * q[j]) <= (double)d * (0.5 + 64 * EPS) + 0x1p-119);
                max = fmaxf(max, (float)fabs(x));
                sum += q[j];
                if (!low)
                    continue;
                assert(low[j] >= -127 && (at < k || low[j] == 0));
                assert(fabs(x - (double)d * (q[j] + low[j] / 254.0)) <=
                       (double)d * (1 / 508.0 + 65 * EPS) + 0x1p-119);
                sum_low += low[j];
            }
            assert(d == (max / 127 >= 0x1p-126f ? max / 127 : 0));
            assert(sum == got.a.sum[i * n_blocks + b]);
            assert(!low || sum_low == a.sum_low[b]);
        }
        /* all levels round alike, so that a request may move between machines */
        check_same_rounding(&a, &same);
    }
    for (uint32_t first = 0; first < n; first += on_device ? 11 : 5) { /* row by row */
        struct activations a = rows_from(&want.a, first, 1), all = rows_from(&got.a, first, 1);

        memset(a.q, 0x5a, a.ld_q);
        memset(a.q_low, 0x5a, a.ld_q);
        ISSUE(one, quantize(one, &a));
        check_same_rounding(&all, &a);
    }
    rows_free(&got);
    rows_free(&want);
}

/* What hostile weights leave behind is rounded to something harmless, and alike by all levels of
 * the CPU. */
static void check_quantize_wild(uint32_t k)
{
    static const float wild[] = {NAN, -NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX};
    struct rows got = rows_new(1, k, ROUND_FINE), want = rows_new(1, k, ROUND_FINE);
    size_t n_blocks = got.a.ld_q / WEIGHT_BLOCK;

    for (size_t i = 0; i < 4 * ARRAY_SIZE(wild); i++) {
        rows_fill(&got);
        for (uint32_t j = 0; j <= i / ARRAY_SIZE(wild); j++)
            got.f32.p[j * 7 % k] = wild[(i + j) % ARRAY_SIZE(wild)];
        memcpy(want.f32.memory, got.f32.memory, got.f32.total * 4);
        ISSUE(two, quantize(two, &got.a));
        ISSUE(ref, quantize(ref, &want.a));
        if (!on_device)
            check_same_rounding(&got.a, &want.a);
        for (size_t b = 0; b < n_blocks; b++)
            assert(abs(got.a.sum[b]) <= 127 * WEIGHT_BLOCK &&
                   abs(got.a.sum_low[b]) <= 127 * WEIGHT_BLOCK);
    }
    rows_free(&got);
    rows_free(&want);
}

struct matmul_case {
    const struct weight *w;
    const struct activations *x;
    size_t ld_y;
};

static void run_matmul(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct matmul_case *c = args;
    struct activations x = rows_from(c->x, first, n);

    ISSUE(b, matmul(b, c->w, &x, y, c->ld_y));
}

static void check_matmul(enum weight_type type, enum weight_layout layout, uint32_t n_out,
                         uint32_t n_in, enum rounding rounding)
{
    static const char *const names[] = {"f32", "coarse", "fine"};
    struct packed p = packed_new(type, layout, n_out, n_in);
    struct rows x = rows_new(N_MAX, n_in, rounding);
    struct array y = array_new(N_MAX, n_out, 5);
    struct weight weights = packed_weights(&p);
    struct matmul_case c = {&weights, &x.a, y.ld};
    float *w = malloc(n_in * sizeof(*w));
    char what[96];

    snprintf(what, sizeof(what), "matmul %s %s %ux%u %s", weight_type_name(type),
             weight_layout_name(layout), n_out, n_in, names[rounding]);
    rows_fill(&x);
    if (rounding != ROUND_NOT)
        ISSUE(ref, quantize(ref, &x.a));
    if (!weight_type_is_quantized(type)) /* looks at f32 in any case */
        rounding = ROUND_NOT;
    if (rounding == ROUND_COARSE) /* must not look at it */
        for (uint32_t i = 0; i < N_MAX; i++)
            memset(x.f32.p + i * x.f32.ld, 0xff, n_in * 4);
    check_batches(what, run_matmul, &c, &y);
    for (uint32_t o = 0; o < n_out; o++) {
        weight_get_row(&p.w, o, w);
        /* all kinds of rows, and later ones that share no tile with them: the rest was compared
         * with itself in other places */
        for (uint32_t i = 0; i < N_MAX; i += i < 12 ? 1 : 5) {
            double sum = 0, magnitude = 0, lost = 0;

            for (uint32_t k = 0; k < n_in; k++) {
                double d = rounding == ROUND_NOT ? 0 : (double)x.a.d[i * (x.a.ld_q / 32) + k / 32];
                double a = rounding == ROUND_COARSE ? d * x.a.q[i * x.a.ld_q + k]
                                                    : (double)x.f32.p[i * x.f32.ld + k];

                sum += (double)w[k] * a;
                magnitude += fabs((double)w[k] * a);
                lost += rounding == ROUND_FINE
                            ? fabs((double)w[k]) * (d * (1 / 508.0 + 65 * EPS) + 0x1p-119)
                            : 0;
            }
            check_near(what, i, o, (double)y.p[i * y.ld + o], sum, n_in * EPS * magnitude + lost);
        }
    }
    free(w);
    array_free(&y);
    rows_free(&x);
    packed_free(&p);
}

static const struct {
    enum weight_type type;
    enum weight_layout layout;
} kinds[] = {
    {WEIGHT_F32, LAYOUT_PLAIN},   {WEIGHT_F32, LAYOUT_TILE16}, {WEIGHT_F16, LAYOUT_TILE16},
    {WEIGHT_BF16, LAYOUT_TILE16}, {WEIGHT_Q8, LAYOUT_TILE16},  {WEIGHT_Q4, LAYOUT_TILE16},
    {WEIGHT_F32, LAYOUT_ROWS},    {WEIGHT_F16, LAYOUT_ROWS},   {WEIGHT_BF16, LAYOUT_ROWS},
    {WEIGHT_Q8, LAYOUT_ROWS},     {WEIGHT_Q4, LAYOUT_ROWS},    {WEIGHT_F32, LAYOUT_COLS},
    {WEIGHT_F16, LAYOUT_COLS},    {WEIGHT_BF16, LAYOUT_COLS},  {WEIGHT_Q8, LAYOUT_COLS},
    {WEIGHT_Q4, LAYOUT_COLS},
};

static void test_matmul(void)
{
    static const uint32_t sizes[][2] = {{1, 1},     {1, 32},   {15, 31},  {16, 16},   {17, 15},
                                        {31, 33},   {32, 32},  {33, 64},  {64, 17},   {96, 96},
                                        {160, 64},  {32, 544}, {64, 160}, {544, 96},  {128, 320},
                                        {96, 2048}, {48, 544}, {160, 32}, {2048, 64}, {40, 4128}};

    for (size_t s = 0; s < ARRAY_SIZE(sizes); s++)
        for (size_t i = 0; i < ARRAY_SIZE(kinds); i++)
            if (!op_leave_out(s + i, 7) &&
                weight_supported(kinds[i].type, kinds[i].layout, sizes[s][0], sizes[s][1]))
                for (int r = ROUND_NOT; r <= ROUND_FINE; r++)
                    if (r == ROUND_NOT || s % 8 == 3 || weight_type_is_quantized(kinds[i].type))
                        check_matmul(kinds[i].type, kinds[i].layout, sizes[s][0], sizes[s][1],
                                     (enum rounding)r);
}

/* More and longer rows than kernels take at a time: each has the bits it has alone. */
static void check_many_rows(enum weight_type type, enum weight_layout layout,
                            enum rounding rounding)
{
    enum { N = 403, N_OUT = 48, N_IN = 2112 };
    struct packed p = packed_new(type, layout, N_OUT, N_IN);
    struct weight w = packed_weights(&p);
    struct rows x = rows_new(N, N_IN, rounding);
    struct array y = array_new(N, N_OUT, 5), part = array_new(1, N_OUT, 0);

    rows_fill(&x);
    if (rounding != ROUND_NOT)
        ISSUE(ref, quantize(ref, &x.a));
    ISSUE(two, matmul(two, &w, &x.a, y.p, y.ld));
    check_guards(&y, N);
    for (uint32_t i = 0; i < N; i += on_device ? 13 : 1) {
        struct activations a = rows_from(&x.a, i, 1);

        ISSUE(one, matmul(one, &w, &a, part.p, part.ld));
        check_same("matmul of many rows", y.p + i * y.ld, part.p, N_OUT);
    }
    array_free(&part);
    array_free(&y);
    rows_free(&x);
    packed_free(&p);
}

static void test_many_rows(void)
{
    for (size_t i = 0; i < ARRAY_SIZE(kinds) && two->ops->matmul != ref->ops->matmul; i++)
        for (int r = ROUND_NOT; r <= ROUND_FINE; r++)
            if (!op_leave_out(i, 2) && weight_supported(kinds[i].type, kinds[i].layout, 48, 2112) &&
                (r == ROUND_NOT || weight_type_is_quantized(kinds[i].type)))
                check_many_rows(kinds[i].type, kinds[i].layout, (enum rounding)r);
}

/* Weights whose every bit is hostile: nothing is promised but to come back. */
static void test_hostile_weights(void)
{
    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++)
        for (int r = ROUND_NOT; r <= ROUND_FINE; r++)
            for (int fill = 0; fill < 3 && !op_leave_out(i, 2); fill++) {
                struct packed p = packed_new(kinds[i].type, kinds[i].layout, 96, 160);
                struct rows x = rows_new(9, 160, (enum rounding)r);
                struct array y = array_new(9, 96, 1);
                struct array id = array_new(1, 1, 0);
                struct weight w;

                for (size_t j = 0; j < p.bytes; j++)
                    p.data[j] = fill == 0 ? 0xff : fill == 1 ? 0x7c : (uint8_t)next_random();
                w = packed_weights(&p);
                memcpy(id.p, &(uint32_t){95}, 4);
                rows_fill(&x);
                if (r != ROUND_NOT)
                    ISSUE(two, quantize(two, &x.a));
                ISSUE(two, matmul(two, &w, &x.a, y.p, y.ld));
                check_guards(&y, 9);
                array_free(&y);
                if (kinds[i].layout == LAYOUT_TILE16 || kinds[i].layout == LAYOUT_ROWS) {
                    y = array_new(1, 160, 0);
                    ISSUE(two, get_rows(two, &w, (const uint32_t *)id.p, 1, 1, y.p, y.ld));
                    check_guards(&y, 1);
                    array_free(&y);
                }
                array_free(&id);
                rows_free(&x);
                packed_free(&p);
            }
}

static void test_get_rows(void)
{
    static const uint32_t sizes[][2] = {{1, 1}, {15, 33}, {17, 32}, {40, 544}, {33, 2048}, {5, 17}};

    for (size_t s = 0; s < ARRAY_SIZE(sizes); s++)
        for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
            uint32_t n_out = sizes[s][0], n_in = sizes[s][1], *ids;
            struct packed p;
            struct weight weights;
            struct array y, numbers;
            float *w;

            if (!weight_supported(kinds[i].type, kinds[i].layout, n_out, n_in) ||
                (kinds[i].layout != LAYOUT_TILE16 && kinds[i].layout != LAYOUT_ROWS))
                continue;
            p = packed_new(kinds[i].type, kinds[i].layout, n_out, n_in);
            weights = packed_weights(&p);
            y = array_new(N_MAX, n_in, 3);
            numbers = array_new(N_MAX, 1, 0);
            ids = (uint32_t *)numbers.p;
            w = malloc(n_in * sizeof(*w));
            for (uint32_t r = 0; r < N_MAX; r++)
                ids[r] = r == 0 ? n_out - 1 : next_random() % n_out;
            for (size_t c = 0; c < ARRAY_SIZE(batches); c++) {
                array_mark(&y);
                ISSUE(two, get_rows(two, &weights, ids, batches[c], 45.254834f, y.p, y.ld));
                check_guards(&y, batches[c]);
                for (uint32_t r = 0; r < batches[c]; r++) {
                    weight_get_row(&p.w, ids[r], w);
                    for (uint32_t k = 0; k < n_in; k++)
                        assert(y.p[r * y.ld + k] == w[k] * 45.254834f);
                }
            }
            free(w);
            array_free(&y);
            array_free(&numbers);
            packed_free(&p);
        }
}

static void test_quantize(void)
{
    static const uint32_t widths[] = {1, 31, 32, 33, 64, 96, 160, 544, 2048};

    for (size_t s = 0; s < ARRAY_SIZE(widths); s++) {
        for (size_t c = 0; c < ARRAY_SIZE(batches); c++)
            for (int r = ROUND_COARSE; r <= ROUND_FINE; r++)
                check_quantize(batches[c], widths[s], (enum rounding)r);
        check_quantize_wild(widths[s]);
    }
}

static void tests(void)
{
    test_get_rows();
    test_quantize();
    test_matmul();
    test_many_rows();
    test_hostile_weights();
}

int main(int argc, char **argv)
{
    return op_test_main(argc, argv, tests);
}
