/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Blocks, all little-endian, d and m being f16:
 *   Q4_0   d, 16 bytes: byte j has q[j]+8 low and q[16+j]+8 high
 *   Q8_0   d, 32 int8
 *   Q4_K   d, m, 12 bytes with eight 6-bit scales and eight 6-bit minima, 128 bytes of nibbles;
 *          sub-block i of 32 values: d * scale_i * q - m * minimum_i
 *   Q5_K   as Q4_K, with 32 bytes of fifth bits before the nibbles
 *   Q6_K   128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 int8 scales, d; sub-blocks of
 *          16 values: d * scale * (q - 32)
 */

#include "tools/import/dequantize.h"

#include <assert.h>
#include <string.h>

#include "backends/weight.h"

static uint16_t load_u16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static float load_half(const uint8_t *p)
{
    return half_to_float(load_u16(p));
}

void dequantize_q(enum gguf_tensor_type type, const void *data, size_t n, int8_t *q, uint16_t *d)
{
    const uint8_t *p = data;

    if (type == GGUF_TENSOR_Q8_0) {
        for (size_t b = 0; b < n / 32; b++, p += 34, q += 32) {
            d[b] = load_u16(p);
            memcpy(q, p + 2, 32);
        }
        return;
    }
    assert(type == GGUF_TENSOR_Q4_0);
    for (size_t b = 0; b < n / 32; b++, p += 18, q += 32) {
        d[b] = load_u16(p);
        for (int j = 0; j < 16; j++) {
            q[j] = (int8_t)((p[2 + j] & 0xf) - 8);
            q[16 + j] = (int8_t)((p[2 + j] >> 4) - 8);
        }
    }
}

/* Scale and minimum i of the 12 bytes: the upper four steal their top bits from the lower four. */
static void k_scale(const uint8_t *s, int i, uint8_t *scale, uint8_t *minimum)
{
    if (i < 4) {
        *scale = s[i] & 63;
        *minimum = s[i + 4] & 63;
    } else {
        *scale = (uint8_t)((s[i + 4] & 0xf) | (s[i - 4] >> 6) << 4);
        *minimum = (uint8_t)((s[i + 4] >> 4) | (s[i] >> 6) << 4);
    }
}

/* Q4_K, and Q5_K where fifth is not NULL: its bit i belongs to sub-block i. */
static void k_block(const uint8_t *p, const uint8_t *fifth, const uint8_t *nibbles, float *x)
{
    float d = load_half(p), m = load_half(p + 2);

    for (int i = 0; i < 8; i++) {
        uint8_t scale, minimum;
        float step, low;

        k_scale(p + 4, i, &scale, &minimum);
        step = d * (float)scale;
        low = m * (float)minimum;
        for (int j = 0; j < 32; j++) {
            int q = nibbles[i / 2 * 32 + j] >> (i % 2 * 4) & 0xf;

            if (fifth)
                q |= (fifth[j] >> i & 1) << 4;
            x[i * 32 + j] = step * (float)q - low;
        }
    }
}

static void q6_k_block(const uint8_t *p, float *x)
{
    const uint8_t *low = p, *high = p + 128, *scales = p + 192;
    float d = load_half(p + 208);

    for (int i = 0; i < 256; i++) {
        /* two halves of 128; in each, four groups of 32 share 64 low bytes and 32 high bytes */
        int half = i / 128, group = i / 32 % 4, j = i % 32;
        int q = low[half * 64 + group % 2 * 32 + j] >> (group / 2 * 4) & 0xf;

        q |= (high[half * 32 + j] >> (group * 2) & 3) << 4;
        x[i] = d * (float)(int8_t)scales[i / 16] * (float)(q - 32);
    }
}

void dequantize(enum gguf_tensor_type type, const void *data, size_t n, float *x)
{
    const uint8_t *p = data;
    size_t block_bytes = gguf_block_bytes(type);

    switch (type) {
    case GGUF_TENSOR_F32:
        memcpy(x, data, n * sizeof(*x));
        return;
    case GGUF_TENSOR_F16:
        for (size_t i = 0; i < n; i++)
            x[i] = load_half(p + 2 * i);
        return;
    case GGUF_TENSOR_BF16:
        for (size_t i = 0; i < n; i++)
            x[i] = bf16_to_float(load_u16(p + 2 * i));
        return;
    case GGUF_TENSOR_Q4_0:
    case GGUF_TENSOR_Q8_0:
        for (size_t b = 0; b < n / 32; b++, x += 32, p += block_bytes) {
            int8_t q[32];
            uint16_t bits;
            float d;

            dequantize_q(type, p, 32, q, &bits);
            d = half_to_float(bits);
            for (int j = 0; j < 32; j++)
                x[j] = d * (float)q[j];
        }
        return;
    case GGUF_TENSOR_Q4_K:
        for (size_t b = 0; b < n / 256; b++, x += 256, p += block_bytes)
            k_block(p, NULL, p + 16, x);
        return;
    case GGUF_TENSOR_Q5_K:
        for (size_t b = 0; b < n / 256; b++, x += 256, p += block_bytes)
            k_block(p, p + 16, p + 48, x);
        return;
    case GGUF_TENSOR_Q6_K:
        for (size_t b = 0; b < n / 256; b++, x += 256, p += block_bytes)
            q6_k_block(p, x);
        return;
    }
    assert(false);
}
