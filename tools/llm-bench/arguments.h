/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* arguments: a subcommand's line, [OPTION]... [MODEL] [-- LLMD-OPTION...]. */

#include <getopt.h>
#include <stdbool.h>

#include "base/error.h"

/* An option as getopt_long() returns it, and its value. 0; -EINVAL: err says what is wrong */
typedef int (*arguments_take)(void *userdata, int option, const char *value, struct error *err);

struct arguments_form {
    const char *program, *help;
    const struct option *options; /* "help" stands among them, as 'h', and is answered here */
    arguments_take take;
    void *userdata;
};

/*
 * *ret_model: NULL if there is none. *ret_more: what follows "--", ending with NULL; *ret_has_more:
 * there was a "--". 0; 1: --help has been answered; EXIT_USAGE: the message is printed
 */
int arguments_read(const struct arguments_form *form, int argc, char **argv, const char **ret_model,
                   char *const **ret_more, bool *ret_has_more);
