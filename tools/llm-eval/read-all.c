/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <errno.h>
#include <stdlib.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "tools/llm-eval/llm-eval.h"

int read_all(FILE *f, char **ret, size_t *ret_n)
{
    CLEANUP(freep) char *data = NULL;
    size_t n = 0, allocated = 0;

    do {
        if (allocated - n < 2) {
            char *p;

            if (ckd_mul(&allocated, MAX(allocated, (size_t)1 << 15), (size_t)2))
                return -ENOMEM;
            p = realloc(data, allocated);
            if (!p)
                return -ENOMEM;
            data = p;
        }
        errno = EIO; /* for a failure that tells none */
        n += fread(data + n, 1, allocated - n - 1, f);
        if (ferror(f))
            return -errno;
    } while (!feof(f));
    data[n] = 0;
    *ret = TAKE_PTR(data);
    *ret_n = n;
    return 0;
}
