/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* The instructions behind amx-tile.h, for test-amx.c to compare with their emulation. */

#include "backends/cpu/test-amx-tiles.h"

#include "backends/cpu/amx-tile.h"

void real_tile_products(const struct tile_config *config, const void *a, const void *b,
                        int32_t *int8_sums, float *bf16_sums)
{
    tile_configure(config);
    tile_load(1, a, TILE_ROW_BYTES);
    tile_load(2, b, TILE_ROW_BYTES);
    tile_load(0, int8_sums, TILE_ROW_BYTES);
    tile_dot_int8(0, 1, 2);
    tile_store(0, int8_sums, TILE_ROW_BYTES);
    tile_load(3, bf16_sums, TILE_ROW_BYTES);
    tile_dot_bf16(3, 1, 2);
    tile_store(3, bf16_sums, TILE_ROW_BYTES);
    tile_zero(0);
    tile_release();
}
