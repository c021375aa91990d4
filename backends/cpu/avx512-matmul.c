/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Matrix products with AVX-512 (F, BW, DQ, VL, VNNI): of LAYOUT_TILE16, whose 16 outputs fill a
 * register, and of LAYOUT_ROWS by way of it; everything else stays with AVX2.
 *
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

/* Rows of rounded activations worked on together, at most and at best. */
#define ROWS 8
#define ROWS_BEST 6

/* Of at most eight. clang 14 takes a number as it stands, and a loop of six is not unrolled. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

static inline __m512 load_scales(const uint16_t *d)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)d));
}

static inline __m512i broadcast_word(const void *q)
{
    int32_t v;

    memcpy(&v, q, 4);
    return _mm512_set1_epi32(v);
}

static inline size_t block_bytes(enum weight_type type)
{
    return type == WEIGHT_Q4 ? 4 * 64 : 8 * 64;
}

static inline __m512 add_block(__m512i dot, __m512 d_w, __m512 d_x, __m512 acc)
{
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(d_w, d_x), acc);
}

static inline __mmask16 outputs(uint32_t n_out)
{
    return (__mmask16)((1u << n_out) - 1);
}

/* Rows first..first + n - 1 of a product, and n_blocks blocks of them from block on. */
struct chunk {
    struct matmul_task t;
    uint32_t first, n, n_groups, block, n_blocks;
    bool fine;
    char *panels;
};

static inline uint32_t group_start(const struct chunk *c, uint32_t group)
{
    return (uint32_t)((uint64_t)c->n * group / c->n_groups);
}

static inline char *group_panels(const struct chunk *c, uint32_t group)
{
    return c->panels + group_start(c, group) * panel_bytes(c->fine, 1) * c->n_blocks;
}

static void pack_groups(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct chunk *c = args;
    const struct activations *x = c->t.x;
    int32_t offset = c->t.w->type == WEIGHT_Q4 ? 8 : 128;
    size_t ld_d = x->ld_q / WEIGHT_BLOCK;

    (void)scratch;
    for (uint32_t group = first; group < last; group++) {
        uint32_t start = group_start(c, group), n = group_start(c, group + 1) - start;
        size_t bytes = panel_bytes(c->fine, n), d_at = bytes - n * (size_t)8;

        for (uint32_t i = 0; i < n; i++) {
            size_t row = c->first + start + i;
            const int8_t *q = x->q + row * x->ld_q;
            const int8_t *low = c->fine ? x->q_low + row * x->ld_q : NULL;
            char *to = group_panels(c, group);

            for (size_t b = c->block; b < c->block + c->n_blocks; b++, to += bytes) {
                int32_t sum = x->sum[row * ld_d + b];

                memcpy(to + i * WEIGHT_BLOCK, q + b * WEIGHT_BLOCK, WEIGHT_BLOCK);
                if (c->fine) {
                    memcpy(to + (n + i) * WEIGHT_BLOCK, low + b * WEIGHT_BLOCK, WEIGHT_BLOCK);
                    sum = FINE * sum + x->sum_low[row * ld_d + b];
                }
                sum *= -offset;
                memcpy(to + d_at + i * 4, x->d + row * ld_d + b, 4);
                memcpy(to + d_at + (n + i) * 4, &sum, 4);
            }
        }
    }
}

/* Two stripes, so that a broadcast activation is used twice: loads would be the limit otherwise. */
struct stripe_pair {
    const uint8_t *line[2];
    const uint16_t *scales[2];
    const uint8_t *next_line[2]; /* where the next pair is, to be fetched ahead at this one's end */
    const uint16_t *next_scales[2];
    uint32_t n_blocks, n_out[2];
    bool more; /* the sums so far are in y */
};

/* 64 bytes of a stripe that meet word i of the activations, k = 4 i..4 i + 3. */
static inline __m512i unpack_word(enum weight_type type, const uint8_t *line, uint32_t i)
{
    if (type == WEIGHT_Q4) {
        __m512i v = _mm512_load_si512(line + i / 2 * 64);

        return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(0xf));
    }
    return _mm512_xor_si512(_mm512_load_si512(line + i * 64), _mm512_set1_epi8((char)0x80));
}

