/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/client.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "daemon/connection.h"
#include "daemon/former-owner.h"
#include "daemon/log.h"
#include "daemon/service.h"
#include "daemon/users.h"
#include "ipc/bus-error.h"

struct clients {
    struct service *service; /* borrowed */
    struct client *list;
    uint32_t n;
    struct served *served;
    uint64_t start_usec; /* CLOCK_MONOTONIC */
    /* Their numbers in the fd store, beside those of the process before, begin anywhere. */
    uint32_t connections[2]; /* where, how many */
};

/* ---- all of them ---- */

int clients_new(struct clients **ret, struct service *s)
{
    struct clients *c = calloc(1, sizeof(*c));

    if (!c)
        return -ENOMEM;
    c->service = s;
    c->start_usec = now_usec();
    *ret = c;
    return 0;
}

struct clients *clients_free(struct clients *c)
{
    if (!c)
        return NULL;
    assert(!c->list && !c->served);
    free(c);
    return NULL;
}

uint32_t clients_n(const struct clients *c)
{
    return c->n;
}

uint64_t clients_uptime_usec(const struct clients *c)
{
    return now_usec() - c->start_usec;
}

struct client *clients_first(const struct clients *c)
{
    return c->list;
}

struct served **clients_served(struct clients *c)
{
    return &c->served;
}

void clients_drop_bus(struct clients *c, const sd_bus *bus)
{
    struct client *next;

    for (struct client *client = c->list; client; client = next) {
        next = client->next;
        if (client->bus != bus || !client->name)
            continue;
        former_owners_keep(c->service->former, client);
        client_free(client);
    }
}

/* ---- one ---- */

static int new_client(struct client **ret, struct clients *clients, sd_bus *bus, uid_t uid)
{
    struct client *c = calloc(1, sizeof(*c));

    if (!c || users_ref(clients->service->users, uid, &c->user) < 0) {
        free(c);
        return -ENOMEM;
    }
    c->clients = clients;
    c->service = clients->service;
    c->bus = bus;
    c->who = (struct client_identity){.uid = uid, .pidfd = -EBADF};
    c->next = clients->list;
    if (c->next)
        c->next->previous = c;
    clients->list = c;
    clients->n++;
    *ret = c;
    return 0;
}

static uint64_t next_connection(struct clients *c)
{
    while (c->connections[0] == 0)
        if (getrandom(&c->connections[0], sizeof(c->connections[0]), 0) < 0)
            c->connections[0] = (uint32_t)getpid();
    return (uint64_t)c->connections[0] << 32 | ++c->connections[1];
}

int client_new(struct client **ret, struct clients *clients, sd_bus *bus,
               struct connection *connection, struct client_identity *who)
{
    struct client *c;
    int r;

    r = new_client(&c, clients, bus, who->uid);
    if (r < 0)
        return r;
    if (c->user->n_connections >= c->user->limits.max_connections) {
        client_free(c);
        return -EDQUOT;
    }
    c->connection = connection;
    c->sessions.name =
        (struct owner_name){.kind = OWNER_CONNECTION, .connection = next_connection(clients)};
    c->sessions.fd = sd_bus_get_fd(bus);
    c->user->n_connections++;
    c->who = *who;
    *who = (struct client_identity){.pidfd = -EBADF};
    *ret = c;
    return 0;
}

struct client *client_free(struct client *c)
{
    struct clients *all;

    if (!c)
        return NULL;
    all = c->clients;
    c->subscription = SUBSCRIBED_NOT; /* nobody is there to be told of what follows */
    authority_forget(c->service->authority, &c->who);
    while (c->calls) {
        struct pending_call *p = c->calls;

        c->calls = p->next;
        p->previous = p->next = NULL;
        p->client = NULL;
    }
    session_owner_close_all(&c->sessions);

    *(c->previous ? &c->previous->next : &all->list) = c->next;
    if (c->next)
        c->next->previous = c->previous;
    all->n--;
    if (c->connection)
        c->user->n_connections--;
    sd_bus_track_unref(c->track);
    client_identity_done(&c->who);
    user_unref(c->user);
    free(c->name);
    free(c);
    return NULL;
}

/* Its name has left the bus; or the bus has left us, then all are said to have gone. */
static int on_gone(sd_bus_track *track, void *userdata)
{
    struct client *c = userdata;
    struct service *s = c->service;

    (void)track;
    if (sd_bus_is_open(c->bus) <= 0)
        former_owners_keep(s->former, c);
    client_free(c);
    service_something_went(s);
    return 0;
}

static int make_named(struct client **ret, struct clients *clients, sd_bus_message *m,
                      const char *name)
{
    CLEANUP(sd_bus_creds_unrefp) sd_bus_creds *creds = NULL;
    struct client *c;
    uid_t uid;
    int r;

    r = sd_bus_query_sender_creds(m, SD_BUS_CREDS_EUID | SD_BUS_CREDS_PID, &creds);
    if (r >= 0)
        r = sd_bus_creds_get_euid(creds, &uid);
    if (r < 0)
        return r;
    r = new_client(&c, clients, sd_bus_message_get_bus(m), uid);
    if (r < 0)
        return r;
    if (sd_bus_creds_get_pid(creds, &c->who.pid) < 0)
        c->who.pid = 0;
    c->name = strdup(name);
    c->who.bus_name = c->name;
    former_owner_name(c->bus, name, &c->sessions.name);
    r = c->name ? sd_bus_track_new(c->bus, &c->track, on_gone, c) : -ENOMEM;
    if (r >= 0)
        r = sd_bus_track_add_name(c->track, name);
    if (r < 0) {
        client_free(c);
        return r;
    }
    former_owners_return(c->service->former, c);
    *ret = c;
    return 0;
}

