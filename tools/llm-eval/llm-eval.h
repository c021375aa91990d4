/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * llm-eval: a table of subcommands, a file each. argv[0] is "llm-eval COMMAND", so that
 * getopt_long() works as in a main(); the result is the exit status: EXIT_SUCCESS, EXIT_FAILURE, or
 * EXIT_USAGE for wrong arguments. Answers go to stdout, notes to stderr.
 */

#include <stddef.h>
#include <stdio.h>

#define EXIT_USAGE 2

int logits_run(int argc, char **argv);
int perplexity_run(int argc, char **argv);
int kld_run(int argc, char **argv);
int skills_run(int argc, char **argv);
int tokenize_run(int argc, char **argv);
int detokenize_run(int argc, char **argv);

/*
 * Prints "NAME: message" and a line that points to --help to stderr; returns EXIT_USAGE. Names are
 * argv[0], as a subcommand gets it.
 * format is NULL where getopt_long() has printed the message already.
 */
int usage_error(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Prints "NAME: message" to stderr and returns EXIT_FAILURE. */
int run_error(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Flushes stdout: EXIT_SUCCESS, or EXIT_FAILURE with a message when the answer was not written. */
int finish_output(const char *name);

/* The rest of f, whatever it is; free() it. A NUL follows that does not count. 0, -errno, -ENOMEM
 */
int read_all(FILE *f, char **ret, size_t *ret_n);
