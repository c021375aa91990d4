/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A good model opens with every role in its place; copies of it with one thing changed are refused
 * by the name of that thing.
 */

#undef NDEBUG
#include "engine/model.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/model-file.h"
#include "engine/tokenizer.h"
#include "tests/model-builder.h"
#include "tools/import/model-writer.h"

/* Replaced at link time: some two hundred copies are made, and none needs to survive a power cut.
 */
int __wrap_fsync(int fd);

int __wrap_fsync(int fd)
{
    (void)fd;
    return 0;
}

static char dir[] = "/tmp/test-model.XXXXXX";
static struct model_file *good;

/* What a copy has different. */
struct change {
    const char *tensor; /* the one meant by what follows */
    bool drop;
    enum weight_layout layout; /* with n_out > 0 */
    uint32_t n_out, n_in;      /* n_out 0: as it is */
    float poison;              /* the tensor's last element; 0: as it is */
    const char *key, *value;   /* of the metadata; value NULL: not there */
    uint32_t n_pieces;         /* of a tokenizer to put in; 0: none */
};

static void check(int r, const struct error *err)
{
    if (r < 0)
        fprintf(stderr, "unexpected: %s\n", err->text);
    assert(r == 0);
}

static bool meant(const struct change *change, const struct model_tensor *t)
{
    return change->tensor && strcmp(change->tensor, t->name) == 0;
}

static void add(struct model_writer *w, const struct change *change, const struct model_tensor *t)
{
    struct weight shape = t->weight;
    struct error err;

    if (meant(change, t) && change->drop)
        return;
    if (meant(change, t) && change->n_out > 0) {
        shape.type = WEIGHT_F32;
        shape.layout = change->layout;
        shape.n_out = change->n_out;
        shape.n_in = change->n_in;
    }
    check(model_writer_add_tensor(w, t->name, shape.type, shape.layout, shape.n_out, shape.n_in,
                                  &err),
          &err);
}

static void append(struct model_writer *w, const struct change *change,
                   const struct model_tensor *t)
{
    CLEANUP(freep) char *data = NULL;
    size_t bytes = t->bytes;
    struct error err;

    if (meant(change, t) && change->drop)
        return;
    if (meant(change, t) && change->n_out > 0) {
        check(weight_size(WEIGHT_F32, change->layout, change->n_out, change->n_in, &bytes), &err);
        data = calloc(1, bytes);
    } else {
        data = malloc(bytes);
        assert(data);
        memcpy(data, t->weight.data, bytes);
    }
    assert(data);
    if (meant(change, t) && change->poison != 0)
        memcpy(data + bytes - sizeof(float), &change->poison, sizeof(float));
    check(model_writer_append(w, data, bytes, &err), &err);
}

/* n pieces of two letters each. */
#define MAX_PIECES 400
static struct {
    char text[2 * MAX_PIECES];
    uint32_t offsets[MAX_PIECES + 1];
    float scores[MAX_PIECES];
    uint8_t types[MAX_PIECES];
} table;

static void make_table(void)
{
    for (uint32_t i = 0; i < MAX_PIECES; i++) {
        table.text[2 * i] = (char)('a' + i / 20);
        table.text[2 * i + 1] = (char)('a' + i % 20);
        table.offsets[i + 1] = 2 * (i + 1);
        table.scores[i] = -(float)i;
        table.types[i] = i == 0 ? PIECE_UNKNOWN : PIECE_NORMAL;
    }
}

static void put_tokenizer(struct model_writer *w, uint32_t n, bool announce)
{
    const struct {
        const char *name;
        const void *data;
        size_t bytes;
    } blobs[] = {{"tokenizer.pieces", table.text, 2 * n},
                 {"tokenizer.offsets", table.offsets, (n + 1) * sizeof(*table.offsets)},
                 {"tokenizer.scores", table.scores, n * sizeof(*table.scores)},
                 {"tokenizer.types", table.types, n}};
    struct error err;

    if (announce)
        check(model_writer_set(w, "llmd.tokenizer",
                               "{\"kind\":\"spm-bpe\",\"bos\":null,\"eos\":null,\"unk\":0,"
                               "\"pad\":null,\"start_of_turn\":null,\"end_of_turn\":null,"
                               "\"add_bos\":false,\"add_space_prefix\":false}",
                               &err),
              &err);
    for (size_t i = 0; i < ARRAY_SIZE(blobs); i++)
        check(announce ? model_writer_add_blob(w, blobs[i].name, blobs[i].bytes, &err)
                       : model_writer_append(w, blobs[i].data, blobs[i].bytes, &err),
              &err);
}

