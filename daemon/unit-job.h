/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * unit_job: whether the systemd that stops this process is about to start it again
 * (`systemctl restart`, an upgrade of the package) or not (`systemctl stop`, a shutdown): a signal
 * does not say. Asked on the bus that the daemon has: the system's, or for a user service the
 * user's. Loop thread.
 */

#include <stdbool.h>
#include <systemd/sd-bus.h>
#include <systemd/sd-event.h>

struct unit_job;

/* Called once, a moment later; frees itself afterwards. restarts: false also where nobody knows. */
typedef void (*unit_job_answer)(void *userdata, bool restarts);

/* 0; -errno: nobody can be asked */
int unit_job_ask(struct unit_job **ret, sd_event *event, sd_bus *bus, unit_job_answer answer,
                 void *userdata);
/* No longer wanted. */
struct unit_job *unit_job_free(struct unit_job *j);
