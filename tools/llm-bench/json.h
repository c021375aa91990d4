/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <json-c/json.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/checked.h"

/* Takes the value. False when out of memory, as json-c tells it. */
static inline bool put(struct json_object *o, const char *key, struct json_object *value)
{
    if (value && json_object_object_add(o, key, value) == 0)
        return true;
    json_object_put(value);
    return false;
}

static inline struct json_object *number(double x)
{
    return json_object_new_double(x);
}

static inline struct json_object *whole(uint64_t x)
{
    return json_object_new_int64((int64_t)MIN(x, (uint64_t)INT64_MAX));
}
