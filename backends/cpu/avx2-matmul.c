/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Matrix products with AVX2. Sums run over blocks of 32 values of k in rising order, one addition
 * to the output's accumulator per block:
 *
 *   coarse    acc = fma((float)integer sum, d_w * d_x, acc)
 *   fine      acc = fma((float)(254 * sum of q's products + sum of q_low's), d_w / 254 * d_x, acc)
 *   f32       acc = fma(d_w, block sum, acc), or acc + block sum for weights without scales
 *
 * An output is one lane of an accumulator whichever kernel computes it, so one row and many give
 * the same bits. The exception is LAYOUT_ROWS with f32 activations, in the same kernel for any
 * number of rows: eight lanes share an output, each with every eighth k, and are added at the end.
 * Error: a block sum has at most 32 roundings and the chain of blocks two for each, together less
 * than n_in for n_in >= 64; for less, the chain has two links at most.
 */

#include <assert.h>
#include <string.h>

#include "backends/cpu/avx2.h"
#include "backends/cpu/matmul.h"
#include "backends/cpu/repack.h"

/*
 * gcc, left alone, loads all activations of a block before the first product, and both compilers
 * keep fine ones of one half of a stripe for the other: then no registers are left for the weights.
 */
#ifdef __clang__
#define KEEP_ORDER(vector) ((void)0)
#else
#define KEEP_ORDER(vector) __asm__("" : "+x"(vector))
#endif
#define LOAD_AGAIN(pointer) __asm__("" : "+r"(pointer))

#define HALF 8 /* rows of a stripe in one register */

/* Rows of f32 activations worked on together: more would share a cache set (see packed_rows). */
#define F32_ROWS 8

static inline __m256 load_scales(const uint16_t *d)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)d));
}

static inline __m256i broadcast_word(const int8_t *q)
{
    int32_t v;

    memcpy(&v, q, 4);
    return _mm256_set1_epi32(v);
}

/* Stores lanes 0..n - 1. */
static inline void store_lanes(float *y, uint32_t n, __m256 v)
{
    if (n >= 8)
        _mm256_storeu_ps(y, v);
    else if (n > 0)
        _mm256_maskstore_ps(y, lanes_below(n), v);
}

static inline void load_q4(const uint8_t *line, __m256i *nibbles)
{
    const __m256i mask = _mm256_set1_epi8(0xf);

    for (int i = 0; i < 4; i++) {
        __m256i v = _mm256_load_si256((const __m256i *)(line + 64 * i));

        nibbles[2 * i] = _mm256_and_si256(v, mask);
        nibbles[2 * i + 1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
    }
}

/*
 * sum + factor * integer sums of one block, eight rows of weights in the lanes. q4: products of a
 * nibble, at most 15, and 127, two by two and eight pairs deep: 30480, which 16 bits hold.
 */
static inline __m256i dot_q4(const __m256i *nibbles, const int8_t *q, int16_t factor, __m256i sum)
{
    __m256i s = _mm256_maddubs_epi16(nibbles[0], broadcast_word(q));

    for (int i = 1; i < 8; i++) {
        s = _mm256_add_epi16(s, _mm256_maddubs_epi16(nibbles[i], broadcast_word(q + 4 * i)));
        KEEP_ORDER(s);
    }
    return _mm256_add_epi32(_mm256_madd_epi16(s, _mm256_set1_epi16(factor)), sum);
}

/* q8: the sign goes over to the activation; 2 * 128 * 127 fits 16 bits, so nothing saturates. */
static inline __m256i dot_q8(const uint8_t *line, const int8_t *q, int16_t factor, __m256i sum)
{
    for (int i = 0; i < 8; i++) {
        __m256i w = _mm256_load_si256((const __m256i *)(line + 64 * i));
        __m256i x = _mm256_sign_epi8(broadcast_word(q + 4 * i), w);
        __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), x);

        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(factor)));
    }
    return sum;
}

static inline int32_t offset_of(enum weight_type type)
{
    return type == WEIGHT_Q4 ? 8 : 0;
}

