/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * client: one peer: a connection to the socket, or a unique name on the bus. Who it is was told by
 * the kernel (SO_PEERCRED) or by the broker, never by the peer. Its sessions end with it unless
 * they linger; calls of it that wait for an answer are dropped. Loop thread.
 *
 * clients: all of them. On the bus a client is made by its first call and goes when its name does.
 */

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-bus.h>

#include "base/error.h"
#include "daemon/authority.h"
#include "daemon/client-identity.h"
#include "daemon/client-session.h"

struct clients;
struct connection;
struct pending_call;
struct service;
struct served;
struct user;

enum client_subscription {
    SUBSCRIBED_NOT,
    SUBSCRIBED_OWN, /* signals about sessions of its own uid */
    SUBSCRIBED_ALL, /* everybody's */
};

struct client {
    struct clients *clients;
    struct service *service;
    sd_bus *bus;                   /* borrowed: its connection, or the broker's */
    struct connection *connection; /* NULL: on the bus */
    char *name;                    /* unique name; NULL: peer to peer */
    struct client_identity who;
    struct user *user;
    enum client_subscription subscription;
    struct session_owner sessions;
    struct pending_call *calls;     /* pending_call::next */
    sd_bus_track *track;            /* of name */
    struct client *previous, *next; /* clients::list */
};

int clients_new(struct clients **ret, struct service *s); /* 0, -ENOMEM */
struct clients *clients_free(struct clients *c); /* those on the bus; no other may be left */
uint32_t clients_n(const struct clients *c);
uint64_t clients_uptime_usec(const struct clients *c); /* since clients_new() */
struct client *clients_first(const struct clients *c); /* then client::next */
struct served **clients_served(struct clients *c);     /* bus.c's list of what is served where */

/*
 * A peer on its own connection. Takes over what *who owns, on success. 0; -EDQUOT: its user has as
 * many connections as it may; -ENOMEM
 */
int client_new(struct client **ret, struct clients *c, sd_bus *bus, struct connection *connection,
               struct client_identity *who);

/* Cancels its requests and closes its sessions, except those that linger. Anything may call it. */
struct client *client_free(struct client *c);

/*
 * Who sent the message: p2p where that is not NULL, else the client of the sender's unique name,
 * made now if need be (two round trips to the broker, once per name). 0, -ENOMEM, -errno
 */
int clients_of_message(struct clients *c, sd_bus_message *m, struct client *p2p,
                       struct client **ret);

/* Those on this bus are gone: the broker is, or the connection to it. What they own is kept for
 * them (former-owner.h). */
void clients_drop_bus(struct clients *c, const sd_bus *bus);

/*
 * pending_call: a method call that is answered later. Whoever makes it answers and frees it; when
 * its client goes, `client` is NULL and the answer is for nobody.
 */
struct pending_call {
    struct client *client; /* NULL: gone */
    sd_bus_message *message;
    void *userdata;                       /* whoever made it */
    struct pending_call *previous, *next; /* client::calls */
};
int pending_call_new(struct pending_call **ret, struct client *c,
                     sd_bus_message *m); /* 0, -ENOMEM */
struct pending_call *pending_call_free(struct pending_call *p);
/* Sends the error that goes with r < 0, and frees it. */
void pending_call_fail(struct pending_call *p, int r, const struct error *err);

/*
 * Goes on with a method when its caller may do the action: at once, or later. The message is
 * rewound before. As a handler of sd-bus returns: 1, or negative with error set.
 */
typedef int (*client_method)(struct client *c, sd_bus_message *m, sd_bus_error *error);
int client_authorise(struct client *c, enum action action, sd_bus_message *m, client_method go,
                     sd_bus_error *error);
