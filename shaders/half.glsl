// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0

// half: of weights and scales, decoded by integers: a half that is denormal counts, and
// unpackHalf2x16() may lose it.

// The lower 16 bits. Infinities become large numbers: they come from hostile files only.
float half_float(uint h)
{
    uint m = h & 0x7fff;
    precise float denormal = float(m) * (1.0 / 16777216);
    uint f = m < 0x400 ? floatBitsToUint(denormal) : (m << 13) + (112u << 23);

    return uintBitsToFloat(f | (h & 0x8000) << 16);
}

vec2 half_pair(uint h) // the lower one first
{
    return vec2(half_float(h), half_float(h >> 16));
}
