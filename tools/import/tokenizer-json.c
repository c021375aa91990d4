/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Hugging Face's tokenizer.json (gemma3n.md §6.3), as far as it describes SentencePiece's BPE: its
 * "normalizer" and "pre_tokenizer" must do no more than make U+2581 of spaces, since anything else
 * would be a different tokenizer, silently. The list of merges becomes scores.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "engine/json-text.h"
#include "tools/import/foreign-tokenizer-private.h"

#define META "\xe2\x96\x81"
#define GAPS_MAX 4096u /* ids without a piece; Gemma's files have some 250 among added tokens */

/* A tokenizer.json of Gemma has 2.2 million values when its merges are arrays. */
static const struct json_limits limits = {.depth = 16, .max_values = 16u << 20};

struct slot {
    const char *text; /* borrowed from the JSON tree; NULL: no piece has this id */
    enum piece_type type;
};

struct loader {
    const char *name;
    json_object *root;                   /* borrowed */
    json_object *vocab, *merges, *added; /* likewise; added may be NULL */
    struct slot *slots;                  /* [n] */
    size_t n;
    bool byte_fallback, escapes, prefix;
};

static bool is_type(json_object *v, const char *type)
{
    const char *s = json_text_string(json_text_get(v, "type"));

    return s && strcmp(s, type) == 0;
}

static bool is_string(json_object *v, const char *expected)
{
    const char *s = json_text_string(v);

    return s && strcmp(s, expected) == 0;
}

static bool is_true(json_object *v)
{
    return json_object_is_type(v, json_type_boolean) && json_object_get_boolean(v);
}

static int read_normalizer(struct loader *l, json_object *v, bool nested, struct error *err)
{
    if (json_object_is_type(v, json_type_null))
        return 0;
    if (is_type(v, "Sequence") && !nested) {
        json_object *list = json_text_get(v, "normalizers");
        int r;

        if (!json_object_is_type(list, json_type_array))
            return error_set(err, EINVAL, "%s: normalizer.normalizers: not an array", l->name);
        for (size_t i = 0; i < json_object_array_length(list); i++) {
            r = read_normalizer(l, json_object_array_get_idx(list, i), true, err);
            if (r < 0)
                return r;
        }
        return 0;
    }
    if (is_type(v, "Replace") && is_string(json_text_get(v, "content"), META) &&
        is_string(json_text_get(json_text_get(v, "pattern"), "String"), " ")) {
        l->escapes = true;
        return 0;
    }
    if (is_type(v, "Prepend") && is_string(json_text_get(v, "prepend"), META)) {
        l->prefix = true;
        return 0;
    }
    return error_set(err, EINVAL,
                     "%s: normalizer: does more than to make U+2581 of spaces, which is "
                     "not supported",
                     l->name);
}

static int read_pre_tokenizer(struct loader *l, json_object *v, struct error *err)
{
    json_object *split = json_text_get(v, "split");

    if (json_object_is_type(v, json_type_null))
        return 0;
    /* Splitting at spaces, of which the normaliser has left none. */
    if (l->escapes && is_type(v, "Split") &&
        is_string(json_text_get(json_text_get(v, "pattern"), "String"), " "))
        return 0;
    if (is_type(v, "Metaspace") && is_string(json_text_get(v, "replacement"), META) && split &&
        !is_true(split)) {
        l->escapes = true;
        l->prefix = !is_string(json_text_get(v, "prepend_scheme"), "never");
        return 0;
    }
    return error_set(err, EINVAL, "%s: pre_tokenizer: splits the text, which is not supported",
                     l->name);
}

static int read_model(struct loader *l, struct error *err)
{
    json_object *model = json_text_get(l->root, "model");
    int r;

    if (!is_type(model, "BPE"))
        return error_set(err, EINVAL, "%s: model.type: missing or not 'BPE'", l->name);
    l->vocab = json_text_get(model, "vocab");
    if (!json_object_is_type(l->vocab, json_type_object))
        return error_set(err, EINVAL, "%s: model.vocab: missing or not an object", l->name);
    l->merges = json_text_get(model, "merges");
    if (!json_object_is_type(l->merges, json_type_array))
        return error_set(err, EINVAL, "%s: model.merges: missing or not an array", l->name);
    l->added = json_text_get(l->root, "added_tokens");
    if (l->added && !json_object_is_type(l->added, json_type_array))
        return error_set(err, EINVAL, "%s: added_tokens: not an array", l->name);
    l->byte_fallback = is_true(json_text_get(model, "byte_fallback"));
    for (int i = 0; i < 2; i++) {
        const char *key = i == 0 ? "continuing_subword_prefix" : "end_of_word_suffix";
        json_object *v = json_text_get(model, key);

        if (v && !is_string(v, ""))
            return error_set(err, EINVAL, "%s: model.%s: not supported", l->name, key);
    }
    r = read_normalizer(l, json_text_get(l->root, "normalizer"), false, err);
    if (r < 0)
        return r;
    r = read_pre_tokenizer(l, json_text_get(l->root, "pre_tokenizer"), err);
    if (r < 0)
        return r;
    if (!l->escapes)
        return error_set(err, EINVAL,
                         "%s: normalizer: leaves spaces as they are, which is not "
                         "supported",
                         l->name);
    return 0;
}

