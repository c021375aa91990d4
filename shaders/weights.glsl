// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0

// weights: reads weights of all types and layouts (backends/weight.h). A pipeline is for one of
// each: both are specialisation constants, so that of all this one path is left. A thread reads
// four outputs at a time, a quad, of which each line of a stripe holds four: 16 bytes.

#extension GL_EXT_control_flow_attributes : require
#extension GL_GOOGLE_include_directive : require
#include "shaders/half.glsl"

layout(constant_id = 0) const uint TYPE = 0;
layout(constant_id = 1) const uint LAYOUT = 0;

// enum weight_type, enum weight_layout
const uint F32 = 0, F16 = 1, BF16 = 2, Q8 = 3, Q4 = 4;
const uint PLAIN = 0, TILE16 = 1, ROWS = 2, COLS = 3;
const bool QUANTIZED = TYPE == Q8 || TYPE == Q4;

// Loops of four that drivers unroll: what glslc unrolls, because it knows the number, is no longer
// "precise" in all of its copies.
layout(constant_id = 4) const uint FOUR = 4;

layout(buffer_reference, std430, buffer_reference_align = 4) readonly restrict buffer In1
{
    uint v[];
};
layout(buffer_reference, std430, buffer_reference_align = 8) readonly restrict buffer In2
{
    uvec2 v[];
};
layout(buffer_reference, std430, buffer_reference_align = 16) readonly restrict buffer In4
{
    uvec4 v[];
};

uvec2 offset(uvec2 address, uint bytes)
{
    uint carry;

    address.x = uaddCarry(address.x, bytes, carry);
    address.y += carry;
    return address;
}

// address + n * stride, beyond 4 GiB as well
uvec2 element(uvec2 address, uint n, uint stride)
{
    uint high, low;

    umulExtended(n, stride, high, low);
    address = offset(address, low);
    address.y += high;
    return address;
}

float element_float(uint h) // of 16 bits
{
    return TYPE == F16 ? half_float(h) : uintBitsToFloat(h << 16);
}

// Of a product, which outputs: more of them than one dimension may have go on in another.
uint work_group()
{
    return gl_WorkGroupID.z * gl_NumWorkGroups.x + gl_WorkGroupID.x;
}

struct quad {
    uvec2 data, scales; // of the first output
    uint rows;          // that follow it within the matrix, at most 3; LAYOUT_ROWS and PLAIN
    uint shift;         // LAYOUT_COLS, q4: to its nibbles
};

// o: a multiple of 4. Outputs beyond the matrix have some weights of it.
quad quad_at(const weight_push w, uint o)
{
    quad q;

    q.rows = 3;
    q.shift = 0;
    q.scales = uvec2(0);
    switch (LAYOUT) {
    case TILE16: {
        uint last = (w.n_out - 1) / 16;
        uvec2 stripe = element(w.data, min(o / 16, last), w.step);

        q.data = offset(stripe, o % 16 * 4);
        q.scales = offset(stripe, w.n_in * (TYPE == Q4 ? 8 : 16) + o % 16 * 2);
        break;
    }
    case ROWS:
    case PLAIN:
        o = min(o, w.n_out - 1);
        q.rows = min(3, w.n_out - 1 - o);
        q.data = element(w.data, o, w.step);
        q.scales = offset(q.data, w.n_in / (TYPE == Q4 ? 2 : 1));
        break;
    case COLS:
        if (o >= w.n_out)
            o = 0;
        if (QUANTIZED) {
            q.scales = offset(w.data, o * 2);
            q.data = offset(w.data, w.block_step - 32 * w.step);
            q.data = offset(q.data, TYPE == Q8 ? o : o / 32 * 16 + o % 16);
            q.shift = o % 32 / 16 * 4;
        } else {
            q.data = offset(w.data, o * (TYPE == F32 ? 4 : 2));
        }
        break;
    }
    return q;
}

uvec2 quad_row(const weight_push w, const quad q, uint i)
{
    return offset(q.data, min(i, q.rows) * w.step);
}

// q8 and q4: the scales of block b
vec4 quad_scales(const weight_push w, const quad q, uint b)
{
    vec4 d;

    if (LAYOUT == ROWS) {
        [[unroll]] for (uint i = 0; i < FOUR; i++)
            d[i] = half_float(In1(offset(q.scales, min(i, q.rows) * w.step)).v[b / 2] >>
                              (b & 1) * 16);
    } else {
        uvec2 h = In2(q.scales).v[b * (LAYOUT == TILE16 ? 4 : w.block_step / 8)];

        d = vec4(half_float(h.x), half_float(h.x >> 16), half_float(h.y), half_float(h.y >> 16));
    }
    return d;
}

// What is stored in a byte of quad_integers() more than the value
const int INTEGER_OFFSET = TYPE == Q4 ? 8 : 0;

// From a byte of each output in each of four words to four bytes of one output in each word
uvec4 transposed(uvec4 a)
{
    uvec4 r;

    [[unroll]] for (uint i = 0; i < FOUR; i++)
        r[i] = bitfieldExtract(a.x, int(8 * i), 8) | bitfieldExtract(a.y, int(8 * i), 8) << 8 |
               bitfieldExtract(a.z, int(8 * i), 8) << 16 | bitfieldExtract(a.w, int(8 * i), 8) << 24;
    return r;
}

