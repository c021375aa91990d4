/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* org.llmd.Llm1.Manager: the vtable and nothing else. */

#pragma GCC diagnostic ignored "-Wunused-parameter" /* the signatures are sd-bus's */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "daemon/bus-objects.h"
#include "daemon/options.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

static int make_session(struct client *c, sd_bus_message *m, sd_bus_error *error)
{
    CLEANUP(session_options_done) struct session_options options = {0};
    struct session_set *sessions = c->service->sessions;
    struct client_session *session;
    struct error err = {0};
    int r;

    r = options_read_session(m, &options, &err);
    if (r >= 0 && options.model && session_set_engine(sessions) &&
        !session_set_serves(sessions, options.model))
        r = error_set(&err, ENOENT, "model: '%.200s' is not served here, '%.200s' is",
                      options.model, session_set_model_name(sessions));
    if (r >= 0)
        r = client_session_new(&session, sessions, c->user, &c->sessions,
                               &(struct client_session_options){.context = options.context}, &err);
    if (r < 0)
        return bus_fail(c->service, error, r, &err);
    return sd_bus_reply_method_return(m, "o", client_session_path(session));
}

static int create_session(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct client *c;
    int r;

    r = served_client(userdata, m, &c, error);
    return r < 0 ? r : client_authorise(c, ACTION_USE, m, make_session, error);
}

static int get_version(sd_bus *bus, const char *path, const char *interface, const char *property,
                       sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    return sd_bus_message_append(reply, "s", LLMD_VERSION);
}

static int get_state(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(
        reply, "s", session_set_is_stopping(v->service->sessions) ? "stopping" : "ready");
}

static int get_default_model(sd_bus *bus, const char *path, const char *interface,
                             const char *property, sd_bus_message *reply, void *userdata,
                             sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(reply, "s", session_set_model_name(v->service->sessions));
}

static int get_backends(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(
        reply, "as", 1, engine_thread_description(session_set_engine(v->service->sessions)));
}

static int get_sessions(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;

    return sd_bus_message_append(reply, "u", session_set_n_sessions(v->service->sessions));
}

static int get_kv_bytes(sd_bus *bus, const char *path, const char *interface, const char *property,
                        sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct served *v = userdata;
    uint64_t used, most;

    engine_thread_kv_bytes(session_set_engine(v->service->sessions), &used, &most);
    return sd_bus_message_append(reply, "t", strcmp(property, "KvBytesUsed") == 0 ? used : most);
}

const sd_bus_vtable manager_vtable[] = {
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
