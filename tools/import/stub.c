/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Stands in for sources whose readers are not in the tree yet: weak, so that they replace it. */

#include <errno.h>

#include "tools/import/foreign-tokenizer.h"
#include "tools/import/source.h"

#define WEAK __attribute__((weak))

WEAK int foreign_tokenizer_from_gguf(struct foreign_tokenizer **ret, const struct gguf *g,
                                     struct error *err)
{
    (void)ret;
    (void)g;
    (void)err;
    return -ENODATA;
}

WEAK int foreign_tokenizer_from_folder(struct foreign_tokenizer **ret, const char *path,
                                       struct error *err)
{
    (void)ret;
    (void)path;
    (void)err;
    return -ENODATA;
}

WEAK struct foreign_tokenizer *foreign_tokenizer_free(struct foreign_tokenizer *f)
{
    return f;
}

WEAK int foreign_tokenizer_metadata(const struct tokenizer_table *table, char **ret)
{
    (void)table;
    (void)ret;
    return -ENOMEM;
}

WEAK int hf_directory_open(struct source **ret, const char *path, struct error *err)
{
    (void)ret;
    return error_set(err, ENOSYS, "%s: Hugging Face directories cannot be read yet", path);
}
