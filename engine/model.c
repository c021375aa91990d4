/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Every role is looked up by its Hugging Face name and must have the shape that the configuration
 * gives and the layout that the forward pass reads; the element type is the file's choice. The f32
 * vectors are small, so they are looked through for NaN and infinity here, at the price of the
 * pages they lie on; large matrices are not touched. Tensors without a role are left alone.
 */

#include "engine/model.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/json-text.h"
#include "engine/model-file.h"
#include "engine/read-ahead.h"
#include "engine/tokenizer.h"

struct model {
    struct model_file *file;
    struct model_config config;
    struct model_weights weights;
    struct model_generation generation;
    struct tokenizer *tokenizer; /* or NULL */
};

static const char *const layer_format = "layers.%u.%s";
static const char *const embed_name = "embed_tokens.weight";
static const char *const ple_table_name = "embed_tokens_per_layer.weight";

static int no_memory(struct error *err)
{
    return error_set(err, ENOMEM, "out of memory");
}

static int check_finite(const struct model *m, const struct model_tensor *t, struct error *err)
{
    const float *x = t->weight.data;

    for (size_t i = 0; i < t->bytes / sizeof(*x); i++)
        if (!isfinite(x[i]))
            return error_set(err, EINVAL, "%s: tensor %s: element %zu is not a finite number",
                             model_file_path(m->file), t->name, i);
    return 0;
}

/* n_out_spare: how many rows more than n_out there may be. */
static int look_up(const struct model *m, struct weight *ret, enum weight_layout layout,
                   uint32_t n_out, uint32_t n_in, uint32_t n_out_spare, struct error *err,
                   const char *format, ...) __attribute__((format(printf, 8, 9)));

static int look_up(const struct model *m, struct weight *ret, enum weight_layout layout,
                   uint32_t n_out, uint32_t n_in, uint32_t n_out_spare, struct error *err,
                   const char *format, ...)
{
    const char *path = model_file_path(m->file);
    const struct model_tensor *t;
    const struct weight *w;
    char name[128];
    va_list ap;

    va_start(ap, format);
    vsnprintf(name, sizeof(name), format, ap);
    va_end(ap);
    t = model_file_find(m->file, name);
    if (!t)
        return error_set(err, EINVAL, "%s: tensor %s: missing", path, name);
    w = &t->weight;
    if (w->layout != layout)
        return error_set(err, EINVAL, "%s: tensor %s: its layout is %s, must be %s", path, name,
                         weight_layout_name(w->layout), weight_layout_name(layout));
    if (w->n_in != n_in || w->n_out < n_out || w->n_out - n_out > n_out_spare)
        return error_set(err, EINVAL, "%s: tensor %s: its shape is [%u, %u], must be [%u, %u]",
                         path, name, w->n_out, w->n_in, n_out, n_in);
    *ret = *w;
    return layout == LAYOUT_PLAIN ? check_finite(m, t, err) : 0;
}

/* One tensor of a layer. */
struct role {
    const char *name;
    size_t offset; /* in struct layer_weights */
    enum weight_layout layout;
    uint32_t n_out, n_in;
};

