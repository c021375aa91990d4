/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* places: where a daemon of a scope has its socket, its state and its models. */

#include <stddef.h>

#include "base/error.h"
#include "daemon/service.h"

struct config;

struct places {
    char *socket;
    char *state;    /* NULL: none is kept (private) */
    char *cache;    /* of what can be made again: the state folder, where there is one; it may not be
                       there yet */
    char **folders; /* [n_folders] of models besides the state's */
    size_t n_folders;
};

/*
 * Makes the folder of the socket and the state folder, where they are not there and that is
 * allowed. socket: asked for, or NULL. 0, -errno: there can be no socket
 */
int places_find(struct places *ret, enum service_scope scope, const struct config *config,
                const char *socket, struct error *err);
void places_done(struct places *p);

/* With those above it, where they are not there and that is allowed. */
void places_make_folder(const char *path);
