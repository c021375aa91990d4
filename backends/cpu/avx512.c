/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The AVX-512 level (F, BW, DQ, VL, VNNI): matrix products of LAYOUT_TILE16, whose 16 outputs fill
 * a register, and of LAYOUT_ROWS by way of it, and attention; everything else stays with AVX2.
 * VPDPBUSD multiplies four unsigned bytes by four signed ones and adds them to a lane, so weights
 * are taken with an offset (8 for q4 as they are stored, 128 for q8 by turning the sign bit over)
 * and every lane starts at minus the offset times the sum of the activations. The order of sums is
 * that of avx2-matmul.c, so both levels give the same bits.
 */

#include <assert.h>
#include <string.h>

#include "backends/cpu/avx512.h"
#include "backends/cpu/matmul.h"
#include "backends/cpu/repack.h"
#include "base/checked.h"

/* Rows of f32 activations worked on together. */
#define F32_ROWS 8

static inline __m512 load_scales(const uint16_t *d)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)d));
}

static inline __m512i broadcast_word(const int8_t *q)
{
    int32_t v;

    memcpy(&v, q, 4);
    return _mm512_set1_epi32(v);
}

static inline int32_t offset_of(enum weight_type type)
{
    return type == WEIGHT_Q4 ? 8 : 128;
}

/* One block of a stripe: word i holds k = 4 i..4 i + 3 of its 16 rows, unsigned. */
static inline void load_block(enum weight_type type, const uint8_t *line, __m512i *words)
{
    const __m512i nibble = _mm512_set1_epi8(0xf), sign = _mm512_set1_epi8((char)0x80);

    if (type == WEIGHT_Q4)
        for (int i = 0; i < 4; i++) {
            __m512i v = _mm512_load_si512(line + 64 * i);

            words[2 * i] = _mm512_and_si512(v, nibble);
            words[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
        }
    else
        for (int i = 0; i < 8; i++)
            words[i] = _mm512_xor_si512(_mm512_load_si512(line + 64 * i), sign);
}

static inline size_t block_bytes(enum weight_type type)
{
    return type == WEIGHT_Q4 ? 4 * 64 : 8 * 64;
}

/* Two chains: one VPDPBUSD waits some four cycles for the one before. */
static inline __m512i dot_block(const __m512i *words, const int8_t *q, int32_t bias)
{
    __m512i even = _mm512_set1_epi32(bias), odd = _mm512_setzero_si512();

    for (int i = 0; i < 8; i += 2) {
        even = _mm512_dpbusd_epi32(even, words[i], broadcast_word(q + 4 * i));
        odd = _mm512_dpbusd_epi32(odd, words[i + 1], broadcast_word(q + 4 * i + 4));
    }
    return _mm512_add_epi32(even, odd);
}

static inline __m512 add_block(__m512i dot, __m512 d_w, float d_x, __m512 acc)
{
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(d_w, _mm512_set1_ps(d_x)), acc);
}

static inline __mmask16 outputs(uint32_t n_out)
{
    return (__mmask16)((1u << n_out) - 1);
}

static inline void stripe_rounded_one(enum weight_type type, const uint8_t *line,
                                      const uint16_t *scales, const struct activations *x,
                                      uint32_t row, float *y, uint32_t n_out)
{
    const int8_t *q = x->q + row * x->ld_q;
    const float *d = x->d + row * (x->ld_q / WEIGHT_BLOCK);
    const int32_t *sum = x->sum + row * (x->ld_q / WEIGHT_BLOCK);
    __m512 acc = _mm512_setzero_ps();

    prefetch(scales, PREFETCH_SCALES);
    for (uint32_t b = 0; b < x->k / WEIGHT_BLOCK; b++) {
        prefetch(line + PREFETCH_LINES, block_bytes(type));
        prefetch((const char *)scales + PREFETCH_SCALES, 1);

        __m512i words[8];

        load_block(type, line, words);
        acc = add_block(dot_block(words, q, -offset_of(type) * sum[b]), load_scales(scales), d[b],
                        acc);
        line += block_bytes(type);
        scales += WEIGHT_STRIPE;
        q += WEIGHT_BLOCK;
    }
    _mm512_mask_storeu_ps(y, outputs(n_out), acc);
}

