/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* The UTF-8 helpers against each other and against RFC 3629's limits, on any bytes. */

#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void must(bool holds)
{
    if (!holds)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const char *s = (const char *)data;
    size_t i = 0, whole;
    bool valid = true;

    while (i < n) {
        uint32_t code = UINT32_MAX;
        size_t length = utf8_next(s + i, n - i, &code);
        char again[4];

        if (length == 0) {
            must(code == UINT32_MAX); /* written on success only */
            valid = false;
            i++;
            continue;
        }
        must(length <= 4 && length <= n - i);
        must(code <= 0x10ffff && (code < 0xd800 || code > 0xdfff));
        /* The shortest form is the only one, so writing gives the bytes that were read. */
        must(utf8_put(code, again) == length && memcmp(again, s + i, length) == 0);
        i += length;
    }
    must(utf8_valid(s, n) == valid);

    whole = utf8_complete_prefix(s, n);
    must(whole <= n && n - whole < 4);
    if (valid)
        must(whole == n);
    /* What is held back is neither empty nor valid by itself. */
    if (whole < n)
        must(!utf8_valid(s + whole, n - whole));
    return 0;
}
