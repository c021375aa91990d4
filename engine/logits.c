/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "engine/logits.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "base/checked.h"

/* A block as it is, or a copy of the row's incomplete last one, filled up with -infinity. */
static inline const float *block_of(const float *x, size_t n, float *space)
{
    if (n >= LOGITS_BLOCK)
        return x;
    for (size_t i = 0; i < LOGITS_BLOCK; i++)
        space[i] = i < n ? x[i] : -INFINITY;
    return space;
}

#define VARIANT(name) name##_baseline
#define TARGET
#define LANES 2
#define LINKAGE
#include "engine/logits-variant.h"

#ifdef __x86_64__

#define VARIANT(name) name##_avx2
#define TARGET __attribute__((target("avx2")))
#define LANES 4
#define LINKAGE static
#include "engine/logits-variant.h"

#define VARIANT(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw")))
#define LANES 8
#define LINKAGE static
#include "engine/logits-variant.h"

const struct logits_passes *logits_passes(size_t i)
{
    static const struct logits_passes *const best_first[] = {&logits_avx512, &logits_avx2,
                                                             &logits_baseline};
    size_t first = 2;

    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        first = 0;
    else if (__builtin_cpu_supports("avx2"))
        first = 1;
    return first + i < ARRAY_SIZE(best_first) ? best_first[first + i] : NULL;
}

#else

const struct logits_passes *logits_passes(size_t i)
{
    return i == 0 ? &logits_baseline : NULL;
}

#endif
