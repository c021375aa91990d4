/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* compare: two reports (report.h), line by line, as ratios of the new one to the old one. */

#include <json-c/json.h>

#include "base/error.h"

/* A report from a file. 0, -errno, -EINVAL: err says what is wrong with it */
int compare_read(struct json_object **ret, const char *path, struct error *err);

/*
 * Whether ratios mean anything: both are of the same model, engine and level. fresh may be a
 * report_head(). Differences that leave a meaning are told on stderr, after "PROGRAM: ".
 * 0, -EINVAL: err says what differs
 */
int compare_check(struct json_object *old, struct json_object *fresh, const char *old_path,
                  const char *program, struct error *err);

/* Whether old has anything measured with so many threads. */
int compare_has_threads(struct json_object *old, unsigned n_threads);

/*
 * A list of {"what", "old", "new", "ratio"}, of what both have. 0, -ENOMEM, -EINVAL: there is
 * nothing that both have
 */
int compare_make(struct json_object **ret, struct json_object *old, struct json_object *fresh,
                 const char *old_path, struct error *err);

/* The same for people, to stdout. 0, -ENOMEM */
int compare_print(struct json_object *list, const char *old_path);
