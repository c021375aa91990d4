/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The scalar fields stand in one table with their bounds; check, to_json and parse walk it, so
 * that a field cannot be written without being read and bounded.
 */

#include "engine/model-config.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/json-text.h"

enum kind {
    KIND_U32,
    KIND_FLOAT,
};

static const struct field {
    const char *name;
    size_t offset;
    enum kind kind;
    double min, max; /* inclusive */
} fields[] = {
#define U32(name, max)                                               \
    {                                                                \
#name, offsetof(struct model_config, name), KIND_U32, 1, max \
    }
#define FLOAT(name, min, max)                                            \
    {                                                                    \
#name, offsetof(struct model_config, name), KIND_FLOAT, min, max \
    }
    U32(vocab_size, MODEL_MAX_VOCAB),    U32(vocab_size_ple, MODEL_MAX_VOCAB),
    U32(n_layers, MODEL_MAX_LAYERS),     U32(n_layers_kv, MODEL_MAX_LAYERS),
    U32(hidden, MODEL_MAX_WIDTH),        U32(ple_width, MODEL_MAX_WIDTH),
    U32(laurel_rank, MODEL_MAX_WIDTH),   U32(n_streams, MODEL_MAX_STREAMS),
    U32(n_heads, MODEL_MAX_WIDTH),       U32(n_heads_kv, MODEL_MAX_WIDTH),
    U32(head_dim, MODEL_MAX_WIDTH),      U32(window, MODEL_MAX_WIDTH),
    U32(context_max, MODEL_MAX_CONTEXT), FLOAT(rms_eps, 0, 1),
    FLOAT(rope_theta, FLT_MIN, FLT_MAX), FLOAT(rope_theta_sliding, FLT_MIN, FLT_MAX),
    FLOAT(softcap, 0, FLT_MAX),          FLOAT(coef_clip, FLT_MIN, FLT_MAX),
#undef U32
#undef FLOAT
};

static const void *at(const struct model_config *c, const struct field *f)
{
    return (const char *)c + f->offset;
}

static int check_field(const struct model_config *c, const struct field *f, struct error *err)
{
    double v = f->kind == KIND_U32 ? *(const uint32_t *)at(c, f) : (double)*(const float *)at(c, f);

    if (!(v >= f->min && v <= f->max)) /* NaN is neither */
        return error_set(err, EINVAL, "%s: %g, must be %g to %g", f->name, v, f->min, f->max);
    return 0;
}

static int check_layer(const struct model_config *c, uint32_t l, struct error *err)
{
    const struct layer_config *layer = &c->layers[l];
    bool found = false;

    if (layer->ffn_width < 1 || layer->ffn_width > MODEL_MAX_WIDTH)
        return error_set(err, EINVAL, "layers[%u].ffn_width: %u, must be 1 to %u", l,
                         layer->ffn_width, MODEL_MAX_WIDTH);
    if (!(layer->sparsity_z >= 0 && layer->sparsity_z <= FLT_MAX))
        return error_set(err, EINVAL, "layers[%u].sparsity_z: %g, must be finite and at least 0", l,
                         (double)layer->sparsity_z);
    for (uint32_t i = 0; i < MIN(l + 1, c->n_layers_kv); i++)
        found = found || c->layers[i].sliding == layer->sliding;
    if (!found)
        return error_set(err, EINVAL,
                         "n_layers_kv: %u, but layer %u shares K and V and none of them is %s",
                         c->n_layers_kv, l, layer->sliding ? "sliding" : "full");
    return 0;
}

int model_config_check(const struct model_config *c, struct error *err)
{
    int r;

    for (size_t i = 0; i < ARRAY_SIZE(fields); i++) {
        r = check_field(c, &fields[i], err);
        if (r < 0)
            return r;
    }
    if (c->n_layers_kv > c->n_layers)
        return error_set(err, EINVAL, "n_layers_kv: %u of %u layers", c->n_layers_kv, c->n_layers);
    if (c->n_heads % c->n_heads_kv != 0)
        return error_set(err, EINVAL, "n_heads_kv: %u does not divide n_heads %u", c->n_heads_kv,
                         c->n_heads);
    if (c->head_dim % 2 != 0)
        return error_set(err, EINVAL, "head_dim: %u is odd", c->head_dim);
    if ((uint64_t)c->n_heads * c->head_dim > MODEL_MAX_WIDTH)
        return error_set(err, EINVAL, "n_heads * head_dim: %llu, must be at most %u",
                         (unsigned long long)c->n_heads * c->head_dim, MODEL_MAX_WIDTH);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        r = check_layer(c, l, err);
        if (r < 0)
            return r;
    }
    return 0;
}

uint32_t model_config_kv_source(const struct model_config *c, uint32_t l)
{
    if (l < c->n_layers_kv)
        return l;
    for (uint32_t i = c->n_layers_kv; i-- > 0;)
        if (c->layers[i].sliding == c->layers[l].sliding)
            return i;
    return l; /* model_config_check() has refused such a model */
}

/* Releases v if it cannot go in. */
static bool put(json_object *parent, const char *key, json_object *v)
{
    if (v && json_object_object_add(parent, key, v) == 0)
        return true;
    json_object_put(v);
    return false;
}

