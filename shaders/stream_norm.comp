// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/rows.glsl"

// Streams 1.. of h += rms(x; w, eps). A work group for each row.

PUSH(stream_norm_push)

void main()
{
    uint n = push.n_streams, hidden = push.hidden;
    Floats x = Floats(row_address(push.x, gl_WorkGroupID.x, hidden));
    Floats h = Floats(row_address(push.h, gl_WorkGroupID.x, n * hidden));
    Floats w = Floats(push.w);
    rms r = row_rms(x, hidden, push.eps, false);

    for (uint k = gl_LocalInvocationID.x; k < hidden; k += WIDTH) {
        precise float v = row_normed(x.v[k], r) * w.v[k];

        for (uint i = 1; i < n; i++) {
            precise float sum = h.v[i * hidden + k] + v;

            h.v[i * hidden + k] = sum;
        }
    }
}
