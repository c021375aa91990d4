/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * bus-error: errno and the bus's error names in one table, read in both directions. On the way out
 * the daemon asks for the name of an errno; on the way in sd-bus turns a name into an errno, once
 * sd_bus_error_add_map(bus_errors) was called. The stream's `error` records use the same names.
 * docs/dbus-api.md says what each means.
 */

#include <systemd/sd-bus.h>

#include "base/error.h"

extern const sd_bus_error_map bus_errors[];

/* The name for an errno, of either sign; "...Error.Failed" for those not in the table. */
const char *bus_error_name(int code);

/* The positive errno for a name, -ENOENT for names not in the table. */
int bus_error_code(const char *name);

/* Sets e from code and err's text; returns -code, for `return bus_error_set(...)` in a vtable. */
int bus_error_set(sd_bus_error *e, int code, const struct error *err);
