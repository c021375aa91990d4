/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The AVX-512 level: those operations value by value that count in a prompt, in registers of
 * sixteen; the rest stays with AVX2.
 */

#include <assert.h>

#include "backends/cpu/avx512-lanes.h"
#include "backends/cpu/row-kernels.h"
#include "base/checked.h"

/* What a value costs an operation, in multiplications as cpu_parallel() counts them: measured, some
 * 0.1 ns, since memory and sums in double count as well. */
#define COST 4

static void avx512_norm(struct backend *b, const struct norm_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->k * COST, norm_rows, a);
}

/* gelu as gelu_lanes() of avx2.h, with its error. */
static inline __m512 gelu_lanes(__m512 x)
{
    const __m512 c1 = _mm512_set1_ps(-1.59576912160573071176f);
    const __m512 c3 = _mm512_set1_ps(-1.59576912160573071176f * 0.044715f);
    __m512 t = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), c3, c1));
    __m512 e = _mm512_add_ps(_mm512_set1_ps(1), exp_lanes_16(t));

    /* beyond 87 it is 0; so is a NaN's sum of hostile weights, as good as any */
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(87), _CMP_NGT_UQ), x, e);
}

#define GATE_PIECE 2048 /* values of one item */

static void gate_pieces(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct gate_args *a = args;
    uint32_t n_pieces = DIV_ROUND_UP(a->k, GATE_PIECE);

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        uint32_t i = item / n_pieces, begin = item % n_pieces * GATE_PIECE;
        uint32_t end = MIN(a->k, begin + GATE_PIECE);
        const float *gate = a->gate + i * a->ld_gate, *up = a->up + i * a->ld_up;
        float *y = a->y + i * a->ld_y;

        for (uint32_t k = begin; k < end; k += LANES)
            v_store_some(
                y, k, end,
                _mm512_mul_ps(gelu_lanes(v_load_some(gate, k, end)), v_load_some(up, k, end)));
    }
}

static void avx512_gate(struct backend *b, const struct gate_args *a)
{
    if (a->z > 0 || a->k == 0)
        cpu_backend(b)->lower_gate(b, a);
    else
        cpu_parallel(cpu_backend(b), a->n * DIV_ROUND_UP(a->k, GATE_PIECE),
                     (size_t)MIN(a->k, (uint32_t)GATE_PIECE) * 4, gate_pieces, a);
}

static void avx512_altup_predict(struct backend *b, const struct altup_predict_args *a)
{
    assert(a->n_streams <= BACKEND_MAX_STREAMS);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * (a->n_streams + 1) * COST, predict_rows,
                 a);
}

static void avx512_altup_correct(struct backend *b, const struct altup_correct_args *a)
{
    assert(a->n_streams <= BACKEND_MAX_STREAMS);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * (a->n_streams + 1) * COST, correct_rows,
                 a);
}

static void avx512_stream_norm(struct backend *b, const struct stream_norm_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * a->n_streams * COST, stream_norm_rows,
                 a);
}

void cpu_avx512_use_ops(struct cpu_backend *c)
{
    c->ops.norm = avx512_norm;
    c->lower_gate = c->ops.gate;
    c->ops.gate = avx512_gate;
    c->ops.altup_predict = avx512_altup_predict;
    c->ops.altup_correct = avx512_altup_correct;
    c->ops.stream_norm = avx512_stream_norm;
}
