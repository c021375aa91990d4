/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-eval/token-file.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "tools/llm-eval/eval.h"

#define SHOWN 20 /* bytes of a bad word that a message repeats */

static bool is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\v' || c == '\f';
}

/* The word [n] as a number; false when it is none or beyond 64 bits. */
static bool to_number(const char *word, size_t n, uint64_t *ret)
{
    uint64_t id = 0;

    for (size_t i = 0; i < n; i++) {
        if (word[i] < '0' || word[i] > '9' || ckd_mul(&id, id, 10u) ||
            ckd_add(&id, id, (uint64_t)(word[i] - '0')))
            return false;
    }
    *ret = id;
    return true;
}

int token_file_parse(struct token_file *ret, const char *name, const char *text, size_t n,
                     uint32_t vocab_size, size_t max_length, struct error *err)
{
    CLEANUP(token_file_done) struct token_file f = {NULL, NULL, 0};
    const char *end = text + n, *line_end;
    size_t n_ids = 0, n_words = 0, n_lines = 1, line_number = 1;

    /* Bounds: a word is two bytes with its separator. */
    for (const char *p = text; p < end; p++)
        n_lines += *p == '\n';
    n_words = n / 2 + 1;
    f.ids = reallocarray(NULL, n_words, sizeof(*f.ids));
    f.sequences = reallocarray(NULL, MIN(n_lines, n_words), sizeof(*f.sequences));
    if (!f.ids || !f.sequences)
        return error_set(err, ENOMEM, "%s: out of memory", name);

    for (const char *line = text; line < end; line = line_end + 1, line_number++) {
        struct sequence s = {f.ids + n_ids, 0};

        line_end = memchr(line, '\n', (size_t)(end - line));
        if (!line_end)
            line_end = end;
        for (const char *p = line, *word; p < line_end;) {
            size_t column = (size_t)(p - line) + 1, length;
            uint64_t id;

            if (is_space(*p)) {
                p++;
                continue;
            }
            for (word = p; p < line_end && !is_space(*p);)
                p++;
            length = (size_t)(p - word);

            if (!to_number(word, length, &id))
                return error_set(err, EINVAL, "%s:%zu:%zu: '%.*s%s' is not a token id", name,
                                 line_number, column, (int)MIN(length, (size_t)SHOWN), word,
                                 length > SHOWN ? "..." : "");
            if (id >= vocab_size)
                return error_set(err, EINVAL, "%s:%zu:%zu: token %llu: the vocabulary ends at %u",
                                 name, line_number, column, (unsigned long long)id, vocab_size - 1);
            if (s.n == max_length)
                return error_set(err, EINVAL, "%s:%zu:%zu: more than %zu tokens, the context", name,
                                 line_number, column, max_length);
            f.ids[n_ids++] = (uint32_t)id;
            s.n++;
        }
        if (s.n > 0)
            f.sequences[f.n++] = s;
    }
    if (f.n == 0)
        return error_set(err, EINVAL, "%s: no tokens", name);
    *ret = f;
    f = (struct token_file){NULL, NULL, 0};
    return 0;
}

int token_file_read(struct token_file *ret, const char *path, uint32_t vocab_size,
                    size_t max_length, struct error *err)
{
    CLEANUP(freep) char *text = NULL;
    size_t n;
    int r;

    r = read_file(path, &text, &n, err);
    if (r < 0)
        return r;
    return token_file_parse(ret, strcmp(path, "-") == 0 ? "stdin" : path, text, n, vocab_size,
                            max_length, err);
}

void token_file_done(struct token_file *f)
{
    free(f->ids);
    free(f->sequences);
    *f = (struct token_file){NULL, NULL, 0};
}
