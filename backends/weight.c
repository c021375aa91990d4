/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The layouts of weight.h, written down once as "where does element (row, k) lie". Packing and
 * unpacking go through the same address functions, so one cannot drift from the other. Not a fast
 * path: kernels know the layouts themselves.
 */

#include "backends/weight.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/checked.h"

static const char *const type_names[] = {
    [WEIGHT_F32] = "f32", [WEIGHT_F16] = "f16", [WEIGHT_BF16] = "bf16",
    [WEIGHT_Q8] = "q8",   [WEIGHT_Q4] = "q4",
};

static const char *const layout_names[] = {
    [LAYOUT_PLAIN] = "plain",
    [LAYOUT_TILE16] = "tile16",
    [LAYOUT_ROWS] = "rows",
    [LAYOUT_COLS] = "cols",
};

const char *weight_type_name(enum weight_type type)
{
    return type_names[type];
}

const char *weight_layout_name(enum weight_layout layout)
{
    return layout_names[layout];
}

int weight_type_parse(const char *name, enum weight_type *ret)
{
    for (size_t i = 0; i < ARRAY_SIZE(type_names); i++)
        if (strcmp(name, type_names[i]) == 0) {
            *ret = (enum weight_type)i;
            return 0;
        }
    return -EINVAL;
}

int weight_layout_parse(const char *name, enum weight_layout *ret)
{
    for (size_t i = 0; i < ARRAY_SIZE(layout_names); i++)
        if (strcmp(name, layout_names[i]) == 0) {
            *ret = (enum weight_layout)i;
            return 0;
        }
    return -EINVAL;
}

/* Bytes of one element of an unquantised type. */
static size_t element_size(enum weight_type type)
{
    return type == WEIGHT_F32 ? 4 : 2;
}

bool weight_supported(enum weight_type type, enum weight_layout layout, uint32_t n_out,
                      uint32_t n_in)
{
    if (n_out == 0 || n_in == 0)
        return false;
    if (layout == LAYOUT_PLAIN)
        return type == WEIGHT_F32;
    if (!weight_type_is_quantized(type))
        return true;
    return n_in % WEIGHT_BLOCK == 0 && (layout != LAYOUT_COLS || n_out % WEIGHT_BLOCK == 0);
}

/* Bytes of n quantised values of the type, without scales. */
static size_t quants_bytes(enum weight_type type, uint32_t n)
{
    return type == WEIGHT_Q4 ? (size_t)n / 2 : n;
}

/* n is below 2^32, so none of the sizes of one stripe, row or column can overflow 64 bits. */
size_t weight_stripe_bytes(enum weight_type type, uint32_t n_in)
{
    size_t n = n_in, bytes = 0;

    switch (type) {
    case WEIGHT_F32:
        bytes = n * 64;
        break;
    case WEIGHT_F16:
    case WEIGHT_BF16:
        bytes = DIV_ROUND_UP(n, (size_t)2) * 64;
        break;
    case WEIGHT_Q8:
    case WEIGHT_Q4:
        bytes = WEIGHT_STRIPE * (quants_bytes(type, n_in) + n / WEIGHT_BLOCK * 2);
        break;
    }
    return ALIGN_UP(bytes, (size_t)WEIGHT_ALIGN);
}

size_t weight_row_bytes(enum weight_type type, uint32_t n_in)
{
    size_t bytes = weight_type_is_quantized(type)
                       ? quants_bytes(type, n_in) + (size_t)n_in / WEIGHT_BLOCK * 2
                       : n_in * element_size(type);

    return ALIGN_UP(bytes, (size_t)WEIGHT_ALIGN);
}

size_t weight_column_bytes(enum weight_type type, uint32_t n_out)
{
    size_t bytes = weight_type_is_quantized(type) ? quants_bytes(type, n_out)
                                                  : n_out * element_size(type);

    return ALIGN_UP(bytes, (size_t)WEIGHT_ALIGN);
}

static size_t col_scales_bytes(uint32_t n_out)
{
    return ALIGN_UP((size_t)n_out * 2, (size_t)WEIGHT_ALIGN);
}

size_t weight_col_block_bytes(enum weight_type type, uint32_t n_out)
{
    return (weight_type_is_quantized(type) ? col_scales_bytes(n_out) : 0) +
           WEIGHT_BLOCK * weight_column_bytes(type, n_out);
}

