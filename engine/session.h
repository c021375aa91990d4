/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * The inside of a session, for the engine's own files and for tests that look into the cache.
 * Everybody else uses engine.h.
 */

#include "engine/engine.h"
#include "engine/kv-cache.h"

struct session {
    struct engine *engine; /* outlives the session */
    uint32_t n_ctx;
    uint32_t *tokens; /* [n_allocated] */
    uint32_t n_tokens, n_allocated;
    uint32_t n_cached; /* tokens whose K and V are there: n_tokens, or fewer after a rewind that
                          lost a window or when they were dropped; steps compute the rest
                          before anything new */
    uint32_t mark;     /* or KV_NO_MARK */
    bool in_step;      /* already part of the step being built */
    struct kv_cache kv;
};

/* Room for n tokens in all. 0 or -ENOMEM */
int session_grow(struct session *s, uint32_t n);
