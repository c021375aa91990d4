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

/* What to evaluate: text or tokens, a name for each in messages. */
struct input {
    struct token_file file;
    uint32_t bos; /* put before every window, or TOKENIZER_NONE */
};

/* Exactly one of text and tokens is a path, "-" for stdin. 0, -errno: err says what is wrong */
int input_read(struct input *ret, const struct model *m, const char *text, const char *tokens,
               struct error *err);
void input_done(struct input *in);

/*
 * Fills in a context and stride of 0, that is not given: DEFAULT_CONTEXT and half the context (or,
 * with overlap false, all of it: no token but the bos is seen twice); and checks those given
 * against m and each other. 0, -EINVAL
 */
int choose_windows(const struct model *m, bool overlap, uint32_t *context, uint32_t *stride,
                   struct error *err);

struct windows {
    /* the caller's */
    const struct sequence *sequence;
    uint32_t bos;         /* or TOKENIZER_NONE */
    size_t n_ctx, stride; /* 2 <= n_ctx, 1 <= stride <= n_ctx - 1 */
    uint32_t *ids;        /* [n_ctx], the window is put here */

    /* zero at first: where the next window begins, how many tokens the ones before had */
    size_t next, covered;
    bool done;
};

struct window {
    const uint32_t *ids;
    size_t n;         /* tokens */
    size_t first_row; /* rows first_row .. n - 2 predict what no window before did */
    bool last;
};

/* False when there is none any more. */
bool windows_next(struct windows *w, struct window *ret);