int weight_size(enum weight_type type, enum weight_layout layout, uint32_t n_out, uint32_t n_in,
                size_t *ret_bytes)
{
    size_t count = 0, each = 0, bytes;

    if (!weight_supported(type, layout, n_out, n_in))
        return -EINVAL;
    switch (layout) {
    case LAYOUT_PLAIN:
        count = n_out;
        each = (size_t)n_in * 4;
        break;
    case LAYOUT_TILE16:
        count = DIV_ROUND_UP((size_t)n_out, WEIGHT_STRIPE);
        each = weight_stripe_bytes(type, n_in);
        break;
    case LAYOUT_ROWS:
        count = n_out;
        each = weight_row_bytes(type, n_in);
        break;
    case LAYOUT_COLS:
        if (weight_type_is_quantized(type)) {
            count = n_in / WEIGHT_BLOCK;
            each = weight_col_block_bytes(type, n_out);
        } else {
            count = n_in;
            each = weight_column_bytes(type, n_out);
        }
        break;
    }
    if (ckd_mul(&bytes, count, each))
        return -EOVERFLOW;
    *ret_bytes = bytes;
    return 0;
}

/* Where an unquantised element lies, in bytes from data. */
static size_t element_at(const struct weight *w, uint32_t row, uint32_t k)
{
    size_t size = element_size(w->type), per_word = 4 / size;

    switch (w->layout) {
    case LAYOUT_PLAIN:
        return ((size_t)row * w->n_in + k) * size;
    case LAYOUT_TILE16:
        return row / WEIGHT_STRIPE * weight_stripe_bytes(w->type, w->n_in) + k / per_word * 64 +
               row % WEIGHT_STRIPE * 4 + k % per_word * size;
    case LAYOUT_ROWS:
        return row * weight_row_bytes(w->type, w->n_in) + k * size;
    case LAYOUT_COLS:
        return k * weight_column_bytes(w->type, w->n_out) + row * size;
    }
    assert(false);
    return 0;
}

/* The place of a byte-sized (q8) or nibble-sized (q4) value. */
struct place {
    size_t byte;
    unsigned shift;
};

/* Blocks of 32 along a line: byte j holds value j low and value 16 + j high. */
static struct place q4_in_line(size_t line, uint32_t i)
{
    return (struct place){line + i / 32 * 16 + i % 16, i % 32 < 16 ? 0 : 4};
}

static struct place quant_at(const struct weight *w, uint32_t row, uint32_t k)
{
    bool q4 = w->type == WEIGHT_Q4;
    size_t line;

    switch (w->layout) {
    case LAYOUT_TILE16:
        line = row / WEIGHT_STRIPE * weight_stripe_bytes(w->type, w->n_in) +
               row % WEIGHT_STRIPE * 4;
        if (q4)
            return (struct place){line + k / 8 * 64 + k % 4, k % 8 < 4 ? 0 : 4};
        return (struct place){line + k / 4 * 64 + k % 4, 0};
    case LAYOUT_ROWS:
        line = row * weight_row_bytes(w->type, w->n_in);
        return q4 ? q4_in_line(line, k) : (struct place){line + k, 0};
    case LAYOUT_COLS:
        line = k / WEIGHT_BLOCK * weight_col_block_bytes(w->type, w->n_out) +
               col_scales_bytes(w->n_out) +
               k % WEIGHT_BLOCK * weight_column_bytes(w->type, w->n_out);
        return q4 ? q4_in_line(line, row) : (struct place){line + row, 0};
    case LAYOUT_PLAIN:
        break;
    }
    assert(false);
    return (struct place){0, 0};
}

/* Where the f16 scale of (row, block) lies. */
static size_t scale_at(const struct weight *w, uint32_t row, uint32_t block)
{
    switch (w->layout) {
    case LAYOUT_TILE16:
        return row / WEIGHT_STRIPE * weight_stripe_bytes(w->type, w->n_in) +
               WEIGHT_STRIPE * quants_bytes(w->type, w->n_in) + block * (size_t)32 +
               row % WEIGHT_STRIPE * 2;
    case LAYOUT_ROWS:
        return row * weight_row_bytes(w->type, w->n_in) + quants_bytes(w->type, w->n_in) +
               block * (size_t)2;
    case LAYOUT_COLS:
        return block * weight_col_block_bytes(w->type, w->n_out) + row * (size_t)2;
    case LAYOUT_PLAIN:
        break;
    }
    assert(false);
    return 0;
}

