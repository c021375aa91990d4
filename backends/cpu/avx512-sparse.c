/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* sparse_ffn() with AVX-512: see sparse.h for the order of sums, which is AVX2's as well. */

#include "backends/cpu/avx512-lanes.h"
#include "backends/cpu/matmul.h"
#include "backends/cpu/sparse.h"

static inline vec load_half(const uint16_t *d)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)d));
}

static inline float sum_16(vec v)
{
    __m256 s = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));

    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    r = _mm_add_ss(r, _mm_movehdup_ps(r));
    return _mm_cvtss_f32(r);
}

static inline float sum_64(const vec *v)
{
    return sum_16(_mm512_add_ps(_mm512_add_ps(v[0], v[2]), _mm512_add_ps(v[1], v[3])));
}

static inline void load16(enum weight_type type, const uint8_t *p, size_t i, vec *v)
{
    const __m512 nibbles = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m128i b;

    switch (type) {
    case WEIGHT_F32:
        v[0] = _mm512_loadu_ps(p + i * 64);
        break;
    case WEIGHT_F16:
        v[0] = load_half((const uint16_t *)(p + i * 32));
        break;
    case WEIGHT_BF16:
        v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + i * 32))), 16));
        break;
    case WEIGHT_Q8:
        v[0] = _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + i * 16))));
        break;
    case WEIGHT_Q4: /* of an index, the instruction takes four bits */
        b = _mm_loadu_si128((const __m128i *)(p + i / 2 * 16));
        v[0] = i % 2 == 0
                   ? _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(b), nibbles)
                   : _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(b), 4), nibbles);
        break;
    }
}

/* r[i]: 16 bytes of each of blocks 4 i..4 i + 3. Afterwards r[w]: their word w, lanes as ordered.
 */
static inline void transpose_words(__m512i *r)
{
    __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
    __m512i c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);

    r[0] = _mm512_unpacklo_epi64(a, b);
    r[1] = _mm512_unpackhi_epi64(a, b);
    r[2] = _mm512_unpacklo_epi64(c, d);
    r[3] = _mm512_unpackhi_epi64(c, d);
}

static inline void unpack_group(enum weight_type type, const uint8_t *p, const uint16_t *scales,
                                struct sparse_w *to)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_set1_epi8(0xf), sign = _mm512_set1_epi8((char)0x80);
    __m512i r[8];

    _mm512_storeu_ps(to->d, _mm512_permutexvar_ps(order, load_half(scales)));
    if (type == WEIGHT_Q4) {
        for (int i = 0; i < 4; i++)
            r[i] = _mm512_loadu_si512(p + 64 * i);
        transpose_words(r);
        for (int i = 0; i < 4; i++) {
            _mm512_storeu_si512(to->q[i], _mm512_and_si512(r[i], low));
            _mm512_storeu_si512(to->q[i + 4], _mm512_and_si512(_mm512_srli_epi16(r[i], 4), low));
        }
        return;
    }
    for (int i = 0; i < 4; i++) { /* the first and the second 16 bytes of four blocks */
        __m512i a = _mm512_loadu_si512(p + 128 * i), b = _mm512_loadu_si512(p + 128 * i + 64);

        r[i] = _mm512_shuffle_i64x2(a, b, 0x88);
        r[i + 4] = _mm512_shuffle_i64x2(a, b, 0xdd);
    }
    transpose_words(r);
    transpose_words(r + 4);
    for (int i = 0; i < 8; i++)
        _mm512_storeu_si512(to->q[i], _mm512_xor_si512(r[i], sign));
}

static inline float dot_groups(enum weight_type type, const struct sparse_w *w,
                               const struct sparse_x *x, uint32_t n)
{
    __m512 acc = _mm512_setzero_ps();

    (void)type;
    for (uint32_t g = 0; g < n; g++, w++, x++) {
        __m512i even = _mm512_loadu_si512(x->bias), odd = _mm512_setzero_si512();
        __m512 d = _mm512_mul_ps(_mm512_loadu_ps(w->d), _mm512_loadu_ps(x->d));

        for (int i = 0; i < 8; i += 2) {
            even =
                _mm512_dpbusd_epi32(even, _mm512_loadu_si512(w->q[i]), _mm512_loadu_si512(x->q[i]));
            odd = _mm512_dpbusd_epi32(odd, _mm512_loadu_si512(w->q[i + 1]),
                                      _mm512_loadu_si512(x->q[i + 1]));
        }
        acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd)), d, acc);
    }
    return sum_16(acc);
}

#include "backends/cpu/sparse-kernels.h"

void cpu_avx512_sparse_ffn(struct backend *b, const struct sparse_ffn_args *a)
{
    static const struct sparse_kernels kernels = {128, cut_row, up_neuron, down_few, down_many};

    cpu_sparse_ffn(b, a, &kernels);
}
