/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * config.json and generation_config.json (gemma3n.md §1). transformers leaves out of a nested
 * configuration what equals its class's default; where both sizes of the model agree on a value, it
 * may be missing here, the others must be written.
 */

#include "tools/import/hf-config.h"

#include <errno.h>
#include <math.h>
#include <string.h>

#include "base/checked.h"
#include "engine/json-text.h"

struct reader {
    json_object *text; /* the object that has the text model's fields */
    struct error *err;
};

static int wrong(const struct reader *r, const char *key, const char *what)
{
    return error_set(r->err, EINVAL, "%s %s", key, what);
}

/* null counts as missing. */
static json_object *get(const struct reader *r, const char *key)
{
    return json_text_get(r->text, key);
}

static int get_u32(const struct reader *r, const char *key, uint32_t *ret)
{
    uint64_t v;

    if (!json_text_u64(get(r, key), &v) || v > UINT32_MAX)
        return wrong(r, key, "is missing or not a whole number");
    *ret = (uint32_t)v;
    return 0;
}

static int get_u32_or(const struct reader *r, const char *key, uint32_t standard, uint32_t *ret)
{
    if (get(r, key))
        return get_u32(r, key, ret);
    *ret = standard;
    return 0;
}

static int get_float_or(const struct reader *r, const char *key, float standard, float *ret)
{
    *ret = standard;
    if (get(r, key) && !json_text_float(get(r, key), ret))
        return wrong(r, key, "is not a finite number");
    return 0;
}

/* A value that must be what the engine computes with, if it is there. */
static int need_bool(const struct reader *r, const char *key, bool needed)
{
    json_object *v = get(r, key);

    if (v && (!json_object_is_type(v, json_type_boolean) || json_object_get_boolean(v) != needed))
        return wrong(r, key,
                     needed ? "is not true, which cannot be run"
                            : "is not false, which cannot be run");
    return 0;
}

static int need_array(const struct reader *r, const char *key, uint32_t n)
{
    json_object *v = get(r, key);

    if (!json_object_is_type(v, json_type_array) || json_object_array_length(v) != n)
        return wrong(r, key, "is not an array with an element for each of num_hidden_layers");
    return 0;
}

static int read_ffn_widths(const struct reader *r, struct model_config *c)
{
    json_object *v = get(r, "intermediate_size");
    bool list = json_object_is_type(v, json_type_array);

    if (list && need_array(r, "intermediate_size", c->n_layers) < 0)
        return -EINVAL;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        uint64_t width;

        if (!json_text_u64(list ? json_object_array_get_idx(v, l) : v, &width) ||
            width > MODEL_MAX_WIDTH)
            return wrong(r, "intermediate_size", "is missing or not a width");
        c->layers[l].ffn_width = (uint32_t)width;
    }
    return 0;
}

static int read_layer_types(const struct reader *r, struct model_config *c)
{
    json_object *v = get(r, "layer_types");

    if (v && need_array(r, "layer_types", c->n_layers) < 0)
        return -EINVAL;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        const char *type = v ? json_text_string(json_object_array_get_idx(v, l)) : NULL;

        c->layers[l].sliding = l % 5 != 4;
        if (!v)
            continue;
        if (!type ||
            (strcmp(type, "sliding_attention") != 0 && strcmp(type, "full_attention") != 0))
            return wrong(r, "layer_types",
                         "has an element that is not sliding_attention or full_attention");
        c->layers[l].sliding = type[0] == 's';
    }
    return 0;
}

/* The z with P(N(0, 1) < z) = p, for p in (0.5, 1). */
static double normal_quantile(double p)
{
    double low = 0, high = 40;

    for (int i = 0; i < 200; i++) { /* bisection, to the last bit */
        double z = (low + high) / 2;

        if (erfc(z * M_SQRT1_2) > 2 * (1 - p))
            low = z;
        else
            high = z;
    }
    return low;
}

