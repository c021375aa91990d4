/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llm-eval kld: how far a model's distributions are from those of a reference. */

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "tools/common/distribution.h"
#include "tools/common/engine-args.h"
#include "tools/llm-eval/eval-args.h"
#include "tools/llm-eval/eval.h"
#include "tools/llm-eval/llm-eval.h"
#include "tools/llm-eval/windows.h"

static const char help[] =
    "Usage: llm-eval kld [OPTION]... --reference MODEL --text FILE MODEL\n"
    "Compares what two models with the same vocabulary predict after every token of a text:\n"
    "the Kullback-Leibler divergence of MODEL from the reference (nats; mean, 99 % quantile\n"
    "and largest), and how often both find the same token the most probable.\n"
    "\n"
    "The reference is always computed with f32 activations and f32 K and V; the options\n"
    "below hold for MODEL, which may be the same file. Windows do not overlap.\n"
    "\n"
    "  --reference MODEL        the model to be near to\n"
    "  --text FILE              the text; - is stdin\n"
    "  --tokens FILE            instead: one sequence of ids per line, each for itself\n"
    "  --context N              tokens of a window (2048, or the models' if that is "
    "less)\n" ENGINE_ARGS_HELP "  --help                   show this and exit";

struct divergences {
    struct engine *reference, *engine;
    double start;
    double *kld; /* [n] */
    size_t n, allocated, n_agree;
};

static double rate(const struct divergences *d)
{
    return (double)d->n / (now_seconds() - d->start);
}

