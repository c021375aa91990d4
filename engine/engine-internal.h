/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What engine.c (options, steps), session.c and forward.c (the model's arithmetic) share. */

#include "backends/backend.h"
#include "engine/engine.h"
#include "engine/kv-cache.h"
#include "engine/model.h"

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
    float *h, *pred;    /* [max_rows][n_streams][hidden] */
    float *x0;          /* [max_rows][hidden]: embedding; later the input of o, b, final norm */
    float *xn;          /* [max_rows][hidden] */
    float *laurel;      /* [max_rows][hidden] */
    float *s;           /* [max_rows][hidden] */
    float *t;           /* [max_rows][hidden]: what a matrix gives before its norm */
    float *rank;        /* [max_rows][laurel_rank] */
    float *q, *attn;    /* [max_rows][n_heads * head_dim] */
    float *k, *v;       /* [max_rows][n_heads_kv * head_dim] */
    float *gate, *up;   /* [max_rows][widest ffn, or n_layers * ple_width before layer 0]; up is
                           sparse_ffn()'s memory as well */
    float *ple;         /* [max_rows][n_layers * ple_width] */
    float *ple_gate;    /* [max_rows][ple_width] */
    float *rope[2];     /* [max_rows][head_dim]: full, sliding */
    int8_t *act_q;      /* [max_rows][widest, padded]: rounded activations */
    float *act_d;
    int32_t *act_sum;
    int8_t *act_low;    /* [max_rows][hidden, padded]: the second plane of fine activations */
    int32_t *act_sum_low;
    float *logits;      /* [max_logits][vocab_size] */
    struct forward_row *rows;   /* [max_rows] */
    struct kv_row *kv_rows;     /* [max_rows] */
    uint32_t *ids;              /* [max_rows] */
};

struct engine {
    const struct model *model; /* outlives the engine */
    const struct model_config *config;
    const struct model_weights *weights;
    struct backend *backend;
    struct kv_pool *pool;
    enum activation_type activations;
    uint32_t max_rows, max_logits;
    uint32_t widest; /* values in the widest row a matrix reads, padded to 64 */
    uint32_t n_sessions;
    bool is_under_way; /* between engine_start() and engine_end() */
    double *inv_freq[2]; /* [head_dim / 2]: full, sliding */
    void *scratch;       /* backend memory behind the buffers */
    size_t scratch_bytes;
    struct forward_buffers buf;
    char description[128];
};

/* Lays the buffers out in one backend allocation. 0, -ENOMEM, -EOVERFLOW */
int forward_init(struct engine *e);
void forward_done(struct engine *e);

/*
 * Evaluates e->buf.rows[0 .. n): writes their K and V, and the softcapped logits of wanted rows, in
 * row order, to e->buf.logits. Rows of one cache stand in order of position. 0, -ENODEV, or
 * -ENOTRECOVERABLE: the model's file has changed, and what was computed is worth nothing
 */
int forward(struct engine *e, uint32_t n);
