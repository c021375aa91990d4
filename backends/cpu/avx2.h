/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* The files of the AVX2 level (AVX2, FMA, F16C) among themselves, and its small tools. */

#include <immintrin.h>

#include "backends/cpu/cpu.h"

void cpu_avx2_matmul(struct backend *b, const struct weight *w, const struct activations *x,
                     float *y, size_t ld_y);
void cpu_avx2_sparse_ffn(struct backend *b, const struct sparse_ffn_args *a);
void cpu_avx2_attention(struct backend *b, const struct attention_args *a);

/* Lanes 0..n - 1 of eight, 1 <= n <= 8. */
static inline __m256i lanes_below(uint32_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline float sum_lanes(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

static inline float max_lanes(__m256 v)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    s = _mm_max_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

/*
 * exp(x), x taken as -87 below and 88 above. x = n ln 2 + r with |r| <= ln 2 / 2: the product
 * with the high part of ln 2 (15 bits) is exact, r is off by less than 2^-25; the polynomial,
 * Taylor's up to r^7, by 2^-27 relatively; with its roundings |error| <= 2^-22 exp(x).
 */
static inline __m256 exp_lanes(__m256 x)
{
    __m256 n, r, p;

    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87)), _mm256_set1_ps(88));
    n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)),
                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), r);
    p = _mm256_set1_ps(1.0f / 5040);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

/*
 * gelu(x) = x / (1 + exp(t)), t = -2 sqrt(2 / pi) (x + 0.044715 x^3): the tanh form without its
 * cancellation. t has a relative error of some 4 eps and exp of 2^-22, so the result one of
 * 2^-22 + 4 eps |t| + 2 eps: below 2^-18 up to |t| = 12, and beyond, where x is -3.3 or less, the
 * result is below 2^-15 and its error far below 2^-28. From t = 87 on it is 0.
 */
static inline __m256 gelu_lanes(__m256 x)
{
    const __m256 c1 = _mm256_set1_ps(-1.59576912160573071176f);
    const __m256 c3 = _mm256_set1_ps(-1.59576912160573071176f * 0.044715f);
    __m256 t = _mm256_mul_ps(x, _mm256_fmadd_ps(_mm256_mul_ps(x, x), c3, c1));
    __m256 y = _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1), exp_lanes(t)));

    return _mm256_andnot_ps(_mm256_cmp_ps(t, _mm256_set1_ps(87), _CMP_GT_OQ), y);
}
