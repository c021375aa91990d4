/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* eval: what the subcommands that run a model share. Each error says in one line what is wrong. */

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "engine/engine.h"

/* Rows of logits that one step gives in these programs: 64 MB of them with 262144 pieces. */
#define EVAL_MAX_LOGITS 64

/* Reads a file, "-" for stdin; free() it. A NUL follows that does not count. 0, -errno */
int read_file(const char *path, char **ret, size_t *ret_n, struct error *err);

/* A session of n_ctx tokens (0: the model's). 0, -errno */
int eval_session(struct session **ret, struct engine *e, uint32_t n_ctx, struct error *err);

/*
 * Evaluates the next n tokens in one step, n at most EVAL_MAX_LOGITS and engine_max_logits().
 * *ret_logits [n][vocab_size], the engine's until its next step. 0, -errno
 */
int eval_step(struct session *s, const uint32_t *ids, size_t n, const float **ret_logits,
              struct error *err);

/* Evaluates the next n tokens, any number, for their effect on what follows. 0, -errno */
int eval_skip(struct session *s, const uint32_t *ids, size_t n, struct error *err);
