/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * test-calibration MODEL [vulkan]: both lanes of an engine are measured, with a small random model
 * that is written to MODEL, while somebody else uses the engine between two turns. The GPU is
 * tests/queued-backend.h, or a real device: LLMD_TEST_DEVICE, without it llvmpipe.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/vulkan/vulkan.h"
#include "engine/calibration.h"
#include "engine/engine-internal.h"
#include "engine/model-file.h"
#include "tests/model-builder.h"
#include "tests/must.h"
#include "tests/queued-backend.h"

#define SKIPPED 77

static struct model *build(const char *path)
{
    struct model_builder b = {.type = WEIGHT_Q4, .seed = 3};

    model_builder_config(&b.config, 10, 5, 70);
    b.config.context_max = 600;
    model_builder_write(&b, path);
    return must_open(path);
}

static struct engine *engine_with(const struct model *m, uint64_t kv_bytes, uint32_t max_logits,
                                  struct vulkan_device *gpu)
{
    struct engine_options o = {
        .n_threads = 1, .max_rows = 64, .max_logits = max_logits, .kv_bytes = kv_bytes, .gpu = gpu};

    return must_engine(m, &o);
}

static struct queued_backend *add_queued(struct engine *e)
{
    struct queued_backend *q = queued_backend_new(&e->limits, &(struct queued_options){0});

    assert(engine_add_lane(e, queued_backend_base(q), NULL) == 0);
    return q;
}

/* Of one that was measured to the end. */
static void check_rates(const struct calibration_result *x, bool several)
{
    for (int l = 0; l < ENGINE_LANES; l++) {
        const struct lane_rates *r = &x->rates.lane[l];

        assert(isfinite(r->prefill) && r->prefill > 0 && isfinite(r->decode) && r->decode > 0);
        assert(isfinite(r->decode_many) && r->decode_many > 0);
    }
    assert(isfinite(x->rates.both_prefill) && x->rates.both_prefill > 0);
    assert(isfinite(x->rates.both_decode) && (x->rates.both_decode > 0) == several);
}

/* Until it is over; others use the engine meanwhile, and see nothing of it. */
static int measure(struct engine *e, const struct model *m, bool choose,
                   struct calibration_result *ret, unsigned *ret_turns)
{
    static const uint32_t tokens[] = {5, 6, 7, 8, 9};
    size_t n_logits = model_config(m)->vocab_size * sizeof(float);
    struct session *s = NULL;
    struct calibration *c;
    float *expected = malloc(n_logits);
    const float *logits;
    struct error err = {""};
    unsigned n = 0;
    int r;

    assert(expected && session_new(&s, e, 0, NULL) == 0);
    assert(session_eval(s, tokens, 5, &logits) == 0);
    memcpy(expected, logits, n_logits);
    assert(calibration_new(&c, e, choose) == 0);
    while ((r = calibration_turn(c, &err)) == 1) {
        struct engine_memory memory;

        session_rewind(s, 0);
        if (n % 3 == 0) { /* somebody wants its memory */
            assert(calibration_give_way(c) && !calibration_give_way(c));
            engine_memory(e, &memory);
            assert(memory.kv_bytes_used == 0);
        }
        assert(session_eval(s, tokens, 5, &logits) == 0);
        assert(memcmp(logits, expected, n_logits) == 0);
        n++;
    }
    if (r == 0)
        assert(calibration_turn(c, &err) == 0);
    *ret = *calibration_result(c);
    *ret_turns = n;
    calibration_free(c);
    session_free(s);
    free(expected);
    return r;
}

static void test_measures(const struct model *m)
{
    struct calibration_result x;
    struct queued_backend *q;
    struct engine *e;
    unsigned turns;

    e = engine_with(m, (uint64_t)32 << 20, 16, NULL);
    q = add_queued(e);
    queued_backend_delay(q, 3); /* the processor decodes meanwhile */
    assert(measure(e, m, false, &x, &turns) == 0 && turns > 15);
    assert(x.gpu_activations == ACTIVATIONS_F32);
    check_rates(&x, true);
    engine_free(e);

    /* A step that gives logits to one only. */
    e = engine_with(m, (uint64_t)32 << 20, 1, NULL);
    add_queued(e);
    assert(measure(e, m, false, &x, &turns) == 0);
    check_rates(&x, false);
    engine_free(e);
}

/* Whenever the device goes, that is what is said, and the engine goes on without. */
static void test_lost(const struct model *m)
{
    struct calibration_result x;
    unsigned turns, n = 0;
    int r;

    for (uint32_t i = 1;; i += i < 20 ? 1 : 7) {
        struct engine *e = engine_with(m, (uint64_t)32 << 20, 16, NULL);

        queued_backend_lose(add_queued(e), i);
        r = measure(e, m, false, &x, &turns);
        assert(r == 0 || r == -ENODEV);
        if (r < 0) {
            assert(engine_lane_failure(e, LANE_GPU));
            assert(x.rates.both_decode == 0 || turns > 10);
            n++;
        }
        engine_free(e);
        if (r == 0)
            break;
    }
    assert(n > 20);
}

static void test_no_memory(const struct model *m)
{
    struct calibration_result x;
    unsigned turns;
    struct engine *e = engine_with(m, (uint64_t)1 << 19, 16, NULL);

    add_queued(e);
    assert(measure(e, m, false, &x, &turns) == -ENOBUFS);
    engine_free(e);
}

static int test_device(const struct model *m)
{
    const char *name = getenv("LLMD_TEST_DEVICE");
    struct calibration_result x;
    struct vulkan_device *d;
    struct engine_memory memory;
    struct error err = {""};
    struct engine *e;
    unsigned turns;

    if (vulkan_device_find(&d, &(struct vulkan_options){.name = name ? name : "llvmpipe"}, &err) <
        0) {
        fprintf(stderr, "skipped: %s\n", err.text);
        return SKIPPED;
    }
    e = engine_with(m, (uint64_t)32 << 20, 16, d);
    if (engine_add_gpu(e, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    assert(measure(e, m, true, &x, &turns) == 0 && turns > 20);
    check_rates(&x, true);
    /* What was found to be better is what the lane has. */
    assert(engine_has_gpu(e) && engine_gpu_activations(e) == x.gpu_activations);
    printf("%s: prompts %.1f tokens/s, decoding %.1f, eight %.1f\n", vulkan_device_name(d),
           x.rates.lane[LANE_GPU].prefill, x.rates.lane[LANE_GPU].decode,
           x.rates.lane[LANE_GPU].decode_many);
    engine_memory(e, &memory);
    assert(memory.kv_bytes_used == 0);
    engine_free(e);
    vulkan_device_free(d);
    return 0;
}

int main(int argc, char **argv)
{
    struct model *m;
    int r = 0;

    assert(argc >= 2);
    m = build(argv[1]);
    if (argc > 2) {
        r = test_device(m);
    } else {
        test_measures(m);
        test_lost(m);
        test_no_memory(m);
    }
    model_free(m);
    return r;
}