static void copy_model(const char *path, const struct change *change)
{
    static const char *const keys[] = {"llmd.config", "llmd.generation", "llmd.tokenizer"};
    CLEANUP(model_writer_freep) struct model_writer *w = NULL;
    struct error err;

    check(model_writer_new(&w, path, &err), &err);
    for (size_t i = 0; i < ARRAY_SIZE(keys); i++) {
        bool changed = change->key && strcmp(change->key, keys[i]) == 0;
        const char *value = changed ? change->value : model_file_metadata(good, keys[i]);

        if (value)
            check(model_writer_set(w, keys[i], value, &err), &err);
    }
    if (change->n_pieces > 0)
        put_tokenizer(w, change->n_pieces, /* announce= */ true);
    for (size_t i = 0; i < model_file_n_tensors(good); i++)
        add(w, change, model_file_tensor(good, i));
    check(model_writer_begin(w, &err), &err);
    if (change->n_pieces > 0)
        put_tokenizer(w, change->n_pieces, /* announce= */ false);
    for (size_t i = 0; i < model_file_n_tensors(good); i++)
        append(w, change, model_file_tensor(good, i));
    check(model_writer_commit(w, &err), &err);
}

static int open_copy(struct model **ret, const struct change *change, struct error *err)
{
    CLEANUP(freep) char *path = NULL;
    int r;

    assert(asprintf(&path, "%s/copy.llm", dir) > 0);
    copy_model(path, change);
    r = model_open(ret, path, err);
    unlink(path);
    return r;
}

static void accepted(const struct change *change)
{
    CLEANUP(model_freep) struct model *m = NULL;
    struct error err;

    check(open_copy(&m, change, &err), &err);
}

static void refused(const char *expected, const struct change *change)
{
    struct model *m = NULL;
    struct error err = {""};
    int r = open_copy(&m, change, &err);

    if (r != -EINVAL || m || !strstr(err.text, expected) || !strstr(err.text, "/copy.llm: ")) {
        fprintf(stderr, "expected \"%s\", got %d: %s\n", expected, r, err.text);
        abort();
    }
}

#define REFUSED(expected, ...) refused(expected, &(struct change){__VA_ARGS__})

