/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * model_loader: opens a model file in a thread of its own, since a header and a vocabulary take
 * longer than the loop may be away.
 */

#include <systemd/sd-event.h>

#include "base/error.h"

struct model;
struct model_loader;
struct prefetch_child;

/* m: the receiver's; NULL with r < 0 and err. The receiver calls model_loader_free(). */
typedef void (*model_loader_done)(void *userdata, struct model *m, int r, const struct error *err);

/*
 * reader, or NULL, is given the file as soon as it is open, and must live as long as the loader.
 * 0, -errno
 */
int model_loader_new(struct model_loader **ret, sd_event *event, const char *path,
                     struct prefetch_child *reader, model_loader_done done, void *userdata);
struct model_loader *model_loader_free(struct model_loader *l); /* waits for the thread */
void model_loader_freep(struct model_loader **l);
