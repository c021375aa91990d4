/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Signals. What is about a session goes to single peers by their unique names, or on their own
 * connections, never to everybody: sd-bus's own emitters broadcast, so these messages are made
 * here, from the vtables' getters. A signal that cannot be sent for want of memory is lost; whoever
 * must not miss anything reads the properties.
 */

#include <string.h>

#include "base/cleanup.h"
#include "daemon/bus-objects.h"
#include "daemon/bus.h"
#include "daemon/connection.h"
#include "daemon/model-store.h"
#include "daemon/users.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

#define OBJECT_MANAGER "org.freedesktop.DBus.ObjectManager"
#define PROPERTIES "org.freedesktop.DBus.Properties"

/* ---- to whom ---- */

static bool hears_of(const struct client *c, const struct client_session *s)
{
    switch (c->subscription) {
    case SUBSCRIBED_NOT:
        return false;
    case SUBSCRIBED_OWN:
        return c->user == client_session_user(s);
    case SUBSCRIBED_ALL:
        return true;
    }
    return false;
}

static void send_to(struct client *c, sd_bus_message *m)
{
    if (c->name && sd_bus_message_set_destination(m, c->name) < 0)
        return;
    if (sd_bus_send(c->bus, m, NULL) >= 0 && c->connection)
        connection_check_queue(c->connection);
}

/* Fills in a signal's body for one client. 0, -errno */
typedef int (*fill_signal)(sd_bus_message *m, struct found_session *f, const void *what);

static void tell_all(struct service *s, struct client_session *session, const char *path,
                     const char *interface, const char *member, fill_signal fill, const void *what,
                     const struct session_owner *also)
{
    for (struct client *c = clients_first(s->clients); c; c = c->next) {
        struct found_session f = {.service = s, .client = c, .session = session};
        CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;

        if (!hears_of(c, session) && (!also || also != &c->sessions))
            continue;
        if (sd_bus_message_new_signal(c->bus, &m, path, interface, member) >= 0 &&
            fill(m, &f, what) >= 0)
            send_to(c, m);
    }
}

/* ---- properties, as sd-bus would have them ---- */

static int append_property(sd_bus_message *m, struct found_session *f, const sd_bus_vtable *v)
{
    int r;

    if ((r = sd_bus_message_open_container(m, 'e', "sv")) < 0 ||
        (r = sd_bus_message_append(m, "s", v->x.property.member)) < 0 ||
        (r = sd_bus_message_open_container(m, 'v', v->x.property.signature)) < 0 ||
        (r = v->x.property.get(f->client->bus, client_session_path(f->session),
                               LLM_SESSION_INTERFACE, v->x.property.member, m, f, NULL)) < 0 ||
        (r = sd_bus_message_close_container(m)) < 0)
        return r;
    return sd_bus_message_close_container(m);
}

/* changing: only those that emit changes */
static int append_properties(sd_bus_message *m, struct found_session *f, bool changing)
{
    int r;

    r = sd_bus_message_open_container(m, 'a', "{sv}");
    for (const sd_bus_vtable *v = session_vtable; r >= 0 && v->type != _SD_BUS_VTABLE_END; v++) {
        if (v->type != _SD_BUS_VTABLE_PROPERTY ||
            (changing && !(v->flags & SD_BUS_VTABLE_PROPERTY_EMITS_CHANGE)))
            continue;
        r = append_property(m, f, v);
    }
    return r < 0 ? r : sd_bus_message_close_container(m);
}

/* ---- sessions ---- */

static int fill_added(sd_bus_message *m, struct found_session *f, const void *what)
{
    int r;

    (void)what;
    if ((r = sd_bus_message_append(m, "o", client_session_path(f->session))) < 0 ||
        (r = sd_bus_message_open_container(m, 'a', "{sa{sv}}")) < 0 ||
        (r = sd_bus_message_open_container(m, 'e', "sa{sv}")) < 0 ||
        (r = sd_bus_message_append(m, "s", LLM_SESSION_INTERFACE)) < 0 ||
        (r = append_properties(m, f, /* changing= */ false)) < 0 ||
        (r = sd_bus_message_close_container(m)) < 0)
        return r;
    return sd_bus_message_close_container(m);
}

static void session_came(void *userdata, struct client_session *s)
{
    tell_all(userdata, s, LLM_ROOT_PATH, OBJECT_MANAGER, "InterfacesAdded", fill_added, NULL, NULL);
}

static int fill_removed(sd_bus_message *m, struct found_session *f, const void *what)
{
    (void)what;
    return sd_bus_message_append(m, "oas", client_session_path(f->session), 1,
                                 LLM_SESSION_INTERFACE);
}

