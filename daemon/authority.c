/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A check is a call of polkit's that has not been answered. Callers on the system bus are named to
 * polkit by their unique name, which is never given out twice. Those on the socket are named by
 * process number, start time and uid; that the number still means the process which connected is
 * seen from its pidfd, before polkit is asked and again when it has answered: a process that is
 * alive then was alive, under its number, all the time between.
 *
 * Answers to `use` are remembered as the generation they belong to. Everything that may change
 * polkit's mind (its Changed signal, its end, the bus's) begins a new generation.
 *
 * The broker lets us wait for some hundred answers only, whoever they are for. So each user has but
 * some questions asked at a time; the others wait here.
 *
 * Once polkit has answered, its absence is no longer taken for a machine without it: an
 * administrator's "no" does not end because the bus was restarted.
 */

#include "daemon/authority.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/log.h"
#include "ipc/names.h"

#define POLKIT_NAME "org.freedesktop.PolicyKit1"
#define POLKIT_PATH "/org/freedesktop/PolicyKit1/Authority"
#define POLKIT_INTERFACE "org.freedesktop.PolicyKit1.Authority"

#define ALLOW_INTERACTION 1u
#define CHECK_USEC UINT64_C(25000000)
#define ASKED_OF_USER_MAX 8u
#define ASKED_MAX 96u                        /* dbus-daemon's max_replies_per_connection is 128 */
#define INTERACTIVE_USEC UINT64_C(600000000) /* somebody looks for a password */

struct check {
    struct authority *authority;
    struct client_identity *who; /* borrowed */
    enum action action;
    uint64_t id, generation;
    bool interactive;
    bool asked;
    sd_bus_slot *slot;
    authority_answer answer;
    void *userdata;
    struct check *previous, *next; /* authority::checks */
};

struct authority {
    bool ask_polkit;
    bool seen;   /* polkit has answered */
    bool said;   /* that there is none */
    sd_bus *bus; /* NULL: none */
    sd_bus_slot *changed_slot, *owner_slot;
    uint64_t generation; /* from 1 */
    uint64_t last_id;
    struct check *checks;
    struct log_limit failures;
};

static const char *const names[ACTION_N] = {
    [ACTION_USE] = LLM_ACTION_USE,
    [ACTION_USE_BACKGROUND] = LLM_ACTION_USE_BACKGROUND,
    [ACTION_MANAGE_MODELS] = LLM_ACTION_MANAGE_MODELS,
    [ACTION_INSPECT_SESSIONS] = LLM_ACTION_INSPECT_SESSIONS,
    [ACTION_MANAGE_QUOTAS] = LLM_ACTION_MANAGE_QUOTAS,
};

const char *action_name(enum action action)
{
    return names[action];
}

static void check_free(struct check *c)
{
    if (c->previous)
        c->previous->next = c->next;
    else
        c->authority->checks = c->next;
    if (c->next)
        c->next->previous = c->previous;
    sd_bus_slot_unref(c->slot);
    free(c);
}

/* Ends the check; the answer may ask anew. */
static void give(struct check *c, int r)
{
    authority_answer answer = c->answer;
    void *userdata = c->userdata;

    check_free(c);
    answer(userdata, r);
}

static int without_polkit(struct authority *a, enum action action)
{
    if (a->ask_polkit && !a->said) {
        a->said = true;
        log_with(LOG_NOTICE, &(struct log_fields){.message_id = LOG_ID_NO_POLKIT},
                 "polkit cannot be asked: everybody may use the model, only root may manage it");
    }
    return action == ACTION_USE || action == ACTION_USE_BACKGROUND;
}

static bool is_absent(const sd_bus_error *e)
{
    static const char *const absent[] = {
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.DBus.Error.Spawn.ServiceNotFound",
        "org.freedesktop.systemd1.NoSuchUnit",
        "org.freedesktop.systemd1.UnitMasked",
    };

    for (size_t i = 0; i < sizeof(absent) / sizeof(absent[0]); i++)
        if (sd_bus_error_has_name(e, absent[i]))
            return true;
    return false;
}

