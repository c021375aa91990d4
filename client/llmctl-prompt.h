/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>

#include "ipc/buffer.h"

/*
 * Appends a prompt as the command line gives it: the arguments from optind on, joined by spaces,
 * and, after a newline, what comes through standard input unless that is a terminal. None at all is
 * a usage error, and too much is refused. A status
 */
int prompt_read(struct buffer *prompt, int argc, char **argv, bool with_stdin);
