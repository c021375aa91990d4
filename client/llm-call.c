/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Calls, and what happens to them when the daemon goes and another process takes its place: the
 * connection is made again, the sessions are adopted, and the call is repeated. Whoever sends a
 * call knows whether it may be (llm_before_repeat).
 *
 * The former connection stays open until then: to the daemon that is the sign that its client
 * lives, and that what it owned is still wanted.
 */

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/llm-internal.h"
#include "ipc/message-copy.h"
#include "ipc/names.h"

/* How long nobody may be there. A daemon that listens and is not ready yet is somebody. */
#define PATIENCE_USEC 5000000u
#define PAUSE_LEAST_USEC 10000u
#define PAUSE_MOST_USEC 250000u

/* A call that the daemon dies of would otherwise be made for ever. */
#define REPEATS_MAX 3u

static int lost_session(struct llm_error *err)
{
    llm_error_set(err, ESTALE, "llmd was started again and has lost this session");
    if (err)
        snprintf(err->name, sizeof(err->name), LLM_ERROR_PREFIX "SessionLost");
    return -ESTALE;
}

/* ---- connecting again ---- */

static int read_instance(sd_bus_message *m, char out[LLM_INSTANCE_BYTES])
{
    const char *value;
    int r = sd_bus_message_read(m, "v", "s", &value);

    if (r >= 0)
        snprintf(out, LLM_INSTANCE_BYTES, "%s", value);
    return r;
}

static int new_instance_call(struct llm_connection *c, sd_bus_message **ret, struct llm_error *err)
{
    int r = llm_call_new(c, ret, LLM_ROOT_PATH, "org.freedesktop.DBus.Properties", "Get", err);

    if (r < 0)
        return r;
    r = sd_bus_message_append(*ret, "ss", LLM_MANAGER_INTERFACE, "Instance");
    return r < 0 ? llm_bus_failure(err, r, &SD_BUS_ERROR_NULL) : 0;
}

static int adopt(struct llm_session *s, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    struct llm_connection *c = s->connection;
    int r;

    r = llm_call_new(c, &m, s->path, LLM_SESSION_INTERFACE, "Adopt", err);
    if (r < 0)
        return r;
    r = sd_bus_message_append(m, "a{sv}", 0);
    if (r >= 0)
        r = sd_bus_call(c->bus, m, 0, &e, NULL);
    if (sd_bus_error_has_name(&e, LLM_ERROR_PREFIX "NoSuchSession") ||
        sd_bus_error_has_name(&e, SD_BUS_ERROR_UNKNOWN_OBJECT))
        s->lost = true;
    else if (sd_bus_error_has_name(&e, LLM_ERROR_PREFIX "Busy"))
        s->stays = true; /* another program of this user was faster: it is that one's now */
    else if (r < 0)
        return llm_bus_failure(err, r, &e);
    return 0;
}

/* Finds out whether it is the daemon we knew, and takes the sessions. */
static int settle(struct llm_connection *c, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL, *reply = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    char instance[LLM_INSTANCE_BYTES] = "";
    bool same;
    int r;

    if (!c->knows_instance)
        return 0; /* there has been no session yet */
    r = new_instance_call(c, &m, err);
    if (r < 0)
        return r;
    r = sd_bus_call(c->bus, m, 0, &e, &reply);
    if (r < 0 && (!e.name || llm_is_departure(r, &e) || r == -ETIMEDOUT))
        return llm_bus_failure(err, r, &e);
    if (r >= 0)
        read_instance(reply, instance);
    same = instance[0] && strcmp(instance, c->instance) == 0;
    for (struct llm_session *s = c->sessions; s; s = s->next) {
        if (!same)
            s->lost = true;
        if (s->lost || s->stays)
            continue;
        r = adopt(s, err);
        if (r < 0)
            return r;
    }
    memcpy(c->instance, instance, sizeof(instance));
    return 0;
}

/* What the program may have set on the one before; the rest is its own to do again. */
static void carry_over(sd_bus *from, sd_bus *to)
{
    uint64_t usec;

    if (sd_bus_get_method_call_timeout(from, &usec) >= 0)
        sd_bus_set_method_call_timeout(to, usec);
    sd_bus_set_allow_interactive_authorization(
        to, sd_bus_get_allow_interactive_authorization(from) > 0);
}

static int try_again(struct llm_connection *c, struct llm_error *err)
{
    CLEANUP(sd_bus_close_unrefp) sd_bus *former = NULL;
    sd_bus *bus;
    int r;

    if (c->destination && sd_bus_is_open(c->bus) > 0) { /* it is the daemon alone that went */
        r = llm_find_owner(c->bus, c->scope, c->owner, err);
        return r < 0 ? r : settle(c, err);
    }
    r = llm_open(c, &bus, c->owner, err);
    if (r < 0)
        return r;
    carry_over(c->bus, bus);
    former = c->bus;
    c->bus = bus;
    return settle(c, err);
}

