/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The AVX-512 level: those operations value by value that count in a prompt, in registers of
 * sixteen; the rest stays with AVX2. As there, sums of a row run in double, and a width that is no
 * multiple ends in a masked vector of the same instructions.
 */

#include <assert.h>
#include <math.h>

#include "backends/cpu/avx512.h"
#include "base/checked.h"

/* What a value costs an operation, in multiplications as cpu_parallel() counts them: measured, some
 * 0.1 ns, since memory and sums in double count as well. */
#define COST 4

/* n - k < 16 */
static inline __mmask16 lanes_from(uint32_t k, uint32_t n)
{
    return (__mmask16)((1u << (n - k)) - 1);
}

/* Values k.. of x that lie below n, zeros behind. */
static inline __m512 load_some(const float *x, uint32_t k, uint32_t n)
{
    return n - k >= 16 ? _mm512_loadu_ps(x + k) : _mm512_maskz_loadu_ps(lanes_from(k, n), x + k);
}

static inline void store_some(float *x, uint32_t k, uint32_t n, __m512 v)
{
    if (n - k >= 16)
        _mm512_storeu_ps(x + k, v);
    else
        _mm512_mask_storeu_ps(x + k, lanes_from(k, n), v);
}

static inline __m512d low_double(__m512 v)
{
    return _mm512_cvtps_pd(_mm512_castps512_ps256(v));
}

static inline __m512d high_double(__m512 v)
{
    return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
}

static inline double sum_double(__m512d a, __m512d b)
{
    return _mm512_reduce_add_pd(_mm512_add_pd(a, b));
}

static inline double mean_square(const float *x, uint32_t n)
{
    __m512d a = _mm512_setzero_pd(), b = a, c = a, d = a;
    uint32_t k = 0;

    for (; k + 32 <= n; k += 32) {
        __m512 u = _mm512_loadu_ps(x + k), v = _mm512_loadu_ps(x + k + 16);

        a = _mm512_fmadd_pd(low_double(u), low_double(u), a);
        b = _mm512_fmadd_pd(high_double(u), high_double(u), b);
        c = _mm512_fmadd_pd(low_double(v), low_double(v), c);
        d = _mm512_fmadd_pd(high_double(v), high_double(v), d);
    }
    for (; k < n; k += 16) {
        __m512 u = load_some(x, k, n);

        a = _mm512_fmadd_pd(low_double(u), low_double(u), a);
        b = _mm512_fmadd_pd(high_double(u), high_double(u), b);
    }
    return sum_double(_mm512_add_pd(a, c), _mm512_add_pd(b, d)) / n;
}

static inline __m512 rms_scale(const float *x, uint32_t n, float eps)
{
    return _mm512_set1_ps((float)(1 / sqrt(mean_square(x, n) + (double)eps)));
}

static void norm_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct norm_args *a = args;
    __m512 scale = _mm512_set1_ps(a->scale);

    (void)scratch;
    for (uint32_t i = first; i < last; i++) {
        const float *x = a->x + i * a->ld_x;
        __m512 r = rms_scale(x, a->k, a->eps);

        for (uint32_t k = 0; k < a->k; k += 16) {
            __m512 v = _mm512_mul_ps(load_some(x, k, a->k), r);

            if (a->w)
                v = _mm512_mul_ps(v, load_some(a->w, k, a->k));
            if (a->add)
                v = _mm512_add_ps(v, load_some(a->add + i * a->ld_add, k, a->k));
            if (a->add2)
                v = _mm512_add_ps(v, load_some(a->add2 + i * a->ld_add2, k, a->k));
            store_some(a->y + i * a->ld_y, k, a->k, _mm512_mul_ps(v, scale));
        }
    }
}

static void avx512_norm(struct backend *b, const struct norm_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->k * COST, norm_rows, a);
}

/* gelu as gelu_lanes() of avx2.h, with its error. */
static inline __m512 gelu_lanes(__m512 x)
{
    const __m512 c1 = _mm512_set1_ps(-1.59576912160573071176f);
    const __m512 c3 = _mm512_set1_ps(-1.59576912160573071176f * 0.044715f);
    __m512 t = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), c3, c1));
    __m512 e = _mm512_add_ps(_mm512_set1_ps(1), exp_lanes_16(t));

    /* beyond 87 it is 0; so is a NaN's sum of hostile weights, as good as any */
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(87), _CMP_NGT_UQ), x, e);
}

#define GATE_PIECE 2048 /* values of one item */

struct gate_task {
    const struct gate_args *a;
    uint32_t n_pieces; /* of a row */
};

static void gate_pieces(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct gate_task *t = args;
    const struct gate_args *a = t->a;

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        uint32_t i = item / t->n_pieces, begin = item % t->n_pieces * GATE_PIECE;
        uint32_t end = MIN(a->k, begin + GATE_PIECE);
        const float *gate = a->gate + i * a->ld_gate, *up = a->up + i * a->ld_up;
        float *y = a->y + i * a->ld_y;

        for (uint32_t k = begin; k < end; k += 16)
            store_some(y, k, end,
                       _mm512_mul_ps(gelu_lanes(load_some(gate, k, end)), load_some(up, k, end)));
    }
}

