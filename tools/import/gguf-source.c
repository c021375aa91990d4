/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A GGUF file of architecture gemma3n as a source (gemma3n.md §2.3): metadata keys become the
 * configuration, tensors get their Hugging Face names. Stacked AltUp projections and a fused
 * attn_qkv are row ranges of one tensor, so their parts are simply entries with other offsets. An
 * unknown tensor is refused: a model that needs it would run, and run wrong.
 */

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"
#include "tools/import/source.h"

#define ARCHITECTURE "gemma3n"
#define KEY(name) ARCHITECTURE "." name

/* No keys exist for these; all published models have them. */
#define COEF_CLIP 120.0f
#define DEFAULT_THETA_SLIDING 10000.0f
#define DEFAULT_SOFTCAP 30.0f

static int missing(const struct gguf *g, const char *key, struct error *err)
{
    return error_set(err, EINVAL, "%s: metadata '%s' is missing", gguf_path(g), key);
}

/* A whole number; an array of equal ones, as newer converters write per layer, is one as well. */
static int get_u32(const struct gguf *g, const char *key, uint32_t *ret, struct error *err)
{
    const struct gguf_entry *e = gguf_find(g, key);
    uint32_t first, other;

    if (!e)
        return missing(g, key, err);
    if (gguf_get_u32(e, 0, &first) < 0)
        return error_set(err, EINVAL, "%s: metadata '%s' is not a whole number that fits 32 bits",
                         gguf_path(g), key);
    for (size_t i = 1; i < e->n; i++)
        if (gguf_get_u32(e, i, &other) < 0 || other != first)
            return error_set(err, EINVAL,
                             "%s: metadata '%s' differs between layers, which the "
                             "engine cannot run",
                             gguf_path(g), key);
    *ret = first;
    return 0;
}

static int get_float(const struct gguf *g, const char *key, float *ret, struct error *err)
{
    const struct gguf_entry *e = gguf_find(g, key);

    if (!e)
        return missing(g, key, err);
    if (e->is_array || gguf_get_float(e, 0, ret) < 0 || !isfinite(*ret))
        return error_set(err, EINVAL, "%s: metadata '%s' is not a finite number", gguf_path(g),
                         key);
    return 0;
}

static int get_float_or(const struct gguf *g, const char *key, float standard, float *ret,
                        struct error *err)
{
    if (gguf_find(g, key))
        return get_float(g, key, ret, err);
    *ret = standard;
    return 0;
}

/* The entry, with one element for each layer. */
static int get_per_layer(const struct gguf *g, const char *key, uint32_t n_layers,
                         const struct gguf_entry **ret, struct error *err)
{
    const struct gguf_entry *e = gguf_find(g, key);

    if (!e)
        return missing(g, key, err);
    if (!e->is_array || e->n != n_layers)
        return error_set(err, EINVAL,
                         "%s: metadata '%s' is not an array of %u elements, one for "
                         "each layer",
                         gguf_path(g), key, n_layers);
    *ret = e;
    return 0;
}

static int read_ffn_widths(const struct gguf *g, struct model_config *c, struct error *err)
{
    const char *key = KEY("feed_forward_length");
    const struct gguf_entry *e = gguf_find(g, key);
    int r;

    if (!e)
        return missing(g, key, err);
    if (e->is_array) {
        r = get_per_layer(g, key, c->n_layers, &e, err);
        if (r < 0)
            return r;
    }
    for (uint32_t l = 0; l < c->n_layers; l++)
        if (gguf_get_u32(e, e->is_array ? l : 0, &c->layers[l].ffn_width) < 0)
            return error_set(err, EINVAL, "%s: metadata '%s': element %u is not a width",
                             gguf_path(g), key, l);
    return 0;
}

