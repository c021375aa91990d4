/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * landlock: what of the file system this thread, and those it starts from then on, can still reach;
 * and no TCP, and where the kernel knows how neither signals nor abstract sockets of others. Ask
 * the newest version that the kernel has; what it does not know is left out.
 */

#include <stdbool.h>

#include "daemon/sandbox.h"

/* Version of the interface; 0: the kernel has none */
int landlock_version(void);

/* A descriptor; -EOPNOTSUPP: the kernel has no landlock; -errno */
int landlock_new(bool abstract_sockets);

/* What fd stands for, and all below it. 0, -errno */
int landlock_allow(int ruleset_fd, int fd, enum sandbox_access access);

/* For good; no_new_privs must be set. 0, -errno */
int landlock_enter(int ruleset_fd);
