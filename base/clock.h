/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* Clocks, in microseconds as sd-event counts them, and in seconds for rates. */

#include <stdint.h>
#include <time.h>

static inline uint64_t clock_usec(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* CLOCK_MONOTONIC: for what lasts. */
static inline uint64_t now_usec(void)
{
    return clock_usec(CLOCK_MONOTONIC);
}

/* CLOCK_MONOTONIC in seconds, to the nanosecond: for rates and benchmarks. */
static inline double now_seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
