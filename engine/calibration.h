/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * calibration: how fast the lanes of an engine are with its model: each alone, and both at once;
 * and whether the GPU is to compute with floats or with activations rounded to 8 bits, as the
 * processor does. It is done in turns, between which the engine serves others: a turn is one step
 * of each lane, a quarter of a second long where that is possible, and more only where one step of
 * a few rows takes longer, or where the GPU's driver compiles. All together it is some seconds.
 *
 * It has sessions of its own, whose tokens mean nothing, and takes pages of the pool for about 600
 * tokens, which whoever needs them can have back between two turns. Engine thread.
 */

#include <stdbool.h>

#include "base/error.h"
#include "engine/engine.h"
#include "engine/placement.h"

struct calibration_result {
    struct placement_rates rates;         /* 0: could not be measured */
    enum activation_type gpu_activations; /* the better ones */
};

struct calibration;

/*
 * Without a GPU's lane the processor's is measured. choose_activations: the lane may be taken away
 * and added again, with others; else they stay. 0, -ENOMEM
 */
int calibration_new(struct calibration **ret, struct engine *e, bool choose_activations);
struct calibration *calibration_free(struct calibration *c); /* before engine_free() */
void calibration_freep(struct calibration **c);

/*
 * No pass is under way, before and after. 1: there is more; 0: done; -ENODEV: the GPU has failed,
 * or could not be had again: err says why where engine_lane_failure() does not; -ENOTRECOVERABLE:
 * as engine_step(); -ENOBUFS, -ENOMEM: there is no memory for it
 */
int calibration_turn(struct calibration *c, struct error *err);

/* Between two turns: the pages that it has are free, and it goes on without. False: it had none. */
bool calibration_give_way(struct calibration *c);

/* Whether the GPU's activations are not given by the options, and so may be chosen. */
bool calibration_may_choose(const struct engine_options *o);

/* What is known so far. */
const struct calibration_result *calibration_result(const struct calibration *c);
