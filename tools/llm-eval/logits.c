/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llm-eval logits: what the model says after every token of some sequences. */

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "tools/common/engine-args.h"
#include "tools/common/output-file.h"
#include "tools/llm-eval/eval-args.h"
#include "tools/llm-eval/eval.h"
#include "tools/llm-eval/llm-eval.h"
#include "tools/llm-eval/token-file.h"

static const char help[] =
    "Usage: llm-eval logits [OPTION]... --tokens FILE --output FILE MODEL\n"
    "Writes the logits of every position of some sequences of token ids.\n"
    "\n"
    "Each sequence is evaluated by itself, from position 0. The output is raw: for every\n"
    "token, in order, as many little-endian 32-bit floats as the vocabulary has pieces.\n"
    "\n"
    "  --tokens FILE            one sequence of ids per line; - is stdin\n"
    "  --output FILE            where to write; - is stdout\n" ENGINE_ARGS_HELP
    "  --help                   show this and exit";

static int evaluate(struct engine *e, const struct sequence *sequence, FILE *out, struct error *err)
{
    CLEANUP(session_freep) struct session *s = NULL;
    size_t vocab_size = model_config(engine_model(e))->vocab_size, n;
    const float *logits;
    int r;

    r = eval_session(&s, e, /* n_ctx= */ 0, err);
    for (size_t i = 0; r == 0 && i < sequence->n; i += n) {
        n = MIN(sequence->n - i, (size_t)engine_max_logits(e));
        r = eval_step(s, sequence->ids + i, n, &logits, err);
        if (r == 0 && fwrite(logits, sizeof(*logits) * vocab_size, n, out) < n)
            return 0; /* output_commit() tells */
    }
    return r;
}

int logits_run(int argc, char **argv)
{
    static const struct option long_options[] = {
        {"tokens", required_argument, NULL, 't'},
        {"output", required_argument, NULL, 'o'},
        EVAL_ARGS,
    };
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(token_file_done) struct token_file tokens = {NULL, NULL, 0};
    CLEANUP(output_done) struct output_file out = {NULL, NULL, NULL};
    struct engine_options options = {.max_logits = EVAL_MAX_LOGITS};
    const char *tokens_path = NULL, *output = NULL, *path = NULL;
    const struct model_config *config;
    struct error err;
    int c, r, status;

    _Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "floats are written as they are");

    while ((c = eval_args_next(argc, argv, long_options, help, &options, &status)) >= 0)
        *(c == 't' ? &tokens_path : &output) = optarg;
    if (c == EVAL_ARGS_STOP)
        return status;
    if (!tokens_path)
        return usage_error(argv[0], "no --tokens given");
    if (!output)
        return usage_error(argv[0], "no --output given");
    status = eval_args_model(argc, argv, &path);
    if (status != EXIT_SUCCESS)
        return status;

    r = open_engine(&m, &e, path, &options, &err);
    if (r < 0)
        return run_error(argv[0], "%s", err.text);
    config = model_config(m);
    r = token_file_read(&tokens, tokens_path, config->vocab_size, config->context_max, &err);
    if (r == 0)
        r = output_open(&out, output, &err);
    for (size_t i = 0; r == 0 && i < tokens.n && !ferror(out.stream); i++)
        r = evaluate(e, &tokens.sequences[i], out.stream, &err);
    if (r == 0)
        r = output_commit(&out, &err);
    return r < 0 ? run_error(argv[0], "%s", err.text) : EXIT_SUCCESS;
}
