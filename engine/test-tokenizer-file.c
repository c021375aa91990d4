/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A vocabulary through a model file and back, and model files whose tokenizer is broken. With the
 * real vocabulary ($LLMD_SHARED/data/tokenizer) also how long it takes, for people to read.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/checked.h"
#include "engine/model-file.h"
#include "engine/tokenizer.h"
#include "tools/import/foreign-tokenizer.h"
#include "tools/import/gguf.h"
#include "tools/import/model-writer.h"

static char folder[] = "/tmp/llmd-test-tokenizer-XXXXXX";
static char path[sizeof(folder) + 16];

static void clean_up(void)
{
    unlink(path);
    rmdir(folder);
}

/* What is written; a test changes a part of it. A blob of 0 bytes is left out. */
struct content {
    const char *settings;
    const void *text, *offsets, *scores, *types;
    size_t n_text, n_offsets, n_scores, n_types;
};

static void append(struct model_writer *w, const void *data, size_t n)
{
    assert(n == 0 || model_writer_append(w, data, n, NULL) == 0);
}

static void write_file(const struct content *c)
{
    CLEANUP(model_writer_freep) struct model_writer *w = NULL;
    static const char tail[16];

    assert(model_writer_new(&w, path, NULL) == 0);
    if (c->settings)
        assert(model_writer_set(w, "llmd.tokenizer", c->settings, NULL) == 0);
    if (c->n_text)
        assert(model_writer_add_blob(w, "tokenizer.pieces", c->n_text, NULL) == 0);
    if (c->n_offsets)
        assert(model_writer_add_blob(w, "tokenizer.offsets", c->n_offsets, NULL) == 0);
    if (c->n_scores)
        assert(model_writer_add_blob(w, "tokenizer.scores", c->n_scores, NULL) == 0);
    if (c->n_types)
        assert(model_writer_add_blob(w, "tokenizer.types", c->n_types, NULL) == 0);
    assert(model_writer_add_blob(w, "tail", sizeof(tail), NULL) == 0); /* a file is never empty */
    assert(model_writer_begin(w, NULL) == 0);
    append(w, c->text, c->n_text);
    append(w, c->offsets, c->n_offsets);
    append(w, c->scores, c->n_scores);
    append(w, c->types, c->n_types);
    append(w, tail, sizeof(tail));
    assert(model_writer_commit(w, NULL) == 0);
}

static struct content content_of(const struct tokenizer_table *t, const char *settings)
{
    return (struct content){
        .settings = settings,
        .text = t->text,
        .n_text = t->offsets[t->n_pieces],
        .offsets = t->offsets,
        .n_offsets = ((size_t)t->n_pieces + 1) * sizeof(uint32_t),
        .scores = t->scores,
        .n_scores = t->n_pieces * sizeof(float),
        .types = t->types,
        .n_types = t->n_pieces,
    };
}

static int open_file(struct model_file **ret_file, struct tokenizer **ret, struct error *err)
{
    int r = model_file_open(ret_file, path, err);

    if (r < 0)
        fprintf(stderr, "%s\n", err->text);
    assert(r == 0);
    return tokenizer_from_model_file(ret, *ret_file, err);
}

static void expect_same(const struct tokenizer_table *a, const struct tokenizer_table *b)
{
    assert(a->n_pieces == b->n_pieces);
    assert(memcmp(a->offsets, b->offsets, (a->n_pieces + 1) * sizeof(uint32_t)) == 0);
    assert(memcmp(a->text, b->text, a->offsets[a->n_pieces]) == 0);
    assert(memcmp(a->scores, b->scores, a->n_pieces * sizeof(float)) == 0);
    assert(memcmp(a->types, b->types, a->n_pieces) == 0);
    assert(a->bos == b->bos && a->eos == b->eos && a->unk == b->unk && a->pad == b->pad);
    assert(a->start_of_turn == b->start_of_turn && a->end_of_turn == b->end_of_turn);
    assert(a->add_bos == b->add_bos && a->add_space_prefix == b->add_space_prefix);
}

