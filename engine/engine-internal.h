/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What engine.c (options, lanes), step.c, session.c and forward.c (the model's arithmetic) share.
 */

#include "engine/engine.h"
#include "engine/kv-pool.h"
#include "engine/lane.h"
#include "engine/model.h"

struct engine {
    const struct model *model; /* outlives the engine */
    const struct model_config *config;
    const struct model_weights *weights;
    struct lane *lanes[ENGINE_LANES]; /* the processor's is always there */
    enum engine_lane home;
    struct vulkan_device *gpu; /* borrowed, or NULL */
    enum activation_type gpu_activations;
    enum activation_type first_gpu_activations; /* the options', which the pool is told of */
    struct backend *pool_backend; /* whose memory the pool's pages lie in, or NULL; the engine's */
    struct kv_pool *pool;
    struct backend_limits limits;
    uint32_t max_rows, max_logits;
    uint32_t widest; /* values in the widest row a matrix reads, padded to 64 */
    uint32_t n_sessions;
    double *inv_freq[2]; /* [head_dim / 2]: full, sliding */
    bool has_removed;    /* the GPU's lane went between engine_start() and engine_end() */
    int removed_result;  /* which then says this */
    char description[256];
};

/* engine_add_gpu() with a backend of the caller's choice; it is the engine's, on failure too. */
int engine_add_lane(struct engine *e, struct backend *b, struct error *err);

/*
 * gpu.c: what an engine wants of the device in its options, which is to be there.
 *
 * gpu_prepare(): from the start: its threads begin before this one keeps to a core, and where it
 * cannot see a memfd the pool is to lie in its memory, pool_backend's. Whatever fails here fails
 * again, and is told, in engine_add_gpu(). gpu_identify(): of the device, its driver and what it
 * computes with; 0, -ENOMEM
 */
void gpu_prepare(struct engine *e);
int gpu_identify(const struct engine *e, uint8_t ret[KV_IDENTITY]);
const char *gpu_name(const struct engine *e);

const char *activations_name(enum activation_type a);

/* Waits for the lane's pass, if there is one, and gives its results to the sessions. */
void engine_settle(struct engine *e, enum engine_lane lane);
