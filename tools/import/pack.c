/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/import/pack.h"

#include <assert.h>
#include <string.h>

/* Where row `row` of a tile16 matrix has its lane in line 0. */
static char *lane_at(const struct weight *w, void *data, uint32_t row)
{
    return (char *)data + row / WEIGHT_STRIPE * weight_stripe_bytes(w->type, w->n_in) +
           row % WEIGHT_STRIPE * 4;
}

void pack_floats(const struct weight *w, void *data, uint32_t first, uint32_t n, const float *x)
{
    size_t column_bytes;

    switch (w->layout) {
    case LAYOUT_PLAIN:
        memcpy((float *)data + (size_t)first * w->n_in, x, (size_t)n * w->n_in * sizeof(*x));
        return;
    case LAYOUT_ROWS:
        for (uint32_t r = 0; r < n; r++)
            memcpy((char *)data + (first + r) * weight_row_bytes(w->type, w->n_in),
                   x + (size_t)r * w->n_in, w->n_in * sizeof(*x));
        return;
    case LAYOUT_TILE16:
        for (uint32_t r = 0; r < n; r++, x += w->n_in) {
            char *lane = lane_at(w, data, first + r);

            for (size_t k = 0; k < w->n_in; k++)
                memcpy(lane + k * 64, x + k, 4);
        }
        return;
    case LAYOUT_COLS:
        column_bytes = weight_column_bytes(w->type, w->n_out);
        for (size_t k = 0; k < w->n_in; k++) {
            char *column = (char *)data + k * column_bytes + (size_t)first * 4;

            for (uint32_t r = 0; r < n; r++)
                memcpy(column + (size_t)r * 4, x + (size_t)r * w->n_in + k, 4);
        }
        return;
    }
    assert(false);
}

void pack_words(const struct weight *w, void *data, uint32_t first, uint32_t n,
                const uint16_t *bits)
{
    size_t column_bytes;

    switch (w->layout) {
    case LAYOUT_PLAIN:
        break;
    case LAYOUT_ROWS:
        for (uint32_t r = 0; r < n; r++)
            memcpy((char *)data + (first + r) * weight_row_bytes(w->type, w->n_in),
                   bits + (size_t)r * w->n_in, (size_t)w->n_in * 2);
        return;
    case LAYOUT_TILE16:
        for (uint32_t r = 0; r < n; r++, bits += w->n_in) {
            char *lane = lane_at(w, data, first + r);

            for (size_t k = 0; k + 1 < w->n_in; k += 2)
                memcpy(lane + k / 2 * 64, bits + k, 4);
            if (w->n_in % 2)
                memcpy(lane + (size_t)w->n_in / 2 * 64, bits + w->n_in - 1, 2);
        }
        return;
    case LAYOUT_COLS:
        column_bytes = weight_column_bytes(w->type, w->n_out);
        for (size_t k = 0; k < w->n_in; k++) {
            char *column = (char *)data + k * column_bytes + (size_t)first * 2;

            for (uint32_t r = 0; r < n; r++)
                memcpy(column + (size_t)r * 2, bits + (size_t)r * w->n_in + k, 2);
        }
        return;
    }
    assert(false);
}

/* Four q + 8 of [0, 16) each in a byte of the result. */
static uint32_t four_nibbles(const int8_t *q)
{
    uint32_t v;

    memcpy(&v, q, 4);
    return (v & 0x0f0f0f0f) ^ 0x08080808; /* q + 8 modulo 16 flips the fourth bit */
}

static void pack_tile16_quants(const struct weight *w, void *data, uint32_t row, const int8_t *q,
                               const uint16_t *d)
{
    char *lane = lane_at(w, data, row), *scales;
    size_t n_lines = w->n_in / (w->type == WEIGHT_Q4 ? 8 : 4);

    if (w->type == WEIGHT_Q4)
        for (size_t i = 0; i < n_lines; i++) {
            uint32_t v = four_nibbles(q + 8 * i) | four_nibbles(q + 8 * i + 4) << 4;

            memcpy(lane + i * 64, &v, 4);
        }
    else
        for (size_t i = 0; i < n_lines; i++)
            memcpy(lane + i * 64, q + 4 * i, 4);
    scales = lane - row % WEIGHT_STRIPE * 4 + n_lines * 64 + row % WEIGHT_STRIPE * 2;
    for (size_t b = 0; b < w->n_in / WEIGHT_BLOCK; b++)
        memcpy(scales + b * 32, d + b, 2);
}

static void pack_row_quants(const struct weight *w, void *data, uint32_t row, const int8_t *q,
                            const uint16_t *d)
{
    uint8_t *out = (uint8_t *)data + row * weight_row_bytes(w->type, w->n_in);
    size_t n_blocks = w->n_in / WEIGHT_BLOCK;

    if (w->type == WEIGHT_Q4) {
        for (size_t b = 0; b < n_blocks; b++, q += WEIGHT_BLOCK, out += 16)
            for (int j = 0; j < 16; j++)
                out[j] = (uint8_t)((q[j] + 8) | (q[16 + j] + 8) << 4);
    } else {
        memcpy(out, q, w->n_in);
        out += w->n_in;
    }
    memcpy(out, d, n_blocks * 2);
}

static void pack_column_quants(const struct weight *w, void *data, uint32_t first, uint32_t n,
                               const int8_t *q, const uint16_t *d)
{
    size_t block_bytes = weight_col_block_bytes(w->type, w->n_out);
    size_t line_bytes = weight_column_bytes(w->type, w->n_out);
    size_t n_blocks = w->n_in / WEIGHT_BLOCK;

    assert(n == WEIGHT_BLOCK); /* n_out is a multiple of it */
    for (size_t b = 0; b < n_blocks; b++) {
        uint8_t *block = (uint8_t *)data + b * block_bytes;
        uint8_t *lines = block + block_bytes - WEIGHT_BLOCK * line_bytes;

        for (uint32_t r = 0; r < n; r++)
            memcpy(block + (size_t)(first + r) * 2, d + r * n_blocks + b, 2);
        for (size_t k = 0; k < WEIGHT_BLOCK; k++) {
            const int8_t *column = q + b * WEIGHT_BLOCK + k;

            if (w->type == WEIGHT_Q4) {
                uint8_t *out = lines + k * line_bytes + first / 2;

                for (size_t j = 0; j < 16; j++)
                    out[j] = (uint8_t)((column[j * w->n_in] + 8) | (column[(j + 16) * w->n_in] + 8)
                                                                       << 4);
            } else {
                uint8_t *out = lines + k * line_bytes + first;

                for (size_t j = 0; j < WEIGHT_BLOCK; j++)
                    out[j] = (uint8_t)column[j * w->n_in];
            }
        }
    }
}

void pack_quants(const struct weight *w, void *data, uint32_t first, uint32_t n, const int8_t *q,
                 const uint16_t *d)
{
    switch (w->layout) {
    case LAYOUT_PLAIN:
        break;
    case LAYOUT_TILE16:
    case LAYOUT_ROWS:
        for (uint32_t r = 0; r < n; r++) {
            const int8_t *row = q + (size_t)r * w->n_in;
            const uint16_t *scales = d + (size_t)r * (w->n_in / WEIGHT_BLOCK);

            if (w->layout == LAYOUT_TILE16)
                pack_tile16_quants(w, data, first + r, row, scales);
            else
                pack_row_quants(w, data, first + r, row, scales);
        }
        return;
    case LAYOUT_COLS:
        pack_column_quants(w, data, first, n, q, d);
        return;
    }
    assert(false);
}