static inline void stripe_rounded_many(enum weight_type type, const uint8_t *line,
                                       const uint16_t *scales, const struct packed_rows *p,
                                       uint32_t n_blocks, uint32_t n, float *y, size_t ld_y,
                                       uint32_t n_out)
{
    __m512 acc[PACK_ROWS];

    for (uint32_t i = 0; i < n; i++)
        acc[i] = _mm512_setzero_ps();
    prefetch(scales, PREFETCH_SCALES);
    for (uint32_t b = 0; b < n_blocks; b++) {
        prefetch(line + PREFETCH_LINES, block_bytes(type));
        prefetch((const char *)scales + PREFETCH_SCALES, 1);

        const int8_t *q = p->q + (size_t)b * PACK_ROWS * WEIGHT_BLOCK;
        const float *d = p->d + (size_t)b * PACK_ROWS;
        const int32_t *bias = p->bias + (size_t)b * PACK_ROWS;
        __m512 d_w = load_scales(scales);
        __m512i words[8];

        load_block(type, line, words);
        for (uint32_t i = 0; i < n; i++)
            acc[i] = add_block(dot_block(words, q + i * WEIGHT_BLOCK, bias[i]), d_w, d[i], acc[i]);
        line += block_bytes(type);
        scales += WEIGHT_STRIPE;
    }
    for (uint32_t i = 0; i < n; i++)
        _mm512_mask_storeu_ps(y + i * ld_y, outputs(n_out), acc[i]);
}

/*
 * Stripes first..last - 1, each against all rows. LAYOUT_ROWS, for several rows only: stripes are
 * made of its rows first, behind the packed activations in the scratch memory.
 */
static inline void stripes_rounded(enum weight_type type, enum weight_layout layout,
                                   const struct matmul_task *t, uint32_t first, uint32_t last,
                                   void *scratch)
{
    const struct weight *w = t->w;
    const struct activations *x = t->x;
    size_t stripe_bytes = weight_stripe_bytes(type, w->n_in);
    uint8_t *repacked = (uint8_t *)scratch + packed_bytes(w->n_in);

    for (uint32_t i = 0, n; i < x->n; i += n) {
        bool many = layout == LAYOUT_ROWS || x->n - i > 1;
        struct packed_rows p;

        n = MIN(x->n - i, (uint32_t)PACK_ROWS);
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
                stripe_rounded_many(type, stripe, stripe_scales(w, stripe), &p,
                                    w->n_in / WEIGHT_BLOCK, n, y, t->ld_y, n_out);
            else
                stripe_rounded_one(type, stripe, stripe_scales(w, stripe), x, i, y, n_out);
        }
    }
}

static void tile16_q4_rounded(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q4, LAYOUT_TILE16, args, first, last, scratch);
}

static void tile16_q8_rounded(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q8, LAYOUT_TILE16, args, first, last, scratch);
}

static void rows_q4_rounded(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q4, LAYOUT_ROWS, args, first, last, scratch);
}

static void rows_q8_rounded(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripes_rounded(WEIGHT_Q8, LAYOUT_ROWS, args, first, last, scratch);
}

/* Block b of a stripe as floats, without the scale: k = 32 b and following, n <= 32. */
static inline void unpack_stripe(enum weight_type type, const uint8_t *stripe, uint32_t b,
                                 uint32_t n, __m512 *v)
{
    const uint8_t *p = stripe;

    switch (type) {
    case WEIGHT_F32:
        p += (size_t)b * WEIGHT_BLOCK * 64;
        for (uint32_t k = 0; k < n; k++, p += 64)
            v[k] = _mm512_load_ps(p);
        break;
    case WEIGHT_F16:
    case WEIGHT_BF16:
        p += (size_t)b * WEIGHT_BLOCK / 2 * 64;
        for (uint32_t k = 0; k < n; k += 2, p += 64) {
            __m512i pair = _mm512_load_si512(p), high = _mm512_srli_epi32(pair, 16);

            if (type == WEIGHT_BF16) {
                v[k] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
                v[k + 1] = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
            } else {
                v[k] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pair));
                v[k + 1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(high));
            }
        }
        break;
    case WEIGHT_Q8:
        p += (size_t)b * 8 * 64;
        for (uint32_t k = 0; k < WEIGHT_BLOCK; k += 4, p += 64) {
            __m512i word = _mm512_load_si512(p);

            for (unsigned j = 0; j < 4; j++)
                v[k + j] =
                    _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 24 - 8 * j), 24));
        }
        break;
    case WEIGHT_Q4:
        p += (size_t)b * 4 * 64;
        for (uint32_t k = 0; k < WEIGHT_BLOCK; k += 8, p += 64) {
            __m512i word = _mm512_load_si512(p);

            for (unsigned j = 0; j < 8; j++) {
                __m512i q = _mm512_and_si512(_mm512_srli_epi32(word, j % 4 * 8 + j / 4 * 4),
                                             _mm512_set1_epi32(0xf));

                v[k + j] = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, _mm512_set1_epi32(8)));
            }
        }
        break;
    }
}

