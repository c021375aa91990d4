// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/altup.glsl"

// h[i] = pred[i] + (1 + coef[i]) (b - pred[0]), the coefficients by the router of b; scaled is h[0]
// times scale. A work group for each row; h may be pred.

PUSH(altup_correct_push)

void main()
{
    uint n = STREAMS != 0 ? STREAMS : push.n_streams, hidden = push.hidden;
    uint row = gl_WorkGroupID.x;
    Floats pred = Floats(row_address(push.pred, row, n * hidden));
    Floats h = Floats(row_address(push.h, row, n * hidden));
    Floats b = Floats(row_address(push.b, row, hidden));
    Floats scaled = Floats(row_address(push.scaled, row, hidden));
    Floats scale = Floats(push.scale);

    route(b, Floats(push.norm), push.router, hidden, n, push.eps);
    mix(Floats(push.coefs), n, n, 1);
    for (uint k = gl_LocalInvocationID.x; k < hidden; k += WIDTH) {
        precise float d = b.v[k] - pred.v[k];

        for (uint i = 0; i < n; i++) {
            precise float v = pred.v[i * hidden + k] + sums[i] * d;

            h.v[i * hidden + k] = v;
            if (i == 0) {
                precise float s = v * scale.v[k];

                scaled.v[k] = s;
            }
        }
    }
}
