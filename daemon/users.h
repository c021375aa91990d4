/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * users: what is charged to whom. One struct user a uid that has something here: a connection, a
 * session, a request, a limit of its own. Knows no bus. Loop thread.
 */

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"

/* Of KV bytes and tokens per minute 0 means no limit; the weight is 1 to USER_WEIGHT_MAX. */
struct user_limits {
    uint32_t max_sessions;
    uint64_t max_kv_bytes;
    uint32_t max_queued; /* requests that have not ended, waiting or running */
    uint32_t weight;     /* of the uid against others, where all want to compute */
    uint32_t tokens_per_minute;
    uint32_t max_connections;
};

#define USER_WEIGHT_MAX 10000u
extern const struct user_limits user_limits_default;

struct users;

struct user {
    struct users *users;
    uid_t uid;
    struct user_limits limits;
    bool has_own_limits;    /* set by users_set_limits(), else the defaults */
    uint32_t n_refs;        /* what hangs on it */
    uint32_t n_connections; /* peer to peer */
    uint32_t n_clients;     /* names on the bus */
    uint32_t n_sessions;
    uint32_t n_transfers;  /* files being read or written for it */
    uint64_t prompt_bytes; /* text of its requests that have not ended */
    uint32_t n_questions;  /* calls that wait until it is known whether they are allowed */
    uint32_t n_streams;    /* until their readers have read them */
    uint32_t n_queued;     /* as user_limits::max_queued */
    double tokens; /* in the bucket: may be negative, for what a request took is known late */
    uint64_t tokens_usec; /* when it was last filled */
    struct user *next;    /* users::list */
};

/* 0, -ENOMEM */
int users_new(struct users **ret, const struct user_limits *defaults);
struct users *users_free(struct users *u); /* nothing may hang on any user any more */

/* For those without limits of their own, from now on: after the configuration was read again. */
void users_set_defaults(struct users *u, const struct user_limits *defaults);

/* Limits of one uid until the daemon ends. 0, -ENOMEM */
int users_set_limits(struct users *u, uid_t uid, const struct user_limits *limits);
/* Back to the defaults, those of now and of later. 0, -ENOMEM */
int users_clear_limits(struct users *u, uid_t uid);
void users_get_limits(struct users *u, uid_t uid, struct user_limits *ret);

/* Finds or makes; put back with user_unref(). 0, -ENOMEM */
int users_ref(struct users *u, uid_t uid, struct user **ret);
struct user *user_ref(struct user *u);
struct user *user_unref(struct user *u);
void user_unrefp(struct user **u);
const struct user *users_find(const struct users *u,
                              uid_t uid); /* NULL: nothing is charged to it */

/*
 * The bucket holds a minute's tokens and fills evenly. A request may begin while something is in
 * it; what it took is charged when it ends. 0, -EDQUOT: err tells how long to wait
 */
int user_check_tokens(struct user *u, struct error *err);
void user_charge_tokens(struct user *u, uint64_t tokens);
