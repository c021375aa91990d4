/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * quantize: floats to the blocks of 32 of q4 and q8 (backends/weight.h): q integers and one f16
 * scale d, value = d * q.
 *
 *   q8  d = max |x| / 127 rounded to f16, q = x / d rounded to nearest
 *   q4  the scale is searched for the least sum of squared errors. Never worse than GGUF Q4_0's
 *       rule (d = x / -8 for the x of largest magnitude): that is the first candidate
 *
 * The result depends on the values only, not on the machine's vector width. Pure; any thread.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backends/weight.h"

/*
 * x [n], finite, n % 32 == 0; q [n]; d [n / 32] f16 bits.
 * false when a block's scale does not fit f16, that is when some |x| is beyond 500000
 */
bool quantize(enum weight_type type, const float *x, size_t n, int8_t *q, uint16_t *d);

/* The same without the wider registers this CPU may have: for the test that says so. */
bool quantize_portable(enum weight_type type, const float *x, size_t n, int8_t *q, uint16_t *d);
