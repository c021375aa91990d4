/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Numbers as people write them in options and configuration files: decimal digits, without a sign
 * and with nothing before or after them. All return 0, or -EINVAL for what is none or does not fit;
 * then *ret stays as it is.
 */

#include <stdint.h>

int number_parse(const char *text, uint64_t most, uint64_t *ret);

/* Of bytes: K, M, G or T may follow, which are 1024s. */
int number_parse_bytes(const char *text, uint64_t *ret);

/* Only the digits at the beginning; *ret_rest is what follows them, in text. */
int number_begin(const char *text, uint64_t *ret, const char **ret_rest);
