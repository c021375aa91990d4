// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-matmul.h"
#include "shaders/weights.glsl"

// y[i] = row ids[i] of a weight in LAYOUT_TILE16 or LAYOUT_ROWS, times a scale: one invocation for
// each value, so that what is written lies side by side; neighbours share the words they read.

layout(constant_id = 2) const uint N_THREADS = 64;

layout(local_size_x_id = 2) in;
PUSH(get_rows_push)

void main()
{
    uint k = gl_GlobalInvocationID.x, i = gl_WorkGroupID.y;
    uint row = min(Words(push.ids).v[i], push.w.n_out - 1);
    uint b = k / 32, lane = row % 16, word, shift = 0;
    bool tiled = LAYOUT == TILE16;
    uvec2 data = element(push.w.data, tiled ? row / 16 : row, push.w.step);
    precise float v;

    if (k >= push.w.n_in)
        return;
    switch (TYPE) { // word of a row, and where in it
    case F32:
        word = k;
        break;
    case F16:
    case BF16:
        word = k / 2;
        shift = k % 2 * 16;
        break;
    case Q8:
        word = k / 4;
        shift = k % 4 * 8;
        break;
    case Q4:
        word = tiled ? k / 8 : b * 4 + k % 16 / 4;
        shift = k % 4 * 8 + (tiled ? k % 8 / 4 : k % 32 / 16) * 4;
        break;
    }
    word = In1(data).v[tiled ? word * 16 + lane : word];
    if (TYPE == F32) {
        v = uintBitsToFloat(word);
    } else if (TYPE == F16 || TYPE == BF16) {
        v = element_float(word >> shift & 0xffff);
    } else {
        // the scales begin behind the integers of 1 or 16 rows; as halves:
        uint at = push.w.n_in / (TYPE == Q4 ? 4 : 2) * (tiled ? 16 : 1) +
                  (tiled ? b * 16 + lane : b);
        precise float d = half_float(In1(data).v[at / 2] >> at % 2 * 16);

        v = d * float(TYPE == Q4 ? int(word >> shift & 0xf) - 8
                                 : bitfieldExtract(int(word), int(shift), 8));
    }
    v = v * push.scale;
    Floats(push.y).v[i * push.ld_y + k] = v;
}