static int look_up_layer(struct model *m, uint32_t l, struct error *err)
{
    const struct model_config *c = &m->config;
    uint32_t hidden = c->hidden, head_dim = c->head_dim, ffn = c->layers[l].ffn_width;
    uint32_t q = c->n_heads * head_dim, kv = c->n_heads_kv * head_dim, n = c->n_streams;
    bool sparse = c->layers[l].sparsity_z > 0;
    enum weight_layout up = sparse ? LAYOUT_ROWS : LAYOUT_TILE16;
    enum weight_layout down = sparse ? LAYOUT_COLS : LAYOUT_TILE16;
    const enum weight_layout tile = LAYOUT_TILE16, plain = LAYOUT_PLAIN;

#define ROLE(member, name, layout, n_out, n_in)                           \
    {                                                                     \
        name, offsetof(struct layer_weights, member), layout, n_out, n_in \
    }
    const struct role owners[] = {
        ROLE(k, "self_attn.k_proj.weight", tile, kv, hidden),
        ROLE(v, "self_attn.v_proj.weight", tile, kv, hidden),
        ROLE(k_norm, "self_attn.k_norm.weight", plain, 1, head_dim),
    };
    const struct role all[] = {
        ROLE(input_norm, "input_layernorm.weight", plain, 1, hidden),
        ROLE(post_attention_norm, "post_attention_layernorm.weight", plain, 1, hidden),
        ROLE(pre_ffn_norm, "pre_feedforward_layernorm.weight", plain, 1, hidden),
        ROLE(post_ffn_norm, "post_feedforward_layernorm.weight", plain, 1, hidden),
        ROLE(post_ple_norm, "post_per_layer_input_norm.weight", plain, 1, hidden),
        ROLE(q, "self_attn.q_proj.weight", tile, q, hidden),
        ROLE(o, "self_attn.o_proj.weight", tile, hidden, q),
        ROLE(q_norm, "self_attn.q_norm.weight", plain, 1, head_dim),
        ROLE(gate, "mlp.gate_proj.weight", tile, ffn, hidden),
        ROLE(up, "mlp.up_proj.weight", up, ffn, hidden),
        ROLE(down, "mlp.down_proj.weight", down, hidden, ffn),
        ROLE(laurel_left, "laurel.linear_left.weight", tile, c->laurel_rank, hidden),
        ROLE(laurel_right, "laurel.linear_right.weight", tile, hidden, c->laurel_rank),
        ROLE(laurel_norm, "laurel.post_laurel_norm.weight", plain, 1, hidden),
        ROLE(router_norm, "altup.router_norm.weight", plain, 1, hidden),
        ROLE(router, "altup.modality_router.weight", plain, n, hidden),
        ROLE(predict_coefs, "altup.prediction_coefs.weight", plain, n * n, n),
        ROLE(correct_coefs, "altup.correction_coefs.weight", plain, n, n),
        ROLE(correct_scale, "altup.correct_output_scale", plain, 1, hidden),
        ROLE(ple_gate, "per_layer_input_gate.weight", tile, c->ple_width, hidden),
        ROLE(ple_proj, "per_layer_projection.weight", tile, hidden, c->ple_width),
    };
#undef ROLE
    const struct {
        const struct role *roles;
        size_t n;
    } groups[] = {{all, ARRAY_SIZE(all)}, {owners, l < c->n_layers_kv ? ARRAY_SIZE(owners) : 0}};

    for (size_t g = 0; g < ARRAY_SIZE(groups); g++)
        for (size_t i = 0; i < groups[g].n; i++) {
            const struct role *role = &groups[g].roles[i];
            struct weight *w = (struct weight *)((char *)&m->weights.layers[l] + role->offset);
            int r = look_up(m, w, role->layout, role->n_out, role->n_in, 0, err, layer_format, l,
                            role->name);

            if (r < 0)
                return r;
        }
    return 0;
}

static int look_up_all(struct model *m, struct error *err)
{
    const struct model_config *c = &m->config;
    struct model_weights *w = &m->weights;
    uint32_t hidden = c->hidden, ple = c->n_layers * c->ple_width; /* below 2^28 */
    int r;

    r = look_up(m, &w->ple_projection, LAYOUT_TILE16, ple, hidden, 0, err,
                "per_layer_model_projection.weight");
    if (r < 0)
        return r;
    r = look_up(m, &w->ple_projection_norm, LAYOUT_PLAIN, 1, c->ple_width, 0, err,
                "per_layer_projection_norm.weight");
    if (r < 0)
        return r;
    for (uint32_t k = 0; k + 1 < c->n_streams; k++) {
        r = look_up(m, &w->altup_projection[k], LAYOUT_TILE16, hidden, hidden, 0, err,
                    "altup_projections.%u.weight", k);
        if (r < 0)
            return r;
        r = look_up(m, &w->altup_unembed[k], LAYOUT_TILE16, hidden, hidden, 0, err,
                    "altup_unembed_projections.%u.weight", k);
        if (r < 0)
            return r;
    }
    for (uint32_t l = 0; l < c->n_layers; l++) {
        r = look_up_layer(m, l, err);
        if (r < 0)
            return r;
    }
    r = look_up(m, &w->final_norm, LAYOUT_PLAIN, 1, hidden, 0, err, "norm.weight");
    if (r < 0)
        return r;
    r = look_up(m, &w->embed, LAYOUT_TILE16, c->vocab_size, hidden, UINT32_MAX, err, embed_name);
    if (r < 0)
        return r;
    return look_up(m, &w->ple_embed, LAYOUT_ROWS, c->vocab_size_ple, ple, 0, err, "%s",
                   ple_table_name);
}

