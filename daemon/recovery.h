/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * recovery: sessions and requests of a former process come back, out of what the service manager
 * kept (fd-store.h). Once, when the first engine is there and before clients are let in. Loop
 * thread.
 *
 * Sessions come back without an owner: client_session_former_owner() says whose they were, and
 * client_session_set_owner() gives them to somebody. "connection-ID" descriptors stay in the fd
 * store for whoever looks after owners (fd_store_next_id(store, "connection", ...)).
 */

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct fd_store;
struct service;

struct recovery_result {
    bool took_back; /* there was something of a former process, and this one goes on with it */
    uint32_t n_sessions, n_requests, n_lost;
};

/*
 * Which instance of the daemon this is, for clients: 32 hex digits, the same after a restart that
 * goes on with what was before, unless `changes`. Kept in the store as "instance", with the last
 * numbers of sessions and requests: a call that is repeated after the restart shall not meet
 * another session that was given the number of a closed one. 0, -errno
 */
#define INSTANCE_DIGITS 32
int recovery_instance(struct service *s, bool changes, char ret[INSTANCE_DIGITS + 1],
                      bool *ret_inherited);

/* s->engine, s->sessions and s->users are there. What cannot be taken back is said in the log, by
 * the session's number, and forgotten. */
void recovery_run(struct service *s, struct recovery_result *ret);

/* There will be no engine to take anything back: forgets all of it. */
void recovery_give_up(struct service *s, struct recovery_result *ret);
