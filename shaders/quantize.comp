// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460
#extension GL_GOOGLE_include_directive : require
#include "shaders/push-matmul.h"
#extension GL_EXT_control_flow_attributes : require

// Rounds rows of activations (backend.h, quantize()) to the very bits that the CPU gives. Division
// is what GPUs do not round: here quotients of mantissas are estimated in float and corrected by
// integers, which also spares whatever a device does to denormal numbers. Eight threads have a
// block, each four values: a word of q.

layout(constant_id = 0) const uint N_THREADS = 64; // a multiple of 8

layout(local_size_x_id = 0) in;
PUSH(quantize_push)

shared uint maxima[N_THREADS];
shared int sums[N_THREADS], low_sums[N_THREADS];

const uint INFINITE = 0x7f800000;
const uint LEAST = 0x03fe0000; // 127 * 2^-126: below, the scale would be denormal and is 0 instead

// The float nearest to a / b times 2^exponent, for a and b in 2^23..2^24 - 1, as bits; the result's
// exponent must be one of a normal number. No such quotient lies in the middle of two floats.
uint quotient(uint a, uint b, int exponent)
{
    int shift = a >= b ? 23 : 24;
    precise float estimate = float(a) / float(b) * float(1 << shift); // in 2^23..2^24
    uint q = uint(estimate); // a few units off
    int rest = int((a << shift) - q * b); // the whole, since it is small
    precise float more = floor(float(rest) / float(b));

    q += uint(int(more));
    rest -= int(more) * int(b);
    if (rest < 0) {
        q--;
        rest += int(b);
    } else if (rest >= int(b)) {
        q++;
        rest -= int(b);
    }
    if (2 * rest > int(b))
        q++;
    return (uint(exponent + 127 + 23 - shift - 1) << 23) + q;
}

void main()
{
    uint t = gl_LocalInvocationIndex, row = gl_WorkGroupID.y;
    uint k = (gl_WorkGroupID.x * N_THREADS + t) * 4;
    uint x[4], most = 0, d = 0, q_word = 0, low_word = 0;
    bool has_low = push.q_low != uvec2(0), inside = k < push.ld_q;
    int sum = 0, low_sum = 0;

    [[unroll]] for (uint i = 0; i < 4; i++) {
        x[i] = k + i < push.k ? Words(push.x).v[row * push.ld_x + k + i] : 0;
        if ((x[i] & 0x7fffffff) > INFINITE) // not a number: rounded to 0
            x[i] = 0;
        most = max(most, x[i] & 0x7fffffff); // magnitudes are ordered as their bits are
    }
    maxima[t] = most;
    barrier();
    for (uint i = 0; i < 8; i++)
        most = max(most, maxima[(t & ~7u) + i]);

    if (most == INFINITE) {
        d = INFINITE; // everything rounds to 0
    } else if (most >= LEAST) { // 127 = 127 / 64 * 2^6
        d = quotient(most & 0x7fffff | 0x800000, 127u << 17, int(most >> 23) - 127 - 6);
    }
    if (d != 0 && d != INFINITE)
        [[unroll]] for (uint i = 0; i < 4; i++) {
            uint bits = x[i] & 0x7fffffff, mantissa = bits & 0x7fffff | 0x800000;
            int exponent = int(bits >> 23);
            precise float v, r, low;

            if (bits < 0x800000) { // denormal
                int msb = findMSB(bits);

                mantissa = bits << 23 - msb;
                exponent = msb - 22;
            }
            exponent -= int(d >> 23);
            if (bits == 0 || exponent < -11) // below 2^-10: nothing is left of it
                continue;
            v = uintBitsToFloat(quotient(mantissa, d & 0x7fffff | 0x800000, exponent) |
                                x[i] & 0x80000000);
            r = roundEven(v);
            low = (v - r) * 254;
            low = roundEven(low);
            sum += int(r);
            low_sum += int(low);
            q_word |= (uint(int(r)) & 0xff) << 8 * i;
            low_word |= (uint(int(low)) & 0xff) << 8 * i;
        }
    sums[t] = sum;
    low_sums[t] = low_sum;
    barrier();
    if (!inside)
        return;
    Words(push.q).v[row * (push.ld_q / 4) + k / 4] = q_word;
    if (has_low)
        Words(push.q_low).v[row * (push.ld_q / 4) + k / 4] = low_word;
    if (t % 8 == 0) {
        uint at = row * (push.ld_q / 32) + k / 32;

        for (uint i = 1; i < 8; i++) {
            sum += sums[t + i];
            low_sum += low_sums[t + i];
        }
        Words(push.d).v[at] = d;
        Ints(push.sum).v[at] = sum;
        if (has_low)
            Ints(push.sum_low).v[at] = low_sum;
    }
}