/* Nine digits tell every float from its neighbours. */
static json_object *new_float(float x)
{
    char text[32];

    snprintf(text, sizeof(text), "%.9g", (double)x);
    return json_object_new_double_s((double)x, text);
}

static bool put_layers(json_object *root, const struct model_config *c)
{
    CLEANUP(json_object_putp) json_object *layers = json_object_new_array();

    if (!layers)
        return false;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        CLEANUP(json_object_putp) json_object *layer = json_object_new_object();

        if (!layer || !put(layer, "ffn_width", json_object_new_int64(c->layers[l].ffn_width)) ||
            !put(layer, "sliding", json_object_new_boolean(c->layers[l].sliding)) ||
            !put(layer, "sparsity_z", new_float(c->layers[l].sparsity_z)) ||
            json_object_array_add(layers, layer) < 0)
            return false;
        layer = NULL; /* the array's now */
    }
    return put(root, "layers", TAKE_PTR(layers));
}

char *model_config_to_json(const struct model_config *c)
{
    CLEANUP(json_object_putp) json_object *root = json_object_new_object();
    const char *text;

    if (!root)
        return NULL;
    for (size_t i = 0; i < ARRAY_SIZE(fields); i++) {
        const struct field *f = &fields[i];

        if (!put(root, f->name,
                 f->kind == KIND_U32 ? json_object_new_int64(*(const uint32_t *)at(c, f))
                                     : new_float(*(const float *)at(c, f))))
            return NULL;
    }
    if (!put_layers(root, c))
        return NULL;
    text = json_object_to_json_string_ext(root, JSON_C_TO_STRING_PLAIN);
    return text ? strdup(text) : NULL;
}

static int parse_u32(json_object *v, uint32_t *ret)
{
    uint64_t u;

    if (!json_text_u64(v, &u) || u > UINT32_MAX)
        return -EINVAL;
    *ret = (uint32_t)u;
    return 0;
}

static int parse_layer(struct model_config *c, uint32_t l, json_object *layer, struct error *err)
{
    struct layer_config *ret = &c->layers[l];
    json_object *sliding = json_text_get(layer, "sliding");

    if (!json_object_is_type(layer, json_type_object) || json_object_object_length(layer) != 3)
        return error_set(err, EINVAL,
                         "layers[%u]: not an object of ffn_width, sliding and sparsity_z", l);
    if (parse_u32(json_text_get(layer, "ffn_width"), &ret->ffn_width) < 0)
        return error_set(err, EINVAL, "layers[%u].ffn_width: missing or not a count", l);
    if (!json_object_is_type(sliding, json_type_boolean))
        return error_set(err, EINVAL, "layers[%u].sliding: missing or not a boolean", l);
    ret->sliding = json_object_get_boolean(sliding);
    if (!json_text_float(json_text_get(layer, "sparsity_z"), &ret->sparsity_z))
        return error_set(err, EINVAL, "layers[%u].sparsity_z: missing or not a finite number", l);
    return 0;
}

int model_config_parse(struct model_config *ret, const char *json, struct error *err)
{
    static const struct json_limits limits = {.depth = 8, .max_values = 4 * MODEL_MAX_LAYERS + 64};
    CLEANUP(json_object_putp) json_object *root = NULL;
    CLEANUP(freep) struct model_config *c = calloc(1, sizeof(*c));
    json_object *layers;
    int r;

    if (!c)
        return error_set(err, ENOMEM, "out of memory");
    r = json_text_parse(&root, json, strlen(json), &limits, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < ARRAY_SIZE(fields); i++) {
        const struct field *f = &fields[i];
        json_object *v = json_text_get(root, f->name);
        void *field = (char *)c + f->offset;

        if (f->kind == KIND_U32 ? parse_u32(v, field) < 0 : !json_text_float(v, field))
            return error_set(err, EINVAL, "%s: missing or not a %s", f->name,
                             f->kind == KIND_U32 ? "count" : "finite number");
    }
    if ((size_t)json_object_object_length(root) != ARRAY_SIZE(fields) + 1) {
        json_object_object_foreach(root, key, value)
        {
            bool known = strcmp(key, "layers") == 0;

            (void)value;
            for (size_t i = 0; i < ARRAY_SIZE(fields); i++)
                known = known || strcmp(key, fields[i].name) == 0;
            if (!known)
                return error_set(err, EINVAL, "%s: not a field this program knows", key);
        }
    }
    layers = json_text_get(root, "layers");
    if (!json_object_is_type(layers, json_type_array))
        return error_set(err, EINVAL, "layers: missing or not an array");
    if (c->n_layers > MODEL_MAX_LAYERS || json_object_array_length(layers) != c->n_layers)
        return error_set(err, EINVAL, "layers: %zu entries, n_layers is %u (at most %u)",
                         json_object_array_length(layers), c->n_layers, MODEL_MAX_LAYERS);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        r = parse_layer(c, l, json_object_array_get_idx(layers, l), err);
        if (r < 0)
            return r;
    }
    r = model_config_check(c, err);
    if (r < 0)
        return r;
    *ret = *c;
    return 0;
}
