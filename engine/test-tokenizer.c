/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A small vocabulary made here: encoding against a quadratic reference that is obviously right,
 * round trips over random valid UTF-8, streaming decode at every split, broken tables.
 */

#undef NDEBUG
#include "engine/tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"

#define M "\xe2\x96\x81"

/* Lets the allocation after so many others fail; negative: none does. */
static int fail_after = -1;

static bool fails(void)
{
    return fail_after >= 0 && fail_after-- == 0;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? NULL : __real_realloc(p, n);
}

static uint32_t seed = 1;

static uint32_t next_random(uint32_t below)
{
    seed = seed * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)(seed >> 8) * below) >> 24);
}

/* A table that grows, owned. */
struct vocabulary {
    struct tokenizer_table table;
    char text[1 << 16];
    uint32_t offsets[2048];
    float scores[2048];
    uint8_t types[2048];
};

static uint32_t add(struct vocabulary *v, const char *text, size_t n, enum piece_type type,
                    float score)
{
    uint32_t id = v->table.n_pieces++;

    assert(id + 1 < ARRAY_SIZE(v->offsets) && v->offsets[id] + n <= sizeof(v->text));
    memcpy(v->text + v->offsets[id], text, n);
    v->offsets[id + 1] = v->offsets[id] + (uint32_t)n;
    v->scores[id] = score;
    v->types[id] = (uint8_t)type;
    return id;
}

static uint32_t add_string(struct vocabulary *v, const char *text, enum piece_type type,
                           float score)
{
    return add(v, text, strlen(text), type, score);
}

static void start(struct vocabulary *v)
{
    memset(v, 0, sizeof(*v));
    v->table = (struct tokenizer_table){
        .text = v->text,
        .offsets = v->offsets,
        .scores = v->scores,
        .types = v->types,
        .pad = 0,
        .eos = 1,
        .bos = 2,
        .unk = 3,
        .start_of_turn = TOKENIZER_NONE,
        .end_of_turn = TOKENIZER_NONE,
        .add_bos = true,
    };
    add_string(v, "<pad>", PIECE_CONTROL, 0);
    add_string(v, "<eos>", PIECE_CONTROL, 0);
    add_string(v, "<bos>", PIECE_CONTROL, 0);
    add_string(v, "<unk>", PIECE_UNKNOWN, 0);
}

static void add_bytes(struct vocabulary *v)
{
    for (int i = 0; i < 256; i++) {
        char text[8];

        snprintf(text, sizeof(text), "<0x%02X>", i);
        add_string(v, text, PIECE_BYTE, 0);
    }
}

#define FIRST_BYTE 21u /* ids of fill() */
#define FIRST_NORMAL 277u

/* Literal pieces, bytes, and ordinary pieces among which there are many ways and ties. */
static void fill(struct vocabulary *v)
{
    static const char *const literal[] = {
        "\n",
        "\n\n",
        "\n\n\n",
        M M,
        M M M,
        M M M M M,
        "<table>",
        "<tab",
        "\xf0\x9f\xa6\x80",
        "<table>" M "<",
        "b" M "b",
        "\t",
        "\t\t",
        "<start_of_turn>",
        "<end_of_turn>",
    };
    static const char *const normal[] = {
        "ab",
        "bc",
        "abc",
        M "a",
        "aa",
        "aaa",
        "aaaa",
        "aaaaaaaa",
        "ba",
        "cab",
        M "ab",
        "a" M,
        "ab" M "c",
        "he",
        "ll",
        "hello",
        "lo",
        "hell",
        M "he",
        M "hello",
        "\xc3\xa9"
        "a",
        "\xe6\x97\xa5\xe6\x9c\xac",
        "l"
        "\xc3\xa9",
        "c\xc3\xa9",
        "st",
        "<st",
        "<",
        "ta",
        "tab",
        "<b",
        "os",
        "os>", /* with "<b" the text of a control piece, which no merge may make */
        "bo",  /* so that b and o may meet */
    };
    static const char *const single[] = {
        M,   "a", "b", "c", "h", "e", "l", "o", "\xc3\xa9", "\xe6\x97\xa5", "\xe6\x9c\xac",
        "s", "t", ">",
    };

    start(v);
    add_string(v, "<mask>", PIECE_CONTROL, 0);
    for (size_t i = 0; i < ARRAY_SIZE(literal); i++)
        add_string(v, literal[i], PIECE_USER_DEFINED, 0);
    add_string(v, "[filler]", PIECE_UNUSED, -10000);
    assert(v->table.n_pieces == FIRST_BYTE);
    add_bytes(v);
    assert(v->table.n_pieces == FIRST_NORMAL);
    /* Ties: two neighbours share a score. Some are positive. */
    for (size_t i = 0; i < ARRAY_SIZE(normal); i++)
        add_string(v, normal[i], PIECE_NORMAL, 5 - (float)(i / 2));
    for (size_t i = 0; i < ARRAY_SIZE(single); i++)
        if (strcmp(single[i], "<") != 0)
            add_string(v, single[i], PIECE_NORMAL, -1000 - (float)i);
}

