/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * json_text: JSON from files nobody vouches for, read by json-c but without its leniency.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "base/json.h"

struct json_limits {
    int depth;         /* of nested objects and arrays */
    size_t max_values; /* commas, that is about the number of values; bounds the memory taken */
};

/*
 * Parses text[0..n), which must be exactly one JSON object or array: valid UTF-8, RFC 8259 to the
 * letter (no comments, single quotes, NaN), no key twice in one object and no NUL in a string,
 * which C would cut short.
 * *ret is released by json_object_put(). 0, -EINVAL: err says where, -ENOMEM
 */
int json_text_parse(json_object **ret, const char *text, size_t n, const struct json_limits *limits,
                    struct error *err);

/* An integer 0 .. 2^63 - 2 (json-c saturates beyond), else false. v may be NULL here and below. */
bool json_text_u64(json_object *v, uint64_t *ret);

/* A string; NULL when v is none. Borrowed from v. */
const char *json_text_string(json_object *v);

/* A number that is a finite float. */
bool json_text_float(json_object *v, float *ret);

/* v[key] where v is an object, else NULL. Borrowed. */
json_object *json_text_get(json_object *v, const char *key);
