/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The probe with AVX2: VPMADDUBSW with sums of 16 bits, eight of which q4's products fit, before
 * they are widened; and FMA. Operands and sums pass through an empty asm, so that the compiler
 * neither merges what is equal nor moves it out of the loop.
 */

#include <immintrin.h>

#include "backends/cpu/probe-read.h"
#include "backends/cpu/probe.h"

#define FOUR(X) X(0) X(1) X(2) X(3)
#define TWELVE(X) FOUR(X) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define HIDE(v) __asm__("" : "+x"(v))

static uint64_t read_lines(const void *data, size_t bytes)
{
    return probe_read_lines(data, bytes);
}

static void multiply_int8(uint64_t n_rounds)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a = _mm256_set1_epi8(7), b = _mm256_set1_epi8(-3);
#define DECLARE(i) __m256i s##i, w##i = _mm256_setzero_si256();
#define FIRST(i) \
    HIDE(a);     \
    s##i = _mm256_maddubs_epi16(a, b);
#define NEXT(i) \
    HIDE(a);    \
    s##i = _mm256_add_epi16(s##i, _mm256_maddubs_epi16(a, b));
#define WIDEN(i) w##i = _mm256_add_epi32(w##i, _mm256_madd_epi16(s##i, ones));
#define KEEP(i) __asm__ volatile("" ::"x"(w##i));
    FOUR(DECLARE)

    for (uint64_t n = 0; n < n_rounds; n++) {
        FOUR(FIRST)
        FOUR(NEXT)
        FOUR(NEXT)
        FOUR(NEXT)
        FOUR(NEXT)
        FOUR(NEXT)
        FOUR(NEXT)
        FOUR(NEXT)
        FOUR(WIDEN)
    }
    FOUR(KEEP)
#undef DECLARE
#undef KEEP
}

static void multiply_f32(uint64_t n_rounds)
{
    const __m256 a = _mm256_set1_ps(0.5f);
    __m256 b = _mm256_set1_ps(0.25f);
#define DECLARE(i) __m256 w##i = _mm256_setzero_ps();
#define PART(i) HIDE(w##i);
#define STEP(i) w##i = _mm256_fmadd_ps(a, b, w##i);
#define KEEP(i) __asm__ volatile("" ::"x"(w##i));
    TWELVE(DECLARE)

    TWELVE(PART)

    for (uint64_t n = 0; n < n_rounds; n++) {
        HIDE(b);
        TWELVE(STEP)
    }
    TWELVE(KEEP)
}

void probe_use_avx2(struct probe_kernels *k)
{
    k->read = read_lines;
    k->multiply[PROBE_INT8] = (struct probe_multiply_kernel){multiply_int8, 4 * 8 * 64};
    k->multiply[PROBE_F32] = (struct probe_multiply_kernel){multiply_f32, 12 * 16};
}
