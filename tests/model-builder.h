/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Writes small models for tests: any configuration, weights from a hash, no outside data. The same
 * options give the same file.
 */

#include <stdbool.h>
#include <stdint.h>

#include "backends/weight.h"
#include "engine/model-config.h"

struct tokenizer_table;

struct model_builder {
    struct model_config config;
    enum weight_type type; /* of the matrices; f32 where the shape does not allow it */
    uint32_t seed;
    bool golden; /* gemma3n.md §12: its amplitudes; else a model whose activations stay near one */
    const char *scaled;  /* tensors whose name contains this are multiplied by `scale`; or NULL */
    float scale;
    const struct tokenizer_table *tokenizer; /* NULL: none; the model then takes only ids */
};

/*
 * A configuration with every feature in it: sliding and full layers 4:1, shared K and V, sparse
 * layers, four streams. window and n_layers_kv as asked for (n_layers_kv % 5 == 0).
 */
void model_builder_config(struct model_config *c, uint32_t n_layers, uint32_t n_layers_kv,
                          uint32_t window);

/* The micro-model of gemma3n.md §12. */
void model_builder_golden(struct model_builder *b);

/* Exits with a message on any failure: tests only. */
void model_builder_write(const struct model_builder *b, const char *path);
