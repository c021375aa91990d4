/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * pack: what weight_put_row() and weight_put_row_q() do, for many rows at a time and fast. Those
 * two are the definition; this is tested to write the same bytes.
 */

#include <stddef.h>
#include <stdint.h>

#include "backends/weight.h"

/* Rows that one call may have to cover whole, so that no two threads write the same byte. */
#define PACK_ROWS WEIGHT_BLOCK

/*
 * Writes rows [first, first + n) of the packed matrix w at data, which was zeroed. first is a
 * multiple of PACK_ROWS; n <= PACK_ROWS, and less only at the end of the matrix. Rows are given one
 * after the other.
 *
 * pack_floats  f32: x [n][n_in]
 * pack_words   f16, bf16: bits [n][n_in]
 * pack_quants  q8, q4: q [n][n_in], d [n][n_in / 32]
 */
void pack_floats(const struct weight *w, void *data, uint32_t first, uint32_t n, const float *x);
void pack_words(const struct weight *w, void *data, uint32_t first, uint32_t n,
                const uint16_t *bits);
void pack_quants(const struct weight *w, void *data, uint32_t first, uint32_t n, const int8_t *q,
                 const uint16_t *d);