static inline size_t block_bytes(enum weight_type type)
{
    return type == WEIGHT_Q4 ? 4 * 64 : 8 * 64;
}

/* Half a stripe's block: nibbles of q4, already taken apart, or q8's line itself. */
static inline __m256i dot_block(enum weight_type type, const uint8_t *line, const __m256i *nibbles,
                                const int8_t *q, int16_t factor, __m256i sum)
{
    return type == WEIGHT_Q4 ? dot_q4(nibbles, q, factor, sum) : dot_q8(line, q, factor, sum);
}

static inline __m256 add_block(__m256i dot, __m256 d_w, float d_x, __m256 acc)
{
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d_w, _mm256_set1_ps(d_x)), acc);
}

/* Scales of eight rows of weights, for activations of one or two planes. */
static inline __m256 scales_for(bool fine, const uint16_t *d)
{
    __m256 v = load_scales(d);

    return fine ? _mm256_mul_ps(v, _mm256_set1_ps(FINE_SCALE)) : v;
}

/* One row of activations against one stripe. Type and fine are constants where this is used. */
static inline __attribute__((always_inline)) void
stripe_rounded_one(enum weight_type type, bool fine, const uint8_t *line, const uint16_t *scales,
                   const struct activations *x, uint32_t row, float *y, uint32_t n_out)
{
    const size_t ld_d = x->ld_q / WEIGHT_BLOCK;
    const int8_t *q = x->q + row * x->ld_q, *low = fine ? x->q_low + row * x->ld_q : NULL;
    const float *d = x->d + row * ld_d;
    const int32_t *sum = x->sum + row * ld_d, *sum_low = fine ? x->sum_low + row * ld_d : NULL;
    uint32_t n_blocks = x->k / WEIGHT_BLOCK;
    __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};

    prefetch(scales, PREFETCH_SCALES);
    for (uint32_t b = 0; b < n_blocks; b++) {
        __m256i bias =
            _mm256_set1_epi32(-offset_of(type) * (fine ? FINE * sum[b] + sum_low[b] : sum[b]));

        prefetch(line + PREFETCH_LINES, block_bytes(type));
        prefetch((const char *)scales + PREFETCH_SCALES, 1);
        for (int half = 0; half < 2; half++) {
            const uint8_t *part = line + 32 * half;
            __m256i nibbles[8], dot;

            if (fine) {
                LOAD_AGAIN(q);
                LOAD_AGAIN(low);
            }
            if (type == WEIGHT_Q4)
                load_q4(part, nibbles);
            dot = dot_block(type, part, nibbles, q, fine ? FINE : 1, bias);
            if (fine)
                dot = dot_block(type, part, nibbles, low + b * (size_t)WEIGHT_BLOCK, 1, dot);
            acc[half] = add_block(dot, scales_for(fine, scales + HALF * half), d[b], acc[half]);
        }
        line += block_bytes(type);
        scales += WEIGHT_STRIPE;
        q += WEIGHT_BLOCK;
    }
    store_lanes(y, n_out, acc[0]);
    store_lanes(y + HALF, n_out > HALF ? n_out - HALF : 0, acc[1]);
}

