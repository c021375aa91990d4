/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/import/foreign-tokenizer.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "engine/json-text.h"
#include "tools/import/foreign-tokenizer-private.h"

#define META "\xe2\x96\x81"
#define FIRST_TEXT 4096
#define PIECES_MAX                                                                \
    (1u << 24) /* as tokenizer_new() has it: scores stay whole numbers in a float \
                */

struct foreign_tokenizer *foreign_tokenizer_free(struct foreign_tokenizer *f)
{
    if (!f)
        return NULL;
    free(f->text);
    free(f->offsets);
    free(f->scores);
    free(f->types);
    free(f);
    return NULL;
}

int foreign_begin(struct foreign_builder *ret, size_t n_pieces, const char *name, struct error *err)
{
    CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *f = NULL;

    if (n_pieces == 0 || n_pieces > PIECES_MAX)
        return error_set(err, EINVAL, "%s: %zu pieces, 1 to %u are possible", name, n_pieces,
                         PIECES_MAX);
    f = calloc(1, sizeof(*f));
    if (!f)
        return error_set(err, ENOMEM, "%s: out of memory", name);
    f->text = malloc(FIRST_TEXT); /* there even if all pieces are empty */
    f->offsets = calloc(n_pieces + 1, sizeof(*f->offsets));
    f->scores = calloc(n_pieces, sizeof(*f->scores));
    f->types = calloc(n_pieces, sizeof(*f->types));
    if (!f->text || !f->offsets || !f->scores || !f->types)
        return error_set(err, ENOMEM, "%s: out of memory", name);
    f->table.bos = f->table.eos = f->table.unk = f->table.pad = TOKENIZER_NONE;
    f->table.start_of_turn = f->table.end_of_turn = TOKENIZER_NONE;
    *ret = (struct foreign_builder){
        .f = TAKE_PTR(f),
        .n_pieces = n_pieces,
        .text_allocated = FIRST_TEXT,
        .name = name,
    };
    return 0;
}

int foreign_add(struct foreign_builder *b, const char *text, size_t n, enum piece_type type,
                float score, struct error *err)
{
    struct foreign_tokenizer *f = b->f;
    uint32_t id = f->table.n_pieces;
    size_t want;

    if (id >= b->n_pieces)
        return error_set(err, EINVAL, "%s: more than %zu pieces", b->name, b->n_pieces);
    if (ckd_mul(&want, n, sizeof(META) - 1) || ckd_add(&want, want, b->n_text) || want > UINT32_MAX)
        return error_set(err, EINVAL, "%s: pieces of more than 4 GiB", b->name);
    if (want > b->text_allocated) {
        size_t allocated = MAX(want, b->text_allocated * 2);
        char *p = realloc(f->text, allocated);

        if (!p)
            return error_set(err, ENOMEM, "%s: out of memory", b->name);
        f->text = p;
        b->text_allocated = allocated;
    }
    for (size_t i = 0; i < n; i++) {
        if (text[i] == ' ') {
            memcpy(f->text + b->n_text, META, sizeof(META) - 1);
            b->n_text += sizeof(META) - 1;
        } else {
            f->text[b->n_text++] = text[i];
        }
    }
    f->offsets[id + 1] = (uint32_t)b->n_text;
    f->scores[id] = score;
    f->types[id] = (uint8_t)type;
    f->table.n_pieces++;
    return 0;
}

uint32_t foreign_find(const struct foreign_builder *b, const char *text)
{
    const struct foreign_tokenizer *f = b->f;
    size_t n = strlen(text);

    for (uint32_t i = 0; i < f->table.n_pieces; i++)
        if (f->offsets[i + 1] - f->offsets[i] == n && memcmp(f->text + f->offsets[i], text, n) == 0)
            return i;
    return TOKENIZER_NONE;
}

/* <unusedN> */
static bool is_unused(const char *text, size_t n)
{
    if (n < 9 || memcmp(text, "<unused", 7) != 0 || text[n - 1] != '>')
        return false;
    for (size_t i = 7; i < n - 1; i++)
        if (text[i] < '0' || text[i] > '9')
            return false;
    return true;
}

/*
 * Pieces that SentencePiece has as user-defined although their text is no text: converters disagree
 * on them, so they are known by name. Not <table> and the like, which are text.
 */
static bool is_mark(const char *text, size_t n)
{
    static const char *const marks[] = {
        "<mask>",           "[multimodal]",       "<start_of_turn>",    "<end_of_turn>",
        "<start_of_image>", "<end_of_image>",     "<image_soft_token>", "<start_of_audio>",
        "<end_of_audio>",   "<audio_soft_token>",
    };

    if (n == 0 || (text[0] != '<' && text[0] != '['))
        return false;
    for (size_t i = 0; i < ARRAY_SIZE(marks); i++)
        if (strlen(marks[i]) == n && memcmp(marks[i], text, n) == 0)
            return true;
    return is_unused(text, n);
}

static void set_type(struct foreign_tokenizer *f, uint32_t id, enum piece_type type)
{
    if (id < f->table.n_pieces && f->types[id] != PIECE_UNUSED && f->types[id] != PIECE_BYTE)
        f->types[id] = (uint8_t)type;
}

