/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/users.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"

const struct user_limits user_limits_default = {
    .max_sessions = 64,
    .max_kv_bytes = 0,
    .max_queued = 64,
    .weight = 100,
    .tokens_per_minute = 0,
    .max_connections = 64,
};

struct users {
    struct user_limits defaults;
    struct user *list; /* user::next; few enough to be walked: one a person */
};

int users_new(struct users **ret, const struct user_limits *defaults)
{
    struct users *u = calloc(1, sizeof(*u));

    if (!u)
        return -ENOMEM;
    u->defaults = *defaults;
    *ret = u;
    return 0;
}

struct users *users_free(struct users *u)
{
    if (!u)
        return NULL;
    while (u->list) {
        struct user *gone = u->list;

        assert(gone->n_refs == 0);
        u->list = gone->next;
        free(gone);
    }
    free(u);
    return NULL;
}

/* Also makes a bucket full whose limit has just come, or sunk. */
static void fill(struct user *u)
{
    uint64_t now = now_usec();
    double most = u->limits.tokens_per_minute;

    u->tokens += (double)(now - u->tokens_usec) * most / 60e6;
    u->tokens = MIN(u->tokens, most);
    u->tokens_usec = now;
}

/* Nothing about it would be forgotten with it. */
static bool is_done(struct user *u)
{
    if (u->n_refs > 0 || u->has_own_limits)
        return false;
    fill(u);
    return u->tokens >= u->limits.tokens_per_minute;
}

/* Users that have gone stay until their bucket is full; here is when they are looked at again. */
static void forget_those_done(struct users *u)
{
    struct user **at = &u->list;

    while (*at) {
        struct user *user = *at;

        if (is_done(user)) {
            *at = user->next;
            free(user);
        } else {
            at = &user->next;
        }
    }
}

static void set_limits(struct user *u, const struct user_limits *limits)
{
    bool had = u->limits.tokens_per_minute > 0;

    fill(u);
    u->limits = *limits;
    if (!had)
        u->tokens = limits->tokens_per_minute;
}

void users_set_defaults(struct users *u, const struct user_limits *defaults)
{
    u->defaults = *defaults;
    for (struct user *user = u->list; user; user = user->next)
        if (!user->has_own_limits)
            set_limits(user, defaults);
}

const struct user *users_find(const struct users *u, uid_t uid)
{
    for (const struct user *user = u->list; user; user = user->next)
        if (user->uid == uid)
            return user;
    return NULL;
}

int users_ref(struct users *u, uid_t uid, struct user **ret)
{
    struct user *user = (struct user *)users_find(u, uid);

    if (!user) {
        forget_those_done(u);
        user = calloc(1, sizeof(*user));
        if (!user)
            return -ENOMEM;
        user->users = u;
        user->uid = uid;
        user->tokens_usec = now_usec();
        set_limits(user, &u->defaults);
        user->next = u->list;
        u->list = user;
    }
    *ret = user_ref(user);
    return 0;
}

struct user *user_ref(struct user *u)
{
    u->n_refs++;
    return u;
}

struct user *user_unref(struct user *u)
{
    if (!u)
        return NULL;
    assert(u->n_refs > 0);
    u->n_refs--;
    if (u->n_refs == 0)
        forget_those_done(u->users);
    return NULL;
}

void user_unrefp(struct user **u)
{
    *u = user_unref(*u);
}

int users_set_limits(struct users *u, uid_t uid, const struct user_limits *limits)
{
    CLEANUP(user_unrefp) struct user *user = NULL;
    int r;

    assert(limits->weight >= 1 && limits->weight <= USER_WEIGHT_MAX);
    r = users_ref(u, uid, &user);
    if (r < 0)
        return r;
    user->has_own_limits = true;
    set_limits(user, limits);
    return 0;
}

int users_clear_limits(struct users *u, uid_t uid)
{
    CLEANUP(user_unrefp) struct user *user = NULL;
    int r;

    r = users_ref(u, uid, &user);
    if (r < 0)
        return r;
    user->has_own_limits = false;
    set_limits(user, &u->defaults);
    return 0;
}

void users_get_limits(struct users *u, uid_t uid, struct user_limits *ret)
{
    const struct user *user = users_find(u, uid);

    *ret = user ? user->limits : u->defaults;
}

int user_check_tokens(struct user *u, struct error *err)
{
    uint32_t rate = u->limits.tokens_per_minute;

    if (rate == 0)
        return 0;
    fill(u);
    if (u->tokens >= 1)
        return 0;
    return error_set(err, EDQUOT,
                     "tokens per minute: all %u are used (requested 1, available 0); try again in "
                     "%.0f seconds",
                     rate, 1 + (1 - u->tokens) * 60 / rate);
}

void user_charge_tokens(struct user *u, uint64_t tokens)
{
    if (u->limits.tokens_per_minute == 0)
        return;
    fill(u);
    u->tokens -= (double)tokens;
}
