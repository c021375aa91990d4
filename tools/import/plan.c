/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Two tables name every tensor with its shape in terms of the configuration, in order of use. Each
 * row becomes an item: looked up in the source by the layer's number there, checked against the
 * source's shape, cut to the rows and columns that the sliced model keeps, and given a type.
 *
 * Types. Small things (norms, router, coefficients) are plain f32. Matrices take the wanted type;
 * without one, a GGUF's stay what they are. Sensitive matrices (altup, laurel, the per-layer
 * projection: few bytes, much harm) are not quantised by us: when q4 or q8 is wanted they keep 16
 * bits.
 */

#include "tools/import/plan.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "tools/import/dequantize.h"

enum dim {
    DIM_1,
    DIM_HIDDEN,
    DIM_PLE,
    DIM_LAYERS_PLE, /* n_layers * ple_width; cut by layer */
    DIM_RANK,
    DIM_Q,
    DIM_KV,
    DIM_HEAD,
    DIM_FFN, /* of the layer; cut to a prefix */
    DIM_STREAMS,
    DIM_STREAMS_2,
    DIM_VOCABULARY, /* whatever the source has */
    DIM_VOCABULARY_PLE,
};

enum role_class {
    SMALL,     /* f32 plain */
    MATRIX,    /* quantisable */
    SENSITIVE, /* not below 16 bits */
};

enum {
    OWNS_KV = 1,        /* only in layers that own K and V */
    CLIPPED = 2,        /* AltUp coefficients */
    SPARSE_ROWS = 4,    /* in sparse layers: rows */
    SPARSE_COLUMNS = 8, /* in sparse layers: cols */
    ROWS = 16,
    PER_STREAM = 32, /* one for each stream but the first */
};

struct role {
    const char *name; /* after "layers.N." for those of a layer */
    enum dim n_out, n_in;
    enum role_class class;
    unsigned flags;
};

/* Before the layers, of a layer, and after them: the order of the file. */
static const struct role first_roles[] = {
    {"per_layer_model_projection.weight", DIM_LAYERS_PLE, DIM_HIDDEN, SENSITIVE, 0},
    {"per_layer_projection_norm.weight", DIM_1, DIM_PLE, SMALL, 0},
    {"altup_projections.%u.weight", DIM_HIDDEN, DIM_HIDDEN, SENSITIVE, PER_STREAM},
};

static const struct role layer_roles[] = {
    {"altup.router_norm.weight", DIM_1, DIM_HIDDEN, SMALL, 0},
    {"altup.modality_router.weight", DIM_STREAMS, DIM_HIDDEN, SMALL, 0},
    {"altup.prediction_coefs.weight", DIM_STREAMS_2, DIM_STREAMS, SMALL, CLIPPED},
    {"input_layernorm.weight", DIM_1, DIM_HIDDEN, SMALL, 0},
    {"laurel.linear_left.weight", DIM_RANK, DIM_HIDDEN, SENSITIVE, 0},
    {"laurel.linear_right.weight", DIM_HIDDEN, DIM_RANK, SENSITIVE, 0},
    {"laurel.post_laurel_norm.weight", DIM_1, DIM_HIDDEN, SMALL, 0},
    {"self_attn.q_proj.weight", DIM_Q, DIM_HIDDEN, MATRIX, 0},
    {"self_attn.k_proj.weight", DIM_KV, DIM_HIDDEN, MATRIX, OWNS_KV},
    {"self_attn.v_proj.weight", DIM_KV, DIM_HIDDEN, MATRIX, OWNS_KV},
    {"self_attn.q_norm.weight", DIM_1, DIM_HEAD, SMALL, 0},
    {"self_attn.k_norm.weight", DIM_1, DIM_HEAD, SMALL, OWNS_KV},
    {"self_attn.o_proj.weight", DIM_HIDDEN, DIM_Q, MATRIX, 0},
    {"post_attention_layernorm.weight", DIM_1, DIM_HIDDEN, SMALL, 0},
    {"pre_feedforward_layernorm.weight", DIM_1, DIM_HIDDEN, SMALL, 0},
    {"mlp.gate_proj.weight", DIM_FFN, DIM_HIDDEN, MATRIX, 0},
    {"mlp.up_proj.weight", DIM_FFN, DIM_HIDDEN, MATRIX, SPARSE_ROWS},
    {"mlp.down_proj.weight", DIM_HIDDEN, DIM_FFN, MATRIX, SPARSE_COLUMNS},
    {"post_feedforward_layernorm.weight", DIM_1, DIM_HIDDEN, SMALL, 0},
    {"altup.correction_coefs.weight", DIM_STREAMS, DIM_STREAMS, SMALL, CLIPPED},
    {"altup.correct_output_scale", DIM_1, DIM_HIDDEN, SMALL, 0},
    {"per_layer_input_gate.weight", DIM_PLE, DIM_HIDDEN, MATRIX, 0},
    {"per_layer_projection.weight", DIM_HIDDEN, DIM_PLE, MATRIX, 0},
    {"post_per_layer_input_norm.weight", DIM_1, DIM_HIDDEN, SMALL, 0},
};