int clients_of_message(struct clients *clients, sd_bus_message *m, struct client *p2p,
                       struct client **ret)
{
    const char *sender;

    if (p2p) {
        *ret = p2p;
        return 0;
    }
    sender = m ? sd_bus_message_get_sender(m) : NULL;
    if (!sender)
        return -ENXIO;
    for (struct client *c = clients->list; c; c = c->next) {
        if (c->name && strcmp(c->name, sender) == 0 && c->bus == sd_bus_message_get_bus(m)) {
            *ret = c;
            return 0;
        }
    }
    return make_named(ret, clients, m, sender);
}

/* ---- calls that wait ---- */

int pending_call_new(struct pending_call **ret, struct client *c, sd_bus_message *m)
{
    struct pending_call *p = calloc(1, sizeof(*p));

    if (!p)
        return -ENOMEM;
    p->client = c;
    p->message = sd_bus_message_ref(m);
    p->next = c->calls;
    if (p->next)
        p->next->previous = p;
    c->calls = p;
    *ret = p;
    return 0;
}

struct pending_call *pending_call_free(struct pending_call *p)
{
    if (!p)
        return NULL;
    if (p->client) {
        *(p->previous ? &p->previous->next : &p->client->calls) = p->next;
        if (p->next)
            p->next->previous = p->previous;
    }
    sd_bus_message_unref(p->message);
    free(p);
    return NULL;
}

void pending_call_fail(struct pending_call *p, int r, const struct error *err)
{
    CLEANUP(sd_bus_error_free) sd_bus_error error = SD_BUS_ERROR_NULL;

    if (p->client) {
        bus_error_set(&error, r, err);
        sd_bus_reply_method_error(p->message, &error);
    }
    pending_call_free(p);
}

/* ---- who may ---- */

/* A dialogue may be open for minutes, and each call keeps its message with all its descriptors. */
#define QUESTIONS_OF_USER_MAX 128u

struct question {
    struct pending_call *call;
    struct user *user; /* charged while it waits */
    enum action action;
    client_method go;
    bool waits; /* the handler has returned */
    int answer; /* valid where it came before */
    bool answered;
};

static int refuse(const struct question *q, int answer, sd_bus_error *error)
{
    struct error err;

    error_set(&err, EACCES,
              answer == 2
                  ? "%s: is allowed after authentication only, and nobody could be asked for it"
                  : "%s: polkit does not allow it to this user; where there is no polkit, only "
                    "root may",
              action_name(q->action));
    return bus_error_set(error, EACCES, &err);
}

static int go_on(struct question *q, int answer, sd_bus_error *error)
{
    int r;

    if (answer != 1)
        return refuse(q, answer, error);
    r = sd_bus_message_rewind(q->call->message, true);
    return r < 0 ? r : q->go(q->call->client, q->call->message, error);
}

static void on_answer(void *userdata, int answer)
{
    CLEANUP(sd_bus_error_free) sd_bus_error error = SD_BUS_ERROR_NULL;
    struct question *q = userdata;
    int r;

    if (!q->waits) {
        q->answer = answer;
        q->answered = true;
        return;
    }
    if (answer != -ECANCELED && q->call->client) {
        r = go_on(q, answer, &error);
        if (sd_bus_error_is_set(&error))
            sd_bus_reply_method_error(q->call->message, &error);
        else if (r < 0)
            sd_bus_reply_method_errno(q->call->message, r, NULL);
    }
    q->user->n_questions--;
    user_unref(q->user);
    pending_call_free(q->call);
    free(q);
}

int client_authorise(struct client *c, enum action action, sd_bus_message *m, client_method go,
                     sd_bus_error *error)
{
    struct question *q;
    struct error err;
    int r;

    if (c->user->n_questions >= QUESTIONS_OF_USER_MAX) {
        error_set(&err, EDQUOT,
                  "calls: requested 1, available 0: %u of user %u wait to be allowed already",
                  QUESTIONS_OF_USER_MAX, (unsigned)c->user->uid);
        session_set_count_refused(c->service->sessions);
        return bus_error_set(error, EDQUOT, &err);
    }
    q = calloc(1, sizeof(*q));
    if (!q || pending_call_new(&q->call, c, m) < 0) {
        free(q);
        return bus_error_set(error, ENOMEM, NULL);
    }
    q->action = action;
    q->go = go;
    authority_check(c->service->authority, &c->who, action, m, on_answer, q);
    if (!q->answered) {
        q->waits = true;
        q->user = user_ref(c->user);
        q->user->n_questions++;
        return 1;
    }
    r = go_on(q, q->answer, error);
    pending_call_free(q->call);
    free(q);
    return r;
}
