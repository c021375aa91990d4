/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Any bytes as a tokenizer.json; if they load, the same bytes as a text to encode. */

#include "tools/import/fuzz-vocabulary.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct foreign_tokenizer *f = NULL;
    struct error err = {""};
    int r = foreign_tokenizer_from_json(&f, (const char *)data, n, "fuzz", &err);

    fuzz_vocabulary(r, f, &err, data, n);
    return 0;
}
