/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The list of tensors is one function that runs twice: first it announces them to the writer, then
 * it fills them.
 */

#include "tests/model-builder.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "tools/import/metadata.h"
#include "tools/import/model-writer.h"

struct build {
    const struct model_builder *options;
    struct model_writer *writer;
    bool filling;
};

static void check(int r, const struct error *err)
{
    if (r < 0) {
        fprintf(stderr, "model-builder: %s\n", err->text);
        exit(1);
    }
}

/* gemma3n.md §12: a value in [-1, 1) for element i of the tensor with this seed. */
static double hash_value(uint32_t seed, uint32_t i)
{
    uint32_t x = seed * 0x9E3779B1u + i * 0x85EBCA6Bu;

    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return 2 * ((x >> 8) / 16777216.0) - 1;
}

/* Round to the nearest step; good enough to have quantised values to compute with. */
static void quantize_row(const float *x, uint32_t n, int top, int8_t *q, uint16_t *d)
{
    for (uint32_t b = 0; b < n / WEIGHT_BLOCK; b++) {
        float most = 0, step;

        for (uint32_t i = 0; i < WEIGHT_BLOCK; i++)
            most = fmaxf(most, fabsf(x[b * WEIGHT_BLOCK + i]));
        d[b] = half_from_float(most / (float)top);
        step = half_to_float(d[b]);
        for (uint32_t i = 0; i < WEIGHT_BLOCK; i++) {
            float v = step > 0 ? rintf(x[b * WEIGHT_BLOCK + i] / step) : 0;

            q[b * WEIGHT_BLOCK + i] = (int8_t)fminf(fmaxf(v, (float)-top), (float)top);
        }
    }
}

static void tensor(struct build *b, enum weight_layout layout, uint32_t n_out, uint32_t n_in,
                   uint32_t seed, double amp, double bias, const char *format, ...)
    __attribute__((format(printf, 8, 9)));

static void tensor(struct build *b, enum weight_layout layout, uint32_t n_out, uint32_t n_in,
                   uint32_t seed, double amp, double bias, const char *format, ...)
{
    struct weight w = {.type = b->options->type, .layout = layout, .n_out = n_out, .n_in = n_in};
    struct error err = {""};
    char name[128];
    va_list ap;
    size_t bytes;

    va_start(ap, format);
    vsnprintf(name, sizeof(name), format, ap);
    va_end(ap);
    if (b->options->scaled && strstr(name, b->options->scaled)) {
        amp *= (double)b->options->scale;
        bias *= (double)b->options->scale;
    }
    if (layout == LAYOUT_PLAIN || !weight_supported(w.type, layout, n_out, n_in))
        w.type = WEIGHT_F32;
    if (!b->filling) {
        check(model_writer_add_tensor(b->writer, name, w.type, layout, n_out, n_in, &err), &err);
        return;
    }

    check(weight_size(w.type, layout, n_out, n_in, &bytes), &err);
    CLEANUP(freep) char *data = calloc(1, bytes);
    CLEANUP(freep) float *row = calloc(n_in, sizeof(*row));
    CLEANUP(freep) int8_t *q = calloc(n_in, 1);
    CLEANUP(freep) uint16_t *d = calloc(n_in / WEIGHT_BLOCK + 1, sizeof(*d));

    for (uint32_t r = 0; r < n_out; r++) {
        for (uint32_t k = 0; k < n_in; k++)
            row[k] = (float)(hash_value(seed + b->options->seed * 1000003u, r * n_in + k) * amp +
                             bias);
        if (weight_type_is_quantized(w.type)) {
            quantize_row(row, n_in, w.type == WEIGHT_Q4 ? 7 : 127, q, d);
            weight_put_row_q(&w, data, r, q, d);
        } else {
            weight_put_row(&w, data, r, row);
        }
    }
    check(model_writer_append(b->writer, data, bytes, &err), &err);
}

