/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* What is JSON and what only json-c takes for it. */

#undef NDEBUG
#include "engine/json-text.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

static const struct json_limits limits = {.depth = 4, .max_values = 10};

static void accepted(const char *text)
{
    CLEANUP(json_object_putp) json_object *v = NULL;
    CLEANUP(freep) char *copy = malloc(strlen(text)); /* no byte beyond: ASan watches */
    struct error err = {0};

    assert(copy);
    memcpy(copy, text, strlen(text));
    if (json_text_parse(&v, copy, strlen(text), &limits, &err) < 0) {
        fprintf(stderr, "%s: %s\n", text, err.text);
        abort();
    }
    assert(v);
}

static void refused(const char *text, size_t n)
{
    CLEANUP(json_object_putp) json_object *v = NULL;
    CLEANUP(freep) char *copy = malloc(n + !n);
    struct error err = {0};

    assert(copy);
    memcpy(copy, text, n);
    if (json_text_parse(&v, copy, n, &limits, &err) != -EINVAL || v || !err.text[0]) {
        fprintf(stderr, "accepted: %s\n", text);
        abort();
    }
}

int main(void)
{
    static const char *const good[] = {
        "{}",
        "[]",
        " {} \n\t\r ",
        "{\"a\":1,\"b\":{\"a\":2}}",
        "{\"a:b\":\":\",\"\\\"\":[true,false,null]}",
        "{\"\\\\\":1,\"\\\\u0000\":2}",
        "[[[[]]]]",
        "[1,2,3,4,5,6,7,8,9,10]",
        "[-1.5e+10,0.1]",
        "[\"\xc3\xa9\\u00e9'/*\"]",
    };
    static const char *const bad[] = {
        "",
        " ",
        "1",
        "\"a\"",
        "null",
        "{",
        "[",
        "}",
        "[1,]",
        "[1 2]",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{,}",
        "{'a':1}",
        "{\"a\":'b'}",
        "{a:1}",
        "[NaN]",
        "[Infinity]",
        "[-Infinity]",
        "[True]",
        "[nul]",
        "[] []",
        "[]x",
        "[]/**/",
        "/**/[]",
        "[//\n1]",
        "{\"a\":1,\"a\":1}",
        "{\"b\":{\"a\":1,\"a\":1}}",
        "[{\"a\":1,\"\\u0061\":1}]",
        "[\"\\u0000\"]",
        "[\"\t\"]",
        "[\"\xff\"]",
        "[\"\xed\xa0\x80\"]",
        "[\"a]",
        "[\"a\\",
        "[\"\\x\"]",
        "[[[[[]]]]]",
        "[1,2,3,4,5,6,7,8,9,10,11]",
        "{\"a\":1}}",
        "[1]]",
    };
    static const char odd[] = "{\"a\":[-1,9223372036854775807,1.0,\"1\",null,1e39,3]}";
    CLEANUP(json_object_putp) json_object *v = NULL;
    uint64_t u = 7;
    float x = 7;

    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++)
        accepted(good[i]);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        refused(bad[i], strlen(bad[i]));
    refused("[1]\0", 4);
    refused("[1\0]", 4);

    assert(json_text_parse(&v, "[0,9223372036854775806]", 23, &limits, NULL) == 0);
    assert(json_text_u64(json_object_array_get_idx(v, 0), &u) && u == 0);
    assert(json_text_u64(json_object_array_get_idx(v, 1), &u) && u == INT64_MAX - 1);
    json_object_put(v);
    v = NULL;
    assert(json_text_parse(&v, odd, strlen(odd), &limits, NULL) == 0);
    u = 7;
    for (size_t i = 0; i < 6; i++)
        assert(!json_text_u64(json_object_array_get_idx(json_text_get(v, "a"), i), &u));
    assert(u == 7);
    assert(!json_text_float(json_object_array_get_idx(json_text_get(v, "a"), 5), &x) && x == 7);
    assert(!json_text_float(json_object_array_get_idx(json_text_get(v, "a"), 3), &x) && x == 7);
    assert(json_text_float(json_object_array_get_idx(json_text_get(v, "a"), 6), &x) && x == 3);
    assert(!json_text_get(v, "b") && !json_text_get(NULL, "a") && !json_text_string(v));
    assert(!json_text_u64(NULL, &u) && !json_text_float(NULL, &x) && !json_text_string(NULL));
    return 0;
}
