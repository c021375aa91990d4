/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Every call is sent asynchronously and waited for by poll(): sd_bus_call() would keep a Ctrl-C
 * waiting wherever the verb holds it back to clean up.
 */

#include "client/llmctl-bus.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/number.h"
#include "ipc/message-copy.h"

#define USEC_PER_SEC 1000000u
#define NSEC_PER_USEC 1000u

/* As long as somebody may be asked for a password meanwhile, in usec. */
#define CALL_TIMEOUT_USEC (120u * (uint64_t)USEC_PER_SEC)

int bus_new(struct llm_connection *c, const char *path, const char *interface, const char *member,
            sd_bus_message **ret)
{
    int r = sd_bus_message_new_method_call(llm_connection_bus(c), ret,
                                           llm_connection_destination(c), path, interface, member);

    if (r < 0)
        return complain(STATUS_FAILED, "%s: %s", member, strerror(-r));
    return STATUS_OK;
}

/* ---- waiting ---- */

/* The daemon of bus_watch_end(): the connection on which it is watched, who it is, and whether it
 * has left. */
static sd_bus *watched; /* a reference */
static char watched_name[256];
static bool has_ended;

/* Waits for what the bus waits for, and for the descriptor. */
static int wait_once(sd_bus *bus, int fd, int timer_fd, uint64_t deadline_usec, bool *ret_readable)
{
    struct itimerspec when = {0};
    struct pollfd p[3];
    uint64_t wake;
    int status, events;

    if (sd_bus_get_timeout(bus, &wake) <= 0)
        wake = UINT64_MAX;
    wake = MIN(wake, deadline_usec);
    if (wake != UINT64_MAX) {
        wake = MAX(wake, 1u); /* 0 would disarm it */
        when.it_value.tv_sec = (time_t)(wake / USEC_PER_SEC);
        when.it_value.tv_nsec = (long)(wake % USEC_PER_SEC * NSEC_PER_USEC);
    }
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
    events = sd_bus_get_events(bus);
    p[0] = (struct pollfd){.fd = sd_bus_get_fd(bus), .events = (short)(events < 0 ? 0 : events)};
    p[1] = (struct pollfd){.fd = timer_fd, .events = POLLIN};
    p[2] = (struct pollfd){.fd = fd, .events = POLLIN}; /* a negative one is passed over */
    status = deadlines_poll(p, ARRAY_SIZE(p));
    *ret_readable = p[2].revents != 0;
    return status;
}

/* 0, or a negative errno: the connection is lost; a positive exit status: interrupted */
static int wait_until(sd_bus *bus, const bool *done, int fd, uint64_t usec)
{
    CLEANUP(closep) int timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    uint64_t deadline = usec ? now_usec() + usec : UINT64_MAX;
    bool readable = false;
    int r;

    if (timer_fd < 0)
        return -errno;
    for (;;) {
        do {
            r = sd_bus_process(bus, NULL);
            if (r < 0)
                return r;
            if (has_ended)
                return -ENOTCONN;
        } while (r > 0 && !(done && *done));
        if ((done && *done) || readable || (usec && now_usec() >= deadline))
            return 0;
        r = wait_once(bus, fd, timer_fd, deadline, &readable);
        if (r != STATUS_OK)
            return r;
    }
}

static int complain_of_loss(int r)
{
    if (r == -ENOTCONN || r == -ECONNRESET || r == -EPIPE)
        return complain(STATUS_NOT_RUNNING, "llmd has ended or closed the connection");
    return complain(STATUS_FAILED, "%s", strerror(-r));
}

static int complain_of_end(int status)
{
    if (status == STATUS_TIMEOUT)
        return complain(status, "no answer within the time given");
    return status;
}

int bus_wait(struct llm_connection *c, const bool *done, int fd, uint64_t usec)
{
    int r = wait_until(llm_connection_bus(c), done, fd, usec);

    return r < 0 ? complain_of_loss(r) : complain_of_end(r);
}

