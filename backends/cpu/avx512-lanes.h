/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* Sixteen lanes under the names of avx2-lanes.h. */

#include "backends/cpu/avx512.h"

#define LANES 16u

typedef __m512 vec;
typedef __m512d dvec;

static inline vec v_zero(void)
{
    return _mm512_setzero_ps();
}

static inline vec v_set1(float f)
{
    return _mm512_set1_ps(f);
}

static inline vec v_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline void v_store(float *p, vec v)
{
    _mm512_storeu_ps(p, v);
}

/* n - k < 16 */
static inline __mmask16 lanes_from(uint32_t k, uint32_t n)
{
    return (__mmask16)((1u << (n - k)) - 1);
}

static inline vec v_load_some(const float *x, uint32_t k, uint32_t n)
{
    return n - k >= LANES ? v_load(x + k) : _mm512_maskz_loadu_ps(lanes_from(k, n), x + k);
}

static inline void v_store_some(float *x, uint32_t k, uint32_t n, vec v)
{
    if (n - k >= LANES)
        v_store(x + k, v);
    else
        _mm512_mask_storeu_ps(x + k, lanes_from(k, n), v);
}

static inline vec v_add(vec a, vec b)
{
    return _mm512_add_ps(a, b);
}

static inline vec v_sub(vec a, vec b)
{
    return _mm512_sub_ps(a, b);
}

static inline vec v_mul(vec a, vec b)
{
    return _mm512_mul_ps(a, b);
}

static inline vec v_fma(vec a, vec b, vec c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline dvec d_zero(void)
{
    return _mm512_setzero_pd();
}

static inline dvec d_low(vec v)
{
    return _mm512_cvtps_pd(_mm512_castps512_ps256(v));
}

static inline dvec d_high(vec v)
{
    return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
}

static inline dvec d_add(dvec a, dvec b)
{
    return _mm512_add_pd(a, b);
}

static inline dvec d_mul(dvec a, dvec b)
{
    return _mm512_mul_pd(a, b);
}

static inline dvec d_fma(dvec a, dvec b, dvec c)
{
    return _mm512_fmadd_pd(a, b, c);
}

static inline double d_sum(dvec v)
{
    return _mm512_reduce_add_pd(v);
}
