// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460

// Which neurons a row is left with: those whose gate is above mean + z * deviation. A workgroup for
// each row replaces their gates by the difference, and lists them in rising order.
//
// The cut is computed with pairs of floats, whose sum is the number: what is above it in real
// arithmetic is to be above it here, and in single precision some neuron in each hundred rows would
// not be. Everything is scaled by a power of two, so that the largest gate is near 1 and no square
// leaves the range.

#extension GL_GOOGLE_include_directive : require
#include "shaders/math.glsl"
#include "shaders/push-sparse.h"

#define THREADS 256

layout(local_size_x = THREADS) in;

PUSH(sparse_push)

shared uint largest; // bits of a gate without its sign
shared vec2 sums[THREADS];
shared uint mask[THREADS], counts[THREADS];

// The sum of all threads' s, in an order of its own.
vec2 sum_threads(vec2 s)
{
    uint t = gl_LocalInvocationID.x;

    sums[t] = s;
    for (uint n = THREADS / 2; n > 0; n /= 2) {
        barrier();
        if (t < n)
            sums[t] = pair_add(sums[t], sums[t + n]);
    }
    barrier();
    s = sums[0];
    barrier();
    return s;
}

void main()
{
    uint t = gl_LocalInvocationID.x, row = gl_WorkGroupID.x;
    uint at = row * push.ld_gate, work = row * push.ld_work, n = push.ffn, count = 0;
    uint most = 0;
    vec2 mean = vec2(0), deviation = vec2(0), cut;

    if (t == 0)
        largest = 0;
    barrier();
    for (uint k = t; k < n; k += THREADS)
        most = max(most, floatBitsToUint(Floats(push.gate).v[at + k]) & 0x7fffffffu);
    atomicMax(largest, most);
    barrier();
    most = largest;
    if (most >= 0x7f800000u) { // no mean then, and nothing above it
        if (t == 0)
            Words(push.work).v[work] = 0;
        return;
    }
    uint exponent = clamp(most >> 23, 1u, 253u);
    float scale = uintBitsToFloat((254 - exponent) << 23);
    float unscale = uintBitsToFloat(exponent << 23);

    for (uint k = t; k < n; k += THREADS)
        mean = pair_add(mean, vec2(Floats(push.gate).v[at + k] * scale, 0));
    mean = pair_divide(sum_threads(mean), vec2(float(n), 0));
    for (uint k = t; k < n; k += THREADS) {
        vec2 d = pair_add(vec2(Floats(push.gate).v[at + k] * scale, 0), -mean);

        deviation = pair_add(deviation, pair_multiply(d, d));
    }
    deviation = pair_root(pair_divide(sum_threads(deviation), vec2(float(n), 0)));
    cut = pair_add(mean, pair_multiply(deviation, vec2(push.z, 0)));

    for (uint begin = 0; begin < n; begin += 32 * THREADS) {
        uint base, bits;

        mask[t] = 0;
        barrier();
        for (uint i = 0; i < 32; i++) {
            uint word = i * (THREADS / 32) + t / 32, k = begin + i * THREADS + t;

            if (k < n) {
                vec2 d = pair_add(vec2(Floats(push.gate).v[at + k] * scale, 0), -cut);
                precise float g = d.x + d.y;

                if (g > 0) {
                    Floats(push.gate).v[at + k] = g * unscale;
                    atomicOr(mask[word], 1u << t % 32);
                }
            }
        }
        barrier();
        bits = mask[t];
        counts[t] = bitCount(bits);
        for (uint step = 1; step < THREADS; step *= 2) { // sums of all up to t
            uint before;

            barrier();
            before = t >= step ? counts[t - step] : 0;
            barrier();
            counts[t] += before;
        }
        barrier();
        base = work + SPARSE_LIST + count + counts[t] - bitCount(bits);
        count += counts[THREADS - 1];
        for (; bits != 0; bits &= bits - 1)
            Words(push.work).v[base++] = begin + 32 * t + findLSB(bits);
        barrier();
    }
    if (t == 0)
        Words(push.work).v[work] = count;
}
