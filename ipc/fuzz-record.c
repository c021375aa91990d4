/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Three promises about foreign bytes: what record_parse() accepts, json-c reads alike; a record
 * that was read can be written and read again; and a reader gives the same however bytes arrive.
 */

#undef NDEBUG
#include <assert.h>
#include <json-c/json.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"
#include "ipc/record.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static bool near(double a, double b)
{
    return (isnan(a) && isnan(b)) || fabs(a - b) <= 1e-12 * (fabs(a) + fabs(b)) + 1e-300;
}

/*
 * json-c 0.16 takes an escaped character beyond U+FFFF for half a surrogate pair when its low 16
 * bits look like one (U+1DA00) and puts U+FFFD instead.
 */
static bool json_c_misreads(const char *text, size_t n)
{
    uint32_t c;

    for (size_t i = 0, used; i < n; i += used) {
        used = utf8_next(text + i, n - i, &c);
        assert(used > 0);
        if (c > 0xffff && (c & 0xf800) == 0xd800)
            return true;
    }
    return false;
}

static bool same_text(struct json_object *o, const char *text, size_t n)
{
    if (json_c_misreads(text, n))
        return true;
    return json_object_is_type(o, json_type_string) && (size_t)json_object_get_string_len(o) == n &&
           memcmp(json_object_get_string(o), text, n) == 0;
}

static struct json_object *member(struct json_object *o, const char *name)
{
    return json_object_object_get(o, name);
}

static double number(struct json_object *o)
{
    return o ? json_object_get_double(o) : (double)NAN; /* json-c's NULL is JSON's null */
}

static void compare(const char *line, size_t n, const struct record *record)
{
    struct json_tokener *tokener = json_tokener_new();
    struct json_object *o;

    assert(tokener);
    json_tokener_set_flags(tokener, JSON_TOKENER_STRICT | JSON_TOKENER_VALIDATE_UTF8);
    o = json_tokener_parse_ex(tokener, line, (int)n);
    assert(json_tokener_get_error(tokener) == json_tokener_success);
    assert(json_object_is_type(o, json_type_object));

    switch (record->type) {
    case RECORD_UNKNOWN:
        break;
    case RECORD_DELTA:
        assert(same_text(member(o, "text"), record->text, record->n_text));
        if (record->has_token) {
            struct json_object *top = member(o, "top");

            assert(json_object_get_int64(member(o, "id")) == record->id);
            assert(near(number(member(o, "logprob")), record->logprob));
            assert(near(number(member(o, "entropy")), record->entropy));
            assert((top ? json_object_array_length(top) : 0) == record->n_top);
            for (size_t i = 0; i < record->n_top; i++) {
                struct json_object *t = json_object_array_get_idx(top, i);

                assert(json_object_get_int64(member(t, "id")) == record->top[i].id);
                assert(near(number(member(t, "logprob")), record->top[i].logprob));
                assert(same_text(member(t, "text"), record->top[i].text, record->top[i].n_text));
            }
        }
        break;
    case RECORD_USAGE:
        assert(json_object_get_int64(member(o, "prompt_tokens")) == record->prompt_tokens);
        assert(json_object_get_int64(member(o, "completion_tokens")) == record->completion_tokens);
        assert(json_object_get_int64(member(o, "cached_tokens")) == record->cached_tokens);
        break;
    case RECORD_END:
        assert(same_text(member(o, "reason"), record->reason, strlen(record->reason)));
        break;
    case RECORD_ERROR:
        assert(same_text(member(o, "name"), record->name, strlen(record->name)));
        assert(same_text(member(o, "message"), record->message, strlen(record->message)));
        if (record->has_sizes) {
            assert(json_object_get_uint64(member(o, "requested")) == record->requested);
            assert(json_object_get_uint64(member(o, "available")) == record->available);
        }
        break;
    case RECORD_QUEUED:
        assert(json_object_get_int64(member(o, "position")) == record->position);
        assert(json_object_get_uint64(member(o, "estimated_usec")) == record->estimated_usec);
        break;
    case RECORD_PROGRESS:
        assert(json_object_get_uint64(member(o, "done")) == record->done);
        assert(json_object_get_uint64(member(o, "total")) == record->total);
        break;
    }
    json_object_put(o);
    json_tokener_free(tokener);
}

static void write_again(const struct record *record)
{
    struct buffer out = {0};
    struct record again;

    assert(record_write(&out, record) == 0);
    assert(out.n > 0 && memchr(out.data, '\n', out.n) == out.data + out.n - 1);
    assert(record_parse(out.data, out.n - 1, &again) == 0);
    assert(again.type == record->type);
    if (record->type == RECORD_DELTA) { /* elsewhere a stray "text" is skipped */
        assert(again.n_text == record->n_text);
        assert(again.n_text == 0 || memcmp(again.text, record->text, record->n_text) == 0);
        assert(again.has_token == record->has_token);
        assert(again.n_top == (record->has_token ? record->n_top : 0));
    }
    buffer_done(&out);
}

static int read_all(const uint8_t *data, size_t n, size_t step, size_t *ret_records)
{
    struct record_reader reader = {0};
    static struct record record;
    int r = 0;

    *ret_records = 0;
    for (size_t i = 0; i < n && r >= 0; i += step) {
        assert(record_reader_feed(&reader, data + i, n - i < step ? n - i : step) == 0);
        while ((r = record_reader_next(&reader, &record)) > 0)
            ++*ret_records;
    }
    if (r == 0)
        r = record_reader_partial(&reader);
    record_reader_done(&reader);
    return r;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static struct record record;
    char *line, *copy;
    size_t records, records_bytewise;
    int r;

    line = malloc(n + 1);
    copy = malloc(n + 1);
    assert(line && copy);
    if (n > 0)
        memcpy(line, data, n);
    memcpy(copy, line, n);
    if (record_parse(line, n, &record) == 0) {
        compare(copy, n, &record);
        if (record.type != RECORD_UNKNOWN)
            write_again(&record);
    }
    free(line);
    free(copy);

    r = read_all(data, n, n ? n : 1, &records);
    assert(r == read_all(data, n, 1, &records_bytewise));
    assert(records == records_bytewise);
    return 0;
}
