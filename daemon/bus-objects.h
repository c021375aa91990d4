/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* bus-objects: what the files behind bus.h share. Loop thread. */

#include <systemd/sd-bus.h>

#include "daemon/client.h"
#include "daemon/service.h"

/* What a handler of a session's or a model's vtable gets: the object of its path, for its caller.
 */
struct found_session {
    struct service *service;
    struct client *client;
    struct client_session *session;
};

#define SERVED_SLOTS_MAX 8

/* One sd_bus on which the objects are served; the userdata of the Manager's handlers. */
struct served {
    struct service *service;
    sd_bus *bus;        /* borrowed */
    struct client *p2p; /* NULL: a broker's */
    sd_bus_slot *slots[SERVED_SLOTS_MAX];
    size_t n_slots;
    struct found_session found; /* by the find function, for the handler called right after it */
    struct served *next;        /* clients_served() */
};

extern const sd_bus_vtable manager_vtable[], session_vtable[];

/* sd_bus_object_find_t. A foreign session and one that is not there give the same error. */
int session_find(sd_bus *bus, const char *path, const char *interface, void *userdata,
                 void **ret_found, sd_bus_error *ret_error);

/* Who sent the message; a method that fails with its error, set, otherwise. 0, -errno */
int served_client(struct served *v, sd_bus_message *m, struct client **ret, sd_bus_error *error);

/* The handler of the client's bus: of the Manager's methods that go on after an authorisation. */
int bus_fail(struct service *s, sd_bus_error *error, int r, const struct error *err);

/* Signals about sessions, to those who may hear of them. */
extern const struct session_observer bus_session_observer;
