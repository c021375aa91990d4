/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What the loaders of tokenizer.json and tokenizer.model make of small files written here, good and
 * broken ones; that the same vocabulary gives the same table is in tests/test-tokenizer.py.
 */

#undef NDEBUG
#include "tools/import/foreign-tokenizer.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"

static void expect_piece(const struct foreign_tokenizer *f, uint32_t id, const char *text,
                         enum piece_type type, float score)
{
    const struct tokenizer_table *t = &f->table;
    uint32_t n;

    assert(id < t->n_pieces);
    n = t->offsets[id + 1] - t->offsets[id];
    if (n != strlen(text) || memcmp(t->text + t->offsets[id], text, n) != 0 ||
        t->types[id] != type || t->scores[id] != score) {
        fprintf(stderr, "piece %u: expected '%s' %d %g, got '%.*s' %d %g\n", id, text, type,
                (double)score, (int)n, t->text + t->offsets[id], t->types[id],
                (double)t->scores[id]);
        assert(!"another piece");
    }
}

/* tokenizer.json, in parts; a test changes one. */
struct json {
    const char *added, *normalizer, *pre_tokenizer, *post_processor, *model;
};

#define VOCAB                                                                           \
    "\"vocab\":{\"<pad>\":0,\"<eos>\":1,\"<bos>\":2,\"<unk>\":3,\"<start_of_turn>\":4," \
    "\"\\u2581\\u2581\":5,\"abc\":6,\"ab\":7,\"bc\":8,\"\\u2581\":9,\"a\":10,\"b\":11,\"c\":12}"
/* "abc" is made first by the second merge, and once more by the last. */
#define MERGES "\"merges\":[\"b c\",\"a bc\",[\"a\",\"b\"],\"ab c\"]"

static const struct json good = {
    .added = "[{\"id\":2,\"content\":\"<bos>\",\"special\":true},"
             "{\"id\":3,\"content\":\"<unk>\",\"special\":true},"
             "{\"id\":4,\"content\":\"<start_of_turn>\",\"special\":false},"
             "{\"id\":5,\"content\":\"  \",\"special\":false},"
             "{\"id\":13,\"content\":\"<unused7>\",\"special\":false},"
             "{\"id\":16,\"content\":\"<image_soft_token>\",\"special\":true}]",
    .normalizer = "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}",
    .pre_tokenizer = "{\"type\":\"Split\",\"pattern\":{\"String\":\" \"},"
                     "\"behavior\":\"MergedWithPrevious\",\"invert\":false}",
    .post_processor = "{\"type\":\"TemplateProcessing\",\"single\":["
                      "{\"SpecialToken\":{\"id\":\"<bos>\",\"type_id\":0}},{\"Sequence\":{}}]}",
    .model = "{\"type\":\"BPE\",\"unk_token\":\"<unk>\"," VOCAB "," MERGES "}",
};

static int load(struct foreign_tokenizer **ret, const struct json *j, struct error *err)
{
    CLEANUP(freep) char *text = NULL;
    int n = asprintf(&text,
                     "{\"added_tokens\":%s,\"normalizer\":%s,\"pre_tokenizer\":%s,"
                     "\"post_processor\":%s,\"model\":%s}",
                     j->added, j->normalizer, j->pre_tokenizer, j->post_processor, j->model);

    assert(n > 0);
    return foreign_tokenizer_from_json(ret, text, (size_t)n, "x.json", err);
}

