/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-eval/eval-args.h"

#include <stdio.h>
#include <stdlib.h>

#include "tools/common/engine-args.h"
#include "tools/common/program.h"

int eval_args_next(int argc, char **argv, const struct option *table, const char *help,
                   struct engine_options *engine, int *ret_status)
{
    struct error err;
    int c, r;

    while ((c = getopt_long(argc, argv, "h", table, NULL)) != -1) {
        if (c == 'h') {
            puts(help);
            *ret_status = finish_output(argv[0]);
            return EVAL_ARGS_STOP;
        }
        r = c == '?' ? 0 : engine_args_take(engine, c, optarg, &err);
        if (c == '?' || r < 0) {
            *ret_status =
                c == '?' ? usage_error(argv[0], NULL) : usage_error(argv[0], "%s", err.text);
            return EVAL_ARGS_STOP;
        }
        if (r == 0)
            return c;
    }
    return -1;
}

int eval_args_model(int argc, char **argv, const char **ret)
{
    if (optind == argc)
        return usage_error(argv[0], "no MODEL given");
    if (optind + 1 < argc)
        return usage_error(argv[0], "one MODEL only, '%s' is too much", argv[optind + 1]);
    *ret = argv[optind];
    return EXIT_SUCCESS;
}
