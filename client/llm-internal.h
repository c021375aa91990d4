/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <systemd/sd-bus.h>

#include "client/llm.h"

/* Fills err and returns -code (code > 0). */
int llm_error_set(struct llm_error *err, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Appends the options as a{sv}; NULL: an empty one. 0, -errno */
int llm_options_append(const struct llm_options *o, sd_bus_message *m);
