/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * sparse_ffn (op-test.h), against the formula in double over what weight_get_row() reads. Gates
 * come in all kinds: some neurons above the cut, one, none, almost all, and no numbers at all.
 */

#undef NDEBUG
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/op-test.h"
#include "base/checked.h"

#define N_ROWS 77 /* more than the kernels of few rows take, and than one batch */

static const enum weight_type types[] = {WEIGHT_F32, WEIGHT_F16, WEIGHT_BF16, WEIGHT_Q8, WEIGHT_Q4};

struct sparse_case {
    struct weight up, down;
    const struct activations *x;
    const struct array *gate;
    struct array copy; /* of gate, which is destroyed */
    void *work;
    float z;
    size_t ld_y;
    const bool *open; /* [N_ROWS][ffn]: above the row's cut, NULL: not to be checked */
};

/* The case's arguments stay where they are, so that a pass can be repeated. */
static struct sparse_case case_new(const struct packed *up, const struct packed *down,
                                   const struct rows *x, const struct array *gate, float z,
                                   size_t ld_y, const bool *open)
{
    return (struct sparse_case){
        .up = packed_weights(up),
        .down = packed_weights(down),
        .x = &x->a,
        .gate = gate,
        .copy = array_new(N_ROWS, up->w.n_out, next_random() % 5),
        .work = op_alloc(sparse_ffn_work_bytes(N_ROWS, up->w.n_out)),
        .z = z,
        .ld_y = ld_y,
        .open = open,
    };
}

static void case_free(struct sparse_case *c)
{
    op_free(c->work, sparse_ffn_work_bytes(N_ROWS, c->up.n_out));
    array_free(&c->copy);
}

static void run_sparse(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct sparse_case *c = args;
    uint32_t ffn = c->up.n_out;
    struct activations x = rows_from(c->x, first, n);
    uint64_t neurons = UINT64_MAX, all = 0;
    struct sparse_ffn_args a = {.x = &x,
                                .gate = c->copy.p,
                                .ld_gate = c->copy.ld,
                                .z = c->z,
                                .up = &c->up,
                                .down = &c->down,
                                .work = c->work,
                                .y = y,
                                .ld_y = c->ld_y,
                                .ret_neurons = &neurons};

    memset(c->work, 0xff, sparse_ffn_work_bytes(n, ffn));
    array_mark(&c->copy);
    for (uint32_t i = 0; i < n; i++)
        memcpy(c->copy.p + i * c->copy.ld, c->gate->p + (first + i) * c->gate->ld,
               ffn * sizeof(float));
    ISSUE(b, sparse_ffn(b, &a));
    check_guards(&c->copy, n);
    if (on_device) {
        assert(neurons == UINT64_MAX);
        return;
    }
    for (uint32_t j = 0; j < ffn; j++)
        for (uint32_t i = 0; i < n; i++)
            if (c->open && c->open[(first + i) * (size_t)ffn + j]) {
                all++;
                break;
            }
    assert(!c->open || neurons == all);
}

static double gelu(double x)
{
    return 0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
}

static void fill_gates(struct array *gate)
{
    for (uint32_t i = 0; i < gate->n; i++) {
        float *g = gate->p + i * gate->ld;

        for (uint32_t j = 0; j < gate->width; j++)
            g[j] = (uniform() + uniform() + uniform()) * 2;
        switch (i % 13) {
        case 1: /* none: as large as the mean */
            for (uint32_t j = 0; j < gate->width; j++)
                g[j] = 0.5f;
            break;
        case 2: /* one */
            for (uint32_t j = 0; j < gate->width; j++)
                g[j] = 0;
            g[next_random() % gate->width] = 3;
            break;
        case 3: /* all but one, when z is small */
            g[next_random() % gate->width] = -1e6f;
            break;
        case 4:
            g[next_random() % gate->width] = NAN;
            break;
        case 5:
            g[next_random() % gate->width] = next_random() % 2 ? INFINITY : -INFINITY;
            break;
        case 6:
            for (uint32_t j = 0; j < gate->width; j++)
                g[j] *= 1e-3f;
            break;
        case 7:
            for (uint32_t j = 0; j < gate->width; j++)
                g[j] = g[j] * 20 - 50;
            break;
        }
    }
}

/* What is above the cut: gate - cut, else 0. */
static void cut_gates(const struct array *gate, float z, double *above, bool *open)
{
    size_t n = gate->width;

    for (size_t i = 0; i < gate->n; i++) {
        const float *g = gate->p + i * gate->ld;
        double mean = 0, square = 0;

        for (size_t j = 0; j < n; j++)
            mean += (double)g[j];
        mean /= (double)n;
        for (size_t j = 0; j < n; j++)
            square += ((double)g[j] - mean) * ((double)g[j] - mean);
        for (size_t j = 0; j < n; j++) {
            double v = (double)g[j] - (mean + (double)z * sqrt(square / (double)n));

            open[i * n + j] = v > 0;
            above[i * n + j] = v > 0 ? v : 0;
        }
    }
}

