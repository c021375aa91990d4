/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The tile registers in plain C, after the instructions' description in Intel's manual: palette 1,
 * one set for each thread, and an end of the program where an instruction would fault. For tests
 * only. Included by amx-tile.h.
 */

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EMULATED_TILES 8

static _Thread_local struct {
    bool configured;
    struct tile_config config;
    union {
        uint8_t bytes[TILE_ROWS][TILE_ROW_BYTES];
        int32_t words[TILE_ROWS][TILE_ROW_BYTES / 4];
        float floats[TILE_ROWS][TILE_ROW_BYTES / 4];
        int8_t int8[TILE_ROWS][TILE_ROW_BYTES];
        uint16_t bf16[TILE_ROWS][TILE_ROW_BYTES / 2];
    } tiles[EMULATED_TILES];
} emulated;

#define tile_must(condition)                                                                \
    do {                                                                                    \
        if (!(condition)) {                                                                 \
            fprintf(stderr, "%s:%d: the tile instruction faults: %s\n", __FILE__, __LINE__, \
                    #condition);                                                            \
            abort();                                                                        \
        }                                                                                   \
    } while (0)

static inline void tile_configure(const struct tile_config *config)
{
    tile_must(config->palette == 1 && config->start_row == 0);
    for (size_t i = 0; i < sizeof(config->reserved); i++)
        tile_must(config->reserved[i] == 0);
    for (size_t i = 0; i < 16; i++) {
        tile_must(config->rows[i] <= TILE_ROWS && config->row_bytes[i] <= TILE_ROW_BYTES);
        tile_must(!config->rows[i] == !config->row_bytes[i]);
        tile_must(i < EMULATED_TILES || !config->rows[i]);
    }
    memset(&emulated, 0, sizeof(emulated));
    emulated.config = *config;
    emulated.configured = true;
}

static inline void tile_release(void)
{
    memset(&emulated, 0, sizeof(emulated));
}

/* Any instruction but those two faults for a tile without rows. */
static inline void tile_check(int tile)
{
    tile_must(emulated.configured);
    tile_must(tile >= 0 && tile < EMULATED_TILES && emulated.config.rows[tile]);
}

static inline void tile_load(int tile, const void *from, size_t stride)
{
    tile_check(tile);
    memset(&emulated.tiles[tile], 0, sizeof(emulated.tiles[tile]));
    for (size_t r = 0; r < emulated.config.rows[tile]; r++)
        memcpy(emulated.tiles[tile].bytes[r], (const char *)from + r * stride,
               emulated.config.row_bytes[tile]);
}

static inline void tile_store(int tile, void *to, size_t stride)
{
    tile_check(tile);
    for (size_t r = 0; r < emulated.config.rows[tile]; r++)
        memcpy((char *)to + r * stride, emulated.tiles[tile].bytes[r],
               emulated.config.row_bytes[tile]);
}

static inline void tile_zero(int tile)
{
    tile_check(tile);
    memset(&emulated.tiles[tile], 0, sizeof(emulated.tiles[tile]));
}

static inline void tile_check_product(int c, int a, int b)
{
    const struct tile_config *g = &emulated.config;

    tile_check(c);
    tile_check(a);
    tile_check(b);
    tile_must(a != b && a != c && b != c);
    tile_must(g->row_bytes[a] % 4 == 0 && g->row_bytes[b] % 4 == 0 && g->row_bytes[c] % 4 == 0);
    tile_must(g->rows[c] == g->rows[a]);
    tile_must(g->row_bytes[c] == g->row_bytes[b]);
    tile_must(g->row_bytes[a] / 4 == g->rows[b]);
}

static inline void tile_dot_int8(int c, int a, int b)
{
    size_t rows = emulated.config.rows[c], columns = emulated.config.row_bytes[c] / 4;

    tile_check_product(c, a, b);
    for (size_t m = 0; m < rows; m++)
        for (size_t k = 0; k < emulated.config.rows[b]; k++)
            for (size_t n = 0; n < columns; n++) {
                const int8_t *p = &emulated.tiles[a].int8[m][4 * k];
                const int8_t *q = &emulated.tiles[b].int8[k][4 * n];
                int32_t sum = p[0] * q[0] + p[1] * q[1] + p[2] * q[2] + p[3] * q[3];
                uint32_t word = (uint32_t)emulated.tiles[c].words[m][n]; /* wraps around */

                emulated.tiles[c].words[m][n] = (int32_t)(word + (uint32_t)sum);
            }
    /* rows from the configured number on are zero already: no instruction leaves others */
}

static inline float tile_flush(float f)
{
    return fabsf(f) < 0x1p-126f ? copysignf(0, f) : f;
}

static inline float tile_bf16(uint16_t h)
{
    union {
        uint32_t u;
        float f;
    } v = {.u = (uint32_t)h << 16};

    return tile_flush(v.f);
}

static inline void tile_dot_bf16(int c, int a, int b)
{
    size_t rows = emulated.config.rows[c], columns = emulated.config.row_bytes[c] / 4;

    tile_check_product(c, a, b);
    for (size_t m = 0; m < rows; m++)
        for (size_t n = 0; n < columns; n++) {
            float even = 0, odd = 0, *sum = &emulated.tiles[c].floats[m][n];

            for (size_t k = 0; k < emulated.config.rows[b]; k++) {
                const uint16_t *p = &emulated.tiles[a].bf16[m][2 * k];
                const uint16_t *q = &emulated.tiles[b].bf16[k][2 * n];

                even = tile_flush(fmaf(tile_bf16(p[0]), tile_bf16(q[0]), even));
                odd = tile_flush(fmaf(tile_bf16(p[1]), tile_bf16(q[1]), odd));
            }
            *sum = tile_flush(tile_flush(*sum) + tile_flush(even + odd));
        }
}
