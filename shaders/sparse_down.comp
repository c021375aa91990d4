// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460

// y = down . h for one row and some outputs: a thread has one word of each column of one part of
// the row's list, in rising order. A list has the same parts wherever it is summed up.
//
// Workgroups that run at the same time are those of many rows with the same outputs: what they read
// of all columns stays in a cache.

#extension GL_GOOGLE_include_directive : require
#include "shaders/half.glsl"
#include "shaders/push-sparse.h"

layout(local_size_x = SPARSE_DOWN_WORDS * SPARSE_DOWN_PARTS) in;

layout(constant_id = 0) const uint TYPE = SPARSE_Q4;

PUSH(sparse_push)

#define AHEAD 4 // columns asked for before the first is used

const uint OUTPUTS = TYPE == SPARSE_F32  ? 1
                     : TYPE <= SPARSE_BF16 ? 2
                     : TYPE == SPARSE_Q8   ? 4
                                           : 8;

shared float sums[SPARSE_DOWN_PARTS * SPARSE_DOWN_WORDS * 8];

struct column {
    uint word;
    uvec4 scales; // of outputs two by two
    float h;
};

// Word `word` of neuron j's column
column load(uint gate, uint j, uint word)
{
    column c;
    uint lines = push.down_block - 32 * push.down_line;
    uint base = j / 32 * push.down_block, at = word * OUTPUTS / 2;

    c.h = Floats(push.gate).v[gate + j];
    c.scales = uvec4(0);
    if (TYPE < SPARSE_Q8) {
        c.word = Words(push.down).v[j * push.down_line + word];
        return c;
    }
    c.word = Words(push.down).v[base + lines + j % 32 * push.down_line + word];
    if (TYPE == SPARSE_Q8) {
        c.scales.xy = uvec2(Words(push.down).v[base + at], Words(push.down).v[base + at + 1]);
    } else {
        at = word / 4 * 16 + word % 4 * 2;
        c.scales = uvec4(Words(push.down).v[base + at], Words(push.down).v[base + at + 1],
                         Words(push.down).v[base + at + 8], Words(push.down).v[base + at + 9]);
    }
    return c;
}

// The thread's outputs: four, and four more for q4.
void add(inout vec4 a, inout vec4 b, column c)
{
    precise vec4 v = a, w = b;
    vec4 x = vec4(0), y = vec4(0);

    switch (TYPE) {
    case SPARSE_F32:
        x.x = uintBitsToFloat(c.word);
        break;
    case SPARSE_F16:
        x.xy = half_pair(c.word);
        break;
    case SPARSE_BF16:
        x.xy = uintBitsToFloat(uvec2(c.word << 16, c.word & 0xffff0000u));
        break;
    case SPARSE_Q8:
        x = vec4((ivec4(c.word) << ivec4(24, 16, 8, 0)) >> 24);
        break;
    case SPARSE_Q4:
        x = vec4(ivec4((uvec4(c.word) >> uvec4(0, 8, 16, 24)) & 15u) - 8);
        y = vec4(ivec4((uvec4(c.word) >> uvec4(4, 12, 20, 28)) & 15u) - 8);
        break;
    }
    if (TYPE >= SPARSE_Q8) {
        x *= vec4(half_pair(c.scales.x), half_pair(c.scales.y));
        y *= vec4(half_pair(c.scales.z), half_pair(c.scales.w));
    }
    v = fma(x, vec4(c.h), v);
    a = v;
    if (TYPE == SPARSE_Q4) {
        w = fma(y, vec4(c.h), w);
        b = w;
    }
}

void main()
{
    uint t = gl_LocalInvocationID.x, lane = t % SPARSE_DOWN_WORDS, part = t / SPARSE_DOWN_WORDS;
    uint row = gl_WorkGroupID.x, word = gl_WorkGroupID.y * SPARSE_DOWN_WORDS + lane;
    uint list = row * push.ld_work + SPARSE_LIST, count = Words(push.work).v[list - SPARSE_LIST];
    uint k = part * count / SPARSE_DOWN_PARTS, end = (part + 1) * count / SPARSE_DOWN_PARTS;
    uint gate = row * push.ld_gate;
    vec4 a = vec4(0), b = vec4(0);

    if (word * OUTPUTS < push.n_out) {
        for (; k + AHEAD <= end; k += AHEAD) {
            column c[AHEAD];

            for (uint i = 0; i < AHEAD; i++)
                c[i] = load(gate, Words(push.work).v[list + k + i], word);
            for (uint i = 0; i < AHEAD; i++)
                add(a, b, c[i]);
        }
        for (; k < end; k++)
            add(a, b, load(gate, Words(push.work).v[list + k], word));
    }
    for (uint i = 0; i < OUTPUTS; i++)
        sums[t * OUTPUTS + i] = i < 4 ? a[i] : b[i - 4];
    barrier();
    if (t < SPARSE_DOWN_WORDS * OUTPUTS) {
        uint i = t % OUTPUTS, w = gl_WorkGroupID.y * SPARSE_DOWN_WORDS + t / OUTPUTS;
        uint to = w * OUTPUTS + i;
        precise float y = sums[t];

        if (TYPE == SPARSE_Q4)
            to = w / 4 * 32 + w % 4 * 4 + i % 4 + i / 4 * 16;
        for (uint p = 1; p < SPARSE_DOWN_PARTS; p++)
            y += sums[p * SPARSE_DOWN_WORDS * OUTPUTS + t];
        if (to < push.n_out)
            Floats(push.y).v[row * push.ld_y + to] = y;
    }
}
