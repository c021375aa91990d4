/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The kernels of sparse_ffn() but for the integer products, for a file that has included the lanes
 * of its level (LEVEL-lanes.h) and defined
 *
 *   load16()     values 16 i.. of a row or column without scales, as VECS registers
 *   load_half()  floats of LANES f16
 *   sum_64()     the sum of 64 lanes in 64 / LANES registers, l and l + 32 first, then l + 16, ...
 *
 * Compiled for that file's instruction set, AVX2 at least.
 */

#include <assert.h>
#include <math.h>
#include <string.h>

#include "backends/cpu/avx2.h"
#include "backends/cpu/matmul.h"
#include "backends/cpu/sparse.h"

#define VECS (16 / LANES)

/* Of functions that are to be one copy for each type of weights. */
#define INLINE inline __attribute__((always_inline))

static inline __m256d low_half(__m256 v)
{
    return _mm256_cvtps_pd(_mm256_castps256_ps128(v));
}

static inline __m256d high_half(__m256 v)
{
    return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
}

static inline double sum_four(__m256d a, __m256d b, __m256d c, __m256d d)
{
    double v[4];

    _mm256_storeu_pd(v, _mm256_add_pd(_mm256_add_pd(a, b), _mm256_add_pd(c, d)));
    return (v[0] + v[1]) + (v[2] + v[3]);
}

/* mean + z * deviation (§3.7), in double */
static double gate_cut(const float *x, uint32_t n, double z)
{
    __m256d a[4], mean;
    double m = 0, square = 0;
    uint32_t k = 0;

    for (int i = 0; i < 4; i++)
        a[i] = _mm256_setzero_pd();
    for (; k + 16 <= n; k += 16)
        for (uint32_t i = 0; i < 2; i++) {
            __m256 v = _mm256_loadu_ps(x + k + 8 * i);

            a[2 * i] = _mm256_add_pd(a[2 * i], low_half(v));
            a[2 * i + 1] = _mm256_add_pd(a[2 * i + 1], high_half(v));
        }
    for (; k < n; k++)
        m += (double)x[k];
    m = (m + sum_four(a[0], a[1], a[2], a[3])) / n;

    mean = _mm256_set1_pd(m);
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_setzero_pd();
    for (k = 0; k + 16 <= n; k += 16)
        for (uint32_t i = 0; i < 2; i++) {
            __m256 v = _mm256_loadu_ps(x + k + 8 * i);
            __m256d low = _mm256_sub_pd(low_half(v), mean);
            __m256d high = _mm256_sub_pd(high_half(v), mean);

            a[2 * i] = _mm256_fmadd_pd(low, low, a[2 * i]);
            a[2 * i + 1] = _mm256_fmadd_pd(high, high, a[2 * i + 1]);
        }
    for (; k < n; k++)
        square += ((double)x[k] - m) * ((double)x[k] - m);
    return m + z * sqrt((square + sum_four(a[0], a[1], a[2], a[3])) / n);
}

/* Bit k: x[k] >= t, k < n <= 32 */
static inline uint32_t mask_above(const float *x, uint32_t n, __m256 t)
{
    uint32_t mask = 0;

    for (uint32_t k = 0; k < n; k += 8) {
        __m256 v =
            n - k >= 8 ? _mm256_loadu_ps(x + k) : _mm256_maskload_ps(x + k, lanes_below(n - k));
        uint32_t m = (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(v, t, _CMP_GE_OQ));

        if (n - k < 8)
            m &= (1u << (n - k)) - 1;
        mask |= m << k;
    }
    return mask;
}

