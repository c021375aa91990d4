/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/common/program.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void complain(const char *name, const char *format, va_list ap)
    __attribute__((format(printf, 2, 0)));

static void complain(const char *name, const char *format, va_list ap)
{
    fprintf(stderr, "%s: ", name);
    vfprintf(stderr, format, ap);
    fputc('\n', stderr);
}

int usage_error(const char *name, const char *format, ...)
{
    va_list ap;

    if (format) {
        va_start(ap, format);
        complain(name, format, ap);
        va_end(ap);
    }
    fprintf(stderr, "Try '%s --help'.\n", name);
    return EXIT_USAGE;
}

int run_error(const char *name, const char *format, ...)
{
    va_list ap;

    va_start(ap, format);
    complain(name, format, ap);
    va_end(ap);
    return EXIT_FAILURE;
}

int finish_output(const char *name)
{
    if (fflush(stdout) != 0 || ferror(stdout))
        return run_error(name, "cannot write to stdout: %s", strerror(errno));
    return EXIT_SUCCESS;
}
