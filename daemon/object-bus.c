/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Signals. What is about a session goes to single peers by their unique names, or on their own
 * connections, never to everybody: sd-bus's own emitters broadcast, so the messages are made here,
 * from the vtables' getters.
 */

#include <string.h>

#include "daemon/bus-objects.h"

const struct session_observer bus_session_observer = {0};