void weight_put_row(const struct weight *w, void *data, uint32_t row, const float *x)
{
    for (uint32_t k = 0; k < w->n_in; k++) {
        char *at = (char *)data + element_at(w, row, k);
        uint16_t h;

        if (w->type == WEIGHT_F32) {
            memcpy(at, &x[k], 4);
            continue;
        }
        h = w->type == WEIGHT_F16 ? half_from_float(x[k]) : bf16_from_float(x[k]);
        memcpy(at, &h, 2);
    }
}

void weight_put_row_q(const struct weight *w, void *data, uint32_t row, const int8_t *q,
                      const uint16_t *d)
{
    uint8_t *bytes = data;

    for (uint32_t k = 0; k < w->n_in; k++) {
        struct place p = quant_at(w, row, k);

        if (w->type == WEIGHT_Q8)
            bytes[p.byte] = (uint8_t)q[k];
        else
            bytes[p.byte] = (uint8_t)((bytes[p.byte] & (0xf0 >> p.shift)) |
                                      ((q[k] + 8) & 0xf) << p.shift);
    }
    for (uint32_t b = 0; b < w->n_in / WEIGHT_BLOCK; b++)
        memcpy(bytes + scale_at(w, row, b), &d[b], 2);
}

void weight_get_row_q(const struct weight *w, uint32_t row, int8_t *q, uint16_t *d)
{
    const uint8_t *bytes = w->data;

    for (uint32_t k = 0; k < w->n_in; k++) {
        struct place p = quant_at(w, row, k);

        q[k] = w->type == WEIGHT_Q8 ? (int8_t)bytes[p.byte]
                                    : (int8_t)((bytes[p.byte] >> p.shift & 0xf) - 8);
    }
    for (uint32_t b = 0; b < w->n_in / WEIGHT_BLOCK; b++)
        memcpy(&d[b], bytes + scale_at(w, row, b), 2);
}

void weight_get_row(const struct weight *w, uint32_t row, float *x)
{
    const uint8_t *bytes = w->data;
    uint16_t h;

    for (uint32_t k = 0; k < w->n_in; k++) {
        if (weight_type_is_quantized(w->type)) {
            struct place p = quant_at(w, row, k);
            int q = w->type == WEIGHT_Q8 ? (int8_t)bytes[p.byte]
                                         : (bytes[p.byte] >> p.shift & 0xf) - 8;

            memcpy(&h, bytes + scale_at(w, row, k / WEIGHT_BLOCK), 2);
            x[k] = half_to_float(h) * (float)q;
            continue;
        }
        if (w->type == WEIGHT_F32) {
            memcpy(&x[k], bytes + element_at(w, row, k), 4);
            continue;
        }
        memcpy(&h, bytes + element_at(w, row, k), 2);
        x[k] = w->type == WEIGHT_F16 ? half_to_float(h) : bf16_to_float(h);
    }
}

union bits {
    float f;
    uint32_t u;
};

float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 0x1f, m = h & 0x3ff;
    union bits v;

    if (e == 0x1f) {
        v.u = sign | 0x7f800000 | m << 13;
    } else if (e != 0) {
        v.u = sign | (e + 112) << 23 | m << 13;
    } else {
        v.f = (float)m * 0x1p-24f; /* subnormal or zero: exact */
        v.u |= sign;
    }
    return v.f;
}

uint16_t half_from_float(float f)
{
    union bits v = {.f = f};
    uint16_t sign = (uint16_t)(v.u >> 16 & 0x8000);
    uint32_t a = v.u & 0x7fffffff, rest;

    if (a > 0x7f800000)
        return sign | 0x7e00;
    if (a >= 0x477ff000) /* from here on rounding leads to infinity */
        return sign | 0x7c00;
    if (a < 0x38800000) { /* subnormal half: let the float adder round at the right bit */
        v.u = a;
        v.f += 0.5f;
        return sign | (uint16_t)(v.u - 0x3f000000);
    }
    rest = a & 0x1fff;
    a = (a - 0x38000000) >> 13;
    a += rest > 0x1000 || (rest == 0x1000 && (a & 1));
    return sign | (uint16_t)a;
}

uint16_t bf16_from_float(float f)
{
    union bits v = {.f = f};

    if ((v.u & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(v.u >> 16 | 0x40);
    return (uint16_t)((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}