static double activation(const struct rows *x, bool rounded, uint32_t i, uint32_t k)
{
    return rounded ? (double)x->a.d[i * (x->a.ld_q / 32) + k / 32] * x->a.q[i * x->a.ld_q + k]
                   : (double)x->f32.p[i * x->f32.ld + k];
}

static void check_sparse(enum weight_type up_type, enum weight_type down_type, uint32_t hidden,
                         uint32_t ffn, float z, bool rounded)
{
    struct packed up = packed_new(up_type, LAYOUT_ROWS, ffn, hidden);
    struct packed down = packed_new(down_type, LAYOUT_COLS, hidden, ffn);
    struct rows x = rows_new(N_ROWS, hidden, rounded);
    struct array gate = array_new(N_ROWS, ffn, 1), y = array_new(N_ROWS, hidden, 5);
    size_t size = (size_t)N_ROWS * ffn;
    bool *open = malloc(size * sizeof(*open));
    double *above = malloc(size * sizeof(*above)), *h = malloc(size * sizeof(*h));
    double *e = malloc(size * sizeof(*e));
    float *w = malloc(MAX(hidden, ffn) * sizeof(*w));
    struct sparse_case c = case_new(&up, &down, &x, &gate, z, y.ld, open);
    char what[96];

    assert(open && above && h && e && w);
    snprintf(what, sizeof(what), "sparse_ffn %s %s %u %u z %g%s", weight_type_name(up_type),
             weight_type_name(down_type), hidden, ffn, (double)z, rounded ? " rounded" : "");
    rows_fill(&x);
    if (rounded)
        ISSUE(ref, quantize(ref, &x.a));
    rounded = rounded && weight_type_is_quantized(up_type);
    for (uint32_t i = 0; i < N_ROWS && rounded; i++) /* which are then not looked at */
        memset(x.f32.p + i * x.f32.ld, 0xff, hidden * sizeof(float));
    fill_gates(&gate);
    cut_gates(&gate, z, above, open);
    check_batches(what, run_sparse, &c, &y);

    for (uint32_t j = 0; j < ffn; j++) {
        weight_get_row(&up.w, j, w);
        for (uint32_t i = 0; i < N_ROWS; i++) {
            size_t at = i * (size_t)ffn + j;
            double u = 0, magnitude = 0, g = gelu(above[at]);

            for (uint32_t k = 0; open[at] && k < hidden; k++) {
                double v = (double)w[k] * activation(&x, rounded, i, k);

                u += v;
                magnitude += fabs(v);
            }
            h[at] = g * u;
            e[at] =
                0x1p-16 * (fabs(h[at]) + 0x1p-10 * fabs(u)) + fabs(g) * hidden * EPS * magnitude;
        }
    }
    for (uint32_t o = 0; o < hidden; o++) {
        weight_get_row(&down.w, o, w);
        for (uint32_t i = 0; i < N_ROWS; i += i < 20 ? 1 : 5) {
            double sum = 0, magnitude = 0, bound = 0, m = 0;

            for (uint32_t j = 0; j < ffn; j++) {
                size_t at = i * (size_t)ffn + j;

                if (!open[at])
                    continue;
                m++;
                sum += (double)w[j] * h[at];
                magnitude += fabs((double)w[j] * h[at]);
                bound += fabs((double)w[j]) * e[at];
            }
            check_near(what, i, o, (double)y.p[i * y.ld + o], sum, bound + m * EPS * magnitude);
        }
    }
    free(open);
    free(above);
    free(h);
    free(e);
    free(w);
    case_free(&c);
    array_free(&y);
    array_free(&gate);
    rows_free(&x);
    packed_free(&up);
    packed_free(&down);
}

static void test_sizes(void)
{
    static const uint32_t sizes[][2] = {{1, 1},   {31, 33},  {32, 32},   {33, 31},  {64, 96},
                                        {17, 65}, {96, 160}, {160, 544}, {544, 64}, {1056, 288}};
    static const float z[] = {1.6448533f, 0.5f, 1e-3f, 3};

    for (size_t s = 0; s < ARRAY_SIZE(sizes); s++)
        for (size_t u = 0; u < ARRAY_SIZE(types); u++)
            for (size_t d = 0; d < ARRAY_SIZE(types); d++) {
                uint32_t hidden = sizes[s][0], ffn = sizes[s][1];

                /* every type with every other at one size; else with itself */
                if ((u != d && s != 6) || op_leave_out(s + u + d, 5) ||
                    !weight_supported(types[u], LAYOUT_ROWS, ffn, hidden) ||
                    !weight_supported(types[d], LAYOUT_COLS, hidden, ffn))
                    continue;
                check_sparse(types[u], types[d], hidden, ffn, z[s % ARRAY_SIZE(z)], true);
                if (weight_type_is_quantized(types[u]) || s % 3 == 0)
                    check_sparse(types[u], types[d], hidden, ffn, z[(s + 1) % ARRAY_SIZE(z)],
                                 false);
            }
}