static void tensors(struct build *b)
{
    const struct model_config *c = &b->options->config;
    bool golden = b->options->golden;
    uint32_t H = c->hidden, P = c->ple_width, L = c->n_layers, R = c->laurel_rank;
    uint32_t A = c->n_streams, Q = c->n_heads * c->head_dim, KV = c->n_heads_kv * c->head_dim;
    /* Uniform in +-a has deviation a / sqrt(3). */
    double in_h = golden ? 0.25 : sqrt(3.0 / H), in_q = golden ? 0.25 : sqrt(3.0 / Q);
    double in_p = golden ? 0.25 : sqrt(3.0 / P), in_r = golden ? 0.25 : sqrt(3.0 / R);
    double post = golden ? 1 : 0.15, last = golden ? 1 : 25, amp = 0.25;

#define TENSOR(...) tensor(b, __VA_ARGS__)
#define VECTOR(n, seed, bias, ...)                                                                 \
    tensor(b, LAYOUT_PLAIN, 1, (n), (seed), amp *(bias), (bias), __VA_ARGS__)

    TENSOR(LAYOUT_TILE16, L * P, H, 3, in_h, 0, "per_layer_model_projection.weight");
    VECTOR(P, 4, 1, "per_layer_projection_norm.weight");
    for (uint32_t k = 0; k + 1 < A; k++)
        TENSOR(LAYOUT_TILE16, H, H, 5 + k, in_h, 0, "altup_projections.%u.weight", k);
    for (uint32_t l = 0; l < L; l++) {
        uint32_t B = 100 * (l + 1), F = c->layers[l].ffn_width;
        bool sparse = c->layers[l].sparsity_z > 0;
        double in_f = golden ? 0.25 : sqrt(3.0 / F);

        VECTOR(H, B + 17, 1, "layers.%u.altup.router_norm.weight", l);
        TENSOR(LAYOUT_PLAIN, A, H, B + 18, golden ? 8 : 40 * in_h, 0,
               "layers.%u.altup.modality_router.weight", l);
        TENSOR(LAYOUT_PLAIN, A * A, A, B + 19, golden ? 0.125 : 0.05, 0,
               "layers.%u.altup.prediction_coefs.weight", l);
        VECTOR(H, B + 0, 1, "layers.%u.input_layernorm.weight", l);
        if (l < c->n_layers_kv) {
            TENSOR(LAYOUT_TILE16, KV, H, B + 6, in_h, 0, "layers.%u.self_attn.k_proj.weight", l);
            TENSOR(LAYOUT_TILE16, KV, H, B + 7, in_h, 0, "layers.%u.self_attn.v_proj.weight", l);
            VECTOR(c->head_dim, B + 10, 1, "layers.%u.self_attn.k_norm.weight", l);
        }
        TENSOR(LAYOUT_TILE16, Q, H, B + 5, in_h, 0, "layers.%u.self_attn.q_proj.weight", l);
        VECTOR(c->head_dim, B + 9, 1, "layers.%u.self_attn.q_norm.weight", l);
        TENSOR(LAYOUT_TILE16, R, H, B + 14, in_h, 0, "layers.%u.laurel.linear_left.weight", l);
        TENSOR(LAYOUT_TILE16, H, R, B + 15, in_r, 0, "layers.%u.laurel.linear_right.weight", l);
        VECTOR(H, B + 16, post, "layers.%u.laurel.post_laurel_norm.weight", l);
        TENSOR(LAYOUT_TILE16, H, Q, B + 8, in_q, 0, "layers.%u.self_attn.o_proj.weight", l);
        VECTOR(H, B + 1, post, "layers.%u.post_attention_layernorm.weight", l);
        VECTOR(H, B + 2, 1, "layers.%u.pre_feedforward_layernorm.weight", l);
        TENSOR(LAYOUT_TILE16, F, H, B + 11, in_h, 0, "layers.%u.mlp.gate_proj.weight", l);
        TENSOR(sparse ? LAYOUT_ROWS : LAYOUT_TILE16, F, H, B + 12, in_h, 0,
               "layers.%u.mlp.up_proj.weight", l);
        TENSOR(sparse ? LAYOUT_COLS : LAYOUT_TILE16, H, F, B + 13, in_f, 0,
               "layers.%u.mlp.down_proj.weight", l);
        VECTOR(H, B + 3, post, "layers.%u.post_feedforward_layernorm.weight", l);
        TENSOR(LAYOUT_PLAIN, A, A, B + 20, golden ? 0.125 : 0.1, 0,
               "layers.%u.altup.correction_coefs.weight", l);
        VECTOR(H, B + 21, 1, "layers.%u.altup.correct_output_scale", l);
        TENSOR(LAYOUT_TILE16, P, H, B + 22, in_h, 0, "layers.%u.per_layer_input_gate.weight", l);
        TENSOR(LAYOUT_TILE16, H, P, B + 23, in_p, 0, "layers.%u.per_layer_projection.weight", l);
        VECTOR(H, B + 4, post, "layers.%u.post_per_layer_input_norm.weight", l);
    }
    for (uint32_t k = 0; k + 1 < A; k++)
        TENSOR(LAYOUT_TILE16, H, H, 8 + k, in_h, 0, "altup_unembed_projections.%u.weight", k);
    VECTOR(H, 11, last, "norm.weight");
    TENSOR(LAYOUT_TILE16, c->vocab_size, H, 1, in_h, 0, "embed_tokens.weight");
    TENSOR(LAYOUT_ROWS, c->vocab_size_ple, L * P, 2, in_p, 0, "embed_tokens_per_layer.weight");
}

