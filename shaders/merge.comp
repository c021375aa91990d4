// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/rows.glsl"

// x = rms(mean over the streams of h; w, eps), from their sums: eps is times n_streams^2. A work
// group for each row.

PUSH(merge_push)

// Sum over the streams, each value times scale; in a pair, as they may cancel
float stream_sum(Floats h, uint k, float scale)
{
    vec2 sum = vec2(0);

    for (uint i = 0; i < push.n_streams; i++) {
        precise float v = h.v[i * push.hidden + k] * scale;

        sum = pair_add(sum, vec2(v, 0));
    }
    return pair_float(sum);
}

vec2 merged_squares(Floats h, float scale)
{
    vec2 sum = vec2(0);

    for (uint k = gl_LocalInvocationID.x; k < push.hidden; k += WIDTH) {
        precise float v = stream_sum(h, k, scale);
        precise float square = v * v;

        sum = pair_add(sum, vec2(square, 0));
    }
    return group_sum(sum);
}

void main()
{
    uint hidden = push.hidden;
    Floats h = Floats(row_address(push.h, gl_WorkGroupID.x, push.n_streams * hidden));
    Floats x = Floats(row_address(push.x, gl_WorkGroupID.x, hidden));
    Floats w = Floats(push.w);
    vec2 sum = merged_squares(h, 1);
    float scale = rescue(sum.x, push.eps);

    if (scale != 1)
        sum = merged_squares(h, scale);

    precise float added = push.eps * scale * scale;
    vec2 mean = pair_divide(sum, vec2(float(hidden), 0));
    float factor = pair_inverse_root(pair_add(mean, vec2(added, 0))).x;

    for (uint k = gl_LocalInvocationID.x; k < hidden; k += WIDTH) {
        precise float v = stream_sum(h, k, scale) * factor * w.v[k];

        x.v[k] = v;
    }
}
