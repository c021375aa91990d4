/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* exchange: an input and its answer, as map and chat print them with --json. All borrowed. */

#include <stdbool.h>
#include <stdint.h>

#include "ipc/buffer.h"

struct exchange {
    uint64_t index; /* of the input, from 1 */
    const struct buffer *input, *output;
    const char *reason; /* of the end; "": nothing was asked */
    uint32_t prompt_tokens, completion_tokens, cached_tokens;
    bool failed; /* then these two in the place of the answer */
    const char *error_name, *error;
};

/* A status, or a complaint was made. */
int exchange_print(const struct exchange *x);
