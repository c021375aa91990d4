/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-eval/skill-cases.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/json-text.h"
#include "tools/llm-eval/eval.h"

/* No case needs more; a file of something else is told from one of cases early. */
#define MAX_MESSAGES 1023
#define MAX_PATTERNS 64
#define MAX_PATTERN (64 << 10)
#define MAX_GROUPS 1024 /* regcomp() recurses into them */

static const struct json_limits limits = {.depth = 8, .max_values = 4096};

static void case_done(struct skill_case *c)
{
    for (size_t i = 0; i < c->n_expect; i++)
        regfree(&c->expect[i]);
    for (size_t i = 0; i < c->n_reject; i++)
        regfree(&c->reject[i]);
    free(c->expect);
    free(c->reject);
    free(c->messages);
    json_object_put(c->root);
    *c = (struct skill_case){0};
}

void skill_cases_done(struct skill_cases *c)
{
    for (size_t i = 0; i < c->n; i++)
        case_done(&c->cases[i]);
    free(c->cases);
    *c = (struct skill_cases){0};
}

/* Of one that matches as a whole what the pattern matches anywhere. 0, or what regerror() takes */
static int compile(regex_t *ret, const char *pattern)
{
    CLEANUP(freep) char *whole = NULL;
    int r;

    /* First by itself: "a)|(b" would be good only in the parentheses below. */
    r = regcomp(ret, pattern, REG_EXTENDED | REG_NOSUB);
    if (r != 0)
        return r;
    regfree(ret);
    if (asprintf(&whole, "^(%s)$", pattern) < 0) {
        whole = NULL;
        return REG_ESPACE;
    }
    return regcomp(ret, whole, REG_EXTENDED | REG_NOSUB);
}

static size_t count_char(const char *text, char c)
{
    size_t n = 0;

    for (; *text; text++)
        n += *text == c;
    return n;
}

static int read_patterns(const struct skill_case *c, const char *key, regex_t **ret, size_t *ret_n,
                         struct error *err)
{
    json_object *list = json_text_get(c->root, key);
    size_t n;

    if (!list)
        return 0;
    if (!json_object_is_type(list, json_type_array))
        return error_set(err, EINVAL, "\"%s\": a list of patterns expected", key);
    n = json_object_array_length(list);
    if (n == 0 || n > MAX_PATTERNS)
        return error_set(err, EINVAL, "\"%s\": 1 to %d patterns expected, not %zu", key,
                         MAX_PATTERNS, n);
    *ret = calloc(n, sizeof(**ret));
    if (!*ret)
        return error_set(err, ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        const char *pattern = json_text_string(json_object_array_get_idx(list, i));
        int r;

        if (!pattern || strlen(pattern) > MAX_PATTERN)
            return error_set(err, EINVAL, "\"%s\"[%zu]: a pattern of at most %d bytes expected",
                             key, i, MAX_PATTERN);
        if (count_char(pattern, '(') > MAX_GROUPS)
            return error_set(err, EINVAL, "\"%s\"[%zu]: more than %d groups", key, i, MAX_GROUPS);
        r = compile(&(*ret)[i], pattern);
        if (r != 0) {
            char why[128];

            regerror(r, &(*ret)[i], why, sizeof(why));
            return error_set(err, r == REG_ESPACE ? ENOMEM : EINVAL, "\"%s\"[%zu]: %s", key, i,
                             why);
        }
        ++*ret_n;
    }
    return 0;
}

static int read_turns(struct skill_case *c, json_object *turns, struct error *err)
{
    size_t n;

    if (!json_object_is_type(turns, json_type_array))
        return error_set(err, EINVAL, "\"turns\": a list of texts expected");
    n = json_object_array_length(turns);
    if (n % 2 == 0 || n > MAX_MESSAGES)
        return error_set(err, EINVAL,
                         "\"turns\": an odd number up to %d expected, not %zu: user, model, ..., "
                         "user",
                         MAX_MESSAGES, n);
    c->messages = calloc(n, sizeof(*c->messages));
    if (!c->messages)
        return error_set(err, ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        const char *text = json_text_string(json_object_array_get_idx(turns, i));

        if (!text)
            return error_set(err, EINVAL, "\"turns\"[%zu]: a text expected", i);
        c->messages[i] = (struct chat_message){i % 2 ? CHAT_MODEL : CHAT_USER, text, strlen(text)};
    }
    c->n_messages = n;
    return 0;
}

