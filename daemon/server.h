/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * server: the sockets that are listened to, and who may come in. Loop thread.
 *
 * Sockets are inherited from a service manager, or one is made here. Beside a SOCKET made here
 * there are two files that are only ever locked (flock): SOCKET.lock is held by the daemon that
 * serves it, so that a stale socket can be told from a live one; SOCKET.start is held by a client
 * while it looks for a daemon and starts one, and by the daemon while it decides to leave for
 * idleness. So a client that found nobody under SOCKET.start may start one, and two clients never
 * start two.
 */

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct server;
struct service;

struct server_options {
    const char *path; /* made here, unless descriptors are inherited */
    bool any_user;    /* everybody's programs, not only those of our own uid */
    uint32_t max_connections;
};

/*
 * Takes SOCKET.lock, before anything expensive is done, or the inherited sockets. 0; -EADDRINUSE:
 * another one serves or starts there; -errno
 */
int server_new(struct server **ret, struct service *service, const struct server_options *options,
               struct error *err);
struct server *server_free(struct server *s);
void server_freep(struct server **s);

/* Begins to let clients in. 0, -errno */
int server_start(struct server *s, struct error *err);

/* From now on nobody finds us, and another may take our place. Those who are in stay. */
void server_stop(struct server *s);

/* Whatever is in is thrown out. Not from below a connection's own callback. */
void server_close_all(struct server *s);

/* Whether nobody is about to come: then it has been stopped. */
bool server_leave(struct server *s);

/* A descriptor may be free again. */
void server_something_went(struct server *s);

void server_set_max_connections(struct server *s, uint32_t n);
