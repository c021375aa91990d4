/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The inside of a session, for the engine's own files and for tests that look into the cache.
 * Everybody else uses engine.h.
 *
 * The counts are kept twice, here and in the session's memory, for another process: they change
 * through the functions below, in an order that leaves a sound session whenever this process ends.
 */

#include "engine/engine.h"
#include "engine/kv-cache.h"
#include "engine/session-memory.h"

struct session_transfer;

struct session {
    struct engine *engine; /* outlives the session */
    uint32_t n_ctx;
    const uint32_t *tokens; /* [n_ctx], in memory */
    uint32_t n_tokens;
    uint32_t n_cached; /* tokens whose K and V are there: n_tokens, or fewer after a rewind that
                          lost a window or when they were dropped; steps compute the rest
                          before anything new */
    uint32_t mark;     /* or KV_NO_MARK */
    unsigned lanes;    /* session_lanes() */
    bool in_step;      /* already part of the step being built */
    struct lane *busy; /* whose pass under way it is in, or NULL */
    bool own_memory;   /* mapped here */
    struct kv_cache kv;
    struct session_memory memory;
    struct session_transfer *transfer; /* a spill under way, see session-spill.c; or NULL */
};

/* Puts n tokens behind those that count. */
void session_put_tokens(struct session *s, const uint32_t *tokens, uint32_t n);

/* Of what is put or computed: they count from now on. */
void session_add_tokens(struct session *s, uint32_t n);
void session_set_cached(struct session *s, uint32_t n);

/* Before what a lane computed counts. */
void session_add_lanes(struct session *s, unsigned lanes);

/* Before anything of it changes: a pass that it is in is waited for, and its results kept. */
void session_settle(struct session *s);

/* Before K and V or tokens change: a spill under way is of no use. */
void session_end_transfer(struct session *s);
