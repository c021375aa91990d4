/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Whole models on a GPU against the processor's f32 activations: small ones of odd shapes and of
 * every type of weight, each with weights imported and with copies of them. Tokens one by one give
 * the bits of tokens at once; and a session that goes back and forth between the two says what it
 * says on one.
 *
 * test-vulkan-models PATH [SEED [MODELS]]; device: LLMD_TEST_DEVICE, else the one in software.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/session.h"
#include "tests/odd-config.h"
#include "tools/common/distribution.h"

#define N_MODELS 10 /* two of each type of weight; instrumented builds have one */
#define MOST_KLD 1e-5

/* Of logits; that of the processor's levels among each other, see test-any-config.c. Small models
 * are sure of themselves, so that a divergence may hide what this shows. */
#define TOLERANCE 1e-3

static struct vulkan_device *devices[2]; /* as it is; copying weights */

static void die(const struct error *err)
{
    fprintf(stderr, "%s\n", err->text);
    abort();
}

static struct engine *new_engine(const struct model *m, struct vulkan_device *d, uint32_t rows)
{
    struct engine_options o = {
        .activations = ACTIVATIONS_F32,
        .kv_type = KV_F32,
        .n_threads = 1,
        .max_rows = rows,
        .max_logits = rows,
        .kv_bytes = (uint64_t)16 << 20,
        .gpu = d,
        .home = d ? LANE_GPU : LANE_CPU,
    };
    struct error err = {""};
    struct engine *e;

    if (engine_new(&e, m, &o, &err) < 0 || (d && engine_add_gpu(e, &err) < 0))
        die(&err);
    return e;
}

/* Which lane takes which piece. */
typedef enum engine_lane (*lane_of)(uint32_t piece);

static enum engine_lane gpu_alone(uint32_t piece)
{
    (void)piece;
    return LANE_GPU;
}

static enum engine_lane cpu_alone(uint32_t piece)
{
    (void)piece;
    return LANE_CPU;
}

static enum engine_lane back_and_forth(uint32_t piece)
{
    return piece % 3 == 1 ? LANE_CPU : LANE_GPU;
}

/* Logits behind each token, [n][vocab]; `rows` tokens at a time, or as many as the lane takes. */
static float *run(const struct model *m, struct vulkan_device *d, const uint32_t *tokens,
                  uint32_t n, uint32_t rows, lane_of lane)
{
    struct engine *e = new_engine(m, d, rows);
    uint32_t vocab = model_config(m)->vocab_size;
    float *all = calloc((size_t)n * vocab, sizeof(*all));
    struct session *s;

    assert(all && session_new(&s, e, 0, NULL) == 0);
    for (uint32_t at = 0, here, piece = 0; at < n; at += here, piece++) {
        struct step_item item = {.session = s, .tokens = tokens + at, .wanted = LOGITS_ALL};
        enum engine_lane l = lane(piece);

        item.n_tokens = here = MIN(MIN(rows, engine_lane_max_rows(e, l)), n - at);
        assert(engine_start(e, l, &item, 1) == 0);
        assert(engine_end(e, l) == 0 && item.ret_error == 0);
        memcpy(all + (size_t)at * vocab, item.ret_logits, (size_t)here * vocab * sizeof(*all));
    }
    session_free(s);
    engine_free(e);
    return all;
}

static bool is_near(const char *what, const struct model_builder *b, uint32_t number,
                    const float *p, const float *q, uint32_t n)
{
    uint32_t vocab = b->config.vocab_size;
    double kld = 0, distance = 0;
    bool ok;

    for (size_t i = 0; i < (size_t)n * vocab; i++) {
        assert(isfinite(q[i]));
        distance = fmax(distance, fabs((double)p[i] - (double)q[i]));
    }
    for (uint32_t i = 0; i < n; i++)
        kld += kl_divergence(p + (size_t)i * vocab, q + (size_t)i * vocab, vocab) / n;
    ok = kld <= MOST_KLD && distance <= TOLERANCE;
    printf("%2u %-4s %-14s KLD %.2g, largest difference %.2g%s\n", number,
           weight_type_name(b->type), what, kld, distance, ok ? "" : ": too far");
    return ok;
}

static bool check_model(const char *path, uint32_t number)
{
    CLEANUP(model_freep) struct model *m = NULL;
    uint32_t tokens[ODD_MOST_TOKENS], n, vocab, chunk;
    struct model_builder b;
    struct error err = {""};
    float *want, *got, *pieces, *mixed, *copied;
    bool ok;

    odd_config(&b, true);
    b.type = (enum weight_type)(number % 5);
    model_builder_write(&b, path);
    if (model_open(&m, path, &err) < 0)
        die(&err);
    vocab = b.config.vocab_size;
    n = MIN(b.config.context_max, (uint32_t)ODD_MOST_TOKENS);
    chunk = odd_between(1, 9);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = odd_random() % vocab;

    want = run(m, NULL, tokens, n, n, cpu_alone);
    got = run(m, devices[0], tokens, n, n, gpu_alone);
    pieces = run(m, devices[0], tokens, n, chunk, gpu_alone);
    mixed = run(m, devices[0], tokens, n, chunk, back_and_forth);
    copied = run(m, devices[1], tokens, n, n, gpu_alone);
    ok = is_near("at once", &b, number, want, got, n);
    ok &= is_near("back and forth", &b, number, want, mixed, n);
    if (memcmp(got, pieces, (size_t)n * vocab * sizeof(*got)) != 0) {
        printf("%2u in pieces of %u: other bits than at once\n", number, chunk);
        ok = false;
    }
    if (memcmp(got, copied, (size_t)n * vocab * sizeof(*got)) != 0) {
        printf("%2u with copies of the weights: other bits\n", number);
        ok = false;
    }
    free(want);
    free(got);
    free(pieces);
    free(mixed);
    free(copied);
    return ok;
}

int main(int argc, char **argv)
{
    const char *device = getenv("LLMD_TEST_DEVICE");
    uint32_t seed = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 1;
    uint32_t n_models = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : N_MODELS;
    struct error err = {""};
    bool ok = true;

    assert(argc >= 2);
    for (int i = 0; i < 2; i++) {
        struct vulkan_options o = {.name = device ? device : "llvmpipe", .copy_weights = i == 1};
        int r = vulkan_device_find(&devices[i], &o, &err);

        if (r == -ENOSYS || r == -ENOENT) {
            printf("skipped: %s\n", err.text);
            return 77;
        }
        if (r < 0)
            die(&err);
    }
    for (uint32_t i = 0; i < n_models; i++) {
        odd_seed((seed + i) * 2654435761u);
        ok &= check_model(argv[1], i);
    }
    for (int i = 0; i < 2; i++)
        vulkan_device_free(devices[i]);
    unlink(argv[1]);
    assert(ok);
    return 0;
}
