/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * server: the listening socket of a private daemon, who may come in, and when to leave. Loop
 * thread.
 *
 * Beside SOCKET there are two files that are only ever locked (flock): SOCKET.lock is held by the
 * daemon that serves it, so that a stale socket can be told from a live one; SOCKET.start is held
 * by a client while it looks for a daemon and starts one, and by the daemon while it decides to
 * leave for idleness. So a client that found nobody under SOCKET.start may start one, and two
 * clients never start two.
 */

#include <stdint.h>
#include <systemd/sd-event.h>

#include "base/error.h"

struct server;
struct service;

struct server_options {
    const char *socket_path;
    uint64_t idle_usec; /* leave so long after the last client; 0: never */
};

/*
 * Takes SOCKET.lock, before anything expensive is done. 0; -EADDRINUSE: another one serves or
 * starts there; -errno
 */
int server_new(struct server **ret, const struct server_options *options, struct error *err);

/* Begins to listen. Handles SIGTERM and SIGINT, which must be blocked. 0, -errno */
int server_start(struct server *s, struct service *service, struct error *err);

/* What session_set_new() is to call, with the server. */
void server_something_went(void *userdata);

struct server *server_free(struct server *s);
void server_freep(struct server **s);
