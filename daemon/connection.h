/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * connection: one client's own sd_bus, over the socket, with all objects served on it (bus.h). Loop
 * thread.
 */

#include <stdbool.h>
#include <systemd/sd-bus.h>

#include "daemon/client-identity.h"

struct client;
struct connection;
struct service;

/* Called once when the peer is gone; the receiver calls connection_free(). */
typedef void (*connection_gone)(struct connection *c, void *userdata);

/*
 * Takes fd and what *who owns (in every case). 0; -EDQUOT: its user has as many connections as it
 * may; -errno
 */
int connection_new(struct connection **ret, struct service *s, int fd, struct client_identity *who,
                   connection_gone gone, void *userdata);
struct connection *connection_free(struct connection *c);

/* Whether it has said who it is, and the bus is up. */
bool connection_is_ready(const struct connection *c);

/*
 * After something was sent to it: a peer that does not read has only so much waiting for it, then
 * the connection is given up, a moment later.
 */
void connection_check_queue(struct connection *c);
