/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What the fuzzers of vocabularies do with one that loads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "tools/import/foreign-tokenizer.h"

/*
 * Encodes text[0..n) both ways and decodes it: the ids are pieces, what comes back is UTF-8. A trap
 * where that does not hold; an error must be there and be one line.
 */
static inline void fuzz_vocabulary(int result, struct foreign_tokenizer *loaded,
                                   const struct error *err, const void *text, size_t n)
{
    CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *f = loaded;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    CLEANUP(freep) char *out = NULL;

    if (result < 0) {
        if (f || !err->text[0] || strchr(err->text, '\n'))
            __builtin_trap();
        return;
    }
    if (tokenizer_new(&t, &f->table, NULL) < 0) /* a loader has tried it already */
        __builtin_trap();
    out = malloc(decoder_room(t));
    if (!out)
        return;
    for (int special = 0; special < 2; special++) {
        struct token_array ids = {0};
        struct decoder d = {.n_pending = 0};

        if (tokenizer_encode(t, text, n, &(struct encode_options){.bos = true, .special = special},
                             &ids) == 0) {
            for (size_t i = 0; i < ids.n; i++) {
                size_t k = decoder_push(&d, t, ids.data[i], special, out);

                if (ids.data[i] >= f->table.n_pieces || k > decoder_room(t) || !utf8_valid(out, k))
                    __builtin_trap();
            }
        }
        if (!utf8_valid(out, decoder_finish(&d, out)))
            __builtin_trap();
        free(ids.data);
    }
}