/* n packed rows against one stripe. */
static inline __attribute__((always_inline)) void
stripe_rounded_many(enum weight_type type, bool fine, const uint8_t *line, const uint16_t *scales,
                    const struct packed_rows *p, uint32_t n_blocks, uint32_t n, float *y,
                    size_t ld_y, uint32_t n_out)
{
    float acc[PACK_ROWS][WEIGHT_STRIPE] __attribute__((aligned(64)));
    const size_t next = (fine ? 2 : 1) * WEIGHT_BLOCK;

    memset(acc, 0, n * sizeof(acc[0]));
    prefetch(scales, PREFETCH_SCALES);
    for (uint32_t b = 0; b < n_blocks; b++) {
        const float *d = p->d + (size_t)b * PACK_ROWS;
        const int32_t *bias = p->bias + (size_t)b * PACK_ROWS;

        prefetch(line + PREFETCH_LINES, block_bytes(type));
        prefetch((const char *)scales + PREFETCH_SCALES, 1);
        for (int half = 0; half < 2; half++) {
            const int8_t *q = p->q + (size_t)b * PACK_ROWS * WEIGHT_BLOCK;
            const uint8_t *part = line + 32 * half;
            __m256 d_w = scales_for(fine, scales + HALF * half);
            __m256i nibbles[8];

            if (type == WEIGHT_Q4)
                load_q4(part, nibbles);
            for (uint32_t i = 0; i < n; i++, q += next) {
                __m256i dot =
                    dot_block(type, part, nibbles, q, fine ? FINE : 1, _mm256_set1_epi32(bias[i]));
                float *to = acc[i] + HALF * half;

                if (fine)
                    dot = dot_block(type, part, nibbles, q + WEIGHT_BLOCK, 1, dot);
                _mm256_store_ps(to, add_block(dot, d_w, d[i], _mm256_load_ps(to)));
            }
        }
        line += block_bytes(type);
        scales += WEIGHT_STRIPE;
    }
    for (uint32_t i = 0; i < n; i++)
        memcpy(y + i * ld_y, acc[i], n_out * sizeof(float));
}

/*
 * Stripes first..last - 1, each against all rows. LAYOUT_ROWS: stripes are made of
 * its rows first, behind the packed activations in the scratch memory.
 */
static inline __attribute__((always_inline)) void
stripes_rounded(enum weight_type type, enum weight_layout layout, bool fine,
                const struct matmul_task *t, uint32_t first, uint32_t last, void *scratch)
{
    const struct weight *w = t->w;
    const struct activations *x = t->x;
    size_t stripe_bytes = weight_stripe_bytes(type, w->n_in);
    uint8_t *repacked = (uint8_t *)scratch + packed_bytes(w->n_in);

    for (uint32_t i = 0, n; i < x->n; i += n) {
        bool many = layout == LAYOUT_ROWS || x->n - i > 1;
        struct packed_rows p;

        n = MIN(x->n - i, (uint32_t)PACK_ROWS / (fine ? 2 : 1));
        if (many)
            p = pack_rows(x, i, n, offset_of(type), scratch);
        for (uint32_t s = first; s < last; s++) {
            uint32_t o = s * WEIGHT_STRIPE, n_out = MIN(w->n_out - o, (uint32_t)WEIGHT_STRIPE);
            const uint8_t *stripe = (const uint8_t *)w->data + s * stripe_bytes;
            float *y = t->y + i * t->ld_y + o;

            if (layout == LAYOUT_ROWS) {
                repack_stripe(type, w, o, n_out, repacked);
                stripe = repacked;
            }
            if (many)
                stripe_rounded_many(type, fine, stripe, stripe_scales(w, stripe), &p,
                                    w->n_in / WEIGHT_BLOCK, n, y, t->ld_y, n_out);
            else
                stripe_rounded_one(type, fine, stripe, stripe_scales(w, stripe), x, i, y, n_out);
        }
    }
}

static void tile16_q4_coarse(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q4, LAYOUT_TILE16, false, args, first, last, scratch);
}

static void tile16_q4_fine(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q4, LAYOUT_TILE16, true, args, first, last, scratch);
}

static void rows_q4_coarse(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q4, LAYOUT_ROWS, false, args, first, last, scratch);
}

static void tile16_q8_coarse(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q8, LAYOUT_TILE16, false, args, first, last, scratch);
}

static void tile16_q8_fine(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q8, LAYOUT_TILE16, true, args, first, last, scratch);
}

static void rows_q8_coarse(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q8, LAYOUT_ROWS, false, args, first, last, scratch);
}

/*
 * Block b of a stripe as floats [n][16], without the scale: values of k = 32 b and following,
 * n <= 32. Exact.
 */
