/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * fd_store: descriptors that the service manager passed at the start, and those that it is to hold
 * for the next process: FDSTORE=1 of sd_notify(3). Without a manager, or where it keeps none
 * (FileDescriptorStoreMax=0), nothing is kept and nothing else changes. Loop thread.
 *
 * Names: "llmd" (listening sockets, not ours to push), "instance", "kv", "session-ID", "request-ID"
 * (its record and the stream's socket), "connection-ID". The manager drops sockets whose peer has
 * closed by itself.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fd_store;

/*
 * All inherited descriptors, by name, close-on-exec; early, before anything else may have their
 * numbers. 0, -errno
 */
int fd_store_take(struct fd_store **ret);
/* Closes what nobody took. What the manager holds stays there. */
struct fd_store *fd_store_free(struct fd_store *s);
void fd_store_freep(struct fd_store **s);

/*
 * The manager gets duplicates, under this name; it has them (or will read that it has them, should
 * this process be gone) when this returns. 0; -errno: a manager is there and could not be told,
 * which is in the log. s: NULL: nobody keeps anything
 */
int fd_store_push(struct fd_store *s, const char *name, const int *fds, size_t n);
/* It closes all of that name. */
void fd_store_remove(struct fd_store *s, const char *name);

/* "PREFIX-ID" */
int fd_store_push_id(struct fd_store *s, const char *prefix, uint64_t id, const int *fds, size_t n);
void fd_store_remove_id(struct fd_store *s, const char *prefix, uint64_t id);

/* From now on nothing is pushed or removed: what the manager has is for the next process. */
void fd_store_leave(struct fd_store *s);

/* Takes the next inherited descriptor of that name: 1: *ret_fd is the caller's; 0: no more */
int fd_store_next(struct fd_store *s, const char *name, int *ret_fd);
/* The same of "PREFIX-ID", with its number. */
int fd_store_next_id(struct fd_store *s, const char *prefix, uint64_t *ret_id, int *ret_fd);

/* The inherited ones of that name, and the manager's. */
void fd_store_drop(struct fd_store *s, const char *name);

/* Nobody will take what is left: closes it, and says so in the log. */
void fd_store_drop_rest(struct fd_store *s);
