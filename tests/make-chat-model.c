/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* make-chat-model OUTPUT: tests/chat-model.h for tests that are no C programs. */

#include <stdio.h>

#include "tests/chat-model.h"

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: make-chat-model OUTPUT\n");
        return 2;
    }
    chat_model_write(argv[1], 16);
    return 0;
}
