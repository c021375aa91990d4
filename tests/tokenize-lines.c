/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * For tests/test-tokenizer.py: a tokenizer over many lines at once.
 *
 *   tokenize-lines ids FILE     every line of stdin as ids, without bos, control pieces as text
 *   tokenize-lines text FILE    every line of stdin, encoded and decoded again
 *   tokenize-lines table FILE   the settings, then every piece: type, score, text in hexadecimal
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "tools/llm-eval/any-tokenizer.h"

static int print_lines(const struct tokenizer *t, bool decode)
{
    CLEANUP(freep) char *line = NULL, *out = malloc(decoder_room(t));
    struct token_array ids = {0};
    size_t allocated = 0;
    ssize_t n;

    if (!out)
        return -ENOMEM;
    while ((n = getline(&line, &allocated, stdin)) > 0) {
        struct decoder d = {.n_pending = 0};
        int r;

        if (line[n - 1] == '\n')
            n--;
        ids.n = 0;
        r = tokenizer_encode(t, line, (size_t)n, &(struct encode_options){.special = false}, &ids);
        if (r < 0)
            return r;
        for (size_t i = 0; i < ids.n; i++) {
            if (decode)
                fwrite(out, 1, decoder_push(&d, t, ids.data[i], false, out), stdout);
            else
                printf("%s%u", i > 0 ? " " : "", ids.data[i]);
        }
        fwrite(out, 1, decoder_finish(&d, out), stdout);
        putchar('\n');
    }
    free(ids.data);
    return 0;
}

static void print_table(const struct tokenizer_table *t)
{
    printf("bos %u eos %u unk %u pad %u start %u end %u add_bos %d add_space_prefix %d\n", t->bos,
           t->eos, t->unk, t->pad, t->start_of_turn, t->end_of_turn, t->add_bos,
           t->add_space_prefix);
    for (uint32_t i = 0; i < t->n_pieces; i++) {
        printf("%u %u %.9g ", i, t->types[i], (double)t->scores[i]);
        for (uint32_t k = t->offsets[i]; k < t->offsets[i + 1]; k++)
            printf("%02x", (unsigned char)t->text[k]);
        putchar('\n');
    }
}

int main(int argc, char **argv)
{
    CLEANUP(any_tokenizer_done) struct any_tokenizer a = {0};
    struct error err;
    int r = 0;

    if (argc != 3)
        return 2;
    if (any_tokenizer_open(&a, argv[2], &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    if (strcmp(argv[1], "table") == 0)
        print_table(tokenizer_table(a.t));
    else
        r = print_lines(a.t, strcmp(argv[1], "text") == 0);
    return r == 0 && fflush(stdout) == 0 ? 0 : 1;
}
