/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "client/llmctl-exchange.h"

#include <errno.h>
#include <json-c/json.h>
#include <limits.h>

#include "base/cleanup.h"
#include "base/utf8.h"
#include "client/llmctl.h"

/* Borrowed bytes as JSON's string: what is not UTF-8 becomes U+FFFD. */
static struct json_object *json_text(const struct buffer *b)
{
    CLEANUP(buffer_done) struct buffer valid = {0};
    size_t start = 0;

    if (b->n > INT_MAX)
        return NULL;
    for (size_t i = 0; i < b->n;) {
        uint32_t c;
        size_t used = utf8_next(b->data + i, b->n - i, &c);

        if (used == 0) {
            if (buffer_append(&valid, b->data + start, i - start) < 0 ||
                buffer_append(&valid, "\xef\xbf\xbd", 3) < 0)
                return NULL;
            start = ++i;
        } else {
            i += used;
        }
    }
    if (start == 0)
        return json_object_new_string_len(b->n > 0 ? b->data : "", (int)b->n);
    if (buffer_append(&valid, b->data + start, b->n - start) < 0 || valid.n > INT_MAX)
        return NULL;
    return json_object_new_string_len(valid.data, (int)valid.n);
}

/* Takes the value. */
static bool add(struct json_object *o, const char *key, struct json_object *value)
{
    return value && json_object_object_add(o, key, value) == 0;
}

static bool describe(struct json_object *o, const struct exchange *x)
{
    struct json_object *part;

    if (!add(o, "index", json_object_new_int64((int64_t)x->index)) ||
        !add(o, "input", json_text(x->input)) ||
        (!x->failed && !add(o, "output", json_text(x->output))))
        return false;
    part = json_object_new_object();
    if (!part || !add(o, x->failed ? "error" : "usage", part))
        return false;
    if (x->failed)
        return add(part, "name", json_object_new_string(x->error_name)) &&
               add(part, "message", json_object_new_string(x->error));
    return add(part, "prompt_tokens", json_object_new_int64(x->prompt_tokens)) &&
           add(part, "completion_tokens", json_object_new_int64(x->completion_tokens)) &&
           add(part, "cached_tokens", json_object_new_int64(x->cached_tokens)) &&
           (!x->reason[0] || add(o, "reason", json_object_new_string(x->reason)));
}

int exchange_print(const struct exchange *x)
{
    struct json_object *o = json_object_new_object();
    int status;

    if (!o || !describe(o, x))
        status = complain(STATUS_FAILED, "out of memory");
    else
        status = json_print(o);
    json_object_put(o);
    return status;
}
