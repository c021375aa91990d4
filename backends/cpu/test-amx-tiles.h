/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdint.h>

struct tile_config;

/* Sums += A B by the instructions; tile 0 and 3 are sums, 1 is A, 2 is B, rows 64 bytes apart. */
void real_tile_products(const struct tile_config *config, const void *a, const void *b,
                        int32_t *int8_sums, float *bf16_sums);
