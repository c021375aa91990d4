/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * model: a model file with its tensors looked up by role and their shapes checked against the
 * configuration. Immutable, shared by all sessions, any thread.
 */

#include "backends/weight.h"
#include "base/error.h"
#include "engine/model-config.h"

struct model;
struct model_file;
struct tokenizer;
struct chat_template;

struct layer_weights {
    /* norms f32 plain [hidden] unless stated; a vector has n_out 1 */
    struct weight input_norm, post_attention_norm, pre_ffn_norm, post_ffn_norm, post_ple_norm;
    struct weight q, k, v, o;     /* k, v: only layers that own K and V */
    struct weight q_norm, k_norm; /* [head_dim] */
    struct weight gate, up, down;
    struct weight laurel_left, laurel_right, laurel_norm;
    struct weight router_norm, router;          /* [hidden], [n_streams][hidden] plain */
    struct weight predict_coefs, correct_coefs; /* [n^2][n], [n][n] plain, n = n_streams */
    struct weight correct_scale;                /* [hidden] */
    struct weight ple_gate, ple_proj;           /* [ple_width][hidden] and back */
};

struct model_weights {
    struct weight embed;                               /* [>= vocab_size][hidden] tile16 */
    struct weight ple_embed;                           /* [vocab_size_ple][L * ple_width] rows */
    struct weight ple_projection, ple_projection_norm; /* [L * ple_width][hidden], [ple_width] */
    struct weight altup_projection[MODEL_MAX_STREAMS - 1]; /* [hidden][hidden] */
    struct weight altup_unembed[MODEL_MAX_STREAMS - 1];    /* [hidden][hidden] */
    struct weight final_norm;                              /* [hidden] */
    struct layer_weights layers[MODEL_MAX_LAYERS];
};

/*
 * Generation defaults of the model family, from the file's metadata "llmd.generation"; without
 * that: temperature 1 and nothing else.
 */
struct model_generation {
    float temperature, top_p;
    uint32_t top_k;
    uint32_t n_stop_ids;
    uint32_t stop_ids[8]; /* end of generation: <eos>, <end_of_turn> */
};

/*
 * As JSON text, for the importer, and back; every id must be below vocab_size.
 * to_json: a malloc'ed string or NULL (out of memory); parse: 0, -EINVAL, -ENOMEM
 */
char *model_generation_to_json(const struct model_generation *g);
int model_generation_parse(struct model_generation *ret, const char *json, uint32_t vocab_size,
                           struct error *err);

/* 0, -errno, -EINVAL: err names file and field; -ENOTRECOVERABLE: the file changed meanwhile */
int model_open(struct model **ret, const char *path, struct error *err);
int model_open_fd(struct model **ret, int fd, const char *path, struct error *err);
int model_open_file(struct model **ret, struct model_file *f, struct error *err); /* takes f over */
struct model *model_free(struct model *m);
void model_freep(struct model **m);

const struct model_config *model_config(const struct model *m);
const struct model_weights *model_weights(const struct model *m);
const struct model_file *model_get_file(const struct model *m);
const struct model_generation *model_generation(const struct model *m);

/*
 * In which order a model's file is wanted in memory, in pieces of the same size: at first those of
 * which opening it touches a bit (the small tensors of all layers, the vocabulary) and those that
 * any token of a prompt may touch before the first layer (the embeddings), then front to back.
 * Never [not_from, not_to), the pages that the table of per-layer embeddings has to itself.
 */
struct read_order {
    uint64_t not_from, not_to; /* bytes; both the file's size where there is no such table */
    uint32_t *first;           /* [n_first] numbers of pieces, each once */
    size_t n_first;
};

/* 0, -ENOMEM */
int model_read_order(struct read_order *ret, const struct model_file *f, uint64_t piece_bytes);
void read_order_done(struct read_order *o);

/* NULL when the file carries none (a test model): such a model takes and gives only ids. */
const struct tokenizer *model_tokenizer(const struct model *m);
