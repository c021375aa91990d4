// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/address.glsl"
#include "shaders/push-rows.h"

// Rows of K and V into the pages of their positions. An invocation for two neighbours of a head's
// values.

layout(constant_id = 1) const bool HALVES = true;
layout(local_size_x_id = 0) in;
PUSH(kv_store_push)

layout(buffer_reference, std430, buffer_reference_align = 8) buffer KvRows
{
    device_kv_row v[];
};
layout(buffer_reference, std430, buffer_reference_align = 8) buffer Pages
{
    uvec2 v[];
};

#define KV_PAGE 64

// To nearest, ties to even, whatever the device's conversion does: NaN becomes one, what is too
// large infinity.
uint half_bits(uint f)
{
    uint a = f & 0x7fffffffu, sign = f >> 16 & 0x8000u, kept, shift = 13, odd;

    if (a > 0x7f800000u)
        return sign | 0x7e00u;
    if (a >= 0x477ff000u) // from here on rounding leads to infinity
        return sign | 0x7c00u;
    if (a < 0x33000000u) // below 2^-25, half of the smallest
        return sign;
    if (a < 0x38800000u) { // a subnormal half counts 2^-24
        shift = 126 - (a >> 23);
        a = (a & 0x7fffffu) | 0x800000u;
    } else {
        a -= 0x38000000u;
    }
    kept = a >> shift;
    odd = kept & 1;
    // half of what is cut off, less one where a tie has to go down
    return sign | (a + (1u << (shift - 1)) - 1 + odd) >> shift;
}

// Two positions share a word, and the neighbour's half may be written at the same time. This half
// is nobody else's, so changing just its bits is right whatever comes between.
void put_half(Words page, uint at, uint bits)
{
    uint shift = (at & 1) * 16;
    uint old = atomicOr(page.v[at / 2], 0) >> shift & 0xffffu;

    atomicXor(page.v[at / 2], (old ^ bits) << shift);
}

void main()
{
    uint i = gl_GlobalInvocationID.x * 2, width = push.n_heads_kv * push.head_dim;

    if (i >= width)
        return;

    device_kv_row row = KvRows(push.rows).v[gl_WorkGroupID.y];
    uint place = row.pos % KV_PAGE, head = i / push.head_dim, dim = i % push.head_dim;
    Words page = Words(Pages(row.pages).v[row.pos / KV_PAGE]);
    Words k = Words(row_address(push.k, gl_WorkGroupID.y, push.ld));
    Words v = Words(row_address(push.v, gl_WorkGroupID.y, push.ld));
    uint k_at = i * KV_PAGE + place;
    uint v_at = (width + head * push.head_dim) * KV_PAGE + place * push.head_dim + dim;

    if (HALVES) {
        put_half(page, k_at, half_bits(k.v[i]));
        put_half(page, k_at + KV_PAGE, half_bits(k.v[i + 1]));
        page.v[v_at / 2] = half_bits(v.v[i]) | half_bits(v.v[i + 1]) << 16;
    } else {
        page.v[k_at] = k.v[i];
        page.v[k_at + KV_PAGE] = k.v[i + 1];
        page.v[v_at] = v.v[i];
        page.v[v_at + 1] = v.v[i + 1];
    }
}
