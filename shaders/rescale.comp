// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/rows.glsl"

// h := y * rms(ref) / sqrt(max(mean(y^2), 1e-5)), h being one of the streams. A work group for each
// row; ref may be h.

PUSH(rescale_push)

void main()
{
    uint row = gl_WorkGroupID.x, hidden = push.hidden;
    Floats y = Floats(row_address(push.y, row, hidden));
    Floats ref = Floats(row_address(push.ref, row, push.ld_ref));
    Floats h = Floats(row_address(push.h, row, push.ld_h));
    mean_square from = row_mean_square(y, hidden, 1e-5, false);
    mean_square to = row_mean_square(ref, hidden, 0, false);

    // values so large that they were scaled down are beyond the floor
    if (from.scale == 1 && from.value.x < 1e-5)
        from.value = vec2(1e-5, 0);

    float factor = pair_inverse_root(from.value).x, root = pair_root(to.value).x;
    float size = inverse_scale(to.scale);

    for (uint k = gl_LocalInvocationID.x; k < hidden; k += WIDTH) {
        precise float v = (y.v[k] * from.scale) * factor * root * size;

        h.v[k] = v;
    }
}
