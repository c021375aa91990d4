/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * connection: one client's end of the peer-to-peer bus, with the sessions it owns. When it goes,
 * they go. Loop thread. manager-bus.c and session-bus.c are the vtables served on it.
 */

#include <stdint.h>
#include <systemd/sd-bus.h>

#include "base/error.h"
#include "daemon/authority.h"
#include "daemon/client-session.h"
#include "daemon/service.h"

#define CONNECTION_SESSIONS_MAX 16u

struct connection;

/* Called once when the peer is gone; the receiver calls connection_free(). */
typedef void (*connection_gone)(struct connection *c, void *userdata);

/* Takes fd and what *who owns (in every case). 0, -errno */
int connection_new(struct connection **ret, struct service *s, int fd, struct client_identity *who,
                   connection_gone gone, void *userdata);
struct connection *connection_free(struct connection *c);

/* What hangs on a connection: a session and the object that stands for it. */
struct session_object {
    struct connection *connection;
    struct client_session *session;
    sd_bus_slot *slot;
    struct session_object *previous, *next; /* connection::objects */
};

struct connection {
    sd_bus *bus;
    struct client_identity who;
    struct session_set *sessions; /* borrowed */
    struct session_object *objects;
    uint32_t n_objects;
    sd_bus_slot *manager_slot, *disconnected_slot;
    sd_event_source *post_source;
    connection_gone gone;
    void *userdata;
};

int manager_bus_add(struct connection *c); /* 0, -errno */

/* Takes the session over. *ret_path is malloc'ed. 0, -errno */
int session_bus_add(struct connection *c, struct client_session *session, char **ret_path);
void session_bus_remove(struct session_object *o);
