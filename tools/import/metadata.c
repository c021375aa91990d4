/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/import/metadata.h"

#include <errno.h>
#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"
#include "engine/json-text.h"

static int no_memory(struct error *err)
{
    return error_set(err, ENOMEM, "out of memory");
}

/* Releases v if it cannot go in. */
static bool put(json_object *parent, const char *key, json_object *v)
{
    if (v && json_object_object_add(parent, key, v) == 0)
        return true;
    json_object_put(v);
    return false;
}

static bool append(json_object *array, json_object *v)
{
    if (v && json_object_array_add(array, v) == 0)
        return true;
    json_object_put(v);
    return false;
}

static int set_json(struct model_writer *w, const char *key, json_object *v, struct error *err)
{
    const char *text =
        json_object_to_json_string_ext(v, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);

    return text ? model_writer_set(w, key, text, err) : no_memory(err);
}

static int set_config(struct model_writer *w, const struct plan *p, struct error *err)
{
    CLEANUP(freep) char *text = model_config_to_json(&p->config);

    return text ? model_writer_set(w, "llmd.config", text, err) : no_memory(err);
}

/* Adds id if it can be sampled at all and is not there yet. */
static void add_stop(struct model_generation *g, uint32_t id, uint32_t vocab_size)
{
    for (uint32_t i = 0; i < g->n_stop_ids; i++)
        if (g->stop_ids[i] == id)
            return;
    if (id < vocab_size && g->n_stop_ids < ARRAY_SIZE(g->stop_ids))
        g->stop_ids[g->n_stop_ids++] = id;
}

static int set_generation(struct model_writer *w, const struct source *s, const struct plan *p,
                          const struct tokenizer_table *table, struct error *err)
{
    struct model_generation g = s->generation;
    CLEANUP(freep) char *text = NULL;

    /* End of turn ends an answer even where the source names <eos> alone (gemma3n.md §7.2). */
    g.n_stop_ids = 0;
    if (table) {
        add_stop(&g, table->eos, p->config.vocab_size);
        add_stop(&g, table->end_of_turn, p->config.vocab_size);
    }
    for (uint32_t i = 0; i < s->generation.n_stop_ids; i++)
        add_stop(&g, s->generation.stop_ids[i], p->config.vocab_size);
    text = model_generation_to_json(&g);
    return text ? model_writer_set(w, "llmd.generation", text, err) : no_memory(err);
}

static int set_source(struct model_writer *w, const struct source *s, struct error *err)
{
    CLEANUP(json_object_putp) json_object *root = json_object_new_object();
    CLEANUP(freep) char *path = strdup(s->path);
    const char *name;

    if (!root || !path)
        return no_memory(err);
    /* Only the last part of the path: where it lay is nobody's business. */
    while (strlen(path) > 1 && path[strlen(path) - 1] == '/')
        path[strlen(path) - 1] = 0;
    name = strrchr(path, '/');
    name = name && name[1] ? name + 1 : path;
    if (!put(root, "format", json_object_new_string(s->format)) ||
        (utf8_valid(name, strlen(name)) && !put(root, "name", json_object_new_string(name))))
        return no_memory(err);
    return set_json(w, "llmd.source", root, err);
}

static int set_import(struct model_writer *w, const struct plan *p,
                      const struct plan_options *options, struct error *err)
{
    CLEANUP(json_object_putp) json_object *root = json_object_new_object();
    json_object *requantized;

    if (!root || !put(root, "program", json_object_new_string("llm-import " LLMD_VERSION)))
        return no_memory(err);
    if (options->has_type &&
        !put(root, "weights", json_object_new_string(weight_type_name(options->type))))
        return no_memory(err);
    if (options->slice_e2b && !put(root, "slice", json_object_new_string("e2b")))
        return no_memory(err);
    if (options->layers && !put(root, "layers", json_object_new_string(options->layers)))
        return no_memory(err);
    if (options->ffn && !put(root, "ffn", json_object_new_string(options->ffn)))
        return no_memory(err);
    requantized = json_object_new_array();
    if (!put(root, "requantized", requantized))
        return no_memory(err);
    for (size_t i = 0; i < p->n_items; i++)
        if (p->items[i].requantized &&
            !append(requantized, json_object_new_string(p->items[i].name)))
            return no_memory(err);
    return set_json(w, "llmd.import", root, err);
}

int metadata_set(struct model_writer *w, const struct source *s, const struct plan *p,
                 const struct plan_options *options, const struct tokenizer_table *table,
                 struct error *err)
{
    CLEANUP(freep) char *text = NULL;
    int r;

    if ((r = set_config(w, p, err)) < 0 || (r = set_generation(w, s, p, table, err)) < 0 ||
        (r = set_source(w, s, err)) < 0 || (r = set_import(w, p, options, err)) < 0)
        return r;
    if ((s->model_name && (r = model_writer_set(w, "llmd.name", s->model_name, err)) < 0) ||
        (s->license && (r = model_writer_set(w, "llmd.license", s->license, err)) < 0) ||
        (s->chat_template &&
         (r = model_writer_set(w, "llmd.chat_template", s->chat_template, err)) < 0))
        return r;
    if (!table)
        return 0;
    r = foreign_tokenizer_metadata(table, &text);
    if (r < 0)
        return no_memory(err);
    return model_writer_set(w, "llmd.tokenizer", text, err);
}

struct blob {
    const char *name;
    const void *data;
    size_t bytes;
};

static void get_blobs(const struct tokenizer_table *t, struct blob ret[4])
{
    ret[0] = (struct blob){"tokenizer.pieces", t->text, t->offsets[t->n_pieces]};
    ret[1] = (struct blob){"tokenizer.offsets", t->offsets,
                           ((size_t)t->n_pieces + 1) * sizeof(*t->offsets)};
    ret[2] = (struct blob){"tokenizer.scores", t->scores, t->n_pieces * sizeof(*t->scores)};
    ret[3] = (struct blob){"tokenizer.types", t->types, t->n_pieces * sizeof(*t->types)};
}

int metadata_announce_tokenizer(struct model_writer *w, const struct tokenizer_table *table,
                                struct error *err)
{
    struct blob blobs[4];

    get_blobs(table, blobs);
    for (int i = 0; i < 4; i++) {
        int r = model_writer_add_blob(w, blobs[i].name, blobs[i].bytes, err);

        if (r < 0)
            return r;
    }
    return 0;
}

int metadata_append_tokenizer(struct model_writer *w, const struct tokenizer_table *table,
                              struct error *err)
{
    struct blob blobs[4];

    get_blobs(table, blobs);
    for (int i = 0; i < 4; i++) {
        int r = model_writer_append(w, blobs[i].data, blobs[i].bytes, err);

        if (r < 0)
            return r;
    }
    return 0;
}