static inline void unpack_stripe(enum weight_type type, const uint8_t *stripe, uint32_t b,
                                 uint32_t n, float (*v)[WEIGHT_STRIPE])
{
    for (int half = 0; half < 2; half++) {
        const uint8_t *p = stripe + 32 * half;

        switch (type) {
        case WEIGHT_F32:
            p += (size_t)b * WEIGHT_BLOCK * 64;
            for (uint32_t k = 0; k < n; k++, p += 64)
                _mm256_store_ps(v[k] + HALF * half, _mm256_load_ps((const float *)p));
            break;
        case WEIGHT_F16:
        case WEIGHT_BF16:
            p += (size_t)b * WEIGHT_BLOCK / 2 * 64;
            for (uint32_t k = 0; k < n; k += 2, p += 64) { /* of an odd end, one zero more */
                __m256i pair = _mm256_load_si256((const __m256i *)p);
                __m256 even, odd;

                if (type == WEIGHT_BF16) {
                    even = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
                    odd = _mm256_castsi256_ps(
                        _mm256_and_si256(pair, _mm256_set1_epi32((int)0xffff0000)));
                } else {
                    /* the low halves of eight words side by side, and the high ones */
                    __m256i low = _mm256_and_si256(pair, _mm256_set1_epi32(0xffff));
                    __m256i both = _mm256_permute4x64_epi64(
                        _mm256_packus_epi32(low, _mm256_srli_epi32(pair, 16)), 0xd8);

                    even = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
                    odd = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
                }
                _mm256_store_ps(v[k] + HALF * half, even);
                _mm256_store_ps(v[k + 1] + HALF * half, odd);
            }
            break;
        case WEIGHT_Q8:
            p += (size_t)b * 8 * 64;
            for (uint32_t k = 0; k < WEIGHT_BLOCK; k += 4, p += 64) {
                __m256i word = _mm256_load_si256((const __m256i *)p);

                for (int j = 0; j < 4; j++)
                    _mm256_store_ps(v[k + (uint32_t)j] + HALF * half,
                                    _mm256_cvtepi32_ps(_mm256_srai_epi32(
                                        _mm256_slli_epi32(word, 24 - 8 * j), 24)));
            }
            break;
        case WEIGHT_Q4:
            p += (size_t)b * 4 * 64;
            for (uint32_t k = 0; k < WEIGHT_BLOCK; k += 8, p += 64) {
                __m256i word = _mm256_load_si256((const __m256i *)p);

                for (int j = 0; j < 8; j++) {
                    int shift = j % 4 * 8 + j / 4 * 4;
                    __m256i q =
                        _mm256_and_si256(_mm256_srli_epi32(word, shift), _mm256_set1_epi32(0xf));

                    _mm256_store_ps(v[k + (uint32_t)j] + HALF * half,
                                    _mm256_cvtepi32_ps(_mm256_sub_epi32(q, _mm256_set1_epi32(8))));
                }
            }
            break;
        }
    }
}

/* Sums of one block for n_rows rows of activations, even and odd k apart to have more additions
 * under way. n_rows is a constant where this is used. */
static inline __attribute__((always_inline)) void
dot_unpacked(bool scaled, const float (*v)[WEIGHT_STRIPE], uint32_t n, const float *x, size_t ld,
             uint32_t n_rows, const __m256 *d, float (*acc)[WEIGHT_STRIPE])
{
    __m256 sum[2][2][2];
    uint32_t k = 0;

    for (uint32_t i = 0; i < n_rows; i++)
        for (int j = 0; j < 4; j++)
            sum[i][j / 2][j % 2] = _mm256_setzero_ps();
    for (; k + 2 <= n; k += 2)
        for (int odd = 0; odd < 2; odd++)
            for (int half = 0; half < 2; half++) {
                __m256 w = _mm256_load_ps(v[k + (uint32_t)odd] + HALF * half);

                for (uint32_t i = 0; i < n_rows; i++)
                    sum[i][odd][half] = _mm256_fmadd_ps(
                        w, _mm256_set1_ps(x[i * ld + k + (uint32_t)odd]), sum[i][odd][half]);
            }
    for (int half = 0; half < 2 && k < n; half++)
        for (uint32_t i = 0; i < n_rows; i++)
            sum[i][0][half] = _mm256_fmadd_ps(_mm256_load_ps(v[k] + HALF * half),
                                              _mm256_set1_ps(x[i * ld + k]), sum[i][0][half]);
    for (uint32_t i = 0; i < n_rows; i++)
        for (int half = 0; half < 2; half++) {
            __m256 both = _mm256_add_ps(sum[i][0][half], sum[i][1][half]);
            __m256 a = _mm256_load_ps(acc[i] + HALF * half);

            a = scaled ? _mm256_fmadd_ps(d[half], both, a) : _mm256_add_ps(a, both);
            _mm256_store_ps(acc[i] + HALF * half, a);
        }
}