static void sleep_usec(uint64_t usec)
{
    struct timespec t = {.tv_sec = (time_t)(usec / 1000000),
                         .tv_nsec = (long)(usec % 1000000 * 1000)};

    while (nanosleep(&t, &t) < 0 && errno == EINTR)
        ;
}

static int reconnect(struct llm_connection *c, struct llm_error *err)
{
    uint64_t waited = 0, pause = PAUSE_LEAST_USEC;
    int r;

    for (;;) {
        r = try_again(c, err);
        if (r != -ENOENT && r != -ECONNREFUSED && r != -ECONNRESET && r != -ENOTCONN)
            return r;
        if (c->is_private || waited >= PATIENCE_USEC)
            return llm_error_set(err, ENOTCONN, "llmd has gone away");
        sleep_usec(pause);
        waited += pause;
        pause = MIN(pause * 2, PAUSE_MOST_USEC);
    }
}

/* ---- calls ---- */

int llm_call_new(struct llm_connection *c, sd_bus_message **ret, const char *path,
                 const char *interface, const char *member, struct llm_error *err)
{
    int r;

    if (!c->bus)
        return llm_error_set(err, ENOTCONN, "the connection has been ended by llm_disconnect()");
    r = sd_bus_message_new_method_call(c->bus, ret, c->destination ? c->owner : NULL, path,
                                       interface, member);
    return r < 0 ? llm_bus_failure(err, r, &SD_BUS_ERROR_NULL) : 0;
}

/* The same call, for the connection that is there now. */
static int copy_call(struct llm_connection *c, sd_bus_message *m, sd_bus_message **ret,
                     struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *copy = NULL;
    int r;

    r = llm_call_new(c, &copy, sd_bus_message_get_path(m), sd_bus_message_get_interface(m),
                     sd_bus_message_get_member(m), err);
    if (r < 0)
        return r;
    r = message_copy(copy, m);
    if (r < 0)
        return llm_bus_failure(err, r, &SD_BUS_ERROR_NULL);
    *ret = TAKE_PTR(copy);
    return 0;
}

int llm_call_message(struct llm_connection *c, struct llm_session *s, sd_bus_message *m,
                     llm_before_repeat before, void *userdata, sd_bus_message **ret,
                     struct llm_error *err)
{
    if (s && s->lost)
        return lost_session(err);
    for (unsigned n = 0;; n++) {
        CLEANUP(sd_bus_message_unrefp) sd_bus_message *copy = NULL;
        CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
        int r = 0;

        if (n > 0) {
            r = reconnect(c, err);
            if (r < 0)
                return r;
            if (s && s->lost)
                return lost_session(err);
            r = before ? before(userdata, err) : 0;
            if (r != 0)
                return r < 0 ? r : 0;
            r = copy_call(c, m, &copy, err);
            if (r < 0)
                return r;
        }
        r = sd_bus_call(c->bus, copy ? copy : m, 0, &e, ret);
        if (r >= 0)
            return 0;
        if (n == REPEATS_MAX || !llm_is_departure(r, &e))
            return llm_bus_failure(err, r, &e);
    }
}

int llm_call(struct llm_connection *c, struct llm_session *s, const char *method,
             const struct llm_options *options, sd_bus_message **ret, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    int r;

    r = llm_call_new(c, &m, s ? s->path : LLM_ROOT_PATH,
                     s ? LLM_SESSION_INTERFACE : LLM_MANAGER_INTERFACE, method, err);
    if (r < 0)
        return r;
    r = llm_options_append(options, m);
    if (r == -EINVAL)
        return llm_error_set(err, EINVAL, "an option's text is not UTF-8 or not an object path");
    if (r < 0)
        return llm_error_set(err, -r, "the options cannot be sent: %s", strerror(-r));
    return llm_call_message(c, s, m, NULL, NULL, ret, err);
}

int llm_learn_instance(struct llm_connection *c, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL, *reply = NULL;
    struct llm_error e;
    int r;

    if (c->knows_instance)
        return 0;
    r = new_instance_call(c, &m, err);
    if (r < 0)
        return r;
    r = llm_call_message(c, NULL, m, NULL, NULL, &reply, &e);
    if (r < 0 && !e.name[0]) {
        if (err)
            *err = e;
        return r;
    }
    c->instance[0] = 0;
    if (r >= 0)
        read_instance(reply, c->instance);
    c->knows_instance = true; /* it is an older daemon where it is not told */
    return 0;
}
