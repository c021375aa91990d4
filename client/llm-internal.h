/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <systemd/sd-bus.h>

#include "client/llm.h"

#define LLM_NAME_BYTES 256 /* of a unique name on a bus */
#define LLM_INSTANCE_BYTES 64

struct llm_connection {
    sd_bus *bus; /* another one after each reconnection; NULL: llm_disconnect() was called */
    enum llm_scope scope;
    const char *destination;    /* static; NULL: peer to peer */
    char *socket;               /* absolute; NULL: on a bus */
    bool is_private;            /* nobody starts its daemon again by itself */
    char owner[LLM_NAME_BYTES]; /* on a bus: whom calls go to, so that none reaches a daemon that
                                   was started since before we have noticed */
    bool knows_instance;
    char instance[LLM_INSTANCE_BYTES]; /* "": the daemon does not tell, so no two are the same */
    struct llm_session *sessions;      /* llm_session::next */
    unsigned n_refs;                   /* the program's, and one a session */
};

struct llm_session {
    struct llm_connection *connection; /* a reference */
    char *path;
    bool stays;                          /* is not ours to close */
    bool lost;                           /* the daemon that was started since has it not */
    struct llm_session *previous, *next; /* llm_connection::sessions */
};

struct llm_connection *llm_connection_unref(struct llm_connection *c);

/* Opens what c says, its socket or its bus, and finds out whether a daemon answers there; owner: as
 * the field. Errors as of llm_connect_scope() */
int llm_open(const struct llm_connection *c, sd_bus **ret, char owner[LLM_NAME_BYTES],
             struct llm_error *err);
/* Who is the daemon on this bus now; it may be started for that. Errors likewise */
int llm_find_owner(sd_bus *bus, enum llm_scope scope, char owner[LLM_NAME_BYTES],
                   struct llm_error *err);

/* Fills err and returns -code (code > 0). */
int llm_error_set(struct llm_error *err, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* What sd-bus calls r and e, as this library tells it. Returns a negative errno. */
int llm_bus_failure(struct llm_error *err, int r, const sd_bus_error *e);

/* Whether that says that whom we talked to is no longer there. */
bool llm_is_departure(int r, const sd_bus_error *e);

/* -EBADMSG: what the daemon answered has not the form it must have. */
int llm_bad_answer(struct llm_error *err);

/* ---- calls (llm-call.c) ---- */

/* An empty one, to whom c talks. */
int llm_call_new(struct llm_connection *c, sd_bus_message **ret, const char *path,
                 const char *interface, const char *member, struct llm_error *err);

/*
 * Before a call is made once more, whose first answer was lost: 0: it is to be; 1: there is no need
 * to, it had been done; negative, and err: it cannot be
 */
typedef int (*llm_before_repeat)(void *userdata, struct llm_error *err);

/*
 * Sends m, about the session s (NULL: about none), and waits. Where the daemon goes meanwhile, or
 * has gone: reconnects and repeats, if `before` (NULL: always) lets it. *ret may be NULL; it stays
 * as it is where `before` says that there is no need.
 */
int llm_call_message(struct llm_connection *c, struct llm_session *s, sd_bus_message *m,
                     llm_before_repeat before, void *userdata, sd_bus_message **ret,
                     struct llm_error *err);

/* Calls a method with one argument a{sv}; options NULL: empty. s NULL: of the Manager */
int llm_call(struct llm_connection *c, struct llm_session *s, const char *method,
             const struct llm_options *options, sd_bus_message **ret, struct llm_error *err);

/* Before the first session: what tells later whether it is the same daemon. 0, -errno */
int llm_learn_instance(struct llm_connection *c, struct llm_error *err);

/* Appends the options as a{sv}; NULL: an empty one. 0, -errno */
int llm_options_append(const struct llm_options *o, sd_bus_message *m);

/* Whether they have this one, and true. */
bool llm_options_is_set(const struct llm_options *o, const char *name);
