/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * llm-eval: a table of subcommands, a file each. argv[0] is "llm-eval COMMAND", so that
 * getopt_long() works as in a main(); the result is the exit status, program.h's.
 */

#include <stddef.h>
#include <stdio.h>

#include "tools/common/program.h"

int logits_run(int argc, char **argv);
int perplexity_run(int argc, char **argv);
int kld_run(int argc, char **argv);
int skills_run(int argc, char **argv);
int tokenize_run(int argc, char **argv);
int detokenize_run(int argc, char **argv);

/* The rest of f, whatever it is; free() it. A NUL follows that does not count. 0, -errno, -ENOMEM
 */
int read_all(FILE *f, char **ret, size_t *ret_n);