/* Adds one block to the accumulators of n_rows rows, a constant where this is used. */
static inline __attribute__((always_inline)) void dot_unpacked(bool scaled, const __m512 *v,
                                                               uint32_t n, const float *x,
                                                               size_t ld, uint32_t n_rows, __m512 d,
                                                               __m512 *acc)
{
    __m512 even[4], odd[4];
    uint32_t k = 0;

    for (uint32_t i = 0; i < n_rows; i++)
        even[i] = odd[i] = _mm512_setzero_ps();
    for (; k + 2 <= n; k += 2)
        for (uint32_t i = 0; i < n_rows; i++) {
            even[i] = _mm512_fmadd_ps(v[k], _mm512_set1_ps(x[i * ld + k]), even[i]);
            odd[i] = _mm512_fmadd_ps(v[k + 1], _mm512_set1_ps(x[i * ld + k + 1]), odd[i]);
        }
    for (uint32_t i = 0; i < n_rows; i++) {
        __m512 both;

        if (k < n)
            even[i] = _mm512_fmadd_ps(v[k], _mm512_set1_ps(x[i * ld + k]), even[i]);
        both = _mm512_add_ps(even[i], odd[i]);
        acc[i] = scaled ? _mm512_fmadd_ps(d, both, acc[i]) : _mm512_add_ps(acc[i], both);
    }
}

static inline void tile16_f32(enum weight_type type, const struct matmul_task *t, uint32_t first,
                              uint32_t last)
{
    const struct weight *w = t->w;
    const struct activations *x = t->x;
    bool scaled = type == WEIGHT_Q4 || type == WEIGHT_Q8;
    size_t stripe_bytes = weight_stripe_bytes(type, w->n_in);
    __m512 v[WEIGHT_BLOCK], acc[F32_ROWS], d = _mm512_setzero_ps();

    for (uint32_t s = first; s < last; s++) {
        const uint8_t *stripe = (const uint8_t *)w->data + s * stripe_bytes;
        const uint16_t *scales = stripe_scales(w, stripe);
        uint32_t o = s * WEIGHT_STRIPE, n_out = MIN(w->n_out - o, (uint32_t)WEIGHT_STRIPE);

        for (uint32_t i = 0, n_rows; i < x->n; i += n_rows) {
            const float *f = x->f32 + i * x->ld;

            n_rows = MIN(x->n - i, (uint32_t)F32_ROWS);
            for (uint32_t r = 0; r < n_rows; r++)
                acc[r] = _mm512_setzero_ps();
            for (uint32_t k = 0, b = 0, n; k < w->n_in; k += n, b++) {
                uint32_t r = 0;

                n = MIN(w->n_in - k, (uint32_t)WEIGHT_BLOCK);
                unpack_stripe(type, stripe, b, n, v);
                if (scaled)
                    d = load_scales(scales + b * WEIGHT_STRIPE);
                for (; r + 4 <= n_rows; r += 4)
                    dot_unpacked(scaled, v, n, f + r * x->ld + k, x->ld, 4, d, acc + r);
                for (; r < n_rows; r++)
                    dot_unpacked(scaled, v, n, f + r * x->ld + k, x->ld, 1, d, acc + r);
            }
            for (uint32_t r = 0; r < n_rows; r++)
                _mm512_mask_storeu_ps(t->y + (i + r) * t->ld_y + o, outputs(n_out), acc[r]);
        }
    }
}

static void tile16_f32_any(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct matmul_task *t = args;

    (void)scratch;
    switch (t->w->type) { /* one copy of the loops for each type */
    case WEIGHT_F32:
        tile16_f32(WEIGHT_F32, t, first, last);
        break;
    case WEIGHT_F16:
        tile16_f32(WEIGHT_F16, t, first, last);
        break;
    case WEIGHT_BF16:
        tile16_f32(WEIGHT_BF16, t, first, last);
        break;
    case WEIGHT_Q8:
        tile16_f32(WEIGHT_Q8, t, first, last);
        break;
    case WEIGHT_Q4:
        tile16_f32(WEIGHT_Q4, t, first, last);
        break;
    }
}

static void avx512_matmul(struct backend *b, const struct weight *w, const struct activations *x,
                          float *y, size_t ld_y)
{
    struct cpu_backend *c = cpu_backend(b);
    struct matmul_task t = {w, x, y, ld_y};
    bool rounded = is_coarse(&t), q4 = w->type == WEIGHT_Q4;
    cpu_body body = NULL;

    if (w->layout == LAYOUT_TILE16)
        body = !rounded ? tile16_f32_any : q4 ? tile16_q4_rounded : tile16_q8_rounded;
    else if (w->layout == LAYOUT_ROWS && rounded && x->n >= REPACK_MIN)
        body = q4 ? rows_q4_rounded : rows_q8_rounded;
    if (!body) {
        c->lower_matmul(b, w, x, y, ld_y);
        return;
    }
    assert(x->k == w->n_in && w->n_in <= c->limits.max_width);
    cpu_parallel(c, DIV_ROUND_UP(w->n_out, WEIGHT_STRIPE), (size_t)w->n_in * x->n, body, &t);
}

void cpu_use_avx512(struct cpu_backend *c)
{
    c->lower_matmul = c->ops.matmul;
    c->ops.matmul = avx512_matmul;
    c->ops.attention = cpu_avx512_attention;
    c->ops.sparse_ffn = cpu_avx512_sparse_ffn;
}
