/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The operations that are no matrix product (op-test.h). The reference itself is checked by what
 * does not share its code: formulas worked out here, and cases whose answer is known.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/op-test.h"
#include "base/checked.h"

/* Norms. Each run_ function runs in place where the contract allows it, every other call. */

struct norm_case {
    struct norm_args a;
    bool in_place;
};

static void run_norm(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct norm_case *c = args;
    struct norm_args a = c->a;

    a.n = n;
    a.x += first * a.ld_x;
    a.add = a.add ? a.add + first * a.ld_add : NULL;
    a.add2 = a.add2 ? a.add2 + first * a.ld_add2 : NULL;
    a.y = y;
    if (c->in_place) {
        for (uint32_t i = 0; i < n; i++)
            memcpy(y + i * a.ld_y, a.x + i * a.ld_x, a.k * 4);
        a.x = y;
        a.ld_x = a.ld_y;
    }
    ISSUE(b, norm(b, &a));
}

static double rms_factor(const float *x, uint32_t k, double scale, double eps)
{
    double sum = 0;

    for (uint32_t i = 0; i < k; i++)
        sum += (double)x[i] * scale * ((double)x[i] * scale);
    return scale / sqrt(sum / k + eps);
}

static void test_norm(void)
{
    static const uint32_t widths[] = {1, 7, 8, 15, 16, 17, 33, 96, 256, 2048, 2061};

    for (size_t s = 0; s < ARRAY_SIZE(widths); s++)
        for (int variant = 0; variant < 16; variant++) {
            uint32_t k = widths[s];
            struct array x = array_random(N_MAX, k, 2, 1), y = array_new(N_MAX, k, 7);
            struct array add = array_random(N_MAX, k, 1, 3), add2 = array_random(N_MAX, k, 5, 3);
            struct array w = array_random(1, k, 0, 2);
            struct norm_case c = {.a = {.k = k,
                                        .x = x.p,
                                        .ld_x = x.ld,
                                        .w = variant & 1 ? array_weights(&w) : NULL,
                                        .eps = variant & 4 ? 1e-30f : 1e-6f,
                                        .add = variant & 2 ? add.p : NULL,
                                        .add2 = variant & 4 ? add2.p : NULL,
                                        .ld_add = add.ld,
                                        .ld_add2 = add2.ld,
                                        .scale = variant & 2 ? 0.70710678f : 1,
                                        .ld_y = y.ld},
                                  .in_place = variant & 8};

            /* rows 1: zero, 2: large, 3: tiny, 4: with squares beyond floats */
            for (uint32_t j = 0; j < k; j++) {
                x.p[x.ld + j] = 0;
                x.p[2 * x.ld + j] *= 1e4f;
                x.p[3 * x.ld + j] *= 1e-30f;
                x.p[4 * x.ld + j] *= 1e30f;
            }
            check_batches("norm", run_norm, &c, &y);
            for (uint32_t i = 0; i < N_MAX; i++) {
                double r = rms_factor(x.p + i * x.ld, k, 1, (double)c.a.eps);

                for (uint32_t j = 0; j < k; j++) {
                    double t = (double)x.p[i * x.ld + j] * r * (double)(variant & 1 ? w.p[j] : 1);
                    double t1 = variant & 2 ? (double)add.p[i * add.ld + j] : 0;
                    double t2 = variant & 4 ? (double)add2.p[i * add2.ld + j] : 0;

                    check_near("norm", i, j, (double)y.p[i * y.ld + j],
                               (t + t1 + t2) * (double)c.a.scale,
                               16 * EPS * (fabs(t) + fabs(t1) + fabs(t2)) * (double)c.a.scale);
                }
            }
            array_free(&x);
            array_free(&y);
            array_free(&add);
            array_free(&add2);
            array_free(&w);
        }
}

struct head_norm_case {
    struct head_norm_args a;
    const float *x;
};

static void run_head_norm(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct head_norm_case *c = args;
    struct head_norm_args a = c->a;

    a.n = n;
    a.x = y;
    a.rope = a.rope ? a.rope + (size_t)first * a.head_dim : NULL;
    for (uint32_t i = 0; i < n; i++)
        memcpy(y + i * a.ld, c->x + (first + i) * a.ld, (size_t)a.n_heads * a.head_dim * 4);
    ISSUE(b, head_norm(b, &a));
}