static const struct role last_roles[] = {
    {"altup_unembed_projections.%u.weight", DIM_HIDDEN, DIM_HIDDEN, SENSITIVE, PER_STREAM},
    {"norm.weight", DIM_1, DIM_HIDDEN, SMALL, 0},
    {"embed_tokens.weight", DIM_VOCABULARY, DIM_HIDDEN, MATRIX, 0},
    {"embed_tokens_per_layer.weight", DIM_VOCABULARY_PLE, DIM_LAYERS_PLE, MATRIX, ROWS},
};

struct planner {
    const struct source *source;
    const struct plan_options *options;
    struct plan *plan;
    uint32_t keep[MODEL_MAX_LAYERS]; /* the source's number of each layer of the plan */
};

/* Size of a dimension in a configuration; VOCABULARY is 0, any. */
static uint64_t dim_size(const struct model_config *c, uint32_t layer, enum dim d)
{
    switch (d) {
    case DIM_1:
        return 1;
    case DIM_HIDDEN:
        return c->hidden;
    case DIM_PLE:
        return c->ple_width;
    case DIM_LAYERS_PLE:
        return (uint64_t)c->n_layers * c->ple_width;
    case DIM_RANK:
        return c->laurel_rank;
    case DIM_Q:
        return (uint64_t)c->n_heads * c->head_dim;
    case DIM_KV:
        return (uint64_t)c->n_heads_kv * c->head_dim;
    case DIM_HEAD:
        return c->head_dim;
    case DIM_FFN:
        return c->layers[layer].ffn_width;
    case DIM_STREAMS:
        return c->n_streams;
    case DIM_STREAMS_2:
        return (uint64_t)c->n_streams * c->n_streams;
    case DIM_VOCABULARY:
    case DIM_VOCABULARY_PLE:
        return 0;
    }
    assert(false);
    return 0;
}

/* The ranges of a dimension that stay: one, or for DIM_LAYERS_PLE as few as the layers allow. */
static int choose_ranges(const struct planner *p, enum dim d, uint32_t size,
                         struct plan_range **ret, uint32_t *ret_n)
{
    uint32_t width = p->plan->config.ple_width, n = 0;
    struct plan_range *ranges;

    ranges = calloc(d == DIM_LAYERS_PLE ? p->plan->config.n_layers : 1, sizeof(*ranges));
    if (!ranges)
        return -ENOMEM;
    if (d != DIM_LAYERS_PLE) {
        ranges[n++] = (struct plan_range){0, size};
    } else {
        for (uint32_t l = 0; l < p->plan->config.n_layers; l++)
            if (n > 0 && ranges[n - 1].first + ranges[n - 1].n == p->keep[l] * width)
                ranges[n - 1].n += width;
            else
                ranges[n++] = (struct plan_range){p->keep[l] * width, width};
    }
    *ret = ranges;
    *ret_n = n;
    return 0;
}

/* The model file's type of what the source has. */
static enum weight_type own_type(enum gguf_tensor_type type)
{
    switch (type) {
    case GGUF_TENSOR_F32:
        return WEIGHT_F32;
    case GGUF_TENSOR_F16:
        return WEIGHT_F16;
    case GGUF_TENSOR_BF16:
        return WEIGHT_BF16;
    case GGUF_TENSOR_Q4_0:
    case GGUF_TENSOR_Q4_K:
        return WEIGHT_Q4;
    case GGUF_TENSOR_Q8_0:
    case GGUF_TENSOR_Q5_K:
    case GGUF_TENSOR_Q6_K:
        return WEIGHT_Q8;
    }
    assert(false);
    return WEIGHT_F32;
}