char *model_generation_to_json(const struct model_generation *g)
{
    char text[256];
    int n = snprintf(text, sizeof(text),
                     "{\"temperature\":%.9g,\"top_p\":%.9g,\"top_k\":%u,\"stop_ids\":[",
                     (double)g->temperature, (double)g->top_p, g->top_k);

    assert(g->n_stop_ids <= ARRAY_SIZE(g->stop_ids));
    for (uint32_t i = 0; i < g->n_stop_ids; i++)
        n += snprintf(text + n, sizeof(text) - (size_t)n, "%s%u", i ? "," : "", g->stop_ids[i]);
    snprintf(text + n, sizeof(text) - (size_t)n, "]}");
    return strdup(text);
}

int model_generation_parse(struct model_generation *ret, const char *json, uint32_t vocab_size,
                           struct error *err)
{
    static const struct json_limits limits = {.depth = 4, .max_values = 32};
    CLEANUP(json_object_putp) json_object *root = NULL;
    struct model_generation g = {0};
    json_object *stop_ids;
    uint64_t u;
    int r;

    r = json_text_parse(&root, json, strlen(json), &limits, err);
    if (r < 0)
        return r;
    if (!json_text_float(json_text_get(root, "temperature"), &g.temperature) || g.temperature < 0)
        return error_set(err, EINVAL, "temperature: missing or not a number of at least 0");
    if (!json_text_float(json_text_get(root, "top_p"), &g.top_p) || !(g.top_p > 0 && g.top_p <= 1))
        return error_set(err, EINVAL, "top_p: missing or not a number above 0, at most 1");
    if (!json_text_u64(json_text_get(root, "top_k"), &u) || u > UINT32_MAX)
        return error_set(err, EINVAL, "top_k: missing or not a count");
    g.top_k = (uint32_t)u;
    stop_ids = json_text_get(root, "stop_ids");
    if (!json_object_is_type(stop_ids, json_type_array) ||
        json_object_array_length(stop_ids) > ARRAY_SIZE(g.stop_ids))
        return error_set(err, EINVAL, "stop_ids: missing or not an array of at most %zu ids",
                         ARRAY_SIZE(g.stop_ids));
    for (size_t i = 0; i < json_object_array_length(stop_ids); i++) {
        if (!json_text_u64(json_object_array_get_idx(stop_ids, i), &u) || u >= vocab_size)
            return error_set(err, EINVAL, "stop_ids[%zu]: not an id below %u", i, vocab_size);
        g.stop_ids[g.n_stop_ids++] = (uint32_t)u;
    }
    if (json_object_object_length(root) != 4)
        return error_set(err, EINVAL, "a key this program does not know");
    *ret = g;
    return 0;
}

static int read_metadata(struct model *m, struct error *err)
{
    const char *path = model_file_path(m->file), *text;
    int r;

    text = model_file_metadata(m->file, "llmd.config");
    if (!text)
        return error_set(err, EINVAL, "%s: llmd.config: missing", path);
    r = model_config_parse(&m->config, text, err);
    if (r < 0)
        return error_prefix(err, -r, "%s: llmd.config", path);

    m->generation = (struct model_generation){.temperature = 1, .top_p = 1};
    text = model_file_metadata(m->file, "llmd.generation");
    if (text) {
        r = model_generation_parse(&m->generation, text, m->config.vocab_size, err);
        if (r < 0)
            return error_prefix(err, -r, "%s: llmd.generation", path);
    }
    return 0;
}

static int read_tokenizer(struct model *m, struct error *err)
{
    uint32_t n_pieces;
    int r;

    r = tokenizer_from_model_file(&m->tokenizer, m->file, err);
    if (r == -ENODATA)
        return 0;
    if (r < 0)
        return r;
    n_pieces = tokenizer_table(m->tokenizer)->n_pieces;
    if (n_pieces > m->config.vocab_size)
        return error_set(err, EINVAL, "%s: llmd.tokenizer: %u pieces, but vocab_size is %u",
                         model_file_path(m->file), n_pieces, m->config.vocab_size);
    return 0;
}

