/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * reachable_sockets: the Unix sockets that a confined process may connect to. A filter of system
 * calls sees where in memory an address lies, not what it is. So the addresses lie in memory of
 * their own that nobody can change any more, the filter allows connect() with these, and the
 * handler of what it refuses looks whether the address is equal to one of them and connects to
 * that. One set for the process.
 */

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

#define REACHABLE_SOCKETS_MAX 32u

/* path: "@name" for one without a path. 0; -ENAMETOOLONG, -ENOSPC: passed over; -ENOMEM */
int reachable_sockets_add(const char *path);

/* Nothing can be added any more, nor changed: the memory is sealed where the kernel can (6.10). */
int reachable_sockets_seal(void);

/* i < REACHABLE_SOCKETS_MAX; NULL: there are no more */
const struct sockaddr_un *reachable_sockets_get(size_t i, socklen_t *ret_length);

/* The one that is equal to what a caller has, which must be readable. NULL: none. Signal-safe. */
const struct sockaddr_un *reachable_sockets_find(const struct sockaddr_un *address,
                                                 socklen_t length, socklen_t *ret_length);
