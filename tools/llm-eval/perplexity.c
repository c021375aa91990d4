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
#include "base/clock.h"
#include "tools/common/distribution.h"
#include "tools/common/engine-args.h"
#include "tools/llm-eval/eval-args.h"
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
    struct engine *engine;
    double start;
    size_t n, n_evaluated;
    double sum, squares;
};

static double rate(const struct sums *s)
{
    return (double)s->n_evaluated / (now_seconds() - s->start);
}

static int evaluate(void *userdata, const struct window *w, struct error *err)
{
    CLEANUP(session_freep) struct session *s = NULL;
    struct sums *sums = userdata;
    struct engine *e = sums->engine;
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
    if (r == 0 && isatty(STDERR_FILENO))
        fprintf(stderr, "\r%zu tokens, %.1f tokens/s ", sums->n_evaluated, rate(sums));
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
        INPUT_ARGS,
        {"stride", required_argument, NULL, INPUT_ARG_STRIDE},
        EVAL_ARGS,
    };
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(input_done) struct input in = {.bos = TOKENIZER_NONE};
    struct engine_options options = {.max_logits = EVAL_MAX_LOGITS};
    struct input_args args = {0};
    struct sums sums = {0};
    const char *path = NULL;
    struct error err;
    int c, r, status;

    while ((c = eval_args_next(argc, argv, long_options, help, &options, &status)) >= 0)
        if (input_args_take(&args, c, optarg, &err) < 0)
            return usage_error(argv[0], "%s", err.text);
    if (c == EVAL_ARGS_STOP)
        return status;
    if (!args.text == !args.tokens)
        return usage_error(argv[0], "one of --text and --tokens expected");
    status = eval_args_model(argc, argv, &path);
    if (status != EXIT_SUCCESS)
        return status;

    r = open_engine(&m, &e, path, &options, &err);
    if (r == 0)
        r = choose_windows(m, true, &args, &err);
    if (r == 0)
        r = input_read(&in, m, &args, &err);
    if (r == 0) {
        sums.engine = e;
        sums.start = now_seconds();
        r = windows_each(&in, &args, evaluate, &sums, &err);
    }
    if (r < 0)
        return run_error(argv[0], "%s", err.text);
    if (sums.n == 0)
        return run_error(argv[0], "nothing to predict: no two tokens in a row");
    fprintf(stderr, "%s%s: context %u, stride %u, %zu tokens evaluated, %.1f tokens/s\n",
            isatty(STDERR_FILENO) ? "\r" : "", engine_description(e), args.context, args.stride,
            sums.n_evaluated, rate(&sums));
    print(&sums);
    return finish_output(argv[0]);
}
