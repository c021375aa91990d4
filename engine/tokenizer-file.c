/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The tokenizer of a model file: four blobs, and their few settings in the metadata
 * (docs/model-file.md). Here only their sizes are brought together; tokenizer_new() checks every
 * entry, of a copy: the entries are indexes into each other, so nobody may change them after that,
 * not even by writing to the file. It is some megabytes; weights, which are not copied, are numbers
 * and nothing else.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/json-text.h"
#include "engine/model-file.h"
#include "engine/tokenizer-private.h"

#define METADATA "llmd.tokenizer"

static int get_id(json_object *root, const char *key, const char *path, uint32_t *ret,
                  struct error *err)
{
    json_object *v;
    uint64_t id;

    if (!json_object_object_get_ex(root, key, &v))
        return error_set(err, EINVAL, "%s: " METADATA ": '%s' is missing", path, key);
    if (json_object_is_type(v, json_type_null)) {
        *ret = TOKENIZER_NONE;
        return 0;
    }
    if (!json_text_u64(v, &id) || id >= TOKENIZER_NONE)
        return error_set(err, EINVAL, "%s: " METADATA ": '%s' is neither an id nor null", path,
                         key);
    *ret = (uint32_t)id;
    return 0;
}

static int get_bool(json_object *root, const char *key, const char *path, bool *ret,
                    struct error *err)
{
    json_object *v = json_text_get(root, key);

    if (!json_object_is_type(v, json_type_boolean))
        return error_set(err, EINVAL, "%s: " METADATA ": '%s' is missing or not true or false",
                         path, key);
    *ret = json_object_get_boolean(v);
    return 0;
}

static int read_settings(struct tokenizer_table *table, const char *text, const char *path,
                         struct error *err)
{
    CLEANUP(json_object_putp) json_object *root = NULL;
    const char *kind;
    int r;

    r = json_text_parse(&root, text, strlen(text),
                        &(struct json_limits){.depth = 4, .max_values = 64}, err);
    if (r < 0)
        return error_prefix(err, -r, "%s: " METADATA, path);
    kind = json_text_string(json_text_get(root, "kind"));
    if (!kind || strcmp(kind, "spm-bpe") != 0)
        return error_set(err, EINVAL, "%s: " METADATA ": the only 'kind' known is 'spm-bpe'", path);
    if ((r = get_id(root, "bos", path, &table->bos, err)) < 0 ||
        (r = get_id(root, "eos", path, &table->eos, err)) < 0 ||
        (r = get_id(root, "unk", path, &table->unk, err)) < 0 ||
        (r = get_id(root, "pad", path, &table->pad, err)) < 0 ||
        (r = get_id(root, "start_of_turn", path, &table->start_of_turn, err)) < 0 ||
        (r = get_id(root, "end_of_turn", path, &table->end_of_turn, err)) < 0 ||
        (r = get_bool(root, "add_bos", path, &table->add_bos, err)) < 0)
        return r;
    return get_bool(root, "add_space_prefix", path, &table->add_space_prefix, err);
}

static int get_blob(const struct model_file *f, const char *name, size_t alignment,
                    const void **ret, size_t *ret_bytes, struct error *err)
{
    const void *data = model_file_blob(f, name, ret_bytes);

    if (!data)
        return error_set(err, EINVAL, "%s: has " METADATA ", but not '%s'", model_file_path(f),
                         name);
    if ((uintptr_t)data % alignment != 0)
        return error_set(err, EINVAL, "%s: '%s' is not aligned to %zu bytes", model_file_path(f),
                         name, alignment);
    *ret = data;
    return 0;
}

/* The arrays into one piece of memory, those of words first. */
static int copy_arrays(struct tokenizer_table *table, void **ret, size_t n_text, struct error *err)
{
    size_t n = table->n_pieces, n_words = (2 * n + 1) * sizeof(uint32_t), bytes;
    uint32_t *offsets;
    char *types;

    if (ckd_add(&bytes, n_words + n, n_text))
        return error_set(err, ENOMEM, "out of memory");
    offsets = malloc(bytes);
    if (!offsets)
        return error_set(err, ENOMEM, "out of memory");
    types = (char *)offsets + n_words;
    memcpy(offsets, table->offsets, (n + 1) * sizeof(*offsets));
    memcpy(offsets + n + 1, table->scores, n * sizeof(float));
    memcpy(types, table->types, n);
    if (n_text > 0)
        memcpy(types + n, table->text, n_text);
    table->offsets = offsets;
    table->scores = (const float *)(offsets + n + 1);
    table->types = (const uint8_t *)types;
    table->text = types + n;
    *ret = offsets;
    return 0;
}

int tokenizer_from_model_file(struct tokenizer **ret, const struct model_file *f, struct error *err)
{
    CLEANUP(freep) void *owned = NULL;
    const char *path = model_file_path(f), *settings = model_file_metadata(f, METADATA);
    size_t n_text, n_offsets, n_scores, n_types, want;
    const void *text, *offsets, *scores, *types;
    struct tokenizer_table table = {0};
    int r;

    if (!settings)
        return error_set(err, ENODATA, "%s: has no tokenizer", path);
    r = read_settings(&table, settings, path, err);
    if (r < 0)
        return r;
    if ((r = get_blob(f, "tokenizer.pieces", 1, &text, &n_text, err)) < 0 ||
        (r = get_blob(f, "tokenizer.offsets", sizeof(uint32_t), &offsets, &n_offsets, err)) < 0 ||
        (r = get_blob(f, "tokenizer.scores", sizeof(float), &scores, &n_scores, err)) < 0 ||
        (r = get_blob(f, "tokenizer.types", 1, &types, &n_types, err)) < 0)
        return r;
    if (n_types > PIECES_MAX)
        return error_set(err, EINVAL,
                         "%s: 'tokenizer.types' has %zu entries, at most %u are "
                         "possible",
                         path, n_types, PIECES_MAX);
    table.n_pieces = (uint32_t)n_types;
    table.text = text;
    table.offsets = offsets;
    table.scores = scores;
    table.types = types;
    if (ckd_mul(&want, n_types, sizeof(float)) || n_scores != want)
        return error_set(err, EINVAL, "%s: 'tokenizer.scores' has %zu bytes, %zu pieces need %zu",
                         path, n_scores, n_types, want);
    if (ckd_add(&want, want, sizeof(uint32_t)) || n_offsets != want)
        return error_set(err, EINVAL, "%s: 'tokenizer.offsets' has %zu bytes, %zu pieces need %zu",
                         path, n_offsets, n_types, want);
    r = copy_arrays(&table, &owned, n_text, err);
    if (r < 0)
        return r;
    /* With this and every offset at most its successor, which is checked, all lie inside. */
    if (table.offsets[n_types] != n_text)
        return error_set(err, EINVAL, "%s: 'tokenizer.pieces' has %zu bytes, its offsets end at %u",
                         path, n_text, table.offsets[n_types]);
    r = tokenizer_new(ret, &table, err);
    if (r < 0)
        return error_prefix(err, -r, "%s", path);
    (*ret)->owned = TAKE_PTR(owned);
    return 0;
}
