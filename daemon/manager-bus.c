/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* org.llmd.Llm1.Manager: the vtable and nothing else. */

#pragma GCC diagnostic ignored "-Wunused-parameter" /* the signatures are sd-bus's */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "daemon/connection.h"
#include "daemon/options.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

static int create_session(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct connection *c = userdata;
    CLEANUP(session_options_done) struct session_options options = {0};
    CLEANUP(client_session_freep) struct client_session *session = NULL;
    CLEANUP(freep) char *path = NULL;
    struct error err = {0};
    int r;

    r = options_read_session(m, &options, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    if (options.model && !session_set_serves(c->sessions, options.model)) {
        error_set(&err, ENOENT, "model: '%.200s' is not served here, '%.200s' is", options.model,
                  session_set_model_name(c->sessions));
        return bus_error_set(error, ENOENT, &err);
    }
    if (c->n_objects >= CONNECTION_SESSIONS_MAX) {
        error_set(&err, EDQUOT, "a connection may have %u sessions", CONNECTION_SESSIONS_MAX);
        return bus_error_set(error, EDQUOT, &err);
    }
    r = client_session_new(&session, c->sessions, options.context, &err);
    if (r < 0)
        return bus_error_set(error, r, &err);
    r = session_bus_add(c, TAKE_PTR(session), &path);
    if (r < 0)
        return bus_error_set(error, r, NULL);
    return sd_bus_reply_method_return(m, "o", path);
}

static int get_version(sd_bus *bus, const char *path, const char *interface, const char *property,
                       sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    return sd_bus_message_append(reply, "s", LLMD_VERSION);
}

static int get_state(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct connection *c = userdata;

    return sd_bus_message_append(reply, "s",
                                 session_set_is_stopping(c->sessions) ? "stopping" : "ready");
}

static int get_default_model(sd_bus *bus, const char *path, const char *interface,
                             const char *property, sd_bus_message *reply, void *userdata,
                             sd_bus_error *error)
{
    struct connection *c = userdata;

    return sd_bus_message_append(reply, "s", session_set_model_name(c->sessions));
}

static int get_backends(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct connection *c = userdata;

    return sd_bus_message_append(reply, "as", 1,
                                 engine_thread_description(session_set_engine(c->sessions)));
}

static int get_sessions(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct connection *c = userdata;

    return sd_bus_message_append(reply, "u", session_set_n_sessions(c->sessions));
}

static int get_kv_bytes(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct connection *c = userdata;
    uint64_t used, most;

    engine_thread_kv_bytes(session_set_engine(c->sessions), &used, &most);
    return sd_bus_message_append(reply, "t", strcmp(property, "KvBytesUsed") == 0 ? used : most);
}

static const sd_bus_vtable manager_vtable[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_METHOD_WITH_ARGS("CreateSession", SD_BUS_ARGS("a{sv}", options),
                            SD_BUS_RESULT("o", session), create_session,
                            SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_PROPERTY("Version", "s", get_version, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_PROPERTY("State", "s", get_state, 0, 0),
    SD_BUS_PROPERTY("DefaultModel", "s", get_default_model, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_PROPERTY("Backends", "as", get_backends, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_PROPERTY("Sessions", "u", get_sessions, 0, 0),
    SD_BUS_PROPERTY("KvBytesUsed", "t", get_kv_bytes, 0, 0),
    SD_BUS_PROPERTY("KvBytesMax", "t", get_kv_bytes, 0, SD_BUS_VTABLE_PROPERTY_CONST),
    SD_BUS_VTABLE_END,
};

int manager_bus_add(struct connection *c)
{
    return sd_bus_add_object_vtable(c->bus, &c->manager_slot, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE,
                                    manager_vtable, c);
}
