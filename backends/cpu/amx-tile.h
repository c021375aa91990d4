/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Operations on the eight tile registers of AMX, either the instructions or, with AMX_EMULATED, the
 * same in plain C, so that kernels are tested on machines without tiles. A tile is a number written
 * out (0..7), for it becomes part of the instruction. Strides are in bytes.
 *
 * Between tile_configure() and tile_release() the thread owns registers of 8 KiB, which the system
 * saves whenever it stops the thread; a body of cpu_parallel() gives them back at its end.
 */

#include <stdint.h>

#define TILE_ROWS 16      /* rows of a tile, at most */
#define TILE_ROW_BYTES 64 /* bytes of a row, at most */

/* What LDTILECFG reads. Tiles that are not used have neither rows nor bytes. */
struct tile_config {
    uint8_t palette; /* 1 */
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

_Static_assert(sizeof(struct tile_config) == 64, "what LDTILECFG reads");

#ifdef AMX_EMULATED
#include "backends/cpu/amx-emulation.h"
#else
#include <immintrin.h>

/* The intrinsics of gcc 12 do not tell the compiler which memory they read, or that they read any:
 * it would be free to store only afterwards what a tile is loaded from. */
#define tile_memory() __asm__ volatile("" ::: "memory")

static inline void tile_configure(const struct tile_config *config)
{
    /* not the intrinsic: gcc 12's reads eight bytes as the compiler sees it, the rest is not stored
     */
    __asm__ volatile("ldtilecfg %0" : : "m"(*config) : "memory");
}

static inline void tile_release(void)
{
    _tile_release();
    tile_memory();
}

#define tile_load(tile, from, stride)    \
    do {                                 \
        tile_memory();                   \
        _tile_loadd(tile, from, stride); \
    } while (0)
#define tile_store(tile, to, stride)    \
    do {                                \
        _tile_stored(tile, to, stride); \
        tile_memory();                  \
    } while (0)
#define tile_zero(tile) _tile_zero(tile)

/* c += a b: rows of a hold k = 0, 1, .., row k / 4 of b holds k..k + 3 of each column; signed
 * bytes, int32 sums */
#define tile_dot_int8(c, a, b) _tile_dpbssd(c, a, b)

/* Likewise with pairs of bf16 and float sums: those of even and of odd k, each by fused
 * multiply-adds from k = 0 on, are added to one another and then to c. Denormals are zeros. */
#define tile_dot_bf16(c, a, b) _tile_dpbf16ps(c, a, b)
#endif
