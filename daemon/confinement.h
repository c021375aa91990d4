/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* confinement: the sandbox that a daemon needs, by its scope, places and configuration. */

#include "base/error.h"
#include "daemon/service.h"

struct gpu;
struct places;

/*
 * From then on the process is confined, as --sandbox= and Sandbox= have it; the log says where
 * something is missing. There is one thread, and all is there that is not opened again: folders,
 * locks, the socket's place. gpu: NULL: none. 0, -errno
 */
int confine_daemon(const struct service *s, const struct places *places, const struct gpu *gpu,
                   struct error *err);
