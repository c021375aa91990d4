/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The AMX level: products of LAYOUT_TILE16, q4 and q8, with several rounded rows. Everything else,
 * and few rows, stays with AVX-512.
 *
 * A tile product multiplies 16 rows by 16 outputs over one block of 32, since every block has
 * scales of its own: its sums, exact integers, go through memory and are scaled and added up by
 * AVX-512 in the order of avx512's kernels, so that both levels give the same bits and a row's
 * result does not depend on which of them met it.
 *
 * What that costs, for 16 x 16 outputs and a block: the tile unit is busy for 16 cycles (it would
 * take the double length in the same time), the vector unit with 16 x (convert, multiply, fused
 * multiply-add) on two ports for 24, the two load ports for 23 as arranged here: two stripes share
 * the activations' tile, and eight rows of both the broadcast of a row's scale. So vectors are the
 * limit, two thirds of what bf16 tiles could do or a third of int8's, if tiles work at the same
 * time. That is why the tiles run one group of blocks ahead, their instructions strewn among the
 * vectors': one waits some 100 cycles from its loads to its sums in memory.
 *
 * Blocking: up to BATCH rows are rearranged once for all threads. A thread takes SPAN of k of them
 * (512 KiB, second-level cache) through its stripes, two at a time, whose weights are unpacked by
 * CHUNK of k (16 KiB, first level) and meet all rows there.
 */

#include <assert.h>
#include <string.h>

#include <immintrin.h>

#include "backends/cpu/amx-tile.h"
#include "backends/cpu/amx.h"
#include "backends/cpu/cpu.h"
#include "backends/cpu/matmul.h"
#include "base/checked.h"

/* Fewer rows are faster with AVX-512, whose work is proportional to them; a tile's is not. */
#define LEAST_ROWS 6

#define BATCH 256 /* rows */
#define SPAN 64   /* blocks */
#define CHUNK 16  /* blocks */
#define GROUP 4   /* blocks whose sums are in memory at a time; half of it when fine; even */

#define BLOCK_BYTES ((size_t)WEIGHT_BLOCK * WEIGHT_STRIPE)
#define PART 8 /* rows whose sums of both stripes fill 16 registers */

/* Tiles. Macros, since their numbers become part of an instruction. */
#define SUMS0 0 /* of the first stripe */
#define SUMS1 1 /* of the second */
#define ROWS 2
#define WEIGHTS0 3
#define WEIGHTS1 4
#define ROWS_LOW 5
#define LOW0 6 /* sums of the low plane */
#define LOW1 7

/* Rearranged activations: tiles of 16 rows, whose blocks follow one another. */
struct tiled_rows {
    int8_t *q, *q_low; /* [n_tiles][n_blocks][16][32]; NULL for coarse activations */
    float *d;          /* [n_tiles][n_blocks][16]; 0 for rows that there are not */
};

struct amx_task {
    struct matmul_task m;
    uint32_t row, n; /* of this batch */
    struct tiled_rows rows;
};

/* A thread's scratch memory. */
struct workspace {
    _Alignas(64) int8_t weights[2][CHUNK * WEIGHT_BLOCK * WEIGHT_STRIPE]; /* by stripe */
    _Alignas(64) float scales[CHUNK][2][WEIGHT_STRIPE];
    /* even and odd groups; with two planes the low one's half a group behind the other's */
    _Alignas(64) int32_t sums[2][GROUP][2][TILE_ROWS * WEIGHT_STRIPE];
    _Alignas(64) float y[BATCH][2][WEIGHT_STRIPE];
};

/* Activations */

static size_t tiled_bytes(uint32_t n_rows, uint32_t n_blocks)
{
    return ALIGN_UP((size_t)n_rows, (size_t)TILE_ROWS) * n_blocks * (2 * WEIGHT_BLOCK + 4);
}

static struct tiled_rows tiled_rows(void *memory, uint32_t n_rows, uint32_t n_blocks, bool fine)
{
    size_t plane = ALIGN_UP((size_t)n_rows, (size_t)TILE_ROWS) * n_blocks * WEIGHT_BLOCK;
    struct tiled_rows t = {.q = memory};