static int get_id(struct loader *l, json_object *v, const char *where, uint32_t *ret,
                  struct error *err)
{
    uint64_t id;

    if (!json_text_u64(v, &id) || id >= TOKENIZER_NONE)
        return error_set(err, EINVAL, "%s: %s: an id is missing or no whole number", l->name,
                         where);
    *ret = (uint32_t)id;
    return 0;
}

/* How many ids there are: one more than the highest. */
static int count_ids(struct loader *l, struct error *err)
{
    size_t n_given = 0;
    uint32_t id;
    int r;

    json_object_object_foreach(l->vocab, key, v)
    {
        (void)key;
        r = get_id(l, v, "model.vocab", &id, err);
        if (r < 0)
            return r;
        l->n = MAX(l->n, (size_t)id + 1);
        n_given++;
    }
    for (size_t i = 0; l->added && i < json_object_array_length(l->added); i++) {
        json_object *token = json_object_array_get_idx(l->added, i);

        r = get_id(l, json_text_get(token, "id"), "added_tokens", &id, err);
        if (r < 0)
            return r;
        l->n = MAX(l->n, (size_t)id + 1);
        n_given++;
    }
    if (l->n > n_given && l->n - n_given > GAPS_MAX)
        return error_set(err, EINVAL, "%s: has id %zu, but only %zu pieces", l->name, l->n - 1,
                         n_given);
    return 0;
}

/* "<0x0A>" */
static bool is_byte(const char *s)
{
    return strlen(s) == 6 && memcmp(s, "<0x", 3) == 0 && s[5] == '>' &&
           strspn(s + 3, "0123456789ABCDEF") == 2;
}

/* Equal but for spaces that one of them has escaped. */
static bool same_text(const char *a, const char *b)
{
    while (*a && *b) {
        bool space_a = *a == ' ', space_b = *b == ' ';
        bool meta_a = strncmp(a, META, 3) == 0, meta_b = strncmp(b, META, 3) == 0;

        if ((space_a || meta_a) && (space_b || meta_b)) {
            a += space_a ? 1 : 3;
            b += space_b ? 1 : 3;
        } else if (*a++ != *b++) {
            return false;
        }
    }
    return *a == *b;
}

static int read_vocab(struct loader *l, struct error *err)
{
    json_object_object_foreach(l->vocab, key, v)
    {
        uint32_t id;
        int r = get_id(l, v, "model.vocab", &id, err);

        if (r < 0)
            return r;
        if (l->slots[id].text)
            return error_set(err, EINVAL, "%s: model.vocab: two pieces have id %u", l->name, id);
        l->slots[id] = (struct slot){
            .text = key,
            .type = l->byte_fallback && is_byte(key) ? PIECE_BYTE : PIECE_NORMAL,
        };
    }
    return 0;
}

static int read_added(struct loader *l, struct error *err)
{
    for (size_t i = 0; l->added && i < json_object_array_length(l->added); i++) {
        json_object *token = json_object_array_get_idx(l->added, i);
        const char *content = json_text_string(json_text_get(token, "content"));
        bool special = is_true(json_text_get(token, "special"));
        uint32_t id;
        int r;

        r = get_id(l, json_text_get(token, "id"), "added_tokens", &id, err);
        if (r < 0)
            return r;
        if (!content)
            return error_set(err, EINVAL, "%s: added_tokens: element %zu: content is no string",
                             l->name, i);
        if (l->slots[id].text && !same_text(l->slots[id].text, content))
            return error_set(err, EINVAL,
                             "%s: added_tokens: element %zu: id %u has another text in "
                             "the vocabulary",
                             l->name, i, id);
        if (!special &&
            (is_true(json_text_get(token, "lstrip")) || is_true(json_text_get(token, "rstrip")) ||
             is_true(json_text_get(token, "single_word"))))
            return error_set(err, EINVAL,
                             "%s: added_tokens: element %zu: lstrip, rstrip and "
                             "single_word are not supported",
                             l->name, i);
        if (l->slots[id].type != PIECE_BYTE)
            l->slots[id].type = special ? PIECE_CONTROL : PIECE_USER_DEFINED;
        l->slots[id].text = content;
    }
    return 0;
}

