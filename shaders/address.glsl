// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#ifndef LLMD_ADDRESS_GLSL
#define LLMD_ADDRESS_GLSL

// Row i of rows that are ld floats apart: the product may need more than 32 bits.
uvec2 row_address(uvec2 base, uint i, uint ld)
{
    uint high, low, carry;

    umulExtended(i, ld, high, low);
    high = high << 2 | low >> 30;
    low = uaddCarry(base.x, low << 2, carry);
    return uvec2(low, base.y + high + carry);
}

#endif
