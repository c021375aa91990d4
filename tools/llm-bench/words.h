/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* words: numbers in texts for people. */

#include <stdint.h>

/* What follows a noun that is counted: printf("%u thread%s", n, plural_s(n)). */
static inline const char *plural_s(uint32_t n)
{
    return n == 1 ? "" : "s";
}
