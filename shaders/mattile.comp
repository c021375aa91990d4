// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-matmul.h"
#include "shaders/weights.glsl"

// Matrix product of many rows of f32 activations: a work group has 128 outputs of 16 * N_ROWS rows,
// a thread 8 by N_ROWS. Block by block, half of the threads decode weights into shared memory, each
// once for all rows; the others bring the activations. Segment follows segment, so that the sums
// run in the same order as in matvec.comp.

layout(constant_id = 2) const uint N_ROWS = 4; // of a thread

layout(local_size_x = 256) in;
PUSH(matmul_push)
#include "shaders/activations.glsl"

const uint QUADS = MATMUL_TILE / 4;

shared vec4 ws[32][QUADS];
shared vec4 xs[16 * N_ROWS][9]; // [8], and 1 that spreads the rows over the banks

void main()
{
    uint t = gl_LocalInvocationIndex, tx = t % 16, ty = t / 16;
    uint o = work_group() * MATMUL_TILE, first = gl_WorkGroupID.y * 16 * N_ROWS;
    uint n_blocks = (push.w.n_in + 31) / 32;
    bool decodes = t < 128;
    // which weights of a block: neighbours read what lies side by side
    bool by_line = LAYOUT == TILE16 || LAYOUT == COLS;
    uint at = by_line ? t % QUADS : t % 128 / 4, group = by_line ? t / QUADS % 4 : t % 4;
    quad q = quad_at(push.w, o + at * 4);
    precise vec4 sum[N_ROWS][2], total[N_ROWS][2];

    [[unroll]] for (uint r = 0; r < N_ROWS; r++)
        total[r][0] = total[r][1] = vec4(0);
    for (uint s = 0; s < min(n_blocks, MATMUL_SEGMENTS); s++) {
        [[unroll]] for (uint r = 0; r < N_ROWS; r++)
            sum[r][0] = sum[r][1] = vec4(0);
        for (uint b = s; b < n_blocks; b += MATMUL_SEGMENTS) {
            barrier();
            if (decodes) {
                vec4 w[8];

                if (QUANTIZED) {
                    uvec4 low, high;

                    quad_integers(push.w, q, b, group, low, high);
                    integer_weights(low, high, quad_scales(push.w, q, b), w);
                } else {
                    plain_weights(push.w, q, b * 32 + group * 8, w);
                }
                [[unroll]] for (uint i = 0; i < 2 * FOUR; i++)
                    ws[group * 8 + i][at] = w[i];
            } else {
                [[unroll]] for (uint i = 0; i < N_ROWS; i++) {
                    uint r = i * 16 + t % 128 / 8;

                    xs[r][t % 8] = activations(first + r, b * 32 + t % 8 * 4);
                }
            }
            barrier();
            for (uint k = 0; k < 8; k++) {
                vec4 x[N_ROWS];

                [[unroll]] for (uint r = 0; r < N_ROWS; r++)
                    x[r] = xs[r * 16 + ty][k];
                [[unroll]] for (uint j = 0; j < FOUR; j++) {
                    vec4 w0 = ws[k * 4 + j][tx], w1 = ws[k * 4 + j][16 + tx];

                    [[unroll]] for (uint r = 0; r < N_ROWS; r++) {
                        sum[r][0] = fma(w0, vec4(x[r][j]), sum[r][0]);
                        sum[r][1] = fma(w1, vec4(x[r][j]), sum[r][1]);
                    }
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
