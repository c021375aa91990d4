// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/rows.glsl"

// ple = (rms(g * g_scale; w, eps) + e) * 2^-1/2, eps being that of unscaled g. A work group for
// each layer of each row.

PUSH(ple_push)

void main()
{
    uint width = push.width, layer = gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x;
    Floats g = Floats(row_address(push.g, layer, width));
    Floats e = Floats(row_address(push.e, layer, width));
    Floats ple = Floats(row_address(push.ple, layer, width));
    Floats w = Floats(push.w);
    rms r = row_rms(g, width, push.eps, false);

    for (uint k = gl_LocalInvocationID.x; k < width; k += WIDTH) {
        precise float v = (row_normed(g.v[k], r) * w.v[k] + e.v[k]) * 0.707106781187;

        ple.v[k] = v;
    }
}