static int read_case(struct skill_case *c, const char *line, size_t n, struct error *err)
{
    json_object *turns;
    int r;

    r = json_text_parse(&c->root, line, n, &limits, err);
    if (r < 0)
        return r == -ENOMEM ? error_set(err, ENOMEM, "out of memory") : r;
    c->skill = json_text_string(json_text_get(c->root, "skill"));
    if (!c->skill || !*c->skill)
        return error_set(err, EINVAL, "\"skill\": a name expected");
    for (const char *p = c->skill; *p; p++)
        if ((unsigned char)*p < ' ' || *p == 0x7f)
            return error_set(err, EINVAL, "\"skill\": a control character in the name");
    c->text = json_text_string(json_text_get(c->root, "text"));
    turns = json_text_get(c->root, "turns");
    if (!c->text == !turns)
        return error_set(err, EINVAL, "one of \"turns\" and \"text\" expected");
    if (turns)
        r = read_turns(c, turns, err);
    if (r == 0)
        r = read_patterns(c, "expect", &c->expect, &c->n_expect, err);
    if (r == 0)
        r = read_patterns(c, "reject", &c->reject, &c->n_reject, err);
    if (r < 0)
        return r;
    c->expect_json = json_text_get(c->root, "expect_json");
    if (!c->n_expect == !c->expect_json)
        return error_set(err, EINVAL, "one of \"expect\" and \"expect_json\" expected");
    /* Else such an answer could never be right: json_text_parse() takes nothing else. */
    if (c->expect_json && !json_object_is_type(c->expect_json, json_type_object) &&
        !json_object_is_type(c->expect_json, json_type_array))
        return error_set(err, EINVAL, "\"expect_json\": an object or a list expected");
    return 0;
}

static int append(struct skill_cases *c, size_t *allocated, struct skill_case *new)
{
    if (c->n == *allocated) {
        size_t n;
        struct skill_case *p;

        if (ckd_mul(&n, MAX(*allocated, (size_t)64), (size_t)2))
            return -ENOMEM;
        p = reallocarray(c->cases, n, sizeof(*p));
        if (!p)
            return -ENOMEM;
        c->cases = p;
        *allocated = n;
    }
    c->cases[c->n++] = *new;
    *new = (struct skill_case){0};
    return 0;
}

int skill_cases_read(struct skill_cases *ret, const char *path, const char *skill,
                     struct error *err)
{
    CLEANUP(skill_cases_done) struct skill_cases c = {0};
    CLEANUP(freep) char *data = NULL;
    size_t n, allocated = 0, number = 0;
    int r;

    r = read_file(path, &data, &n, err);
    if (r < 0)
        return r;
    for (size_t at = 0, end; at < n; at = end + 1) {
        CLEANUP(case_done) struct skill_case new = {0};
        const char *newline = memchr(data + at, '\n', n - at);

        end = newline ? (size_t)(newline - data) : n;
        number++;
        if (end == at)
            continue;
        r = read_case(&new, data + at, end - at, err);
        if (r == 0 && (!skill || strcmp(new.skill, skill) == 0) && append(&c, &allocated, &new) < 0)
            r = error_set(err, ENOMEM, "out of memory");
        if (r < 0)
            return error_prefix(err, -r, "%s:%zu", path, number);
    }
    if (c.n == 0)
        return skill ? error_set(err, EINVAL, "%s: no case of the skill '%s'", path, skill)
                     : error_set(err, EINVAL, "%s: no cases", path);
    *ret = c;
    c = (struct skill_cases){0};
    return 0;
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

int skill_case_check(const struct skill_case *c, const char *answer, size_t n)
{
    CLEANUP(freep) char *text = NULL;

    while (n > 0 && is_space(answer[n - 1]))
        n--;
    while (n > 0 && is_space(*answer)) {
        answer++;
        n--;
    }
    if (c->expect_json) {
        CLEANUP(json_object_putp) json_object *v = NULL;
        int r = json_text_parse(&v, answer, n, &limits, NULL);

        return r == -ENOMEM ? r : r == 0 && json_object_equal(v, c->expect_json);
    }
    if (memchr(answer, 0, n))
        return 0; /* no pattern can hold that */
    text = strndup(answer, n);
    if (!text)
        return -ENOMEM;
    for (size_t i = 0; i < c->n_expect + c->n_reject; i++) {
        bool wanted = i < c->n_expect;
        int r = regexec(wanted ? &c->expect[i] : &c->reject[i - c->n_expect], text, 0, NULL, 0);

        if (r == REG_ESPACE)
            return -ENOMEM;
        if ((r == 0) != wanted)
            return 0;
    }
    return 1;
}
