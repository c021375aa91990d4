/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * prefetch: reads a model's pages into memory, front to back, which is the order in which they are
 * needed, in a thread of its own. The table of per-layer embeddings is left out: a row of it per
 * token is read when it is wanted. Failing to read ahead costs speed and nothing else.
 */

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct model;
struct prefetch;

/* m must outlive it. wake_fd: an eventfd that is written whenever there is progress. 0, -errno */
int prefetch_new(struct prefetch **ret, const struct model *m, int wake_fd);
struct prefetch *prefetch_free(struct prefetch *p); /* stops it within one piece */
void prefetch_freep(struct prefetch **p);

double prefetch_progress(const struct prefetch *p); /* 0..1; any thread */
bool prefetch_is_over(const struct prefetch *p);    /* all is read, or it gave up */
uint64_t prefetch_bytes(const struct prefetch *p);  /* that it reads in all */