/* f16 for a tensor of f32 values if they fit, else bf16, whose range is that of f32. */
static int choose_16_bits(const struct planner *p, const struct source_tensor *t,
                          enum weight_type *ret, struct error *err)
{
    CLEANUP(freep) float *x = calloc(t->n_in, sizeof(*x));
    bool fits = true;

    if (!x)
        return error_set(err, ENOMEM, "%s: out of memory", p->source->path);
    for (uint32_t row = 0; row < t->n_out; row++) {
        int r = source_read(p->source, t, row, 1, x, err);

        if (r < 0)
            return r;
        for (uint32_t i = 0; i < t->n_in; i++)
            fits = fits && fabsf(x[i]) < 65520; /* from there on f16 rounds to infinity */
    }
    *ret = fits ? WEIGHT_F16 : WEIGHT_BF16;
    return 0;
}

static int choose_type(const struct planner *p, const struct role *role, struct plan_item *item,
                       struct error *err)
{
    const struct source_tensor *t = item->source;
    enum weight_type own = own_type(t->type), wanted;
    bool by_default = strcmp(p->source->format, "huggingface") == 0;
    int r;

    if (role->class == SMALL) {
        item->type = WEIGHT_F32;
        item->layout = LAYOUT_PLAIN;
        return 0;
    }
    wanted = p->options->has_type ? p->options->type : by_default ? WEIGHT_Q4 : own;
    item->type = wanted;
    if (role->class == SENSITIVE && weight_type_is_quantized(wanted)) {
        item->type = own;
        if (own == WEIGHT_F32) {
            r = choose_16_bits(p, t, &item->type, err);
            if (r < 0)
                return r;
        }
    }
    if (!weight_supported(item->type, item->layout, item->n_out, item->n_in)) {
        /* What the source has, exactly: of blocks, f16 could not hold every product. */
        item->type = source_is_quantized(t->type) ? WEIGHT_F32 : own;
        item->fallback = true;
    }
    return 0;
}

static enum conversion choose_conversion(const struct plan_item *item)
{
    enum gguf_tensor_type from = item->source->type;
    bool whole_blocks = true;

    for (uint32_t i = 0; i < item->n_columns; i++)
        whole_blocks = whole_blocks && item->columns[i].first % WEIGHT_BLOCK == 0 &&
                       item->columns[i].n % WEIGHT_BLOCK == 0;
    if (whole_blocks && item->clip == 0 &&
        ((item->type == WEIGHT_Q4 && from == GGUF_TENSOR_Q4_0) ||
         (item->type == WEIGHT_Q8 && (from == GGUF_TENSOR_Q8_0 || from == GGUF_TENSOR_Q4_0))))
        return CONVERT_QUANTS;
    if (item->clip == 0 && ((item->type == WEIGHT_F16 && from == GGUF_TENSOR_F16) ||
                            (item->type == WEIGHT_BF16 && from == GGUF_TENSOR_BF16)))
        return CONVERT_WORDS;
    return weight_type_is_quantized(item->type) ? CONVERT_QUANTIZE : CONVERT_FLOATS;
}

static int check_shape(const struct planner *p, const struct role *role, uint32_t layer,
                       const struct source_tensor *t, struct error *err)
{
    const struct model_config *c = &p->source->config;
    uint64_t n_out = dim_size(c, layer, role->n_out), n_in = dim_size(c, layer, role->n_in);

    /* Vectors and the transposed 1-wide matrix are told apart by n_out alone. */
    if ((n_out != 0 && t->n_out != n_out) || (n_in != 0 && t->n_in != n_in))
        return error_set(err, EINVAL,
                         "%s: tensor %s has shape [%u, %u], but by the configuration "
                         "it is [%llu, %llu]",
                         p->source->files[t->file].path, t->name, t->n_out, t->n_in,
                         (unsigned long long)(n_out ? n_out : t->n_out), (unsigned long long)n_in);
    if (t->n_out > MODEL_MAX_VOCAB)
        return error_set(err, EINVAL, "%s: tensor %s has %u rows; at most %u can be run",
                         p->source->files[t->file].path, t->name, t->n_out, MODEL_MAX_VOCAB);
    return 0;
}