static size_t find_largest(const float *x, size_t n)
{
    size_t best = 0;

    for (size_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

static int compare_rows(struct divergences *d, const float *p, const float *q, size_t n)
{
    double kld = kl_divergence(p, q, n);

    if (!isfinite(kld))
        return -EDOM;
    if (d->n == d->allocated) {
        size_t allocated = MAX(2 * d->allocated, (size_t)1024);
        double *grown = reallocarray(d->kld, allocated, sizeof(*grown));

        if (!grown)
            return -ENOMEM;
        d->kld = grown;
        d->allocated = allocated;
    }
    d->kld[d->n++] = kld;
    d->n_agree += find_largest(p, n) == find_largest(q, n);
    return 0;
}

static int evaluate(void *userdata, const struct window *w, struct error *err)
{
    struct divergences *d = userdata;
    struct engine *reference = d->reference, *e = d->engine;
    CLEANUP(session_freep) struct session *a = NULL;
    CLEANUP(session_freep) struct session *b = NULL;
    size_t vocab_size = model_config(engine_model(e))->vocab_size, n;
    size_t n_rows = w->last ? w->n : w->n - 1; /* the next window has the last one's */
    int r;

    r = eval_session(&a, reference, (uint32_t)w->n, err);
    if (r == 0)
        r = eval_session(&b, e, (uint32_t)w->n, err);
    if (r == 0)
        r = eval_skip(a, w->ids, w->first_row, err);
    if (r == 0)
        r = eval_skip(b, w->ids, w->first_row, err);
    for (size_t row = w->first_row; r == 0 && row < n_rows; row += n) {
        const float *p, *q;

        n = MIN(n_rows - row, (size_t)MIN(engine_max_logits(reference), engine_max_logits(e)));
        r = eval_step(a, w->ids + row, n, &p, err);
        if (r == 0)
            r = eval_step(b, w->ids + row, n, &q, err);
        for (size_t i = 0; r == 0 && i < n; i++) {
            r = compare_rows(d, p + i * vocab_size, q + i * vocab_size, vocab_size);
            if (r == -EDOM)
                error_set(err, EDOM, "the logits of position %zu are not finite", row + i);
            else if (r < 0)
                error_set(err, -r, "out of memory");
        }
    }
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%zu positions, %.1f/s ", d->n, rate(d));
    return r;
}

static int by_size(const void *pa, const void *pb)
{
    const double *a = pa, *b = pb;

    return (*a > *b) - (*a < *b);
}

static void print(struct divergences *d)
{
    double n = (double)d->n, sum = 0, squares = 0, mean;

    for (size_t i = 0; i < d->n; i++)
        sum += d->kld[i];
    mean = sum / n;
    for (size_t i = 0; i < d->n; i++)
        squares += (d->kld[i] - mean) * (d->kld[i] - mean);
    qsort(d->kld, d->n, sizeof(*d->kld), by_size);

    printf("positions   %zu\n", d->n);
    printf("mean KLD    %.6e +- %.1e\n", mean,
           d->n > 1 ? sqrt(squares / (n - 1) / n) : (double)NAN);
    printf("99 %% KLD    %.6e\n", d->kld[(d->n * 99 + 99) / 100 - 1]); /* 99 % are at most this */
    printf("max KLD     %.6e\n", d->kld[d->n - 1]);
    printf("top-1       %.4f %%\n", 100 * (double)d->n_agree / n);
}

int kld_run(int argc, char **argv)
{
    static const struct option long_options[] = {
        {"reference", required_argument, NULL, 'r'},
        INPUT_ARGS,
        EVAL_ARGS,
    };
    CLEANUP(model_freep) struct model *reference_model = NULL;
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(engine_freep) struct engine *reference = NULL;
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(input_done) struct input in = {.bos = TOKENIZER_NONE};
    struct engine_options options = {.max_logits = EVAL_MAX_LOGITS}, definition;
    const char *path = NULL, *reference_path = NULL;
    struct input_args args = {0};
    struct divergences d = {0};
    struct error err;
    int c, r, status;

    while ((c = eval_args_next(argc, argv, long_options, help, &options, &status)) >= 0) {
        if (c == 'r')
            reference_path = optarg;
        else if (input_args_take(&args, c, optarg, &err) < 0)
            return usage_error(argv[0], "%s", err.text);
    }
    if (c == EVAL_ARGS_STOP)
        return status;
    if (!reference_path)
        return usage_error(argv[0], "no --reference given");
    if (!args.text == !args.tokens)
        return usage_error(argv[0], "one of --text and --tokens expected");
    status = eval_args_model(argc, argv, &path);
    if (status != EXIT_SUCCESS)
        return status;

    definition = options;
    definition.activations = ACTIVATIONS_F32;
    definition.kv_type = KV_F32;
    definition.home = LANE_CPU;
    r = open_engine(&reference_model, &reference, reference_path, &definition, &err);
    if (r == 0)
        r = open_engine(&m, &e, path, &options, &err);
    if (r == 0 && model_config(m)->vocab_size != model_config(reference_model)->vocab_size)
        r = error_set(&err, EINVAL, "%s has %u tokens, %s %u: nothing to compare", reference_path,
                      model_config(reference_model)->vocab_size, path, model_config(m)->vocab_size);
    if (r == 0 && args.context == 0)
        args.context =
            MIN(MIN(model_config(m)->context_max, model_config(reference_model)->context_max),
                (uint32_t)DEFAULT_CONTEXT);
    if (r == 0)
        r = choose_windows(m, false, &args, &err);
    if (r == 0)
        r = choose_windows(reference_model, false, &args, &err);
    if (r == 0)
        r = input_read(&in, reference_model, &args, &err);
    if (r == 0) {
        d = (struct divergences){.reference = reference, .engine = e, .start = now_seconds()};
        r = windows_each(&in, &args, evaluate, &d, &err);
    }
    if (r == 0) {
        fprintf(stderr, "%s%s against %s: context %u, %.1f positions/s\n",
                isatty(STDERR_FILENO) ? "\r" : "", engine_description(e),
                engine_description(reference), args.context, rate(&d));
        print(&d);
    }
    free(d.kld);
    return r < 0 ? run_error(argv[0], "%s", err.text) : finish_output(argv[0]);
}
