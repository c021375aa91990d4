/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The golden micro-model of gemma3n.md §12, computed independently in double precision: cached K
 * and V of chosen layers and the logits, at every CPU level.
 */

#undef NDEBUG
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/session.h"
#include "tests/model-builder.h"

#define N 8
#define VOCAB 48
static const uint32_t tokens[N] = {2, 7, 45, 13, 13, 30, 21, 5};
static double worst;

static void expect(double got, double want)
{
    worst = fmax(worst, fabs(got - want));
    if (!(fabs(got - want) <= 1e-4)) {
        fprintf(stderr, "got %.6f, expected %.6f\n", got, want);
        abort();
    }
}

/* The 8 values of K (or V) of one head at pos, from a page. */
static void expect_cached(const struct session *s, uint32_t layer, bool v, uint32_t head,
                          uint32_t pos, const double want[8])
{
    const float *page = s->kv.layers[layer].data[0];

    for (uint32_t d = 0; d < 8; d++)
        expect(v ? page[2 * 8 * KV_PAGE + (head * KV_PAGE + pos) * 8 + d]
                 : page[(head * 8 + d) * KV_PAGE + pos],
               want[d]);
}

static void run(const struct model *m, const char *level)
{
    static const double argmax[N] = {15, 39, 31, 40, 40, 9, 37, 40};
    static const double sums[N] = {0.958580, 0.183294, 5.997370, 4.260597,
                                   4.902658, 3.774928, 6.229230, 6.393140};
    static const double first[6] = {-0.140306, -0.232966, 0.056900, 1.245724, -0.619094, -0.212866};
    static const double last[6] = {0.117344, 0.685394, -0.620461, -1.952995, 1.238656, 0.043473};
    static const double tail[8] = {1.611374, 0.484557,  0.259711,  -0.026374,
                                   0.662636, -0.270886, -0.791913, -0.331150};
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(session_freep) struct session *s = NULL;
    struct engine_options options = {
        .activations = ACTIVATIONS_F32, .kv_type = KV_F32, .cpu_level = level, .kv_bytes = 1 << 24};
    struct step_item item = {.tokens = tokens, .n_tokens = N, .wanted = LOGITS_ALL};
    struct error err = {""};
    const float *l;

    if (engine_new(&e, m, &options, &err) < 0) {
        printf("%s: %s\n", level, err.text);
        return;
    }
    assert(session_new(&s, e, 0, NULL) == 0);
    item.session = s;
    assert(engine_step(e, &item, 1) == 0 && item.ret_error == 0);
    l = item.ret_logits;

    expect_cached(s, 0, false, 0, 0,
                  (double[]){0.116237, 0.168526, 1.675386, -0.788204, 2.161424, 0.601265, 0.474393,
                             0.432008});
    expect_cached(s, 0, true, 0, 0,
                  (double[]){-0.425006, -1.866583, 0.018181, 0.213240, -0.128123, 1.896952,
                             -0.099266, -0.815302});
    expect_cached(s, 3, false, 1, 7,
                  (double[]){0.707495, 1.736106, 0.496040, 0.787885, 1.330909, 0.353560, -0.172109,
                             -0.032080});
    expect_cached(s, 4, true, 1, 7,
                  (double[]){0.648114, 0.368291, -0.046837, 0.084501, 1.785132, -0.383592,
                             -0.871383, -1.828061});
    for (int i = 0; i < 6; i++) {
        expect((double)l[i], first[i]);
        expect((double)l[7 * VOCAB + i], last[i]);
    }
    for (int i = 0; i < 8; i++)
        expect((double)l[7 * VOCAB + 40 + i], tail[i]);
    for (int p = 0; p < N; p++) {
        double sum = 0;
        int best = 0;

        for (int i = 0; i < VOCAB; i++) {
            sum += (double)l[p * VOCAB + i];
            if (l[p * VOCAB + i] > l[p * VOCAB + best])
                best = i;
        }
        assert(best == argmax[p]);
        expect(sum, sums[p]);
    }
    printf("%s: worst difference %.2e\n", engine_description(e), worst);
}

int main(int argc, char **argv)
{
    static const char *const levels[] = {"reference", "avx2", "avx512"};
    CLEANUP(model_freep) struct model *m = NULL;
    struct model_builder b;
    struct error err = {""};

    assert(argc == 2);
    model_builder_golden(&b);
    model_builder_write(&b, argv[1]);
    if (model_open(&m, argv[1], &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    for (size_t i = 0; i < sizeof(levels) / sizeof(levels[0]); i++)
        run(m, levels[i]);
    unlink(argv[1]);
    return 0;
}