/*
 * z-score of a fraction. The reference computes it in f32, and for 0.95 its erfinv ends one unit
 * below the rounded value; GGUF files carry that number, and both sources shall give one model.
 */
static float sparsity_z(float fraction)
{
    return fraction == 0.95f ? 1.6448533535003662f : (float)normal_quantile((double)fraction);
}

static int read_sparsity(const struct reader *r, struct model_config *c)
{
    const char *key = "activation_sparsity_pattern";
    json_object *v = get(r, key);
    bool list = json_object_is_type(v, json_type_array);

    if (list && need_array(r, key, c->n_layers) < 0)
        return -EINVAL;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        float fraction;

        if (!json_text_float(list ? json_object_array_get_idx(v, l) : v, &fraction))
            return wrong(r, key, "is missing or has an element that is not a number");
        if (fraction != 0 && !(fraction > 0.5f && fraction < 1))
            return wrong(r, key, "has an element that is neither 0 nor between 0.5 and 1");
        c->layers[l].sparsity_z = fraction == 0 ? 0 : sparsity_z(fraction);
    }
    return 0;
}

/* The flat keys, or newer transformers' rope_parameters with an object for each kind of layer. */
static int read_rope(const struct reader *r, struct model_config *c)
{
    static const struct {
        const char *kind, *flat;
        float standard;
    } kinds[] = {
        {"full_attention", "rope_theta", 1e6f},
        {"sliding_attention", "rope_local_base_freq", 1e4f},
    };
    json_object *parameters = get(r, "rope_parameters");
    float *thetas[] = {&c->rope_theta, &c->rope_theta_sliding};

    if (get(r, "rope_scaling"))
        return wrong(r, "rope_scaling", "is set, which cannot be run");
    for (int i = 0; i < 2; i++) {
        json_object *of_kind = json_text_get(parameters, kinds[i].kind);
        const char *type = json_text_string(json_text_get(of_kind, "rope_type"));

        if (!parameters) {
            if (get_float_or(r, kinds[i].flat, kinds[i].standard, thetas[i]) < 0)
                return -EINVAL;
            continue;
        }
        if (!json_text_float(json_text_get(of_kind, "rope_theta"), thetas[i]))
            return error_set(r->err, EINVAL,
                             "rope_parameters.%s.rope_theta is missing or not a "
                             "number",
                             kinds[i].kind);
        if (type && strcmp(type, "default") != 0)
            return error_set(r->err, EINVAL,
                             "rope_parameters.%s.rope_type is '%s'; only 'default' "
                             "can be run",
                             kinds[i].kind, type);
    }
    return 0;
}