static void cut_row(const struct sparse_task *t, uint32_t i)
{
    float *gate = sparse_list(t, i);
    uint8_t *columns = t->columns + i * t->ld_columns;
    double cut = gate_cut(gate, t->ffn, (double)t->a->z);
    float least = (float)cut; /* of what is above: comparing floats will do */
    uint32_t count = 0;
    __m256 bound;

    if ((double)least <= cut)
        least = nextafterf(least, INFINITY);
    bound = _mm256_set1_ps(least);
    for (uint32_t b = 0; b < t->n_blocks; b++) {
        uint32_t k = b * WEIGHT_BLOCK;
        uint32_t m = t->ffn - k >= WEIGHT_BLOCK ? mask_above(gate + k, WEIGHT_BLOCK, bound)
                                                : mask_above(gate + k, t->ffn - k, bound);

        t->masks[b * t->ld + i] = m;
        t->starts[b * t->ld + i] = count;
        for (; m; m &= m - 1, count++) { /* the list does not overtake the gates yet to be seen */
            uint32_t j = k + (uint32_t)__builtin_ctz(m);

            gate[count] = (float)((double)gate[j] - cut);
            columns[count] = (uint8_t)(j % SPARSE_COLUMNS);
        }
    }
    t->starts[t->n_blocks * t->ld + i] = count;
    for (uint32_t k = 0; k < count; k += 8) {
        if (count - k >= 8) {
            _mm256_storeu_ps(gate + k, gelu_lanes(_mm256_loadu_ps(gate + k)));
        } else {
            __m256i in = lanes_below(count - k);

            _mm256_maskstore_ps(gate + k, in, gelu_lanes(_mm256_maskload_ps(gate + k, in)));
        }
    }
}

/* up */

/* Group g of a row in the order of sparse_x; parts: like the row, but with zeros behind its end
 * when n_blocks are fewer than SPARSE_GROUP. */
static INLINE const struct sparse_w *unpack_groups(enum weight_type type, const uint8_t *row,
                                                   uint32_t n_blocks, struct sparse_w *to)
{
    size_t block = type == WEIGHT_Q4 ? WEIGHT_BLOCK / 2 : WEIGHT_BLOCK;
    const uint8_t *scales = row + n_blocks * block;

    for (uint32_t b = 0; b < n_blocks; b += SPARSE_GROUP, to++) {
        uint8_t part[SPARSE_GROUP * WEIGHT_BLOCK] __attribute__((aligned(64)));
        uint16_t part_scales[SPARSE_GROUP];
        const uint8_t *from = row + b * block;
        uint32_t n = MIN(n_blocks - b, (uint32_t)SPARSE_GROUP);

        memset(part_scales, 0, sizeof(part_scales));
        memcpy(part_scales, scales + b * (size_t)2, n * (size_t)2);
        if (n < SPARSE_GROUP) {
            memset(part, 0, sizeof(part));
            memcpy(part, from, n * block);
            from = part;
        }
        unpack_group(type, from, part_scales, to);
    }
    return to;
}

static INLINE void up_rounded(enum weight_type type, const struct sparse_task *t, uint32_t j,
                              const struct sparse_use *uses, uint32_t n, struct sparse_w *w)
{
    const struct weight *up = t->a->up;

    unpack_groups(type, (const uint8_t *)up->data + j * weight_row_bytes(type, up->n_in),
                  up->n_in / WEIGHT_BLOCK, w);
    for (uint32_t k = 0; k < n; k++)
        sparse_list(t, uses[k].row)[uses[k].at] *=
            dot_groups(type, w, t->x + (size_t)uses[k].row * t->n_groups, t->n_groups);
}

/* A row of up in float with zeros up to a multiple of 64. */
static INLINE void unpack_row(enum weight_type type, const uint8_t *row, uint32_t n_in, float *to)
{
    uint32_t k = 0;

    if (type == WEIGHT_Q4 || type == WEIGHT_Q8) {
        const uint8_t *scales = row + (type == WEIGHT_Q4 ? n_in / 2 : n_in);

        for (; k < n_in; k += WEIGHT_BLOCK, scales += 2) {
            uint16_t d;
            vec v[VECS], by;

            memcpy(&d, scales, 2);
            by = v_set1(_cvtsh_ss(d));
            for (uint32_t h = 0; h < 2; h++) {
                load16(type, row, k / 16 + h, v);
                for (uint32_t i = 0; i < VECS; i++)
                    v_store(to + k + 16 * h + LANES * i, v_mul(v[i], by));
            }
        }
    } else {
        for (; k < n_in; k += 16) { /* a row's padding holds whole sixteens */
            vec v[VECS];

            load16(type, row, k / 16, v);
            for (uint32_t i = 0; i < VECS; i++)
                v_store(to + k + LANES * i, v[i]);
        }
    }
    memset(to + n_in, 0, (ALIGN_UP(n_in, 64u) - n_in) * sizeof(*to));
}

