/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The vocabulary of Gemma 4, which Gemma 3n shares but for the names of special pieces, against
 * ids from llama.cpp's tests and from gemma3n.md §6.2 and §7.1. The vocabulary is no part of the
 * source: its folder is $LLMD_SHARED/data/tokenizer; without it the test is skipped.
 */

#undef NDEBUG
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/checked.h"
#include "engine/chat.h"
#include "tools/import/foreign-tokenizer.h"
#include "tools/import/gguf.h"

static const struct {
    const char *text, *ids;
} vectors[] = {
    {"Hello", "9259"},
    {" Hello", "26352"},
    {"   Hello", "139 9259"},
    {"Hello, world!", "9259 236764 1902 236888"},
    {"What is the capital of France?", "3689 563 506 5279 529 7001 236881"},
    {"You are a helpful assistant.", "3048 659 496 11045 16326 236761"},
    {"1234567", "236770 236778 236800 236812 236810 236825 236832"},
    {"def f(x):\n    return x", "2063 517 236769 236781 1473 107 140 2060 1123"},
    {"  two  spaces", "138 13498 138 35220"},
    {"\t\tx", "255969 236781"},
    {"a\tb", "236746 255968 236763"},
    {"x\r\ny", "236781 251 107 236762"},
    {"\xf0\x9f\xab\xa9 ok", "478 397 409 407 7546"},
    {"\xc2\xa0x", "432 398 236781"},
    {"<table>hi</table>", "168 2202 176"},
    {"na\xc3\xafve caf\xc3\xa9", "1789 238527 560 33443"},
    {"\xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e\xe3\x81\xae\xe3\x83\x86\xe3\x82\xb9\xe3\x83\x88",
     "94951 236945 88733"},
    {"e\xcc\x81", "236744 238288"},
    /* 33 newlines: 31 and 2. */
    {"\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n", "137 108"},
};

static void expect_ids(const char *what, const struct token_array *ids, const char *expected)
{
    char *line = malloc(ids->n * 11 + 1);
    size_t n = 0;

    assert(line);
    *line = 0;
    for (size_t i = 0; i < ids->n; i++)
        n += (size_t)sprintf(line + n, "%s%u", i > 0 ? " " : "", ids->data[i]);
    if (strcmp(line, expected) != 0) {
        fprintf(stderr, "%s:\nexpected %s\n     got %s\n", what, expected, line);
        assert(!"different ids");
    }
    free(line);
}

static void expect(const struct tokenizer *t, const char *text, size_t n, const char *expected)
{
    struct token_array ids = {0};
    struct decoder d = {.n_pending = 0};
    char *decoded = malloc(n + 16 + decoder_room(t));
    size_t m = 0;

    assert(decoded);
    assert(tokenizer_encode(t, text, n, &(struct encode_options){.special = false}, &ids) == 0);
    expect_ids(text, &ids, expected);
    for (size_t i = 0; i < ids.n; i++)
        m += decoder_push(&d, t, ids.data[i], false, decoded + m);
    m += decoder_finish(&d, decoded + m);
    assert(m == n && memcmp(text, decoded, n) == 0);
    free(decoded);
    free(ids.data);
}

static char *read_file(const char *folder, const char *name)
{
    CLEANUP(freep) char *path = NULL;
    CLEANUP(fclosep) FILE *f = NULL;
    char *data;
    size_t n;

    assert(asprintf(&path, "%s/%s", folder, name) > 0);
    f = fopen(path, "re");
    assert(f);
    data = malloc(1 << 16);
    assert(data);
    n = fread(data, 1, (1 << 16) - 1, f);
    assert(n > 0 && n < (1 << 16) - 1);
    data[n] = 0;
    return data;
}