static inline void tile16_f32(enum weight_type type, const struct matmul_task *t, uint32_t first,
                              uint32_t last)
{
    const struct weight *w = t->w;
    const struct activations *x = t->x;
    bool scaled = type == WEIGHT_Q4 || type == WEIGHT_Q8;
    size_t stripe_bytes = weight_stripe_bytes(type, w->n_in);
    float v[WEIGHT_BLOCK][WEIGHT_STRIPE] __attribute__((aligned(64)));
    float acc[F32_ROWS][WEIGHT_STRIPE] __attribute__((aligned(64)));
    __m256 d[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};

    for (uint32_t s = first; s < last; s++) {
        const uint8_t *stripe = (const uint8_t *)w->data + s * stripe_bytes;
        const uint16_t *scales = stripe_scales(w, stripe);
        uint32_t o = s * WEIGHT_STRIPE, n_out = MIN(w->n_out - o, (uint32_t)WEIGHT_STRIPE);

        for (uint32_t i = 0, n_rows; i < x->n; i += n_rows) {
            const float *f = x->f32 + i * x->ld;

            n_rows = MIN(x->n - i, (uint32_t)F32_ROWS);
            memset(acc, 0, n_rows * sizeof(acc[0]));
            for (uint32_t k = 0, b = 0, n; k < w->n_in; k += n, b++) {
                uint32_t r = 0;

                n = MIN(w->n_in - k, (uint32_t)WEIGHT_BLOCK);
                unpack_stripe(type, stripe, b, n, v);
                for (int half = 0; half < 2 && scaled; half++)
                    d[half] = load_scales(scales + b * WEIGHT_STRIPE + HALF * half);
                for (; r + 2 <= n_rows; r += 2)
                    dot_unpacked(scaled, v, n, f + r * x->ld + k, x->ld, 2, d, acc + r);
                if (r < n_rows)
                    dot_unpacked(scaled, v, n, f + r * x->ld + k, x->ld, 1, d, acc + r);
            }
            for (uint32_t r = 0; r < n_rows; r++)
                memcpy(t->y + (i + r) * t->ld_y + o, acc[r], n_out * sizeof(float));
        }
    }
}

static void tile16_f32_any(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct matmul_task *t = args;

    (void)scratch;
    WITH_WEIGHT_TYPE(t->w->type, tile16_f32, t, first, last);
}

/* LAYOUT_ROWS and LAYOUT_PLAIN */

static float half_value(const uint16_t *d)
{
    return _cvtsh_ss(*d);
}

/* Values 8 i.. of a block (quantised) or of the row (others) as floats, without scale. */
static inline __m256 row_values(enum weight_type type, const uint8_t *p, size_t i)
{
    __m128i v;

    switch (type) {
    case WEIGHT_F32:
        return _mm256_loadu_ps((const float *)p + 8 * i);
    case WEIGHT_F16:
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)p + 8 * i)));
    case WEIGHT_BF16:
        v = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + 8 * i));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    case WEIGHT_Q8:
        v = _mm_loadl_epi64((const __m128i *)(p + 8 * i));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v));
    case WEIGHT_Q4:
        v = _mm_loadl_epi64((const __m128i *)(p + i % 2 * 8));
        v = _mm_and_si128(i < 2 ? v : _mm_srli_epi16(v, 4), _mm_set1_epi8(0xf));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(v), _mm256_set1_epi32(8)));
    }
    return _mm256_setzero_ps();
}

