/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* For those who link json-c. */

#include <json-c/json.h>

/* For CLEANUP. */
static inline void json_object_putp(json_object **v)
{
    json_object_put(*v);
}