    if (fine)
        t.q_low = t.q + plane;
    t.d = (float *)(t.q + 2 * plane);
    return t;
}

/* Items are the CHUNKs of all tiles of rows. */
static void rearrange(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct amx_task *t = args;
    const struct activations *x = t->m.x;
    uint32_t n_blocks = x->k / WEIGHT_BLOCK, n_chunks = DIV_ROUND_UP(n_blocks, (uint32_t)CHUNK);
    size_t ld_d = x->ld_q / WEIGHT_BLOCK;

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        uint32_t tile = item / n_chunks, from = item % n_chunks * CHUNK;
        uint32_t to = MIN(from + CHUNK, n_blocks);
        uint32_t row = t->row + tile * TILE_ROWS, n = MIN(t->n - tile * TILE_ROWS, (uint32_t)16);

        for (uint32_t i = 0; i < TILE_ROWS; i++) {
            size_t at = (size_t)tile * n_blocks * TILE_ROWS + i;

            for (uint32_t b = from; b < to; b++) {
                size_t to_q = (at + (size_t)b * TILE_ROWS) * WEIGHT_BLOCK;
                size_t from_q = (row + i) * x->ld_q + (size_t)b * WEIGHT_BLOCK;
                float *d = t->rows.d + at + (size_t)b * TILE_ROWS;

                if (i >= n) {
                    memset(t->rows.q + to_q, 0, WEIGHT_BLOCK);
                    if (t->rows.q_low)
                        memset(t->rows.q_low + to_q, 0, WEIGHT_BLOCK);
                    *d = 0;
                    continue;
                }
                memcpy(t->rows.q + to_q, x->q + from_q, WEIGHT_BLOCK);
                if (t->rows.q_low)
                    memcpy(t->rows.q_low + to_q, x->q_low + from_q, WEIGHT_BLOCK);
                *d = x->d[(row + i) * ld_d + b];
            }
        }
    }
}

/* Weights */

/* n blocks of a q4 stripe as bytes, the lines of B tiles. A nibble's value less 8 is its lower
 * three bits and the inverse of the fourth in all others: one affine map over bits. */
static void unpack_q4(const uint8_t *lines, uint32_t n, int8_t *to)
{
    const __m512i low = _mm512_set1_epi64(0x0102040808080808);
    const __m512i high = _mm512_set1_epi64(0x1020408080808080);

    for (uint32_t i = 0; i < n * 4; i++, lines += 64, to += 128) {
        __m512i v = _mm512_load_si512(lines);

        prefetch(lines + PREFETCH_LINES, 1);
        _mm512_store_si512(to, _mm512_gf2p8affine_epi64_epi8(v, low, 0xf8));
        _mm512_store_si512(to + 64, _mm512_gf2p8affine_epi64_epi8(v, high, 0xf8));
    }
}

/* The weights of blocks from..from + n - 1 of a stripe as B tiles. */
static inline const int8_t *weight_tiles(bool fine, const struct weight *w, const uint8_t *stripe,
                                         uint32_t from, uint32_t n, struct workspace *work,
                                         int side)
{
    const uint16_t *scales = stripe_scales(w, stripe) + (size_t)from * WEIGHT_STRIPE;

    prefetch(scales + (size_t)CHUNK * WEIGHT_STRIPE, (size_t)CHUNK * WEIGHT_STRIPE * 2);
    for (uint32_t b = 0; b < n; b++, scales += WEIGHT_STRIPE) {
        __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));

        _mm512_store_ps(work->scales[b][side],
                        fine ? _mm512_mul_ps(d, _mm512_set1_ps(FINE_SCALE)) : d);
    }
    if (w->type == WEIGHT_Q8)
        return (const int8_t *)stripe + from * BLOCK_BYTES; /* as they are */
    unpack_q4(stripe + from * BLOCK_BYTES / 2, n, work->weights[side]);
    return work->weights[side];
}

/* Products */

/* One group of blocks of one tile of rows. */
struct step {
    uint32_t tile;
    uint32_t first, n; /* blocks, counted from the chunk's first */
    uint32_t buffer;   /* of sums */
};

