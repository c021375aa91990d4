// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"

// x := c tanh(x / c), below c for all x. One invocation for each value.

layout(local_size_x_id = 0) in;
PUSH(softcap_push)

void main()
{
    uint i = gl_GlobalInvocationID.x;

    if (i < push.n)
        Floats(push.x).v[i] = push.c * tanh(Floats(push.x).v[i] / push.c);
}
