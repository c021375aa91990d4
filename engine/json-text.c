/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * json-c merges duplicate keys (the last one wins) and tolerates a number of things JSON does not
 * have, so that two readers could see different headers in one file. A scan over the text closes
 * that: outside of strings only the characters of JSON may appear, and every ':' there is one
 * member written. If json-c's tree holds fewer members, some key was there twice.
 */

#include "engine/json-text.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/utf8.h"

DEFINE_CLEANUP(json_tokener *, json_tokener_free)

struct scan {
    size_t n_members, n_commas;
};

static int scan_text(struct scan *ret, const char *text, size_t n, struct error *err)
{
    struct scan s = {0};
    bool in_string = false;

    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];

        if (in_string) {
            if (c < 0x20)
                return error_set(err, EINVAL, "byte %zu: control character in a string", i);
            if (c == '"')
                in_string = false;
            if (c != '\\')
                continue;
            if (n - i > 5 && memcmp(text + i, "\\u0000", 6) == 0)
                return error_set(err, EINVAL, "byte %zu: NUL in a string", i);
            i++; /* the escaped character, a quote perhaps */
            continue;
        }
        if (c == '"')
            in_string = true;
        else if (c == ':')
            s.n_members++;
        else if (c == ',')
            s.n_commas++;
        else if (c == 0 || !strchr(" \t\r\n{}[]0123456789+-.eEtrufalsn", c))
            return error_set(err, EINVAL, "byte %zu: not JSON", i);
    }
    *ret = s;
    return 0;
}

/* As deep as the tokener allowed. */
static size_t count_members(json_object *v)
{
    size_t n = 0;

    if (json_object_is_type(v, json_type_object)) {
        json_object_object_foreach(v, key, member)
        {
            (void)key;
            n += 1 + count_members(member);
        }
    } else if (json_object_is_type(v, json_type_array)) {
        for (size_t i = 0; i < json_object_array_length(v); i++)
            n += count_members(json_object_array_get_idx(v, i));
    }
    return n;
}

int json_text_parse(json_object **ret, const char *text, size_t n, const struct json_limits *limits,
                    struct error *err)
{
    CLEANUP(json_tokener_freep) json_tokener *tok = NULL;
    CLEANUP(json_object_putp) json_object *v = NULL;
    struct scan scan;
    int r;

    if (n >= INT_MAX)
        return error_set(err, EINVAL, "longer than 2 GiB");
    if (!utf8_valid(text, n))
        return error_set(err, EINVAL, "invalid UTF-8");
    r = scan_text(&scan, text, n, err);
    if (r < 0)
        return r;
    if (scan.n_commas >= limits->max_values || scan.n_members > limits->max_values)
        return error_set(err, EINVAL, "more than %zu values", limits->max_values);

    tok = json_tokener_new_ex(limits->depth);
    if (!tok)
        return error_set(err, ENOMEM, "out of memory");
    json_tokener_set_flags(tok, JSON_TOKENER_STRICT);
    v = json_tokener_parse_ex(tok, text, (int)n);
    if (json_tokener_get_error(tok) == json_tokener_continue)
        return error_set(err, EINVAL, "byte %zu: the text ends too early", n);
    if (json_tokener_get_error(tok) != json_tokener_success)
        return error_set(err, EINVAL, "byte %zu: %s", json_tokener_get_parse_end(tok),
                         json_tokener_error_desc(json_tokener_get_error(tok)));
    for (size_t i = json_tokener_get_parse_end(tok); i < n; i++)
        if (!strchr(" \t\r\n", text[i]))
            return error_set(err, EINVAL, "byte %zu: text after the end", i);
    if (!json_object_is_type(v, json_type_object) && !json_object_is_type(v, json_type_array))
        return error_set(err, EINVAL, "neither an object nor an array");
    if (count_members(v) != scan.n_members)
        return error_set(err, EINVAL, "a key occurs twice in one object");
    *ret = TAKE_PTR(v);
    return 0;
}

bool json_text_u64(json_object *v, uint64_t *ret)
{
    int64_t i;

    if (!json_object_is_type(v, json_type_int))
        return false;
    i = json_object_get_int64(v);
    if (i < 0 || i == INT64_MAX)
        return false;
    *ret = (uint64_t)i;
    return true;
}

const char *json_text_string(json_object *v)
{
    return json_object_is_type(v, json_type_string) ? json_object_get_string(v) : NULL;
}

bool json_text_float(json_object *v, float *ret)
{
    double d;

    if (!json_object_is_type(v, json_type_double) && !json_object_is_type(v, json_type_int))
        return false;
    d = json_object_get_double(v);
    if (!isfinite((float)d))
        return false;
    *ret = (float)d;
    return true;
}

json_object *json_text_get(json_object *v, const char *key)
{
    json_object *member = NULL;

    if (json_object_is_type(v, json_type_object))
        json_object_object_get_ex(v, key, &member);
    return member;
}
