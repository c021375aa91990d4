// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-matmul.h"
#include "shaders/weights.glsl"

// Matrix product of few rows of f32 activations, bound by reading the weights. A work group has 16
// outputs: 4 quads times 16 segments of k, which are summed side by side and then added in order.
// Of a stripe that is 16 blocks in a row at a time, each read in lines of 64 bytes.
//
// The order of sums is that of mattile.comp: to a row both give the same bits.

layout(constant_id = 2) const uint N_ROWS = 1; // of activations
layout(constant_id = 3) const uint STEPS = 1;  // blocks of each segment between two barriers

layout(local_size_x = 4 * MATMUL_SEGMENTS) in;
PUSH(matmul_push)
#include "shaders/activations.glsl"

const uint N_THREADS = 4 * MATMUL_SEGMENTS;
const uint BLOCKS = STEPS * MATMUL_SEGMENTS; // of x in shared memory

// A block's 32 values and 4 unused: threads of neighbouring segments read other banks. In the end
// the segments' sums: [MATMUL_SEGMENTS][N_ROWS][4].
shared vec4 xs[N_ROWS * BLOCKS * 9];

void main()
{
    uint t = gl_LocalInvocationIndex;
    // neighbours read what lies side by side
    bool by_line = LAYOUT == TILE16 || LAYOUT == COLS;
    uint lane = by_line ? t % 4 : t / MATMUL_SEGMENTS;
    uint segment = by_line ? t / 4 : t % MATMUL_SEGMENTS;
    uint o = work_group() * 16, first = gl_WorkGroupID.y * N_ROWS;
    uint n_blocks = (push.w.n_in + 31) / 32;
    quad q = quad_at(push.w, o + lane * 4);
    precise vec4 sum[N_ROWS];

    for (uint r = 0; r < N_ROWS; r++)
        sum[r] = vec4(0);
    for (uint begin = 0; begin < n_blocks; begin += BLOCKS) {
        barrier();
        for (uint r = 0; r < N_ROWS; r++)
            for (uint i = t; i < BLOCKS * 8; i += N_THREADS)
                xs[(r * BLOCKS + i / 8) * 9 + i % 8] = activations(first + r, begin * 32 + i * 4);
        barrier();
        for (uint i = 0; i < STEPS; i++) {
            uint at = i * MATMUL_SEGMENTS + segment;
            uvec4 low[4], high[4];
            vec4 d;

            if (begin + at >= n_blocks)
                break;
            if (QUANTIZED) { // all is asked for before any is needed
                [[unroll]] for (uint g = 0; g < FOUR; g++)
                    quad_integers(push.w, q, begin + at, g, low[g], high[g]);
                d = quad_scales(push.w, q, begin + at);
            }
            [[unroll]] for (uint g = 0; g < FOUR; g++) {
                vec4 w[8];

                if (QUANTIZED)
                    integer_weights(low[g], high[g], d, w);
                else
                    plain_weights(push.w, q, (begin + at) * 32 + g * 8, w);
                [[unroll]] for (uint r = 0; r < N_ROWS; r++)
                    [[unroll]] for (uint h = 0; h < FOUR / 2; h++) {
                        vec4 x = xs[(r * BLOCKS + at) * 9 + g * 2 + h];

                        [[unroll]] for (uint j = 0; j < FOUR; j++)
                            sum[r] = fma(w[h * 4 + j], vec4(x[j]), sum[r]);
                    }
            }
        }
    }
    barrier();
    [[unroll]] for (uint r = 0; r < N_ROWS; r++)
        xs[(segment * N_ROWS + r) * 4 + lane] = sum[r];
    barrier();
    for (uint i = t; i < N_ROWS * 4; i += N_THREADS) {
        uint row = first + i / 4, out_at = o + i % 4 * 4;
        precise vec4 total = vec4(0);

        for (uint s = 0; s < min(n_blocks, MATMUL_SEGMENTS); s++)
            total += xs[s * N_ROWS * 4 + i];
        for (uint j = 0; j < 4; j++)
            if (row < push.n && out_at + j < push.w.n_out)
                Floats(push.y).v[row * push.ld_y + out_at + j] = total[j];
    }
}
