/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The AVX2 level: everything that works value by value.
 */

#include <assert.h>
#include <float.h>
#include <math.h>
#include <string.h>

#include "backends/cpu/avx2-lanes.h"
#include "backends/cpu/matmul.h"
#include "backends/cpu/row-kernels.h"
#include "base/checked.h"

/* What a value costs an operation, in multiplications as cpu_parallel() counts them: measured, some
 * 0.2 ns, since memory and sums in double count as well. */
#define COST 6

/* The sum of 32 integers in -127..127, which go to q. */
static inline int32_t store_bytes(const __m256i *i, int8_t *q)
{
    __m256i sum = _mm256_add_epi32(_mm256_add_epi32(i[0], i[1]), _mm256_add_epi32(i[2], i[3]));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));

    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    /* packing works within halves: 0-3 8-11 16-19 24-27 and 4-7 12-15 20-23 28-31 */
    sum = _mm256_packs_epi16(_mm256_packs_epi32(i[0], i[1]), _mm256_packs_epi32(i[2], i[3]));
    sum = _mm256_permutevar8x32_epi32(sum, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)q, sum);
    return _mm_cvtsi128_si32(s);
}

/* One block; d and the integers as the reference computes them. low: NULL, or where q_low goes */
static inline void quantize_block(const float *x, uint32_t n, int8_t *q, float *ret_d,
                                  int32_t *ret_sum, int8_t *low, int32_t *ret_sum_low)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 v[4], max = _mm256_setzero_ps();
    __m256i i[4];
    float d;

    for (uint32_t j = 0; j < 4; j++) {
        v[j] = 8 * j < n ? v_load_some(x, 8 * j, n) : _mm256_setzero_ps();
        max = _mm256_max_ps(_mm256_andnot_ps(sign, v[j]), max);
    }
    d = max_lanes(max) / 127;
    if (!(d >= FLT_MIN)) {
        memset(q, 0, WEIGHT_BLOCK);
        *ret_d = 0;
        *ret_sum = 0;
        if (low) {
            memset(low, 0, WEIGHT_BLOCK);
            *ret_sum_low = 0;
        }
        return;
    }
    for (int j = 0; j < 4; j++) {
        __m256 r = _mm256_div_ps(v[j], _mm256_set1_ps(d));

        /* NaN, of hostile weights or infinity, becomes 0, so that sums stay those of bytes */
        r = _mm256_and_ps(r, _mm256_cmp_ps(r, r, _CMP_ORD_Q));
        i[j] = _mm256_cvtps_epi32(r);
        v[j] = _mm256_mul_ps(_mm256_sub_ps(r, _mm256_cvtepi32_ps(i[j])), _mm256_set1_ps(FINE));
    }
    *ret_d = d;
    *ret_sum = store_bytes(i, q);
    if (!low)
        return;
    for (int j = 0; j < 4; j++)
        i[j] = _mm256_cvtps_epi32(v[j]);
    *ret_sum_low = store_bytes(i, low);
}

#define QUANTIZE_PIECE ((size_t)64) /* blocks of one item */

static void quantize_pieces(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct activations *x = args;
    size_t n_blocks = x->ld_q / WEIGHT_BLOCK, n_pieces = DIV_ROUND_UP(n_blocks, QUANTIZE_PIECE);

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        size_t i = item / n_pieces, begin = item % n_pieces * QUANTIZE_PIECE;

        for (size_t b = begin; b < MIN(begin + QUANTIZE_PIECE, n_blocks); b++) {
            size_t k = b * WEIGHT_BLOCK;
            uint32_t n = k >= x->k ? 0 : (uint32_t)MIN(x->k - k, (size_t)WEIGHT_BLOCK);

            quantize_block(x->f32 + i * x->ld + (n ? k : 0), n, x->q + i * x->ld_q + k,
                           &x->d[i * n_blocks + b], &x->sum[i * n_blocks + b],
                           x->q_low ? x->q_low + i * x->ld_q + k : NULL,
                           x->q_low ? &x->sum_low[i * n_blocks + b] : NULL);
        }
    }
}

static void avx2_quantize(struct backend *b, const struct activations *x)
{
    size_t n_blocks = x->ld_q / WEIGHT_BLOCK;

    cpu_parallel(cpu_backend(b), x->n * (uint32_t)DIV_ROUND_UP(n_blocks, QUANTIZE_PIECE),
                 MIN(n_blocks, QUANTIZE_PIECE) * WEIGHT_BLOCK * COST, quantize_pieces, x);
}

static void avx2_norm(struct backend *b, const struct norm_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->k * COST, norm_rows, a);
}