static struct tokenizer *make(const struct vocabulary *v)
{
    struct tokenizer *t = NULL;
    struct error err = {{0}};
    int r = tokenizer_new(&t, &v->table, &err);

    if (r < 0)
        fprintf(stderr, "%s\n", err.text);
    assert(r == 0 && t);
    return t;
}

/* The reference: plain text of SentencePiece's rules, every step looks at everything. */
static uint32_t slow_find(const struct tokenizer_table *v, const char *text, size_t n)
{
    for (uint32_t i = 0; i < v->n_pieces; i++)
        if (v->offsets[i + 1] - v->offsets[i] == n && memcmp(v->text + v->offsets[i], text, n) == 0)
            return i;
    return TOKENIZER_NONE;
}

static void slow_run(const struct tokenizer_table *v, uint32_t first_byte, const char *text,
                     size_t n, struct token_array *ids)
{
    size_t ends[4096], n_symbols = 0;
    uint32_t code;

    for (size_t i = 0; i < n; i += utf8_next(text + i, n - i, &code)) {
        assert(n_symbols < ARRAY_SIZE(ends));
        ends[n_symbols++] = i + utf8_next(text + i, n - i, &code);
    }
    for (;;) {
        size_t best = SIZE_MAX;
        float best_score = 0;

        for (size_t k = 0; k + 1 < n_symbols; k++) {
            size_t from = k > 0 ? ends[k - 1] : 0;
            uint32_t id = slow_find(v, text + from, ends[k + 1] - from);

            if (id == TOKENIZER_NONE || v->types[id] != PIECE_NORMAL)
                continue;
            if (best == SIZE_MAX || v->scores[id] > best_score) {
                best = k;
                best_score = v->scores[id];
            }
        }
        if (best == SIZE_MAX)
            break;
        memmove(ends + best, ends + best + 1, (n_symbols - best - 1) * sizeof(*ends));
        n_symbols--;
    }
    for (size_t k = 0; k < n_symbols; k++) {
        size_t from = k > 0 ? ends[k - 1] : 0;
        uint32_t id = slow_find(v, text + from, ends[k] - from);

        if (id != TOKENIZER_NONE && v->types[id] == PIECE_NORMAL) {
            assert(token_array_append(ids, &id, 1) == 0);
            continue;
        }
        for (size_t i = from; i < ends[k]; i++) {
            id = first_byte + (unsigned char)text[i];
            assert(token_array_append(ids, &id, 1) == 0);
        }
    }
}

static void slow_encode(const struct tokenizer_table *v, uint32_t first_byte, const char *text,
                        size_t n, bool special, struct token_array *ids)
{
    char escaped[4096 * 3];
    size_t size = 0, run = 0, at = 0;

    for (size_t i = 0; i < n; i++) {
        if (text[i] == ' ') {
            memcpy(escaped + size, M, 3);
            size += 3;
        } else {
            escaped[size++] = text[i];
        }
    }
    while (at < size) {
        uint32_t best = TOKENIZER_NONE, best_size = 0;

        for (uint32_t i = 0; i < v->n_pieces; i++) {
            uint32_t s = v->offsets[i + 1] - v->offsets[i];
            const char *p = v->text + v->offsets[i];
            bool turn = s > 9 && memcmp(p + s - 9, "_of_turn>", 9) == 0;
            bool wanted = v->types[i] == PIECE_USER_DEFINED && !turn;

            if (special && (turn || v->types[i] == PIECE_CONTROL || v->types[i] == PIECE_UNKNOWN))
                wanted = true;
            if (wanted && s > best_size && s <= size - at && memcmp(p, escaped + at, s) == 0) {
                best = i;
                best_size = s;
            }
        }
        if (best == TOKENIZER_NONE) {
            uint32_t code;

            at += utf8_next(escaped + at, size - at, &code);
            continue;
        }
        slow_run(v, first_byte, escaped + run, at - run, ids);
        assert(token_array_append(ids, &best, 1) == 0);
        at += best_size;
        run = at;
    }
    slow_run(v, first_byte, escaped + run, size - run, ids);
}