static int read_fields(const struct reader *r, struct model_config *c)
{
    const char *activation = json_text_string(get(r, "hidden_activation"));
    uint32_t active, shared;

    if (get_u32(r, "num_hidden_layers", &c->n_layers) < 0)
        return -EINVAL;
    if (c->n_layers < 1 || c->n_layers > MODEL_MAX_LAYERS)
        return wrong(r, "num_hidden_layers", "is out of range");
    if (get_u32(r, "hidden_size", &c->hidden) < 0 ||
        get_u32(r, "num_attention_heads", &c->n_heads) < 0 ||
        get_u32(r, "num_key_value_heads", &c->n_heads_kv) < 0 ||
        get_u32(r, "head_dim", &c->head_dim) < 0 ||
        get_u32(r, "num_kv_shared_layers", &shared) < 0 ||
        get_u32_or(r, "hidden_size_per_layer_input", 256, &c->ple_width) < 0 ||
        get_u32_or(r, "laurel_rank", 64, &c->laurel_rank) < 0 ||
        get_u32_or(r, "altup_num_inputs", 4, &c->n_streams) < 0 ||
        get_u32_or(r, "altup_active_idx", 0, &active) < 0 ||
        get_u32_or(r, "sliding_window", 512, &c->window) < 0 ||
        get_u32_or(r, "max_position_embeddings", 32768, &c->context_max) < 0 ||
        get_float_or(r, "rms_norm_eps", 1e-6f, &c->rms_eps) < 0 ||
        get_float_or(r, "altup_coef_clip", 120, &c->coef_clip) < 0 ||
        get_float_or(r, "final_logit_softcapping", 30, &c->softcap) < 0)
        return -EINVAL;
    if (json_object_object_get_ex(r->text, "final_logit_softcapping", NULL) &&
        !get(r, "final_logit_softcapping"))
        c->softcap = 0; /* null: none */
    if (shared >= c->n_layers)
        return wrong(r, "num_kv_shared_layers", "is not less than num_hidden_layers");
    c->n_layers_kv = c->n_layers - shared;
    if (active != 0)
        return wrong(r, "altup_active_idx", "is not 0, which cannot be run");
    if (activation && strcmp(activation, "gelu_pytorch_tanh") != 0)
        return wrong(r, "hidden_activation", "is not gelu_pytorch_tanh, which cannot be run");
    if (need_bool(r, "altup_correct_scale", true) < 0 ||
        need_bool(r, "attention_bias", false) < 0 || need_bool(r, "tie_word_embeddings", true) < 0)
        return -EINVAL;
    if (read_ffn_widths(r, c) < 0 || read_layer_types(r, c) < 0 || read_sparsity(r, c) < 0 ||
        read_rope(r, c) < 0)
        return -EINVAL;
    return 0;
}

/* One id or several. */
static int read_stop_ids(json_object *root, struct model_generation *g, struct error *err)
{
    json_object *v = json_text_get(root, "eos_token_id");
    bool list = json_object_is_type(v, json_type_array);
    size_t n = list ? json_object_array_length(v) : 1;

    if (!v)
        return 0;
    if (n > ARRAY_SIZE(g->stop_ids))
        return error_set(err, EINVAL, "eos_token_id has more than %zu ids",
                         ARRAY_SIZE(g->stop_ids));
    g->n_stop_ids = 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t id;

        if (!json_text_u64(list ? json_object_array_get_idx(v, i) : v, &id) || id > UINT32_MAX)
            return error_set(err, EINVAL, "eos_token_id is not an id or a list of ids");
        g->stop_ids[g->n_stop_ids++] = (uint32_t)id;
    }
    return 0;
}

int hf_config_read(struct model_config *ret, struct model_generation *generation, json_object *root,
                   struct error *err)
{
    struct reader r = {.text = json_text_get(root, "text_config"), .err = err};
    const char *type = json_text_string(json_text_get(root, "model_type"));

    if (!type || (strcmp(type, "gemma3n") != 0 && strcmp(type, "gemma3n_text") != 0))
        return error_set(err, EINVAL,
                         "model_type is not gemma3n or gemma3n_text, the only ones "
                         "that can be imported");
    if (!r.text)
        r.text = root;
    if (!json_object_is_type(r.text, json_type_object))
        return error_set(err, EINVAL, "text_config is not an object");
    if (read_fields(&r, ret) < 0)
        return -EINVAL;
    if (read_stop_ids(r.text, generation, err) < 0 || read_stop_ids(root, generation, err) < 0)
        return -EINVAL;
    return 0;
}

int hf_generation_read(struct model_generation *ret, json_object *root, struct error *err)
{
    struct reader r = {.text = root, .err = err};

    if (get_float_or(&r, "temperature", ret->temperature, &ret->temperature) < 0 ||
        get_float_or(&r, "top_p", ret->top_p, &ret->top_p) < 0 ||
        get_u32_or(&r, "top_k", ret->top_k, &ret->top_k) < 0)
        return -EINVAL;
    if (ret->temperature < 0)
        return error_set(err, EINVAL, "temperature is negative");
    if (!(ret->top_p > 0 && ret->top_p <= 1))
        return error_set(err, EINVAL, "top_p is not above 0 and at most 1");
    return read_stop_ids(root, ret, err);
}