static void test_head_norm(void)
{
    static const uint32_t shapes[][2] = {{1, 2},  {3, 6},  {2, 8},  {8, 16},
                                         {4, 34}, {2, 64}, {8, 256}};

    for (size_t s = 0; s < ARRAY_SIZE(shapes); s++)
        for (int variant = 0; variant < 4; variant++) {
            uint32_t heads = shapes[s][0], dim = shapes[s][1], half = dim / 2;
            struct array x = array_random(N_MAX, (size_t)heads * dim, 3, 4);
            struct array y = array_new(N_MAX, (size_t)heads * dim, 3);
            struct array w = array_random(1, dim, 0, 2), rope = array_new(N_MAX, dim, 0);
            struct head_norm_case c = {.a = {.n_heads = heads,
                                             .head_dim = dim,
                                             .ld = y.ld,
                                             .eps = 1e-6f,
                                             .w = variant & 1 ? array_weights(&w) : NULL,
                                             .rope = variant & 2 ? rope.p : NULL},
                                       .x = x.p};

            for (uint32_t i = 0; i < N_MAX; i++)
                for (uint32_t k = 0; k < half; k++) {
                    double angle = i * pow(10000, -2.0 * k / dim);

                    rope.p[i * dim + k] = (float)cos(angle);
                    rope.p[i * dim + half + k] = (float)sin(angle);
                }
            check_batches("head_norm", run_head_norm, &c, &y);
            for (uint32_t i = 0; i < N_MAX; i++)
                for (uint32_t h = 0; h < heads; h++) {
                    const float *v = x.p + i * x.ld + (size_t)h * dim;
                    const float *got = y.p + i * y.ld + (size_t)h * dim;
                    double r = rms_factor(v, dim, 1, (double)1e-6f), max = 0;

                    for (uint32_t k = 0; k < dim; k++)
                        max =
                            fmax(max, fabs((double)v[k] * r * (double)(variant & 1 ? w.p[k] : 1)));
                    for (uint32_t k = 0; k < half; k++) {
                        double a = (double)v[k] * r, b = (double)v[k + half] * r;
                        double cosine = 1, sine = 0;

                        if (variant & 1) {
                            a *= (double)w.p[k];
                            b *= (double)w.p[k + half];
                        }
                        if (variant & 2) {
                            cosine = (double)rope.p[i * dim + k];
                            sine = (double)rope.p[i * dim + half + k];
                        }
                        check_near("head_norm", i, k, (double)got[k], a * cosine - b * sine,
                                   16 * EPS * max);
                        check_near("head_norm", i, k + half, (double)got[k + half],
                                   b * cosine + a * sine, 16 * EPS * max);
                    }
                }
            array_free(&x);
            array_free(&y);
            array_free(&w);
            array_free(&rope);
        }
}

/* Gate */

struct gate_case {
    struct gate_args a;
    int in_place; /* 1: in gate, 2: in up */
};

static void run_gate(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct gate_case *c = args;
    struct gate_args a = c->a;

    a.n = n;
    a.gate += first * a.ld_gate;
    a.up += first * a.ld_up;
    a.y = y;
    if (c->in_place) {
        const float **from = c->in_place == 1 ? &a.gate : &a.up;
        size_t *ld = c->in_place == 1 ? &a.ld_gate : &a.ld_up;

        for (uint32_t i = 0; i < n; i++)
            memcpy(y + i * a.ld_y, *from + i * *ld, a.k * 4);
        *from = y;
        *ld = a.ld_y;
    }
    ISSUE(b, gate(b, &a));
}

