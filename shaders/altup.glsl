// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#ifndef LLMD_ALTUP_GLSL
#define LLMD_ALTUP_GLSL

// The router of AltUp, and the sums of its coefficients, in pairs: they may cancel, and what is
// left is multiplied with values whose errors are to be those of the products.

#include "shaders/rows.glsl"

#define MAX_STREAMS 8

// 0: any number, the push constants say which
layout(constant_id = 1) const uint STREAMS = 0;

shared vec2 modalities[MAX_STREAMS];
shared float sums[MAX_STREAMS * MAX_STREAMS];

// modalities[j] = tanh(router[j] . (rms(x; norm, eps) / hidden)); seen by all
void route(Floats x, Floats norm, uvec2 router, uint hidden, uint n, float eps)
{
    rms r = row_rms(x, hidden, eps, true);

    for (uint j = 0; j < n; j++) {
        Floats w = Floats(row_address(router, j, hidden));
        vec2 sum = vec2(0);

        for (uint k = gl_LocalInvocationID.x; k < hidden; k += WIDTH) {
            precise float v = x.v[k] * r.scale;
            vec2 p = pair_multiply(two_product(v, norm.v[k]), vec2(w.v[k], 0));

            sum = pair_add(sum, p);
        }
        sum = group_sum(sum);
        if (gl_LocalInvocationID.x == j)
            modalities[j] =
                pair_tanh(pair_divide(pair_multiply(sum, r.factor), vec2(float(hidden), 0)));
    }
    barrier();
}

// sums[i] = first + coefs[i] . modalities for i below count; seen by all
void mix(Floats coefs, uint count, uint n, float first)
{
    for (uint i = gl_LocalInvocationID.x; i < count; i += WIDTH) {
        vec2 sum = vec2(first, 0);

        for (uint s = 0; s < n; s++)
            sum = pair_add(sum, pair_multiply(vec2(coefs.v[i * n + s], 0), modalities[s]));
        sums[i] = pair_float(sum);
    }
    barrier();
}

#endif
