/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llm-eval perplexity: how well the model predicts a text. */

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
    "Usage: llm-eval perplexity [OPTION]... --text FILE MODEL\n"
    "Prints how well the model predicts a text: the mean of -log of the probability it\n"
    "gave each token (nats), and the exponential of that, with standard errors.\n"
    "\n"
    "The text is cut into windows. Every token is predicted once; but for those of the\n"
    "first window, from at least N - 1 - M tokens before it, N being the context and M the\n"
    "stride: a smaller stride takes longer and gives the model more to go by.\n"
    "\n"
    "  --text FILE              the text; - is stdin\n"
    "  --tokens FILE            instead: one sequence of ids per line, each for itself\n"
    "  --context N              tokens of a window (2048, or the model's if that is less)\n"
    "  --stride M               tokens from window to window (half the context)\n" ENGINE_ARGS_HELP
    "  --help                   show this and exit";

/* Of all predictions so far. */
struct sums {
    size_t n, n_evaluated;
    double sum, squares;
};

static int evaluate(struct engine *e, const struct window *w, struct sums *sums, struct error *err)
{
    CLEANUP(session_freep) struct session *s = NULL;
    size_t vocab_size = model_config(engine_model(e))->vocab_size, n;
    int r;

    if (w->n < 2)
        return 0;
    r = eval_session(&s, e, (uint32_t)w->n, err);
    if (r == 0)
        r = eval_skip(s, w->ids, w->first_row, err);
    for (size_t row = w->first_row; r == 0 && row < w->n - 1; row += n) {
        const float *logits;

        n = MIN(w->n - 1 - row, (size_t)engine_max_logits(e));
        r = eval_step(s, w->ids + row, n, &logits, err);
        for (size_t i = 0; r == 0 && i < n; i++) {
            const float *x = logits + i * vocab_size;
            double nll = log_sum_exp(x, vocab_size) - (double)x[w->ids[row + i + 1]];

            if (!isfinite(nll))
                return error_set(err, EDOM, "the logits of position %zu are not finite", row + i);
            sums->n++;
            sums->sum += nll;
            sums->squares += nll * nll;
        }
    }
    sums->n_evaluated += w->n - 1;
    return r;
}

static void print(const struct sums *sums)
{
    double n = (double)sums->n, mean = sums->sum / n;
    double variance = sums->n > 1 ? (sums->squares - n * mean * mean) / (n - 1) : (double)NAN;
    double error = sqrt((variance < 0 ? 0 : variance) / n);

    printf("tokens      %zu\n", sums->n);
    printf("mean nll    %.6f +- %.6f\n", mean, error);
    printf("perplexity  %.7g +- %.3g\n", exp(mean), exp(mean) * error);
}

int perplexity_run(int argc, char **argv)
{
    static const struct option long_options[] = {
        {"text", required_argument, NULL, 't'},
        {"tokens", required_argument, NULL, 'T'},
        {"context", required_argument, NULL, 'c'},
        {"stride", required_argument, NULL, 's'},
        ENGINE_ARGS,
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(input_done) struct input in = {.bos = TOKENIZER_NONE};
    CLEANUP(freep) uint32_t *ids = NULL;
    struct engine_options options = {.max_logits = EVAL_MAX_LOGITS};
    const char *text = NULL, *tokens = NULL;
    uint32_t context = 0, stride = 0;
    struct sums sums = {0, 0, 0, 0};
    struct error err;
    double start;
    int c, r;

    while ((c = getopt_long(argc, argv, "h", long_options, NULL)) != -1) {
        r = 0;
        switch (c) {
        case 't':
            text = optarg;
            break;
        case 'T':
            tokens = optarg;
            break;
        case 'c':
            r = parse_number("--context", optarg, 2, MODEL_MAX_CONTEXT, &context, &err);
            break;
        case 's':
            r = parse_number("--stride", optarg, 1, MODEL_MAX_CONTEXT, &stride, &err);
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
    if (!text == !tokens)
        return usage_error(argv[0], "one of --text and --tokens expected");
    if (optind == argc)
        return usage_error(argv[0], "no MODEL given");
    if (optind + 1 < argc)
        return usage_error(argv[0], "one MODEL only, '%s' is too much", argv[optind + 1]);

    r = open_engine(&m, &e, argv[optind], &options, &err);
    if (r == 0)
        r = choose_windows(m, true, &context, &stride, &err);
    if (r == 0)
        r = input_read(&in, m, text, tokens, &err);
    if (r < 0)
        return run_error(argv[0], "%s", err.text);
    ids = calloc(context, sizeof(*ids));
    if (!ids)
        return run_error(argv[0], "out of memory");

    start = now();
    for (size_t i = 0; i < in.file.n; i++) {
        struct windows windows = {.sequence = &in.file.sequences[i],
                                  .bos = in.bos,
                                  .n_ctx = context,
                                  .stride = stride,
                                  .ids = ids};
        struct window w;

        while (windows_next(&windows, &w)) {
            r = evaluate(e, &w, &sums, &err);
            if (r < 0)
                return run_error(argv[0], "%s", err.text);
            if (isatty(STDERR_FILENO))
                fprintf(stderr, "\r%zu tokens, %.1f tokens/s ", sums.n_evaluated,
                        (double)sums.n_evaluated / (now() - start));
        }
    }
    if (sums.n == 0)
        return run_error(argv[0], "nothing to predict: no two tokens in a row");
    fprintf(stderr, "%s%s: context %u, stride %u, %zu tokens evaluated, %.1f tokens/s\n",
            isatty(STDERR_FILENO) ? "\r" : "", engine_description(e), context, stride,
            sums.n_evaluated, (double)sums.n_evaluated / (now() - start));
    print(&sums);
    return finish_output(argv[0]);
}
