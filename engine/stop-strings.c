/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Knuth, Morris and Pratt's matcher for each string. Its state is the length of the longest end of
 * the text so far that begins the string; the largest of these states is what must be held back,
 * and since that end is also the beginning of a string, it need not be stored.
 */

#include "engine/stop-strings.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

struct matcher {
    char *text;       /* owned */
    size_t *fallback; /* [n]: of the first i + 1 bytes, the longest proper end that begins text */
    size_t n, matched;
};

struct stop_strings {
    size_t n, longest;
    size_t held_by; /* the matcher that has matched most; any if none has */
    struct matcher matchers[];
};

static int matcher_init(struct matcher *m, const char *text)
{
    m->n = strlen(text);
    m->text = strdup(text);
    m->fallback = calloc(m->n, sizeof(*m->fallback));
    if (!m->text || !m->fallback)
        return -ENOMEM;

    for (size_t i = 1, k = 0; i < m->n; i++) {
        while (k > 0 && text[i] != text[k])
            k = m->fallback[k - 1];
        k += text[i] == text[k];
        m->fallback[i] = k;
    }
    return 0;
}

int stop_strings_new(struct stop_strings **ret, const char *const *strings, size_t n)
{
    CLEANUP(stop_strings_freep) struct stop_strings *s = NULL;
    size_t bytes;
    int r;

    if (ckd_mul(&bytes, n, sizeof(s->matchers[0])) || ckd_add(&bytes, bytes, sizeof(*s)))
        return -EOVERFLOW;
    s = calloc(1, bytes);
    if (!s)
        return -ENOMEM;
    s->n = n;
    for (size_t i = 0; i < n; i++) {
        r = matcher_init(&s->matchers[i], strings[i]);
        if (r < 0)
            return r;
        s->longest = MAX(s->longest, s->matchers[i].n);
    }
    *ret = TAKE_PTR(s);
    return 0;
}

struct stop_strings *stop_strings_free(struct stop_strings *s)
{
    if (s) {
        for (size_t i = 0; i < s->n; i++) {
            free(s->matchers[i].text);
            free(s->matchers[i].fallback);
        }
        free(s);
    }
    return NULL;
}

void stop_strings_freep(struct stop_strings **s)
{
    stop_strings_free(*s);
}

size_t stop_strings_max_held(const struct stop_strings *s)
{
    return s->longest > 0 ? s->longest - 1 : 0;
}

static size_t held(const struct stop_strings *s)
{
    return s->n > 0 ? s->matchers[s->held_by].matched : 0;
}

/* One more byte; returns the length of the longest string that ends with it, or 0. */
static size_t step(struct stop_strings *s, char c)
{
    size_t found = 0, most = 0;

    for (size_t i = 0; i < s->n; i++) {
        struct matcher *m = &s->matchers[i];

        while (m->matched > 0 && c != m->text[m->matched])
            m->matched = m->fallback[m->matched - 1];
        m->matched += c == m->text[m->matched];
        if (m->matched == m->n)
            found = MAX(found, m->n);
        if (m->matched > most) {
            most = m->matched;
            s->held_by = i;
        }
    }
    return found;
}

size_t stop_strings_push(struct stop_strings *s, const char *text, size_t n, char *out,
                         bool *ret_found)
{
    size_t total = held(s), found = 0, i;

    if (total > 0)
        memcpy(out, s->matchers[s->held_by].text, total);

    for (i = 0; i < n && found == 0; i++)
        found = step(s, text[i]);
    memcpy(out + total, text, i);
    total += i;

    *ret_found = found > 0;
    return total - (found > 0 ? found : held(s));
}

size_t stop_strings_finish(struct stop_strings *s, char *out)
{
    size_t total = held(s);

    if (total > 0)
        memcpy(out, s->matchers[s->held_by].text, total);
    for (size_t i = 0; i < s->n; i++)
        s->matchers[i].matched = 0;
    return total;
}
