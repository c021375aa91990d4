// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0

// dot8: sum + the product of four signed bytes with four others, exact. With DOT8 by the device's
// own instruction (SPV_KHR_integer_dot_product), which this GLSL has no word for.

#ifdef DOT8

#extension GL_EXT_spirv_intrinsics : require

// OpSDot of packed bytes, format 0: PackedVectorFormat4x8Bit; capabilities DotProduct and
// DotProductInput4x8BitPacked
spirv_instruction(extensions = ["SPV_KHR_integer_dot_product"], capabilities = [6019, 6018],
                  id = 4450) int packed_dot(uint a, uint b, spirv_literal int format);

int dot8(uint a, uint b, int sum)
{
    return packed_dot(a, b, 0) + sum;
}

#else

int dot8(uint a, uint b, int sum)
{
    for (int i = 0; i < 32; i += 8)
        sum += bitfieldExtract(int(a), i, 8) * bitfieldExtract(int(b), i, 8);
    return sum;
}

#endif
