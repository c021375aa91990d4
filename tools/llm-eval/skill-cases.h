/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * skill_cases: prompts with what is a right answer to each, from a file of JSON objects, one a line
 * (tools/demo-model/held_out.py writes it and describes the fields).
 */

#include <json-c/json.h>
#include <regex.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "engine/chat.h"

struct skill_case {
    json_object *root;             /* the strings below are its */
    const char *skill;             /* "facts" */
    const char *text;              /* plain text to go on with, or NULL: */
    struct chat_message *messages; /* [n_messages] user, model, ..., user */
    size_t n_messages;
    regex_t *expect, *reject; /* whole answers: all of these match, none of those */
    size_t n_expect, n_reject;
    json_object *expect_json; /* instead: the answer is JSON of this value */
};

struct skill_cases {
    struct skill_case *cases; /* [n], in the file's order */
    size_t n;
};

/* skill: only cases of it, NULL for all. 0, -errno: err names file and line */
int skill_cases_read(struct skill_cases *ret, const char *path, const char *skill,
                     struct error *err);
void skill_cases_done(struct skill_cases *c); /* of a zeroed one, too */

/* Whether answer[n] is right; white space around it does not count. 0 or 1, -ENOMEM */
int skill_case_check(const struct skill_case *c, const char *answer, size_t n);
