/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* bus-objects: what the files behind bus.h share. Loop thread. */

#include <systemd/sd-bus.h>

#include "daemon/client.h"
#include "daemon/model-store.h"
#include "daemon/service.h"

/* What a handler of a session's or a model's vtable gets: the object of its path, for its caller.
 */
struct found_session {
    struct service *service;
    struct client *client;
    struct client_session *session;
};

struct found_model {
    struct service *service;
    const struct stored_model *model;
};

#define SERVED_SLOTS_MAX 8

/* One sd_bus on which the objects are served; the userdata of the Manager's handlers. */
struct served {
    struct service *service;
    sd_bus *bus;        /* borrowed */
    struct client *p2p; /* NULL: a broker's */
    sd_bus_slot *slots[SERVED_SLOTS_MAX];
    size_t n_slots;
    /* By the find functions, for the handler called right after them. */
    struct found_session found;
    struct found_model found_model;
    struct served *next; /* clients_served() */
};

extern const sd_bus_vtable manager_vtable[], session_vtable[], model_vtable[];

/* The caller's own session; a foreign one and none at all are the same error. 0, -ESRCH */
int session_of_path(struct client *c, const char *path, struct client_session **ret,
                    sd_bus_error *error);

/* sd_bus_object_find_t */
int session_find(sd_bus *bus, const char *path, const char *interface, void *userdata,
                 void **ret_found, sd_bus_error *ret_error);

int model_find(sd_bus *bus, const char *path, const char *interface, void *userdata,
               void **ret_found, sd_bus_error *ret_error);

/* sd_bus_node_enumerator_t */
int list_model_paths(sd_bus *bus, const char *prefix, void *userdata, char ***ret_nodes,
                     sd_bus_error *error);

const char *model_state_name(const struct service *s, const struct stored_model *m);
const char *default_model(const struct service *s); /* the one configured, "" if none */
bool model_is_default(const struct service *s, const struct stored_model *m);

/* Who sent the message; a method that fails with its error, set, otherwise. 0, -errno */
int served_client(struct served *v, sd_bus_message *m, struct client **ret, sd_bus_error *error);

/* Counts what a quota has refused. Returns as bus_error_set(). */
int bus_fail(struct service *s, sd_bus_error *error, int r, const struct error *err);

/* Signals about sessions, to those who may hear of them. */
extern const struct session_observer bus_session_observer;