static inline __m512i times_254(__m512i v)
{
    return _mm512_sub_epi32(_mm512_slli_epi32(v, 8), _mm512_slli_epi32(v, 1));
}

/* Adds one block's products of n rows with both stripes; q: [n][32]. */
static inline __attribute__((always_inline)) void dot_block(enum weight_type type, uint32_t n,
                                                            const uint8_t *line0,
                                                            const uint8_t *line1, const char *q,
                                                            __m512i (*dot)[2])
{
    UNROLL
    for (uint32_t word = 0; word < 8; word++) {
        __m512i w0 = unpack_word(type, line0, word), w1 = unpack_word(type, line1, word);

        UNROLL
        for (uint32_t i = 0; i < n; i++) {
            __m512i v = broadcast_word(q + i * WEIGHT_BLOCK + 4 * word);

            dot[i][0] = _mm512_dpbusd_epi32(dot[i][0], w0, v);
            dot[i][1] = _mm512_dpbusd_epi32(dot[i][1], w1, v);
        }
    }
}

/* A group of n rows, a constant where this is used, against a pair of stripes. */
static inline __attribute__((always_inline)) void
pair_rounded(enum weight_type type, bool fine, uint32_t n, const struct stripe_pair *s,
             const char *panel, float *y, size_t ld_y)
{
    const uint8_t *line0 = s->line[0], *line1 = s->line[1];
    const uint16_t *scales0 = s->scales[0], *scales1 = s->scales[1];
    const uint8_t *ahead0 = line0 + PREFETCH_LINES, *ahead1 = line1 + PREFETCH_LINES;
    const char *scales_ahead0 = (const char *)scales0 + PREFETCH_SCALES;
    const char *scales_ahead1 = (const char *)scales1 + PREFETCH_SCALES;
    __m512 acc[ROWS][2];

    UNROLL
    for (uint32_t i = 0; i < n; i++)
        for (int half = 0; half < 2; half++)
            acc[i][half] = s->more ? _mm512_maskz_loadu_ps(outputs(s->n_out[half]),
                                                           y + i * ld_y + half * WEIGHT_STRIPE)
                                   : _mm512_setzero_ps();
    for (uint32_t b = s->n_blocks; b > 0; b--) {
        const char *d = panel + n * (fine ? 2 : 1) * WEIGHT_BLOCK, *bias = d + n * 4;
        __m512i dot[ROWS][2];
        __m512 d_w0, d_w1;

        if (b == PREFETCH_LINES / block_bytes(type)) {
            ahead0 = s->next_line[0];
            ahead1 = s->next_line[1];
        }
        if (b == PREFETCH_SCALES / (2 * WEIGHT_STRIPE)) {
            scales_ahead0 = (const char *)s->next_scales[0];
            scales_ahead1 = (const char *)s->next_scales[1];
        }
        prefetch(ahead0, block_bytes(type));
        prefetch(ahead1, block_bytes(type));
        prefetch(scales_ahead0, 1);
        prefetch(scales_ahead1, 1);
        UNROLL
        for (uint32_t i = 0; i < n; i++)
            dot[i][0] = dot[i][1] = fine ? _mm512_setzero_si512() : broadcast_word(bias + i * 4);
        dot_block(type, n, line0, line1, panel, dot);
        if (fine) {
            UNROLL
            for (uint32_t i = 0; i < n; i++)
                for (int half = 0; half < 2; half++)
                    dot[i][half] =
                        _mm512_add_epi32(times_254(dot[i][half]), broadcast_word(bias + i * 4));
            dot_block(type, n, line0, line1, panel + n * WEIGHT_BLOCK, dot);
        }
        d_w0 = load_scales(scales0);
        d_w1 = load_scales(scales1);
        if (fine) {
            d_w0 = _mm512_mul_ps(d_w0, _mm512_set1_ps(FINE_SCALE));
            d_w1 = _mm512_mul_ps(d_w1, _mm512_set1_ps(FINE_SCALE));
        }
        UNROLL
        for (uint32_t i = 0; i < n; i++) {
            __m512 d_x = _mm512_castsi512_ps(broadcast_word(d + i * 4));

            acc[i][0] = add_block(dot[i][0], d_w0, d_x, acc[i][0]);
            acc[i][1] = add_block(dot[i][1], d_w1, d_x, acc[i][1]);
        }
        line0 += block_bytes(type);
        line1 += block_bytes(type);
        scales0 += WEIGHT_STRIPE;
        scales1 += WEIGHT_STRIPE;
        ahead0 += block_bytes(type);
        ahead1 += block_bytes(type);
        scales_ahead0 += 2 * WEIGHT_STRIPE;
        scales_ahead1 += 2 * WEIGHT_STRIPE;
        panel += panel_bytes(fine, n);
    }
    UNROLL
    for (uint32_t i = 0; i < n; i++) {
        _mm512_mask_storeu_ps(y + i * ld_y, outputs(s->n_out[0]), acc[i][0]);
        _mm512_mask_storeu_ps(y + i * ld_y + WEIGHT_STRIPE, outputs(s->n_out[1]), acc[i][1]);
    }
}

