/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/notify.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>

#include "base/cleanup.h"
#include "base/clock.h"

#define STATUS_USEC 250000u /* at most one STATUS= in that time */

struct notify {
    sd_event *event; /* borrowed */
    sd_event_source *watchdog_timer, *status_timer;
    uint64_t watchdog_usec; /* between two signs of life; 0: none are wanted */
    bool (*alive)(void *userdata);
    void *userdata;
    char status[256], sent[256];
};

static int on_watchdog(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct notify *n = userdata;

    (void)usec;
    if (n->alive(n->userdata))
        sd_notify(0, "WATCHDOG=1");
    sd_event_source_set_time_relative(source, n->watchdog_usec);
    sd_event_source_set_enabled(source, SD_EVENT_ONESHOT);
    return 0;
}

static void send_status(struct notify *n)
{
    if (strcmp(n->status, n->sent) == 0)
        return;
    memcpy(n->sent, n->status, sizeof(n->sent));
    sd_notifyf(0, "STATUS=%s", n->sent);
}

static int on_status(sd_event_source *source, uint64_t usec, void *userdata)
{
    (void)source;
    (void)usec;
    send_status(userdata);
    return 0;
}

int notify_new(struct notify **ret, sd_event *event, bool (*alive)(void *userdata), void *userdata)
{
    CLEANUP(notify_freep) struct notify *n = calloc(1, sizeof(*n));
    uint64_t usec;
    int r;

    if (!n)
        return -ENOMEM;
    n->event = event;
    n->alive = alive;
    n->userdata = userdata;
    r = sd_event_add_time_relative(event, &n->status_timer, CLOCK_MONOTONIC, 0, 0, on_status, n);
    if (r < 0)
        return r;
    sd_event_source_set_enabled(n->status_timer, SD_EVENT_OFF);
    if (sd_watchdog_enabled(0, &usec) > 0) {
        n->watchdog_usec = usec / 3;
        r = sd_event_add_time_relative(event, &n->watchdog_timer, CLOCK_MONOTONIC, 0, 0,
                                       on_watchdog, n);
        if (r < 0)
            return r;
    }
    *ret = TAKE_PTR(n);
    return 0;
}

struct notify *notify_free(struct notify *n)
{
    if (!n)
        return NULL;
    sd_event_source_disable_unref(n->watchdog_timer);
    sd_event_source_disable_unref(n->status_timer);
    free(n);
    return NULL;
}

void notify_freep(struct notify **n)
{
    *n = notify_free(*n);
}

void notify_status(struct notify *n, const char *format, ...)
{
    int enabled = SD_EVENT_OFF;
    va_list ap;

    va_start(ap, format);
    vsnprintf(n->status, sizeof(n->status), format, ap);
    va_end(ap);
    for (char *c = n->status; *c; c++)
        if ((unsigned char)*c < 0x20)
            *c = '?';
    sd_event_source_get_enabled(n->status_timer, &enabled);
    if (enabled != SD_EVENT_OFF)
        return; /* it goes out with the timer, unless a newer one comes first */
    sd_event_source_set_time_relative(n->status_timer, n->sent[0] ? STATUS_USEC : 0);
    sd_event_source_set_enabled(n->status_timer, SD_EVENT_ONESHOT);
}

void notify_ready(struct notify *n)
{
    send_status(n);
    sd_notify(0, "READY=1");
}

void notify_reloading(struct notify *n)
{
    (void)n;
    sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%" PRIu64, now_usec());
}

void notify_stopping(struct notify *n)
{
    send_status(n);
    sd_notify(0, "STOPPING=1");
}

void notify_extend(struct notify *n, uint64_t usec)
{
    (void)n;
    sd_notifyf(0, "EXTEND_TIMEOUT_USEC=%" PRIu64, usec);
}
