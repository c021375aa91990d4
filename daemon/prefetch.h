/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * prefetch: reads a model's pages into memory, in the order in which they are needed: by a process
 * with a ring (prefetch-child.h), or, front to back, by a thread. The table of per-layer
 * embeddings is left out: a row of it per token is read when it is wanted. Failing to read ahead
 * costs speed and nothing else. Loop thread.
 */

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>

#include "base/error.h"

struct model;
struct prefetch;
struct prefetch_child;

/* It has gone on, or is over. May free it. */
typedef void (*prefetch_handler)(void *userdata);

/*
 * m must outlive it. child, taken over in any case, has m's file open; NULL: a thread reads, which
 * also takes over from a child that cannot go on. 0, -errno
 */
int prefetch_new(struct prefetch **ret, sd_event *event, const struct model *m,
                 struct prefetch_child *child, prefetch_handler handler, void *userdata);
struct prefetch *prefetch_free(struct prefetch *p); /* stops it within one piece */
void prefetch_freep(struct prefetch **p);

double prefetch_progress(const struct prefetch *p); /* 0..1, never falls */
bool prefetch_is_over(const struct prefetch *p);    /* all is read, or it gave up */
