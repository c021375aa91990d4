/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * runtime-dir: where a user's sockets, locks and logs live; and who is at the other end of a
 * socket, as the kernel knows it.
 */

#include <sys/types.h>

#include "base/error.h"

/*
 * The caller's own directory, made with mode 0700 if it is not there: $XDG_RUNTIME_DIR/llmd, else
 * /run/user/UID/llmd where /run/user/UID exists, else /tmp/llmd-UID. One that belongs to somebody
 * else, is a symbolic link, or is open to others is refused: who owns it could answer for us.
 * *ret is malloc'ed. 0, -errno
 */
int runtime_dir(char **ret, struct error *err);

struct peer {
    pid_t pid; /* at the time of connect() or listen(); for logs only, it may be reused */
    uid_t uid;
    gid_t gid;
};

/* Identity of the process at the other end of a connected Unix socket (SO_PEERCRED). 0, -errno */
int peer_of(int fd, struct peer *ret);