/* ---- another daemon in the place of the one before ---- */

/*
 * libllm does it, and adopts our sessions, as with each call of its own. It may wait for some
 * seconds: Ctrl-C ends us meanwhile.
 */
static int reconnect(struct llm_connection *c, struct llm_error *err)
{
    bool was_held = deadlines_are_held();
    struct llm_status s;
    int r;

    deadlines_release();
    r = llm_get_status(c, &s, err);
    if (was_held)
        deadlines_hold();
    has_ended = false;
    return r;
}

int bus_wait_again(struct llm_connection *c, const bool *done, int fd, uint64_t usec)
{
    int r = wait_until(llm_connection_bus(c), done, fd, usec);
    struct llm_error err;

    if (r != -ENOTCONN && r != -ECONNRESET && r != -EPIPE)
        return r < 0 ? complain_of_loss(r) : complain_of_end(r);
    r = reconnect(c, &err);
    if (r == -ENOTCONN)
        return complain_of_loss(r);
    return r < 0 ? complain(status_of(r), "%s", err.message) : BUS_AGAIN;
}

/* Not an answer that took too long, which has the same name. */
static bool is_departure(int r, const sd_bus_error *e, uint64_t since_usec)
{
    if (!e->name)
        return r == -ENOTCONN || r == -ECONNRESET || r == -EPIPE;
    return (strcmp(e->name, SD_BUS_ERROR_NO_REPLY) == 0 ||
            strcmp(e->name, SD_BUS_ERROR_DISCONNECTED) == 0 ||
            strcmp(e->name, SD_BUS_ERROR_SERVICE_UNKNOWN) == 0 ||
            strcmp(e->name, SD_BUS_ERROR_NAME_HAS_NO_OWNER) == 0) &&
           now_usec() - since_usec < CALL_TIMEOUT_USEC;
}

/* ---- calls ---- */

struct reply {
    bool done;
    sd_bus_message *message;
};

static int on_reply(sd_bus_message *m, void *userdata, sd_bus_error *e)
{
    struct reply *reply = userdata;

    (void)e;
    reply->message = sd_bus_message_ref(m);
    reply->done = true;
    return 1;
}

static int call_once(struct llm_connection *c, sd_bus_message *m, sd_bus_message **ret,
                     sd_bus_error *e)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *answer = NULL;
    sd_bus *bus = llm_connection_bus(c);
    struct reply reply = {0};
    sd_bus_slot *slot = NULL;
    int r;

    r = sd_bus_call_async(bus, &slot, m, on_reply, &reply, CALL_TIMEOUT_USEC);
    if (r < 0)
        return r;
    r = wait_until(bus, &reply.done, -1, 0);
    sd_bus_slot_unref(slot);
    answer = reply.message;
    if (r != 0)
        return r;
    if (sd_bus_message_is_method_error(answer, NULL)) {
        sd_bus_error_copy(e, sd_bus_message_get_error(answer));
        r = -sd_bus_message_get_errno(answer);
        return r < 0 ? r : -EIO;
    }
    if (ret)
        *ret = TAKE_PTR(answer);
    return 0;
}

/* The same call, on the connection that is there now. */
static int copy_call(struct llm_connection *c, sd_bus_message *m, sd_bus_message **ret)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *copy = NULL;
    int r;

    r = sd_bus_message_new_method_call(llm_connection_bus(c), &copy, llm_connection_destination(c),
                                       sd_bus_message_get_path(m), sd_bus_message_get_interface(m),
                                       sd_bus_message_get_member(m));
    if (r < 0)
        return r;
    r = message_copy(copy, m);
    if (r >= 0)
        *ret = TAKE_PTR(copy);
    return r;
}

