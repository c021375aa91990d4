/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * windows: cuts tokens into pieces that fit a context. The first window holds as many as fit; each
 * further one begins `stride` tokens after the one before and repeats the others as context, so
 * that every token is predicted exactly once: the first ones from what little is there, all later
 * ones from at least n_ctx - 1 - stride tokens. With a bos, it is the first of every window;
 * without, the very first token is not predicted.
 *
 * Text is one such row of tokens; of a token file, each line is.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "engine/model.h"
#include "engine/tokenizer.h"
#include "tools/llm-eval/token-file.h"

#define DEFAULT_CONTEXT 2048 /* or the model's where that is less */

/* What to evaluate, as the command line says it; zero where it does not. */
struct input_args {
    const char *text, *tokens;
    uint32_t context, stride;
};

/* For the getopt_long() table, and the values it then returns. */
enum input_arg {
    INPUT_ARG_CONTEXT = 0x4100, /* beyond any letter, and ENGINE_ARGS's */
    INPUT_ARG_STRIDE,
    INPUT_ARG_TEXT,
    INPUT_ARG_TOKENS,
};

/* clang-format off */
#define INPUT_ARGS                                                                                 \
    {"context", required_argument, NULL, INPUT_ARG_CONTEXT},                                       \
    {"text", required_argument, NULL, INPUT_ARG_TEXT},                                             \
    {"tokens", required_argument, NULL, INPUT_ARG_TOKENS}
/* clang-format on */

/* One of these, or "stride". 0, -EINVAL: err names option and value */
int input_args_take(struct input_args *a, int option, const char *value, struct error *err);

/* What to evaluate: text or tokens, a name for each in messages. */
struct input {
    struct token_file file;
    uint32_t bos; /* put before every window, or TOKENIZER_NONE */
};

/* Exactly one of text and tokens is a path, "-" for stdin. 0, -errno: err says what is wrong */
int input_read(struct input *ret, const struct model *m, const struct input_args *a,
               struct error *err);
void input_done(struct input *in);

/*
 * Fills in a context and stride of 0, that is not given: DEFAULT_CONTEXT and half the context (or,
 * with overlap false, all of it: no token but the bos is seen twice); and checks those given
 * against m and each other. 0, -EINVAL
 */
int choose_windows(const struct model *m, bool overlap, struct input_args *a, struct error *err);

struct window {
    const uint32_t *ids;
    size_t n;         /* tokens */
    size_t first_row; /* rows first_row .. n - 2 predict what no window before did */
    bool last;
};

/*
 * Calls f for each window of each sequence, with the context and stride chosen for a, until one
 * returns < 0, which is then returned. 0, -ENOMEM
 */
int windows_each(const struct input *in, const struct input_args *a,
                 int (*f)(void *userdata, const struct window *w, struct error *err),
                 void *userdata, struct error *err);