/* One chunk of two stripes. */
struct chunk {
    const struct amx_task *task;
    const int8_t *q, *q_low, *weights[2];
    const float *d;
    size_t q_tile, d_tile; /* distances of tiles of rows, in elements */
    uint32_t n_blocks;
    struct workspace *work;
};

static inline uint32_t group_blocks(bool fine)
{
    return fine ? GROUP / 2 : GROUP;
}

/* Sums of one block and one stripe. fine and side are constants where this is used. */
static inline __attribute__((always_inline)) void
tile_sums(bool fine, const struct chunk *c, const struct step *s, uint32_t block, int side)
{
    const int8_t *weights = c->weights[side] + (s->first + block) * BLOCK_BYTES;
    size_t rows = s->tile * c->q_tile + (s->first + block) * BLOCK_BYTES;
    int32_t *sums = c->work->sums[s->buffer][block][side];
    int32_t *low = fine ? c->work->sums[s->buffer][GROUP / 2 + block][side] : NULL;

    if (side == 0) {
        tile_load(ROWS, c->q + rows, WEIGHT_BLOCK);
        if (fine)
            tile_load(ROWS_LOW, c->q_low + rows, WEIGHT_BLOCK);
        tile_load(WEIGHTS0, weights, 64);
        tile_zero(SUMS0);
        tile_dot_int8(SUMS0, ROWS, WEIGHTS0);
        tile_store(SUMS0, sums, 64);
        if (fine) {
            tile_zero(LOW0);
            tile_dot_int8(LOW0, ROWS_LOW, WEIGHTS0);
            tile_store(LOW0, low, 64);
        }
    } else {
        tile_load(WEIGHTS1, weights, 64);
        tile_zero(SUMS1);
        tile_dot_int8(SUMS1, ROWS, WEIGHTS1);
        tile_store(SUMS1, sums, 64);
        if (fine) {
            tile_zero(LOW1);
            tile_dot_int8(LOW1, ROWS_LOW, WEIGHTS1);
            tile_store(LOW1, low, 64);
        }
    }
}

/* A row of sums as floats. With two planes the multiply-add rounds 254 times the one plus the other
 * just as the conversion of that integer would: both are exact floats, below 2^24. */
static inline __attribute__((always_inline)) __m512 load_sums(bool fine, const int32_t *sums)
{
    const int32_t *low = sums + GROUP / 2 * 2 * TILE_ROWS * WEIGHT_STRIPE;
    __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(sums));

    return fine ? _mm512_fmadd_ps(v, _mm512_set1_ps(FINE),
                                  _mm512_cvtepi32_ps(_mm512_load_si512(low)))
                : v;
}

/* Row after row: clang 14 would work out the products of all, and have no registers left for them.
 */
#define KEEP(left, right) __asm__ volatile("" : "+v"(left), "+v"(right)::"memory");

#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/*
 * Scales and adds PART rows of step s from row on, while the tiles work on slots first_slot and
 * following of the step after it, as many as a part has: slot i is stripe i % 2 of block i / 2.
 */
