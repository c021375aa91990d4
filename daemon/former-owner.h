/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * former_owner: whom sessions ended with before this process was started, or before the bus was
 * lost: a connection to the socket, or a name on the bus. It keeps its sessions until its client
 * takes them back: from a connection by Session.Adopt, on the bus by any call, for the name is the
 * same. A former connection is held open, but ended for writing: so its peer learns that it is to
 * connect anew, and we learn when it goes. When it has gone, or the name has, its sessions end,
 * after a grace for those who close before they connect. Loop thread.
 *
 * Former connections are not charged to max_connections, or their clients could not come back; each
 * owns a session, of which users have only so many.
 */

#include <stdbool.h>
#include <systemd/sd-bus.h>

#include "daemon/client-session.h"

struct client;
struct former_owners;
struct service;

/* Takes the connections of the process before, whose peers learn it now. 0, -errno */
int former_owners_new(struct former_owners **ret, struct service *s);
/* Closes their sessions. */
struct former_owners *former_owners_free(struct former_owners *f);

/* Once recovery has brought the sessions back, and right before clients are let in: gives each its
 * former owner. */
void former_owners_begin(struct former_owners *f);

/* The name is ours on this bus: asks there who is still present. */
void former_owners_bus_is_there(struct former_owners *f, sd_bus *bus);

/* The bus goes, and c with it, which may come back. */
void former_owners_keep(struct former_owners *f, struct client *c);

/* What a name's own client had is its own again. */
void former_owners_return(struct former_owners *f, struct client *c);

/* 0; -EBUSY: the owner is a name on the bus that is present, or may be; -ENOENT: it is none of these
 */
int former_owners_may_adopt(const struct former_owners *f, const struct session_owner *owner);

/* Some may have no session any more. */
void former_owners_something_went(struct former_owners *f);

/* How an owner on a bus is called: a unique name says nothing without its bus. "" on failure */
void former_owner_name(sd_bus *bus, const char *unique, struct owner_name *ret);