static void test_gate(void)
{
    static const uint32_t widths[] = {1, 7, 8, 16, 31, 33, 256, 2048};

    for (size_t s = 0; s < ARRAY_SIZE(widths); s++)
        for (int variant = 0; variant < 9; variant++) {
            uint32_t k = widths[s];
            struct array gate = array_random(N_MAX, k, 3, variant % 3 == 2 ? 20 : 3);
            struct array up = array_random(N_MAX, k, 2, 2), y = array_new(N_MAX, k, 1);
            double z = variant / 3 == 0 ? 0 : variant / 3 == 1 ? 1.6448533535 : 0.1;
            struct gate_case c = {.a = {.k = k,
                                        .gate = gate.p,
                                        .ld_gate = gate.ld,
                                        .up = up.p,
                                        .ld_up = up.ld,
                                        .ld_y = y.ld,
                                        .z = (float)z},
                                  .in_place = variant % 3};

            for (uint32_t j = 0; j < k; j++) {
                gate.p[gate.ld + j] = 0;
                gate.p[2 * gate.ld + j] *= 1e4f;
                gate.p[3 * gate.ld + j] *= 1e-38f;
                gate.p[4 * gate.ld + j] = 0.75f; /* nothing is above the mean */
                gate.p[5 * gate.ld + j] *= 1e30f;
            }
            check_batches("gate", run_gate, &c, &y);
            for (uint32_t i = 0; i < N_MAX; i++) {
                const float *g = gate.p + i * gate.ld;
                double mean = 0, square = 0;

                for (uint32_t j = 0; j < k; j++)
                    mean += (double)g[j] / k;
                for (uint32_t j = 0; j < k; j++)
                    square += ((double)g[j] - mean) * ((double)g[j] - mean) / k;
                for (uint32_t j = 0; j < k; j++) {
                    double u = (double)up.p[i * up.ld + j], v = (double)g[j], want;
                    double cut = mean + (double)c.a.z * sqrt(square);
                    /* whether a value so near the cut survives is a matter of the last bit */
                    double doubt = c.a.z > 0 ? 1e-13 * (fabs(cut) + fabs(v)) : 0;

                    if (c.a.z > 0)
                        v = fmax(v - cut, 0);
                    want = v * u / (1 + exp(-2 * sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
                    if (c.a.z > 0 && v == 0 && (double)g[j] < cut - doubt)
                        assert(y.p[i * y.ld + j] == 0);
                    check_near("gate", i, j, (double)y.p[i * y.ld + j], want,
                               0x1p-18 * (fabs(want) + fabs(u) * 0x1p-10) + 2 * doubt * fabs(u));
                }
            }
            array_free(&gate);
            array_free(&up);
            array_free(&y);
        }
}

/* The operations on streams */

struct altup_case {
    uint32_t hidden, n_streams;
    struct router_weights router;
    const float *coefs, *h, *b, *scale;
    bool in_place, want_scaled;
    float *other; /* for the result that is not looked at */
};

static void run_predict(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct altup_case *c = args;
    size_t row = (size_t)c->n_streams * c->hidden;
    struct altup_predict_args a = {.n = n,
                                   .hidden = c->hidden,
                                   .n_streams = c->n_streams,
                                   .router = c->router,
                                   .coefs = c->coefs,
                                   .h = c->h + first * row,
                                   .pred = y};

    ISSUE(b, altup_predict(b, &a));
}

static void run_correct(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct altup_case *c = args;
    size_t row = (size_t)c->n_streams * c->hidden;
    struct altup_correct_args a = {.n = n,
                                   .hidden = c->hidden,
                                   .n_streams = c->n_streams,
                                   .router = c->router,
                                   .coefs = c->coefs,
                                   .pred = c->h + first * row,
                                   .b = c->b + (size_t)first * c->hidden,
                                   .scale = c->scale,
                                   .h = c->want_scaled ? c->other : y,
                                   .scaled = c->want_scaled ? y : c->other};

    if (c->in_place) {
        memcpy(a.h, a.pred, n * row * 4);
        a.pred = a.h;
    }
    ISSUE(b, altup_correct(b, &a));
}

static void route(const struct altup_case *c, const struct router_weights *w, const float *x,
                  double *ret)
{
    double r = rms_factor(x, c->hidden, 1, (double)w->eps);

    for (uint32_t j = 0; j < c->n_streams; j++) {
        double sum = 0;

        for (uint32_t k = 0; k < c->hidden; k++)
            sum += (double)w->router[(size_t)j * c->hidden + k] *
                   ((double)x[k] * r * (double)w->norm[k] / c->hidden);
        ret[j] = tanh(sum);
    }
}

static void check_altup(uint32_t hidden, uint32_t n)
{
    struct array h = array_random(N_MAX, (size_t)n * hidden, 0, 5);
    struct array b = array_random(N_MAX, hidden, 0, 5), y = array_new(N_MAX, n * hidden, 0);
    struct array scaled = array_new(N_MAX, hidden, 0), other = array_new(N_MAX, n * hidden, 0);
    struct array norm = array_random(1, hidden, 0, 1), router = array_random(n, hidden, 0, 40);
    struct array coefs = array_random(n * n, n, 0, 1), scale = array_random(1, hidden, 0, 2);
    struct altup_case c = {.hidden = hidden,
                           .n_streams = n,
                           .coefs = array_weights(&coefs),
                           .h = h.p,
                           .b = b.p,
                           .scale = array_weights(&scale),
                           .router = {array_weights(&norm), array_weights(&router), 1e-6f},
                           .other = other.p};
    struct router_weights host = {norm.p, router.p, 1e-6f};
    double m[BACKEND_MAX_STREAMS];

    for (uint32_t k = 0; k < n * hidden; k++) /* squares beyond floats, and below them */
        h.p[h.ld + k] *= 1e25f;
    for (uint32_t k = 0; k < hidden; k++) {
        b.p[b.ld + k] *= 1e25f;
        b.p[2 * b.ld + k] *= 1e-25f;
    }
    check_batches("altup_predict", run_predict, &c, &y);
    for (uint32_t i = 0; i < N_MAX; i++) {
        const float *x = h.p + (size_t)i * n * hidden;

        route(&c, &host, x, m);
        for (uint32_t j = 0; j < n; j++)
            for (uint32_t k = 0; k < hidden; k++) {
                double sum = (double)x[j * hidden + k], magnitude = fabs(sum);

                for (uint32_t s = 0; s < n; s++) {
                    double coef = 0;

                    for (uint32_t t = 0; t < n; t++)
                        coef += (double)coefs.p[(j * n + s) * n + t] * m[t];
                    sum += coef * (double)x[s * hidden + k];
                    magnitude += fabs(coef * (double)x[s * hidden + k]);
                }
                check_near("altup_predict", i, j * hidden + k,
                           (double)y.p[((size_t)i * n + j) * hidden + k], sum,
                           16 * EPS * magnitude);
            }
    }
    for (int in_place = 0; in_place < 2; in_place++) {
        c.in_place = in_place;
        c.want_scaled = false;
        check_batches("altup_correct", run_correct, &c, &y);
        c.want_scaled = true;
        check_batches("altup_correct, scaled", run_correct, &c, &scaled);
        for (uint32_t i = 0; i < N_MAX; i++) {
            const float *pred = h.p + (size_t)i * n * hidden, *out = b.p + (size_t)i * hidden;

            route(&c, &host, out, m);
            for (uint32_t j = 0; j < n; j++) {
                double coef = 1;

                for (uint32_t t = 0; t < n; t++)
                    coef += (double)coefs.p[j * n + t] * m[t];
                for (uint32_t k = 0; k < hidden; k++) {
                    double p = (double)pred[j * hidden + k], p0 = (double)pred[k];
                    double want = p + coef * ((double)out[k] - p0);
                    double bound =
                        16 * EPS * (fabs(p) + fabs(coef * (double)out[k]) + fabs(coef * p0));

                    check_near("altup_correct", i, j * hidden + k,
                               (double)y.p[((size_t)i * n + j) * hidden + k], want, bound);
                    if (j == 0)
                        check_near("altup_correct, scaled", i, k,
                                   (double)scaled.p[(size_t)i * hidden + k],
                                   want * (double)scale.p[k], bound * fabs((double)scale.p[k]));
                }
            }
        }
    }
    array_free(&h);
    array_free(&b);
    array_free(&y);
    array_free(&scaled);
    array_free(&other);
    array_free(&norm);
    array_free(&router);
    array_free(&coefs);
    array_free(&scale);
}

struct stream_case {
    uint32_t hidden, n_streams, stream;
    const float *x, *w, *h;
};

static void run_stream_norm(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct stream_case *c = args;
    size_t row = (size_t)c->n_streams * c->hidden;
    struct stream_norm_args a = {.n = n,
                                 .hidden = c->hidden,
                                 .n_streams = c->n_streams,
                                 .x = c->x + (size_t)first * c->hidden,
                                 .w = c->w,
                                 .eps = 1e-6f,
                                 .h = y};

    memcpy(y, c->h + first * row, n * row * 4);
    ISSUE(b, stream_norm(b, &a));
}

/* ref is stream 0 of the array that is written, as when streams are set up. */
static void run_rescale(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct stream_case *c = args;
    size_t row = (size_t)c->n_streams * c->hidden;
    struct rescale_args a = {.n = n,
                             .hidden = c->hidden,
                             .n_streams = c->n_streams,
                             .stream = c->stream,
                             .y = c->x + (size_t)first * c->hidden,
                             .ref = y,
                             .ld_ref = row,
                             .h = y};

    memcpy(y, c->h + first * row, n * row * 4);
    ISSUE(b, rescale(b, &a));
}

static void run_merge(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct stream_case *c = args;
    struct merge_args a = {.n = n,
                           .hidden = c->hidden,
                           .n_streams = c->n_streams,
                           .h = c->h + (size_t)first * c->n_streams * c->hidden,
                           .w = c->w,
                           .eps = 1e-6f,
                           .x = y};

    ISSUE(b, merge(b, &a));
}

static void check_streams(uint32_t hidden, uint32_t n)
{
    struct array h = array_random(N_MAX, (size_t)n * hidden, 0, 5);
    struct array x = array_random(N_MAX, hidden, 0, 5), y = array_new(N_MAX, n * hidden, 0);
    struct array w = array_random(1, hidden, 0, 1), merged = array_new(N_MAX, hidden, 0);
    struct stream_case c = {.hidden = hidden,
                            .n_streams = n,
                            .stream = n - 1,
                            .x = x.p,
                            .w = array_weights(&w),
                            .h = h.p};
    float *mean = malloc(hidden * sizeof(*mean));

    for (uint32_t k = 0; k < hidden; k++)
        x.p[hidden + k] *= 1e-5f;               /* under the floor of rescale */
    for (uint32_t k = 0; k < n * hidden; k++) { /* squares beyond floats, and below them */
        h.p[2 * h.ld + k] *= 1e25f;
        h.p[3 * h.ld + k] *= 1e-25f;
        x.p[4 * x.ld + k % hidden] = h.p[2 * h.ld + k];
    }
    check_batches("stream_norm", run_stream_norm, &c, &y);
    for (uint32_t i = 0; i < N_MAX; i++) {
        double r = rms_factor(x.p + (size_t)i * hidden, hidden, 1, (double)1e-6f);

        for (size_t k = 0; k < (size_t)n * hidden; k++) {
            double before = (double)h.p[i * h.ld + k];
            double add = k < hidden ? 0
                                    : (double)x.p[(size_t)i * hidden + k % hidden] * r *
                                          (double)w.p[k % hidden];

            check_near("stream_norm", i, k, (double)y.p[i * y.ld + k], before + add,
                       k < hidden ? 0 : 16 * EPS * (fabs(before) + fabs(add)));
        }
    }
    check_batches("rescale", run_rescale, &c, &y);
    for (uint32_t i = 0; i < N_MAX; i++) {
        double to = 1 / rms_factor(h.p + i * h.ld, hidden, 1, 0);
        double from = 1 / rms_factor(x.p + (size_t)i * hidden, hidden, 1, 0);
        double r = to / fmax(from, sqrt(1e-5));

        if (n == 1) /* the only stream is its own measure: nothing more to say */
            break;
        for (size_t k = 0; k < (size_t)n * hidden; k++) {
            bool changed = k >= (size_t)(n - 1) * hidden;
            double want = changed ? (double)x.p[(size_t)i * hidden + k % hidden] * r
                                  : (double)h.p[i * h.ld + k];

            check_near("rescale", i, k, (double)y.p[i * y.ld + k], want,
                       changed ? 16 * EPS * fabs(want) : 0);
        }
    }
    check_batches("merge", run_merge, &c, &merged);
    for (uint32_t i = 0; i < N_MAX; i++) {
        double r, sum = 0;

        for (int pass = 0; pass < 2; pass++)
            for (uint32_t k = 0; k < hidden; k++) {
                double m = 0, magnitude = 0;

                for (uint32_t s = 0; s < n; s++) {
                    m += (double)h.p[i * h.ld + s * hidden + k] / n;
                    magnitude += fabs((double)h.p[i * h.ld + s * hidden + k]) / n;
                }
                if (pass == 0) {
                    sum += m * m;
                    continue;
                }
                r = 1 / sqrt(sum / hidden + (double)1e-6f);
                check_near("merge", i, k, (double)merged.p[i * merged.ld + k],
                           m * r * (double)w.p[k], 16 * EPS * magnitude * r * fabs((double)w.p[k]));
            }
    }
    free(mean);
    array_free(&h);
    array_free(&x);
    array_free(&y);
    array_free(&w);
    array_free(&merged);
}

static void test_streams(void)
{
    static const uint32_t widths[] = {1, 7, 8, 17, 24, 33, 256, 2048};

    for (size_t s = 0; s < ARRAY_SIZE(widths); s++) {
        check_altup(widths[s], 4);
        check_streams(widths[s], 4);
    }
    check_altup(40, 1);
    check_altup(40, 2);
    check_altup(40, BACKEND_MAX_STREAMS);
    check_streams(40, 1);
    check_streams(40, 3);
}

struct ple_case {
    struct ple_args a;
    bool in_place;
};

static void run_ple(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct ple_case *c = args;
    struct ple_args a = c->a;
    size_t row = (size_t)a.n_layers * a.width;

    a.n = n;
    a.g += first * row;
    a.e += first * row;
    a.ple = y;
    if (c->in_place) {
        memcpy(y, a.e, n * row * 4);
        a.e = y;
    }
    ISSUE(b, ple(b, &a));
}

static void test_ple(void)
{
    static const uint32_t shapes[][2] = {{1, 1}, {10, 6}, {3, 17}, {5, 32}, {30, 256}};

    for (size_t s = 0; s < ARRAY_SIZE(shapes); s++)
        for (int in_place = 0; in_place < 2; in_place++) {
            uint32_t layers = shapes[s][0], width = shapes[s][1];
            struct array g = array_random(N_MAX, (size_t)layers * width, 0, 30);
            struct array e = array_random(N_MAX, (size_t)layers * width, 0, 2);
            struct array y = array_new(N_MAX, (size_t)layers * width, 0);
            struct array w = array_random(1, width, 0, 2);
            struct ple_case c = {.a = {.n_layers = layers,
                                       .width = width,
                                       .g = g.p,
                                       .e = e.p,
                                       .w = array_weights(&w),
                                       .g_scale = 0.022097087f,
                                       .eps = 1e-6f},
                                 .in_place = in_place};

            for (uint32_t k = 0; k < width; k++) {
                g.p[k] = k == 0 ? 1e-3f : 0; /* so small that eps counts */
                g.p[layers * width + k] *= 1e25f;
            }
            check_batches("ple", run_ple, &c, &y);
            for (size_t i = 0; i < (size_t)N_MAX * layers; i++) {
                double r = rms_factor(g.p + i * width, width, (double)c.a.g_scale, (double)1e-6f);

                for (uint32_t k = 0; k < width; k++) {
                    double a = (double)g.p[i * width + k] * r * (double)w.p[k];
                    double b = (double)e.p[i * width + k];

                    check_near("ple", i, k, (double)y.p[i * width + k], (a + b) * sqrt(0.5),
                               16 * EPS * (fabs(a) + fabs(b)));
                }
            }
            array_free(&g);
            array_free(&e);
            array_free(&y);
            array_free(&w);
        }
}

static void run_copy_rows(struct backend *b, void *args, uint32_t first, uint32_t n, float *y)
{
    struct copy_rows_args a = *(struct copy_rows_args *)args;

    a.n = n;
    a.y = y;
    if (a.ids)
        a.ids += first;
    else
        a.x += first * a.ld_x;
    ISSUE(b, copy_rows(b, &a));
}

static void test_copy_rows(void)
{
    static const uint32_t widths[] = {1, 7, 32, 33, 2048};

    for (size_t s = 0; s < ARRAY_SIZE(widths); s++)
        for (int variant = 0; variant < 2; variant++) {
            enum { N_FROM = 50 };
            uint32_t k = widths[s], *ids;
            struct array x = array_random(N_FROM, k, 3, 1), y = array_new(N_MAX, k, 2);
            struct array numbers = array_new(N_MAX, 1, 0);
            struct copy_rows_args a = {.k = k, .x = x.p, .ld_x = x.ld, .ld_y = y.ld};

            ids = (uint32_t *)numbers.p;
            for (uint32_t i = 0; i < N_MAX; i++)
                ids[i] = i == 0 ? N_FROM - 1 : next_random() % N_FROM;
            /* any bits at all, the lowest numbers too */
            memcpy(x.p, &(uint32_t){0x7fa12345}, 4);
            memcpy(x.p + x.ld, &(uint32_t){3}, 4);
            memcpy(x.p + (N_FROM - 1) * x.ld, &(uint32_t){0x80000001}, 4);
            a.ids = variant ? ids : NULL;
            check_batches("copy_rows", run_copy_rows, &a, &y);
            for (uint32_t i = 0; i < N_MAX; i++)
                assert(memcmp(y.p + i * y.ld, x.p + (variant ? ids[i] : i) * x.ld, k * 4) == 0);
            array_free(&x);
            array_free(&y);
            array_free(&numbers);
        }
}

static void test_softcap(void)
{
    static const size_t sizes[] = {0, 1, 7, 8, 33, 4096, 20001};

    for (size_t s = 0; s < ARRAY_SIZE(sizes); s++) {
        size_t n = sizes[s];
        struct array x = array_random(1, n, 0, 100), y = array_new(1, n, 0), z = array_new(1, n, 0);

        for (size_t i = 0; i < n; i++) {
            if (i % 5 == 1)
                x.p[i] *= i % 2 ? 1e-3f : 1e4f;
            if (i % 97 == 3)
                x.p[i] = i % 2 ? 3e38f : 0;
        }
        memcpy(y.memory, x.memory, x.total * 4);
        memcpy(z.memory, x.memory, x.total * 4);
        ISSUE(two, softcap(two, y.p, n, 30));
        ISSUE(one, softcap(one, z.p, n / 2, 30));
        ISSUE(one, softcap(one, z.p + n / 2, n - n / 2, 30));
        check_guards(&y, 1);
        check_same("softcap", y.p, z.p, n);
        for (size_t i = 0; i < n; i++) {
            check_near("softcap", 0, i, (double)y.p[i], 30 * tanh((double)x.p[i] / 30),
                       30 * 0x1p-21);
            assert(fabsf(y.p[i]) < 30);
        }
        array_free(&x);
        array_free(&y);
        array_free(&z);
    }
}

static void test_new(void)
{
    struct backend_limits limits = {N_MAX, 2048, 8};
    struct backend *b = NULL;
    struct error err = {{0}};
    unsigned char *p;

    assert(backend_cpu_new(&b, "sse9", 1, &limits, &err) == -EINVAL && !b);
    assert(strstr(err.text, "sse9"));
    assert(backend_cpu_new(&b, NULL, 0, &limits, &err) == 0);
    assert(b->vtable->n_threads(b) >= 1 && b->vtable->scratch_bytes(b) > 0);
    assert(backend_finish(b) == 0);
    for (size_t bytes = 1; bytes <= (size_t)8 << 20; bytes *= 8) {
        p = backend_alloc(b, bytes);
        assert(p && (uintptr_t)p % 4096 == 0 && p[0] == 0 && p[bytes - 1] == 0);
        p[bytes - 1] = 1;
        backend_release(b, p, bytes);
    }
    assert(!backend_alloc(b, SIZE_MAX / 2));
    printf("best level: %s, %u threads\n", b->ops->name, b->vtable->n_threads(b));
    assert(!backend_free(b));
    limits.max_width = UINT32_MAX;
    limits.max_rows = UINT32_MAX;
    b = NULL;
    /* more than memory: where threads exist; with one thread a generous system may map it */
    if (backend_cpu_new(&b, "reference", UINT32_MAX, &limits, &err) == 0)
        b = backend_free(b);
    else
        assert(!b && strstr(err.text, "memory"));
}

static void tests(void)
{
    test_norm();
    test_head_norm();
    test_gate();
    test_streams();
    test_ple();
    test_copy_rows();
    test_softcap();
}

int main(int argc, char **argv)
{
    int r = op_test_main(argc, argv, tests);

    if (!on_device)
        test_new();
    return r;
}
