/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* hybrid: llm-bench --backend hybrid: the GPU reads prompts while the processor decodes, as the
 * daemon has it, and what each does alone. */

#include "tools/llm-bench/measure.h"

/* Of the options: prompts, the least depth, sessions, one number of threads. Prints a table, or a
 * JSON object. 0, -errno: err says what went wrong */
int hybrid(const struct model *m, const struct bench_options *o, bool json, struct error *err);
