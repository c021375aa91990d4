// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/rows.glsl"

// y = (add + add2 + rms(x; w, eps)) * scale. A work group for each row.

PUSH(norm_push)

void main()
{
    uint row = gl_WorkGroupID.x;
    Floats x = Floats(row_address(push.x, row, push.ld_x));
    Floats add = Floats(row_address(push.add, row, push.ld_add));
    Floats add2 = Floats(row_address(push.add2, row, push.ld_add2));
    Floats y = Floats(row_address(push.y, row, push.ld_y));
    Floats w = Floats(push.w);
    rms r = row_rms(x, push.k, push.eps, false);

    for (uint k = gl_LocalInvocationID.x; k < push.k; k += WIDTH) {
        precise float v = row_normed(x.v[k], r);

        if (push.has_w != 0)
            v = v * w.v[k];
        if (push.has_add != 0)
            v = v + add.v[k];
        if (push.has_add2 != 0)
            v = v + add2.v[k];
        v = v * push.scale;
        y.v[k] = v;
    }
}
