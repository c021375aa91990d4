/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * model_config: the hyper-parameters of a Gemma 3n text model, as the model file's metadata carries
 * them ("llmd.config", docs/model-file.md). The importer fills one from config.json or GGUF keys,
 * the writer turns it into JSON, the daemon reads it back; nothing about E2B or E4B is compiled in.
 */

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

/* Bounds on what a file may ask for; generous, and small enough that products fit 64 bits. */
#define MODEL_MAX_LAYERS 256
#define MODEL_MAX_STREAMS 8
#define MODEL_MAX_WIDTH (1u << 20)   /* hidden, ffn, heads * head_dim, ple_width, window */
#define MODEL_MAX_VOCAB (1u << 24)
#define MODEL_MAX_CONTEXT (1u << 24)

struct layer_config {
    uint32_t ffn_width;
    bool sliding;     /* attends to the last `window` positions; else to all */
    float sparsity_z; /* Gaussian top-k: cut = mean + z * deviation; 0: dense */
};

struct model_config {
    uint32_t vocab_size;     /* rows of embed_tokens that carry pieces: ids < this are valid */
    uint32_t vocab_size_ple; /* rows of the per-layer-embedding table; other ids use row 0 */
    uint32_t n_layers;
    uint32_t n_layers_kv; /* the first so many layers own K and V; the others read theirs */
    uint32_t hidden;
    uint32_t ple_width;
    uint32_t laurel_rank;
    uint32_t n_streams; /* AltUp; the active one is stream 0 */
    uint32_t n_heads, n_heads_kv, head_dim;
    uint32_t window;      /* positions a sliding layer sees, its own included */
    uint32_t context_max; /* positions the model was trained for */
    float rms_eps;
    float rope_theta, rope_theta_sliding;
    float softcap;   /* final logits: c * tanh(x / c); 0: none */
    float coef_clip; /* AltUp coefficients are clipped to +-this once, at import */
    struct layer_config layers[MODEL_MAX_LAYERS];
};

/*
 * Whether the numbers make a model this engine can run (gemma3n.md §1.3): every value in its
 * bounds, finite, heads divisible, head_dim even, at least one KV-owning layer of each kind that a
 * sharing layer needs, sums and products within 64 bits.
 * 0 or -EINVAL with the field named in err
 */
int model_config_check(const struct model_config *c, struct error *err);

/* The layer whose K and V layer l reads: l itself, or the last owner of the same kind. */
uint32_t model_config_kv_source(const struct model_config *c, uint32_t l);

/*
 * As JSON text, and back. Parsing refuses unknown and missing keys, wrong types and anything
 * model_config_check() refuses.
 * to_json: a malloc'ed string or NULL (out of memory); parse: 0, -EINVAL, -ENOMEM
 */
char *model_config_to_json(const struct model_config *c);
int model_config_parse(struct model_config *ret, const char *json, struct error *err);