static int read_answer(struct check *c, sd_bus_message *m)
{
    struct authority *a = c->authority;
    const sd_bus_error *error = sd_bus_message_get_error(m);
    int yes, challenge, r;
    uint32_t untold;

    if (error && is_absent(error) && !a->seen)
        return without_polkit(a, c->action);
    if (error) {
        if (log_limit_pass(&a->failures, &untold)) {
            if (untold > 0)
                log_warning("polkit could not say %u times more what a user may do", untold);
            log_warning("polkit could not say whether user %u may %s: %s", (unsigned)c->who->uid,
                        action_name(c->action), error->message ? error->message : error->name);
        }
        r = sd_bus_error_get_errno(error);
        return r > 0 ? -r : -EIO;
    }
    r = sd_bus_message_enter_container(m, 'r', "bba{ss}");
    if (r >= 0)
        r = sd_bus_message_read(m, "bb", &yes, &challenge);
    if (r < 0)
        return r;
    a->seen = true;
    if (!c->who->bus_name && client_identity_is_alive(c->who) == 0)
        return 0; /* the number may have been another process's when polkit looked */
    return yes ? 1 : challenge ? 2 : 0;
}

static void ask_next(struct authority *a);

static int on_answer(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct check *c = userdata;
    struct authority *a = c->authority;
    int r = read_answer(c, m);

    (void)error;
    if (r == 1 && c->action == ACTION_USE && c->generation == a->generation)
        c->who->use_granted = c->generation;
    give(c, r);
    ask_next(a);
    return 0;
}

static int append_subject(sd_bus_message *m, const struct client_identity *who)
{
    if (who->bus_name)
        return sd_bus_message_append(m, "(sa{sv})", "system-bus-name", 1, "name", "s",
                                     who->bus_name);
    return sd_bus_message_append(m, "(sa{sv})", "unix-process", 3, "pid", "u", (uint32_t)who->pid,
                                 "start-time", "t", who->start_time, "uid", "i", (int32_t)who->uid);
}

static int ask(struct check *c)
{
    struct authority *a = c->authority;
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    char id[32];
    int r;

    snprintf(id, sizeof(id), "llmd-%" PRIu64, c->id);
    r = sd_bus_message_new_method_call(a->bus, &m, POLKIT_NAME, POLKIT_PATH, POLKIT_INTERFACE,
                                       "CheckAuthorization");
    if (r >= 0)
        r = append_subject(m, c->who);
    if (r >= 0)
        r = sd_bus_message_append(m, "sa{ss}us", action_name(c->action), 0,
                                  c->interactive ? ALLOW_INTERACTION : 0u, id);
    if (r >= 0)
        r = sd_bus_call_async(a->bus, &c->slot, m, on_answer, c,
                              c->interactive ? INTERACTIVE_USEC : CHECK_USEC);
    return r;
}

static bool may_be_asked(const struct check *wanted)
{
    uint32_t n = 0, n_of_user = 0;

    for (const struct check *c = wanted->authority->checks; c; c = c->next) {
        n += c->asked;
        n_of_user += c->asked && c->who->uid == wanted->who->uid;
    }
    return n < ASKED_MAX && n_of_user < ASKED_OF_USER_MAX;
}

/* Those that have waited, the oldest first: the list has it last. */
static void ask_next(struct authority *a)
{
    struct check *c = a->checks;
    int r;

    while (c && c->next)
        c = c->next;
    while (a->bus && c) {
        if (c->asked || !may_be_asked(c)) {
            c = c->previous;
            continue;
        }
        c->asked = true;
        r = ask(c);
        if (r >= 0) {
            c = c->previous;
            continue;
        }
        give(c, r); /* what hears of it may end others */
        for (c = a->checks; c && c->next; c = c->next)
            ;
    }
}

