/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include "tools/llm-eval/token-file.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

/* expected: every sequence in brackets. */
static void accept_text(const char *text, size_t n, const char *expected)
{
    CLEANUP(token_file_done) struct token_file f = {NULL, NULL, 0};
    char *exact = malloc(n + 1), got[512] = "";
    struct error err;
    size_t used = 0;

    assert(exact);
    memcpy(exact, text, n); /* so that ASan sees a read beyond */
    exact[n] = 0;
    assert(token_file_parse(&f, "F", exact, n, 1000, 4, &err) == 0);
    free(exact);
    for (size_t i = 0; i < f.n; i++) {
        used += (size_t)sprintf(got + used, "[");
        for (size_t k = 0; k < f.sequences[i].n; k++)
            used += (size_t)sprintf(got + used, "%s%u", k ? " " : "", f.sequences[i].ids[k]);
        used += (size_t)sprintf(got + used, "]");
    }
    if (strcmp(got, expected) != 0)
        fprintf(stderr, "%s, not %s\n", got, expected);
    assert(strcmp(got, expected) == 0);
}

static void refuse(const char *text, const char *message)
{
    struct token_file f = {NULL, NULL, 0};
    struct error err = {""};

    assert(token_file_parse(&f, "F", text, strlen(text), 1000, 4, &err) == -EINVAL);
    if (strcmp(err.text, message) != 0)
        fprintf(stderr, "%s\n", err.text);
    assert(strcmp(err.text, message) == 0);
    assert(!f.ids && !f.sequences);
}

int main(void)
{
#define ACCEPT(text, expected) accept_text(text, sizeof(text) - 1, expected)
    ACCEPT("1", "[1]");
    ACCEPT("1 2 3\n", "[1 2 3]");
    ACCEPT("1 2\n3", "[1 2][3]");
    ACCEPT("\n\n 7\t8 \r\n\n9\n \n", "[7 8][9]");
    ACCEPT("999 0 000000000000000000005", "[999 0 5]");
    ACCEPT("1 2 3 4\n5 6 7 8", "[1 2 3 4][5 6 7 8]");

    refuse("", "F: no tokens");
    refuse(" \n\n\t", "F: no tokens");
    refuse("a", "F:1:1: 'a' is not a token id");
    refuse("1 2\n  -3", "F:2:3: '-3' is not a token id");
    refuse("1 +2", "F:1:3: '+2' is not a token id");
    refuse("1,2", "F:1:1: '1,2' is not a token id");
    refuse("1\n\n2.0", "F:3:1: '2.0' is not a token id");
    refuse("5 1000", "F:1:3: token 1000: the vocabulary ends at 999");
    refuse("4294967297", "F:1:1: token 4294967297: the vocabulary ends at 999");
    refuse("18446744073709551616", "F:1:1: '18446744073709551616' is not a token id");
    refuse("184467440737095516160", "F:1:1: '18446744073709551616...' is not a token id");
    refuse("1 2 3 4 5", "F:1:9: more than 4 tokens, the context");
    refuse("1 2\n1 2 3 4\n  1 2 3 4   5\n", "F:3:13: more than 4 tokens, the context");

    /* A NUL is no white space and no end. */
    {
        struct token_file f = {NULL, NULL, 0};
        struct error err;

        assert(token_file_parse(&f, "F", "1 \0002", 4, 1000, 4, &err) == -EINVAL);
    }
    return 0;
}