static void print_ids(const char *what, const struct token_array *ids)
{
    fprintf(stderr, "%s", what);
    for (size_t i = 0; i < ids->n; i++)
        fprintf(stderr, " %u", ids->data[i]);
    fprintf(stderr, "\n");
}

static void assert_same(const struct token_array *a, const struct token_array *b)
{
    if (a->n != b->n || (a->n > 0 && memcmp(a->data, b->data, a->n * sizeof(*a->data)) != 0)) {
        print_ids("expected", a);
        print_ids("     got", b);
        assert(!"different ids");
    }
}

static size_t decode_all(const struct tokenizer *t, const struct token_array *ids, bool special,
                         char *out)
{
    struct decoder d = {.n_pending = 0};
    size_t n = 0;

    for (size_t i = 0; i < ids->n; i++) {
        size_t k = decoder_push(&d, t, ids->data[i], special, out + n);

        assert(k <= decoder_room(t));
        n += k;
    }
    return n + decoder_finish(&d, out + n);
}

/* Random text of snippets that meet, and random characters. At most 4 * n bytes. */
static size_t random_text(char *out, size_t n)
{
    static const char *const snippets[] = {
        "a",
        "b",
        "c",
        " ",
        "\n",
        "hello",
        " hello",
        "aaaa",
        "\t",
        "<tab",
        "le>",
        "<table>",
        "<bos>",
        "\xc3\xa9",
        "\xe6\x97\xa5",
        "\xe6\x9c\xac",
        "   ",
        "<st",
        "<start_of_turn>",
        "\xf0\x9f\xa6\x80",
        "\xf0\x9f\x98\x80",
        "\r",
        "[filler]",
        "<0x0A>",
        "he",
        "ll",
        "lo",
        "<unk>",
    };
    size_t size = 0;

    while (size < n) {
        uint32_t code;

        switch (next_random(8)) {
        case 0: /* any character but surrogates and U+2581 */
            code = next_random(3) == 0 ? next_random(0x110000) : next_random(0x300);
            if ((code >= 0xd800 && code < 0xe000) || code == 0x2581)
                code = 'x';
            size += utf8_put(code, out + size);
            break;
        case 1: { /* a run */
            char c = "a \n\tb"[next_random(5)];

            for (uint32_t k = next_random(40); k > 0 && size < n; k--)
                out[size++] = c;
            break;
        }
        default: {
            const char *s = snippets[next_random(ARRAY_SIZE(snippets))];

            memcpy(out + size, s, strlen(s));
            size += strlen(s);
        }
        }
    }
    return size;
}

static void test_reference(void)
{
    static struct vocabulary v;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    static char text[1024], decoded[1 << 16];

    fill(&v);
    t = make(&v);
    for (int round = 0; round < 4000; round++) {
        CLEANUP(freep) uint32_t *slow_data = NULL, *fast_data = NULL;
        struct token_array slow = {0}, fast = {0};
        struct encode_options options = {.special = round % 2};
        size_t n = random_text(text, next_random(120)), m;

        slow_encode(&v.table, FIRST_BYTE, text, n, options.special, &slow);
        assert(tokenizer_encode(t, text, n, &options, &fast) == 0);
        slow_data = slow.data;
        fast_data = fast.data;
        assert_same(&slow, &fast);
        m = decode_all(t, &fast, true, decoded);
        assert(m == n && memcmp(text, decoded, n) == 0);
    }
}

static void expect(const struct tokenizer *t, const char *text, const char *ids, bool special)
{
    struct token_array got = {0};
    char line[256] = "";
    size_t n = 0;

    assert(tokenizer_encode(t, text, strlen(text),
                            &(struct encode_options){.bos = true, .special = special}, &got) == 0);
    for (size_t i = 0; i < got.n; i++)
        n += (size_t)snprintf(line + n, sizeof(line) - n, "%s%u", i > 0 ? " " : "", got.data[i]);
    if (strcmp(line, ids) != 0) {
        fprintf(stderr, "'%s': expected '%s', got '%s'\n", text, ids, line);
        assert(!"different ids");
    }
    free(got.data);
}