static inline float dot_row(const float *w, const float *x, uint32_t n)
{
    float end[64] = {0};
    vec acc[64 / LANES];

    for (uint32_t i = 0; i < 64 / LANES; i++)
        acc[i] = v_zero();
    for (uint32_t k = 0; k < n; k += 64) {
        const float *from = x + k;

        if (n - k < 64) {
            memcpy(end, from, (n - k) * sizeof(*end));
            from = end;
        }
        for (uint32_t i = 0; i < 64 / LANES; i++)
            acc[i] = v_fma(v_load(w + k + LANES * i), v_load(from + LANES * i), acc[i]);
    }
    return sum_64(acc);
}

static INLINE void up_f32(enum weight_type type, const struct sparse_task *t, uint32_t j,
                          const struct sparse_use *uses, uint32_t n, float *w)
{
    const struct weight *up = t->a->up;
    const struct activations *x = t->a->x;

    unpack_row(type, (const uint8_t *)up->data + j * weight_row_bytes(type, up->n_in), up->n_in, w);
    for (uint32_t k = 0; k < n; k++)
        sparse_list(t, uses[k].row)[uses[k].at] *=
            dot_row(w, x->f32 + uses[k].row * x->ld, up->n_in);
}

static void up_neuron(const struct sparse_task *t, uint32_t j, const struct sparse_use *uses,
                      uint32_t n, void *scratch)
{
    if (t->rounded && t->a->up->type == WEIGHT_Q4)
        up_rounded(WEIGHT_Q4, t, j, uses, n, scratch);
    else if (t->rounded && t->a->up->type == WEIGHT_Q8)
        up_rounded(WEIGHT_Q8, t, j, uses, n, scratch);
    else
        WITH_WEIGHT_TYPE(t->a->up->type, up_f32, t, j, uses, n, scratch);
}

/* down */

/* Bytes of 32 outputs in a column. */
static INLINE size_t bytes_of_32(enum weight_type type)
{
    return type == WEIGHT_Q4 ? 16 : type == WEIGHT_Q8 ? 32 : type == WEIGHT_F32 ? 128 : 64;
}

/* Where the parts of a matrix in LAYOUT_COLS are. */
struct columns {
    enum weight_type type;
    bool scaled;
    size_t line, block; /* bytes of a column and of 32 with their scales */
    const uint8_t *data;
};

static INLINE struct columns columns_of(enum weight_type type, const struct weight *w)
{
    return (struct columns){
        .type = type,
        .scaled = type == WEIGHT_Q4 || type == WEIGHT_Q8,
        .line = weight_column_bytes(type, w->n_out),
        .block = weight_col_block_bytes(type, w->n_out),
        .data = w->data,
    };
}

/* Scales of block b from output o on; its column j from there on. */
static inline const uint16_t *column_scales(const struct columns *c, uint32_t b, uint32_t o)
{
    return (const uint16_t *)(c->data + b * c->block) + o;
}

static inline const uint8_t *column_at(const struct columns *c, uint32_t b, uint32_t j, uint32_t o)
{
    return c->data + b * c->block + (c->block - WEIGHT_BLOCK * c->line) + j * c->line +
           o / 32 * bytes_of_32(c->type);
}

/* Asks for what down_few() reads of block b. */
static inline void prefetch_block(const struct columns *c, uint32_t b, uint32_t all, uint32_t o,
                                  uint32_t n_out)
{
    if (c->scaled)
        prefetch(column_scales(c, b, o), n_out * (size_t)2);
    for (; all; all &= all - 1)
        prefetch(column_at(c, b, (uint32_t)__builtin_ctz(all), o),
                 DIV_ROUND_UP(n_out, 32u) * bytes_of_32(c->type));
}

/* One entry of a row's list. */
struct part {
    float h;
    uint32_t acc; /* where the row's sums begin */
};