static void settle_types(struct foreign_builder *b)
{
    struct foreign_tokenizer *f = b->f;
    struct tokenizer_table *table = &f->table;

    for (uint32_t i = 0; i < table->n_pieces; i++) {
        const char *text = f->text + f->offsets[i];
        size_t n = f->offsets[i + 1] - f->offsets[i];

        if ((f->types[i] == PIECE_NORMAL || f->types[i] == PIECE_USER_DEFINED) && is_mark(text, n))
            f->types[i] = PIECE_CONTROL;
    }
    table->start_of_turn = foreign_find(b, "<start_of_turn>");
    table->end_of_turn = foreign_find(b, "<end_of_turn>");
    if (table->start_of_turn == TOKENIZER_NONE && table->end_of_turn == TOKENIZER_NONE) {
        table->start_of_turn = foreign_find(b, "<|turn>"); /* Gemma 4's, in the same places */
        table->end_of_turn = foreign_find(b, "<turn|>");
    }
    set_type(f, table->start_of_turn, PIECE_CONTROL);
    set_type(f, table->end_of_turn, PIECE_CONTROL);
    set_type(f, table->bos, PIECE_CONTROL);
    set_type(f, table->eos, PIECE_CONTROL);
    set_type(f, table->pad, PIECE_CONTROL);
    set_type(f, table->unk, PIECE_UNKNOWN);
    for (uint32_t i = 0; i < table->n_pieces; i++)
        if (f->types[i] != PIECE_NORMAL)
            f->scores[i] = 0;
}

int foreign_merge(const struct tokenizer *t, const char *left, size_t n_left, const char *right,
                  size_t n_right, uint32_t rank, uint32_t *ranks)
{
    char piece[4096];
    uint32_t id;

    if (n_left > sizeof(piece) || n_right > sizeof(piece) - n_left)
        return -EINVAL; /* longer than any piece may be */
    memcpy(piece, left, n_left);
    memcpy(piece + n_left, right, n_right);
    id = tokenizer_find(t, piece, n_left + n_right);
    if (id == TOKENIZER_NONE)
        return -EINVAL;
    if (rank < ranks[id])
        ranks[id] = rank; /* one piece may be made in several ways; the first one counts */
    return 0;
}

struct ranked {
    uint32_t rank, id;
};