static void session_goes(void *userdata, struct client_session *s)
{
    tell_all(userdata, s, LLM_ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", fill_removed, NULL,
             NULL);
}

static int fill_changed(sd_bus_message *m, struct found_session *f, const void *what)
{
    int r;

    (void)what;
    if ((r = sd_bus_message_append(m, "s", LLM_SESSION_INTERFACE)) < 0 ||
        (r = append_properties(m, f, /* changing= */ true)) < 0)
        return r;
    return sd_bus_message_append(m, "as", 0);
}

static void session_changed(void *userdata, struct client_session *s)
{
    tell_all(userdata, s, client_session_path(s), PROPERTIES, "PropertiesChanged", fill_changed,
             NULL, NULL);
}

static int fill_finished(sd_bus_message *m, struct found_session *f, const void *what)
{
    const struct job *j = what;
    int r;

    (void)f;
    if ((r = sd_bus_message_append(m, "ts", j->id, j->end_reason ? j->end_reason : "error")) < 0 ||
        (r = sd_bus_message_open_container(m, 'a', "{sv}")) < 0 ||
        (r = sd_bus_message_append(m, "{sv}{sv}", "prompt-tokens", "u", j->usage.prompt_tokens,
                                   "completion-tokens", "u", j->usage.completion_tokens)) < 0)
        return r;
    if (j->result < 0) {
        r = sd_bus_message_append(m, "{sv}", "error", "s", bus_error_name(j->result));
        if (r < 0)
            return r;
    }
    return sd_bus_message_close_container(m);
}

static void session_finished(void *userdata, struct client_session *s, const struct job *j)
{
    tell_all(userdata, s, client_session_path(s), LLM_SESSION_INTERFACE, "RequestFinished",
             fill_finished, j, client_session_owner(s));
}

static void lanes_changed(void *userdata)
{
    bus_manager_changed(userdata, BUS_BACKENDS);
}

const struct session_observer bus_session_observer = {
    .lanes = lanes_changed,
    .came = session_came,
    .goes = session_goes,
    .changed = session_changed,
    .finished = session_finished,
};

/* ---- what everybody may hear ---- */

static void each_bus(struct service *s, void (*emit)(sd_bus *bus, const void *what),
                     const void *what)
{
    struct served *next;

    for (struct served *v = *clients_served(s->clients); v; v = next) {
        next = v->next;
        emit(v->bus, what);
        if (v->p2p)
            connection_check_queue(v->p2p->connection);
    }
}

static void emit_manager(sd_bus *bus, const void *what)
{
    sd_bus_emit_properties_changed_strv(bus, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, (char **)what);
}

void bus_manager_changed(struct service *s, unsigned properties)
{
    static const struct {
        unsigned bit;
        const char *name;
    } all[] = {{BUS_STATE, "State"},
               {BUS_MODELS, "Models"},
               {BUS_DEFAULT_MODEL, "DefaultModel"},
               {BUS_MODEL, "Model"},
               {BUS_BACKENDS, "Backends"}};
    const char *names[6] = {0};
    size_t n = 0;

    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        if (properties & all[i].bit)
            names[n++] = all[i].name;
    if (n > 0)
        each_bus(s, emit_manager, names);
    if (properties & (BUS_DEFAULT_MODEL | BUS_MODEL))
        for (size_t i = 0; i < (s->models ? model_store_n(s->models) : 0); i++)
            bus_model_changed(s, model_store_get(s->models, i)->name);
}

void bus_tell_restarted(sd_bus *bus)
{
    sd_bus_emit_signal(bus, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "Restarted", NULL);
}

static void emit_model_added(sd_bus *bus, const void *what)
{
    sd_bus_emit_interfaces_added(bus, what, LLM_MODEL_INTERFACE, NULL);
}

static void emit_model_removed(sd_bus *bus, const void *what)
{
    sd_bus_emit_interfaces_removed(bus, what, LLM_MODEL_INTERFACE, NULL);
}

static void emit_model_changed(sd_bus *bus, const void *what)
{
    sd_bus_emit_properties_changed(bus, what, LLM_MODEL_INTERFACE, "State", "Failure", "Default",
                                   NULL);
}

static void each_bus_model(struct service *s, void (*emit)(sd_bus *bus, const void *what),
                           const char *name)
{
    CLEANUP(freep) char *path = NULL;

    if (sd_bus_path_encode(LLM_MODEL_PATH, name, &path) >= 0)
        each_bus(s, emit, path);
}

void bus_model_added(struct service *s, const char *name)
{
    each_bus_model(s, emit_model_added, name);
}

void bus_model_removed(struct service *s, const char *name)
{
    each_bus_model(s, emit_model_removed, name);
}

void bus_model_changed(struct service *s, const char *name)
{
    each_bus_model(s, emit_model_changed, name);
}