/* acc += h * (a column with its scales d), for n sixteens of outputs, a constant */
static INLINE void add_sixteens(enum weight_type type, uint32_t n, const uint8_t *column,
                                const float *d, vec h, float *acc)
{
    for (uint32_t s = 0; s < n; s++) {
        vec v[VECS];

        load16(type, column, s, v);
        for (uint32_t i = 0; i < VECS; i++) {
            float *to = acc + 16 * s + LANES * i;

            if (type == WEIGHT_Q4 || type == WEIGHT_Q8)
                v[i] = v_mul(v[i], v_load(d + 16 * s + LANES * i));
            v_store(to, v_fma(h, v[i], v_load(to)));
        }
    }
}

static INLINE void add_column(enum weight_type type, const uint8_t *column, const float *d,
                              uint32_t n, const struct part *p, float *acc)
{
    vec h = v_set1(p->h);

    acc += p->acc;
    for (; n >= 2; n -= 2, column += bytes_of_32(type), d += 32, acc += 32)
        add_sixteens(type, 2, column, d, h, acc);
    if (n)
        add_sixteens(type, 1, column, d, h, acc);
}

/*
 * Outputs o.. of few rows. All sums of the panel stay in the first-level cache, so each column is
 * gone through once for each of its rows, in long loops: most columns have one.
 */
static INLINE void few_rows(enum weight_type type, const struct sparse_task *t, uint32_t o,
                            uint32_t n_out, void *scratch)
{
    const struct columns c = columns_of(type, t->a->down);
    uint32_t n_blocks = 0, *blocks = scratch, n = DIV_ROUND_UP(n_out, 16u); /* sixteens */
    float *d = (float *)scratch + ALIGN_UP(t->n_blocks, 16u), *acc = d + 16 * n;
    /* of long panels, some blocks are as much as memory brings in the time they take */
    uint32_t ahead = n_out >= 512 ? 2 : 4;

    memset(acc, 0, (size_t)t->n * 16 * n * sizeof(*acc));
    for (uint32_t b = 0; b < t->n_blocks; b++)
        if (t->unions[b])
            blocks[n_blocks++] = b;
    for (uint32_t k = 0; k < MIN(ahead, n_blocks); k++)
        prefetch_block(&c, blocks[k], t->unions[blocks[k]], o, n_out);
    for (uint32_t k = 0; k < n_blocks; k++) {
        uint32_t b = blocks[k], counts[WEIGHT_BLOCK] = {0};
        struct part parts[WEIGHT_BLOCK][SPARSE_FEW];

        if (k + ahead < n_blocks)
            prefetch_block(&c, blocks[k + ahead], t->unions[blocks[k + ahead]], o, n_out);
        for (uint32_t i = 0; i < t->n; i++) {
            const float *h = sparse_list(t, i) + t->starts[b * t->ld + i];

            for (uint32_t m = t->masks[b * t->ld + i]; m; m &= m - 1) {
                uint32_t j = (uint32_t)__builtin_ctz(m);

                parts[j][counts[j]++] = (struct part){*h++, i * 16 * n};
            }
        }
        for (uint32_t i = 0; c.scaled && i < n * VECS; i++)
            v_store(d + LANES * i, load_half(column_scales(&c, b, o) + LANES * i));
        for (uint32_t m = t->unions[b]; m; m &= m - 1) {
            uint32_t j = (uint32_t)__builtin_ctz(m);
            const uint8_t *column = column_at(&c, b, j, o);

            for (uint32_t i = 0; i < counts[j]; i++)
                add_column(type, column, d, n, &parts[j][i], acc);
        }
    }
    for (uint32_t i = 0; i < t->n; i++)
        memcpy(t->a->y + i * t->a->ld_y + o, acc + (size_t)i * 16 * n, n_out * sizeof(*acc));
}

/* A column with its scales d in float, n sixteens of outputs. */
static INLINE void unpack_column(enum weight_type type, const uint8_t *column, const vec *d,
                                 uint32_t n, float *to)
{
    for (uint32_t s = 0; s < n; s++) {
        vec v[VECS];

        load16(type, column + s / 2 * bytes_of_32(type), s % 2, v);
        for (uint32_t i = 0; i < VECS; i++) {
            if (type == WEIGHT_Q4 || type == WEIGHT_Q8)
                v[i] = v_mul(v[i], d[s * VECS + i]);
            v_store(to + 16 * s + LANES * i, v[i]);
        }
    }
}

