// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/address.glsl"
#include "shaders/push-rows.h"

// y[i] = x[ids[i]], or x[i]. An invocation for each value, which is moved as the word that it is.

layout(local_size_x_id = 0) in;
PUSH(copy_rows_push)

void main()
{
    uint k = gl_GlobalInvocationID.x, row = gl_WorkGroupID.y;

    if (k >= push.k)
        return;

    uint from = push.has_ids != 0 ? Words(push.ids).v[row] : row;

    Words(row_address(push.y, row, push.ld_y)).v[k] =
        Words(row_address(push.x, from, push.ld_x)).v[k];
}
