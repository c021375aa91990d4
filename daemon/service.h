/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * service: what the daemon is made of, and what happens to the whole of it: a model is loaded or
 * exchanged, the configuration is read again, it stops. The bus objects get this. Loop thread.
 *
 * Parts that are not there yet, or cannot be, are NULL where it says so.
 */

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>

#include "base/error.h"
#include "daemon/recovery.h"
#include "engine/engine.h"

struct arguments;
struct authority;
struct bus_host;
struct clients;
struct config;
struct engine_thread;
struct memory_pressure;
struct fd_store;
struct former_owners;
struct gpu;
struct model;
struct model_store;
struct server;
struct session_set;
struct users;

enum service_scope {
    SCOPE_PRIVATE,
    SCOPE_USER,
    SCOPE_SYSTEM,
};

enum service_state {
    SERVICE_LOADING,  /* a model is being opened */
    SERVICE_READY,    /* it answers */
    SERVICE_DEGRADED, /* no model; or the last exchange failed and the old one answers */
    SERVICE_STOPPING, /* no new requests, those that run end with "shutdown" */
};

struct service {
    sd_event *event;
    const struct arguments *arguments;
    const struct config *config; /* another one after a reload: do not keep the pointer */
    enum service_scope scope;
    enum service_state state;
    double load_progress; /* 0..1, of the model being read into memory; 1 when it is */

    struct gpu *gpu; /* NULL: none is wanted, or a test has none */

    struct model *model;          /* NULL: none loaded */
    char *model_name;             /* of the loaded one; "" without */
    struct engine_thread *engine; /* NULL: no model (CreateSession: ModelNotReady) */
    char *failure;                /* why there is no model, for ModelNotReady; NULL: there is one */

    struct fd_store *store;             /* what the service manager holds for the next process */
    char instance[INSTANCE_DIGITS + 1]; /* recovery.h */
    struct recovery_result recovered;   /* set before clients are let in */

    struct model_store *models;
    struct session_set *sessions;
    struct users *users;
    struct clients *clients;
    struct former_owners *former; /* of what was recovered; NULL: a test has none */
    struct authority *authority;
    struct server *server;
    struct bus_host *bus;
    struct memory_pressure *pressure;

    struct service_private *private; /* service.c's own */
};

/* Borrows the arguments; takes the configuration over in every case. 0, -errno */
int service_new(struct service **ret, const struct arguments *arguments, struct config *config,
                struct error *err);
struct service *service_free(struct service *s);
void service_freep(struct service **s);

/* As both have it, the command line first; without a GPU. */
struct engine_options service_engine_options(const struct arguments *a, const struct config *c);

/* Until it ends: 0; 1: for a failure that was logged; -errno */
int service_run(struct service *s, struct error *err);

/*
 * After anything that may have been the last of its kind: a request, a stream, a session, a client
 * went. Leaves when that is due, changes the model when one waits to be exchanged.
 */
void service_something_went(struct service *s);

/*
 * Which model is loaded by default: kept over restarts, loaded at once when no session is open,
 * else when the last one is closed. 0, -ENOENT, -EAGAIN: it is still being installed, -errno: not
 * stored
 */
int service_set_default_model(struct service *s, const char *name, struct error *err);

static inline bool service_is_stopping(const struct service *s)
{
    return s->state == SERVICE_STOPPING;
}