static int rank_merges(const struct foreign_builder *b, const struct tokenizer *t, uint32_t *ranks,
                       const void *userdata, struct error *err)
{
    const struct loader *l = userdata;

    for (size_t i = 0; i < json_object_array_length(l->merges); i++) {
        json_object *merge = json_object_array_get_idx(l->merges, i);
        const char *left, *right;
        size_t n_left;

        if (json_object_is_type(merge, json_type_array) && json_object_array_length(merge) == 2) {
            left = json_text_string(json_object_array_get_idx(merge, 0));
            right = json_text_string(json_object_array_get_idx(merge, 1));
            n_left = left ? strlen(left) : 0;
        } else {
            const char *space;

            left = json_text_string(merge);
            space = left ? strchr(left, ' ') : NULL;
            right = space && !strchr(space + 1, ' ') ? space + 1 : NULL;
            n_left = space ? (size_t)(space - left) : 0;
        }
        if (n_left == 0 || !right || !*right)
            return error_set(err, EINVAL, "%s: model.merges: element %zu is not two pieces",
                             b->name, i);
        if (foreign_merge(t, left, n_left, right, strlen(right), (uint32_t)i, ranks) < 0)
            return error_set(err, EINVAL, "%s: model.merges: element %zu makes no piece", b->name,
                             i);
    }
    return 0;
}

/* The id of a control piece by its text. */
static uint32_t find_control(const struct foreign_builder *b, const char *text)
{
    uint32_t id = foreign_find(b, text);

    return id != TOKENIZER_NONE && b->f->types[id] == PIECE_CONTROL ? id : TOKENIZER_NONE;
}

/* The template for one text; it begins with bos if the vocabulary adds one. */
static void read_post_processor(struct foreign_builder *b, json_object *v)
{
    json_object *list = json_text_get(v, "processors");
    const char *text;
    uint32_t id;

    if (is_type(v, "Sequence") && json_object_is_type(list, json_type_array)) {
        for (size_t i = 0; i < json_object_array_length(list); i++) {
            json_object *one = json_object_array_get_idx(list, i);

            if (is_type(one, "TemplateProcessing"))
                v = one;
        }
    }
    list = json_text_get(v, "single");
    if (!is_type(v, "TemplateProcessing") || !json_object_is_type(list, json_type_array) ||
        json_object_array_length(list) == 0)
        return;
    text = json_text_string(
        json_text_get(json_text_get(json_object_array_get_idx(list, 0), "SpecialToken"), "id"));
    id = text ? find_control(b, text) : TOKENIZER_NONE;
    if (id != TOKENIZER_NONE) {
        b->f->table.bos = id;
        b->f->table.add_bos = true;
    }
}

/* The file names no bos and the like except by use; the names are Gemma's and SentencePiece's. */
static int set_ids(struct loader *l, struct foreign_builder *b, struct error *err)
{
    struct tokenizer_table *table = &b->f->table;
    json_object *unk = json_text_get(json_text_get(l->root, "model"), "unk_token");

    table->bos = find_control(b, "<bos>");
    if (table->bos == TOKENIZER_NONE)
        table->bos = find_control(b, "<s>");
    table->eos = find_control(b, "<eos>");
    if (table->eos == TOKENIZER_NONE)
        table->eos = find_control(b, "</s>");
    table->pad = find_control(b, "<pad>");
    if (json_text_string(unk)) {
        table->unk = foreign_find(b, json_text_string(unk));
        if (table->unk == TOKENIZER_NONE)
            return error_set(err, EINVAL, "%s: model.unk_token: is no piece", l->name);
    }
    table->add_space_prefix = l->prefix;
    read_post_processor(b, json_text_get(l->root, "post_processor"));
    return 0;
}

static int load(struct loader *l, struct foreign_tokenizer **ret, struct error *err)
{
    CLEANUP(foreign_builder_done) struct foreign_builder b = {0};
    int r;

    r = read_model(l, err);
    if (r < 0)
        return r;
    r = count_ids(l, err);
    if (r < 0)
        return r;
    r = foreign_begin(&b, l->n, l->name, err);
    if (r < 0)
        return r;
    l->slots = calloc(l->n, sizeof(*l->slots));
    if (!l->slots)
        return error_set(err, ENOMEM, "%s: out of memory", l->name);
    if ((r = read_vocab(l, err)) < 0 || (r = read_added(l, err)) < 0)
        return r;
    for (size_t i = 0; i < l->n; i++) {
        const struct slot *slot = &l->slots[i];

        if (slot->text) {
            r = foreign_add(&b, slot->text, strlen(slot->text), slot->type, 0, err);
        } else {
            char filler[32];
            int n = snprintf(filler, sizeof(filler), "[PAD%zu]", i);

            r = foreign_add(&b, filler, (size_t)n, PIECE_UNUSED, 0, err);
        }
        if (r < 0)
            return r;
    }
    r = set_ids(l, &b, err);
    if (r < 0)
        return r;
    return foreign_settle(&b, rank_merges, l, ret, err);
}

int foreign_tokenizer_from_json(struct foreign_tokenizer **ret, const char *text, size_t n,
                                const char *name, struct error *err)
{
    CLEANUP(json_object_putp) json_object *root = NULL;
    struct loader l = {.name = name};
    int r;

    r = json_text_parse(&root, text, n, &limits, err);
    if (r < 0)
        return error_prefix(err, -r, "%s", name);
    l.root = root;
    r = load(&l, ret, err);
    free(l.slots);
    return r;
}
