/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* message-copy: for a call that is made again, on another connection. */

#include <systemd/sd-bus.h>

/*
 * Appends to `to`, which is not sealed, all that `from` holds, whether it was sent or not; `from`
 * is sealed afterwards. 0, -errno
 */
int message_copy(sd_bus_message *to, sd_bus_message *from);
