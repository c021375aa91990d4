/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * For given integers q the best scale is sum(x q) / sum(q q), and it lowers the squared error by
 * sum(x q)^2 / sum(q q). So the search goes over integer vectors: it rounds x times a range of
 * inverse scales, with the largest magnitude landing between 5.5 and 9.5 steps from zero on either
 * side (beyond the end of the range it is clamped, which pays when it is an outlier), and keeps the
 * vector that lowers the error most. Its scale is rounded to f16, the integers are rounded once
 * more for that scale, and the result competes with the plain rule by its true error.
 *
 * Vectors of eight floats in the compiler's own notation: the same sums in the same order whatever
 * the instruction set is. Rounding is done by adding 1.5 * 2^23, which every unit can.
 */

#include "tools/import/quantize.h"

#include <math.h>
#include <string.h>

/* About vectors in the signatures of functions that are always inlined and so have no ABI. */
#pragma GCC diagnostic ignored "-Wpsabi"

#define LANES 8
#define N_VECTORS (WEIGHT_BLOCK / LANES)

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

/* Inverse scales tried, for a largest magnitude of 1: from FIRST in N steps of STEP. */
#define CANDIDATE_FIRST 5.5f
#define CANDIDATE_STEP 0.25f
#define N_CANDIDATES 17

#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to nearest even */

#define INLINE static inline __attribute__((always_inline))

union vector {
    vf f;
    vi i;
};

INLINE vf choose(vi mask, vf a, vf b)
{
    union vector x = {.f = a}, y = {.f = b}, r;

    r.i = (x.i & mask) | (y.i & ~mask);
    return r.f;
}

INLINE vf round_clamped(vf x, float low, float high)
{
    vf l = (vf){0} + low, h = (vf){0} + high;

    x = choose(x < l, l, x);
    x = choose(x > h, h, x);
    return (x + ROUNDER) - ROUNDER;
}

INLINE float sum_lanes(vf v)
{
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* sum((x - d q)^2) */
INLINE float error_of(const vf *x, const vf *q, float d)
{
    vf sum = {0};

    for (int i = 0; i < N_VECTORS; i++) {
        vf e = x[i] - q[i] * d;

        sum += e * e;
    }
    return sum_lanes(sum);
}

INLINE void round_block(const vf *x, float inverse, float low, float high, vf *q)
{
    for (int i = 0; i < N_VECTORS; i++)
        q[i] = round_clamped(x[i] * inverse, low, high);
}

/* Q4_0's own way of rounding: ties go up. */
INLINE void plain_block(const vf *x, float inverse, vf *q)
{
    for (int i = 0; i < N_VECTORS; i++) {
        vi t = __builtin_convertvector(x[i] * inverse + 8.5f, vi);
        vf v = __builtin_convertvector(t, vf) - 8.0f, high = (vf){0} + 7.0f;

        q[i] = choose(v > high, high, v);
    }
}

INLINE float finite_inverse(float d)
{
    return d != 0 && fabsf(1 / d) <= 0x1p126f ? 1 / d : 0;
}

INLINE void store_block(const vf *v, int8_t *q)
{
    for (int i = 0; i < N_VECTORS; i++)
        for (int k = 0; k < LANES; k++)
            q[i * LANES + k] = (int8_t)v[i][k];
}

INLINE float largest(const vf *x)
{
    vf most = {0};
    float m = 0;

    for (int i = 0; i < N_VECTORS; i++) {
        vf a = choose(x[i] < 0, -x[i], x[i]);

        most = choose(a > most, a, most);
    }
    for (int k = 0; k < LANES; k++)
        m = most[k] > m ? most[k] : m;
    return m;
}

INLINE bool q8_block(const vf *x, float m, int8_t *ret_q, uint16_t *ret_d)
{
    uint16_t bits = half_from_float(m / 127);
    vf q[N_VECTORS];

    if ((bits & 0x7fff) >= 0x7c00)
        return false;
    round_block(x, finite_inverse(half_to_float(bits)), -127, 127, q);
    store_block(q, ret_q);
    *ret_d = bits;
    return true;
}

INLINE bool q4_block(const vf *x, float m, int8_t *ret_q, uint16_t *ret_d)
{
    vf q[N_VECTORS], plain[N_VECTORS];
    float best = 0, best_d = 0, d, inverse;
    uint16_t bits, plain_bits;
    bool negative = false;

    /* The sign of the value of largest magnitude, the first of several. */
    for (int i = 0; i < WEIGHT_BLOCK; i++) {
        float v = x[i / LANES][i % LANES];

        if (fabsf(v) == m) {
            negative = v < 0;
            break;
        }
    }
    d = negative ? m / 8 : m / -8;
    plain_bits = half_from_float(d);
    if ((plain_bits & 0x7fff) >= 0x7c00)
        return false;

    /* Both signs of the scale: -8 is one step further than 7. */
    for (int c = 0; c < 2 * N_CANDIDATES; c++) {
        vf xq = {0}, qq = {0};
        float sum_xq, sum_qq;

        inverse = (CANDIDATE_FIRST + CANDIDATE_STEP * (float)(c / 2)) * finite_inverse(m);
        if (c % 2)
            inverse = -inverse;
        for (int i = 0; i < N_VECTORS; i++) {
            vf v = round_clamped(x[i] * inverse, -8, 7);

            xq += x[i] * v;
            qq += v * v;
        }
        sum_xq = sum_lanes(xq);
        sum_qq = sum_lanes(qq);
        if (sum_qq > 0 && sum_xq * sum_xq > best * sum_qq) {
            best = sum_xq * sum_xq / sum_qq;
            best_d = sum_xq / sum_qq;
        }
    }
    bits = half_from_float(best_d);
    if ((bits & 0x7fff) >= 0x7c00)
        bits = plain_bits; /* less than -8 steps of it, and the scale gets too large */
    round_block(x, finite_inverse(half_to_float(bits)), -8, 7, q);
    plain_block(x, finite_inverse(d), plain);
    if (error_of(x, plain, half_to_float(plain_bits)) < error_of(x, q, half_to_float(bits))) {
        memcpy(q, plain, sizeof(q));
        bits = plain_bits;
    }
    store_block(q, ret_q);
    *ret_d = bits;
    return true;
}

INLINE bool quantize_blocks(enum weight_type type, const float *x, size_t n, int8_t *q, uint16_t *d)
{
    bool fits = true;

    for (size_t b = 0; b < n / WEIGHT_BLOCK; b++) {
        vf block[N_VECTORS];
        float m;

        memcpy(block, x + b * WEIGHT_BLOCK, sizeof(block));
        m = largest(block);
        fits &= type == WEIGHT_Q8 ? q8_block(block, m, q + b * WEIGHT_BLOCK, d + b)
                                  : q4_block(block, m, q + b * WEIGHT_BLOCK, d + b);
    }
    return fits;
}

#if defined(__x86_64__)
/* The same code with wider registers; no fused multiplication, which would round otherwise. */
__attribute__((target("avx2"))) static bool quantize_avx2(enum weight_type type, const float *x,
                                                          size_t n, int8_t *q, uint16_t *d)
{
    return quantize_blocks(type, x, n, q, d);
}
#endif

bool quantize_portable(enum weight_type type, const float *x, size_t n, int8_t *q, uint16_t *d)
{
    return quantize_blocks(type, x, n, q, d);
}

bool quantize(enum weight_type type, const float *x, size_t n, int8_t *q, uint16_t *d)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        return quantize_avx2(type, x, n, q, d);
#endif
    return quantize_portable(type, x, n, q, d);
}