static void test_literal(void)
{
    static struct vocabulary v;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;

    fill(&v);
    t = make(&v);
    assert(tokenizer_table(t)->start_of_turn == 18 && tokenizer_table(t)->end_of_turn == 19);
    assert(tokenizer_find(t, "<table>", 7) == 11);
    assert(tokenizer_find(t, "<tabl", 5) == TOKENIZER_NONE);
    assert(tokenizer_find(t, "", 0) == TOKENIZER_NONE);

    expect(t, "", "2", false);
    expect(t, "<bos>", "2 2", true);
    expect(t, "\n\n\n\n\n", "2 7 6", false); /* 3 + 2 */
    expect(t, "<start_of_turn>", "2 18", true);
    expect(t, "<table>", "2 11", true);
    expect(t, "<tabx", "2 12 141", false);
    /* Not the literal piece that begins first, but the longest of those that begin there. */
    expect(t, "<table> <", "2 14", false);

    for (uint32_t id = 0; id < v.table.n_pieces + 2; id++) {
        bool control = id <= 4 || id == 18 || id == 19 || id == 20 || id >= v.table.n_pieces;

        assert(tokenizer_is_special(t, id) == control);
        assert(tokenizer_is_end(t, id) == (id == 1 || id == 19));
    }
    assert(!tokenizer_is_end(t, TOKENIZER_NONE));
}

/* Without byte pieces: unknown characters in a row are one unknown piece. A prefix. No bos. */
static void test_unknown(void)
{
    static struct vocabulary v;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL, *prefixed = NULL;

    start(&v);
    add_string(&v, "a", PIECE_NORMAL, -2);
    add_string(&v, M, PIECE_NORMAL, -3);
    add_string(&v, M "a", PIECE_NORMAL, -1);
    v.table.add_bos = false;
    t = make(&v);
    expect(t, "axya \xc3\xa9", "4 3 4 5 3", false);
    v.table.add_space_prefix = true;
    prefixed = make(&v);
    expect(prefixed, "axya \xc3\xa9", "6 3 4 5 3", false);
    expect(prefixed, "", "", false);
}

static void test_invalid_utf8(void)
{
    static struct vocabulary v;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    /* U+FFFD is EF BF BD: three byte pieces, once for every byte that is not UTF-8. */
    const char *fffd = "260 212 210";
    char ids[64];

    fill(&v);
    t = make(&v);
    snprintf(ids, sizeof(ids), "2 %s 311 %s %s", fffd, fffd, fffd);
    expect(t,
           "\xff"
           "a\xe2\x82",
           ids, false);
    snprintf(ids, sizeof(ids), "2 %s %s %s", fffd, fffd, fffd);
    expect(t, "\xed\xa0\x80", ids, false); /* a surrogate */
}

static void test_nul(void)
{
    static struct vocabulary v;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    struct token_array ids = {0};
    char out[64];

    fill(&v);
    t = make(&v);
    assert(tokenizer_encode(t, "a\0b", 3, &(struct encode_options){0}, &ids) == 0);
    assert(ids.n == 3 && ids.data[1] == FIRST_BYTE);
    assert(decode_all(t, &ids, false, out) == 3 && memcmp(out, "a\0b", 3) == 0);
    free(ids.data);
}

