/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Opening a model asks for huge pages of all but the table of per-layer embeddings. A step asks for
 * the rows of the table that its tokens need, each once and nothing else, within the file's
 * mapping; of a small table it asks for nothing. madvise() is ours.
 */

#undef NDEBUG
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine.h"
#include "engine/model-file.h"
#include "engine/model.h"
#include "engine/read-ahead.h"
#include "tests/model-builder.h"
#include "tests/must.h"

#define CALLS_MAX 64

static struct {
    uintptr_t begin, end;
} calls[CALLS_MAX];
static size_t n_calls;
static int wanted_advice; /* other calls are not recorded */

int madvise(void *address, size_t length, int advice)
{
    if (advice == wanted_advice) {
        assert(n_calls < CALLS_MAX);
        calls[n_calls].begin = (uintptr_t)address;
        calls[n_calls++].end = (uintptr_t)address + length;
    }
    return 0;
}

static struct model *model_of(const char *path, uint32_t vocab_size_ple)
{
    struct model_builder b = {.type = WEIGHT_F32, .seed = 1};

    model_builder_config(&b.config, 5, 5, 64);
    b.config.vocab_size_ple = vocab_size_ple;
    b.config.vocab_size = vocab_size_ple + 16;
    b.config.ple_width = 128;
    model_builder_write(&b, path);
    n_calls = 0;
    wanted_advice = MADV_HUGEPAGE;
    return must_open(path);
}

static void eval(const struct model *m, const uint32_t *tokens, size_t n)
{
    struct engine_options o = {.n_threads = 1, .kv_bytes = (uint64_t)16 << 20, .max_rows = 8};
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(session_freep) struct session *s = NULL;

    assert(engine_new(&e, m, &o, NULL) == 0 && session_new(&s, e, 0, NULL) == 0);
    n_calls = 0;
    wanted_advice = MADV_WILLNEED;
    assert(session_eval(s, tokens, n, NULL) == 0);
}

/* The model was opened just now. */
static void check_huge_pages(const struct model *m)
{
    const struct weight *w = &model_weights(m)->ple_embed;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size, bytes;
    uintptr_t map = (uintptr_t)model_file_map(model_get_file(m), &size), table = (uintptr_t)w->data;

    assert(weight_size(w->type, w->layout, w->n_out, w->n_in, &bytes) == 0);
    assert(n_calls == 2 && calls[0].begin == map && calls[1].end == map + size);
    assert(calls[0].end >= table && calls[0].end < table + page);
    assert(calls[1].begin <= table + bytes && calls[1].begin > table + bytes - page);
    assert(calls[0].end % page == 0 && calls[1].begin % page == 0);
}

/* A table within one page, and none: the whole mapping. */
static void check_odd_tables(void)
{
    static _Alignas(4096) char map[3 * 4096];

    wanted_advice = MADV_HUGEPAGE;
    for (int i = 0; i < 2; i++) {
        n_calls = 0;
        read_ahead_in_huge_pages(map, sizeof(map), i ? map + 4196 : NULL, i ? 200 : 0);
        assert(n_calls == 1 && calls[0].begin == (uintptr_t)map);
        assert(calls[0].end == (uintptr_t)map + sizeof(map));
    }
    n_calls = 0; /* it is all there is */
    read_ahead_in_huge_pages(map, sizeof(map), map, sizeof(map));
    assert(n_calls == 0);
}

static void large(const char *path)
{
    enum { PLE = 4001 }; /* no whole number of pages */
    /* the first and last rows, one twice in a row, and two that the table lacks: row 0 for them */
    static const uint32_t tokens[] = {0, 7, 7, PLE - 1, PLE, PLE + 15, 1234},
                          rows[] = {0, 7, PLE - 1, 0, 1234};
    struct model *m = model_of(path, PLE);
    const struct weight *w = &model_weights(m)->ple_embed;
    size_t row = weight_row_bytes(w->type, w->n_in), page = (size_t)sysconf(_SC_PAGESIZE), size;
    uintptr_t map = (uintptr_t)model_file_map(model_get_file(m), &size);

    check_huge_pages(m);
    assert(row * PLE >= (size_t)8 << 20);
    eval(m, tokens, ARRAY_SIZE(tokens));
    assert(n_calls == ARRAY_SIZE(rows));
    for (size_t i = 0; i < n_calls; i++) {
        uintptr_t begin = (uintptr_t)w->data + rows[i] * row;

        assert(calls[i].begin % page == 0 && calls[i].begin <= begin);
        assert(begin - calls[i].begin < page && calls[i].end == begin + row);
        assert(calls[i].begin >= map && calls[i].end <= map + size);
    }
    /* two steps, each with its own rows */
    eval(m, (const uint32_t[]){1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 10);
    assert(n_calls == 10 && calls[9].end == (uintptr_t)w->data + 11 * row);
    model_free(m);
}

static void small(const char *path)
{
    struct model *m = model_of(path, 256);

    eval(m, (const uint32_t[]){1, 2, 3}, 3);
    assert(n_calls == 0);
    model_free(m);
}

int main(int argc, char **argv)
{
    assert(argc == 2);
    check_odd_tables();
    large(argv[1]);
    small(argv[1]);
    assert(unlink(argv[1]) == 0);
    return 0;
}