/* layer: in the plan; for roles outside of layers 0. */
static int add_item(struct planner *p, const struct role *role, const char *name,
                    const char *source_name, uint32_t layer, struct error *err)
{
    const struct source_tensor *t = source_find(p->source, source_name);
    const struct model_config *c = &p->plan->config;
    struct plan_item *item = &p->plan->items[p->plan->n_items];
    uint64_t n_out, n_in, row_bytes;
    bool sparse = c->layers[layer].sparsity_z > 0;
    int r;

    if (!t)
        return error_set(err, EINVAL, "%s: tensor %s is missing", p->source->path, source_name);
    r = check_shape(p, role, p->keep[layer], t, err);
    if (r < 0)
        return r;
    item->name = strdup(name);
    if (!item->name)
        return error_set(err, ENOMEM, "%s: out of memory", p->source->path);
    p->plan->n_items++; /* plan_free() knows it now */
    item->source = t;
    n_out = dim_size(c, layer, role->n_out);
    n_in = dim_size(c, layer, role->n_in);
    if (role->n_out == DIM_VOCABULARY)
        n_out = t->n_out;
    if (role->n_out == DIM_VOCABULARY_PLE)
        n_out = c->vocab_size_ple;
    item->n_out = (uint32_t)n_out; /* no more than the source's, which fit */
    item->n_in = (uint32_t)n_in;
    item->layout = role->flags & ROWS || (role->flags & SPARSE_ROWS && sparse) ? LAYOUT_ROWS
                   : role->flags & SPARSE_COLUMNS && sparse                    ? LAYOUT_COLS
                                                                               : LAYOUT_TILE16;
    item->clip = role->flags & CLIPPED ? c->coef_clip : 0;
    if (choose_ranges(p, role->n_out, item->n_out, &item->rows, &item->n_rows) < 0 ||
        choose_ranges(p, role->n_in, item->n_in, &item->columns, &item->n_columns) < 0)
        return error_set(err, ENOMEM, "%s: out of memory", p->source->path);
    r = choose_type(p, role, item, err);
    if (r < 0)
        return r;
    item->conversion = choose_conversion(item);
    item->requantized = item->conversion == CONVERT_QUANTIZE && source_is_quantized(t->type);
    r = weight_size(item->type, item->layout, item->n_out, item->n_in, &item->bytes);
    if (r < 0)
        return error_set(err, -r, "%s: tensor %s cannot be stored as %s", p->source->path, name,
                         weight_type_name(item->type));
    row_bytes = t->row_bytes;
    if (ckd_add(&p->plan->bytes, p->plan->bytes, item->bytes) ||
        ckd_add(&p->plan->source_bytes, p->plan->source_bytes, row_bytes * item->n_out))
        return error_set(err, EOVERFLOW, "%s: the model is too large", p->source->path);
    return 0;
}

