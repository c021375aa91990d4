/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* org.llmd.Llm1.Session: the vtable, and how a path is found. */

#pragma GCC diagnostic ignored "-Wunused-parameter" /* the signatures are sd-bus's */

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/bus-objects.h"
#include "daemon/options.h"
#include "engine/model.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

static int generate(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;
    struct session_set *sessions = f->service->sessions;
    const struct model *model = engine_thread_model(session_set_engine(sessions));
    CLEANUP(job_request_done) struct job_request request = {0};
    CLEANUP(closep) int fd = -EBADF;
    struct error err = {0};
    uint64_t id;
    int r;

    r = options_read_generate(m, model_generation(model), &request, &err);
    if (r >= 0)
        r = client_session_generate(f->session, &request, &fd, &id, &err);
    if (r < 0)
        return bus_fail(f->service, error, r, &err);
    return sd_bus_reply_method_return(m, "ht", fd, id); /* sends a duplicate */
}

static int cancel(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    client_session_cancel(f->session);
    return sd_bus_reply_method_return(m, NULL);
}

static int close_session(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    client_session_free(f->session);
    return sd_bus_reply_method_return(m, NULL);
}

static int get_model(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;

    return sd_bus_message_append(reply, "s", session_set_model_name(f->service->sessions));
}

static int get_state(sd_bus *bus, const char *path, const char *interface, const char *property,
                     sd_bus_message *reply, void *userdata, sd_bus_error *error)
{
    struct found_session *f = userdata;
    struct client_session_info info;

    client_session_get_info(f->session, &info);
    return sd_bus_message_append(reply, "s", info.state);
}

static int get_context_used(sd_bus *bus, const char *path, const char *interface,
                            const char *property, sd_bus_message *reply, void *userdata,
                            sd_bus_error *error)
{
    struct found_session *f = userdata;
    struct client_session_info info;

    client_session_get_info(f->session, &info);
    return sd_bus_message_append(reply, "u", info.context_used);
}

static int get_context_max(sd_bus *bus, const char *path, const char *interface,
                           const char *property, sd_bus_message *reply, void *userdata,
                           sd_bus_error *error)
{
    struct found_session *f = userdata;

    return sd_bus_message_append(reply, "u", client_session_context_max(f->session));
}

const sd_bus_vtable session_vtable[] = {
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

/* "17", as a path has it: no sign, no zero in front. */
static bool parse_id(const char *text, uint64_t *ret)
{
    uint64_t v = 0;

    if (text[0] < '1' || text[0] > '9')
        return false;
    for (; *text >= '0' && *text <= '9'; text++)
        if (ckd_mul(&v, v, 10) || ckd_add(&v, v, (uint64_t)(*text - '0')))
            return false;
    *ret = v;
    return *text == 0;
}

int session_find(sd_bus *bus, const char *path, const char *interface, void *userdata,
                 void **ret_found, sd_bus_error *ret_error)
{
    struct served *v = userdata;
    const char *name = path + strlen(LLM_SESSION_PATH);
    struct client_session *session = NULL;
    struct error err = {0};
    struct client *client;
    uint64_t id;
    int r;

    if (*name != '/')
        return 0; /* the folder of them */
    r = served_client(v, sd_bus_get_current_message(bus), &client, ret_error);
    if (r < 0)
        return r;
    if (parse_id(name + 1, &id))
        session = session_set_find(v->service->sessions, id);
    if (!session || client_session_user(session) != client->user) {
        error_set(&err, ESRCH, "%s: there is no such session", path);
        return bus_error_set(ret_error, ESRCH, &err);
    }
    v->found = (struct found_session){v->service, client, session};
    *ret_found = &v->found;
    return 1;
}
