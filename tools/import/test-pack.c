/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* pack against weight_put_row() and weight_put_row_q(), byte by byte, in every type and layout. */

#undef NDEBUG
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "tools/import/pack.h"

static uint32_t state = 1;

static uint32_t next(void)
{
    state = state * 1664525 + 1013904223;
    return state >> 8;
}

static void test_one(enum weight_type type, enum weight_layout layout, uint32_t n_out,
                     uint32_t n_in)
{
    struct weight w = {type, layout, n_out, n_in, NULL};
    size_t n = (size_t)n_out * n_in, bytes, n_scales = n / WEIGHT_BLOCK + 1;
    float *x = calloc(n, sizeof(*x));
    uint16_t *bits = calloc(n, sizeof(*bits)), *d = calloc(n_scales, sizeof(*d));
    int8_t *q = calloc(n, 1);
    uint8_t *expected, *packed;

    assert(x && bits && d && q);
    assert(weight_size(type, layout, n_out, n_in, &bytes) == 0);
    expected = calloc(1, bytes);
    packed = calloc(1, bytes); /* exactly, so that ASan sees one byte too far */
    assert(expected && packed);
    for (size_t i = 0; i < n; i++) {
        bits[i] = (uint16_t)(next() % 0x7000 + 0x80);
        x[i] = type == WEIGHT_F16 ? half_to_float(bits[i]) : bf16_to_float(bits[i]);
        q[i] = (int8_t)(type == WEIGHT_Q4 ? (int)(next() % 16) - 8 : (int)(next() % 256) - 128);
    }
    for (size_t i = 0; i < n_scales; i++)
        d[i] = (uint16_t)next();
    for (uint32_t r = 0; r < n_out; r++)
        if (weight_type_is_quantized(type))
            weight_put_row_q(&w, expected, r, q + (size_t)r * n_in,
                             d + (size_t)r * (n_in / WEIGHT_BLOCK));
        else
            weight_put_row(&w, expected, r, x + (size_t)r * n_in);
    for (uint32_t r = 0; r < n_out; r += PACK_ROWS) {
        uint32_t count = MIN(n_out - r, (uint32_t)PACK_ROWS);
        size_t at = (size_t)r * n_in;

        if (weight_type_is_quantized(type))
            pack_quants(&w, packed, r, count, q + at, d + at / WEIGHT_BLOCK);
        else if (type == WEIGHT_F32)
            pack_floats(&w, packed, r, count, x + at);
        else
            pack_words(&w, packed, r, count, bits + at);
    }
    if (memcmp(packed, expected, bytes) != 0) {
        fprintf(stderr, "%s %s [%u, %u] differs\n", weight_type_name(type),
                weight_layout_name(layout), n_out, n_in);
        abort();
    }
    free(x);
    free(bits);
    free(d);
    free(q);
    free(expected);
    free(packed);
}

int main(void)
{
    static const enum weight_type types[] = {WEIGHT_F32, WEIGHT_F16, WEIGHT_BF16, WEIGHT_Q8,
                                             WEIGHT_Q4};
    static const enum weight_layout layouts[] = {LAYOUT_PLAIN, LAYOUT_TILE16, LAYOUT_ROWS,
                                                 LAYOUT_COLS};
    static const uint32_t sizes[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 96, 100, 160};
    unsigned n = 0;

    for (size_t t = 0; t < ARRAY_SIZE(types); t++)
        for (size_t l = 0; l < ARRAY_SIZE(layouts); l++)
            for (size_t i = 0; i < ARRAY_SIZE(sizes); i++)
                for (size_t k = 0; k < ARRAY_SIZE(sizes); k++)
                    if (weight_supported(types[t], layouts[l], sizes[i], sizes[k])) {
                        test_one(types[t], layouts[l], sizes[i], sizes[k]);
                        n++;
                    }
    assert(n > 1000);
    return 0;
}
