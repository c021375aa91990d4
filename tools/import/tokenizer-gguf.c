/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The vocabulary in a GGUF file's metadata (gemma3n.md §6.4), of two kinds: "llama", whose scores
 * are SentencePiece's, and "gemma4", the same vocabulary with a list of merges instead, no use of
 * its scores, and user-defined pieces marked as ordinary ones.
 */

#include <errno.h>
#include <string.h>

#include "base/checked.h"
#include "tools/import/foreign-tokenizer-private.h"
#include "tools/import/gguf.h"

#define KEY "tokenizer.ggml."

static const struct gguf_entry *find_array(const struct gguf *g, const char *key,
                                           enum gguf_type type)
{
    const struct gguf_entry *e = gguf_find(g, key);

    return e && e->is_array && e->type == type ? e : NULL;
}

static int get_id(const struct gguf *g, const char *key, uint32_t n_pieces, uint32_t *ret,
                  struct error *err)
{
    const struct gguf_entry *e = gguf_find(g, key);
    uint32_t id;

    if (!e)
        return 0;
    if (e->is_array || gguf_get_u32(e, 0, &id) < 0 || id >= n_pieces)
        return error_set(err, EINVAL, "%s: %s: not the id of one of the %u pieces", gguf_path(g),
                         key, n_pieces);
    *ret = id;
    return 0;
}

static int get_bool(const struct gguf *g, const char *key, bool *ret, struct error *err)
{
    const struct gguf_entry *e = gguf_find(g, key);

    if (e && (e->is_array || gguf_get_bool(e, 0, ret) < 0))
        return error_set(err, EINVAL, "%s: %s: neither true nor false", gguf_path(g), key);
    return 0;
}

/*
 * In a "gemma4" file user-defined pieces look ordinary. SentencePiece's trainer puts all of them
 * before the byte pieces; the runs of tabs, which Gemma added later, are known by what they are.
 */
static enum piece_type restore_type(enum piece_type type, bool after_bytes, struct gguf_string s)
{
    if (type != PIECE_NORMAL || s.n == 0)
        return type;
    if (!after_bytes)
        return PIECE_USER_DEFINED;
    for (size_t i = 0; i < s.n; i++)
        if (s.text[i] != '\t')
            return type;
    return PIECE_USER_DEFINED;
}

