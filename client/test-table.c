/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include <assert.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "client/table.h"

static const struct table_column columns[] = {
    {"ID", "id", TABLE_NUMBER, false},     {"LABEL", "label", TABLE_TEXT, true},
    {"USER", "uid", TABLE_USER, false},    {"KV", "kv_bytes", TABLE_BYTES, false},
    {"RATE", "rate", TABLE_RATE, false},   {"DEFAULT", "default", TABLE_BOOL, false},
    {NULL, "hidden", TABLE_NUMBER, false}, {"ON", "on", TABLE_LIST, false},
};

static struct table *make(void)
{
    struct table *t;

    assert(table_new(&t, columns, ARRAY_SIZE(columns)) == 0);
    table_add_number(t, 7);
    table_add_text(t, "gr\xc3\xbc\xc3\x9f\x1b[2J\n \"x\"");
    table_add_number(t, 0);
    table_add_number(t, 3u << 19);
    table_add_double(t, 12.34);
    table_add_bool(t, true);
    table_add_number(t, UINT64_MAX);
    table_add_list(t, (const char *[]){"one", "two", NULL});
    table_add_number(t, 12);
    table_add_text(t, "");
    table_add_number(t, 4123456789u);
    table_add_none(t);
    table_add_none(t);
    table_add_bool(t, false);
    table_add_number(t, 0);
    table_add_list(t, (const char *[]){NULL});
    assert(table_n_rows(t) == 2);
    return t;
}

static void expect_text(const char *seen, const char *want)
{
    if (strcmp(seen, want) != 0) {
        fprintf(stderr, "seen:\n%s\nwanted:\n%s\n", seen, want);
        abort();
    }
}

static void test_rows(void)
{
    struct table *t = make();
    char *text;

    /* A pipe: plain numbers, and no control characters even so. */
    assert(table_format_rows(t, &(struct table_format){0}, &text) == 0);
    expect_text(
        text, "ID LABEL               USER            KV RATE DEFAULT ON\n"
              " 7 gr\xc3\xbc\xc3\x9f\\x1b[2J\\x0a \"x\" 0          1572864 12.3 yes     one, two\n"
              "12 -                   4123456789       -    - no      -\n");
    free(text);
    table_free(t);
}

static size_t columns_of(const char *line)
{
    size_t n = 0;

    for (; *line && *line != '\n'; line++)
        n += (*line & 0xc0) != 0x80;
    return n;
}

static void test_terminal(void)
{
    struct table *t = make();
    char *text;

    assert(table_format_rows(t, &(struct table_format){.people = true, .no_legend = true}, &text) ==
           0);
    assert(strncmp(text, " 7 ", 3) == 0); /* no headings */
    assert(strstr(text, " root ") && strstr(text, " 1.5 MiB ") && strstr(text, " 4123456789 "));
    assert(strstr(text, "\n12 -"));
    free(text);

    /* The label gives way, the numbers stay whole. */
    assert(table_format_rows(t, &(struct table_format){.people = true, .width = 60}, &text) == 0);
    for (char *line = text; *line; line = strchr(line, '\n') + 1)
        assert(columns_of(line) <= 60);
    assert(strstr(text, "1.5 MiB") && strstr(text, "4123456789") && !strstr(text, "\"x\""));
    free(text);
    table_free(t);
}

static void test_upright(void)
{
    struct table *t = make();
    char *text;

    assert(table_format_upright(t, &(struct table_format){0}, &text) == 0);
    expect_text(text, "ID      7\n"
                      "LABEL   gr\xc3\xbc\xc3\x9f\\x1b[2J\\x0a \"x\"\n"
                      "USER    0\n"
                      "KV      1572864\n"
                      "RATE    12.3\n"
                      "DEFAULT yes\n"
                      "ON      one, two\n");
    free(text);
    table_free(t);
}

static void test_empty(void)
{
    struct json_object *o;
    struct table *t;
    char *text;

    assert(table_new(&t, columns, ARRAY_SIZE(columns)) == 0);
    assert(table_format_rows(t, &(struct table_format){0}, &text) == 0);
    expect_text(text, "");
    free(text);
    assert(table_to_json(t, &o) == 0);
    expect_text(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN), "[]");
    json_object_put(o);
    table_free(t);
    table_free(NULL);
}

static void test_json(void)
{
    struct table *t = make();
    struct json_object *o;

    assert(table_to_json(t, &o) == 0);
    expect_text(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN),
                "[{\"id\":7,\"label\":\"gr\xc3\xbc\xc3\x9f\\u001b[2J\\n \\\"x\\\"\",\"uid\":0,"
                "\"kv_bytes\":1572864,\"rate\":12.34,\"default\":true,"
                "\"hidden\":18446744073709551615,\"on\":[\"one\",\"two\"]},"
                "{\"id\":12,\"label\":\"\",\"uid\":4123456789,\"kv_bytes\":null,\"rate\":null,"
                "\"default\":false,\"hidden\":0,\"on\":[]}]");
    json_object_put(o);
    table_free(t);
}

static void test_values(void)
{
    static const struct {
        uint64_t value;
        const char *text;
    } bytes[] =
        {
            {0, "0 B"},
            {1023, "1023 B"},
            {1024, "1.0 KiB"},
            {(1u << 20) - 1, "1.0 MiB"},
            {5ull << 30, "5.0 GiB"},
            {UINT64_MAX, "16.0 EiB"},
        },
      durations[] = {
          {0, "0.0 s"},
          {9949999, "9.9 s"},
          {59999999, "59 s"},
          {61000000, "1 min 1 s"},
          {7380000000, "2 h 3 min"},
          {180000000000, "2 d 2 h"},
      };
    char out[32];

    for (size_t i = 0; i < ARRAY_SIZE(bytes); i++) {
        format_bytes(bytes[i].value, out, sizeof(out));
        expect_text(out, bytes[i].text);
    }
    for (size_t i = 0; i < ARRAY_SIZE(durations); i++) {
        format_duration(durations[i].value, out, sizeof(out));
        expect_text(out, durations[i].text);
    }
}

int main(void)
{
    test_rows();
    test_terminal();
    test_upright();
    test_empty();
    test_json();
    test_values();
    return 0;
}
