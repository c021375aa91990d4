/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Operations on rows of values, for a file that has included the lanes of its level
 * (LEVEL-lanes.h): the steps in their order, which every width keeps but for the number of values
 * that are summed side by side. Sums of a row (squares, means, the router) run in double: that
 * costs a few hundred nanoseconds of a token's tens of milliseconds and makes every bound hold with
 * room, since only the final products are rounded to float. A width that is no multiple of LANES
 * ends in a masked vector of the same instructions.
 *
 * The _rows functions are cpu_parallel()'s.
 */

#include <math.h>

#include "base/checked.h"

/* Four chains, since an addition waits four cycles for the one before. */
static inline double mean_square(const float *x, uint32_t n)
{
    dvec a = d_zero(), b = a, c = a, d = a;
    uint32_t k = 0;

    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        vec u = v_load(x + k), v = v_load(x + k + LANES);

        a = d_fma(d_low(u), d_low(u), a);
        b = d_fma(d_high(u), d_high(u), b);
        c = d_fma(d_low(v), d_low(v), c);
        d = d_fma(d_high(v), d_high(v), d);
    }
    for (; k < n; k += LANES) {
        vec u = v_load_some(x, k, n);

        a = d_fma(d_low(u), d_low(u), a);
        b = d_fma(d_high(u), d_high(u), b);
    }
    return d_sum(d_add(d_add(a, c), d_add(b, d))) / n;
}

static inline vec rms_scale(const float *x, uint32_t n, float eps)
{
    return v_set1((float)(1 / sqrt(mean_square(x, n) + (double)eps)));
}

static void norm_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct norm_args *a = args;
    vec scale = v_set1(a->scale);

    (void)scratch;
    for (uint32_t i = first; i < last; i++) {
        const float *x = a->x + i * a->ld_x;
        vec r = rms_scale(x, a->k, a->eps);

        for (uint32_t k = 0; k < a->k; k += LANES) {
            vec v = v_mul(v_load_some(x, k, a->k), r);

            if (a->w)
                v = v_mul(v, v_load_some(a->w, k, a->k));
            if (a->add)
                v = v_add(v, v_load_some(a->add + i * a->ld_add, k, a->k));
            if (a->add2)
                v = v_add(v, v_load_some(a->add2 + i * a->ld_add2, k, a->k));
            v_store_some(a->y + i * a->ld_y, k, a->k, v_mul(v, scale));
        }
    }
}

/* The router, with its four streams at a time; others take their turns. */
static void route(const struct router_weights *w, uint32_t hidden, uint32_t n_streams,
                  const float *x, double *ret)
{
    double r = 1 / sqrt(mean_square(x, hidden) + (double)w->eps);

    for (uint32_t j = 0; j < n_streams; j += 4) {
        uint32_t n = MIN(n_streams - j, 4u);
        const float *router[4];
        dvec a[4], b[4];

        for (uint32_t i = 0; i < 4; i++) {
            router[i] = w->router + (size_t)(j + MIN(i, n - 1)) * hidden;
            a[i] = b[i] = d_zero();
        }
        for (uint32_t k = 0; k < hidden; k += LANES) {
            vec v = v_load_some(x, k, hidden), m = v_load_some(w->norm, k, hidden);
            dvec low = d_mul(d_low(v), d_low(m));
            dvec high = d_mul(d_high(v), d_high(m));

            for (uint32_t i = 0; i < 4; i++) {
                vec u = v_load_some(router[i], k, hidden);

                a[i] = d_fma(low, d_low(u), a[i]);
                b[i] = d_fma(high, d_high(u), b[i]);
            }
        }
        for (uint32_t i = 0; i < n; i++)
            ret[j + i] = tanh(d_sum(d_add(a[i], b[i])) * r / hidden);
    }
}

/* n is a constant where it counts. */
static inline __attribute__((always_inline)) void
predict_one(uint32_t n, uint32_t hidden, const float *h, const float *c, float *pred)
{
    for (uint32_t k = 0; k < hidden; k += LANES) {
        vec v[BACKEND_MAX_STREAMS];

        for (uint32_t i = 0; i < n; i++)
            v[i] = v_load_some(h + (size_t)i * hidden, k, hidden);
        for (uint32_t j = 0; j < n; j++) {
            vec sum = v[j];

            for (uint32_t i = 0; i < n; i++)
                sum = v_fma(v_set1(c[j * n + i]), v[i], sum);
            v_store_some(pred + (size_t)j * hidden, k, hidden, sum);
        }
    }
}

static void predict_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct altup_predict_args *a = args;
    uint32_t n = a->n_streams, hidden = a->hidden;
    double m[BACKEND_MAX_STREAMS];
    float c[BACKEND_MAX_STREAMS * BACKEND_MAX_STREAMS];

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *h = a->h + (size_t)row * n * hidden;
        float *pred = a->pred + (size_t)row * n * hidden;

        route(&a->router, hidden, n, h, m);
        for (uint32_t ji = 0; ji < n * n; ji++) {
            double sum = 0;

            for (uint32_t s = 0; s < n; s++)
                sum += (double)a->coefs[ji * n + s] * m[s];
            c[ji] = (float)sum;
        }
        if (n == 4)
            predict_one(4, hidden, h, c, pred);
        else
            predict_one(n, hidden, h, c, pred);
    }
}

static void correct_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct altup_correct_args *a = args;
    uint32_t n = a->n_streams, hidden = a->hidden;
    double m[BACKEND_MAX_STREAMS];
    vec c[BACKEND_MAX_STREAMS];

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *pred = a->pred + (size_t)row * n * hidden;
        const float *out = a->b + (size_t)row * hidden;
        float *h = a->h + (size_t)row * n * hidden;

        route(&a->router, hidden, n, out, m);
        for (uint32_t i = 0; i < n; i++) {
            double sum = 1;

            for (uint32_t s = 0; s < n; s++)
                sum += (double)a->coefs[i * n + s] * m[s];
            c[i] = v_set1((float)sum);
        }
        for (uint32_t k = 0; k < hidden; k += LANES) {
            vec p = v_load_some(pred, k, hidden);
            vec d = v_sub(v_load_some(out, k, hidden), p);
            vec v = v_fma(c[0], d, p);

            v_store_some(a->scaled + (size_t)row * hidden, k, hidden,
                         v_mul(v, v_load_some(a->scale, k, hidden)));
            v_store_some(h, k, hidden, v);
            for (uint32_t i = 1; i < n; i++)
                v_store_some(h + (size_t)i * hidden, k, hidden,
                             v_fma(c[i], d, v_load_some(pred + (size_t)i * hidden, k, hidden)));
        }
    }
}

static void stream_norm_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct stream_norm_args *a = args;
    uint32_t hidden = a->hidden;

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *x = a->x + (size_t)row * hidden;
        float *h = a->h + (size_t)row * a->n_streams * hidden;
        vec r = rms_scale(x, hidden, a->eps);

        for (uint32_t k = 0; k < hidden; k += LANES) {
            vec v = v_mul(v_mul(v_load_some(x, k, hidden), r), v_load_some(a->w, k, hidden));

            for (uint32_t i = 1; i < a->n_streams; i++) {
                float *to = h + (size_t)i * hidden;

                v_store_some(to, k, hidden, v_add(v_load_some(to, k, hidden), v));
            }
        }
    }
}