static inline __attribute__((always_inline)) void add_sums(bool fine, const struct chunk *c,
                                                           const struct step *s, uint32_t row,
                                                           const struct step *next,
                                                           uint32_t first_slot)
{
    float(*y)[2][WEIGHT_STRIPE] = c->work->y + s->tile * TILE_ROWS + row;
    const float *d = c->d + s->tile * c->d_tile + (size_t)s->first * TILE_ROWS + row;

#define LOAD(i) __m512 left##i = _mm512_load_ps(y[i][0]), right##i = _mm512_load_ps(y[i][1]);
#define ADD(i)                                                                                    \
    {                                                                                             \
        const int32_t *left_sums = sums + (i)*WEIGHT_STRIPE;                                      \
        const int32_t *right_sums = left_sums + TILE_ROWS * WEIGHT_STRIPE;                        \
        __m512 d_x = _mm512_set1_ps(d[i]);                                                        \
                                                                                                  \
        left##i =                                                                                 \
            _mm512_fmadd_ps(load_sums(fine, left_sums), _mm512_mul_ps(scale_left, d_x), left##i); \
        right##i = _mm512_fmadd_ps(load_sums(fine, right_sums), _mm512_mul_ps(scale_right, d_x),  \
                                   right##i);                                                     \
        KEEP(left##i, right##i)                                                                   \
    }
#define STORE(i)                       \
    _mm512_store_ps(y[i][0], left##i); \
    _mm512_store_ps(y[i][1], right##i);

    EACH_ROW(LOAD)
#pragma GCC unroll 4
    for (uint32_t i = 0; i < group_blocks(fine); i++) {
        if ((first_slot + i) / 2 < next->n)
            tile_sums(fine, c, next, (first_slot + i) / 2, i & 1);
        if (i < s->n) {
            const int32_t *sums = c->work->sums[s->buffer][i][0] + row * WEIGHT_STRIPE;
            const float *scales = c->work->scales[s->first + i][0];
            __m512 scale_left = _mm512_load_ps(scales);
            __m512 scale_right = _mm512_load_ps(scales + WEIGHT_STRIPE);

            EACH_ROW(ADD)
            d += TILE_ROWS;
        }
    }
    EACH_ROW(STORE)
#undef LOAD
#undef ADD
#undef STORE
}

/* All rows of the batch with one chunk of two stripes: work->y += products. */
static inline __attribute__((always_inline)) void run_chunk(bool fine, const struct chunk *c)
{
    uint32_t n_rows = c->task->n, group = group_blocks(fine);
    struct step s = {.n = MIN(c->n_blocks, group)};

    for (uint32_t b = 0; b < s.n; b++) {
        tile_sums(fine, c, &s, b, 0);
        tile_sums(fine, c, &s, b, 1);
    }
    while (s.n) {
        struct step next = {s.tile, s.first + s.n, 0, s.buffer ^ 1};

        if (next.first == c->n_blocks) {
            next.first = 0;
            next.tile++;
        }
        if (next.tile * TILE_ROWS < n_rows)
            next.n = MIN(c->n_blocks - next.first, group);
        add_sums(fine, c, &s, 0, &next, 0);
        if (s.tile * TILE_ROWS + PART < n_rows)
            add_sums(fine, c, &s, PART, &next, group);
        else
            for (uint32_t b = group / 2; b < next.n; b++) {
                tile_sums(fine, c, &next, b, 0);
                tile_sums(fine, c, &next, b, 1);
            }
        s = next;
    }
}

static __mmask16 outputs(const struct weight *w, uint32_t stripe)
{
    uint32_t at = stripe * WEIGHT_STRIPE;

    return at + WEIGHT_STRIPE <= w->n_out ? (__mmask16)0xffff
           : at < w->n_out                ? (__mmask16)((1u << (w->n_out - at)) - 1)
                                          : (__mmask16)0;
}

/* Items are pairs of stripes; an odd last one is taken twice and kept once. */
static inline __attribute__((always_inline)) void
stripe_pairs(bool fine, const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct amx_task *t = args;
    const struct weight *w = t->m.w;
    uint32_t n_blocks = w->n_in / WEIGHT_BLOCK, n_stripes = DIV_ROUND_UP(w->n_out, WEIGHT_STRIPE);
    size_t stripe_bytes = weight_stripe_bytes(w->type, w->n_in);
    struct workspace *work = scratch;
    struct tile_config config = {.palette = 1};
    struct chunk c = {
        .task = t,
        .q_tile = n_blocks * BLOCK_BYTES,
        .d_tile = (size_t)n_blocks * TILE_ROWS,
        .work = work,
    };

    for (int i = 0; i < 8; i++) { /* sums, but for these: */
        config.rows[i] = (uint8_t)MIN(t->n, (uint32_t)TILE_ROWS);
        config.row_bytes[i] = WEIGHT_STRIPE * 4;
    }
    config.row_bytes[ROWS] = config.row_bytes[ROWS_LOW] = WEIGHT_BLOCK;
    config.rows[WEIGHTS0] = config.rows[WEIGHTS1] = WEIGHT_BLOCK / 4;
    tile_configure(&config);
    for (uint32_t span = 0; span < n_blocks; span += SPAN)
        for (uint32_t pair = first; pair < last; pair++) {
            uint32_t stripe = pair * 2, end = MIN(span + SPAN, n_blocks);
            const uint8_t *left = (const uint8_t *)w->data + stripe * stripe_bytes;
            const uint8_t *right = stripe + 1 < n_stripes ? left + stripe_bytes : left;
            __mmask16 keep[2] = {outputs(w, stripe), outputs(w, stripe + 1)};
            float *y = t->m.y + t->row * t->m.ld_y + (size_t)stripe * WEIGHT_STRIPE;

            for (uint32_t i = 0; i < ALIGN_UP(t->n, (uint32_t)TILE_ROWS); i++)
                for (int side = 0; side < 2; side++) {
                    __m512 v = _mm512_setzero_ps();

                    if (span && i < t->n)
                        v = _mm512_maskz_loadu_ps(keep[side],
                                                  y + i * t->m.ld_y + side * WEIGHT_STRIPE);
                    _mm512_store_ps(work->y[i][side], v);
                }
            for (uint32_t from = span; from < end; from += CHUNK) {
                c.n_blocks = MIN(end - from, (uint32_t)CHUNK);
                c.weights[0] = weight_tiles(fine, w, left, from, c.n_blocks, work, 0);
                c.weights[1] = weight_tiles(fine, w, right, from, c.n_blocks, work, 1);
                c.q = t->rows.q + from * BLOCK_BYTES;
                if (fine)
                    c.q_low = t->rows.q_low + from * BLOCK_BYTES;
                c.d = t->rows.d + (size_t)from * TILE_ROWS;
                run_chunk(fine, &c);
            }
            for (uint32_t i = 0; i < t->n; i++)
                for (int side = 0; side < 2; side++)
                    _mm512_mask_storeu_ps(y + i * t->m.ld_y + side * WEIGHT_STRIPE, keep[side],
                                          _mm512_load_ps(work->y[i][side]));
        }
    tile_release();
}

static void stripe_pairs_coarse(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripe_pairs(false, args, first, last, scratch);
}

static void stripe_pairs_fine(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    stripe_pairs(true, args, first, last, scratch);
}

/* What the scratch memory holds. */
static uint32_t batch_rows(const struct cpu_backend *c)
{
    return c->limits.max_rows < BATCH ? ALIGN_UP(c->limits.max_rows, (uint32_t)TILE_ROWS) : BATCH;
}

static void amx_matmul(struct backend *b, const struct weight *w, const struct activations *x,
                       float *y, size_t ld_y)
{
    struct cpu_backend *c = cpu_backend(b);
    struct amx_task t = {.m = {w, x, y, ld_y}};
    uint32_t n_blocks = w->n_in / WEIGHT_BLOCK;

    if (w->layout != LAYOUT_TILE16 || !weight_type_is_quantized(w->type) || !x->q ||
        x->n < LEAST_ROWS) {
        c->few_rows_matmul(b, w, x, y, ld_y);
        return;
    }
    assert(x->k == w->n_in && w->n_in <= c->limits.max_width);
    for (t.row = 0; t.row < x->n; t.row += t.n) {
        uint32_t n_stripes = DIV_ROUND_UP(w->n_out, WEIGHT_STRIPE);

        t.n = MIN(x->n - t.row, batch_rows(c));
        t.rows = tiled_rows(cpu_shared(c), t.n, n_blocks, x->q_low);
        cpu_parallel(c, DIV_ROUND_UP(t.n, TILE_ROWS) * DIV_ROUND_UP(n_blocks, (uint32_t)CHUNK),
                     (size_t)CHUNK * BLOCK_BYTES / 4, rearrange, &t);
        cpu_parallel(c, DIV_ROUND_UP(n_stripes, 2u), (size_t)w->n_in * t.n,
                     x->q_low ? stripe_pairs_fine : stripe_pairs_coarse, &t);
    }
}

void cpu_use_amx(struct cpu_backend *c)
{
    uint32_t n_blocks = DIV_ROUND_UP(c->limits.max_width, (uint32_t)WEIGHT_BLOCK);

    c->scratch_each = MAX(c->scratch_each, ALIGN_UP(sizeof(struct workspace), (size_t)4096));
    c->scratch_shared = MAX(c->scratch_shared, tiled_bytes(batch_rows(c), n_blocks));
    c->few_rows_matmul = c->ops.matmul;
    c->ops.matmul = amx_matmul;
}
