/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Attention with AVX-512: the steps of attention.h in registers of sixteen. */

#include "backends/cpu/attention.h"
#include "backends/cpu/avx512.h"

/* Sixteen values, of which those in lanes are read. */
static inline __m512 load_kv(const void *array, size_t at, __mmask16 lanes, bool f16)
{
    if (f16)
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, (const uint16_t *)array + at));
    return _mm512_maskz_loadu_ps(lanes, (const float *)array + at);
}

/* Scores of 16 n_regs positions from p on; n_regs a constant where this is used. */
static ALWAYS_INLINE void scores(const void *k, bool f16, const float *q, uint32_t dim, uint32_t n,
                                 uint32_t p, uint32_t n_regs, float (*score)[KV_PAGE],
                                 const char *ahead)
{
    const uint32_t row = KV_PAGE * (f16 ? 2 : 4);

    for (uint32_t from = 0; from < dim; from += SCORE_RUN) {
        uint32_t to = MIN(from + SCORE_RUN, dim);
        __m512 sum[GROUP][4];

        for (uint32_t g = 0; g < n; g++)
            for (uint32_t r = 0; r < n_regs; r++)
                sum[g][r] = _mm512_setzero_ps();
        for (uint32_t i = from; i < to; i++) {
            __m512 x[4];

            fetch(ahead, (size_t)i * row, row);
            for (uint32_t r = 0; r < n_regs; r++)
                x[r] = load_kv(k, (size_t)i * KV_PAGE + p + 16 * r, 0xffff, f16);
            for (uint32_t g = 0; g < n; g++) {
                __m512 v = _mm512_set1_ps(q[(size_t)g * dim + i]);

                for (uint32_t r = 0; r < n_regs; r++)
                    sum[g][r] = _mm512_fmadd_ps(x[r], v, sum[g][r]);
            }
        }
        for (uint32_t g = 0; g < n; g++)
            for (uint32_t r = 0; r < n_regs; r++) {
                float *to_score = score[g] + p + 16 * r;

                if (from > 0)
                    sum[g][r] = _mm512_add_ps(_mm512_load_ps(to_score), sum[g][r]);
                _mm512_store_ps(to_score, sum[g][r]);
            }
    }
}

static ALWAYS_INLINE void page_scores(const void *k, bool f16, const float *q, uint32_t dim,
                                      uint32_t n, uint32_t first, uint32_t last,
                                      float (*score)[KV_PAGE], const char *ahead)
{
    if (last - first / 32 * 32 > 32)
        scores(k, f16, q, dim, n, 0, 4, score, ahead);
    else
        scores(k, f16, q, dim, n, first / 32 * 32, 2, score, ahead);
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
        scale = exp_one(old - *max);
    for (uint32_t p = 0; p < KV_PAGE; p += 16) {
        __m512 s = _mm512_sub_ps(_mm512_load_ps(score + p), _mm512_set1_ps(*max));
        __m512 e = _mm512_maskz_mov_ps((__mmask16)(seen >> p), exp_lanes_16(s));

        part = _mm512_add_ps(part, e);
        _mm512_store_ps(score + p, e);
    }
    *sum = *sum * (double)scale + (double)_mm512_reduce_add_ps(part);
    return scale;
}

/* 16 n_regs dimensions from i on, or those of the lanes; n_regs a constant where this is used. */
static ALWAYS_INLINE void values(const void *v, bool f16, uint32_t dim, uint32_t n, uint32_t i,
                                 uint32_t n_regs, const __mmask16 *lanes, uint32_t first,
                                 uint32_t last, const float (*weight)[KV_PAGE], const float *scale,
                                 float *out, const char *ahead)
{
    const uint32_t line = 16 * n_regs * (f16 ? 2 : 4); /* bytes read of a position */
    __m512 sum[GROUP][4];

    for (uint32_t g = 0; g < n; g++)
        for (uint32_t r = 0; r < n_regs; r++)
            sum[g][r] = _mm512_setzero_ps();
    for (uint32_t p = first; p < last; p++) {
        __m512 x[4];

        fetch(ahead, (size_t)i * KV_PAGE * (f16 ? 2 : 4) + (size_t)p * line, line);
        for (uint32_t r = 0; r < n_regs; r++)
            x[r] = load_kv(v, (size_t)p * dim + i + 16 * r, lanes[r], f16);
        for (uint32_t g = 0; g < n; g++) {
            __m512 w = _mm512_set1_ps(weight[g][p]);

            for (uint32_t r = 0; r < n_regs; r++)
                sum[g][r] = _mm512_fmadd_ps(x[r], w, sum[g][r]);
        }
    }
    for (uint32_t g = 0; g < n; g++)
        for (uint32_t r = 0; r < n_regs; r++) {
            float *to = out + (size_t)g * dim + i + 16 * r;
            __m512 old = _mm512_maskz_loadu_ps(lanes[r], to), s = _mm512_set1_ps(scale[g]);

            _mm512_mask_storeu_ps(to, lanes[r], _mm512_fmadd_ps(old, s, sum[g][r]));
        }
}

static ALWAYS_INLINE void page_values(const void *v, bool f16, uint32_t dim, uint32_t n,
                                      uint32_t first, uint32_t last, const float (*weight)[KV_PAGE],
                                      const float *scale, float *out, const char *ahead)
{
    const __mmask16 all[4] = {0xffff, 0xffff, 0xffff, 0xffff};
    uint32_t i = 0;

    for (; i + 64 <= dim; i += 64)
        values(v, f16, dim, n, i, 4, all, first, last, weight, scale, out, ahead);
    for (; i < dim; i += 32) {
        uint64_t some = (UINT64_C(1) << MIN(dim - i, 32u)) - 1;
        __mmask16 lanes[2] = {(__mmask16)some, (__mmask16)(some >> 16)};

        values(v, f16, dim, n, i, 2, lanes, first, last, weight, scale, out, ahead);
    }
}

static inline float exp_one(float x)
{
    return _mm512_cvtss_f32(exp_lanes_16(_mm512_set1_ps(x)));
}

void cpu_avx512_attention(struct backend *b, const struct attention_args *a)
{
    attention_over_pages(b, a, /* lanes= */ 16);
}
