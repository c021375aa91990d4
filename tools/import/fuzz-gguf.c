/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Any bytes as a GGUF file: parsed or refused, and every entry readable to its end. */

#include <assert.h>
#include <stdint.h>
#include <string.h>

#include "tools/import/gguf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static volatile unsigned sink;

static void touch(const void *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        sink += ((const uint8_t *)p)[i];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct gguf *g;
    struct error err = {""};

    /* As if the tensors' data followed, so that tables are reached in small inputs. */
    if (gguf_parse(&g, data, n, (uint64_t)n + (1u << 20), "fuzz", &err) < 0) {
        if (!err.text[0] || strchr(err.text, '\n'))
            __builtin_trap();
        return 0;
    }
    for (size_t i = 0; i < gguf_n_entries(g); i++) {
        const struct gguf_entry *e = gguf_entry(g, i);
        struct gguf_strings s = gguf_strings_begin(e);
        struct gguf_string string;
        int64_t integer;
        float real;
        bool truth;

        touch(e->key.text, e->key.n);
        while (gguf_strings_next(&s, &string))
            touch(string.text, string.n);
        for (size_t k = 0; k < e->n; k++) {
            if (gguf_get_i64(e, k, &integer) == 0)
                sink += (unsigned)integer;
            if (gguf_get_float(e, k, &real) == 0)
                sink += real > 0;
            if (gguf_get_bool(e, k, &truth) == 0)
                sink += truth;
        }
        if (gguf_get_string(e, &string) == 0)
            touch(string.text, string.n);
    }
    for (size_t i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor(g, i);

        touch(t->name.text, t->name.n);
        if (t->offset > (uint64_t)n + (1u << 20) || t->bytes > (uint64_t)n + (1u << 20) - t->offset)
            __builtin_trap();
    }
    gguf_free(g);
    return 0;
}
