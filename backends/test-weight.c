/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Packing and unpacking of every type and layout at odd sizes; conversions over all halves. */

#undef NDEBUG
#include "backends/weight.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t seed = 1;

static uint32_t next_random(void)
{
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
}

/* Every row put must come back, and nothing may be written outside of weight_size(). */
static void check(enum weight_type type, enum weight_layout layout, uint32_t n_out, uint32_t n_in)
{
    struct weight w = {.type = type, .layout = layout, .n_out = n_out, .n_in = n_in};
    size_t bytes, n = (size_t)n_out * n_in, n_blocks = (size_t)n_out * (n_in / WEIGHT_BLOCK);
    float *x = malloc(n * sizeof(*x)), *y = malloc(n_in * sizeof(*y));
    int8_t *q = malloc(n), *q2 = malloc(n_in);
    uint16_t *d = malloc((n_blocks + 1) * 2), *d2 = malloc((n_in / WEIGHT_BLOCK + 1) * 2);
    uint8_t *data;

    assert(weight_size(type, layout, n_out, n_in, &bytes) == 0);
    data = aligned_alloc(64, (bytes + 64 + 63) / 64 * 64);
    memset(data, 0, bytes);
    memset(data + bytes, 0xa5, 64);
    w.data = data;

    for (size_t i = 0; i < n; i++) {
        q[i] = (int8_t)(type == WEIGHT_Q4 ? (int)(next_random() % 16) - 8
                                          : (int)(next_random() % 256) - 128);
        x[i] = (float)((int)(next_random() % 256) - 128) / 64; /* exact in bf16 and f16 */
    }
    for (size_t i = 0; i < n_blocks; i++)
        d[i] = half_from_float((float)(1 + next_random() % 1000) / 512);
    for (uint32_t r = 0; r < n_out; r++) {
        if (weight_type_is_quantized(type))
            weight_put_row_q(&w, data, r, q + (size_t)r * n_in,
                             d + (size_t)r * (n_in / WEIGHT_BLOCK));
        else
            weight_put_row(&w, data, r, x + (size_t)r * n_in);
    }
    for (uint32_t r = 0; r < n_out; r++) {
        weight_get_row(&w, r, y);
        if (weight_type_is_quantized(type)) {
            const uint16_t *row_d = d + (size_t)r * (n_in / WEIGHT_BLOCK);

            weight_get_row_q(&w, r, q2, d2);
            assert(memcmp(q2, q + (size_t)r * n_in, n_in) == 0);
            assert(memcmp(d2, row_d, n_in / WEIGHT_BLOCK * 2) == 0);
            for (uint32_t k = 0; k < n_in; k++)
                assert(y[k] == half_to_float(row_d[k / 32]) * (float)q2[k]);
        } else {
            assert(memcmp(y, x + (size_t)r * n_in, n_in * sizeof(*y)) == 0);
        }
    }
    for (int i = 0; i < 64; i++)
        assert(data[bytes + (size_t)i] == 0xa5);
    free(x);
    free(y);
    free(q);
    free(q2);
    free(d);
    free(d2);
    free(data);
}

/* One element by hand from the header's text, so that put and get cannot be wrong together. */
static void check_documented_places(void)
{
    struct weight w = {.type = WEIGHT_Q4, .layout = LAYOUT_TILE16, .n_out = 32, .n_in = 64};
    uint8_t data[2 * (16 * 32 + 16 * 2 * 2)] __attribute__((aligned(64))) = {0};
    int8_t q[64] = {0};
    uint16_t d[2] = {0, 0x3c00};

    assert(weight_stripe_bytes(WEIGHT_Q4, 64) == 576);
    for (int i = 0; i < 64; i++)
        q[i] = -8;
    q[8 * 5 + 4 + 3] = 6; /* k = 47: line 5, byte 3, high nibble */
    weight_put_row_q(&w, data, 18, q, d);
    assert(data[576 + 5 * 64 + 2 * 4 + 3] == 14 << 4);
    assert(data[576 + 512 + 32 + 4] == 0x00 && data[576 + 512 + 32 + 5] == 0x3c);
}

static void check_conversions(void)
{
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = half_to_float((uint16_t)h);

        if (isnan(f)) {
            assert(isnan(half_to_float(half_from_float(f))));
            assert(isnan(bf16_to_float(bf16_from_float(f))));
            continue;
        }
        assert(half_from_float(f) == h);
        f = bf16_to_float((uint16_t)h);
        if (!isnan(f))
            assert(bf16_from_float(f) == h);
    }
    assert(half_from_float(1.0f + 0x1p-11f) == 0x3c00); /* ties to even, down and up */
    assert(half_from_float(1.0f + 0x3p-11f) == 0x3c02);
    assert(half_from_float(65520.0f) == 0x7c00 && half_from_float(65519.0f) == 0x7bff);
    assert(half_from_float(0x1p-25f) == 0 && half_from_float(0x1.8p-25f) == 1);
    assert(bf16_from_float(1.0f + 0x1p-8f) == 0x3f80 && bf16_from_float(1.0f + 0x3p-8f) == 0x3f82);
}

int main(void)
{
    static const uint32_t outs[] = {1, 5, 16, 17, 32, 64, 96}, ins[] = {1, 3, 31, 32, 64, 96, 160};
    size_t bytes;
    int n = 0;

    for (int t = WEIGHT_F32; t <= WEIGHT_Q4; t++)
        for (int l = LAYOUT_PLAIN; l <= LAYOUT_COLS; l++)
            for (size_t o = 0; o < sizeof(outs) / 4; o++)
                for (size_t i = 0; i < sizeof(ins) / 4; i++) {
                    enum weight_type type = (enum weight_type)t;
                    enum weight_layout layout = (enum weight_layout)l;

                    if (weight_supported(type, layout, outs[o], ins[i])) {
                        check(type, layout, outs[o], ins[i]);
                        n++;
                    } else {
                        assert(weight_size(type, layout, outs[o], ins[i], &bytes) == -EINVAL);
                    }
                }
    assert(n > 400);
    assert(!weight_supported(WEIGHT_Q4, LAYOUT_COLS, 48, 64));
    assert(!weight_supported(WEIGHT_F16, LAYOUT_PLAIN, 4, 4));
    assert(weight_size(WEIGHT_F32, LAYOUT_TILE16, 0, 4, &bytes) == -EINVAL);
    check_documented_places();
    check_conversions();
    for (int t = WEIGHT_F32; t <= WEIGHT_Q4; t++) {
        enum weight_type back;

        assert(weight_type_parse(weight_type_name((enum weight_type)t), &back) == 0);
        assert((int)back == t);
    }
    return 0;
}
