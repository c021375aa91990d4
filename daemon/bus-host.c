/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A connection goes through: opened (authentication goes on in the background), objects added, name
 * asked for, name ours. Whatever fails or ends on the way leads to drop(), which is never called
 * from below sd_bus_process() of that same connection: a deferred event does it. Then a timer tries
 * again, after a pause that doubles.
 */

#include "daemon/bus-host.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-bus.h>
#include <systemd/sd-event.h>
#include <time.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/authority.h"
#include "daemon/bus.h"
#include "daemon/client.h"
#include "daemon/former-owner.h"
#include "daemon/log.h"
#include "daemon/service.h"
#include "ipc/names.h"

#define PAUSE_LEAST_USEC UINT64_C(250000)
#define PAUSE_MOST_USEC UINT64_C(8000000)

struct bus_host {
    struct service *service; /* borrowed */
    sd_bus *bus;             /* NULL: none */
    sd_bus_slot *disconnected_slot, *name_slot;
    sd_event_source *retry_timer, *drop_source;
    uint64_t pause_usec;
    bool has_name;
    bool said; /* that there is none, since there was one */
    bool told_restarted;
};

static const char *bus_title(const struct bus_host *h)
{
    return h->service->scope == SCOPE_SYSTEM ? "system bus" : "session bus";
}

static void say_once(struct bus_host *h, const char *what, const char *why)
{
    if (!h->said)
        log_with(LOG_WARNING, &(struct log_fields){.message_id = LOG_ID_BUS_LOST},
                 "%s: %s%s%s; serving on the socket only, trying again", bus_title(h), what,
                 why ? ": " : "", why ? why : "");
    h->said = true;
}

static void drop(struct bus_host *h)
{
    h->has_name = false;
    if (!h->bus)
        return;
    if (h->service->scope == SCOPE_SYSTEM)
        authority_set_bus(h->service->authority, NULL);
    bus_leave(h->service, h->bus);
    h->disconnected_slot = sd_bus_slot_unref(h->disconnected_slot);
    h->name_slot = sd_bus_slot_unref(h->name_slot);
    sd_bus_detach_event(h->bus);
    h->bus = sd_bus_close_unref(h->bus);
}

static void try_later(struct bus_host *h)
{
    sd_event_source_set_time_relative(h->retry_timer, h->pause_usec);
    sd_event_source_set_enabled(h->retry_timer, SD_EVENT_ONESHOT);
    h->pause_usec = MIN(h->pause_usec * 2, PAUSE_MOST_USEC);
}

static int on_drop(sd_event_source *source, void *userdata)
{
    struct bus_host *h = userdata;

    (void)source;
    drop(h);
    try_later(h);
    service_something_went(h->service);
    return 0;
}

static int on_disconnected(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct bus_host *h = userdata;

    (void)m;
    (void)error;
    say_once(h, h->has_name ? "the connection is lost" : "cannot connect", NULL);
    sd_event_source_set_enabled(h->drop_source, SD_EVENT_ONESHOT);
    return 0;
}

static int on_name(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct bus_host *h = userdata;
    const sd_bus_error *e = sd_bus_message_get_error(m);
    uint32_t answer = 0;

    (void)error;
    if (e && sd_bus_error_has_name(e, "org.freedesktop.DBus.Error.AccessDenied")) {
        say_once(h, "its policy does not let this user own " LLM_BUS_NAME, e->message);
    } else if (e) {
        say_once(h, "does not give out " LLM_BUS_NAME, e->message);
    } else if (sd_bus_message_read(m, "u", &answer) < 0 || (answer != 1 && answer != 4)) {
        say_once(h, LLM_BUS_NAME " is another process's", NULL);
    } else {
        h->has_name = true;
        h->said = false;
        h->pause_usec = PAUSE_LEAST_USEC;
        log_info("serving on the %s as " LLM_BUS_NAME, bus_title(h));
        if (h->service->recovered.took_back && !h->told_restarted)
            bus_tell_restarted(h->bus);
        h->told_restarted = true;
        former_owners_bus_is_there(h->service->former, h->bus);
        return 0;
    }
    sd_event_source_set_enabled(h->drop_source, SD_EVENT_ONESHOT);
    return 0;
}

