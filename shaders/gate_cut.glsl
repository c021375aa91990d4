// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#ifndef LLMD_GATE_CUT_GLSL
#define LLMD_GATE_CUT_GLSL

// What is cut off a gate: mean + z * deviation of a row (§3.7), in pairs: what is left of a gate
// that is barely above it is the difference of two numbers that are nearly the same.

#include "shaders/rows.glsl"

struct gate_cut { // of gates times scale
    vec2 cut;
    float scale;
};

gate_cut row_gate_cut(Floats gate, uint n, float z)
{
    gate_cut c = gate_cut(vec2(0), 1);

    for (int pass = 0; pass < 2; pass++) {
        vec2 sum = vec2(0), squares = vec2(0);

        for (uint i = gl_LocalInvocationID.x; i < n; i += WIDTH) {
            precise float g = gate.v[i] * c.scale;

            sum = pair_add(sum, vec2(g, 0));
        }

        vec2 mean = pair_divide(group_sum(sum), vec2(float(n), 0));

        for (uint i = gl_LocalInvocationID.x; i < n; i += WIDTH) {
            precise float g = gate.v[i] * c.scale;
            vec2 d = pair_add(vec2(g, 0), -mean);

            squares = pair_add(squares, pair_multiply(d, d));
        }
        squares = group_sum(squares);

        vec2 deviation = pair_root(pair_divide(squares, vec2(float(n), 0)));
        float scale = rescue(squares.x, 0);

        c.cut = pair_add(mean, pair_multiply(vec2(z, 0), deviation));
        if (scale == 1)
            break;
        if (pass == 0)
            c.scale = scale;
    }
    return c;
}

// max(gate - cut, 0)
float gate_left(float gate, gate_cut c)
{
    precise float g = gate * c.scale;
    vec2 d = two_sum(g, -c.cut.x);
    precise float left = (d.x + (d.y - c.cut.y)) * inverse_scale(c.scale);

    return left > 0 ? left : 0;
}

#endif