static int compare_ranked(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;

    if (x->rank != y->rank)
        return x->rank < y->rank ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* Scores 0, -1, -2 ... for the ordinary pieces in the order of their merges, then of their ids. */
static int score_by_ranks(struct foreign_tokenizer *f, const uint32_t *ranks)
{
    uint32_t n_pieces = f->table.n_pieces, n = 0;
    CLEANUP(freep) struct ranked *order = malloc(n_pieces * sizeof(*order));

    if (!order)
        return -ENOMEM;
    for (uint32_t i = 0; i < n_pieces; i++)
        if (f->types[i] == PIECE_NORMAL)
            order[n++] = (struct ranked){.rank = ranks[i], .id = i};
    qsort(order, n, sizeof(*order), compare_ranked);
    for (uint32_t i = 0; i < n; i++)
        f->scores[order[i].id] = -(float)i;
    return 0;
}

int foreign_settle(struct foreign_builder *b,
                   int (*merge_ranks)(const struct foreign_builder *b, const struct tokenizer *t,
                                      uint32_t *ranks, const void *userdata, struct error *err),
                   const void *userdata, struct foreign_tokenizer **ret, struct error *err)
{
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    struct foreign_tokenizer *f = b->f;
    int r;

    if (f->table.n_pieces != b->n_pieces)
        return error_set(err, EINVAL, "%s: %u of %zu pieces", b->name, f->table.n_pieces,
                         b->n_pieces);
    f->table.text = f->text;
    f->table.offsets = f->offsets;
    f->table.scores = f->scores;
    f->table.types = f->types;
    settle_types(b);
    r = tokenizer_new(&t, &f->table, err);
    if (r < 0)
        return error_prefix(err, -r, "%s", b->name);
    if (merge_ranks) {
        CLEANUP(freep) uint32_t *ranks = malloc(b->n_pieces * sizeof(*ranks));

        if (!ranks)
            return error_set(err, ENOMEM, "%s: out of memory", b->name);
        memset(ranks, 0xff, b->n_pieces * sizeof(*ranks));
        r = merge_ranks(b, t, ranks, userdata, err);
        if (r < 0)
            return r;
        r = score_by_ranks(f, ranks);
        if (r < 0)
            return error_set(err, ENOMEM, "%s: out of memory", b->name);
    }
    *ret = TAKE_PTR(b->f);
    return 0;
}

static int add_id(json_object *root, const char *key, uint32_t id)
{
    json_object *v = NULL; /* json-c's null */

    if (id != TOKENIZER_NONE) {
        v = json_object_new_int64(id);
        if (!v)
            return -ENOMEM;
    }
    if (json_object_object_add(root, key, v) == 0)
        return 0;
    json_object_put(v);
    return -ENOMEM;
}

static int add_value(json_object *root, const char *key, json_object *v)
{
    if (v && json_object_object_add(root, key, v) == 0)
        return 0;
    json_object_put(v);
    return -ENOMEM;
}

int foreign_tokenizer_metadata(const struct tokenizer_table *table, char **ret)
{
    CLEANUP(json_object_putp) json_object *root = json_object_new_object();
    const char *text;
    char *copy;

    if (!root || add_value(root, "kind", json_object_new_string("spm-bpe")) < 0 ||
        add_id(root, "bos", table->bos) < 0 || add_id(root, "eos", table->eos) < 0 ||
        add_id(root, "unk", table->unk) < 0 || add_id(root, "pad", table->pad) < 0 ||
        add_id(root, "start_of_turn", table->start_of_turn) < 0 ||
        add_id(root, "end_of_turn", table->end_of_turn) < 0 ||
        add_value(root, "add_bos", json_object_new_boolean(table->add_bos)) < 0 ||
        add_value(root, "add_space_prefix", json_object_new_boolean(table->add_space_prefix)) < 0)
        return -ENOMEM;
    text = json_object_to_json_string_ext(root, JSON_C_TO_STRING_PLAIN);
    copy = text ? strdup(text) : NULL;
    if (!copy)
        return -ENOMEM;
    *ret = copy;
    return 0;
}

#define FILE_SIZE_MAX (512u << 20) /* a tokenizer.json has some 30 MB */

/* The whole file; 1 and nothing when it does not exist. */
static int read_file(const char *folder, const char *name, char **ret_path, char **ret,
                     size_t *ret_n, struct error *err)
{
    CLEANUP(freep) char *path = NULL, *data = NULL;
    CLEANUP(closep) int fd = -EBADF;
    struct stat st;
    size_t n = 0;

    if (asprintf(&path, "%s/%s", folder, name) < 0) {
        path = NULL;
        return error_set(err, ENOMEM, "%s: out of memory", folder);
    }
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0 && errno == ENOENT)
        return 1;
    if (fd < 0 || fstat(fd, &st) < 0)
        return error_set(err, errno, "%s: cannot open: %m", path);
    if (!S_ISREG(st.st_mode))
        return error_set(err, EINVAL, "%s: not a regular file", path);
    if (st.st_size > FILE_SIZE_MAX)
        return error_set(err, EINVAL, "%s: larger than %u MiB", path, FILE_SIZE_MAX >> 20);
    data = malloc((size_t)st.st_size + 1);
    if (!data)
        return error_set(err, ENOMEM, "%s: out of memory", path);
    while (n < (size_t)st.st_size) {
        ssize_t k = read(fd, data + n, (size_t)st.st_size - n);

        if (k < 0 && errno == EINTR)
            continue;
        if (k < 0)
            return error_set(err, errno, "%s: cannot read: %m", path);
        if (k == 0)
            break; /* it has shrunk; what is there is judged on its own */
        n += (size_t)k;
    }
    *ret_n = n;
    *ret_path = TAKE_PTR(path);
    *ret = TAKE_PTR(data);
    return 0;
}

/* Takes over what tokenizer_config.json says about bos; that file is optional. */
static int read_config(struct foreign_tokenizer *f, const char *folder, struct error *err)
{
    CLEANUP(json_object_putp) json_object *root = NULL;
    CLEANUP(freep) char *path = NULL, *data = NULL;
    json_object *v;
    size_t n;
    int r;

    r = read_file(folder, "tokenizer_config.json", &path, &data, &n, err);
    if (r != 0)
        return r < 0 ? r : 0;
    r = json_text_parse(&root, data, n, &(struct json_limits){.depth = 32, .max_values = 4u << 20},
                        err);
    if (r < 0)
        return error_prefix(err, -r, "%s", path);
    v = json_text_get(root, "add_bos_token");
    if (!v)
        return 0;
    if (!json_object_is_type(v, json_type_boolean))
        return error_set(err, EINVAL, "%s: add_bos_token: neither true nor false", path);
    f->table.add_bos = json_object_get_boolean(v);
    return 0;
}

int foreign_tokenizer_from_folder(struct foreign_tokenizer **ret, const char *folder,
                                  struct error *err)
{
    CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *f = NULL;
    CLEANUP(freep) char *path = NULL, *data = NULL;
    size_t n;
    int r;

    /* SentencePiece's own file first: it is the original, and small and quick to read. */
    r = read_file(folder, "tokenizer.model", &path, &data, &n, err);
    if (r < 0)
        return r;
    if (r == 0) {
        r = foreign_tokenizer_from_spm(&f, data, n, path, err);
    } else {
        r = read_file(folder, "tokenizer.json", &path, &data, &n, err);
        if (r < 0)
            return r;
        if (r > 0)
            return error_set(err, ENODATA, "%s: has neither tokenizer.model nor tokenizer.json",
                             folder);
        r = foreign_tokenizer_from_json(&f, data, n, path, err);
    }
    if (r < 0)
        return r;
    r = read_config(f, folder, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(f);
    return 0;
}
