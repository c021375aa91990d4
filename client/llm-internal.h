/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdbool.h>
#include <systemd/sd-bus.h>

#include "client/llm.h"

struct llm_connection {
    sd_bus *bus;
    enum llm_scope scope;
    const char *destination; /* static; NULL: peer to peer */
};

/* Fills err and returns -code (code > 0). */
int llm_error_set(struct llm_error *err, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* What sd-bus calls r and e, as this library tells it. Returns a negative errno. */
int llm_bus_failure(struct llm_error *err, int r, const sd_bus_error *e);

/* -EBADMSG: what the daemon answered has not the form it must have. */
int llm_bad_answer(struct llm_error *err);

/*
 * Calls a method with one argument a{sv} (options, NULL: empty), or with what was appended to a
 * message by hand. *ret may be NULL.
 */
int llm_call(sd_bus *bus, const char *destination, const char *path, const char *interface,
             const char *method, const struct llm_options *options, sd_bus_message **ret,
             struct llm_error *err);
int llm_call_message(sd_bus *bus, sd_bus_message *m, sd_bus_message **ret, struct llm_error *err);

/* Appends the options as a{sv}; NULL: an empty one. 0, -errno */
int llm_options_append(const struct llm_options *o, sd_bus_message *m);

/* Whether they have this one, and true. */
bool llm_options_is_set(const struct llm_options *o, const char *name);
