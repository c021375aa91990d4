/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "ipc/record.h"

static int parse(const char *text, struct record *ret)
{
    static char *line; /* lives until the next call, as the record points into it */
    size_t n = strlen(text);

    free(line);
    line = malloc(n + 1); /* exactly what a reader has: the line and its newline's place */
    assert(line);
    memcpy(line, text, n + 1);
    return record_parse(line, n, ret);
}

static void test_write(void)
{
    struct buffer out = {0};
    struct record record = {.type = RECORD_DELTA, .text = "a\"\\\n\t\x7f\0é", .n_text = 9};
    static const char expected[] =
        "{\"type\":\"delta\",\"text\":\"a\\\"\\\\\\n\\u0009\\u007f\\u0000é\"}\n";

    assert(record_write(&out, &record) == 0);
    assert(out.n == strlen(expected) && memcmp(out.data, expected, out.n) == 0);

    out.n = 0; /* invalid bytes become U+FFFD, one each */
    record.text = "\xff"
                  "b\xc3";
    record.n_text = 3;
    assert(record_write(&out, &record) == 0);
    assert(buffer_append(&out, "", 1) == 0);
    assert(strcmp(out.data, "{\"type\":\"delta\",\"text\":\"\xef\xbf\xbd"
                            "b\xef\xbf\xbd\"}\n") == 0);

    out.n = 0;
    record = (struct record){
        .type = RECORD_DELTA,
        .text = "x",
        .n_text = 1,
        .has_token = true,
        .id = 7,
        .logprob = -0.25,
        .entropy = 1.0000004,
        .n_top = 2,
        .top = {{7, -0.25, "x", 1}, {8, -(double)INFINITY, "\0", 1}},
    };
    assert(record_write(&out, &record) == 0);
    assert(buffer_append(&out, "", 1) == 0);
    assert(strcmp(out.data,
                  "{\"type\":\"delta\",\"text\":\"x\",\"id\":7,\"logprob\":-0.250000,"
                  "\"entropy\":1.000000,\"top\":[{\"id\":7,\"logprob\":-0.250000,"
                  "\"text\":\"x\"},{\"id\":8,\"logprob\":null,\"text\":\"\\u0000\"}]}\n") == 0);
    buffer_done(&out);
}

static void test_round_trip(void)
{
    struct buffer out = {0};
    struct record record = {.type = RECORD_USAGE,
                            .prompt_tokens = 1,
                            .completion_tokens = UINT32_MAX,
                            .cached_tokens = 3};
    struct record_reader reader = {0};
    static struct record got;

    assert(record_write(&out, &record) == 0);
    record = (struct record){.type = RECORD_ERROR,
                             .name = "org.llmd.Llm1.Error.ContextFull",
                             .message = "too \"long\"",
                             .has_sizes = true,
                             .requested = UINT64_MAX,
                             .available = 0};
    assert(record_write(&out, &record) == 0);
    record = (struct record){
        .type = RECORD_QUEUED, .position = UINT32_MAX, .estimated_usec = UINT64_MAX - 1};
    assert(record_write(&out, &record) == 0);
    record = (struct record){.type = RECORD_PROGRESS, .done = 512, .total = UINT64_MAX};
    assert(record_write(&out, &record) == 0);
    record = (struct record){.type = RECORD_END, .reason = "stop"};
    assert(record_write(&out, &record) == 0);
    assert(record_write(&out, &(struct record){.type = RECORD_UNKNOWN}) == -EINVAL);

    assert(record_reader_feed(&reader, out.data, out.n - 1) == 0);
    assert(record_reader_next(&reader, &got) == 1 && got.type == RECORD_USAGE);
    assert(got.prompt_tokens == 1 && got.completion_tokens == UINT32_MAX && got.cached_tokens == 3);
    assert(record_reader_next(&reader, &got) == 1 && got.type == RECORD_ERROR);
    assert(strcmp(got.name, "org.llmd.Llm1.Error.ContextFull") == 0);
    assert(strcmp(got.message, "too \"long\"") == 0);
    assert(got.has_sizes && got.requested == UINT64_MAX && got.available == 0);
    assert(record_reader_next(&reader, &got) == 1 && got.type == RECORD_QUEUED);
    assert(got.position == UINT32_MAX && got.estimated_usec == UINT64_MAX - 1);
    assert(record_reader_next(&reader, &got) == 1 && got.type == RECORD_PROGRESS);
    assert(got.done == 512 && got.total == UINT64_MAX && got.position == 0);
    assert(record_reader_next(&reader, &got) == 0 && record_reader_partial(&reader));
    assert(record_reader_feed(&reader, "\n", 1) == 0);
    assert(record_reader_next(&reader, &got) == 1 && got.type == RECORD_END);
    assert(strcmp(got.reason, "stop") == 0);
    assert(record_reader_next(&reader, &got) == 0 && !record_reader_partial(&reader));
    record_reader_done(&reader);
    buffer_done(&out);
}