void authority_check(struct authority *a, struct client_identity *who, enum action action,
                     sd_bus_message *m, authority_answer answer, void *userdata)
{
    struct check *c;
    int r;

    if (who->uid == 0 || who->uid == geteuid()) {
        answer(userdata, 1);
        return;
    }
    if (action == ACTION_USE && who->use_granted == a->generation) {
        answer(userdata, 1);
        return;
    }
    if (!a->ask_polkit || (!a->bus && !a->seen)) {
        answer(userdata, without_polkit(a, action));
        return;
    }
    if (!a->bus) {
        answer(userdata, -ECONNRESET);
        return;
    }
    if (!who->bus_name && (who->pid <= 0 || client_identity_is_alive(who) == 0)) {
        answer(userdata, 0);
        return;
    }
    c = calloc(1, sizeof(*c));
    if (!c) {
        answer(userdata, -ENOMEM);
        return;
    }
    *c = (struct check){.authority = a,
                        .who = who,
                        .action = action,
                        .id = ++a->last_id,
                        .generation = a->generation,
                        .interactive = m && sd_bus_message_get_allow_interactive_authorization(m),
                        .answer = answer,
                        .userdata = userdata,
                        .next = a->checks};
    if (c->next)
        c->next->previous = c;
    a->checks = c;
    if (!may_be_asked(c))
        return;
    c->asked = true;
    r = ask(c);
    if (r < 0)
        give(c, r);
}

/* The dialogue that polkit may be showing goes away. */
static void withdraw(struct check *c)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    char id[32];

    if (!c->asked || !c->interactive || !c->authority->bus)
        return;
    snprintf(id, sizeof(id), "llmd-%" PRIu64, c->id);
    if (sd_bus_message_new_method_call(c->authority->bus, &m, POLKIT_NAME, POLKIT_PATH,
                                       POLKIT_INTERFACE, "CancelCheckAuthorization") >= 0 &&
        sd_bus_message_append(m, "s", id) >= 0 && sd_bus_message_set_expect_reply(m, 0) >= 0)
        sd_bus_send(c->authority->bus, m, NULL);
}

/* Answering may end others, so each time from the beginning. who NULL: all. */
static void give_all(struct authority *a, const struct client_identity *who, int r)
{
    struct check *c = a->checks;

    while (c) {
        if (who && c->who != who) {
            c = c->next;
            continue;
        }
        if (r == -ECANCELED)
            withdraw(c);
        give(c, r);
        c = a->checks;
    }
    if (who)
        ask_next(a);
}

void authority_forget(struct authority *a, struct client_identity *who)
{
    give_all(a, who, -ECANCELED);
}

static int on_changed(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    struct authority *a = userdata;

    (void)m;
    (void)error;
    a->generation++;
    return 0;
}

int authority_set_bus(struct authority *a, sd_bus *bus)
{
    int r;

    if (!a->ask_polkit)
        return 0;
    a->generation++;
    a->changed_slot = sd_bus_slot_unref(a->changed_slot);
    a->owner_slot = sd_bus_slot_unref(a->owner_slot);
    a->bus = sd_bus_unref(a->bus);
    give_all(a, NULL, -ECONNRESET);
    if (!bus)
        return 0;
    r = sd_bus_match_signal_async(bus, &a->changed_slot, POLKIT_NAME, POLKIT_PATH, POLKIT_INTERFACE,
                                  "Changed", on_changed, NULL, a);
    if (r >= 0)
        r = sd_bus_add_match_async(bus, &a->owner_slot,
                                   "type='signal',sender='org.freedesktop.DBus',"
                                   "path='/org/freedesktop/DBus',interface='org.freedesktop.DBus',"
                                   "member='NameOwnerChanged',arg0='" POLKIT_NAME "'",
                                   on_changed, NULL, a);
    if (r < 0)
        return r;
    a->bus = sd_bus_ref(bus);
    return 0;
}

int authority_new(struct authority **ret, bool ask_polkit)
{
    struct authority *a = calloc(1, sizeof(*a));

    if (!a)
        return -ENOMEM;
    a->ask_polkit = ask_polkit;
    a->generation = 1;
    *ret = a;
    return 0;
}

struct authority *authority_free(struct authority *a)
{
    if (!a)
        return NULL;
    give_all(a, NULL, -ECANCELED);
    sd_bus_slot_unref(a->changed_slot);
    sd_bus_slot_unref(a->owner_slot);
    sd_bus_unref(a->bus);
    free(a);
    return NULL;
}
