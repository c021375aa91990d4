/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* output: answers on stdout, and the one line that comes and goes on a terminal's stderr. */

#include <stddef.h>

#include "ipc/buffer.h"

/*
 * Writes all of it to stdout, past stdio, and lets SIGINT and the time limit in while nobody reads.
 * STATUS_OK, a status, or a complaint was made.
 */
int output_put(const char *data, size_t n);

/* Likewise UTF-8 for a terminal, to which the model must not speak: control characters but line
 * feed and tab come out as U+FFFD. */
int output_put_on_terminal(const char *text, size_t n);

/* Appends the text as one line: a line feed as \n, a backslash as \\ (printf %b undoes it). 0,
 * -ENOMEM */
int output_escape(struct buffer *b, const char *text, size_t n);

/* Shows the line in the place of the last one; only on a terminal, and not with --quiet. */
void status_line(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Takes it away, where there is one. Async-signal-safe. */
void status_line_clear(void);
