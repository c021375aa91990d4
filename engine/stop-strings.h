/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * stop_strings: looks for any of some strings in a text that arrives in pieces, and lets through
 * only what can no longer be part of one. The match that ends first counts, and of those that end
 * at the same byte the longest: so the answer does not depend on where the pieces were cut.
 *
 * One per request; no thread of its own, nothing is allocated after stop_strings_new().
 */

#include <stdbool.h>
#include <stddef.h>

struct stop_strings;

/* strings [n], not empty, copied; n may be 0. 0, -ENOMEM, -EOVERFLOW */
int stop_strings_new(struct stop_strings **ret, const char *const *strings, size_t n);
struct stop_strings *stop_strings_free(struct stop_strings *s);
void stop_strings_freep(struct stop_strings **s);

/* The most bytes ever held back: one less than the longest string. */
size_t stop_strings_max_held(const struct stop_strings *s);

/*
 * Takes text [n] and writes what may go out to out (room for n + stop_strings_max_held()); returns
 * how many bytes. *ret_found: one was found; the text before it was written, everything else is
 * gone, and only stop_strings_free() remains.
 */
size_t stop_strings_push(struct stop_strings *s, const char *text, size_t n, char *out,
                         bool *ret_found);

/* The text ends: writes what was held back, at most stop_strings_max_held() bytes. */
size_t stop_strings_finish(struct stop_strings *s, char *out);