static int connect_bus(struct bus_host *h)
{
    struct service *s = h->service;
    int r;

    r = s->scope == SCOPE_SYSTEM ? sd_bus_open_system(&h->bus) : sd_bus_open_user(&h->bus);
    if (r < 0)
        return r;
    /* Signals to names that nobody has and such: losing the bus is handled, it does not end us. */
    if ((r = sd_bus_set_exit_on_disconnect(h->bus, 0)) < 0 ||
        (r = sd_bus_attach_event(h->bus, s->event, SD_EVENT_PRIORITY_NORMAL)) < 0 ||
        (r = sd_bus_match_signal(h->bus, &h->disconnected_slot, "org.freedesktop.DBus.Local",
                                 "/org/freedesktop/DBus/Local", "org.freedesktop.DBus.Local",
                                 "Disconnected", on_disconnected, h)) < 0 ||
        (r = bus_serve(s, h->bus, NULL)) < 0)
        return r;
    if (s->scope == SCOPE_SYSTEM) {
        r = authority_set_bus(s->authority, h->bus);
        if (r < 0)
            return r;
    }
    return sd_bus_request_name_async(h->bus, &h->name_slot, LLM_BUS_NAME, 0, on_name, h);
}

static void try_now(struct bus_host *h)
{
    int r = connect_bus(h);

    if (r >= 0)
        return;
    say_once(h, "cannot connect", strerror(-r));
    drop(h);
    try_later(h);
}

static int on_retry(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct bus_host *h = userdata;

    (void)source;
    (void)usec;
    if (!service_is_stopping(h->service))
        try_now(h);
    return 0;
}

int bus_host_new(struct bus_host **ret, struct service *s)
{
    CLEANUP(bus_host_freep) struct bus_host *h = calloc(1, sizeof(*h));
    int r;

    if (!h)
        return -ENOMEM;
    h->service = s;
    h->pause_usec = PAUSE_LEAST_USEC;
    if ((r = sd_event_add_time_relative(s->event, &h->retry_timer, CLOCK_MONOTONIC, 0, 0, on_retry,
                                        h)) < 0 ||
        (r = sd_event_source_set_enabled(h->retry_timer, SD_EVENT_OFF)) < 0 ||
        (r = sd_event_add_defer(s->event, &h->drop_source, on_drop, h)) < 0 ||
        (r = sd_event_source_set_enabled(h->drop_source, SD_EVENT_OFF)) < 0)
        return r;
    try_now(h);
    *ret = TAKE_PTR(h);
    return 0;
}

sd_bus *bus_host_bus(const struct bus_host *h)
{
    return h->bus;
}

bool bus_host_leave(struct bus_host *h)
{
    if (!h->bus || !h->has_name)
        return true;
    /* Waits for the broker's answer; what it had sent before is queued here when it comes. */
    if (sd_bus_release_name(h->bus, LLM_BUS_NAME) < 0)
        return true;
    while (sd_bus_process(h->bus, NULL) > 0)
        ;
    if (clients_n(h->service->clients) == 0)
        return true;
    if (sd_bus_request_name(h->bus, LLM_BUS_NAME, 0) < 0)
        sd_event_source_set_enabled(h->drop_source, SD_EVENT_ONESHOT);
    return false;
}

struct bus_host *bus_host_free(struct bus_host *h)
{
    if (!h)
        return NULL;
    drop(h);
    sd_event_source_disable_unref(h->retry_timer);
    sd_event_source_disable_unref(h->drop_source);
    free(h);
    return NULL;
}

void bus_host_freep(struct bus_host **h)
{
    *h = bus_host_free(*h);
}
