/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* report: measurements as a JSON object, whose keys llm-bench(1) tells, and as tables for people.
 */

#include <json-c/json.h>

#include "tools/llm-bench/measure.h"

#define REPORT_FORMAT "llm-bench 1" /* "format" of the object */

/* The part that is known before anything is measured: model, machine, engine. 0, -ENOMEM */
int report_head(struct json_object **ret, const struct measurements *m, const struct model *model);

/* All of it. 0, -ENOMEM */
int report_json(struct json_object **ret, const struct measurements *m, const struct model *model,
                const struct bench_options *o);

/* To stdout. 0, -ENOMEM */
int report_print(const struct measurements *m, const struct model *model);
