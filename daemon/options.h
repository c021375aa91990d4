/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * options: the a{sv} at the end of each method, read into structs. One table a method says which
 * options there are, of which type, with which bounds; docs/dbus-api.md explains them.
 *
 * All return 0, -EINVAL (err names the option), -EBADF, -E2BIG (the prompt), -ENOMEM.
 */

#include <stdint.h>
#include <systemd/sd-bus.h>

#include "base/error.h"
#include "daemon/job.h"

struct model_generation;

/* defaults: of the model. The whole of prompts and descriptors is copied. */
int options_read_generate(sd_bus_message *m, const struct model_generation *defaults,
                          struct job_request *ret, struct error *err);

struct session_options {
    char *model; /* owned; NULL: any */
    uint32_t context;
};
void session_options_done(struct session_options *o);
int options_read_session(sd_bus_message *m, struct session_options *ret, struct error *err);
