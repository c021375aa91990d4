/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* org.llmd.Llm1.Session: the vtable, and the object's life on its connection. */

#pragma GCC diagnostic ignored "-Wunused-parameter" /* the signatures are sd-bus's */

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "daemon/connection.h"
#include "daemon/options.h"
#include "engine/model.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

static int generate(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct session_object *o = userdata;
    struct session_set *sessions = o->connection->sessions;
    const struct model *model = engine_thread_model(session_set_engine(sessions));
    CLEANUP(job_request_done) struct job_request request = {0};
    CLEANUP(closep) int fd = -EBADF;
    struct error err = {0};
    uint64_t id;
    int r;

    r = options_read_generate(m, model_generation(model), &request, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    r = client_session_generate(o->session, &request, &fd, &id, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    return sd_bus_reply_method_return(m, "ht", fd, id); /* sends a duplicate */
}

static int cancel(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct session_object *o = userdata;

    client_session_cancel(o->session);
    return sd_bus_reply_method_return(m, NULL);
}

static int close_session(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    session_bus_remove(userdata);
    return sd_bus_reply_method_return(m, NULL);
}

static int get_model(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct session_object *o = userdata;

    return sd_bus_message_append(reply, "s", session_set_model_name(o->connection->sessions));
}

static int get_state(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct session_object *o = userdata;

    return sd_bus_message_append(reply, "s", client_session_is_busy(o->session) ? "busy" : "idle");
}

static int get_context_used(sd_bus *bus, const char *path, const char *interface,
                            const char *property, sd_bus_message *reply, void *userdata,
                            sd_bus_error *error)
{
    struct session_object *o = userdata;

    return sd_bus_message_append(reply, "u", client_session_context_used(o->session));
}

static int get_context_max(sd_bus *bus, const char *path, const char *interface,
                           const char *property, sd_bus_message *reply, void *userdata,
                           sd_bus_error *error)
{
    struct session_object *o = userdata;

    return sd_bus_message_append(reply, "u", client_session_context_max(o->session));
}

static const sd_bus_vtable session_vtable[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_METHOD_WITH_ARGS("Generate", SD_BUS_ARGS("a{sv}", options),
                            SD_BUS_RESULT("h", stream, "t", request), generate,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Cancel", SD_BUS_NO_ARGS, SD_BUS_NO_RESULT, cancel,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD_WITH_ARGS("Close", SD_BUS_NO_ARGS, SD_BUS_NO_RESULT, close_session,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_PROPERTY("Model", "s", get_model, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_PROPERTY("State", "s", get_state, 0, 0),
    SD_BUS_PROPERTY("ContextUsed", "u", get_context_used, 0, 0),
    SD_BUS_PROPERTY("ContextMax", "u", get_context_max, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_VTABLE_END,
};

int session_bus_add(struct connection *c, struct client_session *session, char **ret_path)
{
    CLEANUP(freep) char *path = NULL;
    struct session_object *o;
    int r;

    o = calloc(1, sizeof(*o));
    if (!o || asprintf(&path, "%s/%" PRIu64, LLM_SESSION_PATH, client_session_id(session)) < 0) {
        path = NULL;
        free(o);
        client_session_free(session);
        return -ENOMEM;
    }
    r = sd_bus_add_object_vtable(c->bus, &o->slot, path, LLM_SESSION_INTERFACE, session_vtable, o);
    if (r < 0) {
        free(o);
        client_session_free(session);
        return r;
    }
    o->connection = c;
    o->session = session;
    o->next = c->objects;
    if (o->next)
        o->next->previous = o;
    c->objects = o;
    c->n_objects++;
    *ret_path = TAKE_PTR(path);
    return 0;
}

void session_bus_remove(struct session_object *o)
{
    struct connection *c = o->connection;

    if (o->previous)
        o->previous->next = o->next;
    else
        c->objects = o->next;
    if (o->next)
        o->next->previous = o->previous;
    c->n_objects--;
    sd_bus_slot_unref(o->slot);
    client_session_free(o->session);
    free(o);
}