/*
 * Weights of a block of neurons are no numbers: rows without one of these do not notice, in any
 * company. In the f32 mode one row of activations is none, either.
 */
static void check_poison(enum weight_type type, bool rounded)
{
    const uint32_t hidden = 160, ffn = 320, block = 3;
    struct packed up = packed_new(type, LAYOUT_ROWS, ffn, hidden);
    struct packed down = packed_new(type, LAYOUT_COLS, hidden, ffn);
    size_t row = weight_row_bytes(type, hidden), columns = weight_col_block_bytes(type, hidden);
    struct rows x = rows_new(N_ROWS, hidden, rounded);
    struct array gate = array_new(N_ROWS, ffn, 1);
    struct array before = array_new(N_ROWS, hidden, 5), after = array_new(N_ROWS, hidden, 5);
    bool *open = malloc((size_t)N_ROWS * ffn * sizeof(*open));
    double *above = malloc((size_t)N_ROWS * ffn * sizeof(*above));
    struct sparse_case c = case_new(&up, &down, &x, &gate, 2.2f, before.ld, open);
    uint32_t clean = 0, poisoned = 0;

    assert(open && above);
    rows_fill(&x);
    if (rounded)
        ISSUE(ref, quantize(ref, &x.a));
    fill_gates(&gate);
    cut_gates(&gate, c.z, above, open);
    check_batches("clean", run_sparse, &c, &before);
    memset(up.data + block * WEIGHT_BLOCK * row, 0xff, WEIGHT_BLOCK * row);
    memset(down.data + block * columns, 0xff, columns);
    c.up = packed_weights(&up);
    c.down = packed_weights(&down);
    if (!rounded)
        x.f32.p[7 * x.f32.ld + 11] = NAN;
    check_batches("poisoned", run_sparse, &c, &after);
    for (uint32_t i = 0; i < N_ROWS; i++) {
        bool has = !rounded && i == 7;

        for (uint32_t j = 0; j < WEIGHT_BLOCK; j++)
            has = has || open[i * (size_t)ffn + block * WEIGHT_BLOCK + j];
        if (!has)
            check_same("poison", after.p + i * after.ld, before.p + i * before.ld, hidden);
        clean += !has;
        poisoned += has;
    }
    assert(clean > 5 && poisoned > 5);
    free(open);
    free(above);
    case_free(&c);
    array_free(&before);
    array_free(&after);
    array_free(&gate);
    rows_free(&x);
    packed_free(&up);
    packed_free(&down);
}

/* Weights whose every bit is hostile: nothing is promised but to come back. */
static void check_hostile(enum weight_type type, bool rounded, int fill)
{
    const uint32_t hidden = 96, ffn = 160;
    struct packed up = packed_new(type, LAYOUT_ROWS, ffn, hidden);
    struct packed down = packed_new(type, LAYOUT_COLS, hidden, ffn);
    struct rows x = rows_new(N_ROWS, hidden, rounded);
    struct array gate = array_new(N_ROWS, ffn, 1), y = array_new(N_ROWS, hidden, 1);
    struct sparse_case c;

    for (size_t j = 0; j < up.bytes; j++)
        up.data[j] = fill == 0 ? 0xff : fill == 1 ? 0x7c : (uint8_t)next_random();
    for (size_t j = 0; j < down.bytes; j++)
        down.data[j] = fill == 0 ? 0xff : fill == 1 ? 0x7c : (uint8_t)next_random();
    c = case_new(&up, &down, &x, &gate, 0.5f, y.ld, NULL);
    rows_fill(&x);
    if (rounded)
        ISSUE(ref, quantize(ref, &x.a));
    fill_gates(&gate);
    for (uint32_t n = 1; n <= N_ROWS; n += 19) {
        array_mark(&y);
        run_sparse(two, &c, 0, n, y.p);
        check_guards(&y, n);
    }
    case_free(&c);
    array_free(&y);
    array_free(&gate);
    rows_free(&x);
    packed_free(&up);
    packed_free(&down);
}

static void tests(void)
{
    test_sizes();
    for (size_t i = 0; i < ARRAY_SIZE(types); i++)
        for (int rounded = 0; rounded < 2; rounded++) {
            if (rounded && !weight_type_is_quantized(types[i]))
                continue;
            check_poison(types[i], rounded);
            for (int fill = 0; fill < 3 && !op_leave_out(i, 2); fill++)
                check_hostile(types[i], rounded, fill);
        }
}

int main(int argc, char **argv)
{
    return op_test_main(argc, argv, tests);
}
