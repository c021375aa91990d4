/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/utf8.h"

/* Replaces in place, byte by byte, so the length never grows. */
static void make_printable(char *text)
{
    size_t n = strlen(text);

    for (size_t i = 0; i < n;) {
        uint32_t c;
        size_t used = utf8_next(text + i, n - i, &c);

        if (used == 0 || c < 0x20 || (c >= 0x7f && c < 0xa0)) {
            text[i++] = '?';
            for (size_t k = 1; k < used; k++)
                text[i++] = '?';
        } else {
            i += used;
        }
    }
}

int(error_set)(struct error *err, int code, const char *format, ...)
{
    va_list ap;

    if (err) {
        va_start(ap, format);
        vsnprintf(err->text, sizeof(err->text), format, ap);
        va_end(ap);
        make_printable(err->text);
    }
    return -code;
}

int error_prefix(struct error *err, int code, const char *format, ...)
{
    struct error prefix;
    char full[2 * sizeof(prefix.text) + 2];
    va_list ap;

    if (err) {
        va_start(ap, format);
        vsnprintf(prefix.text, sizeof(prefix.text), format, ap);
        va_end(ap);
        snprintf(full, sizeof(full), "%s: %s", prefix.text, err->text);
        memcpy(err->text, full, sizeof(err->text));
        err->text[sizeof(err->text) - 1] = 0;
        make_printable(err->text);
    }
    return -code;
}
