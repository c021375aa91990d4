/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * dequantize: the values of foreign tensors, from the bytes of one row. Formats: plain F32, F16 and
 * BF16, and GGUF's blocks as its documentation describes them. Pure; any thread.
 */

#include <stddef.h>
#include <stdint.h>

#include "tools/import/gguf.h"

/*
 * x[0..n) from whole blocks at data, unaligned; n is a multiple of gguf_block_values(type). What is
 * not finite in the file is not finite in x; each product is computed as the format's reference
 * does, in f32.
 */
void dequantize(enum gguf_tensor_type type, const void *data, size_t n, float *x);

/*
 * Q4_0 and Q8_0 only: integers and scales as they are, q [n], d [n / 32] f16 bits. A Q4_0 block's
 * q is -8..7, so that it is a block of Q8_0 with the same scale as well.
 */
void dequantize_q(enum gguf_tensor_type type, const void *data, size_t n, int8_t *q, uint16_t *d);
