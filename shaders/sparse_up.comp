// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460

// gate := gelu(gate) * (up . x) for the neurons of a row's list, eight at a time: what a thread has
// read of x meets the rows of all eight. The 64 threads share out the values of a row, eight or a
// block at a time; their sums are added up in an order that no neuron's place in the list changes.
//
// Workgroups that run at the same time are those of many rows at about the same place of their
// lists, so that they find in a cache what one of them has read.

#extension GL_GOOGLE_include_directive : require
#include "shaders/half.glsl"
#include "shaders/math.glsl"
#include "shaders/push-sparse.h"

#define THREADS 64
#define N SPARSE_UP_NEURONS

layout(local_size_x = THREADS) in;

layout(constant_id = 0) const uint TYPE = SPARSE_Q4;
layout(constant_id = 1) const uint ROUNDED = 0; // activations are; type: q8 or q4

PUSH(sparse_push)

shared float sums[N * (THREADS + 1)];

// Floats of eight weights from value 8 * unit on, or, q4, which has them four and four: from values
// of_unit() and of_unit() + 16 on.
uint of_unit(uint unit)
{
    return TYPE == SPARSE_Q4 ? unit / 4 * 32 + unit % 4 * 4 : unit * 8;
}

const uint SECOND = TYPE == SPARSE_Q4 ? 16 : 4; // where the other four are

void weights(uint at, uint unit, out vec4 a, out vec4 b)
{
    if (TYPE == SPARSE_F32) {
        at += unit * 8;
        a = vec4(Floats(push.up).v[at], Floats(push.up).v[at + 1], Floats(push.up).v[at + 2],
                 Floats(push.up).v[at + 3]);
        b = vec4(Floats(push.up).v[at + 4], Floats(push.up).v[at + 5], Floats(push.up).v[at + 6],
                 Floats(push.up).v[at + 7]);
    } else if (TYPE == SPARSE_F16 || TYPE == SPARSE_BF16) {
        uvec4 w;

        at += unit * 4;
        w = uvec4(Words(push.up).v[at], Words(push.up).v[at + 1], Words(push.up).v[at + 2],
                  Words(push.up).v[at + 3]);
        if (TYPE == SPARSE_F16) {
            a = vec4(half_pair(w.x), half_pair(w.y));
            b = vec4(half_pair(w.z), half_pair(w.w));
        } else {
            uvec4 high = w & 0xffff0000u, low = w << 16;

            a = uintBitsToFloat(uvec4(low.x, high.x, low.y, high.y));
            b = uintBitsToFloat(uvec4(low.z, high.z, low.w, high.w));
        }
    } else if (TYPE == SPARSE_Q8) {
        int v = int(Words(push.up).v[at + unit * 2]), w = int(Words(push.up).v[at + unit * 2 + 1]);

        a = vec4(bitfieldExtract(v, 0, 8), bitfieldExtract(v, 8, 8), bitfieldExtract(v, 16, 8),
                 v >> 24);
        b = vec4(bitfieldExtract(w, 0, 8), bitfieldExtract(w, 8, 8), bitfieldExtract(w, 16, 8),
                 w >> 24);
    } else {
        uint w = Words(push.up).v[at + unit];

        a = vec4(ivec4((uvec4(w) >> uvec4(0, 8, 16, 24)) & 15u) - 8);
        b = vec4(ivec4((uvec4(w) >> uvec4(4, 12, 20, 28)) & 15u) - 8);
    }
}

// The scale of a block, of a row with quantised values.
float block_scale(uint at, uint block)
{
    uint quants = TYPE == SPARSE_Q4 ? push.n_in / 8 : push.n_in / 4;
    vec2 pair = half_pair(Words(push.up).v[at + quants + block / 2]);

    return block % 2 == 0 ? pair.x : pair.y;
}

// Four values of x; 0 behind the row's end, where a row of weights has padding
vec4 four(uint at, uint k)
{
    vec4 x = vec4(0);

    if (k + 4 <= push.n_in)
        return vec4(Floats(push.x).v[at + k], Floats(push.x).v[at + k + 1],
                    Floats(push.x).v[at + k + 2], Floats(push.x).v[at + k + 3]);
    for (uint i = 0; i < 3; i++)
        if (k + i < push.n_in)
            x[i] = Floats(push.x).v[at + k + i];
    return x;
}

