/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Attention with AVX-512: avx2-attention.c in registers of sixteen. */

#include <assert.h>
#include <math.h>
#include <string.h>

#include "backends/cpu/avx512.h"
#include "base/checked.h"

#define GROUP 4      /* query heads worked on together */
#define SCORE_RUN 16 /* terms of a score that are summed before they are added to the rest */

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

/* Scores of the page's positions; k [head_dim][KV_PAGE] */
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

/* Scores to weights in place, 0 where not seen; the new maximum and what the past is worth now. */
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

/* out [n][dim] = out * scale + the page's values by their weights; v [KV_PAGE][head_dim] */
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

/* n heads from head on, all of one KV head. n and f16 are constants where this is used. */
static inline __attribute__((always_inline)) void attend(const struct attention_args *a,
                                                         uint32_t row, uint32_t head, uint32_t n,
                                                         uint32_t head_kv, bool f16)
{
    uint32_t dim = a->shape.head_dim, size = f16 ? 2 : 4, pos = a->rows[row].pos;
    uint32_t begin = a->window && pos >= a->window ? pos - a->window + 1 : 0;
    const float *q = a->q + row * a->ld + (size_t)head * dim;
    float *out = a->out + row * a->ld + (size_t)head * dim;
    size_t k_from = (size_t)head_kv * dim * KV_PAGE * size;
    size_t v_from = (size_t)a->shape.n_heads_kv * dim * KV_PAGE * size + k_from;
    float score[GROUP][KV_PAGE] __attribute__((aligned(64)));
    float max[GROUP], scale[GROUP];
    double sum[GROUP];

    memset(score, 0, sizeof(score));
    memset(out, 0, (size_t)n * dim * sizeof(*out));
    for (uint32_t g = 0; g < n; g++) {
        max[g] = -INFINITY;
        sum[g] = 0;
    }
    for (uint32_t page = begin / KV_PAGE; page <= pos / KV_PAGE; page++) {
        const char *data = a->rows[row].pages[page];
        uint32_t first = page == begin / KV_PAGE ? begin % KV_PAGE : 0;
        uint32_t last = page == pos / KV_PAGE ? pos % KV_PAGE + 1 : KV_PAGE;

        page_scores(data + k_from, f16, q, dim, n, first, last, score);
        for (uint32_t g = 0; g < n; g++)
            scale[g] = page_weights(score[g], first, last, &max[g], &sum[g]);
        page_values(data + v_from, f16, dim, n, first, last, score, scale, out);
    }
    for (uint32_t g = 0; g < n; g++) {
        float r = (float)(1 / sum[g]);

        for (uint32_t i = 0; i < dim; i++)
            out[(size_t)g * dim + i] *= r;
    }
}

/* Items are pairs of a row and a KV head. */
static void attention_groups(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct attention_args *a = args;
    uint32_t n_kv = a->shape.n_heads_kv;

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        uint32_t row = item / n_kv, j = item % n_kv;
        uint32_t head = (uint32_t)DIV_ROUND_UP((uint64_t)j * a->n_heads, n_kv);
        uint32_t end = (uint32_t)DIV_ROUND_UP((uint64_t)(j + 1) * a->n_heads, n_kv);

        if (a->shape.f16) {
            for (; head + GROUP <= end; head += GROUP)
                attend(a, row, head, GROUP, j, true);
            for (; head < end; head++)
                attend(a, row, head, 1, j, true);
        } else {
            for (; head + GROUP <= end; head += GROUP)
                attend(a, row, head, GROUP, j, false);
            for (; head < end; head++)
                attend(a, row, head, 1, j, false);
        }
    }
}

void cpu_avx512_attention(struct backend *b, const struct attention_args *a)
{
    uint64_t positions = 0;

    assert(a->shape.head_dim <= BACKEND_MAX_HEAD_DIM && a->n_heads >= a->shape.n_heads_kv);
    for (uint32_t i = 0; i < a->n; i++)
        positions += a->window ? MIN(a->rows[i].pos + 1, a->window) : a->rows[i].pos + 1;
    if (a->n)
        cpu_parallel(cpu_backend(b), a->n * a->shape.n_heads_kv,
                     (size_t)(positions / a->n) * a->shape.head_dim *
                         (a->n_heads / a->shape.n_heads_kv) / 16,
                     attention_groups, a);
}
