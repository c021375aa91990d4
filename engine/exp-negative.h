/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdint.h>
#include <string.h>

/*
 * exp(d) for d <= 0, relative error below 2^-50; 0 from -700 down, and for NaN. The same bits on
 * every machine, which libm does not promise: 2^k times the Taylor series on [-ln2/2, ln2/2], in
 * operations that IEEE 754 rounds in one way (so nothing may contract them), and without a branch,
 * so that loops of it are vectorised.
 */
static inline double exp_negative(double d)
{
    const double magic = 0x1.8p52; /* adding and subtracting it rounds to an integer */
    double t = d * 0x1.71547652b82fep0 + magic, k = t - magic;
    double r = (d - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33; /* ln 2, high and low part */
    double p, e;
    uint64_t bits;

    p = 1.0 / 6227020800;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1;
    p = p * r + 1;

    memcpy(&bits, &t, sizeof(bits)); /* the last of them are k, which is in -1010 .. 0 */
    bits = (bits << 52) + ((uint64_t)1023 << 52); /* 2^k */
    memcpy(&e, &bits, sizeof(e));
    e *= p;

    memcpy(&bits, &e, sizeof(bits));
    bits &= -(uint64_t)(d > -700); /* a choice by value would be a branch to some compilers */
    memcpy(&e, &bits, sizeof(e));
    return e;
}
