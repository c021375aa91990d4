/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-bench/traffic.h"

#include "base/checked.h"

static uint64_t size_of(const struct weight *w, uint32_t n_out)
{
    size_t bytes;

    if (!w->data || weight_size(w->type, w->layout, n_out, w->n_in, &bytes) < 0)
        return 0;
    return bytes;
}

static uint64_t whole(const struct weight *w)
{
    return size_of(w, w->n_out);
}

uint64_t traffic_weights(const struct model *m)
{
    const struct model_config *c = model_config(m);
    const struct model_weights *w = model_weights(m);
    uint64_t bytes = size_of(&w->embed, c->vocab_size); /* the head */

    bytes += whole(&w->ple_projection) + whole(&w->ple_projection_norm) + whole(&w->final_norm);
    for (uint32_t i = 0; i + 1 < c->n_streams; i++)
        bytes += whole(&w->altup_projection[i]) + whole(&w->altup_unembed[i]);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        const struct layer_weights *y = &w->layers[l];
        const struct weight *const all[] = {
            &y->input_norm,
            &y->post_attention_norm,
            &y->pre_ffn_norm,
            &y->post_ffn_norm,
            &y->post_ple_norm,
            &y->q,
            &y->k,
            &y->v,
            &y->o,
            &y->q_norm,
            &y->k_norm,
            &y->gate,
            &y->up,
            &y->down,
            &y->laurel_left,
            &y->laurel_right,
            &y->laurel_norm,
            &y->router_norm,
            &y->router,
            &y->predict_coefs,
            &y->correct_coefs,
            &y->correct_scale,
            &y->ple_gate,
            &y->ple_proj,
        };

        for (size_t i = 0; i < ARRAY_SIZE(all); i++)
            bytes += whole(all[i]);
    }
    return bytes;
}

uint64_t traffic_session(const struct model *m, uint32_t n_tokens, unsigned kv_element_bytes)
{
    const struct model_config *c = model_config(m);
    const struct model_weights *w = model_weights(m);
    uint64_t bytes = weight_row_bytes(w->ple_embed.type, w->ple_embed.n_in) +
                     weight_row_bytes(w->embed.type, w->embed.n_in);

    for (uint32_t l = 0; l < c->n_layers; l++)
        bytes += (uint64_t)2 * c->n_heads_kv * c->head_dim * kv_element_bytes *
                 (c->layers[l].sliding ? MIN(n_tokens, c->window) : n_tokens);
    return bytes;
}
