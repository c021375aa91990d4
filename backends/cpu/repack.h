/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Sixteen rows of LAYOUT_ROWS as a stripe of LAYOUT_TILE16, so that they
 * are multiplied by its kernels. SSE2, for the levels of x86.
 */

#include <immintrin.h>
#include <string.h>

#include "backends/cpu/matmul.h"

/* r[i]: 16 bytes of row i. Afterwards r[c]: bytes 4 c..4 c + 3 of the four rows. */
static inline void transpose_words(__m128i *r)
{
    __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
    __m128i c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);

    r[0] = _mm_unpacklo_epi64(a, b);
    r[1] = _mm_unpackhi_epi64(a, b);
    r[2] = _mm_unpacklo_epi64(c, d);
    r[3] = _mm_unpackhi_epi64(c, d);
}

/* Rows first..first + n - 1, n <= 16, of a q4 or q8 matrix; the others of the stripe repeat the
 * last one. to: stripe_scratch() bytes, aligned to 64 */
static inline void repack_stripe(enum weight_type type, const struct weight *w, uint32_t first,
                                 uint32_t n, uint8_t *to)
{
    const __m128i low = _mm_set1_epi8(0xf), high = _mm_set1_epi8((char)0xf0);
    size_t bytes = weight_row_bytes(type, w->n_in);
    size_t quants = type == WEIGHT_Q4 ? w->n_in / 2 : w->n_in;
    uint32_t n_blocks = w->n_in / WEIGHT_BLOCK;
    const uint8_t *rows[WEIGHT_STRIPE];
    uint16_t *scales = (uint16_t *)(to + quants * WEIGHT_STRIPE);

    for (uint32_t r = 0; r < WEIGHT_STRIPE; r++)
        rows[r] = (const uint8_t *)w->data + (first + MIN(r, n - 1)) * bytes;
    for (uint32_t b = 0; b < n_blocks; b++) {
        for (uint32_t r = 0; r < WEIGHT_STRIPE; r += 4) {
            uint8_t *line = to + r * 4 + (size_t)b * (type == WEIGHT_Q4 ? 4 * 64 : 8 * 64);
            __m128i v[4];

            if (type == WEIGHT_Q4) { /* a row's byte j: k = j low, 16 + j high */
                for (int i = 0; i < 4; i++)
                    v[i] = _mm_loadu_si128((const __m128i *)(rows[r + (uint32_t)i] + b * 16));
                transpose_words(v);
                for (int i = 0; i < 4; i += 2) {
                    __m128i even = v[i], odd = v[i + 1];

                    _mm_store_si128((__m128i *)(line + i * 32),
                                    _mm_or_si128(_mm_and_si128(even, low),
                                                 _mm_slli_epi16(_mm_and_si128(odd, low), 4)));
                    _mm_store_si128((__m128i *)(line + 128 + i * 32),
                                    _mm_or_si128(_mm_and_si128(_mm_srli_epi16(even, 4), low),
                                                 _mm_and_si128(odd, high)));
                }
                continue;
            }
            for (int half = 0; half < 2; half++) {
                for (int i = 0; i < 4; i++)
                    v[i] = _mm_loadu_si128(
                        (const __m128i *)(rows[r + (uint32_t)i] + b * 32 + 16 * half));
                transpose_words(v);
                for (int i = 0; i < 4; i++)
                    _mm_store_si128((__m128i *)(line + 64 * (4 * half + i)), v[i]);
            }
        }
        for (uint32_t r = 0; r < WEIGHT_STRIPE; r++)
            memcpy(&scales[b * WEIGHT_STRIPE + r], rows[r] + quants + (size_t)b * 2, 2);
    }
}
