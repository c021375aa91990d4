// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#ifndef LLMD_ROWS_GLSL
#define LLMD_ROWS_GLSL

// Sums over a row by one work group of WIDTH invocations, a power of two: each sums every WIDTH-th
// value, then they are added as a tree. So the order depends on the row's length alone. Sums are
// pairs: squares that are rounded once each leave the root half of that.
//
// Every invocation of the work group calls these, with the same arguments.

#include "shaders/address.glsl"
#include "shaders/math.glsl"

layout(constant_id = 0) const uint WIDTH = 128;
layout(local_size_x_id = 0) in;

shared vec2 parts[WIDTH];

// The sum over the work group; everything that it read or wrote before is done.
vec2 group_sum(vec2 mine)
{
    uint i = gl_LocalInvocationID.x;

    parts[i] = mine;
    barrier();
    for (uint step = WIDTH / 2; step > 0; step /= 2) {
        if (i < step)
            parts[i] = pair_add(parts[i], parts[i + step]);
        barrier();
    }

    vec2 sum = parts[0];

    barrier();
    return sum;
}

// Sum of (scale x)^2; exact: without the squares' own rounding, up to 2^-24 each
vec2 square_sum(Floats x, uint n, float scale, bool exact)
{
    vec2 sum = vec2(0);

    for (uint i = gl_LocalInvocationID.x; i < n; i += WIDTH) {
        precise float v = x.v[i] * scale;

        if (exact) {
            sum = pair_add(sum, two_product(v, v));
        } else {
            precise float square = v * v;
            vec2 s = two_sum(sum.x, square);
            precise float low = sum.y + s.y;

            sum = vec2(s.x, low);
        }
    }
    return group_sum(quick_two_sum(sum.x, sum.y));
}

const float TINY = 8.271806125530277e-25; // 2^-80
const float HUGE = 1.2089258196146292e24;  // 2^80

// Whether squares have left the range of floats, or come near: then everything is computed from
// values times 2^-80 or 2^80. A sum so small does not matter where something far larger is added.
float rescue(float sum, float added)
{
    // as bits: an infinity or NaN need not compare as one
    if ((floatBitsToUint(sum) & 0x7fffffffu) >= floatBitsToUint(HUGE))
        return TINY;
    return sum < TINY && added < 9.094947e-13 ? HUGE : 1;
}

// Of a power of two
float inverse_scale(float scale)
{
    return uintBitsToFloat((254u << 23) - floatBitsToUint(scale));
}

// mean((scale x)^2), and that scale, which is 1 but for extreme values
struct mean_square {
    vec2 value;
    float scale;
};

mean_square row_mean_square(Floats x, uint n, float added, bool exact)
{
    vec2 sum = square_sum(x, n, 1, exact);
    float scale = rescue(sum.x, added);

    if (scale != 1)
        sum = square_sum(x, n, scale, exact);
    return mean_square(pair_divide(sum, vec2(float(n), 0)), scale);
}

// x / sqrt(mean(x^2) + eps) is (x * scale) * factor
struct rms {
    vec2 factor;
    float scale;
};

rms row_rms(Floats x, uint n, float eps, bool exact)
{
    mean_square m = row_mean_square(x, n, eps, exact);
    precise float added = eps * m.scale * m.scale;

    return rms(pair_inverse_root(pair_add(m.value, vec2(added, 0))), m.scale);
}

float row_normed(float x, rms r)
{
    precise float y = (x * r.scale) * r.factor.x;

    return y;
}

#endif