static void test_good(const char *path)
{
    CLEANUP(model_freep) struct model *m = NULL;
    const struct model_config *c;
    const struct model_weights *w;
    struct error err;

    check(model_open_fd(&m, open(path, O_RDONLY | O_CLOEXEC), path, &err), &err);
    c = model_config(m);
    w = model_weights(m);
    assert(c->n_layers == 10 && c->n_layers_kv == 5 && c->hidden == 64);
    assert(!model_tokenizer(m));
    assert(strcmp(model_file_path(model_get_file(m)), path) == 0);
    assert(model_generation(m)->temperature == 1 && model_generation(m)->top_p == 1);
    assert(model_generation(m)->top_k == 0 && model_generation(m)->n_stop_ids == 0);

    /* Each role once, against its name. */
#define SAME(role, name) \
    assert((role).data &&model_file_find(model_get_file(m), name)->weight.data == (role).data)
    SAME(w->embed, "embed_tokens.weight");
    SAME(w->ple_embed, "embed_tokens_per_layer.weight");
    SAME(w->ple_projection, "per_layer_model_projection.weight");
    SAME(w->ple_projection_norm, "per_layer_projection_norm.weight");
    SAME(w->altup_projection[0], "altup_projections.0.weight");
    SAME(w->altup_projection[2], "altup_projections.2.weight");
    SAME(w->altup_unembed[0], "altup_unembed_projections.0.weight");
    SAME(w->altup_unembed[2], "altup_unembed_projections.2.weight");
    SAME(w->final_norm, "norm.weight");
    SAME(w->layers[3].input_norm, "layers.3.input_layernorm.weight");
    SAME(w->layers[3].post_attention_norm, "layers.3.post_attention_layernorm.weight");
    SAME(w->layers[3].pre_ffn_norm, "layers.3.pre_feedforward_layernorm.weight");
    SAME(w->layers[3].post_ffn_norm, "layers.3.post_feedforward_layernorm.weight");
    SAME(w->layers[3].post_ple_norm, "layers.3.post_per_layer_input_norm.weight");
    SAME(w->layers[3].q, "layers.3.self_attn.q_proj.weight");
    SAME(w->layers[3].k, "layers.3.self_attn.k_proj.weight");
    SAME(w->layers[3].v, "layers.3.self_attn.v_proj.weight");
    SAME(w->layers[3].o, "layers.3.self_attn.o_proj.weight");
    SAME(w->layers[3].q_norm, "layers.3.self_attn.q_norm.weight");
    SAME(w->layers[3].k_norm, "layers.3.self_attn.k_norm.weight");
    SAME(w->layers[3].gate, "layers.3.mlp.gate_proj.weight");
    SAME(w->layers[3].up, "layers.3.mlp.up_proj.weight");
    SAME(w->layers[3].down, "layers.3.mlp.down_proj.weight");
    SAME(w->layers[3].laurel_left, "layers.3.laurel.linear_left.weight");
    SAME(w->layers[3].laurel_right, "layers.3.laurel.linear_right.weight");
    SAME(w->layers[3].laurel_norm, "layers.3.laurel.post_laurel_norm.weight");
    SAME(w->layers[3].router_norm, "layers.3.altup.router_norm.weight");
    SAME(w->layers[3].router, "layers.3.altup.modality_router.weight");
    SAME(w->layers[3].predict_coefs, "layers.3.altup.prediction_coefs.weight");
    SAME(w->layers[3].correct_coefs, "layers.3.altup.correction_coefs.weight");
    SAME(w->layers[3].correct_scale, "layers.3.altup.correct_output_scale");
    SAME(w->layers[3].ple_gate, "layers.3.per_layer_input_gate.weight");
    SAME(w->layers[3].ple_proj, "layers.3.per_layer_projection.weight");
    assert(w->layers[0].up.layout == LAYOUT_ROWS && w->layers[0].down.layout == LAYOUT_COLS);
    assert(w->layers[3].up.layout == LAYOUT_TILE16 && w->layers[3].down.layout == LAYOUT_TILE16);
    assert(!w->layers[7].k.data && !w->layers[7].k_norm.data && w->layers[9].q.data);
    assert(!w->layers[10].q.data && !w->altup_projection[3].data);
}

/* The first layer in full, then, as they are alike, a fifth of the rest. */
static bool passed_over(size_t i)
{
    return i > 33 && i % 5 != 0;
}

/* Dropping any tensor must be told, whichever it is. */
static void test_each_is_needed(void)
{
    for (size_t i = 0; i < model_file_n_tensors(good); i++) {
        const struct model_tensor *t = model_file_tensor(good, i);
        CLEANUP(freep) char *expected = NULL;

        if (passed_over(i))
            continue;
        assert(asprintf(&expected, ": tensor %s: missing", t->name) > 0);
        REFUSED(expected, .tensor = t->name, .drop = true);
    }
}

/* And so any other shape or layout, and a poisoned last element of those that are looked through.
 */
static void test_each_is_checked(void)
{
    for (size_t i = 0; i < model_file_n_tensors(good); i++) {
        const struct model_tensor *t = model_file_tensor(good, i);
        const struct weight *w = &t->weight;
        bool plain = w->layout == LAYOUT_PLAIN;
        CLEANUP(freep) char *shape = NULL, *layout = NULL, *finite = NULL;

        if (passed_over(i))
            continue;
        assert(asprintf(&shape, ": tensor %s: its shape is", t->name) > 0);
        assert(asprintf(&layout, ": tensor %s: its layout is", t->name) > 0);
        assert(asprintf(&finite, ": tensor %s: element %zu is not", t->name, t->bytes / 4 - 1) > 0);
        REFUSED(shape, .tensor = t->name, .layout = w->layout, .n_out = w->n_out,
                .n_in = w->n_in + 1);
        if (strcmp(t->name, "embed_tokens.weight") != 0) /* may have rows to spare */
            REFUSED(shape, .tensor = t->name, .layout = w->layout, .n_out = w->n_out + 1,
                    .n_in = w->n_in);
        REFUSED(layout, .tensor = t->name,
                .layout = w->layout == LAYOUT_ROWS ? LAYOUT_COLS : LAYOUT_ROWS, .n_out = w->n_out,
                .n_in = w->n_in);
        if (plain) {
            REFUSED(finite, .tensor = t->name, .poison = NAN);
            REFUSED(finite, .tensor = t->name, .poison = -INFINITY);
        }
    }
    REFUSED("[271, 64], must be [272, 64]", .tensor = "embed_tokens.weight",
            .layout = LAYOUT_TILE16, .n_out = 271, .n_in = 64);
    accepted(&(struct change){
        .tensor = "embed_tokens.weight", .layout = LAYOUT_TILE16, .n_out = 300, .n_in = 64});
    /* The type is free: f32 for one of the quantised ones. */
    accepted(&(struct change){.tensor = "layers.3.self_attn.q_proj.weight",
                              .layout = LAYOUT_TILE16,
                              .n_out = 128,
                              .n_in = 64});
}

