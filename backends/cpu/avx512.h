/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* The files of the AVX-512 level (F, BW, DQ, VL, VNNI) among themselves. */

#include <immintrin.h>

#include "backends/cpu/cpu.h"

void cpu_avx512_sparse_ffn(struct backend *b, const struct sparse_ffn_args *a);
void cpu_avx512_matmul(struct backend *b, const struct weight *w, const struct activations *x,
                       float *y, size_t ld_y);
void cpu_avx512_attention(struct backend *b, const struct attention_args *a);
