// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-matmul.h"
#include "shaders/weights.glsl"
#include "shaders/dot8.glsl"

// Matrix product of few rows of rounded activations (coarse) with q8 and q4 weights: matvec.comp,
// with exact integer sums of each block. mattile_int8.comp gives the same bits.

layout(constant_id = 2) const uint N_ROWS = 1; // of activations
layout(constant_id = 3) const uint STEPS = 2;  // blocks of each segment between barriers, >= 2

layout(local_size_x = 4 * MATMUL_SEGMENTS) in;
PUSH(matmul_push)
#include "shaders/activations.glsl"

const uint N_THREADS = 4 * MATMUL_SEGMENTS;
const uint BLOCKS = STEPS * MATMUL_SEGMENTS; // of x in shared memory

// Of a block 8 words of integers, the scale, their sum, and 2 unused. In the end the segments'
// sums: [MATMUL_SEGMENTS][N_ROWS][4].
shared uvec4 xs[N_ROWS * BLOCKS * 3];

void main()
{
    uint t = gl_LocalInvocationIndex;
    bool by_line = LAYOUT != ROWS;
    uint lane = by_line ? t % 4 : t / MATMUL_SEGMENTS;
    uint segment = by_line ? t / 4 : t % MATMUL_SEGMENTS;
    uint o = work_group() * 16, first = gl_WorkGroupID.y * N_ROWS;
    uint n_blocks = push.w.n_in / 32;
    quad q = quad_at(push.w, o + lane * 4);
    precise vec4 sum[N_ROWS];

    for (uint r = 0; r < N_ROWS; r++)
        sum[r] = vec4(0);
    for (uint begin = 0; begin < n_blocks; begin += BLOCKS) {
        barrier();
        for (uint r = 0; r < N_ROWS; r++) {
            uint n = min(BLOCKS, n_blocks - begin);

            for (uint i = t; i < n * 2; i += N_THREADS)
                xs[(r * BLOCKS + i / 2) * 3 + i % 2] =
                    integer_activations(first + r, (begin * 2 + i) * 16);
            for (uint i = t; i < n; i += N_THREADS)
                xs[(r * BLOCKS + i) * 3 + 2].xy = activation_scale(first + r, begin + i);
        }
        barrier();
        for (uint i = 0; i < STEPS; i++) {
            uint at = i * MATMUL_SEGMENTS + segment;
            uvec4 w[8];
            vec4 d;

            if (begin + at >= n_blocks)
                break;
            d = quad_scales(push.w, q, begin + at);
            [[unroll]] for (uint g = 0; g < FOUR; g++)
                quad_integers(push.w, q, begin + at, g, w[g * 2], w[g * 2 + 1]);
            [[unroll]] for (uint r = 0; r < N_ROWS; r++) {
                uint x_at = (r * BLOCKS + at) * 3;
                uvec4 x0 = xs[x_at], x1 = xs[x_at + 1];
                uvec2 x_scale = xs[x_at + 2].xy;
                ivec4 v = ivec4(-INTEGER_OFFSET * int(x_scale.y));
                precise vec4 scaled;

                [[unroll]] for (uint j = 0; j < FOUR; j++)
                    [[unroll]] for (uint c = 0; c < FOUR; c++)
                        v[c] = dot8(w[j + 4][c], x1[j], dot8(w[j][c], x0[j], v[c]));
                scaled = vec4(v) * d;
                sum[r] = fma(scaled, vec4(uintBitsToFloat(x_scale.x)), sum[r]);
            }
        }
    }
    barrier();
    [[unroll]] for (uint r = 0; r < N_ROWS; r++)
        xs[(segment * N_ROWS + r) * 4 + lane] = floatBitsToUint(sum[r]);
    barrier();
    for (uint i = t; i < N_ROWS * 4; i += N_THREADS) {
        uint row = first + i / 4, out_at = o + i % 4 * 4;
        precise vec4 total = vec4(0);

        for (uint s = 0; s < min(n_blocks, MATMUL_SEGMENTS); s++)
            total += uintBitsToFloat(xs[s * N_ROWS * 4 + i]);
        for (uint j = 0; j < 4; j++)
            if (row < push.n && out_at + j < push.w.n_out)
                Floats(push.y).v[row * push.ld_y + out_at + j] = total[j];
    }
}
