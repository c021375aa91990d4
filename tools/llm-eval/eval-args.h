/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* eval-args: the command lines of the subcommands that run a model. */

#include <getopt.h>

#include "engine/engine.h"

/* The last entries of such a subcommand's table of options. */
#define EVAL_ARGS                                  \
    ENGINE_ARGS, {"help", no_argument, NULL, 'h'}, \
    {                                              \
        NULL, 0, NULL, 0                           \
    }

#define EVAL_ARGS_STOP (-2)

/*
 * getopt_long() that sees to EVAL_ARGS and to what is no option itself. An option of the
 * subcommand's own; -1: there is none any more; EVAL_ARGS_STOP: all is said, end with *ret_status
 */
int eval_args_next(int argc, char **argv, const struct option *table, const char *help,
                   struct engine_options *engine, int *ret_status);

/* The one argument behind the options. EXIT_SUCCESS, or EXIT_USAGE: it was said */
int eval_args_model(int argc, char **argv, const char **ret);
