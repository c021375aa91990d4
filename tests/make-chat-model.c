/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* make-chat-model OUTPUT [CONTEXT]: tests/chat-model.h for tests that are no C programs. */

#include <stdio.h>
#include <stdlib.h>

#include "tests/chat-model.h"

int main(int argc, char **argv)
{
    if (argc != 2 && argc != 3) {
        fprintf(stderr, "usage: make-chat-model OUTPUT [CONTEXT]\n");
        return 2;
    }
    chat_model_write(argv[1], 16,
                     argc == 3 ? (uint32_t)strtoul(argv[2], NULL, 10) : CHAT_MODEL_CONTEXT);
    return 0;
}
