/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* token_file: sequences of token ids as text, one sequence a line; empty lines are none. */

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct sequence {
    const uint32_t *ids; /* [n], of the token_file */
    size_t n;
};

struct token_file {
    uint32_t *ids;
    struct sequence *sequences; /* [n], none empty, at least one */
    size_t n;
};

/*
 * Reads text [n] (a NUL follows); name is for messages. Every id must be below vocab_size and every
 * sequence at most max_length long.
 * 0, -EINVAL: err names file, line and column, -ENOMEM
 */
int token_file_parse(struct token_file *ret, const char *name, const char *text, size_t n,
                     uint32_t vocab_size, size_t max_length, struct error *err);

/* Reads the file, "-" for stdin. 0, -errno: err always says what went wrong */
int token_file_read(struct token_file *ret, const char *path, uint32_t vocab_size,
                    size_t max_length, struct error *err);

void token_file_done(struct token_file *f);
