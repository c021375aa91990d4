/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Stands in for sources whose readers are not in the tree yet: weak, so that they replace it. */

#include <errno.h>

#include "tools/import/source.h"

#define WEAK __attribute__((weak))

WEAK int hf_directory_open(struct source **ret, const char *path, struct error *err)
{
    (void)ret;
    return error_set(err, ENOSYS, "%s: Hugging Face directories cannot be read yet", path);
}
