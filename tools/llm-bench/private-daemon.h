/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* private-daemon: an llmd of this process's own, in a temporary folder. One a process. */

#include <stdbool.h>

#include "base/error.h"

struct private_daemon_options {
    const char *program; /* NULL: $LLMD_BINARY, beside this program, where the build puts it */
    const char *model;
    char *const *more; /* arguments for llmd; ends with NULL */
    bool other_users;  /* shall answer other uids too, which takes root */
};

/* Waits until it serves. Signals that end this process end it too. 0, -errno */
int private_daemon_start(const struct private_daemon_options *o, struct error *err);

const char *private_daemon_socket(void);

/* Ends it and removes its folder; nothing where there is none. 0, -EIO: it did not end well */
int private_daemon_stop(struct error *err);
