// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0

// activations: reads what is multiplied, 16 bytes at a time. Those are read at once where rows lie
// so, which is asked of the push constants, so that all threads agree.

// f32: the values of k..k + 3, k % 4 == 0; 0 beyond the row and the rows
vec4 activations(uint row, uint k)
{
    uint at = row * push.ld_x + k;
    vec4 x = vec4(0);

    if (row >= push.n || k >= push.w.n_in)
        return x;
    if (((push.x.x | push.ld_x * 4 | push.w.n_in * 4) & 15) == 0)
        return uintBitsToFloat(In4(push.x).v[at / 4]);
    for (uint i = 0; i < 4; i++)
        if (k + i < push.w.n_in)
            x[i] = Floats(push.x).v[at + i];
    return x;
}

// int8: the bytes of k..k + 15, k % 16 == 0, within the row. Rows beyond give those of the last.
uvec4 integer_activations(uint row, uint k)
{
    uint at = (min(row, push.n - 1) * push.ld_x + k) / 4;

    if ((push.x.x & 15) == 0)
        return In4(push.x).v[at / 4];
    return uvec4(Words(push.x).v[at], Words(push.x).v[at + 1], Words(push.x).v[at + 2],
                 Words(push.x).v[at + 3]);
}

// The scale of a block, as bits, and the sum of its integers
uvec2 activation_scale(uint row, uint b)
{
    uint at = min(row, push.n - 1) * (push.ld_x / 32) + b;

    return uvec2(Words(push.d).v[at], Words(push.sum).v[at]);
}
