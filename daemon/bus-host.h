/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * bus_host: the daemon's connection to the system or session bus: opens it, asks for the name, puts
 * the objects there. Without a bus the daemon serves its socket, and this goes on trying. Loop
 * thread.
 */

#include <stdbool.h>
#include <systemd/sd-bus.h>

struct bus_host;
struct service;

/* Tries at once; later failures are its own business. 0, -ENOMEM, -errno of the event loop */
int bus_host_new(struct bus_host **ret, struct service *s);
struct bus_host *bus_host_free(struct bus_host *h);
void bus_host_freep(struct bus_host **h);

/* The connection to the bus, which may not be through yet, or NULL; borrowed, until the next turn of
 * the loop. */
sd_bus *bus_host_bus(const struct bus_host *h);

/*
 * Gives the name up, and answers what had come before: true. false: somebody came meanwhile, and
 * the name is ours again.
 */
bool bus_host_leave(struct bus_host *h);
