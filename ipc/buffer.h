/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* buffer: a growing run of bytes. Zero-initialised; buffer_done() at the end. */

#include <stddef.h>

struct buffer {
    char *data;
    size_t n, allocated;
};

void buffer_done(struct buffer *b);

/* Makes room for n more bytes at data + b->n. 0, -ENOMEM */
int buffer_reserve(struct buffer *b, size_t n);
int buffer_append(struct buffer *b, const void *data, size_t n); /* 0, -ENOMEM */

/* Drops the first n bytes. */
void buffer_consume(struct buffer *b, size_t n);