int bus_try(struct llm_connection *c, sd_bus_message *m, sd_bus_message **ret, sd_bus_error *e)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *copy = NULL;
    uint64_t since = now_usec();
    int r = call_once(c, m, ret, e);

    /* All that is called here may be done twice: at worst the second one says that it is so. */
    if (r >= 0 || !is_departure(r, e, since))
        return r;
    sd_bus_error_free(e); /* its number may be that of an answer that takes too long */
    if (reconnect(c, NULL) < 0)
        return -ENOTCONN;
    r = copy_call(c, m, &copy);
    return r < 0 ? r : call_once(c, copy, ret, e);
}

int status_of_call(int r, const sd_bus_error *e)
{
    if (r >= 0)
        return complain_of_end(r);
    if (!e || !e->name)
        return complain_of_loss(r);
    if (strcmp(e->name, SD_BUS_ERROR_UNKNOWN_METHOD) == 0 ||
        strcmp(e->name, SD_BUS_ERROR_UNKNOWN_INTERFACE) == 0)
        return complain(STATUS_FAILED, "this llmd cannot do that: it is older than llmctl");
    if (strcmp(e->name, SD_BUS_ERROR_NO_REPLY) == 0 && r == -ETIMEDOUT)
        return complain(STATUS_TIMEOUT, "llmd does not answer");
    if (strcmp(e->name, SD_BUS_ERROR_NO_REPLY) == 0 ||
        strcmp(e->name, SD_BUS_ERROR_DISCONNECTED) == 0 ||
        strcmp(e->name, SD_BUS_ERROR_SERVICE_UNKNOWN) == 0 ||
        strcmp(e->name, SD_BUS_ERROR_NAME_HAS_NO_OWNER) == 0)
        return complain(STATUS_NOT_RUNNING, "llmd has ended or closed the connection");
    return complain(status_of(r), "%s", e->message && e->message[0] ? e->message : strerror(-r));
}

int bus_call(struct llm_connection *c, sd_bus_message *m, sd_bus_message **ret)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    int r = bus_try(c, m, ret, &e);

    return r == 0 ? STATUS_OK : status_of_call(r, &e);
}

int complain_of_answer(void)
{
    return complain(STATUS_FAILED, "llmd's answer cannot be read: it is of another version");
}

int bus_match(struct llm_connection *c, const char *path_namespace, const char *interface,
              const char *member, sd_bus_message_handler_t callback, void *userdata)
{
    const char *sender = llm_connection_destination(c);
    char rule[512];
    int r;

    snprintf(rule, sizeof(rule), "type='signal',path_namespace='%s'%s%s%s%s%s%s%s%s%s",
             path_namespace, sender ? ",sender='" : "", sender ? sender : "", sender ? "'" : "",
             interface ? ",interface='" : "", interface ? interface : "", interface ? "'" : "",
             member ? ",member='" : "", member ? member : "", member ? "'" : "");
    r = sd_bus_add_match(llm_connection_bus(c), NULL, rule, callback, userdata);
    return r < 0 ? complain_of_loss(r) : STATUS_OK;
}

static int on_owner_changed(sd_bus_message *m, void *userdata, sd_bus_error *e)
{
    const char *name, *before, *after;

    (void)userdata;
    (void)e;
    if (sd_bus_message_read(m, "sss", &name, &before, &after) >= 0 &&
        strcmp(before, watched_name) == 0)
        has_ended = true;
    return 0;
}

/* Whoever has the name now. */
static int find_watched(sd_bus *bus, const char *name)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *reply = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    const char *owner = "";
    int r;

    r = sd_bus_call_method(bus, "org.freedesktop.DBus", "/org/freedesktop/DBus",
                           "org.freedesktop.DBus", "GetNameOwner", &e, &reply, "s", name);
    if (r >= 0)
        r = sd_bus_message_read(reply, "s", &owner);
    if (r < 0 && !sd_bus_error_has_name(&e, SD_BUS_ERROR_NAME_HAS_NO_OWNER))
        return r;
    snprintf(watched_name, sizeof(watched_name), "%s", owner);
    has_ended = !owner[0];
    return 0;
}

