/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What llmctl's verbs share. Everything here is for one short-lived process with one thread. */

#include <stdint.h>

#include "client/llm.h"

/* Exit statuses, as llmctl(1) documents them. */
enum status {
    STATUS_OK = 0,
    STATUS_FAILED = 1,
    STATUS_USAGE = 2,
    STATUS_NOT_RUNNING = 3,
    STATUS_BUSY = 75, /* EX_TEMPFAIL: busy, or a quota */
    STATUS_TIMEOUT = 124,
    STATUS_INTERRUPTED = 130,
};

int verb_run(int argc, char **argv); /* each returns an exit status; argv[0] is the verb */
int verb_status(int argc, char **argv);

/* "llmctl: ..." on stderr; returns the status. */
int complain(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
int usage_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The status for a negative errno of libllm. */
int status_of(int r);

/* From now on SIGINT ends the process with 130, and so does the deadline (usec; 0: none) with 124.
 */
void deadlines_begin(uint64_t timeout_usec);
/* From now on both are blocked, and let in by deadlines_wait() alone. */
void deadlines_hold(void);
/* poll()s one descriptor. 0, STATUS_INTERRUPTED, STATUS_TIMEOUT, or a complaint was made */
int deadlines_wait(int fd, short events);

struct start_options {
    const char *socket; /* NULL: the private daemon's */
    const char *model;  /* NULL: $LLMD_MODEL, else the default one */
    bool no_start;
};

/*
 * Connects, and starts a private daemon first where none is there. *ret_model is the model asked
 * for, as an absolute path and malloc'ed; NULL: any. STATUS_OK, or a status and the complaint is
 * made.
 */
int connect_or_start(const struct start_options *o, struct llm_connection **ret, char **ret_model);
