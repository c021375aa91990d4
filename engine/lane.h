/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * lane: one backend at work for an engine, with the buffers of a pass of the model and the step
 * that is under way. What lies in the buffers is found by the backend at the same addresses in
 * every pass, so that passes may be kept and issued again (backends/backend.h). Engine thread.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backends/backend.h"
#include "engine/engine.h"
#include "engine/kv-cache.h"

/*
 * The rows of one pass of the model: up to max_rows tokens of one or many sessions, at most one
 * run of consecutive positions each.
 */
struct forward_row {
    uint32_t token, pos;
    const struct kv_cache *kv; /* borrowed from the row's session; pages reserved */
    bool wanted;               /* its logits are */
};

/* Activations of a pass, sized once by the engine's limits; names as in gemma3n.md §3. */
struct forward_buffers {
    float *h, *pred;  /* [max_rows][n_streams][hidden] */
    float *x0;        /* [max_rows][hidden]: embedding; later the input of o, b */
    float *xn;        /* [max_rows][hidden] */
    float *laurel;    /* [max_rows][hidden] */
    float *s;         /* [max_rows][hidden]; in the end what the head reads */
    float *t;         /* [max_rows][hidden]: what a matrix gives before its norm */
    float *rank;      /* [max_rows][laurel_rank] */
    float *q, *attn;  /* [max_rows][n_heads * head_dim] */
    float *k, *v;     /* [max_rows][n_heads_kv * head_dim] */
    float *gate, *up; /* [max_rows][widest ffn, or n_layers * ple_width before layer 0]; up is
                         sparse_ffn()'s memory as well */
    float *ple;       /* [max_rows][n_layers * ple_width] */
    float *ple_gate;  /* [max_rows][ple_width] */
    float *rope[2];   /* [max_rows][head_dim]: full, sliding */
    int8_t *act_q;    /* [max_rows][widest, padded]: rounded activations, in int8 mode */
    float *act_d;
    int32_t *act_sum;
    int8_t *act_low; /* [max_rows][hidden, padded]: the second plane of fine activations */
    int32_t *act_sum_low;
    float *logits;     /* [max_logits][vocab_size] */
    uint32_t *ids;     /* [max_rows]: tokens */
    uint32_t *ids_ple; /* [max_rows]: rows of the table of per-layer embeddings */

    /* Of the rows whose logits are wanted, where others are not. */
    uint32_t *wanted;      /* [max_logits]: which rows they are */
    float *ple_wanted;     /* [max_logits][n_layers * ple_width] */
    float *rope_wanted[2]; /* [max_logits][head_dim] */

    /* Of the process alone. */
    struct forward_row *rows;      /* [max_rows] */
    struct kv_row *kv_rows;        /* [n_layers_kv][max_rows] */
    struct kv_row *kv_rows_wanted; /* [n_layers_kv][max_logits] */
};

enum step_state {
    STEP_NONE,
    STEP_WORKS,   /* a pass is under way */
    STEP_SETTLED, /* its results are the sessions'; engine_end() has not been called */
};

struct lane {
    struct engine *engine;
    enum engine_lane id;
    struct backend *backend; /* what executes: see engine_set_backend() */
    struct backend *own;     /* freed with the lane */
    enum activation_type activations;
    bool maps;     /* the backend sees only what it was told of: weights but the table of per-layer
                      embeddings, whose rows the processor's lane brings, and pages of the pool */
    void *scratch; /* backend memory behind the buffers */
    size_t scratch_bytes;
    uint32_t max_rows;
    struct forward_buffers buf;
    char failure[192]; /* why it is of no use any more, where the backend does not know; or "" */

    enum step_state state;
    struct step_item *items; /* the step's, from engine_start() to engine_end() */
    size_t n_items;
    int result;        /* when settled */
    uint32_t n_wanted; /* of the last pass */
};

/*
 * The buffers; with `maps` the weights are mapped too. Takes b over, on failure as well. 0,
 * -ENOMEM, -EOVERFLOW, or what backend_map() says: err is set
 */
int lane_new(struct lane **ret, struct engine *e, enum engine_lane id, struct backend *b,
             enum activation_type activations, bool maps, struct error *err);

/* Returns NULL. No pass is under way. The backend goes too, unless the pool lies in its memory. */
struct lane *lane_free(struct lane *l);

/* The pages of the pool that may be in use are mapped. 0, -ENODEV: failure says why */
int lane_map_pages(struct lane *l);

/* NULL, or why every pass answers -ENODEV. */
const char *lane_failure(const struct lane *l);

/*
 * One pass: evaluates buf.rows[0 .. n), that is writes their K and V, and the softcapped logits of
 * wanted rows, in row order, to buf.logits. Rows of one cache stand in order of position. What the
 * rows refer to stays until forward_start() returns, but for pages: until forward_finish() does.
 *
 * forward_start(): 0: under way; -ENODEV
 * forward_finish(): waits. 0, -ENODEV, or -ENOTRECOVERABLE: the model's file has changed, and what
 * was computed is worth nothing
 * forward(): both
 */
int forward_start(struct lane *l, uint32_t n);
int forward_finish(struct lane *l);
int forward(struct lane *l, uint32_t n);

/* Lays the buffers out in one backend allocation. 0, -ENOMEM, -EOVERFLOW */
int forward_init(struct lane *l);
void forward_done(struct lane *l);