/* Random ids, bytes among them that are not UTF-8: cut anywhere, and against all bytes at once. */
static void test_streaming(void)
{
    static struct vocabulary v;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;

    fill(&v);
    t = make(&v);
    for (int round = 0; round < 3000; round++) {
        uint32_t ids[24];
        char raw[1024], expected[4096], got[4096];
        size_t n_raw = 0, n_expected = 0, n_got = 0;
        struct decoder d = {.n_pending = 0};

        for (size_t i = 0; i < ARRAY_SIZE(ids); i++) {
            static const uint8_t likely[] = {0xf0, 0x9f, 0x98, 0x80, 0xe2, 0x82, 0xac, 0xc3,
                                             0xa9, 0xed, 0xa0, 0xf4, 0x90, 0x41, 0xff, 0xc0};

            switch (next_random(4)) {
            case 0:
                ids[i] = next_random(v.table.n_pieces + 3);
                break;
            case 1:
                ids[i] = FIRST_BYTE + next_random(256);
                break;
            default:
                ids[i] = FIRST_BYTE + likely[next_random(ARRAY_SIZE(likely))];
            }
            if (ids[i] >= FIRST_BYTE && ids[i] < FIRST_NORMAL) {
                raw[n_raw++] = (char)(ids[i] - FIRST_BYTE);
            } else if (!tokenizer_is_special(t, ids[i])) {
                uint32_t from = v.offsets[ids[i]], size = v.offsets[ids[i] + 1] - from;

                for (uint32_t k = 0; k < size; k++) {
                    if (size - k >= 3 && memcmp(v.text + from + k, M, 3) == 0) {
                        raw[n_raw++] = ' ';
                        k += 2;
                    } else {
                        raw[n_raw++] = v.text[from + k];
                    }
                }
            }
        }
        for (size_t i = 0; i < n_raw;) {
            uint32_t code;
            size_t used = utf8_next(raw + i, n_raw - i, &code);

            memcpy(expected + n_expected, used > 0 ? raw + i : "\xef\xbf\xbd", used > 0 ? used : 3);
            n_expected += used > 0 ? used : 3;
            i += used > 0 ? used : 1;
        }
        for (size_t i = 0; i < ARRAY_SIZE(ids); i++) {
            size_t k = decoder_push(&d, t, ids[i], false, got + n_got);

            assert(k <= decoder_room(t));
            assert(utf8_valid(got + n_got, k)); /* never ends within a character */
            assert(d.n_pending <= 3);
            n_got += k;
        }
        n_got += decoder_finish(&d, got + n_got);
        assert(n_got == n_expected && memcmp(got, expected, n_got) == 0);
    }
}

static void refuse(const struct vocabulary *v, const char *because)
{
    struct tokenizer *t = NULL;
    struct error err = {{0}};

    assert(tokenizer_new(&t, &v->table, &err) == -EINVAL);
    if (!strstr(err.text, because)) {
        fprintf(stderr, "expected '%s', got '%s'\n", because, err.text);
        assert(!"another message");
    }
    assert(!t);
}

static void test_broken_tables(void)
{
    static struct vocabulary v;
    static char long_text[1025];

    fill(&v);
    v.table.n_pieces = 0;
    refuse(&v, "0 pieces");
    fill(&v);
    v.table.bos = v.table.n_pieces;
    refuse(&v, "bos is 324, beyond the 324 pieces");
    fill(&v);
    v.table.end_of_turn = 1u << 31;
    refuse(&v, "end_of_turn is 2147483648");
    fill(&v);
    v.offsets[5] = v.offsets[6] + 1;
    refuse(&v, "piece 5: its offset");
    fill(&v);
    v.types[7] = 0;
    refuse(&v, "piece 7: unknown type 0");
    v.types[7] = 7;
    refuse(&v, "piece 7: unknown type 7");
    fill(&v);
    v.scores[300] = NAN;
    refuse(&v, "piece 300: its score");
    v.scores[300] = INFINITY;
    refuse(&v, "piece 300: its score");
    fill(&v);
    add_string(&v, "", PIECE_NORMAL, 0);
    refuse(&v, "piece 324: empty");
    v.types[324] = PIECE_UNUSED;
    tokenizer_free(make(&v));
    fill(&v);
    add_string(&v, "\xed\xa0\x80", PIECE_NORMAL, 0);
    refuse(&v, "piece 324: not valid UTF-8");
    fill(&v);
    add_string(&v, "a b", PIECE_NORMAL, 0);
    refuse(&v, "piece 324: has a space");
    fill(&v);
    memset(long_text, 'x', sizeof(long_text));
    add(&v, long_text, sizeof(long_text), PIECE_NORMAL, 0);
    refuse(&v, "piece 324: 1025 bytes");
    fill(&v);
    add_string(&v, "abc", PIECE_USER_DEFINED, 0);
    refuse(&v, "piece 324: the same text as piece 279");
    v.types[324] = PIECE_UNUSED;
    tokenizer_free(make(&v));
    fill(&v);
    add_string(&v, "[filler]", PIECE_UNUSED, 0);
    add_string(&v, "[filler]", PIECE_NORMAL, 0);
    tokenizer_free(make(&v));
    fill(&v);
    add_string(&v, "<0x0a>", PIECE_BYTE, 0);
    refuse(&v, "piece 324: type byte");
    fill(&v);
    add_string(&v, "<0x0A>", PIECE_BYTE, 0);
    refuse(&v, "piece 324: byte 0x0A is also piece 31");
    fill(&v);
    v.types[FIRST_BYTE] = PIECE_NORMAL;
    refuse(&v, "255 byte pieces");
    start(&v);
    v.table.unk = TOKENIZER_NONE;
    refuse(&v, "neither byte pieces nor an unknown piece");
}

