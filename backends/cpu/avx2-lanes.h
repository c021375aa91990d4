/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Eight lanes under the names that kernels of any width use (row-kernels.h, sparse-kernels.h);
 * avx512-lanes.h has sixteen. vec: floats; dvec: half as many doubles.
 */

#include "backends/cpu/avx2.h"

#define LANES 8u

typedef __m256 vec;
typedef __m256d dvec;

static inline vec v_zero(void)
{
    return _mm256_setzero_ps();
}

static inline vec v_set1(float f)
{
    return _mm256_set1_ps(f);
}

static inline vec v_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

static inline void v_store(float *p, vec v)
{
    _mm256_storeu_ps(p, v);
}

/* Values k.. of x that lie below n, zeros behind. */
static inline vec v_load_some(const float *x, uint32_t k, uint32_t n)
{
    return n - k >= LANES ? v_load(x + k) : _mm256_maskload_ps(x + k, lanes_below(n - k));
}

static inline void v_store_some(float *x, uint32_t k, uint32_t n, vec v)
{
    if (n - k >= LANES)
        v_store(x + k, v);
    else
        _mm256_maskstore_ps(x + k, lanes_below(n - k), v);
}

static inline vec v_add(vec a, vec b)
{
    return _mm256_add_ps(a, b);
}

static inline vec v_sub(vec a, vec b)
{
    return _mm256_sub_ps(a, b);
}

static inline vec v_mul(vec a, vec b)
{
    return _mm256_mul_ps(a, b);
}

static inline vec v_fma(vec a, vec b, vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}

static inline dvec d_zero(void)
{
    return _mm256_setzero_pd();
}

static inline dvec d_low(vec v)
{
    return _mm256_cvtps_pd(_mm256_castps256_ps128(v));
}

static inline dvec d_high(vec v)
{
    return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
}

static inline dvec d_add(dvec a, dvec b)
{
    return _mm256_add_pd(a, b);
}

static inline dvec d_mul(dvec a, dvec b)
{
    return _mm256_mul_pd(a, b);
}

static inline dvec d_fma(dvec a, dvec b, dvec c)
{
    return _mm256_fmadd_pd(a, b, c);
}

static inline double d_sum(dvec v)
{
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));

    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
