/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* The AVX-512 level (F, BW, DQ, VL, VNNI): what it does better than AVX2 it builds upon. */

#include "backends/cpu/avx512.h"

void cpu_use_avx512(struct cpu_backend *c)
{
    c->lower_matmul = c->ops.matmul;
    c->ops.matmul = cpu_avx512_matmul;
    cpu_avx512_use_ops(c);
    c->ops.attention = cpu_avx512_attention;
    c->ops.sparse_ffn = cpu_avx512_sparse_ffn;
}
