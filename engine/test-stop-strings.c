/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Against a search over the whole text, for every way to cut it in two and many random ones. */

#undef NDEBUG
#include "engine/stop-strings.h"

#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

static uint64_t state = 7;

static size_t below(size_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (size_t)(state >> 33) % n;
}

/* Length of what goes out of the first n bytes; *ret_found likewise. */
static size_t naive(const char *text, size_t n, const char *const *strings, size_t n_strings,
                    bool *ret_found)
{
    size_t held = 0;

    *ret_found = false;
    for (size_t end = 1; end <= n; end++) {
        size_t longest = 0;

        for (size_t i = 0; i < n_strings; i++) {
            size_t m = strlen(strings[i]);

            if (m <= end && memcmp(text + end - m, strings[i], m) == 0)
                longest = MAX(longest, m);
        }
        if (longest > 0) {
            *ret_found = true;
            return end - longest;
        }
    }
    for (size_t i = 0; i < n_strings; i++)
        for (size_t m = 1; m < strlen(strings[i]) && m <= n; m++)
            if (memcmp(text + n - m, strings[i], m) == 0)
                held = MAX(held, m);
    return n - held;
}

/* cuts [n_cuts] ascending, the last one n. After every piece exactly what may go out is out. */
static void check(const char *text, size_t n, const char *const *strings, size_t n_strings,
                  const size_t *cuts, size_t n_cuts)
{
    CLEANUP(stop_strings_freep) struct stop_strings *s = NULL;
    char got[256];
    size_t n_got = 0, from = 0;

    assert(stop_strings_new(&s, strings, n_strings) == 0);
    for (size_t i = 0; i < n_cuts; i++) {
        size_t room = cuts[i] - from + stop_strings_max_held(s), wrote;
        char *piece = malloc(MAX(room, (size_t)1)); /* exact, so that ASan sees the byte beyond */
        bool found, expect_found;
        size_t expected = naive(text, cuts[i], strings, n_strings, &expect_found);

        assert(piece);
        wrote = stop_strings_push(s, text + from, cuts[i] - from, piece, &found);
        assert(wrote <= room && n_got + wrote <= sizeof(got));
        memcpy(got + n_got, piece, wrote);
        free(piece);
        n_got += wrote;
        assert(found == expect_found);
        assert(n_got == expected && memcmp(got, text, n_got) == 0);
        if (found)
            return;
        from = cuts[i];
    }
    assert(n_got + stop_strings_max_held(s) <= sizeof(got));
    n_got += stop_strings_finish(s, got + n_got);
    assert(n_got == n && memcmp(got, text, n) == 0);
}

static void test_random(void)
{
    for (size_t round = 0; round < 40000; round++) {
        char text[40], strings[4][8];
        const char *pointers[4];
        size_t letters = 1 + below(3), n = below(sizeof(text)), n_strings = below(5), cuts[41];
        size_t n_cuts = 0;

        for (size_t i = 0; i < n; i++)
            text[i] = (char)('a' + below(letters));
        for (size_t i = 0; i < n_strings; i++) {
            size_t m = 1 + below(7);

            for (size_t k = 0; k < m; k++)
                strings[i][k] = (char)('a' + below(letters));
            strings[i][m] = 0;
            pointers[i] = strings[i];
        }
        for (size_t i = 0; i < n; i++) /* empty pieces as well */
            if (below(3) == 0)
                for (size_t k = below(3); k > 0 && n_cuts < 40; k--)
                    cuts[n_cuts++] = i;
        cuts[n_cuts++] = n;
        check(text, n, pointers, n_strings, cuts, n_cuts);
    }
}

static void test_every_split(void)
{
    static const struct {
        const char *text, *strings[3];
    } cases[] = {
        {"one\n\nUser: two", {"\nUser:", "\n\n\n"}},
        {"aaaaaaab", {"aaab"}},
        {"abababac tail", {"ababac", "bac"}},
        {"xabcabcabd", {"abcabd", "cabx", "d"}},
        {"never here", {"heren", "neverx"}},
        {"abcd", {"bc", "abcd"}},
        {"abcd", {"bcd", "abcd", "cd"}},
        {"Gr\xc3\xbc\xc3\x9f"
         "e \xe2\x82\xac!",
         {"\xc3\x9f"
          "e",
          "\xe2\x82\xac"}},
    };

    for (size_t c = 0; c < ARRAY_SIZE(cases); c++) {
        size_t n = strlen(cases[c].text), n_strings = 0;

        while (n_strings < 3 && cases[c].strings[n_strings])
            n_strings++;
        for (uint32_t mask = 0; mask<1u << (n - 1); mask += n> 12 ? 1 + below(9) : 1) {
            size_t cuts[16], n_cuts = 0;

            for (size_t i = 1; i < n; i++)
                if (mask >> (i - 1) & 1)
                    cuts[n_cuts++] = i;
            cuts[n_cuts++] = n;
            check(cases[c].text, n, cases[c].strings, n_strings, cuts, n_cuts);
        }
    }
}

/* The finished text: what was held comes back, byte for byte. */
static void test_finish(void)
{
    static const char *const strings[] = {"<end>", "<en route>"};
    CLEANUP(stop_strings_freep) struct stop_strings *s = NULL;
    char out[64];
    bool found;

    assert(stop_strings_new(&s, strings, 2) == 0);
    assert(stop_strings_max_held(s) == 9);
    assert(stop_strings_finish(s, out) == 0);
    assert(stop_strings_push(s, "a <en r", 7, out, &found) == 2 && !found);
    assert(memcmp(out, "a ", 2) == 0);
    assert(stop_strings_finish(s, out) == 5 && memcmp(out, "<en r", 5) == 0);
}

int main(void)
{
    test_every_split();
    test_random();
    test_finish();
    return 0;
}
