/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/former-owner.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <systemd/sd-event.h>
#include <time.h>

#include "base/cleanup.h"
#include "daemon/client.h"
#include "daemon/fd-store.h"
#include "daemon/log.h"
#include "daemon/service.h"

#define GRACE_USEC UINT64_C(10000000)

struct former_owner {
    struct former_owners *all;
    struct session_owner sessions;
    int fd; /* of a connection; -EBADF: it has hung up, or was never found */
    bool gone;
    sd_event_source *hangup_source, *grace_timer;
    sd_bus_slot *match_slot, *question_slot; /* of a name */
    struct former_owner *previous, *next;    /* former_owners::list */
};

struct former_owners {
    struct service *service; /* borrowed */
    struct former_owner *list;
    sd_event_source *sweep_source; /* deferred: nobody's owner goes in the middle of its own end */
    bool begun;                    /* clients may come */
};

/* ---- one ---- */

static void owner_free(struct former_owner *o)
{
    struct former_owners *f = o->all;

    session_owner_close_all(&o->sessions);
    *(o->previous ? &o->previous->next : &f->list) = o->next;
    if (o->next)
        o->next->previous = o->previous;
    if (o->sessions.name.kind == OWNER_CONNECTION)
        fd_store_remove_id(f->service->store, "connection", o->sessions.name.connection);
    sd_event_source_disable_unref(o->hangup_source);
    sd_event_source_disable_unref(o->grace_timer);
    sd_bus_slot_unref(o->match_slot);
    sd_bus_slot_unref(o->question_slot);
    closep(&o->fd);
    free(o);
}

static struct former_owner *owner_new(struct former_owners *f, const struct owner_name *name)
{
    struct former_owner *o = calloc(1, sizeof(*o));

    if (!o)
        return NULL;
    o->all = f;
    o->fd = o->sessions.fd = -EBADF;
    o->sessions.name = *name;
    o->next = f->list;
    if (o->next)
        o->next->previous = o;
    f->list = o;
    return o;
}

static bool same_name(const struct owner_name *a, const struct owner_name *b)
{
    return a->kind == b->kind && (a->kind == OWNER_CONNECTION ? a->connection == b->connection
                                                              : strcmp(a->name, b->name) == 0);
}

static struct former_owner *find(const struct former_owners *f, const struct owner_name *name)
{
    struct former_owner *o = f->list;

    while (o && !same_name(&o->sessions.name, name))
        o = o->next;
    return o;
}

static void sweep_later(struct former_owners *f)
{
    sd_event_source_set_enabled(f->sweep_source, SD_EVENT_ONESHOT);
}

static int on_grace_over(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct former_owner *o = userdata;
    struct service *s = o->all->service;

    (void)source;
    (void)usec;
    session_owner_close_all(&o->sessions);
    sweep_later(o->all);
    service_something_went(s);
    return 0;
}

/* Until clients are let in, it has no chance to be replaced: the grace begins then. */
static void begin_grace(struct former_owner *o)
{
    int r;

    if (!o->gone || !o->all->begun || o->grace_timer)
        return;
    r = sd_event_add_time_relative(o->all->service->event, &o->grace_timer, CLOCK_MONOTONIC,
                                   GRACE_USEC, 0, on_grace_over, o);
    if (r < 0)
        log_warning("sessions of a client that has gone stay open: %s", strerror(-r));
}

static void owner_went(struct former_owner *o)
{
    o->gone = true;
    begin_grace(o);
}

/* ---- connections ---- */

static void hang_up(struct former_owner *o)
{
    o->hangup_source = sd_event_source_disable_unref(o->hangup_source);
    fd_store_remove_id(o->all->service->store, "connection", o->sessions.name.connection);
    closep(&o->fd);
    o->fd = o->sessions.fd = -EBADF;
    o->sessions.is_kept = true; /* not once more */
    owner_went(o);
}

/* Asked for without events, epoll tells of a hangup alone. */
static int on_hangup(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    (void)source;
    (void)fd;
    (void)revents;
    hang_up(userdata);
    return 0;
}

/* Takes fd. What its client sent to the process before, and that did not read, nobody will. */
static int add_connection(struct former_owners *f, uint64_t id, int fd)
{
    const struct owner_name name = {.kind = OWNER_CONNECTION, .connection = id};
    struct pollfd p = {.fd = fd};
    struct former_owner *o;

    o = find(f, &name) ? NULL : owner_new(f, &name);
    if (!o) {
        close(fd);
        return find(f, &name) ? 0 : -ENOMEM;
    }
    o->fd = o->sessions.fd = fd;
    o->sessions.is_kept = true;
    /* It fails where the peer has gone, and on what is no connection: who would never come back. */
    if (shutdown(fd, SHUT_WR) < 0 ||
        (poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLERR | POLLNVAL)))) {
        hang_up(o);
        return 0;
    }
    return sd_event_add_io(f->service->event, &o->hangup_source, fd, 0, on_hangup, o);
}

/* ---- names on the bus ---- */

void former_owner_name(sd_bus *bus, const char *unique, struct owner_name *ret)
{
    sd_id128_t id;
    int n;

    *ret = (struct owner_name){.kind = OWNER_NAME};
    if (sd_bus_get_bus_id(bus, &id) < 0)
        return;
    n = snprintf(ret->name, sizeof(ret->name), SD_ID128_FORMAT_STR " %s", SD_ID128_FORMAT_VAL(id),
                 unique);
    if (n < 0 || (size_t)n >= sizeof(ret->name))
        ret->name[0] = 0;
}

static int on_owner_changed(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    const char *name, *before, *after;

    (void)error;
    if (sd_bus_message_read(m, "sss", &name, &before, &after) >= 0 && !after[0])
        owner_went(userdata);
    return 0;
}

