/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Reads one character of strict UTF-8 (RFC 3629: no overlong forms, no surrogates, at most
 * U+10FFFF) from s[0..n). Returns its length in bytes, 1 to 4, and the code point; 0 when s does
 * not begin with a whole valid character, or n is 0.
 */
size_t utf8_next(const char *s, size_t n, uint32_t *ret_code);

bool utf8_valid(const char *s, size_t n);

/* Writes the character (a scalar value) to out, 1 to 4 bytes; returns how many. */
size_t utf8_put(uint32_t code, char out[4]);

/*
 * Length of the longest prefix of s[0..n) that does not end inside a character that further bytes
 * could complete. Bytes that can never become valid count as complete.
 */
size_t utf8_complete_prefix(const char *s, size_t n);
