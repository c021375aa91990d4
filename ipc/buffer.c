/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "ipc/buffer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"

void buffer_done(struct buffer *b)
{
    free(b->data);
    *b = (struct buffer){0};
}

int buffer_reserve(struct buffer *b, size_t n)
{
    size_t need, grown;
    char *p;

    if (ckd_add(&need, b->n, n))
        return -ENOMEM;
    if (need <= b->allocated)
        return 0;
    if (ckd_mul(&grown, b->allocated, 2) || grown < need)
        grown = need;
    if (grown < 256)
        grown = 256;
    p = realloc(b->data, grown);
    if (!p)
        return -ENOMEM;
    b->data = p;
    b->allocated = grown;
    return 0;
}

int buffer_append(struct buffer *b, const void *data, size_t n)
{
    int r = buffer_reserve(b, n);

    if (r < 0)
        return r;
    if (n > 0)
        memcpy(b->data + b->n, data, n);
    b->n += n;
    return 0;
}

void buffer_consume(struct buffer *b, size_t n)
{
    if (n > 0 && n < b->n)
        memmove(b->data, b->data + n, b->n - n);
    b->n -= MIN(n, b->n);
}