#define PANEL_VECS (SPARSE_OUTPUTS / LANES)

static INLINE void many_rows(enum weight_type type, const struct sparse_task *t, uint32_t o,
                             uint32_t n_out, void *scratch)
{
    const struct columns c = columns_of(type, t->a->down);
    float *tile = scratch, *acc = tile + SPARSE_COLUMNS * SPARSE_OUTPUTS;
    uint32_t n = DIV_ROUND_UP(n_out, 16u); /* sixteens */
    const uint32_t blocks = SPARSE_COLUMNS / WEIGHT_BLOCK;

    memset(tile, 0, SPARSE_COLUMNS * SPARSE_OUTPUTS * sizeof(*tile));
    memset(acc, 0, (size_t)t->n * SPARSE_OUTPUTS * sizeof(*acc));
    for (uint32_t first = 0; first < t->n_blocks; first += blocks) {
        uint32_t last = MIN(first + blocks, t->n_blocks);
        const uint32_t *starts = t->starts + first * t->ld, *ends = t->starts + last * t->ld;

        for (uint32_t b = first; b < last; b++) {
            vec d[PANEL_VECS];

            for (uint32_t i = 0; i < PANEL_VECS; i++)
                d[i] = v_zero();
            if (c.scaled && n == SPARSE_OUTPUTS / 16)
                for (uint32_t i = 0; i < PANEL_VECS; i++)
                    d[i] = load_half(column_scales(&c, b, o) + LANES * i);
            else if (c.scaled)
                for (uint32_t i = 0; i < n * VECS; i++)
                    d[i] = load_half(column_scales(&c, b, o) + LANES * i);
            for (uint32_t m = t->unions[b]; m; m &= m - 1) {
                uint32_t j = (uint32_t)__builtin_ctz(m);
                float *to = tile + ((b - first) * WEIGHT_BLOCK + j) * SPARSE_OUTPUTS;

                if (n == SPARSE_OUTPUTS / 16)
                    unpack_column(type, column_at(&c, b, j, o), d, SPARSE_OUTPUTS / 16, to);
                else
                    unpack_column(type, column_at(&c, b, j, o), d, n, to);
            }
        }
        for (uint32_t b = last; b < MIN(last + blocks, t->n_blocks); b++)
            prefetch_block(&c, b, t->unions[b], o, n_out);
        for (uint32_t i = 0; i < t->n; i++) {
            const float *list = sparse_list(t, i);
            const uint8_t *columns = t->columns + i * t->ld_columns;
            float *to = acc + (size_t)i * SPARSE_OUTPUTS;
            vec sum[PANEL_VECS];

            for (uint32_t k = 0; k < PANEL_VECS; k++)
                sum[k] = v_load(to + LANES * k);
            for (uint32_t p = starts[i]; p < ends[i]; p++) {
                const float *w = tile + columns[p] * SPARSE_OUTPUTS;
                vec h = v_set1(list[p]);

                for (uint32_t k = 0; k < PANEL_VECS; k++)
                    sum[k] = v_fma(h, v_load(w + LANES * k), sum[k]);
            }
            for (uint32_t k = 0; k < PANEL_VECS; k++)
                v_store(to + LANES * k, sum[k]);
        }
    }
    for (uint32_t i = 0; i < t->n; i++)
        memcpy(t->a->y + i * t->a->ld_y + o, acc + (size_t)i * SPARSE_OUTPUTS,
               n_out * sizeof(*acc));
}

static void down_few(const struct sparse_task *t, uint32_t o, uint32_t n_out, void *scratch)
{
    WITH_WEIGHT_TYPE(t->a->down->type, few_rows, t, o, n_out, scratch);
}

static void down_many(const struct sparse_task *t, uint32_t o, uint32_t n_out, void *scratch)
{
    WITH_WEIGHT_TYPE(t->a->down->type, many_rows, t, o, n_out, scratch);
}