static double milliseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static void round_trip(const struct tokenizer_table *table)
{
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    CLEANUP(freep) char *settings = NULL;
    struct content c;
    struct error err = {{0}};
    double start;

    assert(foreign_tokenizer_metadata(table, &settings) == 0);
    c = content_of(table, settings);
    write_file(&c);
    start = milliseconds();
    if (open_file(&f, &t, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        assert(!"does not open");
    }
    printf("%u pieces, from the model file: %.0f ms\n", table->n_pieces, milliseconds() - start);
    expect_same(table, tokenizer_table(t));
}

static void refuse(const struct content *c, int code, const char *because)
{
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    CLEANUP(tokenizer_freep) struct tokenizer *t = NULL;
    struct error err = {{0}};

    write_file(c);
    assert(open_file(&f, &t, &err) == -code && !t);
    if (!strstr(err.text, because) || !strstr(err.text, path)) {
        fprintf(stderr, "expected '%s' and the path, got '%s'\n", because, err.text);
        assert(!"another message");
    }
}

#define SETTINGS                                                                               \
    "{\"kind\":\"spm-bpe\",\"bos\":1,\"eos\":0,\"unk\":2,\"pad\":null,\"start_of_turn\":null," \
    "\"end_of_turn\":null,\"add_bos\":true,\"add_space_prefix\":false}"

static const uint32_t offsets[] = {0, 5, 10, 15, 16};
static const float scores[] = {0, 0, 0, -1};
static const uint8_t types[] = {PIECE_CONTROL, PIECE_CONTROL, PIECE_UNKNOWN, PIECE_NORMAL};

static const struct tokenizer_table small = {
    .n_pieces = 4,
    .text = "<eos><bos><unk>a",
    .offsets = offsets,
    .scores = scores,
    .types = types,
    .bos = 1,
    .eos = 0,
    .unk = 2,
    .pad = TOKENIZER_NONE,
    .start_of_turn = TOKENIZER_NONE,
    .end_of_turn = TOKENIZER_NONE,
    .add_bos = true,
};

static void test_broken(void)
{
    static const struct {
        const char *settings, *because;
    } wrong[] = {
        {"", "llmd.tokenizer"},
        {"[]", "'kind'"},
        {"{\"kind\":\"wordpiece\"}", "'kind'"},
        {"{\"kind\":\"spm-bpe\"}", "'bos' is missing"},
        {"{\"kind\":\"spm-bpe\",\"bos\":-1}", "'bos' is neither"},
        {"{\"kind\":\"spm-bpe\",\"bos\":4294967295}", "'bos' is neither"},
        {"{\"kind\":\"spm-bpe\",\"bos\":1.5}", "'bos' is neither"},
        {"{\"kind\":\"spm-bpe\",\"bos\":9,\"eos\":0,\"unk\":2,\"pad\":null,\"start_of_turn\":null,"
         "\"end_of_turn\":null,\"add_bos\":true,\"add_space_prefix\":false}",
         "bos is 9, beyond the 4 pieces"},
        {"{\"kind\":\"spm-bpe\",\"bos\":1,\"eos\":0,\"unk\":2,\"pad\":null,\"start_of_turn\":null,"
         "\"end_of_turn\":null,\"add_bos\":1,\"add_space_prefix\":false}",
         "'add_bos' is missing or not"},
        {"{\"kind\":\"spm-bpe\",\"bos\":1,\"eos\":0,\"unk\":2,\"pad\":null,\"start_of_turn\":null,"
         "\"end_of_turn\":null,\"add_bos\":true}",
         "'add_space_prefix' is missing or not"},
    };
    const struct content good = content_of(&small, SETTINGS);
    struct content c;
    uint32_t bad_offsets[] = {0, 5, 10, 17, 16};

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        c = good;
        c.settings = wrong[i].settings;
        refuse(&c, EINVAL, wrong[i].because);
    }
    c = good;
    c.settings = NULL;
    refuse(&c, ENODATA, "no tokenizer");
    c = good;
    c.n_text = 0;
    refuse(&c, EINVAL, "not 'tokenizer.pieces'");
    c = good;
    c.n_offsets = 0;
    refuse(&c, EINVAL, "not 'tokenizer.offsets'");
    c = good;
    c.n_scores = 0;
    refuse(&c, EINVAL, "not 'tokenizer.scores'");
    c = good;
    c.n_types = 0;
    refuse(&c, EINVAL, "not 'tokenizer.types'");
    c = good;
    c.n_types = 3;
    refuse(&c, EINVAL, "'tokenizer.scores' has 16 bytes, 3 pieces need 12");
    c = good;
    c.n_scores = 15;
    refuse(&c, EINVAL, "'tokenizer.scores' has 15 bytes");
    c = good;
    c.n_offsets = 16;
    refuse(&c, EINVAL, "'tokenizer.offsets' has 16 bytes, 4 pieces need 20");
    c = good;
    c.n_text = 15;
    refuse(&c, EINVAL, "'tokenizer.pieces' has 15 bytes, its offsets end at 16");
    c = good;
    c.offsets = bad_offsets;
    refuse(&c, EINVAL, "piece 3: its offset 17 is after its end 16");
}

int main(void)
{
    const char *shared = getenv("LLMD_SHARED");
    CLEANUP(freep) char *gguf_file = NULL;

    assert(mkdtemp(folder));
    snprintf(path, sizeof(path), "%s/model", folder);
    atexit(clean_up);

    round_trip(&small);
    test_broken();

    assert(asprintf(&gguf_file, "%s/data/tokenizer/gemma4-vocab.gguf",
                    shared && *shared ? shared : LLMD_SOURCE_ROOT "/../shared") > 0);
    if (access(gguf_file, R_OK) == 0) {
        CLEANUP(gguf_freep) struct gguf *g = NULL;
        CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *f = NULL;

        assert(gguf_open(&g, gguf_file, NULL) == 0);
        assert(foreign_tokenizer_from_gguf(&f, g, NULL) == 0);
        round_trip(&f->table);
    }
    return 0;
}
