// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/math.glsl"

// x := c tanh(x / c), below c for all x. Each invocation takes several values.

layout(local_size_x_id = 0) in;
PUSH(softcap_push)

void main()
{
    uint step = gl_NumWorkGroups.x * gl_WorkGroupSize.x;

    for (uint i = gl_GlobalInvocationID.x; i < push.n; i += step) {
        float x = Floats(push.x).v[i];
        precise float q = x / push.c;

        if (abs(q) < 16) // else tanh is 1
            q = pair_divide(vec2(x, 0), vec2(push.c, 0)).x;
        precise float e = exponential(-2 * abs(q));
        vec2 t = pair_divide(two_sum(1, -e), two_sum(1, e));
        precise float y = min(push.c * t.x, push.below);

        Floats(push.x).v[i] = x < 0 ? -y : y;
    }
}