void model_builder_config(struct model_config *c, uint32_t n_layers, uint32_t n_layers_kv,
                          uint32_t window)
{
    *c = (struct model_config){
        .vocab_size = 272,
        .vocab_size_ple = 256,
        .n_layers = n_layers,
        .n_layers_kv = n_layers_kv,
        .hidden = 64,
        .ple_width = 32,
        .laurel_rank = 16,
        .n_streams = 4,
        .n_heads = 4,
        .n_heads_kv = 2,
        .head_dim = 32,
        .window = window,
        .context_max = 8192,
        .rms_eps = 1e-6f,
        .rope_theta = 1e6f,
        .rope_theta_sliding = 1e4f,
        .softcap = 30,
        .coef_clip = 120,
    };
    for (uint32_t l = 0; l < n_layers; l++)
        c->layers[l] = (struct layer_config){
            .ffn_width = l < n_layers / 2 ? 128 : 96,
            .sliding = l % 5 != 4,
            .sparsity_z = l < 2 ? 1.6448533535f : 0,
        };
}

void model_builder_golden(struct model_builder *b)
{
    struct model_config *c = &b->config;

    *b = (struct model_builder){.type = WEIGHT_F32, .golden = true};
    model_builder_config(c, 10, 5, 3);
    c->vocab_size = 48;
    c->vocab_size_ple = 40;
    c->hidden = 24;
    c->ple_width = 6;
    c->laurel_rank = 5;
    c->head_dim = 8;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        c->layers[l].ffn_width = l < 5 ? 40 : 32;
        c->layers[l].sparsity_z = l < 3 ? 1.6448533535f : 0;
    }
}

void model_builder_write(const struct model_builder *options, const char *path)
{
    struct build b = {.options = options};
    struct error err = {""};
    CLEANUP(freep) char *config = model_config_to_json(&options->config);

    check(model_writer_new(&b.writer, path, &err), &err);
    check(model_writer_set(b.writer, "llmd.config", config, &err), &err);
    if (options->tokenizer) {
        CLEANUP(freep) char *text = NULL;

        check(foreign_tokenizer_metadata(options->tokenizer, &text), &err);
        check(model_writer_set(b.writer, "llmd.tokenizer", text, &err), &err);
        check(metadata_announce_tokenizer(b.writer, options->tokenizer, &err), &err);
    }
    tensors(&b);
    check(model_writer_begin(b.writer, &err), &err);
    if (options->tokenizer)
        check(metadata_append_tokenizer(b.writer, options->tokenizer, &err), &err);
    b.filling = true;
    tensors(&b);
    check(model_writer_commit(b.writer, &err), &err);
    model_writer_free(b.writer);
}
