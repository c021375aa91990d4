/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * bus: the objects of org.llmd.Llm1 on an sd_bus, the same on the broker's connection and on each
 * client's own (docs/dbus-api.md). manager-bus.c, session-bus.c and model-bus.c are the vtables,
 * object-bus.c the object manager and the signals. Loop thread.
 */

#include <stdint.h>
#include <systemd/sd-bus.h>

struct client;
struct service;

/*
 * Adds all vtables. p2p: the peer at the other end of this bus; NULL: bus is a broker's, and each
 * message's sender is asked for. The vtables stay until the bus is freed. 0, -errno
 */
int bus_serve(struct service *s, sd_bus *bus, struct client *p2p);

/*
 * The broker's connection is lost or given up: its clients are gone, and nothing more is sent
 * there. Before sd_bus_close().
 */
void bus_leave(struct service *s, sd_bus *bus);

/* For whoever changes the service: properties of the Manager that must be told to all. */
enum bus_property {
    BUS_STATE = 1 << 0,         /* State */
    BUS_MODELS = 1 << 1,        /* Models */
    BUS_DEFAULT_MODEL = 1 << 2, /* DefaultModel, and Default of the models */
    BUS_MODEL = 1 << 3,         /* Model */
    BUS_BACKENDS = 1 << 4,      /* Backends */
};
void bus_manager_changed(struct service *s, unsigned properties);

/* The Restarted signal, on a broker's connection that has the name. */
void bus_tell_restarted(sd_bus *bus);

/* A model came (InterfacesAdded), went, or its State, Failure or Default changed. */
void bus_model_added(struct service *s, const char *name);
void bus_model_removed(struct service *s, const char *name);
void bus_model_changed(struct service *s, const char *name);
