/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The probe's reading, compiled once for each level: with vectors as wide as it has. Two places at
 * a time and asked for ahead, as the kernels read weights: one stream, left to the processor's own
 * prefetching, reads up to a third less.
 */

#include <stddef.h>
#include <stdint.h>

#define PROBE_AHEAD 32 /* lines */

typedef uint64_t probe_line __attribute__((vector_size(64)));

static inline uint64_t probe_read_lines(const void *data, size_t bytes)
{
    size_t half = bytes / sizeof(probe_line) / 2;
    const probe_line *x = data, *y = x + half;
    probe_line v0 = {0}, v1 = {0}, v2 = {0}, v3 = {0};
    uint64_t sum = 0;

    for (size_t i = 0; i < half; i += 4) {
        for (size_t k = i + PROBE_AHEAD; k < i + PROBE_AHEAD + 4; k++) {
            __builtin_prefetch((const char *)data + k * sizeof(*x), 0, 3);
            __builtin_prefetch((const char *)data + (half + k) * sizeof(*x), 0, 3);
        }
        v0 |= x[i] | y[i];
        v1 |= x[i + 1] | y[i + 1];
        v2 |= x[i + 2] | y[i + 2];
        v3 |= x[i + 3] | y[i + 3];
    }
    v0 |= v1 | v2 | v3;
    for (size_t k = 0; k < 8; k++)
        sum += v0[k];
    return sum;
}
