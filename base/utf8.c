/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "base/utf8.h"

/*
 * How many bytes a character that begins with c has, and the bounds of its second byte, which is
 * where UTF-8 excludes overlong forms, surrogates and what lies beyond U+10FFFF. 0: no start byte.
 */
static size_t lead(unsigned char c, unsigned char *ret_low, unsigned char *ret_high)
{
    *ret_low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
    *ret_high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    if (c < 0x80)
        return 1;
    if (c < 0xc2 || c > 0xf4)
        return 0;
    return c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

/* How many leading bytes of s belong to one character, valid so far; its full length in *ret_want. */
static size_t scan(const char *s, size_t n, size_t *ret_want)
{
    unsigned char low, high;
    size_t want = n > 0 ? lead((unsigned char)s[0], &low, &high) : 0;
    size_t i;

    *ret_want = want;
    if (want == 0)
        return 0;
    for (i = 1; i < want && i < n; i++) {
        unsigned char c = (unsigned char)s[i];

        if (c < low || c > high)
            break;
        low = 0x80;
        high = 0xbf;
    }
    return i;
}

size_t utf8_next(const char *s, size_t n, uint32_t *ret_code)
{
    static const unsigned char mask[] = {0, 0x7f, 0x1f, 0x0f, 0x07};
    size_t want, have = scan(s, n, &want);
    uint32_t code;

    if (want == 0 || have < want)
        return 0;
    code = (unsigned char)s[0] & mask[want];
    for (size_t i = 1; i < want; i++)
        code = code << 6 | ((unsigned char)s[i] & 0x3f);
    *ret_code = code;
    return want;
}

bool utf8_valid(const char *s, size_t n)
{
    uint32_t code;

    while (n > 0) {
        size_t used = utf8_next(s, n, &code);

        if (used == 0)
            return false;
        s += used;
        n -= used;
    }
    return true;
}

size_t utf8_put(uint32_t code, char out[4])
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xc0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3f));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xe0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 0x3f));
        out[2] = (char)(0x80 | (code & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 0x3f));
    out[2] = (char)(0x80 | (code >> 6 & 0x3f));
    out[3] = (char)(0x80 | (code & 0x3f));
    return 4;
}

size_t utf8_complete_prefix(const char *s, size_t n)
{
    /* Only the last three bytes can hold the start of a character that is still incomplete. */
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        size_t want, have = scan(s + n - back, back, &want);

        if (want > back && have == back)
            return n - back;
    }
    return n;
}
