/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Configurations that no real model has, but that a model file may bring: every size from its
 * least on, odd widths, one stream or eight, windows of one position, blocks where the shape allows
 * them. Each small model runs at every CPU level. Whatever it is, nothing is read or written out of
 * bounds, tokens one by one give the bits of tokens at once, and where the arithmetic is tame (rows
 * wide enough that a norm does not turn a rounding into a sign) all levels agree with the
 * reference. Then its matrices are filled with random bytes, so that scales are NaN and infinite:
 * the results are arbitrary, but it must run.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/model-file.h"
#include "engine/session.h"
#include "tests/model-builder.h"
#include "tests/must.h"
#include "tests/odd-config.h"

#define N_MODELS 60

/* Of logits, f32 activations; the largest difference in 700 models is 2.6e-4. */
#define TOLERANCE 1e-3

static const char *const levels[] = {"reference", "avx2", "avx512", "amx"};
static bool have_level(const char *level)
{
    struct backend_limits limits = {1, 64, 1};
    struct error err = {""};
    struct backend *b;

    if (backend_cpu_new(&b, level, 1, &limits, &err) < 0)
        return false;
    backend_free(b);
    return true;
}

static struct engine *new_engine(const struct model *m, const char *level, bool int8, uint32_t rows)
{
    struct engine_options o = {
        .activations = int8 ? ACTIVATIONS_INT8 : ACTIVATIONS_F32,
        .cpu_level = level,
        .n_threads = 1,
        .max_rows = rows,
        .max_logits = 1,
        .kv_bytes = (uint64_t)64 << 20,
    };

    return must_engine(m, &o);
}

/* A copy of the last token's logits; `rows` tokens at a time. */
static float *run(const struct model *m, const char *level, bool int8, const uint32_t *tokens,
                  uint32_t n, uint32_t rows)
{
    CLEANUP(engine_freep) struct engine *e = new_engine(m, level, int8, rows);
    CLEANUP(session_freep) struct session *s = NULL;
    uint32_t vocab = model_config(m)->vocab_size;
    float *copy = calloc(vocab, sizeof(*copy));
    const float *l = NULL;

    assert(copy && session_new(&s, e, 0, NULL) == 0);
    assert(session_eval(s, tokens, n, &l) == 0);
    memcpy(copy, l, vocab * sizeof(*copy));
    session_free(TAKE_PTR(s)); /* before its engine */
    return copy;
}

static double distance(const float *a, const float *b, uint32_t n)
{
    double d = 0;

    for (uint32_t i = 0; i < n; i++) {
        assert(isfinite(a[i]) && isfinite(b[i]));
        d = fmax(d, fabs((double)a[i] - (double)b[i]));
    }
    return d;
}

/* Random bytes in every matrix; what is plain must be finite for the model to open. */
static void fill_matrices(const struct model *m, const char *path)
{
    const struct model_file *f = model_get_file(m);
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    assert(fd >= 0);
    for (size_t i = 0; i < model_file_n_tensors(f); i++) {
        const struct model_tensor *t = model_file_tensor(f, i);

        if (t->weight.layout == LAYOUT_PLAIN)
            continue;
        CLEANUP(freep) uint8_t *bytes = malloc(t->bytes);

        assert(bytes);
        for (size_t k = 0; k < t->bytes; k++)
            bytes[k] = (uint8_t)odd_random();
        assert(pwrite(fd, bytes, t->bytes, (off_t)t->offset) == (ssize_t)t->bytes);
    }
    close(fd);
}

/* Of one model: the largest distance to the reference. */
static double check_model(const char *path, bool tame)
{
    CLEANUP(model_freep) struct model *m = NULL;
    uint32_t tokens[ODD_MOST_TOKENS], n, vocab, chunk;
    struct model_builder b;
    double most = 0;

    odd_config(&b, tame);
    model_builder_write(&b, path);
    m = must_open(path);
    vocab = b.config.vocab_size;
    n = odd_between(1, MIN(b.config.context_max, (uint32_t)ODD_MOST_TOKENS));
    chunk = odd_between(1, 9);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = odd_random() % vocab;

    for (int int8 = 0; int8 < 2; int8++) {
        CLEANUP(freep) float *want = run(m, "reference", int8, tokens, n, n);

        for (size_t i = 0; i < ARRAY_SIZE(levels); i++) {
            CLEANUP(freep) float *whole = NULL;
            CLEANUP(freep) float *pieces = NULL;

            if (!have_level(levels[i]))
                continue;
            whole = run(m, levels[i], int8, tokens, n, n);
            pieces = run(m, levels[i], int8, tokens, n, chunk);
            assert(memcmp(whole, pieces, vocab * sizeof(*whole)) == 0);
            if (tame && !int8)
                most = fmax(most, distance(want, whole, vocab));
        }
    }

    fill_matrices(m, path);
    for (size_t i = 0; i < ARRAY_SIZE(levels); i++)
        for (int int8 = 0; int8 < 2 && have_level(levels[i]); int8++)
            free(run(m, levels[i], int8, tokens, n, chunk));
    return most;
}

/* A model file may ask for more than the kernels' buffers on the stack hold. */
static void check_refused(const char *path)
{
    CLEANUP(model_freep) struct model *m = NULL;
    struct engine_options o = {.n_threads = 1};
    struct error err = {""};
    struct model_builder b;
    struct engine *e;

    odd_seed(1);
    odd_config(&b, true);
    b.config.head_dim = BACKEND_MAX_HEAD_DIM + 2;
    model_builder_write(&b, path);
    m = must_open(path);
    assert(engine_new(&e, m, &o, &err) == -EINVAL);
    assert(strstr(err.text, path) && strstr(err.text, "head_dim"));
    model_free(TAKE_PTR(m));

    /* Items of attention, counted in 32 bits. */
    b.config.hidden = b.config.ple_width = 1;
    b.config.head_dim = 2;
    b.config.n_heads_kv = 1;
    b.config.n_heads = 1 << 16;
    b.config.n_layers = b.config.n_layers_kv = 1;
    model_builder_write(&b, path);
    m = must_open(path);
    o.max_rows = 1 << 16;
    assert(engine_new(&e, m, &o, &err) == -EINVAL);
    assert(strstr(err.text, path) && strstr(err.text, "n_heads"));
}

int main(int argc, char **argv)
{
    uint32_t n_models = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : N_MODELS;
    double worst = 0;

    assert(argc >= 2);
    check_refused(argv[1]);
    for (uint32_t i = 0; i < n_models; i++) {
        uint32_t seed = i + 1;
        double d;

        odd_seed(seed * 2654435761u);
        d = check_model(argv[1], i % 2);
        if (d > TOLERANCE)
            fprintf(stderr, "model %u: a level differs from the reference by %g\n", i, d);
        worst = fmax(worst, d);
    }
    printf("%u models, the largest difference between levels: %g\n", n_models, worst);
    assert(worst <= TOLERANCE);
    unlink(argv[1]);
    return 0;
}
