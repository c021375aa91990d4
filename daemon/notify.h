/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * notify: what the service manager is told (sd_notify), nothing where there is none. Loop thread.
 *
 * The watchdog is fed only while the engine thread is alive: a daemon whose loop still answers but
 * whose engine hangs serves nobody, and is to be restarted.
 */

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>

#include "base/error.h"

struct notify;

/* alive: asked before each WATCHDOG=1. 0, -errno */
int notify_new(struct notify **ret, sd_event *event, bool (*alive)(void *userdata), void *userdata);
struct notify *notify_free(struct notify *n);
void notify_freep(struct notify **n);

/* STATUS=, one line; the same one again, or one soon after another, is held back for a moment. */
void notify_status(struct notify *n, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Once; later ones only end a notify_reloading(). */
void notify_ready(struct notify *n);
void notify_reloading(struct notify *n);
void notify_stopping(struct notify *n);

/* While a start takes long: so much more time, from now on. */
void notify_extend(struct notify *n, uint64_t usec);
