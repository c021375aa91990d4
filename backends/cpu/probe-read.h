/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* The probe's reading, compiled once for each level: with vectors as wide as it has. */

#include <stddef.h>
#include <stdint.h>

typedef uint64_t probe_line __attribute__((vector_size(64)));

static inline uint64_t probe_read_lines(const void *data, size_t bytes)
{
    const probe_line *x = data;
    probe_line v0 = {0}, v1 = {0}, v2 = {0}, v3 = {0};
    uint64_t sum = 0;

    for (size_t i = 0; i < bytes / sizeof(*x); i += 8) {
        v0 |= x[i] | x[i + 4];
        v1 |= x[i + 1] | x[i + 5];
        v2 |= x[i + 2] | x[i + 6];
        v3 |= x[i + 3] | x[i + 7];
    }
    v0 |= v1 | v2 | v3;
    for (size_t k = 0; k < 8; k++)
        sum += v0[k];
    return sum;
}
