/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-bench/arguments.h"

#include <stdio.h>
#include <string.h>

#include "tools/common/program.h"

int arguments_read(const struct arguments_form *form, int argc, char **argv, const char **ret_model,
                   char *const **ret_more, bool *ret_has_more)
{
    struct error err;
    int c, n = argc;

    /* What follows "--" is llmd's, whatever getopt_long() would move. */
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--") == 0) {
            n = i;
            break;
        }
    while ((c = getopt_long(n, argv, "h", form->options, NULL)) != -1) {
        if (c == 'h') {
            puts(form->help);
            return 1;
        }
        if (c == '?')
            return usage_error(form->program, NULL);
        if (form->take(form->userdata, c, optarg, &err) < 0)
            return usage_error(form->program, "%s", err.text);
    }
    if (optind + 1 < n)
        return usage_error(form->program, "one MODEL only, '%s' is too much", argv[optind + 1]);
    *ret_model = optind < n ? argv[optind] : NULL;
    *ret_more = argv + (n < argc ? n + 1 : argc);
    *ret_has_more = n < argc;
    return 0;
}
