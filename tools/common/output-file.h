/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * output_file: a file that appears whole or not at all. It is written under a temporary name beside
 * its own and renamed when it is complete; error, SIGINT, SIGTERM and SIGHUP remove it. "-" is
 * stdout, and what exists and is no regular file (a pipe, /dev/null) is written to directly.
 *
 * One at a time in a process: it owns the handlers of those signals while open.
 */

#include <stdio.h>

#include "base/error.h"

struct output_file {
    FILE *stream;           /* write here; NULL: not open */
    char *path, *temporary; /* temporary NULL: written to directly */
};

/* 0, -errno: err names the file */
int output_open(struct output_file *ret, const char *path, struct error *err);

/* Flushes, syncs nothing, renames. Closed in any case. 0, -errno: err names the file */
int output_commit(struct output_file *o, struct error *err);

/* Closes and removes an output that was not committed; for CLEANUP(). */
void output_done(struct output_file *o);
