// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/address.glsl"
#include "shaders/math.glsl"

// y = gelu(gate) * up. An invocation for each value.

layout(local_size_x_id = 0) in;
PUSH(gate_push)

void main()
{
    uint k = gl_GlobalInvocationID.x, row = gl_WorkGroupID.y;

    if (k >= push.k)
        return;

    float gate = Floats(row_address(push.gate, row, push.ld_gate)).v[k];
    float up = Floats(row_address(push.up, row, push.ld_up)).v[k];
    precise float y = gelu(gate) * up;

    Floats(row_address(push.y, row, push.ld_y)).v[k] = y;
}