static void generation_refused(const char *value, const char *expected)
{
    REFUSED(expected, .key = "llmd.generation", .value = value);
    REFUSED(": llmd.generation: ", .key = "llmd.generation", .value = value);
}

static void test_metadata(void)
{
    const struct model_generation g = {
        .temperature = 0.7f, .top_p = 0.95f, .top_k = 64, .n_stop_ids = 2, .stop_ids = {1, 106}};
    CLEANUP(freep) char *json = model_generation_to_json(&g);
    CLEANUP(model_freep) struct model *m = NULL;
    struct error err;

    REFUSED(": llmd.config: missing", .key = "llmd.config");
    REFUSED(": llmd.config: vocab_size: missing", .key = "llmd.config", .value = "{}");

    check(open_copy(&m, &(struct change){.key = "llmd.generation", .value = json}, &err), &err);
    assert(memcmp(model_generation(m), &g, sizeof(g)) == 0);

    generation_refused("{}", "temperature");
    generation_refused("[]", "temperature");
    generation_refused("{\"temperature\":-1,\"top_p\":1,\"top_k\":0,\"stop_ids\":[]}",
                       "temperature");
    generation_refused("{\"temperature\":1,\"top_p\":0,\"top_k\":0,\"stop_ids\":[]}", "top_p");
    generation_refused("{\"temperature\":1,\"top_p\":1.5,\"top_k\":0,\"stop_ids\":[]}", "top_p");
    generation_refused("{\"temperature\":1,\"top_p\":1,\"top_k\":-1,\"stop_ids\":[]}", "top_k");
    generation_refused("{\"temperature\":1,\"top_p\":1,\"top_k\":0,\"stop_ids\":1}", "stop_ids");
    generation_refused("{\"temperature\":1,\"top_p\":1,\"top_k\":0,\"stop_ids\":[272]}",
                       "stop_ids[0]: not an id below 272");
    generation_refused("{\"temperature\":1,\"top_p\":1,\"top_k\":0,"
                       "\"stop_ids\":[1,2,3,4,5,6,7,8,9]}",
                       "at most 8 ids");
    generation_refused("{\"temperature\":1,\"top_p\":1,\"top_k\":0,\"stop_ids\":[],\"x\":1}",
                       "does not know");
}

static void test_tokenizer(void)
{
    CLEANUP(model_freep) struct model *m = NULL;
    struct error err;

    make_table();
    check(open_copy(&m, &(struct change){.n_pieces = 272}, &err), &err);
    assert(tokenizer_table(model_tokenizer(m))->n_pieces == 272);
    assert(tokenizer_find(model_tokenizer(m), "bc", 2) == 22);
    REFUSED(": llmd.tokenizer: 273 pieces, but vocab_size is 272", .n_pieces = 273);
    table.scores[5] = NAN;
    REFUSED(": ", .n_pieces = 272);
}

int main(void)
{
    static struct model_builder builder = {.type = WEIGHT_Q4};
    CLEANUP(freep) char *path = NULL;
    struct error err;
    struct model *m = NULL;

    assert(mkdtemp(dir));
    assert(asprintf(&path, "%s/good.llm", dir) > 0);
    model_builder_config(&builder.config, 10, 5, 16);
    model_builder_write(&builder, path);
    check(model_file_open(&good, path, &err), &err);

    test_good(path);
    accepted(&(struct change){0}); /* copying itself breaks nothing */
    test_each_is_needed();
    test_each_is_checked();
    test_metadata();
    test_tokenizer();
    assert(model_open(&m, "/nowhere", &err) == -ENOENT);

    model_file_free(good);
    unlink(path);
    assert(rmdir(dir) == 0);
    return 0;
}
