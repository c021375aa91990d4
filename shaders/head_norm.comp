// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-rows.h"
#include "shaders/rows.glsl"

// x := rms(x; w, eps) of a head, then its values i and i + dim / 2 are rotated. A work group for
// each head of each row. What is written depends on the sum, and that on all that is read before.

PUSH(head_norm_push)

void main()
{
    uint dim = push.head_dim, half_dim = dim / 2;
    Floats x = Floats(row_address(row_address(push.x, gl_WorkGroupID.y, push.ld),
                                  gl_WorkGroupID.x, dim));
    Floats rope = Floats(row_address(push.rope, gl_WorkGroupID.y, dim));
    Floats w = Floats(push.w);
    rms r = row_rms(x, dim, push.eps, false);

    for (uint k = gl_LocalInvocationID.x; k < half_dim; k += WIDTH) {
        precise float a = row_normed(x.v[k], r), b = row_normed(x.v[k + half_dim], r);

        if (push.has_w != 0) {
            a = a * w.v[k];
            b = b * w.v[k + half_dim];
        }
        if (push.has_rope != 0) {
            float cosine = rope.v[k], sine = rope.v[k + half_dim];
            precise float turned = a * cosine - b * sine;

            b = b * cosine + a * sine;
            a = turned;
        }
        x.v[k] = a;
        x.v[k + half_dim] = b;
    }
    // without rotation dim may be odd
    if (dim % 2 != 0 && gl_LocalInvocationID.x == 0) {
        precise float a = row_normed(x.v[dim - 1], r);

        if (push.has_w != 0)
            a = a * w.v[dim - 1];
        x.v[dim - 1] = a;
    }
}
