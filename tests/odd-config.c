/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tests/odd-config.h"

#include "base/error.h"

static uint32_t state = 1;

void odd_seed(uint32_t seed)
{
    state = seed;
}

uint32_t odd_random(void)
{
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

uint32_t odd_between(uint32_t least, uint32_t most)
{
    uint32_t n = 1 + odd_random() % (most - least + 1);

    return least + odd_random() % n;
}

static uint32_t one_of(const uint32_t *values, size_t n)
{
    return values[odd_random() % n];
}
#define ONE_OF(...) \
    one_of((const uint32_t[]){__VA_ARGS__}, sizeof((const uint32_t[]){__VA_ARGS__}) / 4)

static void make_config(struct model_builder *b, bool tame)
{
    struct model_config *c = &b->config;
    uint32_t least = tame ? 32 : 1;

    *b = (struct model_builder){.type = (enum weight_type)(odd_random() % 5), .seed = odd_random()};
    *c = (struct model_config){
        .vocab_size = odd_between(2, 70),
        .vocab_size_ple = odd_between(1, 70),
        .n_layers = odd_between(1, 6),
        .hidden = odd_random() % 2 ? ONE_OF(32, 64, 96) : odd_between(least, 80),
        .ple_width = odd_random() % 2 ? ONE_OF(32, 64) : odd_between(least, 48),
        .laurel_rank = odd_random() % 2 ? 32 : odd_between(least, 40),
        .n_streams = tame ? odd_between(1, 8) : ONE_OF(1, 2, 4, 8),
        .head_dim = 2 * (odd_random() % 2 ? ONE_OF(16, 32) : odd_between(tame ? 8 : 1, 40)),
        .window = odd_between(1, 2 * ODD_MOST_TOKENS),
        .context_max = odd_random() % 8 ? odd_between(1, 2 * ODD_MOST_TOKENS) : 1,
        .rms_eps = tame               ? 1e-6f
                   : odd_random() % 4 ? 1e-6f
                                      : 0,
        .rope_theta = tame || odd_random() % 4 ? 1e6f : 1e-38f,
        .rope_theta_sliding = 1e4f,
        .softcap = odd_random() % 4           ? 30
                   : tame || odd_random() % 2 ? 0
                                              : 1e-38f,
        .coef_clip = 120,
    };
    c->n_heads_kv = odd_between(1, 5);
    c->n_heads = c->n_heads_kv * odd_between(1, 5);
    c->n_layers_kv = odd_between(1, c->n_layers);
    for (uint32_t l = 0; l < c->n_layers; l++)
        c->layers[l] = (struct layer_config){
            .ffn_width = odd_random() % 2 ? ONE_OF(32, 64, 160) : odd_between(least, 150),
            .sliding = l < c->n_layers_kv ? odd_random() % 2
                                          : c->layers[odd_random() % c->n_layers_kv].sliding,
            .sparsity_z = odd_random() % 2 ? 0 : ONE_OF(1, 2),
        };
}

void odd_config(struct model_builder *b, bool tame)
{
    struct error err;

    do
        make_config(b, tame);
    while (model_config_check(&b->config, &err) < 0); /* an owner of a needed kind is missing */
}
