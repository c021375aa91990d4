/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * in_process: the daemon's real objects in the test's own process, reached over socketpairs instead
 * of a listening socket: for what must see or disturb its memory. One thread drives both ends.
 */

#include <sys/types.h>
#include <systemd/sd-bus.h>

#include "daemon/client-session.h"
#include "daemon/service.h"

struct in_process {
    struct service service;
    size_t n_connections;
    char state_dir[64];
};

/* Exits with a message on failure: tests only. context: most tokens of a session by default */
void in_process_start(struct in_process *p, const char *model, uint32_t context);
void in_process_stop(struct in_process *p);

/* The client's end of a connection that the daemon takes for that user's; -errno */
int in_process_connect(struct in_process *p, uid_t uid);

/* The same as a bus that is up; -errno */
int in_process_bus(struct in_process *p, uid_t uid, sd_bus **ret);

/*
 * Sends and waits for the answer, which may be an error. 0: *ret; -ECONNRESET: the daemon gave the
 * connection up
 */
int in_process_call(struct in_process *p, sd_bus *bus, sd_bus_message *m, sd_bus_message **ret);

/* Lets the daemon work until it waits for something, the engine included. */
void in_process_run(struct in_process *p);

/* Until all connections, sessions, requests and streams are gone; clients have closed theirs. */
void in_process_settle(struct in_process *p);
