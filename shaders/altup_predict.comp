// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/altup.glsl"

// pred[j] = h[j] + sum of coef[j][i] h[i], the coefficients by the router of h[0]. A work group for
// each row.

PUSH(altup_predict_push)

void main()
{
    uint n = STREAMS != 0 ? STREAMS : push.n_streams, hidden = push.hidden;
    uvec2 h = row_address(push.h, gl_WorkGroupID.x, n * hidden);
    Floats from = Floats(h), to = Floats(row_address(push.pred, gl_WorkGroupID.x, n * hidden));

    route(from, Floats(push.norm), push.router, hidden, n, push.eps);
    mix(Floats(push.coefs), n * n, n, 0);
    for (uint k = gl_LocalInvocationID.x; k < hidden; k += WIDTH) {
        float v[MAX_STREAMS];

        for (uint i = 0; i < n; i++)
            v[i] = from.v[i * hidden + k];
        for (uint j = 0; j < n; j++) {
            precise float a = 0, b = 0; // two sums: fewer roundings in each

            for (uint i = 0; i < n; i++) {
                precise float p = sums[j * n + i] * v[i];

                if (i < 4)
                    a = a + p;
                else
                    b = b + p;
            }
            precise float sum = v[j] + (a + b);

            to.v[j * hidden + k] = sum;
        }
    }
}