int bus_watch_end(struct llm_connection *c)
{
    const char *name = llm_connection_destination(c);
    char rule[256];
    int r;

    if (!name)
        return STATUS_OK;
    if (watched != llm_connection_bus(c)) {
        snprintf(rule, sizeof(rule),
                 "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
                 "member='NameOwnerChanged',arg0='%s'",
                 name);
        r = sd_bus_add_match(llm_connection_bus(c), NULL, rule, on_owner_changed, NULL);
        if (r < 0)
            return complain_of_loss(r);
        sd_bus_unref(watched);
        watched = sd_bus_ref(llm_connection_bus(c));
    }
    r = find_watched(llm_connection_bus(c), name);
    return r < 0 ? complain_of_loss(r) : STATUS_OK;
}

/* ---- properties ---- */

static int read_variant(sd_bus_message *m, const struct bus_property *p, void *fill)
{
    const char contents[] = {p->type == 'S' ? 'a' : p->type, p->type == 'S' ? 's' : 0, 0};
    void *field = (char *)fill + p->offset;
    int r, boolean;

    r = sd_bus_message_enter_container(m, 'v', contents);
    if (r < 0)
        return r;
    if (p->type == 'S') {
        r = sd_bus_message_read_strv(m, field);
    } else if (p->type == 'b') {
        r = sd_bus_message_read_basic(m, 'b', &boolean);
        if (r >= 0)
            *(bool *)field = boolean;
    } else {
        r = sd_bus_message_read_basic(m, p->type, field);
    }
    return r < 0 ? r : sd_bus_message_exit_container(m);
}

int bus_read_properties(sd_bus_message *m, const struct bus_property *properties, size_t n,
                        void *fill)
{
    const char *name;
    size_t i;
    int r;

    r = sd_bus_message_enter_container(m, 'a', "{sv}");
    if (r < 0)
        return r;
    while ((r = sd_bus_message_enter_container(m, 'e', "sv")) > 0) {
        r = sd_bus_message_read_basic(m, 's', &name);
        if (r < 0)
            return r;
        for (i = 0; i < n && strcmp(properties[i].name, name) != 0;)
            i++;
        r = i < n ? read_variant(m, &properties[i], fill) : sd_bus_message_skip(m, "v");
        if (r < 0)
            return r;
        r = sd_bus_message_exit_container(m);
        if (r < 0)
            return r;
    }
    return r < 0 ? r : sd_bus_message_exit_container(m);
}

int bus_get_properties(struct llm_connection *c, const char *path, const char *interface,
                       const struct bus_property *properties, size_t n, void *fill,
                       sd_bus_message **ret_message)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    int r, status;

    status = bus_new(c, path, "org.freedesktop.DBus.Properties", "GetAll", &m);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_append(m, "s", interface);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    status = bus_call(c, m, &reply);
    if (status != STATUS_OK)
        return status;
    if (bus_read_properties(reply, properties, n, fill) < 0)
        return complain_of_answer();
    *ret_message = TAKE_PTR(reply);
    return STATUS_OK;
}

/* ---- sessions ---- */

int session_path(const char *id, char out[SESSION_PATH_MAX])
{
    const char *number = id;
    uint64_t value;

    if (strncmp(id, LLM_SESSION_PATH "/", strlen(LLM_SESSION_PATH "/")) == 0)
        number += strlen(LLM_SESSION_PATH "/");
    if (number_parse(number, UINT64_MAX, &value) < 0 || value == 0)
        return usage_error("%s is no session: its number is meant, as llmctl session list has it",
                           id);
    snprintf(out, SESSION_PATH_MAX, "%s/%" PRIu64, LLM_SESSION_PATH, value);
    return STATUS_OK;
}

uint64_t session_id(const char *path)
{
    const char *slash = strrchr(path, '/');
    uint64_t value;

    return slash && number_parse(slash + 1, UINT64_MAX, &value) == 0 ? value : 0;
}
