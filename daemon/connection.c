/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/connection.h"

#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"

static int on_disconnected(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct connection *c = userdata;

    (void)m;
    (void)error;
    c->gone(c, c->userdata);
    return 0;
}

/*
 * libdbus sends its first call together with the end of the authentication. sd-bus then has read
 * it already and would look at it only when more bytes come; so it is asked once to look.
 */
static int on_post(sd_event_source *source, void *userdata)
{
    struct connection *c = userdata;
    sd_bus *bus = sd_bus_ref(c->bus); /* c may be gone after a call */

    if (sd_bus_is_ready(bus) > 0) {
        sd_event_source_set_enabled(source, SD_EVENT_OFF);
        while (sd_bus_process(bus, NULL) > 0)
            ;
    }
    sd_bus_unref(bus);
    return 0;
}

static int start(struct connection *c, sd_event *event, int *fd)
{
    sd_id128_t id;
    int r;

    if ((r = sd_bus_new(&c->bus)) < 0 || (r = sd_bus_set_fd(c->bus, *fd, *fd)) < 0)
        return r;
    *fd = -EBADF;
    if ((r = sd_id128_randomize(&id)) < 0 || (r = sd_bus_set_server(c->bus, 1, id)) < 0 ||
        (r = sd_bus_negotiate_fds(c->bus, 1)) < 0 || (r = manager_bus_add(c)) < 0 ||
        (r = sd_bus_match_signal(c->bus, &c->disconnected_slot, "org.freedesktop.DBus.Local",
                                 "/org/freedesktop/DBus/Local", "org.freedesktop.DBus.Local",
                                 "Disconnected", on_disconnected, c)) < 0 ||
        (r = sd_bus_start(c->bus)) < 0 ||
        (r = sd_event_add_post(event, &c->post_source, on_post, c)) < 0)
        return r;
    return sd_bus_attach_event(c->bus, event, SD_EVENT_PRIORITY_NORMAL);
}

int connection_new(struct connection **ret, struct service *s, int fd, struct client_identity *who,
                   connection_gone gone, void *userdata)
{
    struct connection *c = calloc(1, sizeof(*c));
    int r = -ENOMEM;

    if (c) {
        c->who = *who;
        *who = (struct client_identity){.pidfd = -EBADF};
        c->sessions = s->sessions;
        c->gone = gone;
        c->userdata = userdata;
        r = start(c, s->event, &fd);
    }
    closep(&fd);
    client_identity_done(who);
    if (r < 0) {
        connection_free(c);
        return r;
    }
    *ret = c;
    return 0;
}

struct connection *connection_free(struct connection *c)
{
    if (!c)
        return NULL;
    while (c->objects)
        session_bus_remove(c->objects);
    sd_event_source_disable_unref(c->post_source);
    sd_bus_slot_unref(c->manager_slot);
    sd_bus_slot_unref(c->disconnected_slot);
    if (c->bus) {
        sd_bus_detach_event(c->bus);
        sd_bus_close_unref(c->bus);
    }
    client_identity_done(&c->who);
    free(c);
    return NULL;
}
