/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* sparse_ffn() with AVX2: see sparse.h for the order of sums. */

#include "backends/cpu/avx2-lanes.h"
#include "backends/cpu/matmul.h"
#include "backends/cpu/sparse.h"

static inline vec load_half(const uint16_t *d)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)d));
}

static inline float sum_64(const vec *v)
{
    __m256 low = _mm256_add_ps(_mm256_add_ps(v[0], v[4]), _mm256_add_ps(v[2], v[6]));
    __m256 high = _mm256_add_ps(_mm256_add_ps(v[1], v[5]), _mm256_add_ps(v[3], v[7]));

    return sum_lanes(_mm256_add_ps(low, high));
}

static inline void load16(enum weight_type type, const uint8_t *p, size_t i, vec *v)
{
    __m128i b;

    switch (type) {
    case WEIGHT_F32:
        v[0] = _mm256_loadu_ps((const float *)(p + i * 64));
        v[1] = _mm256_loadu_ps((const float *)(p + i * 64 + 32));
        break;
    case WEIGHT_F16:
        v[0] = load_half((const uint16_t *)(p + i * 32));
        v[1] = load_half((const uint16_t *)(p + i * 32 + 16));
        break;
    case WEIGHT_BF16:
        for (int h = 0; h < 2; h++)
            v[h] = _mm256_castsi256_ps(_mm256_slli_epi32(
                _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + i * 32 + 16 * h))),
                16));
        break;
    case WEIGHT_Q8:
        b = _mm_loadu_si128((const __m128i *)(p + i * 16));
        v[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
        v[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(b, b)));
        break;
    case WEIGHT_Q4:
        b = _mm_loadu_si128((const __m128i *)(p + i / 2 * 16));
        b = _mm_and_si128(i % 2 ? _mm_srli_epi16(b, 4) : b, _mm_set1_epi8(0xf));
        b = _mm_sub_epi8(b, _mm_set1_epi8(8));
        v[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
        v[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(b, b)));
        break;
    }
}

/* r[i]: 16 bytes of each of two blocks of the i-th four. Afterwards r[w]: word w of the eight. */
static inline void transpose_words(__m256i *r)
{
    __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpacklo_epi32(r[2], r[3]);
    __m256i c = _mm256_unpackhi_epi32(r[0], r[1]), d = _mm256_unpackhi_epi32(r[2], r[3]);

    r[0] = _mm256_unpacklo_epi64(a, b);
    r[1] = _mm256_unpackhi_epi64(a, b);
    r[2] = _mm256_unpacklo_epi64(c, d);
    r[3] = _mm256_unpackhi_epi64(c, d);
}

static inline void unpack_group(enum weight_type type, const uint8_t *p, const uint16_t *scales,
                                struct sparse_w *to)
{
    const __m256i low = _mm256_set1_epi8(0xf);
    float d[SPARSE_GROUP];

    _mm256_storeu_ps(d, load_half(scales));
    _mm256_storeu_ps(d + 8, load_half(scales + 8));
    for (uint32_t lane = 0; lane < SPARSE_GROUP; lane++)
        to->d[lane] = d[sparse_block(lane)];
    for (int half = 0; half < 2; half++) { /* of the lanes: blocks 4 i, 4 i + 1, or the next two */
        __m256i r[8];

        for (int i = 0; i < 4; i++) {
            if (type == WEIGHT_Q4) {
                r[i] = _mm256_loadu_si256((const __m256i *)(p + 64 * i + 32 * half));
            } else {
                const uint8_t *blocks = p + 128 * i + 64 * half;
                __m256i a = _mm256_loadu_si256((const __m256i *)blocks);
                __m256i b = _mm256_loadu_si256((const __m256i *)(blocks + 32));

                r[i] = _mm256_permute2x128_si256(a, b, 0x20);
                r[i + 4] = _mm256_permute2x128_si256(a, b, 0x31);
            }
        }
        transpose_words(r);
        if (type == WEIGHT_Q4)
            for (int i = 0; i < 4; i++) {
                r[i + 4] = _mm256_and_si256(_mm256_srli_epi16(r[i], 4), low);
                r[i] = _mm256_and_si256(r[i], low);
            }
        else
            transpose_words(r + 4);
        for (int i = 0; i < 8; i++)
            _mm256_storeu_si256((__m256i *)to->q[i][8 * half], r[i]);
    }
}

static inline __m256i words(const void *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

static inline float dot_groups(enum weight_type type, const struct sparse_w *w,
                               const struct sparse_x *x, uint32_t n)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};

    for (uint32_t g = 0; g < n; g++, w++, x++)
        for (int half = 0; half < 2; half++) {
            int at = 8 * half;
            __m256 d = _mm256_mul_ps(_mm256_loadu_ps(w->d + at), _mm256_loadu_ps(x->d + at));
            __m256i sum;

            if (type == WEIGHT_Q4) { /* eight pairs of 15 * 127 fit 16 bits */
                sum = _mm256_maddubs_epi16(words(w->q[0][at]), words(x->q[0][at]));
                for (int i = 1; i < 8; i++)
                    sum = _mm256_add_epi16(
                        sum, _mm256_maddubs_epi16(words(w->q[i][at]), words(x->q[i][at])));
                sum = _mm256_add_epi32(_mm256_madd_epi16(sum, ones), words(x->bias + at));
            } else { /* the sign goes over to x: 2 * 128 * 127 fits, so nothing saturates */
                sum = _mm256_setzero_si256();
                for (int i = 0; i < 8; i++) {
                    __m256i v = words(w->q[i][at]);

                    sum = _mm256_add_epi32(
                        sum, _mm256_madd_epi16(
                                 _mm256_maddubs_epi16(_mm256_abs_epi8(v),
                                                      _mm256_sign_epi8(words(x->q[i][at]), v)),
                                 ones));
                }
            }
            acc[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, acc[half]);
        }
    return sum_lanes(_mm256_add_ps(acc[0], acc[1]));
}

#include "backends/cpu/sparse-kernels.h"

void cpu_avx2_sparse_ffn(struct backend *b, const struct sparse_ffn_args *a)
{
    static const struct sparse_kernels kernels = {0, cut_row, up_neuron, down_few, down_many};

    cpu_sparse_ffn(b, a, &kernels);
}