// q8 and q4: the integers of k = 32 b + 8 g.. as bytes, of each output four in `low` and four in
// `high`, those of q4 with 8 added
void quad_integers(const weight_push w, const quad q, uint b, uint g, out uvec4 low, out uvec4 high)
{
    const uint nibbles = 0x0f0f0f0f;

    if (LAYOUT == TILE16 && TYPE == Q4) {
        uvec4 v = In4(q.data).v[(b * 4 + g) * 4];

        low = v & nibbles;
        high = v >> 4 & nibbles;
    } else if (LAYOUT == TILE16) {
        low = In4(q.data).v[(b * 8 + g * 2) * 4];
        high = In4(q.data).v[(b * 8 + g * 2 + 1) * 4];
    } else if (LAYOUT == ROWS) {
        [[unroll]] for (uint i = 0; i < FOUR; i++) {
            uvec2 v = In2(quad_row(w, q, i)).v[TYPE == Q4 ? b * 2 + (g & 1) : b * 4 + g];

            if (TYPE == Q4)
                v = v >> (g >> 1) * 4 & nibbles;
            low[i] = v.x;
            high[i] = v.y;
        }
    } else {
        uint at = b * (w.block_step / 4) + g * 8 * (w.step / 4);

        [[unroll]] for (uint i = 0; i < FOUR; i++) {
            low[i] = In1(q.data).v[at + i * (w.step / 4)];
            high[i] = In1(q.data).v[at + (i + 4) * (w.step / 4)];
        }
        if (TYPE == Q4) {
            low = low >> q.shift & nibbles;
            high = high >> q.shift & nibbles;
        }
        low = transposed(low);
        high = transposed(high);
    }
}

// What quad_integers() gave for eight k, and the scales: the weights exactly. Unsigned bytes, since
// devices that turn those into floats in one step are common; with their offset times d taken off
// by an fma() that has nothing to round: at most 8 bits times 11.
void integer_weights(uvec4 low, uvec4 high, vec4 d, out vec4 v[8])
{
    precise vec4 least;

    if (TYPE == Q8) {
        low ^= 0x80808080;
        high ^= 0x80808080;
    }
    least = d * -(TYPE == Q8 ? 128.0 : float(INTEGER_OFFSET));
    [[unroll]] for (uint i = 0; i < FOUR; i++) {
        v[i] = fma(vec4(bitfieldExtract(low, int(8 * i), 8)), d, least);
        v[i + 4] = fma(vec4(bitfieldExtract(high, int(8 * i), 8)), d, least);
    }
}

// Other types: the weights of k..k + 7, k % 8 == 0; from n_in on anything that can be read, or 0.
void plain_weights(const weight_push w, const quad q, uint k, out vec4 v[8])
{
    [[unroll]] for (uint i = 0; i < 2 * FOUR; i++)
        v[i] = vec4(0);
    if (k >= w.n_in)
        return;
    if (LAYOUT == ROWS) { // a row is padded to 64 bytes
        [[unroll]] for (uint i = 0; i < FOUR; i++) {
            uvec2 row = quad_row(w, q, i);

            if (TYPE == F32) {
                uvec4 a = In4(row).v[k / 4], b = In4(row).v[k / 4 + 1];

                [[unroll]] for (uint j = 0; j < FOUR; j++) {
                    v[j][i] = uintBitsToFloat(a[j]);
                    v[j + 4][i] = uintBitsToFloat(b[j]);
                }
            } else {
                uvec4 a = In4(row).v[k / 8];

                [[unroll]] for (uint j = 0; j < 2 * FOUR; j++)
                    v[j][i] = element_float(a[j / 2] >> j % 2 * 16 & 0xffff);
            }
        }
        return;
    }
    [[unroll]] for (uint i = 0; i < 2 * FOUR; i++) {
        if (k + i >= w.n_in)
            break;
        if (LAYOUT == PLAIN) {
            [[unroll]] for (uint j = 0; j < FOUR; j++)
                v[i][j] = uintBitsToFloat(In1(quad_row(w, q, j)).v[k + i]);
        } else if (TYPE == F32) {
            v[i] = uintBitsToFloat(In4(q.data).v[(k + i) * (LAYOUT == TILE16 ? 4 : w.step / 16)]);
        } else if (LAYOUT == COLS) {
            uvec2 a = In2(q.data).v[(k + i) * (w.step / 8)];

            v[i] = vec4(element_float(a.x & 0xffff), element_float(a.x >> 16),
                        element_float(a.y & 0xffff), element_float(a.y >> 16));
        } else if (i % 2 == 0) {
            uvec4 a = In4(q.data).v[(k + i) / 2 * 4];

            [[unroll]] for (uint j = 0; j < FOUR; j++) {
                v[i][j] = element_float(a[j] & 0xffff);
                v[i + 1][j] = element_float(a[j] >> 16);
            }
        }
    }
}
