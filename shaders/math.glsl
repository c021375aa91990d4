// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#ifndef LLMD_MATH_GLSL
#define LLMD_MATH_GLSL

// Functions with errors of their own making. What Vulkan promises for 32 bits is this: addition,
// subtraction and multiplication give one of the two floats around the exact result, or the result
// itself (half of an ulp or a whole one, by the device); fma() may round twice; division is off by
// up to 2.5 ulp, inversesqrt() by 2, sqrt() by both, exp(x) by 3 + 2 |x|, and tanh() by what these
// add up to. Subnormal numbers may count as 0. So exp and tanh are polynomials here, and division
// and roots get a step of Newton's.
//
// A pair is a value in two floats, (high, low), |low| <= ulp(high): about 44 bits. It stands in for
// double, which many GPUs lack.
//
// "precise" keeps the compilers from contracting and reordering: the errors are counted on that,
// and that a row's bits are the same in every kernel.

// a + b
vec2 two_sum(float a, float b)
{
    precise float s = a + b;
    precise float t = s - a;
    precise float e = (a - (s - t)) + (b - t);

    return vec2(s, e);
}

// a + b where |a| >= |b| or a = 0
vec2 quick_two_sum(float a, float b)
{
    precise float s = a + b;
    precise float e = b - (s - a);

    return vec2(s, e);
}

// The 12 leading bits of a; a minus them is exact, and has 11 and a sign.
float leading_bits(float a)
{
    return uintBitsToFloat((floatBitsToUint(a) + 0x800u) & 0xfffff000u);
}

// a * b, exactly but for underflow, and without relying on what fma() rounds
vec2 two_product(float a, float b)
{
    float ah = leading_bits(a), bh = leading_bits(b);
    precise float al = a - ah, bl = b - bh;
    precise float p = a * b;
    precise float e = ((ah * bh - p) + ah * bl + al * bh) + al * bl;

    return vec2(p, e);
}

// Off by 2^-44 (|a| + |b|)
vec2 pair_add(vec2 a, vec2 b)
{
    vec2 s = two_sum(a.x, b.x);
    precise float low = s.y + (a.y + b.y);

    return quick_two_sum(s.x, low);
}

vec2 pair_multiply(vec2 a, vec2 b)
{
    vec2 p = two_product(a.x, b.x);
    precise float low = p.y + (a.x * b.y + a.y * b.x);

    return quick_two_sum(p.x, low);
}

vec2 pair_divide(vec2 a, vec2 b)
{
    precise float q = a.x / b.x;
    vec2 p = two_product(q, b.x);
    precise float rest = (((a.x - p.x) - p.y) + a.y) - q * b.y;
    precise float low = rest / b.x;

    return quick_two_sum(q, low);
}

// a >= 0
vec2 pair_root(vec2 a)
{
    if (!(a.x > 0))
        return vec2(0);

    precise float r = sqrt(a.x);
    vec2 p = two_product(r, r);
    precise float rest = ((a.x - p.x) - p.y) + a.y;
    precise float low = rest / (2 * r);

    return quick_two_sum(r, low);
}

// a^(-1/2), and 0 of 0
vec2 pair_inverse_root(vec2 a)
{
    if (!(a.x > 0))
        return vec2(0);

    precise float r = inversesqrt(a.x);
    vec2 p = pair_multiply(two_product(r, r), a);
    precise float rest = (1 - p.x) - p.y;
    precise float low = r * (0.5 * rest);

    return quick_two_sum(r, low);
}

float pair_float(vec2 a)
{
    precise float f = a.x + a.y;

    return f;
}

// 2^k, k in -126..127
float power_of_two(int k)
{
    return uintBitsToFloat(uint(k + 127) << 23);
}

// (e^r - 1 - r - r^2 / 2) / r^3 for |r| <= 0.347, to 1e-8
float exp_tail(float r)
{
    precise float t = 0.0001988291202;

    t = fma(t, r, 0.00139263759958);
    t = fma(t, r, 0.0083333207585);
    t = fma(t, r, 0.0416665534587);
    t = fma(t, r, 0.166666666667);
    return t;
}

// ln 2 in parts of 14 bits, so that products with numbers below 2^10 are exact, and the rest
const float LN2_HIGH = 0.69317626953125;
const float LN2_MIDDLE = -2.9088929295539856e-5;
const float LN2_LOW = -4.2009150726810847e-11;
const float LOG2_E = 1.44269504089;

// e^x, relative error 2^-22; below -87 it is 0, above 88 it is that of 88.
float exponential(float x)
{
    precise float k = roundEven(clamp(x, -87.0, 88.0) * LOG2_E);
    precise float r = (clamp(x, -87.0, 88.0) - k * LN2_HIGH) - k * LN2_MIDDLE;
    precise float e = fma(fma(exp_tail(r), r, 0.5), r * r, r) + 1;
    precise float scaled = e * power_of_two(int(k));

    return x < -87.0 ? 0 : scaled;
}

// e^x for -80 <= x <= 80, relative error 2^-28
vec2 pair_exponential(vec2 x)
{
    precise float k = roundEven(x.x * LOG2_E);
    precise float high = x.x - k * LN2_HIGH;
    vec2 r = two_sum(high, -(k * LN2_MIDDLE));
    precise float low = r.y + (x.y - k * LN2_LOW);

    r = quick_two_sum(r.x, low);

    vec2 square = two_product(r.x, r.x);
    precise float tail = r.x * square.x * exp_tail(r.x);
    precise float rest = 0.5 * square.y + r.x * r.y + tail;
    vec2 e = pair_add(pair_add(r, vec2(0.5 * square.x, rest)), vec2(1, 0));
    precise float scale = power_of_two(int(k));
    precise vec2 scaled = e * scale;

    return scaled;
}

// Relative error 2^-26, for |x| from 0.25 on 2^-27
vec2 pair_tanh(vec2 x)
{
    float a = abs(x.x);

    if (a < 0.25) {
        precise float z = x.x * x.x;
        precise float t = 0.0207973930185;

        t = fma(t, z, -0.0539267565779);
        t = fma(t, z, 0.133332816001);
        t = fma(t, z, -0.333333332322);
        precise float low = (x.x * z) * t + x.y * (1 - z);

        return quick_two_sum(x.x, low);
    }
    if (a > 16) // off by 2^-45
        return vec2(sign(x.x), 0);

    precise vec2 twice = x * (x.x < 0 ? 2.0 : -2.0);
    vec2 e = pair_exponential(twice);
    vec2 t = pair_divide(pair_add(vec2(1, 0), -e), pair_add(vec2(1, 0), e));

    return x.x < 0 ? -t : t;
}

// g * (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2, as g / (1 + e^-2...). For |g| <= 9 the error
// is 2^-19 of the result and 2^-30 more; 0 gives 0.
float gelu(float g)
{
    precise float b = clamp(g, -64.0, 64.0);
    precise float twice = b * (1.59576912161 + 0.0713548162726 * (b * b));
    precise float e = exponential(min(-twice, 80.0)); // a divisor has to be below 2^126
    precise float result = max(g, -64.0) / (1 + e);

    return result;
}

#endif
