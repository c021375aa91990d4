/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * timed_backend: a backend that gives every operation to another one, takes the time, and counts
 * what the operation cannot do without: bytes of weights and of K and V that must be read, and
 * multiplications and additions. An engine has it for one repetition, in which what it counts is
 * found (engine_set_backend()); the repetitions that are timed run without.
 */

#include "backends/backend.h"
#include "engine/model.h"

/* What time is spent on: matrix products by their role, then the rest. */
enum op_class {
    OP_Q,
    OP_K,
    OP_V,
    OP_O,
    OP_GATE,
    OP_UP,
    OP_DOWN,
    OP_SPARSE, /* up and down of layers with activation sparsity, between them the activation */
    OP_HEAD,
    OP_PLE,
    OP_LAUREL,
    OP_ALTUP,
    OP_ATTENTION,
    OP_MIXING,
    OP_NORMS,
    OP_ACTIVATION,
    OP_ROUNDING,
    OP_ROWS,
    OP_SOFTCAP,
    OP_SAMPLING, /* of the benchmark, not of a step */
    OP_REST,     /* of a step: between operations */
    N_OP_CLASSES,
};

const char *op_class_name(enum op_class c);

struct op_sum {
    double seconds;
    double bytes;
    double operations_int8, operations_f32; /* two for a multiplication and its addition */
};

struct timed_backend;

/* inner and m must outlive it. 0, -ENOMEM */
int timed_backend_new(struct timed_backend **ret, struct backend *inner, const struct model *m);
struct timed_backend *timed_backend_free(struct timed_backend *t);
void timed_backend_freep(struct timed_backend **t);

struct backend *timed_backend_base(struct timed_backend *t);

/*
 * Sums since the last call, [N_OP_CLASSES]; OP_SAMPLING is 0. Returns the seconds that counting
 * itself took meanwhile, which are in none of them.
 */
double timed_backend_take(struct timed_backend *t, struct op_sum *ret);
