/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Attention with AVX2: the steps of attention.h in registers of eight. */

#include "backends/cpu/attention.h"
#include "backends/cpu/avx2.h"

static inline __m256 load_kv(const void *array, size_t at, bool f16)
{
    if (f16)
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)array + at)));
    return _mm256_loadu_ps((const float *)array + at);
}

static ALWAYS_INLINE void page_scores(const void *k, bool f16, const float *q, uint32_t dim,
                                      uint32_t n, uint32_t first, uint32_t last,
                                      float (*score)[KV_PAGE], const char *ahead)
{
    const uint32_t line = 16 * (f16 ? 2 : 4); /* bytes read of a dimension */

    for (uint32_t p = first / 16 * 16; p < last; p += 16) {
        for (uint32_t from = 0; from < dim; from += SCORE_RUN) {
            uint32_t to = MIN(from + SCORE_RUN, dim);
            __m256 sum[GROUP][2];

            for (uint32_t g = 0; g < n; g++)
                sum[g][0] = sum[g][1] = _mm256_setzero_ps();
            for (uint32_t i = from; i < to; i++) {
                if (i % 2 == 0) /* a line of f16 holds two */
                    fetch(ahead, ((size_t)p * dim + 16 * i) * (f16 ? 2 : 4), 2 * line);

                __m256 k0 = load_kv(k, (size_t)i * KV_PAGE + p, f16);
                __m256 k1 = load_kv(k, (size_t)i * KV_PAGE + p + 8, f16);

                for (uint32_t g = 0; g < n; g++) {
                    __m256 v = _mm256_set1_ps(q[(size_t)g * dim + i]);

                    sum[g][0] = _mm256_fmadd_ps(k0, v, sum[g][0]);
                    sum[g][1] = _mm256_fmadd_ps(k1, v, sum[g][1]);
                }
            }
            for (uint32_t g = 0; g < n; g++)
                for (uint32_t r = 0; r < 2; r++) {
                    float *total = score[g] + p + 8 * r;

                    if (from > 0)
                        sum[g][r] = _mm256_add_ps(_mm256_load_ps(total), sum[g][r]);
                    _mm256_store_ps(total, sum[g][r]);
                }
        }
    }
}

static inline float exp_one(float x)
{
    return _mm256_cvtss_f32(exp_lanes(_mm256_set1_ps(x)));
}

static inline float page_weights(float *score, uint32_t first, uint32_t last, float *max,
                                 double *sum)
{
    float old = *max, scale = 0;
    __m256 top = _mm256_set1_ps(-INFINITY), part = _mm256_setzero_ps();

    for (uint32_t p = 0; p < KV_PAGE; p++)
        if (p < first || p >= last)
            score[p] = -INFINITY;
    for (uint32_t p = 0; p < KV_PAGE; p += 8)
        top = _mm256_max_ps(_mm256_load_ps(score + p), top);
    *max = fmaxf(old, max_lanes(top));
    if (old > -INFINITY)
        scale = exp_one(old - *max);
    for (uint32_t p = 0; p < KV_PAGE; p += 8) {
        __m256 s = _mm256_load_ps(score + p);
        __m256 seen = _mm256_cmp_ps(s, _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        __m256 e = _mm256_and_ps(exp_lanes(_mm256_sub_ps(s, _mm256_set1_ps(*max))), seen);

        part = _mm256_add_ps(part, e);
        _mm256_store_ps(score + p, e);
    }
    *sum = *sum * (double)scale + (double)sum_lanes(part);
    return scale;
}

static ALWAYS_INLINE void page_values(const void *v, bool f16, uint32_t dim, uint32_t n,
                                      uint32_t first, uint32_t last, const float (*weight)[KV_PAGE],
                                      const float *scale, float *out, const char *ahead)
{
    const uint32_t line = 16 * (f16 ? 2 : 4); /* bytes read of a position */
    uint32_t i = 0;

    for (; i + 16 <= dim; i += 16) {
        __m256 sum[GROUP][2];

        for (uint32_t g = 0; g < n; g++)
            sum[g][0] = sum[g][1] = _mm256_setzero_ps();
        for (uint32_t p = first; p < last; p++) {
            if (p % 2 == 0)
                fetch(ahead, (size_t)i * KV_PAGE * (f16 ? 2 : 4) + (size_t)p * line, 2 * line);

            __m256 v0 = load_kv(v, (size_t)p * dim + i, f16);
            __m256 v1 = load_kv(v, (size_t)p * dim + i + 8, f16);

            for (uint32_t g = 0; g < n; g++) {
                __m256 w = _mm256_set1_ps(weight[g][p]);

                sum[g][0] = _mm256_fmadd_ps(v0, w, sum[g][0]);
                sum[g][1] = _mm256_fmadd_ps(v1, w, sum[g][1]);
            }
        }
        for (uint32_t g = 0; g < n; g++) {
            float *to = out + (size_t)g * dim + i;
            __m256 s = _mm256_set1_ps(scale[g]);

            _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_loadu_ps(to), s, sum[g][0]));
            _mm256_storeu_ps(to + 8, _mm256_fmadd_ps(_mm256_loadu_ps(to + 8), s, sum[g][1]));
        }
    }
    for (; i < dim; i++) /* head sizes of real models never come here */
        for (uint32_t g = 0; g < n; g++) {
            float sum = 0;

            for (uint32_t p = first; p < last; p++) {
                size_t at = (size_t)p * dim + i;

                sum = fmaf(f16 ? _cvtsh_ss(((const uint16_t *)v)[at]) : ((const float *)v)[at],
                           weight[g][p], sum);
            }
            out[(size_t)g * dim + i] = fmaf(out[(size_t)g * dim + i], scale[g], sum);
        }
}

void cpu_avx2_attention(struct backend *b, const struct attention_args *a)
{
    attention_over_pages(b, a, /* lanes= */ 8);
}
