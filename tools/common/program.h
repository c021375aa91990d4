/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * program: how the programs of tools/ end. The result is the exit status: EXIT_SUCCESS,
 * EXIT_FAILURE, or EXIT_USAGE for wrong arguments. Answers go to stdout, notes to stderr. `name` is
 * what the program, or its subcommand, is called: argv[0] as a subcommand gets it.
 */

#define EXIT_USAGE 2

/*
 * Prints "NAME: message" and a line that points to --help to stderr; returns EXIT_USAGE.
 * format is NULL where getopt_long() has printed the message already.
 */
int usage_error(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Prints "NAME: message" to stderr and returns EXIT_FAILURE. */
int run_error(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Flushes stdout: EXIT_SUCCESS, or EXIT_FAILURE with a message when the answer was not written. */
int finish_output(const char *name);
