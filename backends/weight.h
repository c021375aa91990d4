/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * weight: one matrix of a model as it lies in the model file, which is also how kernels read it.
 *
 * A weight is the matrix W of y = W x, n_out rows by n_in columns. Its element type and its layout
 * are chosen at import and never changed afterwards: no backend repacks, transposes or copies.
 *
 * Types
 *   f32, f16, bf16   plain elements
 *   q8   blocks of 32 along n_in: int8 q in -128..127 and one f16 scale d; value = d * q
 *   q4   blocks of 32 along n_in: q in -8..7, stored as q + 8 in four bits, and one f16 scale d;
 *        value = d * q. These are the numbers of a GGUF Q8_0 or Q4_0 block, arranged anew.
 *   q4 and q8 need n_in % 32 == 0; in LAYOUT_COLS they need n_out % 32 == 0 as well.
 *
 * Layouts (all little-endian; every array below starts at a multiple of 64 bytes from `data`)
 *
 * LAYOUT_PLAIN: f32 only, row-major [n_out][n_in] without padding. Norms, routers, coefficients.
 *
 * LAYOUT_TILE16: what most matrices use. Rows come in stripes of 16 (the last one filled with zero
 *   rows), so that a vector of 16 lanes holds 16 outputs and no kernel needs a horizontal sum. In
 *   a stripe, k runs slowest and each 64-byte line holds the 16 rows side by side:
 *     f32         line k (n_in of them): row r's element k at 4r
 *     f16, bf16   line k/2: row r's elements k, k+1 (k even) at 4r; n_in odd: a zero follows
 *     q8          line k/4: row r's four q of k..k+3 at 4r; after all n_in/4 lines the scales:
 *                 [n_in/32][16] f16, block by block, row r's at 2r
 *     q4          line k/8: row r's eight q of k..k+7 (k % 8 == 0) at 4r: byte j has q[k+j]+8 in
 *                 its low and q[k+4+j]+8 in its high nibble (j < 4); then scales as in q8
 *   A stripe is padded to a multiple of 64 bytes. The lines are the B tiles of AMX int8
 *   (4 bytes of k per column) and AMX bf16 (2 values of k per column), the operand of VPDPBUSD and
 *   VDPBF16PS with 16 outputs in the lanes, of VPMADDUBSW in two halves, and on a GPU 16 lanes
 *   reading 16 consecutive words: q4 and q8 need a mask and a shift, never a shuffle.
 *
 * LAYOUT_ROWS: one row is contiguous, for matrices of which single rows are wanted: the
 *   per-layer-embedding table and `up_proj` of sparse layers. A row is padded to a multiple of 64
 *   bytes, its quantised values come first:
 *     f32, f16, bf16   n_in elements
 *     q8               n_in q as int8, then n_in/32 scales f16
 *     q4               per block of 32: byte j has q[j]+8 low, q[16+j]+8 high (j < 16), as in
 *                      GGUF; after the n_in/2 bytes, n_in/32 scales f16
 *
 * LAYOUT_COLS: one column, that is one input neuron, is contiguous: `down_proj` of sparse layers.
 *     f32, f16, bf16   column i at i * round_up(n_out * size, 64): n_out elements
 *     q8, q4           per block of 32 columns: n_out scales f16 (padded to 64 bytes), then 32
 *                      column lines, each padded to 64 bytes: q8 n_out int8; q4 n_out/2 bytes, per
 *                      32 outputs byte j has output j low and output 16+j high
 *
 * Pure functions on memory, any thread.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WEIGHT_BLOCK 32  /* values that share a scale */
#define WEIGHT_STRIPE 16 /* rows of LAYOUT_TILE16 that lie side by side */
#define WEIGHT_ALIGN 64  /* bytes; alignment of `data` and of every array in it */

/* The numbers are stored nowhere; files carry the names. */
enum weight_type {
    WEIGHT_F32,
    WEIGHT_F16,
    WEIGHT_BF16,
    WEIGHT_Q8,
    WEIGHT_Q4,
};

enum weight_layout {
    LAYOUT_PLAIN,
    LAYOUT_TILE16,
    LAYOUT_ROWS,
    LAYOUT_COLS,
};

struct weight {
    enum weight_type type;
    enum weight_layout layout;
    uint32_t n_out, n_in;
    const void *data; /* borrowed from the model's mapping; aligned to WEIGHT_ALIGN */
};

/* "f32", "f16", "bf16", "q8", "q4" and "plain", "tile16", "rows", "cols"; parse: 0 or -EINVAL. */
const char *weight_type_name(enum weight_type type);
const char *weight_layout_name(enum weight_layout layout);
int weight_type_parse(const char *name, enum weight_type *ret);
int weight_layout_parse(const char *name, enum weight_layout *ret);

static inline bool weight_type_is_quantized(enum weight_type type)
{
    return type == WEIGHT_Q8 || type == WEIGHT_Q4;
}

/* Whether the combination exists, by the rules above, with both dimensions at least 1. */
bool weight_supported(enum weight_type type, enum weight_layout layout, uint32_t n_out,
                      uint32_t n_in);

/*
 * Bytes of the packed matrix.
 * 0, -EINVAL when the combination is not supported, -EOVERFLOW when it does not fit size_t
 */
int weight_size(enum weight_type type, enum weight_layout layout, uint32_t n_out, uint32_t n_in,
                size_t *ret_bytes);

/* Distances between the pieces described above, in bytes. The shape must be supported. */
size_t weight_stripe_bytes(enum weight_type type, uint32_t n_in);    /* LAYOUT_TILE16: stripe */
size_t weight_row_bytes(enum weight_type type, uint32_t n_in);       /* LAYOUT_ROWS: row */
size_t weight_column_bytes(enum weight_type type, uint32_t n_out);   /* LAYOUT_COLS: line */
size_t weight_col_block_bytes(enum weight_type type, uint32_t n_out); /* LAYOUT_COLS: 32 columns */

/*
 * Writes one row into a packed matrix at data (zeroed beforehand), whose shape is w's; w->data is
 * not used, so that an importer can pack a large matrix piece by piece with w->n_out set to the
 * piece's rows.
 *
 * weight_put_row    f32, f16, bf16: x [n_in], rounded to nearest even
 * weight_put_row_q  q8, q4: q [n_in] in range of the type, d [n_in/32] f16 bits
 */
void weight_put_row(const struct weight *w, void *data, uint32_t row, const float *x);
void weight_put_row_q(const struct weight *w, void *data, uint32_t row, const int8_t *q,
                      const uint16_t *d);

/*
 * Reads one row back, exactly: x [n_in] f32; q and d as in weight_put_row_q. The slow definition
 * of the layouts that kernels are tested against. row < n_out.
 */
void weight_get_row(const struct weight *w, uint32_t row, float *x);
void weight_get_row_q(const struct weight *w, uint32_t row, int8_t *q, uint16_t *d);

/* IEEE half and bfloat16 to float and back, round to nearest even; NaN stays NaN. */
float half_to_float(uint16_t h);
uint16_t half_from_float(float f);

static inline float bf16_to_float(uint16_t h)
{
    union {
        uint32_t u;
        float f;
    } v = {.u = (uint32_t)h << 16};

    return v.f;
}

uint16_t bf16_from_float(float f);