/* The texts lie between lines of "__ggml_vocab_test__"; a line of ids belongs to each. */
static void test_files(const struct tokenizer *t, const char *folder)
{
    static const char separator[] = "\n__ggml_vocab_test__\n";
    CLEANUP(freep) char *texts = read_file(folder, "gemma4-vocab.inp");
    CLEANUP(freep) char *lines = read_file(folder, "gemma4-vocab.out");
    char *text = texts, *line = lines;
    int n = 0;

    for (;;) {
        char *end = strstr(text, separator), *line_end = strchr(line, '\n'), *next;

        assert(line_end);
        next = line_end + 1;
        *line_end = 0;
        while (*line == ' ')
            line++;
        while (line_end > line && line_end[-1] == ' ')
            *--line_end = 0;
        expect(t, text, end ? (size_t)(end - text) : strlen(text), line);
        line = next;
        n++;
        if (!end)
            break;
        text = end + strlen(separator);
    }
    printf("%d vectors\n", n);
    assert(n == 46);
}

static void test_chat(const struct tokenizer *t)
{
    static const struct chat_message system = {CHAT_SYSTEM, "You are a helpful assistant.", 28};
    static const struct chat_message user = {CHAT_USER, "Hello", 5};
    const struct chat_options options = {.generate = true};
    struct token_array ids = {0};
    struct error err;

    assert(chat_encode(t, &user, 1, &options, &ids, NULL, &err) == 0);
    expect_ids("chat", &ids, "2 105 2364 107 9259 106 107 105 4368 107");
    ids.n = 0;
    assert(chat_encode(t, (struct chat_message[]){system, user}, 2, &options, &ids, NULL, &err) == 0);
    expect_ids("chat with system", &ids,
               "2 105 2364 107 3048 659 496 11045 16326 236761 108 9259 106 107 105 4368 107");
    free(ids.data);
}

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* For people; nothing is decided by it. */
static void time_long_lines(const struct tokenizer *t)
{
    static const char *const units[] = {
        "a",
        " ",
        "\n",
        "\xf0\x9f\x98\x80",
        "The quick brown fox jumps over the lazy dog. ",
        "ab",
        "\xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e",
        "\xff",
        "0",
    };
    size_t size = 1 << 20;
    char *text = malloc(size);

    assert(text);
    for (size_t u = 0; u < ARRAY_SIZE(units); u++) {
        struct token_array ids = {0};
        size_t unit = strlen(units[u]), n = 0;
        double start;

        for (; n + unit <= size; n += unit)
            memcpy(text + n, units[u], unit);
        start = seconds();
        assert(tokenizer_encode(t, text, n, &(struct encode_options){.bos = false}, &ids) == 0);
        printf("1 MiB of unit %zu: %zu ids in %.0f ms\n", u, ids.n, (seconds() - start) * 1e3);
        free(ids.data);
    }
    free(text);
}

int main(void)
{
    const char *shared = getenv("LLMD_SHARED");
    CLEANUP(freep) char *folder = NULL, *path = NULL;
    CLEANUP(gguf_freep) struct gguf *g = NULL;
    CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *f = NULL;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    struct error err = {{0}};
    double start;
    int r;

    assert(asprintf(&folder, "%s/data/tokenizer",
                    shared && *shared ? shared : LLMD_SOURCE_ROOT "/../shared") > 0);
    assert(asprintf(&path, "%s/gemma4-vocab.gguf", folder) > 0);
    if (access(path, R_OK) < 0) {
        printf("skipped: %s is not there (LLMD_SHARED names the folder)\n", path);
        return 77;
    }
    r = gguf_open(&g, path, &err);
    start = seconds();
    if (r == 0)
        r = foreign_tokenizer_from_gguf(&f, g, &err);
    printf("table from GGUF: %.0f ms\n", (seconds() - start) * 1e3);
    start = seconds();
    if (r == 0)
        r = tokenizer_new(&t, &f->table, &err);
    printf("tokenizer from the table: %.0f ms\n", (seconds() - start) * 1e3);
    if (r < 0)
        fprintf(stderr, "%s\n", err.text);
    assert(r == 0);

    for (size_t i = 0; i < ARRAY_SIZE(vectors); i++)
        expect(t, vectors[i].text, strlen(vectors[i].text), vectors[i].ids);
    test_files(t, folder);
    test_chat(t);
    time_long_lines(t);
    return 0;
}