static int read_sliding(const struct gguf *g, struct model_config *c, struct error *err)
{
    const char *key = KEY("attention.sliding_window_pattern");
    const struct gguf_entry *e = gguf_find(g, key);
    uint32_t period = 5;
    int r;

    if (e && !e->is_array && e->type != GGUF_BOOL) { /* every so manieth layer sees everything */
        r = get_u32(g, key, &period, err);
        if (r < 0)
            return r;
        if (period == 0)
            return error_set(err, EINVAL, "%s: metadata '%s' is 0", gguf_path(g), key);
        e = NULL;
    }
    if (e) {
        r = get_per_layer(g, key, c->n_layers, &e, err);
        if (r < 0)
            return r;
    }
    for (uint32_t l = 0; l < c->n_layers; l++) {
        c->layers[l].sliding = l % period != period - 1;
        if (e && gguf_get_bool(e, l, &c->layers[l].sliding) < 0)
            return error_set(err, EINVAL, "%s: metadata '%s' is not an array of truth values",
                             gguf_path(g), key);
    }
    return 0;
}

static int read_sparsity(const struct gguf *g, struct model_config *c, struct error *err)
{
    const char *key = KEY("activation_sparsity_scale");
    const struct gguf_entry *e;
    int r;

    r = get_per_layer(g, key, c->n_layers, &e, err);
    if (r < 0)
        return r;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        float z;

        if (gguf_get_float(e, l, &z) < 0)
            return error_set(err, EINVAL, "%s: metadata '%s' is not an array of numbers",
                             gguf_path(g), key);
        /* -inf and the lowest float both occur for "dense" */
        c->layers[l].sparsity_z = isfinite(z) && z > 0 ? z : 0;
    }
    return 0;
}

static int read_config(const struct gguf *g, struct model_config *c, struct error *err)
{
    const struct gguf_tensor *laurel;
    uint32_t active, shared = 0, value_length;
    const char *swa;
    int r;

    if ((r = get_u32(g, KEY("block_count"), &c->n_layers, err)) < 0)
        return r;
    if (c->n_layers < 1 || c->n_layers > MODEL_MAX_LAYERS)
        return error_set(err, EINVAL, "%s: metadata '%s' is %u, not 1 to %d", gguf_path(g),
                         KEY("block_count"), c->n_layers, MODEL_MAX_LAYERS);
    if ((r = get_u32(g, KEY("context_length"), &c->context_max, err)) < 0 ||
        (r = get_u32(g, KEY("embedding_length"), &c->hidden, err)) < 0 ||
        (r = get_u32(g, KEY("embedding_length_per_layer_input"), &c->ple_width, err)) < 0 ||
        (r = get_u32(g, KEY("attention.head_count"), &c->n_heads, err)) < 0 ||
        (r = get_u32(g, KEY("attention.head_count_kv"), &c->n_heads_kv, err)) < 0 ||
        (r = get_u32(g, KEY("attention.key_length"), &c->head_dim, err)) < 0 ||
        (r = get_u32(g, KEY("attention.sliding_window"), &c->window, err)) < 0 ||
        (r = get_u32(g, KEY("altup.num_inputs"), &c->n_streams, err)) < 0 ||
        (r = get_u32(g, KEY("altup.active_idx"), &active, err)) < 0)
        return r;
    value_length = c->head_dim;
    if (gguf_find(g, KEY("attention.value_length")) &&
        (r = get_u32(g, KEY("attention.value_length"), &value_length, err)) < 0)
        return r;
    if (value_length != c->head_dim)
        return error_set(err, EINVAL, "%s: metadata '%s' is %u, but keys have %u", gguf_path(g),
                         KEY("attention.value_length"), value_length, c->head_dim);
    if (c->n_streams < 2 || c->n_streams > MODEL_MAX_STREAMS)
        return error_set(err, EINVAL, "%s: metadata '%s' is %u, not 2 to %d", gguf_path(g),
                         KEY("altup.num_inputs"), c->n_streams, MODEL_MAX_STREAMS);
    if (c->head_dim < 1 || c->head_dim > MODEL_MAX_WIDTH)
        return error_set(err, EINVAL, "%s: metadata '%s' is %u, not 1 to %u", gguf_path(g),
                         KEY("attention.key_length"), c->head_dim, MODEL_MAX_WIDTH);
    if (active != 0)
        return error_set(err, EINVAL, "%s: metadata '%s' is %u; only 0 can be run", gguf_path(g),
                         KEY("altup.active_idx"), active);
    if (gguf_find(g, KEY("attention.shared_kv_layers")) &&
        (r = get_u32(g, KEY("attention.shared_kv_layers"), &shared, err)) < 0)
        return r;
    if (shared >= c->n_layers)
        return error_set(err, EINVAL, "%s: metadata '%s' is %u of %u layers", gguf_path(g),
                         KEY("attention.shared_kv_layers"), shared, c->n_layers);
    c->n_layers_kv = c->n_layers - shared;

    swa = gguf_find(g, KEY("rope.freq_base_swa")) ? KEY("rope.freq_base_swa")
                                                  : KEY("rope.freq_base_local");
    if ((r = get_float(g, KEY("attention.layer_norm_rms_epsilon"), &c->rms_eps, err)) < 0 ||
        (r = get_float(g, KEY("rope.freq_base"), &c->rope_theta, err)) < 0 ||
        (r = get_float_or(g, swa, DEFAULT_THETA_SLIDING, &c->rope_theta_sliding, err)) < 0 ||
        (r = get_float_or(g, KEY("final_logit_softcapping"), DEFAULT_SOFTCAP, &c->softcap, err)) <
            0)
        return r;
    c->coef_clip = COEF_CLIP;

    if ((r = read_ffn_widths(g, c, err)) < 0 || (r = read_sliding(g, c, err)) < 0 ||
        (r = read_sparsity(g, c, err)) < 0)
        return r;

    laurel = gguf_find_tensor(g, "blk.0.laurel_l.weight");
    if (!laurel || laurel->dims[1] > MODEL_MAX_WIDTH)
        return error_set(err, EINVAL, "%s: tensor 'blk.0.laurel_l.weight' is missing or too large",
                         gguf_path(g));
    c->laurel_rank = (uint32_t)laurel->dims[1];
    return 0;
}