int dot_signed(int a, int b)
{
    return bitfieldExtract(a, 0, 8) * bitfieldExtract(b, 0, 8) +
           bitfieldExtract(a, 8, 8) * bitfieldExtract(b, 8, 8) +
           bitfieldExtract(a, 16, 8) * bitfieldExtract(b, 16, 8) + (a >> 24) * (b >> 24);
}

// Nibbles from bit `from` of each byte of w, less 8
int dot_nibbles(uint w, int from, int x)
{
    return (int(bitfieldExtract(w, from, 4)) - 8) * bitfieldExtract(x, 0, 8) +
           (int(bitfieldExtract(w, from + 8, 4)) - 8) * bitfieldExtract(x, 8, 8) +
           (int(bitfieldExtract(w, from + 16, 4)) - 8) * bitfieldExtract(x, 16, 8) +
           (int(bitfieldExtract(w, from + 24, 4)) - 8) * (x >> 24);
}

int dot_block(uint at, uint block, int x[8])
{
    int sum = 0;

    if (TYPE == SPARSE_Q8)
        for (uint i = 0; i < 8; i++)
            sum += dot_signed(int(Words(push.up).v[at + block * 8 + i]), x[i]);
    else
        for (uint i = 0; i < 4; i++) {
            uint w = Words(push.up).v[at + block * 4 + i];

            sum += dot_nibbles(w, 0, x[i]) + dot_nibbles(w, 4, x[i + 4]);
        }
    return sum;
}

void main()
{
    uint t = gl_LocalInvocationID.x, row = gl_WorkGroupID.x;
    uint list = row * push.ld_work + SPARSE_LIST, count = Words(push.work).v[list - SPARSE_LIST];
    uint n_batches = (count + N - 1) / N, share = gl_WorkGroupID.y;
    uint batch = n_batches * share / gl_NumWorkGroups.y;
    uint end = n_batches * (share + 1) / gl_NumWorkGroups.y;

    for (; batch < end; batch++) {
        uint first = batch * N;
        uint at[N];
        precise float acc[N];

        for (uint i = 0; i < N; i++) {
            at[i] = Words(push.work).v[list + min(first + i, count - 1)] * push.up_row;
            acc[i] = 0;
        }
        if (ROUNDED != 0) {
            uint n_blocks = push.n_in / 32;

            for (uint b = t; b < n_blocks; b += THREADS) {
                float d = Floats(push.d).v[row * (push.ld_q / 32) + b];
                int x[8];

                for (uint i = 0; i < 8; i++)
                    x[i] = Ints(push.q).v[row * (push.ld_q / 4) + b * 8 + i];
                for (uint i = 0; i < N; i++)
                    acc[i] = fma(float(dot_block(at[i], b, x)), block_scale(at[i], b) * d, acc[i]);
            }
        } else {
            uint n_units = (push.n_in + 7) / 8, x_at = row * push.ld_x;

            for (uint u = t; u < n_units; u += THREADS) {
                uint k = of_unit(u);
                vec4 x = four(x_at, k), y = four(x_at, k + SECOND);

                for (uint i = 0; i < N; i++) {
                    vec4 v, w;
                    precise float sum;

                    weights(at[i], u, v, w);
                    sum = v.x * x.x;
                    sum = fma(v.y, x.y, sum);
                    sum = fma(v.z, x.z, sum);
                    sum = fma(v.w, x.w, sum);
                    sum = fma(w.x, y.x, sum);
                    sum = fma(w.y, y.y, sum);
                    sum = fma(w.z, y.z, sum);
                    sum = fma(w.w, y.w, sum);
                    if (TYPE < SPARSE_Q8)
                        acc[i] += sum;
                    else
                        acc[i] = fma(sum, block_scale(at[i], u * 8 / 32), acc[i]);
                }
            }
        }
        for (uint i = 0; i < N; i++)
            sums[i * (THREADS + 1) + t] = acc[i];
        barrier();
        // thread: eight others of neuron t / 8
        uint from = t / 8 * (THREADS + 1) + t % 8 * 8;
        precise float sum = sums[from];
        for (uint i = 1; i < 8; i++)
            sum += sums[from + i];
        barrier();
        sums[t] = sum;
        barrier();
        if (t < N && first + t < count) {
            uint g = row * push.ld_gate + Words(push.work).v[list + first + t];
            precise float u = sums[t * 8];

            for (uint i = 1; i < 8; i++)
                u += sums[t * 8 + i];
            Floats(push.gate).v[g] = gelu(Floats(push.gate).v[g]) * u;
        }
        barrier();
    }
}