/* A group of any size against a pair of stripes. */
typedef void (*pair_kernel)(uint32_t n, const struct stripe_pair *s, const char *panel, float *y,
                            size_t ld_y);

#define PAIR_KERNEL(name, type, fine)                                                      \
    static void name(uint32_t n, const struct stripe_pair *s, const char *panel, float *y, \
                     size_t ld_y)                                                          \
    {                                                                                      \
        switch (n) {                                                                       \
        case 1:                                                                            \
            pair_rounded(type, fine, 1, s, panel, y, ld_y);                                \
            break;                                                                         \
        case 2:                                                                            \
            pair_rounded(type, fine, 2, s, panel, y, ld_y);                                \
            break;                                                                         \
        case 3:                                                                            \
            pair_rounded(type, fine, 3, s, panel, y, ld_y);                                \
            break;                                                                         \
        case 4:                                                                            \
            pair_rounded(type, fine, 4, s, panel, y, ld_y);                                \
            break;                                                                         \
        case 5:                                                                            \
            pair_rounded(type, fine, 5, s, panel, y, ld_y);                                \
            break;                                                                         \
        case 6:                                                                            \
            pair_rounded(type, fine, 6, s, panel, y, ld_y);                                \
            break;                                                                         \
        case 7:                                                                            \
            pair_rounded(type, fine, 7, s, panel, y, ld_y);                                \
            break;                                                                         \
        default:                                                                           \
            pair_rounded(type, fine, ROWS, s, panel, y, ld_y);                             \
            break;                                                                         \
        }                                                                                  \
    }
PAIR_KERNEL(pair_q4_coarse, WEIGHT_Q4, false)
PAIR_KERNEL(pair_q4_fine, WEIGHT_Q4, true)
PAIR_KERNEL(pair_q8_coarse, WEIGHT_Q8, false)
PAIR_KERNEL(pair_q8_fine, WEIGHT_Q8, true)

/*
 * Pairs of stripes first..last - 1, each against all rows of the chunk. LAYOUT_ROWS, for several
 * rows only: stripes are made of its rows first, in the scratch memory.
 */