static const struct {
    const char *gguf, *name;
} global_names[] =
    {
        {"token_embd.weight", "embed_tokens.weight"},
        {"per_layer_token_embd.weight", "embed_tokens_per_layer.weight"},
        {"per_layer_model_proj.weight", "per_layer_model_projection.weight"},
        {"per_layer_proj_norm.weight", "per_layer_projection_norm.weight"},
        {"output_norm.weight", "norm.weight"},
},
  layer_names[] = {
      {"attn_norm.weight", "input_layernorm.weight"},
      {"attn_q.weight", "self_attn.q_proj.weight"},
      {"attn_k.weight", "self_attn.k_proj.weight"},
      {"attn_v.weight", "self_attn.v_proj.weight"},
      {"attn_output.weight", "self_attn.o_proj.weight"},
      {"attn_q_norm.weight", "self_attn.q_norm.weight"},
      {"attn_k_norm.weight", "self_attn.k_norm.weight"},
      {"post_attention_norm.weight", "post_attention_layernorm.weight"},
      {"ffn_norm.weight", "pre_feedforward_layernorm.weight"},
      {"ffn_gate.weight", "mlp.gate_proj.weight"},
      {"ffn_up.weight", "mlp.up_proj.weight"},
      {"ffn_down.weight", "mlp.down_proj.weight"},
      {"post_ffw_norm.weight", "post_feedforward_layernorm.weight"},
      {"laurel_l.weight", "laurel.linear_left.weight"},
      {"laurel_r.weight", "laurel.linear_right.weight"},
      {"laurel_post_norm.weight", "laurel.post_laurel_norm.weight"},
      {"altup_router_norm.weight", "altup.router_norm.weight"},
      {"altup_router.weight", "altup.modality_router.weight"},
      {"altup_predict_coef.weight", "altup.prediction_coefs.weight"},
      {"altup_correct_coef.weight", "altup.correction_coefs.weight"},
      {"altup_correct_scale.weight", "altup.correct_output_scale"},
      {"inp_gate.weight", "per_layer_input_gate.weight"},
      {"proj.weight", "per_layer_projection.weight"},
      {"post_norm.weight", "post_per_layer_input_norm.weight"},
};

