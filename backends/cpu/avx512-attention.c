/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Attention with AVX-512: the steps of attention.h in registers of sixteen. */

#include "backends/cpu/attention.h"
#include "backends/cpu/avx512.h"

/* exp(x) as exp_lanes() of avx2.h, with the same constants and error. */
static inline __m512 exp_lanes(__m512 x)
{
    __m512 n, r, p;

    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87)), _mm512_set1_ps(88));
    n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)),
                             _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
    p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}

/* Sixteen values, of which those in lanes are read. */
static inline __m512 load_kv(const void *array, size_t at, __mmask16 lanes, bool f16)
{
    if (f16)
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, (const uint16_t *)array + at));
    return _mm512_maskz_loadu_ps(lanes, (const float *)array + at);
}

static inline void page_scores(const void *k, bool f16, const float *q, uint32_t dim, uint32_t n,
                               uint32_t first, uint32_t last, float (*score)[KV_PAGE])
{
    const __mmask16 all = 0xffff;

    for (uint32_t p = first / 32 * 32; p < last; p += 32) {
        __m512 total[GROUP][2];

        for (uint32_t g = 0; g < n; g++)
            total[g][0] = total[g][1] = _mm512_setzero_ps();
        for (uint32_t from = 0; from < dim; from += SCORE_RUN) {
            uint32_t to = MIN(from + SCORE_RUN, dim);
            __m512 sum[GROUP][2];

            for (uint32_t g = 0; g < n; g++)
                sum[g][0] = sum[g][1] = _mm512_setzero_ps();
            for (uint32_t i = from; i < to; i++) {
                __m512 k0 = load_kv(k, (size_t)i * KV_PAGE + p, all, f16);
                __m512 k1 = load_kv(k, (size_t)i * KV_PAGE + p + 16, all, f16);

                for (uint32_t g = 0; g < n; g++) {
                    __m512 v = _mm512_set1_ps(q[(size_t)g * dim + i]);

                    sum[g][0] = _mm512_fmadd_ps(k0, v, sum[g][0]);
                    sum[g][1] = _mm512_fmadd_ps(k1, v, sum[g][1]);
                }
            }
            for (uint32_t g = 0; g < n; g++) {
                total[g][0] = _mm512_add_ps(total[g][0], sum[g][0]);
                total[g][1] = _mm512_add_ps(total[g][1], sum[g][1]);
            }
        }
        for (uint32_t g = 0; g < n; g++) {
            _mm512_store_ps(score[g] + p, total[g][0]);
            _mm512_store_ps(score[g] + p + 16, total[g][1]);
        }
    }
}

static inline float page_weights(float *score, uint32_t first, uint32_t last, float *max,
                                 double *sum)
{
    uint64_t seen = (last == KV_PAGE ? ~UINT64_C(0) : (UINT64_C(1) << last) - 1) &
                    ~((UINT64_C(1) << first) - 1);
    __m512 lowest = _mm512_set1_ps(-INFINITY), top = lowest, part = _mm512_setzero_ps();
    float old = *max, scale = 0;

    for (uint32_t p = 0; p < KV_PAGE; p += 16)
        top = _mm512_max_ps(_mm512_mask_load_ps(lowest, (__mmask16)(seen >> p), score + p), top);
    *max = fmaxf(old, _mm512_reduce_max_ps(top));
    if (old > -INFINITY)
        scale = _mm512_cvtss_f32(exp_lanes(_mm512_set1_ps(old - *max)));
    for (uint32_t p = 0; p < KV_PAGE; p += 16) {
        __m512 s = _mm512_sub_ps(_mm512_load_ps(score + p), _mm512_set1_ps(*max));
        __m512 e = _mm512_maskz_mov_ps((__mmask16)(seen >> p), exp_lanes(s));

        part = _mm512_add_ps(part, e);
        _mm512_store_ps(score + p, e);
    }
    *sum = *sum * (double)scale + (double)_mm512_reduce_add_ps(part);
    return scale;
}

static inline void page_values(const void *v, bool f16, uint32_t dim, uint32_t n, uint32_t first,
                               uint32_t last, const float (*weight)[KV_PAGE], const float *scale,
                               float *out)
{
    for (uint32_t i = 0; i < dim; i += 32) {
        uint32_t rest = MIN(dim - i, 32u);
        __mmask16 m0 = (__mmask16)((UINT64_C(1) << rest) - 1);
        __mmask16 m1 = (__mmask16)(((UINT64_C(1) << rest) - 1) >> 16);
        __m512 sum[GROUP][2];

        for (uint32_t g = 0; g < n; g++)
            sum[g][0] = sum[g][1] = _mm512_setzero_ps();
        for (uint32_t p = first; p < last; p++) {
            __m512 v0 = load_kv(v, (size_t)p * dim + i, m0, f16);
            __m512 v1 = load_kv(v, (size_t)p * dim + i + 16, m1, f16);

            for (uint32_t g = 0; g < n; g++) {
                __m512 w = _mm512_set1_ps(weight[g][p]);

                sum[g][0] = _mm512_fmadd_ps(v0, w, sum[g][0]);
                sum[g][1] = _mm512_fmadd_ps(v1, w, sum[g][1]);
            }
        }
        for (uint32_t g = 0; g < n; g++) {
            float *to = out + (size_t)g * dim + i;
            __m512 s = _mm512_set1_ps(scale[g]);

            _mm512_mask_storeu_ps(to, m0,
                                  _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m0, to), s, sum[g][0]));
            _mm512_mask_storeu_ps(
                to + 16, m1, _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m1, to + 16), s, sum[g][1]));
        }
    }
}

void cpu_avx512_attention(struct backend *b, const struct attention_args *a)
{
    attention_over_pages(b, a, /* lanes= */ 16);
}
