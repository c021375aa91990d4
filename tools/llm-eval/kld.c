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
#include "tools/common/engine-args.h"
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
    double *kld; /* [n] */
    size_t n, allocated, n_agree;
};

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
    double log_p = log_sum_exp(p, n), log_q = log_sum_exp(q, n), kld = 0;

    if (d->n == d->allocated) {
        size_t allocated = MAX(2 * d->allocated, (size_t)1024);
        double *grown = reallocarray(d->kld, allocated, sizeof(*grown));

        if (!grown)
            return -ENOMEM;
        d->kld = grown;
        d->allocated = allocated;
    }
    for (size_t i = 0; i < n; i++) {
        double lp = (double)p[i] - log_p, lq = (double)q[i] - log_q;

        kld += exp(lp) * (lp - lq);
    }
    if (!isfinite(kld))
        return -EDOM;
    d->kld[d->n++] = kld;
    d->n_agree += find_largest(p, n) == find_largest(q, n);
    return 0;
}

static int evaluate(struct engine *reference, struct engine *e, const struct window *w,
                    struct divergences *d, struct error *err)
{
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
        {"text", required_argument, NULL, 't'},
        {"tokens", required_argument, NULL, 'T'},
        {"context", required_argument, NULL, 'c'},
        ENGINE_ARGS,
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    CLEANUP(model_freep) struct model *reference_model = NULL;
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(engine_freep) struct engine *reference = NULL;
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(input_done) struct input in = {.bos = TOKENIZER_NONE};
    CLEANUP(freep) uint32_t *ids = NULL;
    struct engine_options options = {.max_logits = EVAL_MAX_LOGITS}, definition;
    const char *text = NULL, *tokens = NULL, *reference_path = NULL;
    uint32_t context = 0, stride = 0;
    struct divergences d = {NULL, 0, 0, 0};
    struct error err;
    double start;
    int c, r;

    while ((c = getopt_long(argc, argv, "h", long_options, NULL)) != -1) {
        r = 0;
        switch (c) {
        case 'r':
            reference_path = optarg;
            break;
        case 't':
            text = optarg;
            break;
        case 'T':
            tokens = optarg;
            break;
        case 'c':
            r = parse_number("--context", optarg, 2, MODEL_MAX_CONTEXT, &context, &err);
            break;
        case 'h':
            puts(help);
            return finish_output(argv[0]);
        case '?':
            return usage_error(argv[0], NULL);
        default:
            r = engine_args_take(&options, c, optarg, &err);
        }
        if (r < 0)
            return usage_error(argv[0], "%s", err.text);
    }
    if (!reference_path)
        return usage_error(argv[0], "no --reference given");
    if (!text == !tokens)
        return usage_error(argv[0], "one of --text and --tokens expected");
    if (optind == argc)
        return usage_error(argv[0], "no MODEL given");
    if (optind + 1 < argc)
        return usage_error(argv[0], "one MODEL only, '%s' is too much", argv[optind + 1]);

    definition = options;
    definition.activations = ACTIVATIONS_F32;
    definition.kv_type = KV_F32;
    r = open_engine(&reference_model, &reference, reference_path, &definition, &err);
    if (r == 0)
        r = open_engine(&m, &e, argv[optind], &options, &err);
    if (r == 0 && model_config(m)->vocab_size != model_config(reference_model)->vocab_size)
        r = error_set(&err, EINVAL, "%s has %u tokens, %s %u: nothing to compare", reference_path,
                      model_config(reference_model)->vocab_size, argv[optind],
                      model_config(m)->vocab_size);
    if (r == 0 && context == 0)
        context = MIN(MIN(model_config(m)->context_max, model_config(reference_model)->context_max),
                      (uint32_t)DEFAULT_CONTEXT);
    if (r == 0)
        r = choose_windows(m, false, &context, &stride, &err);
    if (r == 0)
        r = choose_windows(reference_model, false, &context, &stride, &err);
    if (r == 0)
        r = input_read(&in, reference_model, text, tokens, &err);
    if (r < 0)
        return run_error(argv[0], "%s", err.text);
    ids = calloc(context, sizeof(*ids));
    if (!ids)
        return run_error(argv[0], "out of memory");

    start = now();
    for (size_t i = 0; r == 0 && i < in.file.n; i++) {
        struct windows windows = {.sequence = &in.file.sequences[i],
                                  .bos = in.bos,
                                  .n_ctx = context,
                                  .stride = stride,
                                  .ids = ids};
        struct window w;

        while (r == 0 && windows_next(&windows, &w)) {
            r = evaluate(reference, e, &w, &d, &err);
            if (isatty(STDERR_FILENO))
                fprintf(stderr, "\r%zu positions, %.1f/s ", d.n, (double)d.n / (now() - start));
        }
    }
    if (r == 0) {
        fprintf(stderr, "%s%s against %s: context %u, %.1f positions/s\n",
                isatty(STDERR_FILENO) ? "\r" : "", engine_description(e),
                engine_description(reference), context, (double)d.n / (now() - start));
        print(&d);
    }
    free(d.kld);
    return r < 0 ? run_error(argv[0], "%s", err.text) : finish_output(argv[0]);
}