static void expect_good(const struct json *j)
{
    struct foreign_tokenizer *f = NULL;
    struct error err;

    if (load(&f, j, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        assert(!"does not load");
    }
    foreign_tokenizer_free(f);
}

static void refuse_json(const struct json *j, const char *because)
{
    struct foreign_tokenizer *f = NULL;
    struct error err = {{0}};

    assert(load(&f, j, &err) == -EINVAL && !f);
    if (!strstr(err.text, because) || strncmp(err.text, "x.json: ", 8) != 0) {
        fprintf(stderr, "expected 'x.json: ' and '%s', got '%s'\n", because, err.text);
        assert(!"another message");
    }
}

static void test_json(void)
{
    CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *f = NULL;
    struct error err;

    assert(load(&f, &good, &err) == 0);
    assert(f->table.n_pieces == 17);
    assert(f->table.bos == 2 && f->table.unk == 3 && f->table.add_bos);
    /* Not special in this file, so nothing but ordinary pieces. */
    assert(f->table.eos == TOKENIZER_NONE && f->table.pad == TOKENIZER_NONE);
    assert(f->table.start_of_turn == 4 && f->table.end_of_turn == TOKENIZER_NONE);
    assert(!f->table.add_space_prefix);
    expect_piece(f, 2, "<bos>", PIECE_CONTROL, 0);
    expect_piece(f, 3, "<unk>", PIECE_UNKNOWN, 0);
    expect_piece(f, 4, "<start_of_turn>", PIECE_CONTROL, 0);
    expect_piece(f, 5, "\xe2\x96\x81\xe2\x96\x81", PIECE_USER_DEFINED, 0);
    expect_piece(f, 8, "bc", PIECE_NORMAL, 0);
    expect_piece(f, 6, "abc", PIECE_NORMAL, -1); /* the first of its merges counts */
    expect_piece(f, 7, "ab", PIECE_NORMAL, -2);
    expect_piece(f, 0, "<pad>", PIECE_NORMAL, -3); /* what no merge makes comes after, by id */
    expect_piece(f, 12, "c", PIECE_NORMAL, -8);
    expect_piece(f, 13, "<unused7>", PIECE_CONTROL, 0);
    expect_piece(f, 14, "[PAD14]", PIECE_UNUSED, 0);
    expect_piece(f, 15, "[PAD15]", PIECE_UNUSED, 0);
    expect_piece(f, 16, "<image_soft_token>", PIECE_CONTROL, 0);
}

static void test_json_variants(void)
{
    struct json j = good;

    j.post_processor = "null";
    expect_good(&j);
    j = good;
    j.pre_tokenizer = "null";
    expect_good(&j);
    j.normalizer = "null";
    refuse_json(&j, "normalizer: leaves spaces");
    j.pre_tokenizer = "{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"split\":false,"
                      "\"prepend_scheme\":\"never\"}";
    expect_good(&j);
    j.pre_tokenizer = "{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"split\":true}";
    refuse_json(&j, "pre_tokenizer: splits");
    j = good;
    j.pre_tokenizer = "{\"type\":\"ByteLevel\"}";
    refuse_json(&j, "pre_tokenizer: splits");
    j = good;
    j.normalizer = "{\"type\":\"NFKC\"}";
    refuse_json(&j, "normalizer: does more");
    j.normalizer = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"}]}";
    refuse_json(&j, "normalizer: does more");
    j.normalizer = "{\"type\":\"Sequence\"}";
    refuse_json(&j, "normalizer.normalizers");
    j = good;
    j.model = "{\"type\":\"Unigram\"}";
    refuse_json(&j, "model.type");
    j.model = "[]";
    refuse_json(&j, "model.type");
    j.model = "{\"type\":\"BPE\",\"vocab\":[]}";
    refuse_json(&j, "model.vocab");
    j.model = "{\"type\":\"BPE\"," VOCAB "}";
    refuse_json(&j, "model.merges");
    j.model = "{\"type\":\"BPE\",\"end_of_word_suffix\":\"</w>\"," VOCAB "," MERGES "}";
    refuse_json(&j, "model.end_of_word_suffix");
    j.model = "{\"type\":\"BPE\",\"unk_token\":\"<none>\"," VOCAB "," MERGES "}";
    refuse_json(&j, "model.unk_token");
    j.model = "{\"type\":\"BPE\",\"unk_token\":\"<unk>\"," VOCAB ",\"merges\":[\"a  b\"]}";
    refuse_json(&j, "model.merges: element 0 is not two");
    j.model = "{\"type\":\"BPE\",\"unk_token\":\"<unk>\"," VOCAB ",\"merges\":[\"b c\",\" c\"]}";
    refuse_json(&j, "model.merges: element 1 is not two");
    j.model = "{\"type\":\"BPE\",\"unk_token\":\"<unk>\"," VOCAB ",\"merges\":[[\"a\",1]]}";
    refuse_json(&j, "model.merges: element 0 is not two");
    j.model = "{\"type\":\"BPE\",\"unk_token\":\"<unk>\"," VOCAB ",\"merges\":[\"c a\"]}";
    refuse_json(&j, "model.merges: element 0 makes no piece");
    j.model = "{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}";
    refuse_json(&j, "model.vocab: an id");
    j.model = "{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}";
    refuse_json(&j, "two pieces have id 0");
    j.added = "[]";
    j.model = "{\"type\":\"BPE\",\"vocab\":{\"a\":1000000000},\"merges\":[]}";
    refuse_json(&j, "has id 1000000000, but only 1 pieces");
    j = good;
    j.added = "{}";
    refuse_json(&j, "added_tokens: not an array");
    j.added = "[1]";
    refuse_json(&j, "added_tokens: an id");
    j.added = "[{\"id\":0}]";
    refuse_json(&j, "content is no string");
    j.added = "[{\"id\":2,\"content\":\"<sob>\"}]";
    refuse_json(&j, "id 2 has another text");
    j.added = "[{\"id\":13,\"content\":\"x\",\"lstrip\":true}]";
    refuse_json(&j, "lstrip");
    j.added = "[{\"id\":13,\"content\":\"abc\"}]";
    refuse_json(&j, "piece 13: the same text as piece 6");
    j.added = "[";
    refuse_json(&j, "byte ");
}

/* Protobuf, written by hand. */
struct message {
    uint8_t data[4096];
    size_t n;
};

static void put_varint(struct message *m, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        m->data[m->n++] = (uint8_t)(v | 0x80);
    m->data[m->n++] = (uint8_t)v;
}

static void put_number(struct message *m, uint32_t field, uint64_t v)
{
    put_varint(m, field << 3);
    put_varint(m, v);
}

static void put_bytes(struct message *m, uint32_t field, const void *data, size_t n)
{
    put_varint(m, field << 3 | 2);
    put_varint(m, n);
    memcpy(m->data + m->n, data, n);
    m->n += n;
}

static void put_piece(struct message *m, const char *text, float score, int type)
{
    struct message piece = {.n = 0};

    put_bytes(&piece, 1, text, strlen(text));
    put_varint(&piece, 2 << 3 | 5);
    memcpy(piece.data + piece.n, &score, sizeof(score));
    piece.n += sizeof(score);
    if (type != PIECE_NORMAL)
        put_number(&piece, 3, (uint64_t)type);
    put_bytes(m, 1, piece.data, piece.n);
}

enum change { NOTHING, UNIGRAM, SUFFIX, RULES, EXTRA_SPACES, NO_ESCAPE };

static void put_settings(struct message *m, enum change change)
{
    struct message trainer = {.n = 0}, normalizer = {.n = 0};

    put_number(&trainer, 3, change == UNIGRAM ? 1 : 2);
    if (change == SUFFIX)
        put_number(&trainer, 24, 1);
    put_bytes(&trainer, 46, "<begin>", 7);
    put_varint(&trainer, 99 << 3 | 1); /* fields that nobody knows */
    trainer.n += 8;
    put_varint(&trainer, 98 << 3 | 5);
    trainer.n += 4;
    put_bytes(m, 2, trainer.data, trainer.n);
    put_bytes(&normalizer, 1, "identity", 8);
    put_bytes(&normalizer, 2, "rules", change == RULES ? 5 : 0);
    put_number(&normalizer, 3, 0);
    put_number(&normalizer, 4, change == EXTRA_SPACES);
    put_number(&normalizer, 5, change != NO_ESCAPE);
    put_bytes(m, 3, normalizer.data, normalizer.n);
}

static struct message good_model(enum change change)
{
    struct message m = {.n = 0};

    put_piece(&m, "<unk>", 0, PIECE_UNKNOWN);
    put_piece(&m, "<begin>", 0, PIECE_CONTROL);
    put_piece(&m, "<eos>", 0, PIECE_CONTROL);
    put_piece(&m, "<end_of_turn>", 0, PIECE_USER_DEFINED);
    put_piece(&m, "ab", -0.5f, PIECE_NORMAL);
    put_piece(&m, "a", -1, PIECE_NORMAL);
    put_piece(&m, "b", -2, PIECE_NORMAL);
    put_settings(&m, change);
    return m;
}

static void refuse_spm(const struct message *m, const char *because)
{
    struct foreign_tokenizer *f = NULL;
    struct error err = {{0}};

    assert(foreign_tokenizer_from_spm(&f, m->data, m->n, "x.model", &err) == -EINVAL && !f);
    if (!strstr(err.text, because) || strncmp(err.text, "x.model: ", 9) != 0) {
        fprintf(stderr, "expected 'x.model: ' and '%s', got '%s'\n", because, err.text);
        assert(!"another message");
    }
}

static void test_spm(void)
{
    CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *f = NULL;
    struct message m = good_model(NOTHING);
    struct error err;

    assert(foreign_tokenizer_from_spm(&f, m.data, m.n, "x.model", &err) == 0);
    assert(f->table.n_pieces == 7 && f->table.unk == 0 && f->table.bos == 1);
    assert(f->table.eos == 2 && f->table.end_of_turn == 3);
    assert(f->table.pad == TOKENIZER_NONE && f->table.start_of_turn == TOKENIZER_NONE);
    assert(f->table.add_bos && !f->table.add_space_prefix);
    expect_piece(f, 3, "<end_of_turn>", PIECE_CONTROL, 0);
    expect_piece(f, 4, "ab", PIECE_NORMAL, -0.5f);

    /* Cut anywhere: refused, or a shorter message that makes sense by itself. */
    for (size_t n = 0; n < m.n; n++) {
        struct foreign_tokenizer *cut = NULL;
        CLEANUP(freep) uint8_t *data = malloc(n + 1);

        assert(data);
        memcpy(data, m.data, n);
        /* Without its last settings it keeps SentencePiece's defaults, which are not supported. */
        assert(foreign_tokenizer_from_spm(&cut, data, n, "x.model", &err) == -EINVAL && !cut);
    }

    m = good_model(UNIGRAM);
    refuse_spm(&m, "trainer_spec.model_type");
    m = good_model(SUFFIX);
    refuse_spm(&m, "treat_whitespace_as_suffix");
    m = good_model(RULES);
    refuse_spm(&m, "'identity'");
    m = good_model(EXTRA_SPACES);
    refuse_spm(&m, "remove_extra_whitespaces");
    m = good_model(NO_ESCAPE);
    refuse_spm(&m, "escape_whitespaces");
    m = good_model(NOTHING);
    put_piece(&m, "x", 0, 7);
    refuse_spm(&m, "piece 7: unknown type 7");
    m = good_model(NOTHING);
    put_piece(&m, "ab", 0, PIECE_NORMAL);
    refuse_spm(&m, "piece 7: the same text as piece 4");
    m = good_model(NOTHING);
    put_bytes(&m, 1, "\x0a\x7f", 2); /* a piece whose text passes its end */
    refuse_spm(&m, "piece 7: broken");
    m = good_model(NOTHING);
    put_bytes(&m, 2, "\x08", 1);
    refuse_spm(&m, "trainer_spec: broken");
    m = good_model(NOTHING);
    put_bytes(&m, 3, "\x0b", 1); /* a group */
    refuse_spm(&m, "normalizer_spec: broken");
    m = (struct message){.n = 0};
    refuse_spm(&m, "has no pieces");
    put_bytes(&m, 4, "", 0);
    refuse_spm(&m, "has no pieces");
    memset(m.data, 0xff, 16);
    m.n = 16;
    refuse_spm(&m, "broken at byte");
    memcpy(m.data, "\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11); /* 2^64 - 1 bytes */
    m.n = 11;
    refuse_spm(&m, "broken at byte");
    memcpy(m.data, "\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", 11); /* no 64 bits */
    refuse_spm(&m, "broken at byte");
}

static void put_file(const char *folder, const char *name, const void *data, size_t n)
{
    CLEANUP(freep) char *path = NULL;
    CLEANUP(fclosep) FILE *f = NULL;

    assert(asprintf(&path, "%s/%s", folder, name) > 0);
    f = fopen(path, "we");
    assert(f && fwrite(data, 1, n, f) == n);
}

static void remove_file(const char *folder, const char *name)
{
    CLEANUP(freep) char *path = NULL;

    assert(asprintf(&path, "%s/%s", folder, name) > 0);
    assert(unlink(path) == 0 || rmdir(path) == 0);
}

static void test_folder(void)
{
    char folder[] = "/tmp/llmd-test-foreign-XXXXXX";
    CLEANUP(freep) char *json = NULL, *as_folder = NULL;
    struct foreign_tokenizer *f = NULL;
    struct message m = good_model(NOTHING);
    struct error err = {{0}};
    int n;

    assert(mkdtemp(folder));
    assert(foreign_tokenizer_from_folder(&f, folder, &err) == -ENODATA);
    assert(strstr(err.text, "neither tokenizer.model nor tokenizer.json"));

    n = asprintf(&json, "{\"normalizer\":%s,\"model\":%s}", good.normalizer, good.model);
    assert(n > 0);
    put_file(folder, "tokenizer.json", json, (size_t)n);
    assert(foreign_tokenizer_from_folder(&f, folder, &err) == 0);
    assert(f->table.n_pieces == 13 && !f->table.add_bos);
    f = foreign_tokenizer_free(f);
    put_file(folder, "tokenizer_config.json", "{\"add_bos_token\":true}", 22);
    assert(foreign_tokenizer_from_folder(&f, folder, &err) == 0 && f->table.add_bos);
    f = foreign_tokenizer_free(f);

    put_file(folder, "tokenizer.model", m.data, m.n); /* goes first */
    put_file(folder, "tokenizer_config.json", "{\"add_bos_token\":false}", 23);
    assert(foreign_tokenizer_from_folder(&f, folder, &err) == 0);
    assert(f->table.n_pieces == 7 && !f->table.add_bos);
    f = foreign_tokenizer_free(f);
    put_file(folder, "tokenizer_config.json", "{\"add_bos_token\":\"no\"}", 22);
    assert(foreign_tokenizer_from_folder(&f, folder, &err) == -EINVAL && !f);
    assert(strstr(err.text, "tokenizer_config.json: add_bos_token"));
    put_file(folder, "tokenizer_config.json", "{", 1);
    assert(foreign_tokenizer_from_folder(&f, folder, &err) == -EINVAL && !f);

    remove_file(folder, "tokenizer.model");
    assert(asprintf(&as_folder, "%s/tokenizer.model", folder) > 0 && mkdir(as_folder, 0700) == 0);
    assert(foreign_tokenizer_from_folder(&f, folder, &err) == -EINVAL && !f);
    assert(strstr(err.text, "tokenizer.model: not a regular file"));
    remove_file(folder, "tokenizer.model");
    remove_file(folder, "tokenizer.json");
    remove_file(folder, "tokenizer_config.json");
    assert(rmdir(folder) == 0);
}

int main(void)
{
    test_json();
    test_json_variants();
    test_spm();
    test_folder();
    return 0;
}
