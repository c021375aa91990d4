/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * memory_pressure: hears that memory is short, and keeps how far that goes. Each event is one level
 * up, each CALM without one is one level down. What the levels mean is said in engine-thread.h and
 * service.c. Loop thread.
 *
 * Heard of as systemd.io/MEMORY_PRESSURE has it: $MEMORY_PRESSURE_WATCH and $MEMORY_PRESSURE_WRITE;
 * without them the pressure of this process's control group, else of the machine, is looked at.
 */

#include <stdbool.h>
#include <systemd/sd-event.h>

#include "base/error.h"

#define PRESSURE_MOST 3u
#define PRESSURE_CALM_USEC UINT64_C(5000000)

struct memory_pressure;

/* After an event (rises: also where the level is the highest already), or a calm. */
typedef void (*memory_pressure_changed)(void *userdata, unsigned level, bool rises);

/*
 * Opens and asks at once, so that a sandbox may follow. 0: also where there is nothing to listen
 * to; -ENOMEM, -errno of sd-event; -EINVAL, -errno: what the environment names cannot be used (err)
 */
int memory_pressure_new(struct memory_pressure **ret, sd_event *event,
                        memory_pressure_changed changed, void *userdata, struct error *err);
struct memory_pressure *memory_pressure_free(struct memory_pressure *m);
void memory_pressure_freep(struct memory_pressure **m);

unsigned memory_pressure_level(const struct memory_pressure *m); /* 0: none. NULL: 0 */
