/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The probe with AMX: products of tiles, four sums of two by two operands. The permission to use
 * tiles is the process's and has been asked for by whoever found the level usable.
 */

#include <stddef.h>

#include "backends/cpu/amx-tile.h"
#include "backends/cpu/probe.h"

static void begin(void)
{
    struct tile_config c = {.palette = 1};

    for (size_t i = 0; i < 8; i++) {
        c.row_bytes[i] = TILE_ROW_BYTES;
        c.rows[i] = TILE_ROWS;
    }
    tile_configure(&c);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_zero(4);
    tile_zero(5);
    tile_zero(6);
    tile_zero(7);
}

static void multiply_int8(uint64_t n_rounds)
{
    begin();
    for (uint64_t n = 0; n < n_rounds; n++) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    tile_release();
}

static void multiply_bf16(uint64_t n_rounds)
{
    begin();
    for (uint64_t n = 0; n < n_rounds; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    tile_release();
}

void probe_use_amx(struct probe_kernels *k)
{
    k->multiply[PROBE_INT8] = (struct probe_multiply_kernel){multiply_int8, 4.0 * 2 * 16 * 16 * 64};
    k->multiply[PROBE_BF16] = (struct probe_multiply_kernel){multiply_bf16, 4.0 * 2 * 16 * 16 * 32};
}
