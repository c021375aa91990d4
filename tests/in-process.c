/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tests/in-process.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/authority.h"
#include "daemon/client-session.h"
#include "daemon/client.h"
#include "daemon/config.h"
#include "daemon/connection.h"
#include "daemon/engine-thread.h"
#include "daemon/model-store.h"
#include "daemon/users.h"
#include "engine/model.h"

#define WAIT_USEC 1000

static void must(int r, const char *what)
{
    if (r < 0) {
        fprintf(stderr, "%s: %s\n", what, strerror(-r));
        exit(EXIT_FAILURE);
    }
}

static void nothing(void *userdata)
{
    (void)userdata;
}

static void no_model_changed(void *userdata, const char *name, enum store_change what)
{
    (void)what;
    (void)userdata;
    (void)name;
}

void in_process_start(struct in_process *p, const char *path, uint32_t context)
{
    struct service *s = &p->service;
    const struct engine_options options = {.n_threads = 1};
    struct error err = {0};
    struct model_store_options store = {.changed = no_model_changed, .userdata = p};

    *p = (struct in_process){.n_connections = 0};
    signal(SIGPIPE, SIG_IGN);
    snprintf(p->state_dir, sizeof(p->state_dir), "/tmp/llmd-in-process-XXXXXX");
    if (!mkdtemp(p->state_dir))
        must(-errno, p->state_dir);
    must(sd_event_new(&s->event), "event loop");
    if (model_open(&s->model, path, &err) < 0 ||
        engine_thread_new(&s->engine, s->model, &options, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        exit(EXIT_FAILURE);
    }
    s->scope = SCOPE_PRIVATE;
    s->state = SERVICE_READY;
    s->load_progress = 1;
    store.event = s->event;
    store.state_dir = p->state_dir;
    s->model_name = strdup("model");
    must(s->model_name ? 0 : -ENOMEM, "a name");
    must(model_store_new(&s->models, &store, &err), "models");
    must(session_set_new(&s->sessions, s->event, nothing, p), "sessions");
    must(session_set_set_engine(s->sessions, s->engine, context), "engine");
    must(users_new(&s->users, &user_limits_default), "users");
    must(authority_new(&s->authority, /* ask_polkit= */ false), "authority");
    must(clients_new(&s->clients, s), "clients");
}

void in_process_stop(struct in_process *p)
{
    struct service *s = &p->service;

    in_process_settle(p);
    clients_free(s->clients);
    authority_free(s->authority);
    session_set_free(s->sessions);
    users_free(s->users);
    engine_thread_free(s->engine);
    model_free(s->model);
    model_store_free(s->models);
    sd_event_unref(s->event);
    free(s->model_name);
    rmdir(p->state_dir);
}

static void on_gone(struct connection *c, void *userdata)
{
    struct in_process *p = userdata;

    p->n_connections--;
    connection_free(c);
}

int in_process_connect(struct in_process *p, uid_t uid)
{
    struct client_identity who;
    struct connection *c;
    int ends[2], r;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) < 0)
        return -errno;
    r = client_identity_of_socket(&who, ends[0]);
    if (r < 0) {
        close(ends[0]);
        close(ends[1]);
        return r;
    }
    who.uid = uid;
    r = connection_new(&c, &p->service, ends[0], &who, on_gone, p);
    if (r < 0) {
        close(ends[1]);
        return r;
    }
    p->n_connections++;
    return ends[1];
}

void in_process_run(struct in_process *p)
{
    while (sd_event_run(p->service.event, 0) > 0)
        ;
}

int in_process_bus(struct in_process *p, uid_t uid, sd_bus **ret)
{
    sd_bus *bus = NULL;
    int fd, r;

    fd = in_process_connect(p, uid);
    if (fd < 0)
        return fd;
    r = sd_bus_new(&bus);
    if (r >= 0)
        r = sd_bus_set_fd(bus, fd, fd);
    if (r < 0) {
        close(fd);
        sd_bus_unref(bus);
        return r;
    }
    if ((r = sd_bus_negotiate_fds(bus, 1)) < 0 || (r = sd_bus_start(bus)) < 0)
        goto fail;
    while ((r = sd_bus_is_ready(bus)) == 0) {
        in_process_run(p);
        r = sd_bus_process(bus, NULL);
        if (r < 0)
            goto fail;
    }
    if (r < 0)
        goto fail;
    *ret = bus;
    return 0;
fail:
    sd_bus_close_unref(bus);
    return r;
}

static int on_reply(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    (void)error;
    *(sd_bus_message **)userdata = sd_bus_message_ref(m);
    return 0;
}

int in_process_call(struct in_process *p, sd_bus *bus, sd_bus_message *m, sd_bus_message **ret)
{
    sd_bus_message *reply = NULL;
    sd_bus_slot *slot;
    int r;

    r = sd_bus_call_async(bus, &slot, m, on_reply, &reply, UINT64_MAX);
    if (r < 0)
        return r;
    while (!reply) {
        r = sd_bus_process(bus, NULL);
        if (r < 0)
            break;
        if (r == 0 && !reply)
            sd_event_run(p->service.event, WAIT_USEC);
    }
    sd_bus_slot_unref(slot);
    if (!reply)
        return -ECONNRESET;
    *ret = reply;
    return 0;
}

void in_process_settle(struct in_process *p)
{
    struct session_set *sessions = p->service.sessions;

    while (p->n_connections > 0)
        sd_event_run(p->service.event, WAIT_USEC);
    session_set_close_all(sessions);
    while (session_set_n_sessions(sessions) > 0 || !session_set_is_quiet(sessions))
        sd_event_run(p->service.event, WAIT_USEC);
}