static void head_norm_one(const struct head_norm_args *a, float *x, const float *rope)
{
    uint32_t dim = a->head_dim, half = dim / 2;
    __m256 r = rms_scale(x, dim, a->eps);

    if (!rope) {
        for (uint32_t k = 0; k < dim; k += 8) {
            __m256 v = _mm256_mul_ps(v_load_some(x, k, dim), r);

            if (a->w)
                v = _mm256_mul_ps(v, v_load_some(a->w, k, dim));
            v_store_some(x, k, dim, v);
        }
        return;
    }
    for (uint32_t k = 0; k < half; k += 8) {
        __m256 u = _mm256_mul_ps(v_load_some(x, k, half), r);
        __m256 v = _mm256_mul_ps(v_load_some(x + half, k, half), r);
        __m256 c = v_load_some(rope, k, half), s = v_load_some(rope + half, k, half);

        if (a->w) {
            u = _mm256_mul_ps(u, v_load_some(a->w, k, half));
            v = _mm256_mul_ps(v, v_load_some(a->w + half, k, half));
        }
        v_store_some(x, k, half, _mm256_fmsub_ps(u, c, _mm256_mul_ps(v, s)));
        v_store_some(x + half, k, half, _mm256_fmadd_ps(v, c, _mm256_mul_ps(u, s)));
    }
}

static void head_norm_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct head_norm_args *a = args;

    (void)scratch;
    for (uint32_t i = first; i < last; i++)
        for (uint32_t h = 0; h < a->n_heads; h++)
            head_norm_one(a, a->x + i * a->ld + (size_t)h * a->head_dim,
                          a->rope ? a->rope + (size_t)i * a->head_dim : NULL);
}

static void avx2_head_norm(struct backend *b, const struct head_norm_args *a)
{
    assert(!a->rope || a->head_dim % 2 == 0);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->n_heads * a->head_dim * COST, head_norm_rows, a);
}

/* Eight values, or the first n of them, to f16. */
static inline void store_half(uint16_t *to, uint32_t n, __m256 v)
{
    __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);

    if (n >= 8)
        _mm_storeu_si128((__m128i *)to, h);
    else
        memcpy(to, &h, n * sizeof(*to));
}

static void kv_store_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct kv_store_args *a = args;
    const struct kv_shape *s = &a->shape;
    uint32_t dim = s->head_dim;

    (void)scratch;
    for (uint32_t i = first; i < last; i++) {
        uint32_t p = a->rows[i].pos % KV_PAGE;
        void *page = a->rows[i].pages[a->rows[i].pos / KV_PAGE];

        for (uint32_t h = 0; h < s->n_heads_kv; h++) {
            const float *k = a->k + i * a->ld + (size_t)h * dim;
            const float *v = a->v + i * a->ld + (size_t)h * dim;
            size_t k_at = (size_t)h * dim * KV_PAGE + p;
            size_t v_at = ((size_t)(s->n_heads_kv + h) * KV_PAGE + p) * dim;

            if (!s->f16) {
                memcpy((float *)page + v_at, v, dim * sizeof(*v));
                for (uint32_t j = 0; j < dim; j++)
                    ((float *)page)[k_at + (size_t)j * KV_PAGE] = k[j];
                continue;
            }
            for (uint32_t j = 0; j < dim; j += 8) {
                uint16_t *to = (uint16_t *)page + k_at + (size_t)j * KV_PAGE, column[8];
                uint32_t n = MIN(dim - j, 8u);

                store_half((uint16_t *)page + v_at + j, n, v_load_some(v, j, dim));
                store_half(column, 8, v_load_some(k, j, dim));
                for (uint32_t e = 0; e < n; e++)
                    to[(size_t)e * KV_PAGE] = column[e];
            }
        }
    }
}

static void avx2_kv_store(struct backend *b, const struct kv_store_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->shape.n_heads_kv * a->shape.head_dim * COST,
                 kv_store_rows, a);
}

/* x - cut, or 0: in double, since a small rest of two near values keeps all its bits there. */
static inline __m256 above(__m256 x, __m256d cut)
{
    __m256d zero = _mm256_setzero_pd();
    __m128 low = _mm256_cvtpd_ps(_mm256_max_pd(_mm256_sub_pd(d_low(x), cut), zero));
    __m128 high = _mm256_cvtpd_ps(_mm256_max_pd(_mm256_sub_pd(d_high(x), cut), zero));

    return _mm256_set_m128(high, low);
}