#define SHOW(s) (int)(s).n, (s).text /* tensor names have 64 bytes at most */

/* Rows [first, first + n) of t under a name of their own. */
static int add_rows(struct source *s, const char *name, const struct gguf_tensor *t, uint64_t first,
                    uint64_t n, struct error *err)
{
    /* fits: the whole tensor does */
    uint64_t row_bytes = t->dims[0] / gguf_block_values(t->type) * gguf_block_bytes(t->type);

    return source_add_tensor(s, name, 0, t->type, n, t->dims[0], t->offset + first * row_bytes,
                             err);
}

/* Stacks of n_streams - 1 projections: name.0.weight and so on. */
static int add_stack(struct source *s, const char *name, const struct gguf_tensor *t,
                     struct error *err)
{
    uint32_t n = s->config.n_streams - 1;

    if (t->dims[2] != n || t->dims[3] != 1)
        return error_set(err, EINVAL,
                         "%s: tensor '%.*s' has %llu matrices, not %u, one for each "
                         "AltUp stream but the first",
                         s->path, SHOW(t->name), (unsigned long long)t->dims[2], n);
    for (uint32_t i = 0; i < n; i++) {
        char part[64];
        int r;

        snprintf(part, sizeof(part), "%s.%u.weight", name, i);
        r = add_rows(s, part, t, i * t->dims[1], t->dims[1], err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int add_fused(struct source *s, uint32_t layer, const struct gguf_tensor *t,
                     struct error *err)
{
    const struct model_config *c = &s->config;
    uint64_t heads[] = {c->n_heads, c->n_heads_kv, c->n_heads_kv}, first = 0;

    if (t->dims[1] / c->head_dim != heads[0] + heads[1] + heads[2] || t->dims[1] % c->head_dim != 0)
        return error_set(err, EINVAL, "%s: tensor '%.*s' has %llu rows, not those of q, k and v",
                         s->path, SHOW(t->name), (unsigned long long)t->dims[1]);
    for (int i = 0; i < 3; i++) {
        char part[64];
        int r;

        snprintf(part, sizeof(part), "layers.%u.self_attn.%c_proj.weight", layer, "qkv"[i]);
        r = add_rows(s, part, t, first, heads[i] * c->head_dim, err);
        if (r < 0)
            return r;
        first += heads[i] * c->head_dim;
    }
    return 0;
}

static int add_tensor(struct source *s, const struct gguf_tensor *t, struct error *err)
{
    char text[65], name[128];
    const char *suffix;
    uint32_t layer = 0;

    /* A copy with an end; bytes 0 in a name only make it unknown. */
    memcpy(text, t->name.text, t->name.n);
    text[t->name.n] = 0;

    if (strcmp(text, "output.weight") == 0)
        return 0; /* the head is tied: a duplicate of token_embd */
    if (strcmp(text, "altup_proj.weight") == 0)
        return add_stack(s, "altup_projections", t, err);
    if (strcmp(text, "altup_unembd_proj.weight") == 0)
        return add_stack(s, "altup_unembed_projections", t, err);
    if (t->dims[2] != 1 || t->dims[3] != 1)
        return error_set(err, EINVAL, "%s: tensor '%s' has more than two dimensions", s->path,
                         text);
    for (size_t i = 0; i < ARRAY_SIZE(global_names); i++)
        if (strcmp(text, global_names[i].gguf) == 0)
            return add_rows(s, global_names[i].name, t, 0, t->dims[1], err);

    if (strncmp(text, "blk.", 4) != 0)
        goto unknown;
    suffix = text + 4;
    if (*suffix == '0' && suffix[1] != '.')
        goto unknown; /* blk.01 */
    while (*suffix >= '0' && *suffix <= '9' && layer < MODEL_MAX_LAYERS)
        layer = layer * 10 + (uint32_t)(*suffix++ - '0');
    if (suffix == text + 4 || *suffix++ != '.')
        goto unknown;
    if (layer >= s->config.n_layers)
        return error_set(err, EINVAL, "%s: tensor '%s' is beyond the %u layers", s->path, text,
                         s->config.n_layers);
    if (strcmp(suffix, "attn_qkv.weight") == 0)
        return add_fused(s, layer, t, err);
    for (size_t i = 0; i < ARRAY_SIZE(layer_names); i++)
        if (strcmp(suffix, layer_names[i].gguf) == 0) {
            snprintf(name, sizeof(name), "layers.%u.%s", layer, layer_names[i].name);
            return add_rows(s, name, t, 0, t->dims[1], err);
        }
unknown:
    return error_set(err, EINVAL, "%s: tensor '%s' is not one of a Gemma 3n model", s->path, text);
}

/* A copy of a text value, NULL if there is none or it is not text. */
static int copy_text(const struct gguf *g, const char *key, char **ret, struct error *err)
{
    const struct gguf_entry *e = gguf_find(g, key);
    struct gguf_string s;

    if (!e || gguf_get_string(e, &s) < 0 || s.n == 0 || !utf8_valid(s.text, s.n) ||
        memchr(s.text, 0, s.n))
        return 0;
    *ret = strndup(s.text, s.n);
    return *ret ? 0 : error_set(err, ENOMEM, "%s: out of memory", gguf_path(g));
}

int gguf_source_open(struct source **ret, const char *path, struct error *err)
{
    CLEANUP(source_freep) struct source *s = calloc(1, sizeof(*s));
    const struct gguf_entry *e;
    struct gguf_string architecture;
    uint64_t size;
    int fd, r;

    if (!s || !(s->path = strdup(path)))
        return error_set(err, ENOMEM, "%s: out of memory", path);
    s->format = "gguf";
    r = gguf_open(&s->gguf, path, err);
    if (r < 0)
        return r;
    e = gguf_find(s->gguf, "general.architecture");
    if (!e)
        return missing(s->gguf, "general.architecture", err);
    if (gguf_get_string(e, &architecture) < 0 || !gguf_string_is(architecture, ARCHITECTURE))
        return error_set(err, EINVAL,
                         "%s: general.architecture is not 'gemma3n', the only one "
                         "that can be imported",
                         path);
    r = read_config(s->gguf, &s->config, err);
    if (r < 0)
        return r;
    fd = fcntl(gguf_fd(s->gguf), F_DUPFD_CLOEXEC, 3);
    if (fd < 0)
        return error_set(err, errno, "%s: cannot duplicate a descriptor: %m", path);
    size = gguf_file_size(s->gguf);
    r = source_add_file(s, path, fd, size, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < gguf_n_tensors(s->gguf); i++) {
        r = add_tensor(s, gguf_tensor(s->gguf, i), err);
        if (r < 0)
            return r;
    }
    s->generation = SOURCE_GENERATION_DEFAULTS; /* GGUF files do not carry any */
    e = gguf_find(s->gguf, "tokenizer.ggml.eos_token_id");
    if (e && gguf_get_u32(e, 0, &s->generation.stop_ids[0]) == 0)
        s->generation.n_stop_ids = 1;
    if ((r = copy_text(s->gguf, "general.name", &s->model_name, err)) < 0 ||
        (r = copy_text(s->gguf, "general.license", &s->license, err)) < 0 ||
        (r = copy_text(s->gguf, "tokenizer.chat_template", &s->chat_template, err)) < 0)
        return r;
    r = source_finish(s, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(s);
    return 0;
}
