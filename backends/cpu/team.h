/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * team: threads that share the pieces of a job with whoever calls. team_run() is called by one
 * thread at a time; the others have no other use.
 */

#include <stdint.h>

struct cores;
struct team;

/* piece: 0 .. n_pieces - 1. thread: 0 is the caller, others up to team_n_threads() - 1. */
typedef void (*team_body)(const void *args, uint32_t piece, uint32_t thread);

#define TEAM_THREADS_MAX 4096u
#define TEAM_PIECES_MAX UINT16_MAX

/*
 * n_threads: the caller's own included; fewer when the system gives no more. 0, -ENOMEM
 */
int team_new(struct team **ret, uint32_t n_threads);
struct team *team_free(struct team *t); /* NULL is allowed */

/*
 * Gives each thread a core of its own as its affinity mask: with no more threads than cores all
 * hyper-threads of it, else one of them. The caller's thread gets its at the next job, and its old
 * mask back by team_free(), called by itself. More threads than CPUs, or a mask that the system
 * refuses: they stay as they are.
 */
void team_pin(struct team *t, const struct cores *cores);

uint32_t team_n_threads(const struct team *t);

/*
 * Runs body for each piece, each once, and returns when all are done. n_pieces at most
 * TEAM_PIECES_MAX.
 */
void team_run(struct team *t, uint32_t n_pieces, team_body body, const void *args);