static double gate_cut(const float *x, uint32_t n, double z)
{
    __m256d a = _mm256_setzero_pd(), b = _mm256_setzero_pd(), mean;
    double m;

    for (uint32_t k = 0; k < n; k += 8) {
        __m256 v = v_load_some(x, k, n);

        a = _mm256_add_pd(a, d_low(v));
        b = _mm256_add_pd(b, d_high(v));
    }
    m = d_sum(d_add(a, b)) / n;
    mean = _mm256_set1_pd(m);
    a = b = _mm256_setzero_pd();
    for (uint32_t k = 0; k < n; k += 8) {
        /* lanes behind the end take the mean's place and add nothing */
        __m256 v = v_load_some(x, k, n);
        __m256d low = _mm256_sub_pd(d_low(v), mean), high = _mm256_sub_pd(d_high(v), mean);

        if (n - k < 8) {
            __m256i in = lanes_below(n - k);

            low = _mm256_and_pd(
                low, _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(in))));
            high = _mm256_and_pd(
                high, _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(in, 1))));
        }
        a = _mm256_fmadd_pd(low, low, a);
        b = _mm256_fmadd_pd(high, high, b);
    }
    return m + z * sqrt(d_sum(d_add(a, b)) / n);
}

/* Values begin..end - 1 of row i. */
static void gate_some(const struct gate_args *a, uint32_t i, uint32_t begin, uint32_t end)
{
    const float *gate = a->gate + i * a->ld_gate, *up = a->up + i * a->ld_up;
    __m256d cut = _mm256_setzero_pd();

    if (a->z > 0)
        cut = _mm256_set1_pd(gate_cut(gate, a->k, (double)a->z));
    for (uint32_t k = begin; k < end; k += 8) {
        __m256 g = v_load_some(gate, k, end);

        if (a->z > 0)
            g = above(g, cut);
        v_store_some(a->y + i * a->ld_y, k, end,
                     _mm256_mul_ps(gelu_lanes(g), v_load_some(up, k, end)));
    }
}

static void gate_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct gate_args *a = args;

    (void)scratch;
    for (uint32_t i = first; i < last; i++)
        gate_some(a, i, 0, a->k);
}

#define GATE_PIECE 2048 /* values of one item where nothing is cut: one row is several items */

static void gate_pieces(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct gate_args *a = args;
    uint32_t n_pieces = DIV_ROUND_UP(a->k, GATE_PIECE);

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        uint32_t begin = item % n_pieces * GATE_PIECE;

        gate_some(a, item / n_pieces, begin, MIN(begin + GATE_PIECE, a->k));
    }
}

static void avx2_gate(struct backend *b, const struct gate_args *a)
{
    if (a->z > 0)
        cpu_parallel(cpu_backend(b), a->n, (size_t)a->k * 8, gate_rows, a);
    else
        cpu_parallel(cpu_backend(b), a->n * DIV_ROUND_UP(a->k, GATE_PIECE),
                     (size_t)MIN(a->k, (uint32_t)GATE_PIECE) * 8, gate_pieces, a);
}

static void avx2_altup_predict(struct backend *b, const struct altup_predict_args *a)
{
    assert(a->n_streams <= BACKEND_MAX_STREAMS);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * (a->n_streams + 1) * COST, predict_rows,
                 a);
}

static void avx2_altup_correct(struct backend *b, const struct altup_correct_args *a)
{
    assert(a->n_streams <= BACKEND_MAX_STREAMS);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * (a->n_streams + 1) * COST, correct_rows,
                 a);
}

static void avx2_stream_norm(struct backend *b, const struct stream_norm_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * a->n_streams * COST, stream_norm_rows,
                 a);
}

static void rescale_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct rescale_args *a = args;
    uint32_t hidden = a->hidden;

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *y = a->y + (size_t)row * hidden;
        float *h = a->h + ((size_t)row * a->n_streams + a->stream) * hidden;
        __m256 r = _mm256_set1_ps((float)(sqrt(mean_square(a->ref + row * a->ld_ref, hidden)) /
                                          sqrt(fmax(mean_square(y, hidden), 1e-5))));

        for (uint32_t k = 0; k < hidden; k += 8)
            v_store_some(h, k, hidden, _mm256_mul_ps(v_load_some(y, k, hidden), r));
    }
}

static void avx2_rescale(struct backend *b, const struct rescale_args *a)
{
    assert(a->stream < a->n_streams);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * COST, rescale_rows, a);
}

