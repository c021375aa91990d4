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
#include <sys/types.h>
#include <systemd/sd-bus.h>

#include "base/error.h"

struct client_session;
struct clients;
struct pending_call;
struct service;
struct user;

enum client_subscription {
    SUBSCRIBED_NOT,
    SUBSCRIBED_OWN, /* signals about sessions of its own uid */
    SUBSCRIBED_ALL, /* everybody's */
};

struct client {
    struct clients *clients;
    sd_bus *bus; /* borrowed: its connection, or the broker's */
    char *name;  /* unique name; NULL: peer to peer */
    uid_t uid;
    pid_t pid; /* 0: not known */
    struct user *user;
    enum client_subscription subscription;
    bool may_use; /* the action `use` was allowed */
    uint32_t n_sessions;
    struct client_session *sessions; /* client_session::next_of_client */
    struct pending_call *calls;      /* those without an answer yet */
    struct sd_bus_track *track;      /* of name */
    struct client *previous, *next;  /* clients::list */
};

int clients_new(struct clients **ret, struct service *s); /* 0, -ENOMEM */
struct clients *clients_free(struct clients *c);          /* with all clients and their sessions */
void clients_freep(struct clients **c);
uint32_t clients_n(const struct clients *c);
struct client *clients_first(const struct clients *c); /* then client::next */

/* A peer on its own connection. 0, -ENOMEM */
int client_new(struct client **ret, struct clients *c, sd_bus *bus, uid_t uid, pid_t pid);

/* Cancels its requests and closes its sessions, except those that linger. Anything may call it. */
struct client *client_free(struct client *c);

/*
 * Who sent the message: p2p where that is not NULL, else the client of the sender's unique name,
 * made now if need be (a round trip to the broker, once per name). 0, -ENOMEM, -EDQUOT, -errno
 */
int clients_of_message(struct clients *c, sd_bus_message *m, struct client *p2p,
                       struct client **ret);

/* Those on this bus are gone: the broker is, or the connection to it. */
void clients_drop_bus(struct clients *c, const sd_bus *bus);