static int add_global(struct planner *p, const struct role *role, struct error *err)
{
    uint32_t n = role->flags & PER_STREAM ? p->plan->config.n_streams - 1 : 1;

    for (uint32_t i = 0; i < n; i++) {
        char name[64];
        const char *percent = strchr(role->name, '%');
        int r;

        if (percent)
            snprintf(name, sizeof(name), "%.*s%u%s", (int)(percent - role->name), role->name, i,
                     percent + 2);
        else
            snprintf(name, sizeof(name), "%s", role->name);
        r = add_item(p, role, name, name, 0, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int add_layer(struct planner *p, uint32_t layer, struct error *err)
{
    for (size_t i = 0; i < ARRAY_SIZE(layer_roles); i++) {
        const struct role *role = &layer_roles[i];
        char name[96], source_name[96];
        int r;

        /* K and V of layers that read another's are dead weight. */
        if (role->flags & OWNS_KV && layer >= p->plan->config.n_layers_kv)
            continue;
        snprintf(name, sizeof(name), "layers.%u.%s", layer, role->name);
        snprintf(source_name, sizeof(source_name), "layers.%u.%s", p->keep[layer], role->name);
        r = add_item(p, role, name, source_name, layer, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static bool role_has_name(const struct role *role, const char *name)
{
    const char *percent = strchr(role->name, '%');

    if (!percent)
        return strcmp(role->name, name) == 0;
    /* one digit: there are less than ten streams */
    return strncmp(role->name, name, (size_t)(percent - role->name)) == 0 &&
           name[percent - role->name] != 0 &&
           strcmp(percent + 2, name + (percent - role->name) + 1) == 0;
}

/* A tensor nobody here knows would be missing in the model, which would run, and run wrong. */
static int check_names(const struct source *s, struct error *err)
{
    static const struct {
        const struct role *roles;
        size_t n;
    } tables[] = {
        {first_roles, ARRAY_SIZE(first_roles)},
        {last_roles, ARRAY_SIZE(last_roles)},
        {layer_roles, ARRAY_SIZE(layer_roles)},
    };

    for (size_t i = 0; i < s->n_tensors; i++) {
        const struct source_tensor *t = &s->tensors[i];
        const char *name = t->name;
        bool known = false, of_layer = strncmp(name, "layers.", 7) == 0;
        size_t first = of_layer ? 2 : 0, end = of_layer ? 3 : 2;

        if (of_layer) {
            name = strchr(name + 7, '.');
            name = name ? name + 1 : "";
        }
        for (size_t table = first; table < end && !known; table++)
            for (size_t k = 0; k < tables[table].n; k++)
                known = known || role_has_name(&tables[table].roles[k], name);
        if (!known)
            return error_set(err, EINVAL, "%s: tensor %s is not one of a Gemma 3n model",
                             s->files[t->file].path, t->name);
    }
    return 0;
}

/* A number at *at, which moves behind it; false when there is none or it exceeds most. */
static bool take_number(const char **at, uint32_t most, uint32_t *ret)
{
    const char *p = *at;
    uint64_t v = 0;

    if (*p < '0' || *p > '9')
        return false;
    for (; *p >= '0' && *p <= '9'; p++) {
        v = v * 10 + (uint64_t)(*p - '0');
        if (v > most)
            return false;
    }
    *at = p;
    *ret = (uint32_t)v;
    return true;
}

/* "0-19,25-34": ascending, none twice. */
static int parse_layers(struct planner *p, const char *text, struct error *err)
{
    uint32_t n = 0, next = 0, n_source = p->source->config.n_layers;
    const char *at = text;

    for (;;) {
        uint32_t first, last;

        if (!take_number(&at, n_source - 1, &first))
            goto wrong;
        last = first;
        if (*at == '-') {
            at++;
            if (!take_number(&at, n_source - 1, &last))
                goto wrong;
        }
        if (first < next || last < first)
            goto wrong;
        for (uint32_t l = first; l <= last; l++)
            p->keep[n++] = l;
        next = last + 1;
        if (*at == 0)
            break;
        if (*at++ != ',')
            goto wrong;
    }
    p->plan->config.n_layers = n;
    return 0;
wrong:
    return error_set(err, EINVAL,
                     "--layers %s: not an ascending list of layers 0-%u such as "
                     "0-19,25-34",
                     text, n_source - 1);
}

/* "8192", or "16384x4,8192x26": a width for each kept layer. */
static int parse_ffn(struct planner *p, const char *text, struct error *err)
{
    struct model_config *c = &p->plan->config;
    const char *at = text;
    uint32_t n = 0, width = 0;

    for (;;) {
        uint32_t count = 1;
        bool counted;

        if (!take_number(&at, MODEL_MAX_WIDTH, &width) || width == 0)
            goto wrong;
        counted = *at == 'x';
        if (counted) {
            at++;
            if (!take_number(&at, MODEL_MAX_LAYERS, &count) || count == 0)
                goto wrong;
        }
        if (count > c->n_layers - n)
            return error_set(err, EINVAL, "--ffn %s: more widths than the %u layers that are kept",
                             text, c->n_layers);
        if (n == 0 && *at == 0 && !counted)
            count = c->n_layers; /* one for all */
        for (; count > 0; count--)
            c->layers[n++].ffn_width = width;
        if (*at == 0)
            break;
        if (*at++ != ',')
            goto wrong;
    }
    if (n != c->n_layers)
        return error_set(err, EINVAL, "--ffn %s: %u widths for the %u layers that are kept", text,
                         n, c->n_layers);
    return 0;
wrong:
    return error_set(err, EINVAL, "--ffn %s: not a list of widths such as 8192 or 16384x4,8192x26",
                     text);
}

static int slice(struct planner *p, struct error *err)
{
    const struct model_config *from = &p->source->config;
    const struct plan_options *o = p->options;
    struct model_config *c = &p->plan->config;
    const char *layers = o->layers, *ffn = o->ffn;
    int r;

    if (o->slice_e2b) {
        if (from->n_layers != 35 || from->n_layers_kv != 20)
            return error_set(err, EINVAL,
                             "%s: --slice e2b is for E4B, which has 35 layers, 20 of "
                             "them with K and V; this model has %u and %u",
                             p->source->path, from->n_layers, from->n_layers_kv);
        layers = "0-19,25-34";
        ffn = "8192";
    }
    for (uint32_t l = 0; l < from->n_layers; l++)
        p->keep[l] = l;
    if (layers) {
        r = parse_layers(p, layers, err);
        if (r < 0)
            return r;
    }
    c->n_layers_kv = 0;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        c->layers[l] = from->layers[p->keep[l]];
        c->n_layers_kv += p->keep[l] < from->n_layers_kv;
    }
    for (uint32_t l = c->n_layers; l < MODEL_MAX_LAYERS; l++)
        c->layers[l] = (struct layer_config){0};
    /* Who read K and V of one layer must find the same one, renumbered. */
    for (uint32_t l = c->n_layers_kv; l < c->n_layers; l++) {
        uint32_t wanted = model_config_kv_source(from, p->keep[l]);

        if (p->keep[model_config_kv_source(c, l)] != wanted)
            return error_set(err, EINVAL,
                             "--layers %s: layer %u must stay: others read its K and "
                             "V",
                             layers, wanted);
    }
    if (ffn) {
        r = parse_ffn(p, ffn, err);
        if (r < 0)
            return r;
    }
    for (uint32_t l = 0; l < c->n_layers; l++)
        if (c->layers[l].ffn_width > from->layers[p->keep[l]].ffn_width)
            return error_set(err, EINVAL,
                             "--ffn %s: layer %u has a width of %u, which cannot grow "
                             "to %u",
                             ffn, p->keep[l], from->layers[p->keep[l]].ffn_width,
                             c->layers[l].ffn_width);
    return 0;
}

int plan_new(struct plan **ret, const struct source *s, const struct plan_options *options,
             struct error *err)
{
    CLEANUP(plan_freep) struct plan *plan = calloc(1, sizeof(*plan));
    struct planner p = {.source = s, .options = options, .plan = plan};
    size_t most;
    int r;

    if (!plan)
        return error_set(err, ENOMEM, "%s: out of memory", s->path);
    r = model_config_check(&s->config, err);
    if (r < 0)
        return error_prefix(err, -r, "%s", s->path);
    r = check_names(s, err);
    if (r < 0)
        return r;
    plan->config = s->config;
    r = slice(&p, err);
    if (r < 0)
        return r;
    r = model_config_check(&plan->config, err);
    if (r < 0)
        return error_prefix(err, -r, "%s: after slicing", s->path);

    most = ARRAY_SIZE(first_roles) + ARRAY_SIZE(last_roles) + (size_t)2 * MODEL_MAX_STREAMS +
           (size_t)plan->config.n_layers * ARRAY_SIZE(layer_roles);
    plan->items = calloc(most, sizeof(*plan->items));
    if (!plan->items)
        return error_set(err, ENOMEM, "%s: out of memory", s->path);
    for (size_t i = 0; i < ARRAY_SIZE(first_roles); i++) {
        r = add_global(&p, &first_roles[i], err);
        if (r < 0)
            return r;
    }
    for (uint32_t l = 0; l < plan->config.n_layers; l++) {
        r = add_layer(&p, l, err);
        if (r < 0)
            return r;
    }
    for (size_t i = 0; i < ARRAY_SIZE(last_roles); i++) {
        r = add_global(&p, &last_roles[i], err);
        if (r < 0)
            return r;
    }
    *ret = TAKE_PTR(plan);
    return 0;
}

struct plan *plan_free(struct plan *p)
{
    if (!p)
        return NULL;
    for (size_t i = 0; i < p->n_items; i++) {
        free(p->items[i].name);
        free(p->items[i].rows);
        free(p->items[i].columns);
    }
    free(p->items);
    free(p);
    return NULL;
}

void plan_freep(struct plan **p)
{
    plan_free(*p);
}