static int add_pieces(struct foreign_builder *b, const struct gguf *g, bool merges,
                      const struct gguf_entry *tokens, struct error *err)
{
    const struct gguf_entry *scores = NULL, *types;
    struct gguf_strings walk = gguf_strings_begin(tokens);
    struct gguf_string s;
    bool after_bytes = false;
    int r;

    if (!merges) {
        scores = find_array(g, KEY "scores", GGUF_F32);
        if (!scores || scores->n != tokens->n)
            return error_set(err, EINVAL,
                             "%s: " KEY "scores: missing, or not a float for each of "
                             "the %zu pieces",
                             b->name, tokens->n);
    }
    types = gguf_find(g, KEY "token_type");
    if (!types || !types->is_array || types->n != tokens->n)
        return error_set(err, EINVAL,
                         "%s: " KEY "token_type: missing, or not a number for each of "
                         "the %zu pieces",
                         b->name, tokens->n);

    for (size_t i = 0; i < tokens->n && gguf_strings_next(&walk, &s); i++) {
        float score = 0;
        uint32_t type;

        if (scores && gguf_get_float(scores, i, &score) < 0)
            return error_set(err, EINVAL, "%s: " KEY "scores: element %zu", b->name, i);
        if (gguf_get_u32(types, i, &type) < 0 || type < PIECE_NORMAL || type > PIECE_BYTE)
            return error_set(err, EINVAL, "%s: " KEY "token_type: element %zu is none of 1 to 6",
                             b->name, i);
        if (type == PIECE_BYTE)
            after_bytes = true;
        if (merges)
            type = restore_type((enum piece_type)type, after_bytes, s);
        if (s.n == 0)
            type = PIECE_UNUSED; /* converters leave such holes */
        r = foreign_add(b, s.text, s.n, (enum piece_type)type, score, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* "left right": a single space, which is in no piece, and which never comes first. */
static int rank_merges(const struct foreign_builder *b, const struct tokenizer *t, uint32_t *ranks,
                       const void *userdata, struct error *err)
{
    const struct gguf_entry *merges = userdata;
    struct gguf_strings walk = gguf_strings_begin(merges);
    struct gguf_string s;

    if (merges->n >= UINT32_MAX)
        return error_set(err, EINVAL, "%s: " KEY "merges: too many", b->name);
    for (uint32_t i = 0; gguf_strings_next(&walk, &s); i++) {
        const char *space = s.n > 1 ? memchr(s.text + 1, ' ', s.n - 1) : NULL;
        size_t n_left = space ? (size_t)(space - s.text) : 0;

        if (!space || n_left + 1 == s.n)
            return error_set(err, EINVAL, "%s: " KEY "merges: element %u is not two pieces",
                             b->name, i);
        if (foreign_merge(t, s.text, n_left, space + 1, s.n - n_left - 1, i, ranks) < 0)
            return error_set(err, EINVAL, "%s: " KEY "merges: element %u makes no piece", b->name,
                             i);
    }
    return 0;
}

int foreign_tokenizer_from_gguf(struct foreign_tokenizer **ret, const struct gguf *g,
                                struct error *err)
{
    CLEANUP(foreign_builder_done) struct foreign_builder b = {0};
    const struct gguf_entry *model = gguf_find(g, KEY "model"), *tokens, *list = NULL;
    struct gguf_string kind;
    struct tokenizer_table *table;
    uint32_t n;
    bool merges;
    int r;

    if (!model)
        return error_set(err, ENODATA, "%s: has no tokenizer", gguf_path(g));
    if (gguf_get_string(model, &kind) < 0)
        return error_set(err, EINVAL, "%s: " KEY "model: not a string", gguf_path(g));
    merges = gguf_string_is(kind, "gemma4");
    if (!merges && !gguf_string_is(kind, "llama"))
        return error_set(err, EINVAL,
                         "%s: " KEY "model is '%.*s'; only 'llama' and 'gemma4' are "
                         "known",
                         gguf_path(g), (int)MIN(kind.n, (size_t)64), kind.text);
    tokens = find_array(g, KEY "tokens", GGUF_STRING);
    if (!tokens)
        return error_set(err, EINVAL, "%s: " KEY "tokens: missing or not strings", gguf_path(g));
    if (merges) {
        list = find_array(g, KEY "merges", GGUF_STRING);
        if (!list)
            return error_set(err, EINVAL, "%s: " KEY "merges: missing or not strings",
                             gguf_path(g));
    }
    r = foreign_begin(&b, tokens->n, gguf_path(g), err);
    if (r < 0)
        return r;
    r = add_pieces(&b, g, merges, tokens, err);
    if (r < 0)
        return r;
    table = &b.f->table;
    n = table->n_pieces;
    table->add_bos = true; /* what a file that does not tell means */
    table->add_space_prefix = !merges;
    if ((r = get_id(g, KEY "bos_token_id", n, &table->bos, err)) < 0 ||
        (r = get_id(g, KEY "eos_token_id", n, &table->eos, err)) < 0 ||
        (r = get_id(g, KEY "unknown_token_id", n, &table->unk, err)) < 0 ||
        (r = get_id(g, KEY "padding_token_id", n, &table->pad, err)) < 0 ||
        (r = get_bool(g, KEY "add_bos_token", &table->add_bos, err)) < 0 ||
        (r = get_bool(g, KEY "add_space_prefix", &table->add_space_prefix, err)) < 0)
        return r;
    return foreign_settle(&b, merges ? rank_merges : NULL, list, ret, err);
}