/* ---- reading ahead ---- */

/* Pieces of [begin, end) that are not the last one there is already. */
static void add_pieces(struct read_order *o, uint64_t begin, uint64_t end, uint64_t piece_bytes)
{
    for (uint64_t p = begin / piece_bytes; p * piece_bytes < end; p++)
        if (o->n_first == 0 || o->first[o->n_first - 1] < p)
            o->first[o->n_first++] = (uint32_t)p;
}

int model_read_order(struct read_order *ret, const struct model_file *f, uint64_t piece_bytes)
{
    const struct model_tensor *table = model_file_find(f, ple_table_name);
    const struct model_tensor *embed = model_file_find(f, embed_name);
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    struct read_order o;
    size_t size;

    model_file_map(f, &size);
    o = (struct read_order){.not_from = size, .not_to = size};
    if (table) {
        uint64_t from = ALIGN_UP(table->offset, page);
        uint64_t to = (table->offset + table->bytes) & ~(page - 1);

        if (from < to) {
            o.not_from = from;
            o.not_to = to;
        }
    }
    o.first = calloc(size / piece_bytes + 1, sizeof(*o.first));
    if (!o.first)
        return -ENOMEM;
    /* Tensors come in file order, and the vocabulary before them. */
    if (model_file_n_tensors(f) > 0)
        add_pieces(&o, 0, model_file_tensor(f, 0)->offset, piece_bytes);
    for (size_t i = 0; i < model_file_n_tensors(f); i++) {
        const struct model_tensor *t = model_file_tensor(f, i);

        if (t == embed || t->weight.layout == LAYOUT_PLAIN)
            add_pieces(&o, t->offset, t->offset + t->bytes, piece_bytes);
    }
    *ret = o;
    return 0;
}

void read_order_done(struct read_order *o)
{
    free(o->first);
    *o = (struct read_order){0};
}

/* Looking tensors up reads the small ones all over the file; how is said before. */
static void advise(const struct model *m)
{
    const struct model_tensor *table = model_file_find(m->file, ple_table_name);
    size_t size;
    const void *map = model_file_map(m->file, &size);

    read_ahead_in_huge_pages(map, size, table ? table->weight.data : NULL,
                             table ? table->bytes : 0);
}

int model_open_file(struct model **ret, struct model_file *f, struct error *err)
{
    CLEANUP(model_file_freep) struct model_file *file = f;
    CLEANUP(model_freep) struct model *m = calloc(1, sizeof(*m));
    int r;

    if (!m)
        return no_memory(err);
    m->file = TAKE_PTR(file);
    r = read_metadata(m, err);
    if (r < 0)
        return r;
    advise(m);
    r = look_up_all(m, err);
    if (r < 0)
        return r;
    r = read_tokenizer(m, err);
    if (!model_file_is_intact(m->file)) /* whatever was wrong with it then */
        return error_set(err, ENOTRECOVERABLE, "%s: the file changed while it was being opened",
                         model_file_path(m->file));
    if (r < 0)
        return r;
    *ret = TAKE_PTR(m);
    return 0;
}

int model_open(struct model **ret, const char *path, struct error *err)
{
    struct model_file *f;
    int r = model_file_open(&f, path, err);

    return r < 0 ? r : model_open_file(ret, f, err);
}

int model_open_fd(struct model **ret, int fd, const char *path, struct error *err)
{
    struct model_file *f;
    int r = model_file_open_fd(&f, fd, path, err);

    return r < 0 ? r : model_open_file(ret, f, err);
}

struct model *model_free(struct model *m)
{
    if (!m)
        return NULL;
    tokenizer_free(m->tokenizer);
    model_file_free(m->file);
    free(m);
    return NULL;
}

void model_freep(struct model **m)
{
    model_free(*m);
}

const struct model_config *model_config(const struct model *m)
{
    return &m->config;
}

const struct model_weights *model_weights(const struct model *m)
{
    return &m->weights;
}

const struct model_file *model_get_file(const struct model *m)
{
    return m->file;
}

const struct model_generation *model_generation(const struct model *m)
{
    return &m->generation;
}

const struct tokenizer *model_tokenizer(const struct model *m)
{
    return m->tokenizer;
}
