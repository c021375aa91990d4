/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * options: the a{sv} at the end of each method, read into structs. One table a method says which
 * options there are, of which type, with which bounds; docs/dbus-api.md explains them.
 *
 * All return 0, -EINVAL (err names the option), -EBADF, -E2BIG (the prompt), -ENOMEM.
 */

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-bus.h>

#include "base/error.h"
#include "daemon/job.h"
#include "daemon/users.h"
#include "engine/scheduler.h"

struct model_generation;

/* defaults: of the model. The whole of prompts and descriptors is copied. */
int options_read_generate(sd_bus_message *m, const struct model_generation *defaults,
                          struct job_request *ret, struct error *err);
int options_read_append(sd_bus_message *m, struct job_request *ret, struct error *err);
/* *ret_session: malloc'ed path of the session that it would continue; NULL: it stands alone */
int options_read_measure(sd_bus_message *m, struct job_request *ret, char **ret_session,
                         struct error *err);

/* Manager.CreateSession, and what of it Session.Fork has. */
struct session_options {
    char *model; /* owned; NULL: any */
    char *label; /* owned; NULL: none given */
    uint32_t context;
    enum scheduler_class class;
    bool linger;
};
void session_options_done(struct session_options *o);
int options_read_session(sd_bus_message *m, struct session_options *ret, struct error *err);
/* *io: the parent's class, and what was given on return. */
int options_read_fork(sd_bus_message *m, struct session_options *io, struct error *err);

/* *io: the limits as they are, those given are replaced. */
int options_read_quota(sd_bus_message *m, struct user_limits *io, struct error *err);

struct install_options {
    bool replace, set_default;
};
int options_read_install(sd_bus_message *m, struct install_options *ret, struct error *err);

/* ListSessions, Subscribe: `all`. */
int options_read_all(sd_bus_message *m, bool *ret_all, struct error *err);

/* Methods that have no options yet. */
int options_read_none(sd_bus_message *m, struct error *err);
