/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/connection.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "daemon/bus.h"
#include "daemon/client.h"
#include "daemon/log.h"
#include "daemon/service.h"

/*
 * Messages that may wait for a peer, beyond what the kernel buffers. sd-bus itself would keep some
 * 400 000 of them.
 */
#define QUEUE_MAX 256u

#define LOG_USEC 10000000u /* so often at most the log tells of those given up */

/* Messages that may have come together with the end of the authentication. */
#define EARLY_MAX 64

struct connection {
    struct service *service; /* borrowed */
    sd_bus *bus;
    struct client *client;
    sd_bus_slot *disconnected_slot, *filter_slot;
    sd_event_source *post_source, *doom_source;
    bool doomed; /* is to be given up */
    connection_gone gone;
    void *userdata;
};

static int on_disconnected(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct connection *c = userdata;

    (void)m;
    (void)error;
    c->gone(c, c->userdata);
    return 0;
}

/* They can come back at once and do it again. */
static void say_given_up(const struct connection *c)
{
    static uint64_t last_usec;
    static unsigned untold;
    uint64_t now;

    if (sd_event_now(c->service->event, CLOCK_MONOTONIC, &now) < 0)
        return;
    if (last_usec > 0 && now - last_usec < LOG_USEC) {
        untold++;
        return;
    }
    log_with(LOG_WARNING, &(struct log_fields){.has_uid = true, .uid = c->client->who.uid},
             "gave up a connection of user %u, process %d: it does not read its replies (%u others "
             "since this was last said)",
             (unsigned)c->client->who.uid, (int)c->client->who.pid, untold);
    last_usec = now;
    untold = 0;
}

static int on_doom(sd_event_source *source, void *userdata)
{
    struct connection *c = userdata;

    (void)source;
    say_given_up(c);
    c->gone(c, c->userdata);
    return 0;
}

void connection_check_queue(struct connection *c)
{
    uint64_t n = 0;

    if (c->doomed || sd_bus_get_n_queued_write(c->bus, &n) < 0 || n <= QUEUE_MAX)
        return;
    c->doomed = true;
    sd_event_source_set_enabled(c->doom_source, SD_EVENT_ONESHOT);
}

/* Before each message is looked at: what earlier ones were answered with may still wait. */
static int on_message(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct connection *c = userdata;

    (void)m;
    (void)error;
    connection_check_queue(c);
    return c->doomed; /* 1: nobody else gets it */
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
        for (int i = 0; i < EARLY_MAX && sd_bus_process(bus, NULL) > 0; i++)
            ;
    }
    sd_bus_unref(bus);
    return 0;
}

static int start(struct connection *c, int *fd, struct client_identity *who)
{
    struct service *s = c->service;
    sd_id128_t id;
    int r;

    if ((r = sd_bus_new(&c->bus)) < 0 || (r = sd_bus_set_fd(c->bus, *fd, *fd)) < 0)
        return r;
    *fd = -EBADF;
    if ((r = client_new(&c->client, s->clients, c->bus, c, who)) < 0 ||
        (r = sd_id128_randomize(&id)) < 0 || (r = sd_bus_set_server(c->bus, 1, id)) < 0 ||
        (r = sd_bus_negotiate_fds(c->bus, 1)) < 0 ||
        (r = sd_bus_add_filter(c->bus, &c->filter_slot, on_message, c)) < 0 ||
        (r = bus_serve(s, c->bus, c->client)) < 0 ||
        (r = sd_bus_match_signal(c->bus, &c->disconnected_slot, "org.freedesktop.DBus.Local",
                                 "/org/freedesktop/DBus/Local", "org.freedesktop.DBus.Local",
                                 "Disconnected", on_disconnected, c)) < 0 ||
        (r = sd_bus_start(c->bus)) < 0 ||
        (r = sd_event_add_defer(s->event, &c->doom_source, on_doom, c)) < 0 ||
        (r = sd_event_source_set_enabled(c->doom_source, SD_EVENT_OFF)) < 0 ||
        (r = sd_event_add_post(s->event, &c->post_source, on_post, c)) < 0)
        return r;
    return sd_bus_attach_event(c->bus, s->event, SD_EVENT_PRIORITY_NORMAL);
}

int connection_new(struct connection **ret, struct service *s, int fd, struct client_identity *who,
                   connection_gone gone, void *userdata)
{
    struct connection *c = calloc(1, sizeof(*c));
    int r = -ENOMEM;

    if (c) {
        c->service = s;
        c->gone = gone;
        c->userdata = userdata;
        r = start(c, &fd, who);
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
    sd_event_source_disable_unref(c->post_source);
    sd_event_source_disable_unref(c->doom_source);
    if (c->bus)
        bus_leave(c->service, c->bus);
    client_free(c->client);
    sd_bus_slot_unref(c->disconnected_slot);
    sd_bus_slot_unref(c->filter_slot);
    if (c->bus) {
        sd_bus_detach_event(c->bus);
        /* The service manager may have it too, and then close() does not tell the peer. */
        (void)shutdown(sd_bus_get_fd(c->bus), SHUT_RDWR);
        sd_bus_close_unref(c->bus);
    }
    free(c);
    return NULL;
}

bool connection_is_ready(const struct connection *c)
{
    return sd_bus_is_ready(c->bus) > 0;
}
