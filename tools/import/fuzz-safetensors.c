/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Any bytes as the JSON header of a safetensors file. */

#include <stdint.h>
#include <string.h>

#include "tools/import/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct safetensors *s;
    struct error err = {""};
    uint64_t file_size;

    /* The first byte is how many bytes of data follow, which have to match. */
    if (n < 1)
        return 0;
    file_size = 8 + (n - 1) + data[0];
    if (safetensors_parse(&s, (const char *)data + 1, n - 1, file_size, "fuzz", &err) < 0) {
        if (!err.text[0] || strchr(err.text, '\n'))
            __builtin_trap();
        return 0;
    }
    for (size_t i = 0; i < safetensors_n_tensors(s); i++) {
        const struct safetensors_tensor *t = safetensors_tensor(s, i);

        if (t->offset > file_size || t->bytes > file_size - t->offset ||
            safetensors_find(s, t->name) != t)
            __builtin_trap();
    }
    safetensors_free(s);
    return 0;
}