static int on_presence(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct former_owner *o = userdata;
    int present = 0;

    (void)error;
    o->question_slot = sd_bus_slot_unref(o->question_slot);
    if (sd_bus_message_is_method_error(m, NULL) || sd_bus_message_read(m, "b", &present) < 0)
        return 0; /* it is not known: they stay until the bus is asked again */
    if (!present)
        owner_went(o);
    return 0;
}

/* First told when it goes, then asked whether it has gone: so nothing is missed between. */
static int ask_for(struct former_owner *o, sd_bus *bus, const char *unique)
{
    char rule[400];
    int r;

    snprintf(rule, sizeof(rule),
             "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
             "member='NameOwnerChanged',arg0='%s'",
             unique);
    o->match_slot = sd_bus_slot_unref(o->match_slot);
    o->question_slot = sd_bus_slot_unref(o->question_slot);
    r = sd_bus_add_match_async(bus, &o->match_slot, rule, on_owner_changed, NULL, o);
    if (r < 0)
        return r;
    return sd_bus_call_method_async(bus, &o->question_slot, "org.freedesktop.DBus",
                                    "/org/freedesktop/DBus", "org.freedesktop.DBus", "NameHasOwner",
                                    on_presence, o, "s", unique);
}

void former_owners_bus_is_there(struct former_owners *f, sd_bus *bus)
{
    struct owner_name prefix;
    size_t n;

    former_owner_name(bus, "", &prefix);
    n = strlen(prefix.name);
    for (struct former_owner *o = f ? f->list : NULL; o; o = o->next) {
        const char *name = o->sessions.name.name;

        if (o->sessions.name.kind != OWNER_NAME || o->gone)
            continue;
        if (n == 0 || strncmp(name, prefix.name, n) != 0)
            owner_went(o); /* of a bus that is no more */
        else if (ask_for(o, bus, name + n) < 0)
            log_warning("out of memory: sessions of a client that has gone may stay open");
    }
}

/* The slots are the old bus's. */
static void forget_bus(struct former_owner *o)
{
    o->match_slot = sd_bus_slot_unref(o->match_slot);
    o->question_slot = sd_bus_slot_unref(o->question_slot);
}

static void move_sessions(struct session_owner *from, struct session_owner *to)
{
    while (from->first)
        client_session_set_owner(from->first, to);
}

void former_owners_keep(struct former_owners *f, struct client *c)
{
    struct former_owner *o;

    if (!f)
        return;
    for (o = f->list; o; o = o->next)
        forget_bus(o);
    if (!c->sessions.first || !c->sessions.name.name[0])
        return;
    o = find(f, &c->sessions.name);
    if (!o)
        o = owner_new(f, &c->sessions.name);
    if (o)
        move_sessions(&c->sessions, &o->sessions);
}

void former_owners_return(struct former_owners *f, struct client *c)
{
    struct former_owner *o = f ? find(f, &c->sessions.name) : NULL;

    if (!o)
        return;
    move_sessions(&o->sessions, &c->sessions);
    sweep_later(f);
}

/* ---- all of them ---- */

static int on_sweep(sd_event_source *source, void *userdata)
{
    struct former_owners *f = userdata;
    struct former_owner *next;

    (void)source;
    for (struct former_owner *o = f->list; o; o = next) {
        next = o->next;
        if (!o->sessions.first)
            owner_free(o);
    }
    return 0;
}

int former_owners_new(struct former_owners **ret, struct service *s)
{
    struct former_owners *f = calloc(1, sizeof(*f));
    uint64_t id;
    int fd, r;

    if (!f)
        return -ENOMEM;
    f->service = s;
    r = sd_event_add_defer(s->event, &f->sweep_source, on_sweep, f);
    if (r >= 0)
        r = sd_event_source_set_enabled(f->sweep_source, SD_EVENT_OFF);
    while (r >= 0 && fd_store_next_id(s->store, "connection", &id, &fd) > 0)
        r = add_connection(f, id, fd);
    if (r < 0) {
        former_owners_free(f);
        return r;
    }
    *ret = f;
    return 0;
}

struct former_owners *former_owners_free(struct former_owners *f)
{
    if (!f)
        return NULL;
    while (f->list)
        owner_free(f->list);
    sd_event_source_disable_unref(f->sweep_source);
    free(f);
    return NULL;
}

void former_owners_begin(struct former_owners *f)
{
    struct client_session *next;

    for (struct client_session *s = session_set_first(f->service->sessions); s; s = next) {
        const struct owner_name *name = client_session_former_owner(s);
        struct former_owner *o;

        next = client_session_next(s);
        if (!name)
            continue;
        o = find(f, name);
        if (!o) {
            o = owner_new(f, name);
            if (!o) {
                log_error("out of memory: sessions of a client that may have gone stay open");
                return;
            }
            o->gone = name->kind == OWNER_CONNECTION; /* the service manager has seen it go */
            o->sessions.is_kept = true;
        }
        client_session_set_owner(s, &o->sessions);
    }
    f->begun = true;
    for (struct former_owner *o = f->list; o; o = o->next)
        begin_grace(o);
    sweep_later(f);
}

int former_owners_may_adopt(const struct former_owners *f, const struct session_owner *owner)
{
    for (struct former_owner *o = f ? f->list : NULL; o; o = o->next)
        if (&o->sessions == owner)
            return o->sessions.name.kind == OWNER_CONNECTION || o->gone ? 0 : -EBUSY;
    return -ENOENT;
}

void former_owners_something_went(struct former_owners *f)
{
    if (f && f->begun && f->list) /* before that, sessions have yet to find their owners */
        sweep_later(f);
}