static void avx512_gate(struct backend *b, const struct gate_args *a)
{
    struct gate_task t = {a, DIV_ROUND_UP(a->k, GATE_PIECE)};

    if (a->z > 0 || a->k == 0)
        cpu_backend(b)->lower_gate(b, a);
    else
        cpu_parallel(cpu_backend(b), a->n * t.n_pieces, (size_t)MIN(a->k, (uint32_t)GATE_PIECE) * 4,
                     gate_pieces, &t);
}

/* The router, with its four streams at a time; others take their turns. */
static void route(const struct router_weights *w, uint32_t hidden, uint32_t n_streams,
                  const float *x, double *ret)
{
    double r = 1 / sqrt(mean_square(x, hidden) + (double)w->eps);

    for (uint32_t j = 0; j < n_streams; j += 4) {
        uint32_t n = MIN(n_streams - j, 4u);
        const float *router[4];
        __m512d a[4], b[4];

        for (uint32_t i = 0; i < 4; i++) {
            router[i] = w->router + (size_t)(j + MIN(i, n - 1)) * hidden;
            a[i] = b[i] = _mm512_setzero_pd();
        }
        for (uint32_t k = 0; k < hidden; k += 16) {
            __m512 v = load_some(x, k, hidden), m = load_some(w->norm, k, hidden);
            __m512d low = _mm512_mul_pd(low_double(v), low_double(m));
            __m512d high = _mm512_mul_pd(high_double(v), high_double(m));

            for (uint32_t i = 0; i < 4; i++) {
                __m512 u = load_some(router[i], k, hidden);

                a[i] = _mm512_fmadd_pd(low, low_double(u), a[i]);
                b[i] = _mm512_fmadd_pd(high, high_double(u), b[i]);
            }
        }
        for (uint32_t i = 0; i < n; i++)
            ret[j + i] = tanh(sum_double(a[i], b[i]) * r / hidden);
    }
}

/* n is a constant where it counts. */
static inline __attribute__((always_inline)) void
predict_one(uint32_t n, uint32_t hidden, const float *h, const float *c, float *pred)
{
    for (uint32_t k = 0; k < hidden; k += 16) {
        __m512 v[BACKEND_MAX_STREAMS];

        for (uint32_t i = 0; i < n; i++)
            v[i] = load_some(h + (size_t)i * hidden, k, hidden);
        for (uint32_t j = 0; j < n; j++) {
            __m512 sum = v[j];

            for (uint32_t i = 0; i < n; i++)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(c[j * n + i]), v[i], sum);
            store_some(pred + (size_t)j * hidden, k, hidden, sum);
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

static void avx512_altup_predict(struct backend *b, const struct altup_predict_args *a)
{
    assert(a->n_streams <= BACKEND_MAX_STREAMS);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * (a->n_streams + 1) * COST, predict_rows,
                 a);
}

static void correct_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct altup_correct_args *a = args;
    uint32_t n = a->n_streams, hidden = a->hidden;
    double m[BACKEND_MAX_STREAMS];
    __m512 c[BACKEND_MAX_STREAMS];

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
            c[i] = _mm512_set1_ps((float)sum);
        }
        for (uint32_t k = 0; k < hidden; k += 16) {
            __m512 p = load_some(pred, k, hidden);
            __m512 d = _mm512_sub_ps(load_some(out, k, hidden), p);
            __m512 v = _mm512_fmadd_ps(c[0], d, p);

            store_some(a->scaled + (size_t)row * hidden, k, hidden,
                       _mm512_mul_ps(v, load_some(a->scale, k, hidden)));
            store_some(h, k, hidden, v);
            for (uint32_t i = 1; i < n; i++)
                store_some(
                    h + (size_t)i * hidden, k, hidden,
                    _mm512_fmadd_ps(c[i], d, load_some(pred + (size_t)i * hidden, k, hidden)));
        }
    }
}

static void avx512_altup_correct(struct backend *b, const struct altup_correct_args *a)
{
    assert(a->n_streams <= BACKEND_MAX_STREAMS);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * (a->n_streams + 1) * COST, correct_rows,
                 a);
}

static void stream_norm_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct stream_norm_args *a = args;
    uint32_t hidden = a->hidden;

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *x = a->x + (size_t)row * hidden;
        float *h = a->h + (size_t)row * a->n_streams * hidden;
        __m512 r = rms_scale(x, hidden, a->eps);

        for (uint32_t k = 0; k < hidden; k += 16) {
            __m512 v = _mm512_mul_ps(_mm512_mul_ps(load_some(x, k, hidden), r),
                                     load_some(a->w, k, hidden));

            for (uint32_t i = 1; i < a->n_streams; i++) {
                float *to = h + (size_t)i * hidden;

                store_some(to, k, hidden, _mm512_add_ps(load_some(to, k, hidden), v));
            }
        }
    }
}

static void avx512_stream_norm(struct backend *b, const struct stream_norm_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * a->n_streams * COST, stream_norm_rows,
                 a);
}

void cpu_avx512_use_ops(struct cpu_backend *c)
{
    c->ops.norm = avx512_norm;
    c->lower_gate = c->ops.gate;
    c->ops.gate = avx512_gate;
    c->ops.altup_predict = avx512_altup_predict;
    c->ops.altup_correct = avx512_altup_correct;
    c->ops.stream_norm = avx512_stream_norm;
}
