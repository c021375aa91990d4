/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Sessions and models are not registered one by one: a fallback vtable answers for all paths below
 * the prefix, and its find function resolves the path for the caller of the message at hand. So a
 * session of another user does not exist, whatever way it is asked for, and a thousand sessions on
 * thirty connections cost nothing.
 */

#include "daemon/bus.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/bus-objects.h"
#include "daemon/users.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

int served_client(struct served *v, sd_bus_message *m, struct client **ret, sd_bus_error *error)
{
    int r = clients_of_message(v->service->clients, m, v->p2p, ret);

    return r < 0 ? bus_error_set(error, r, NULL) : 0;
}

int bus_fail(struct service *s, sd_bus_error *error, int r, const struct error *err)
{
    if (abs(r) == EDQUOT)
        session_set_count_refused(s->sessions);
    return bus_error_set(error, r, err);
}

/* Paths of the caller's own sessions, for Introspect and GetManagedObjects. */
static int list_sessions(sd_bus *bus, const char *prefix, void *userdata, char ***ret_nodes,
                         sd_bus_error *error)
{
    struct served *v = userdata;
    struct client *client;
    char **paths;
    size_t n = 0;

    (void)prefix;
    (void)error;
    if (clients_of_message(v->service->clients, sd_bus_get_current_message(bus), v->p2p, &client) <
        0)
        return 0; /* who it is cannot be told: it has none */
    paths = calloc(client->user->n_sessions + 1, sizeof(*paths));
    if (!paths)
        return -ENOMEM;
    for (struct client_session *s = session_set_first(v->service->sessions); s;
         s = client_session_next(s)) {
        if (client_session_user(s) != client->user)
            continue;
        paths[n] = strdup(client_session_path(s));
        if (!paths[n]) {
            while (n > 0)
                free(paths[--n]);
            free(paths);
            return -ENOMEM;
        }
        n++;
    }
    *ret_nodes = paths;
    return 0;
}

static sd_bus_slot **new_slot(struct served *v)
{
    assert(v->n_slots < SERVED_SLOTS_MAX);
    return &v->slots[v->n_slots++];
}

int bus_serve(struct service *s, sd_bus *bus, struct client *p2p)
{
    struct served *v = calloc(1, sizeof(*v)), **list = clients_served(s->clients);
    int r;

    if (!v)
        return -ENOMEM;
    v->service = s;
    v->bus = bus;
    v->p2p = p2p;
    v->next = *list;
    *list = v;
    session_set_observe(s->sessions, &bus_session_observer, s);

    if ((r = sd_bus_add_object_vtable(bus, new_slot(v), LLM_ROOT_PATH, LLM_MANAGER_INTERFACE,
                                      manager_vtable, v)) < 0 ||
        (r = sd_bus_add_object_manager(bus, new_slot(v), LLM_ROOT_PATH)) < 0 ||
        (r = sd_bus_add_fallback_vtable(bus, new_slot(v), LLM_SESSION_PATH, LLM_SESSION_INTERFACE,
                                        session_vtable, session_find, v)) < 0 ||
        (r = sd_bus_add_node_enumerator(bus, new_slot(v), LLM_SESSION_PATH, list_sessions, v)) <
            0 ||
        (r = sd_bus_add_fallback_vtable(bus, new_slot(v), LLM_MODEL_PATH, LLM_MODEL_INTERFACE,
                                        model_vtable, model_find, v)) < 0 ||
        (r = sd_bus_add_node_enumerator(bus, new_slot(v), LLM_MODEL_PATH, list_model_paths, v)) < 0)
        bus_leave(s, bus);
    return r < 0 ? r : 0;
}

void bus_leave(struct service *s, sd_bus *bus)
{
    struct served **at = clients_served(s->clients), *v;

    clients_drop_bus(s->clients, bus);
    while ((v = *at)) {
        if (v->bus != bus) {
            at = &v->next;
            continue;
        }
        *at = v->next;
        for (size_t i = 0; i < v->n_slots; i++)
            sd_bus_slot_unref(v->slots[i]);
        free(v);
    }
}
