// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/gate_cut.glsl"

// y = gelu(max(gate - cut, 0)) * up. A work group for each row.

PUSH(gate_push)

void main()
{
    uint row = gl_WorkGroupID.x;
    Floats gate = Floats(row_address(push.gate, row, push.ld_gate));
    Floats up = Floats(row_address(push.up, row, push.ld_up));
    Floats y = Floats(row_address(push.y, row, push.ld_y));
    gate_cut c = row_gate_cut(gate, push.k, push.z);

    for (uint k = gl_LocalInvocationID.x; k < push.k; k += WIDTH) {
        precise float v = gelu(gate_left(gate.v[k], c)) * up.v[k];

        y.v[k] = v;
    }
}