static inline float row_dot_f32(enum weight_type type, const uint8_t *row, const uint16_t *scales,
                                const float *x, uint32_t n_in)
{
    size_t size = type == WEIGHT_F32 ? 4 : 2;
    __m256 acc = _mm256_setzero_ps();
    uint32_t k = 0;

    if (type == WEIGHT_Q4 || type == WEIGHT_Q8) {
        for (uint32_t b = 0; b < n_in / WEIGHT_BLOCK; b++) {
            __m256 sum = _mm256_setzero_ps();

            for (uint32_t i = 0; i < 4; i++, k += 8)
                sum = _mm256_fmadd_ps(row_values(type, row, i), _mm256_loadu_ps(x + k), sum);
            acc = _mm256_fmadd_ps(_mm256_set1_ps(half_value(scales + b)), sum, acc);
            row += type == WEIGHT_Q4 ? 16 : 32;
        }
        return sum_lanes(acc);
    }
    for (; k + 8 <= n_in; k += 8)
        acc = _mm256_fmadd_ps(row_values(type, row, k / 8), _mm256_loadu_ps(x + k), acc);
    if (k < n_in) { /* the row's padding is not ours to read with LAYOUT_PLAIN, nor x's at all */
        uint8_t end[32] = {0};

        memcpy(end, row + k * size, (n_in - k) * size);
        acc = _mm256_fmadd_ps(row_values(type, end, 0),
                              _mm256_maskload_ps(x + k, lanes_below(n_in - k)), acc);
    }
    return sum_lanes(acc);
}

static inline void rows_f32(enum weight_type type, const struct matmul_task *t, uint32_t first,
                            uint32_t last)
{
    const struct weight *w = t->w;
    const struct activations *x = t->x;
    size_t bytes =
        w->layout == LAYOUT_PLAIN ? (size_t)w->n_in * 4 : weight_row_bytes(type, w->n_in);
    size_t quants = type == WEIGHT_Q4 ? w->n_in / 2 : w->n_in;

    for (uint32_t o = first; o < last; o++) {
        const uint8_t *row = (const uint8_t *)w->data + o * bytes;
        const uint16_t *scales = (const uint16_t *)(row + quants);

        for (uint32_t i = 0; i < x->n; i++)
            t->y[i * t->ld_y + o] = row_dot_f32(type, row, scales, x->f32 + i * x->ld, w->n_in);
    }
}

static void rows_any(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct matmul_task *t = args;

    (void)scratch;
    WITH_WEIGHT_TYPE(t->w->type, rows_f32, t, first, last);
}

void cpu_avx2_matmul(struct backend *b, const struct weight *w, const struct activations *x,
                     float *y, size_t ld_y)
{
    struct cpu_backend *c = cpu_backend(b);
    struct matmul_task t = {w, x, y, ld_y};
    size_t cost = (size_t)w->n_in * x->n;
    bool coarse = is_coarse(&t), rounded = x->q && weight_type_is_quantized(w->type);
    bool q4 = w->type == WEIGHT_Q4;
    uint32_t n_stripes = DIV_ROUND_UP(w->n_out, WEIGHT_STRIPE);

    assert(x->k == w->n_in && w->n_in <= c->limits.max_width);
    switch (w->layout) {
    case LAYOUT_TILE16:
        cpu_parallel(c, n_stripes, cost,
                     !rounded ? tile16_f32_any
                     : coarse ? q4 ? tile16_q4_coarse : tile16_q8_coarse
                     : q4     ? tile16_q4_fine
                              : tile16_q8_fine,
                     &t);
        break;
    case LAYOUT_ROWS:
        if (coarse) {
            cpu_parallel(c, n_stripes, cost, q4 ? rows_q4_coarse : rows_q8_coarse, &t);
            break;
        }
        /* fall through */
    case LAYOUT_PLAIN:
        cpu_parallel(c, w->n_out, cost / 8, rows_any, &t);
        break;
    case LAYOUT_COLS:
        c->reference_matmul(b, w, x, y, ld_y);
        break;
    }
}