/* A failing encode must leave what was there; too long is found before anything is read. */
static void test_failure(void)
{
    static struct vocabulary v;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    struct token_array ids = {0};

    fill(&v);
    t = make(&v);
    assert(token_array_append(&ids, (uint32_t[]){1, 2, 3}, 3) == 0);
    assert(tokenizer_encode(t, "", (size_t)INT32_MAX + 1, &(struct encode_options){.bos = true},
                            &ids) == -EOVERFLOW);
    assert(ids.n == 3 && ids.data[2] == 3);
    free(ids.data);
}

static void test_no_memory(void)
{
    static struct vocabulary v;
    static const char text[] = "hello <table> aaaaaaaaaaaaaaaabc \xf0\x9f\x98\x80 <bos> hello";
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    struct token_array ids = {0};
    int r = -1, n = 0;

    fill(&v);
    for (; r < 0; n++) {
        struct error err = {{0}};

        fail_after = n;
        r = tokenizer_new(&t, &v.table, &err);
        assert(r == 0 || (r == -ENOMEM && !t && strstr(err.text, "out of memory")));
    }
    fail_after = -1;
#ifdef ALLOCATIONS_ARE_BOUND
    printf("allocations do not fail in a build with link-time optimisation\n");
#else
    assert(n > 4);
#endif

    assert(token_array_append(&ids, (uint32_t[]){1, 2, 3}, 3) == 0);
    for (n = 0, r = -1; r < 0; n++) {
        /* No room is left, so that the ids' own array must grow as well. */
        struct token_array full = {.data = malloc(3 * sizeof(uint32_t)), .n = 3, .allocated = 3};

        assert(full.data);
        memcpy(full.data, ids.data, 3 * sizeof(uint32_t));
        fail_after = n;
        r = tokenizer_encode(t, text, sizeof(text) - 1, &(struct encode_options){.bos = true},
                             &full);
        fail_after = -1;
        assert(r == 0 || r == -ENOMEM);
        assert(r == 0 ? full.n > 3 : full.n == 3);
        assert(memcmp(full.data, ids.data, 3 * sizeof(uint32_t)) == 0);
        free(full.data);
    }
#ifndef ALLOCATIONS_ARE_BOUND
    assert(n > 4);
#endif
    free(ids.data);
}

/* Long lines end at all; how fast is printed for people and decides nothing. */
static void test_long(void)
{
    static const char *const units[] = {"a", " ", "\n", "\xf0\x9f\x98\x80", "hello ", "ab", "<tab"};
    static struct vocabulary v;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    size_t size = 1 << 18;
    CLEANUP(freep) char *text = malloc(size), *decoded = malloc(size + 64);

    fill(&v);
    t = make(&v);
    assert(text && decoded);
    for (size_t u = 0; u < ARRAY_SIZE(units); u++) {
        size_t n = strlen(units[u]), m = 0;
        struct token_array ids = {0};
        struct timespec before, after;

        while (m + n <= size) {
            memcpy(text + m, units[u], n);
            m += n;
        }
        clock_gettime(CLOCK_MONOTONIC, &before);
        assert(tokenizer_encode(t, text, m, &(struct encode_options){0}, &ids) == 0);
        clock_gettime(CLOCK_MONOTONIC, &after);
        printf("256 KiB of unit %zu: %zu ids, %.0f ms\n", u, ids.n,
               (double)(after.tv_sec - before.tv_sec) * 1e3 +
                   (double)(after.tv_nsec - before.tv_nsec) / 1e6);
        assert(decode_all(t, &ids, false, decoded) == m && memcmp(text, decoded, m) == 0);
        free(ids.data);
    }
}

int main(void)
{
    test_reference();
    test_literal();
    test_unknown();
    test_invalid_utf8();
    test_nul();
    test_streaming();
    test_broken_tables();
    test_failure();
    test_no_memory();
    test_long();
    return 0;
}