static void merge_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct merge_args *a = args;
    uint32_t hidden = a->hidden;
    __m256 part = _mm256_set1_ps(1 / (float)a->n_streams);

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *h = a->h + (size_t)row * a->n_streams * hidden;
        float *x = a->x + (size_t)row * hidden;
        __m256 r;

        for (uint32_t k = 0; k < hidden; k += 8) {
            __m256 sum = v_load_some(h, k, hidden);

            for (uint32_t i = 1; i < a->n_streams; i++)
                sum = _mm256_add_ps(sum, v_load_some(h + (size_t)i * hidden, k, hidden));
            v_store_some(x, k, hidden, _mm256_mul_ps(sum, part));
        }
        r = rms_scale(x, hidden, a->eps);
        for (uint32_t k = 0; k < hidden; k += 8)
            v_store_some(x, k, hidden,
                         _mm256_mul_ps(_mm256_mul_ps(v_load_some(x, k, hidden), r),
                                       v_load_some(a->w, k, hidden)));
    }
}

static void avx2_merge(struct backend *b, const struct merge_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * COST, merge_rows, a);
}

static void ple_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct ple_args *a = args;
    double scale = (double)a->g_scale;

    (void)scratch;
    for (size_t i = (size_t)first * a->n_layers; i < (size_t)last * a->n_layers; i++) {
        const float *g = a->g + i * a->width, *e = a->e + i * a->width;
        double square = mean_square(g, a->width) * scale * scale;
        __m256 r = _mm256_set1_ps((float)(scale / sqrt(square + (double)a->eps)));

        for (uint32_t k = 0; k < a->width; k += 8) {
            __m256 v = _mm256_mul_ps(v_load_some(g, k, a->width), r);

            v = _mm256_fmadd_ps(v, v_load_some(a->w, k, a->width), v_load_some(e, k, a->width));
            v_store_some(a->ple + i * a->width, k, a->width,
                         _mm256_mul_ps(v, _mm256_set1_ps((float)M_SQRT1_2)));
        }
    }
}

static void avx2_ple(struct backend *b, const struct ple_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->n_layers * a->width * COST, ple_rows, a);
}

struct softcap_task {
    float *x;
    size_t n;
    float c;
};

#define SOFTCAP_PIECE 4096 /* values of one item */

/* c tanh(x / c) = c (1 - 2 / (exp(2 x / c) + 1)). Near 0 the difference cancels: what is small is
 * the error against c. */
static void softcap_pieces(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct softcap_task *t = args;
    const __m256 one = _mm256_set1_ps(1), two = _mm256_set1_ps(2);
    __m256 c = _mm256_set1_ps(t->c), by = _mm256_set1_ps(2 / t->c);
    __m256 most = _mm256_set1_ps(nextafterf(t->c, 0)),
           least = _mm256_sub_ps(_mm256_setzero_ps(), most);

    (void)scratch;
    for (uint32_t piece = first; piece < last; piece++) {
        float *x = t->x + (size_t)piece * SOFTCAP_PIECE;
        uint32_t n = (uint32_t)MIN(t->n - (size_t)piece * SOFTCAP_PIECE, (size_t)SOFTCAP_PIECE);

        for (uint32_t k = 0; k < n; k += 8) {
            __m256 e = exp_lanes(_mm256_mul_ps(v_load_some(x, k, n), by));
            __m256 v = _mm256_sub_ps(one, _mm256_div_ps(two, _mm256_add_ps(e, one)));

            v = _mm256_mul_ps(v, c);
            v_store_some(x, k, n, _mm256_max_ps(_mm256_min_ps(v, most), least));
        }
    }
}

static void avx2_softcap(struct backend *b, float *x, size_t n, float c)
{
    struct softcap_task t = {x, n, c};

    cpu_parallel(cpu_backend(b), (uint32_t)DIV_ROUND_UP(n, SOFTCAP_PIECE), SOFTCAP_PIECE * 2,
                 softcap_pieces, &t);
}

void cpu_use_avx2(struct cpu_backend *c)
{
    c->ops.quantize = avx2_quantize;
    c->ops.matmul = cpu_avx2_matmul;
    c->ops.norm = avx2_norm;
    c->ops.head_norm = avx2_head_norm;
    c->ops.kv_store = avx2_kv_store;
    c->ops.attention = cpu_avx2_attention;
    c->ops.gate = avx2_gate;
    c->ops.sparse_ffn = cpu_avx2_sparse_ffn;
    c->ops.altup_predict = avx2_altup_predict;
    c->ops.altup_correct = avx2_altup_correct;
    c->ops.stream_norm = avx2_stream_norm;
    c->ops.rescale = avx2_rescale;
    c->ops.merge = avx2_merge;
    c->ops.ple = avx2_ple;
    c->ops.softcap = avx2_softcap;
}
