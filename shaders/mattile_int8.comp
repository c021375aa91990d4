// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-matmul.h"
#include "shaders/weights.glsl"
#include "shaders/dot8.glsl"

// Matrix product of many rows of rounded activations (coarse) with q8 and q4 weights: mattile.comp,
// with exact integer sums of each block, two blocks of a segment at a time. Gives the same bits as
// matvec_int8.comp.

layout(constant_id = 2) const uint N_ROWS = 4; // of a thread

layout(local_size_x = 256) in;
PUSH(matmul_push)
#include "shaders/activations.glsl"

const uint QUADS = MATMUL_TILE / 4;
const uint TILE_ROWS = 16 * N_ROWS;

shared uvec4 ws[2][8][QUADS];
shared vec4 ds[2][QUADS];
shared uvec4 xs[2][TILE_ROWS][3]; // 8 words of integers, scale, their sum, 2 that spread the rows

void main()
{
    uint t = gl_LocalInvocationIndex, tx = t % 16, ty = t / 16;
    uint o = work_group() * MATMUL_TILE, first = gl_WorkGroupID.y * TILE_ROWS;
    uint n_blocks = push.w.n_in / 32;
    // which integers of two blocks
    bool by_line = LAYOUT != ROWS;
    uint at = by_line ? t % QUADS : t % 128 / 4, group = by_line ? t / QUADS % 4 : t % 4;
    uint half_of_two = t / 128;
    quad q = quad_at(push.w, o + at * 4);
    precise vec4 sum[N_ROWS][2], total[N_ROWS][2];

    [[unroll]] for (uint r = 0; r < N_ROWS; r++)
        total[r][0] = total[r][1] = vec4(0);
    for (uint s = 0; s < min(n_blocks, MATMUL_SEGMENTS); s++) {
        [[unroll]] for (uint r = 0; r < N_ROWS; r++)
            sum[r][0] = sum[r][1] = vec4(0);
        for (uint b = s; b < n_blocks; b += 2 * MATMUL_SEGMENTS) {
            uint mine = b + half_of_two * MATMUL_SEGMENTS;
            uint n = b + MATMUL_SEGMENTS < n_blocks ? 2 : 1;

            barrier();
            if (mine < n_blocks) {
                uvec4 low, high;

                quad_integers(push.w, q, mine, group, low, high);
                ws[half_of_two][group * 2][at] = low;
                ws[half_of_two][group * 2 + 1][at] = high;
                if (group == 0)
                    ds[half_of_two][at] = quad_scales(push.w, q, mine);
                for (uint i = t % 128; i < TILE_ROWS * 2; i += 128)
                    xs[half_of_two][i / 2][i % 2] =
                        integer_activations(first + i / 2, mine * 32 + i % 2 * 16);
                for (uint i = t % 128; i < TILE_ROWS; i += 128)
                    xs[half_of_two][i][2].xy = activation_scale(first + i, mine);
            }
            barrier();
            for (uint h = 0; h < n; h++) {
                ivec4 v[N_ROWS][2];

                [[unroll]] for (uint r = 0; r < N_ROWS; r++)
                    v[r][0] = v[r][1] =
                        ivec4(-INTEGER_OFFSET * int(xs[h][r * 16 + ty][2].y));
                [[unroll]] for (uint k = 0; k < FOUR / 2; k++) {
                    uvec4 x[N_ROWS];

                    [[unroll]] for (uint r = 0; r < N_ROWS; r++)
                        x[r] = xs[h][r * 16 + ty][k];
                    [[unroll]] for (uint j = 0; j < FOUR; j++) {
                        uvec4 w0 = ws[h][k * 4 + j][tx], w1 = ws[h][k * 4 + j][16 + tx];

                        [[unroll]] for (uint r = 0; r < N_ROWS; r++)
                            [[unroll]] for (uint c = 0; c < FOUR; c++) {
                                v[r][0][c] = dot8(w0[c], x[r][j], v[r][0][c]);
                                v[r][1][c] = dot8(w1[c], x[r][j], v[r][1][c]);
                            }
                    }
                }
                [[unroll]] for (uint r = 0; r < N_ROWS; r++) {
                    vec4 x_scale = vec4(uintBitsToFloat(xs[h][r * 16 + ty][2].x));
                    precise vec4 scaled0 = vec4(v[r][0]) * ds[h][tx];
                    precise vec4 scaled1 = vec4(v[r][1]) * ds[h][16 + tx];

                    sum[r][0] = fma(scaled0, x_scale, sum[r][0]);
                    sum[r][1] = fma(scaled1, x_scale, sum[r][1]);
                }
            }
        }
        [[unroll]] for (uint r = 0; r < N_ROWS; r++) {
            total[r][0] += sum[r][0];
            total[r][1] += sum[r][1];
        }
    }
    [[unroll]] for (uint r = 0; r < N_ROWS; r++)
        [[unroll]] for (uint h = 0; h < FOUR / 2; h++) {
            uint row = first + r * 16 + ty, out_at = o + (h * 16 + tx) * 4;

            [[unroll]] for (uint j = 0; j < FOUR; j++)
                if (row < push.n && out_at + j < push.w.n_out)
                    Floats(push.y).v[row * push.ld_y + out_at + j] = total[r][h][j];
        }
}
