/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* The probe with AVX-512: VPDPBUSD and FMA, more chains than either takes cycles. See avx2-probe.c
 */

#include <immintrin.h>

#include "backends/cpu/probe-read.h"
#include "backends/cpu/probe.h"

#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define HIDE(v) __asm__("" : "+v"(v))
#define KEEP(i) __asm__ volatile("" ::"v"(w##i));

static uint64_t read_lines(const void *data, size_t bytes)
{
    return probe_read_lines(data, bytes);
}

static void multiply_int8(uint64_t n_rounds)
{
    const __m512i a = _mm512_set1_epi8(7);
    __m512i b = _mm512_set1_epi8(-3);
#define DECLARE(i) __m512i w##i = _mm512_setzero_si512();
#define PART(i) HIDE(w##i);
#define STEP(i) w##i = _mm512_dpbusd_epi32(w##i, a, b);
    TWELVE(DECLARE)

    TWELVE(PART)

    for (uint64_t n = 0; n < n_rounds; n++) {
        HIDE(b);
        TWELVE(STEP)
    }
    TWELVE(KEEP)
#undef DECLARE
#undef STEP
}

static void multiply_f32(uint64_t n_rounds)
{
    const __m512 a = _mm512_set1_ps(0.5f);
    __m512 b = _mm512_set1_ps(0.25f);
#define DECLARE(i) __m512 w##i = _mm512_setzero_ps();
#define STEP(i) w##i = _mm512_fmadd_ps(a, b, w##i);
    TWELVE(DECLARE)

    TWELVE(PART)

    for (uint64_t n = 0; n < n_rounds; n++) {
        HIDE(b);
        TWELVE(STEP)
    }
    TWELVE(KEEP)
}

void probe_use_avx512(struct probe_kernels *k)
{
    k->read = read_lines;
    k->multiply[PROBE_INT8] = (struct probe_multiply_kernel){multiply_int8, 12 * 128};
    k->multiply[PROBE_F32] = (struct probe_multiply_kernel){multiply_f32, 12 * 32};
}