static void test_read(void)
{
    static struct record r;

    assert(parse(" { \"type\" : \"delta\" , \"text\" : \"\\u00e9\\ud83d\\ude00\\/\\b\" } ", &r) ==
           0);
    assert(r.type == RECORD_DELTA && r.n_text == 8 && !r.has_token);
    assert(memcmp(r.text, "é\xf0\x9f\x98\x80/\b", 8) == 0);

    /* numbers are read alike in a locale with a decimal comma, where there is one */
    setlocale(LC_ALL, "de_DE.UTF-8");
    assert(
        parse("{\"type\":\"delta\",\"text\":\"\",\"id\":1,\"logprob\":-12.5e-1,\"entropy\":2E+2}",
              &r) == 0);
    assert(r.has_token && r.id == 1 && r.logprob == -1.25 && r.entropy == 200);
    setlocale(LC_ALL, "C");
    assert(parse("{\"text\":\"\",\"entropy\":0,\"type\":\"delta\",\"logprob\":null,\"id\":1}",
                 &r) == 0);
    assert(r.has_token && isnan(r.logprob) && r.entropy == 0 && r.n_top == 0);

    /* what later versions may add */
    assert(parse("{\"type\":\"end\",\"reason\":\"stop\",\"more\":{\"a\":[1,true,null,{}]}}", &r) ==
           0);
    assert(r.type == RECORD_END);
    assert(parse("{\"type\":\"image\"}", &r) == 0 && r.type == RECORD_UNKNOWN);
}

static void test_refuse(void)
{
    static const char *const bad[] = {
        "",
        "{}",
        "[]",
        "null",
        "{\"type\":1}",
        "{\"type\":\"delta\"}",
        "{\"type\":\"delta\",\"text\":null}",
        "{\"type\":\"delta\",\"text\":\"\"",
        "{\"type\":\"delta\",\"text\":\"\"}x",
        "{\"type\":\"delta\",\"text\":\"\",}",
        "{\"type\":\"delta\",\"text\":\"a\",\"text\":\"b\"}",
        "{\"type\":\"delta\",\"text\":\"\\ud800\"}",
        "{\"type\":\"delta\",\"text\":\"\\udc00\\ud800\"}",
        "{\"type\":\"delta\",\"text\":\"\\x\"}",
        "{\"type\":\"delta\",\"text\":\"\\u12\"}",
        "{\"type\":\"delta\",\"text\":\"\xff\"}",
        "{\"type\":\"delta\",\"text\":\"\t\"}",
        "{\"type\":\"delta\",\"text\":\"\",\"id\":1}",
        "{\"type\":\"delta\",\"text\":\"\",\"top\":[]}",
        "{\"type\":\"delta\",\"text\":\"\",\"id\":-1,\"logprob\":0,\"entropy\":0}",
        "{\"type\":\"delta\",\"text\":\"\",\"id\":4294967296,\"logprob\":0,\"entropy\":0}",
        "{\"type\":\"delta\",\"text\":\"\",\"id\":1,\"logprob\":1e999,\"entropy\":0}",
        "{\"type\":\"delta\",\"text\":\"\",\"id\":1,\"logprob\":01,\"entropy\":0}",
        ("{\"type\":\"delta\",\"text\":\"\",\"id\":1,\"logprob\":0,\"entropy\":0,\"top\":[{\"id\":"
         "1}"
         "]}"),
        "{\"type\":\"usage\",\"prompt_tokens\":1}",
        "{\"type\":\"usage\",\"prompt_tokens\":1.5,\"completion_tokens\":0,\"cached_tokens\":0}",
        "{\"type\":\"end\"}",
        "{\"type\":\"end\",\"reason\":\"a\\u0000b\"}",
        "{\"type\":\"error\",\"name\":\"x\"}",
        "{\"type\":\"queued\",\"position\":1}",
        "{\"type\":\"queued\",\"position\":4294967296,\"estimated_usec\":0}",
        "{\"type\":\"progress\",\"done\":1}",
        "{\"type\":\"progress\",\"done\":1,\"total\":\"2\"}",
        "{\"type\":\"end\",\"reason\":\"\",\"x\":[[[[[[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]]]]]}",
    };
    static struct record r;
    struct record_reader reader = {0};
    char block[4096];
    int answer = 0;

    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        if (parse(bad[i], &r) != -EBADMSG) {
            fprintf(stderr, "accepted: %s\n", bad[i]);
            abort();
        }
    }

    /* A line that never ends is refused, not collected. */
    memset(block, 'x', sizeof(block));
    for (size_t i = 0; i <= RECORD_BYTES_MAX / sizeof(block) && answer == 0; i++) {
        assert(record_reader_feed(&reader, block, sizeof(block)) == 0);
        answer = record_reader_next(&reader, &r);
    }
    assert(answer == -EBADMSG);
    record_reader_done(&reader);
}

int main(void)
{
    test_write();
    test_round_trip();
    test_read();
    test_refuse();
    return 0;
}