static void pairs_rounded(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct chunk *c = args;
    const struct weight *w = c->t.w;
    bool q4 = w->type == WEIGHT_Q4;
    size_t stripe_bytes = weight_stripe_bytes(w->type, w->n_in);
    pair_kernel kernel = c->fine ? q4 ? pair_q4_fine : pair_q8_fine
                         : q4    ? pair_q4_coarse
                                 : pair_q8_coarse;

    for (uint32_t pair = first; pair < last; pair++) {
        struct stripe_pair s = {.n_blocks = c->n_blocks, .more = c->block > 0};
        uint32_t o = pair * 2 * WEIGHT_STRIPE;

        for (uint32_t half = 0; half < 2; half++) {
            uint32_t at = o + half * WEIGHT_STRIPE;
            const uint8_t *stripe;

            s.n_out[half] = at < w->n_out ? MIN(w->n_out - at, (uint32_t)WEIGHT_STRIPE) : 0;
            if (!s.n_out[half]) /* an odd end: the same stripe again, for nothing */
                at = o;
            stripe = (const uint8_t *)w->data +
                     at / WEIGHT_STRIPE * weight_stripe_bytes(w->type, w->n_in);
            if (w->layout == LAYOUT_ROWS) {
                uint8_t *to = (uint8_t *)scratch + half * stripe_scratch(w->n_in);

                repack_stripe(w->type, w, at, MIN(w->n_out - at, (uint32_t)WEIGHT_STRIPE), to);
                stripe = to;
            }
            s.line[half] = stripe + c->block * block_bytes(w->type);
            s.scales[half] = stripe_scales(w, stripe) + c->block * WEIGHT_STRIPE;
            s.next_line[half] = s.line[half] + 2 * stripe_bytes;
            s.next_scales[half] =
                (const uint16_t *)((const uint8_t *)s.scales[half] + 2 * stripe_bytes);
            if (pair == first) {
                prefetch(s.line[half], PREFETCH_LINES);
                prefetch(s.scales[half], PREFETCH_SCALES);
            }
        }
        for (uint32_t group = 0; group < c->n_groups; group++) {
            uint32_t start = group_start(c, group), n = group_start(c, group + 1) - start;

            kernel(n, &s, group_panels(c, group), c->t.y + (c->first + start) * c->t.ld_y + o,
                   c->t.ld_y);
        }
    }
}

/*
 * With few rows one pass over the weights matters most. With many, groups are of six rows, whose
 * sums fit the registers, and of long rows only a part is in panels at a time, so that a pair of
 * stripes stays in a cache close by until all groups have met it.
 */
static void matmul_rounded(struct cpu_backend *c, const struct matmul_task *t)
{
    const struct weight *w = t->w;
    uint32_t n = t->x->n, blocks = w->n_in / WEIGHT_BLOCK;
    bool few = n <= CHUNK_ROWS_MIN;
    uint32_t most_blocks = few ? blocks : MIN(blocks, (uint32_t)CHUNK_BLOCKS);
    uint32_t most = few ? n : CHUNK_BYTES / WEIGHT_BLOCK / most_blocks;
    struct chunk chunk = {.t = *t, .fine = !is_coarse(t), .panels = cpu_shared(c)};

    for (uint32_t i = 0; i < n; i += chunk.n) {
        chunk.first = i;
        chunk.n = DIV_ROUND_UP(n - i, DIV_ROUND_UP(n - i, most)); /* all of about one size */
        chunk.n_groups = DIV_ROUND_UP(chunk.n, few ? (uint32_t)ROWS : ROWS_BEST);
        for (chunk.block = 0; chunk.block < blocks; chunk.block += chunk.n_blocks) {
            size_t k;

            chunk.n_blocks = MIN(blocks - chunk.block, most_blocks);
            k = (size_t)chunk.n_blocks * WEIGHT_BLOCK;
            cpu_parallel(c, chunk.n_groups, k * ROWS / 8, pack_groups, &chunk);
            cpu_parallel(c, DIV_ROUND_UP(w->n_out, 2 * WEIGHT_STRIPE), k * chunk.n * 2,
                         pairs_rounded, &chunk);
        }
    }
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
    WITH_WEIGHT_TYPE(t->w->type, tile16_f32, t, first, last);
}

void cpu_avx512_matmul(struct backend *b, const struct weight *w, const struct activations *x,
                       float *y, size_t ld_y)
{
    struct cpu_backend *c = cpu_backend(b);
    struct matmul_task t = {w, x, y, ld_y};
    bool rounded = x->q && weight_type_is_quantized(w->type);

    assert(x->k == w->n_in && w->n_in <= c->limits.max_width);
    if (rounded && (w->layout == LAYOUT_TILE16 || (w->layout == LAYOUT_ROWS && is_coarse(&t))))
        matmul_rounded(c, &t);
    else if (w->layout == LAYOUT_TILE16)
        cpu_parallel(c, DIV_ROUND_UP(w->n_out, WEIGHT_STRIPE), (size_t)w->n_in * x->n,
                     tile16_f32_any, &t);
    else
        c->lower_matmul(b, w, x, y, ld_y);
}
