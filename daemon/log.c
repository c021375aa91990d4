/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

void log_line(int priority, const char *format, ...)
{
    char line[1024];
    int n = 0;
    va_list ap;

    if (!isatty(STDERR_FILENO))
        n = snprintf(line, sizeof(line), "<%d>", priority);
    va_start(ap, format);
    vsnprintf(line + n, sizeof(line) - (size_t)n, format, ap);
    va_end(ap);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < 0x20)
            *c = '?';
    fprintf(stderr, "%s\n", line);
}
