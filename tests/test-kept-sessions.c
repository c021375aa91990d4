/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Sessions that outlive their engine: taken back after it left them, after its process was killed,
 * damaged, with another pool. What follows must be the bits that a fresh session computes.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/session.h"
#include "tests/model-builder.h"
#include "tests/must.h"

#define WINDOW 70 /* not a multiple of a page */
#define CONTEXT 1000u

static struct model *model;
static uint32_t vocab;
static uint8_t identity[ENGINE_IDENTITY] = {1, 2, 3};

static struct engine *engine_on(const struct engine_options *options)
{
    return must_engine(model, options);
}

/* fd: a pool to be taken back, -1: none. */
static struct engine *engine_with(int fd)
{
    return engine_on(&(struct engine_options){.n_threads = 1,
                                              .max_rows = 64,
                                              .kv_bytes = (uint64_t)4 << 20,
                                              .kv_identity = identity,
                                              .has_kv_fd = fd >= 0,
                                              .kv_fd = fd});
}

/* Memory that a child shares. */
static void *new_memory(const struct engine *e)
{
    void *p = mmap(NULL, session_memory_bytes(model_config(engine_model(e)), CONTEXT),
                   PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    assert(p != MAP_FAILED);
    return p;
}

static void free_memory(const struct engine *e, void *p)
{
    munmap(p, session_memory_bytes(model_config(engine_model(e)), CONTEXT));
}

static struct session *session_in(struct engine *e, void *memory)
{
    struct session *s;

    assert(session_new(&s, e, CONTEXT, memory) == 0);
    return s;
}

static struct session *adopt(struct engine *e, void *memory)
{
    struct error err = {""};
    struct session *s;

    if (session_adopt(&s, e, CONTEXT, memory, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return s;
}

static void feed(struct session *s, uint32_t n, uint32_t seed)
{
    uint32_t t[CONTEXT];

    for (uint32_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        t[i] = (seed >> 8) % vocab;
    }
    assert(session_eval(s, t, n, NULL) == 0);
}

static uint64_t used(const struct engine *e)
{
    struct engine_memory m;

    engine_memory(e, &m);
    return m.kv_bytes_used;
}

/* What comes after one more token is what a fresh session, in an engine of its own, gives. */
static void check_bits(struct session *s, struct engine *fresh_engine)
{
    CLEANUP(session_freep) struct session *fresh = NULL;
    CLEANUP(freep) float *got = calloc(vocab, sizeof(*got));
    const uint32_t token = 7;
    const float *l;
    uint32_t n = session_n_tokens(s);

    if (n == CONTEXT)
        return;
    assert(session_eval(s, &token, 1, &l) == 0);
    memcpy(got, l, vocab * sizeof(*got));
    assert(session_new(&fresh, fresh_engine, CONTEXT, NULL) == 0);
    assert(session_eval(fresh, session_tokens(s), n + 1, &l) == 0);
    assert(memcmp(got, l, vocab * sizeof(*got)) == 0);
    session_rewind(s, n);
}

/* Leaves three sessions, two of which share pages, and takes them back. */
static void check_left(void)
{
    struct engine *e = engine_with(-1), *fresh = engine_with(-1);
    struct session *s[3];
    void *memory[3];
    uint32_t missing[3], n[3];
    uint64_t bytes;
    int fd;

    for (int i = 0; i < 3; i++)
        memory[i] = new_memory(e);
    assert(!engine_kv_adopted(e));
    s[0] = session_in(e, memory[0]);
    feed(s[0], 300, 1);
    assert(session_fork(&s[1], s[0], memory[1]) == 0);
    session_set_mark(s[1], 290);
    feed(s[1], 200, 2);
    s[2] = session_in(e, memory[2]);
    feed(s[2], 250, 3);
    session_rewind(s[2], 20); /* the window is gone */
    assert(session_n_missing(s[2]) == 20);
    bytes = used(e);
    fd = fcntl(engine_kv_fd(e), F_DUPFD_CLOEXEC, 3);
    for (int i = 0; i < 3; i++) {
        n[i] = session_n_tokens(s[i]);
        missing[i] = session_n_missing(s[i]);
        session_leave(s[i]);
    }
    engine_free(e);

    e = engine_with(fd);
    assert(engine_kv_adopted(e) && used(e) == 0);
    for (int i = 0; i < 3; i++) {
        s[i] = adopt(e, memory[i]);
        assert(session_n_tokens(s[i]) == n[i] && session_n_missing(s[i]) == missing[i]);
    }
    assert(used(e) == bytes);
    assert(session_eval(s[0], (uint32_t[]){1}, 1, NULL) == -EINVAL); /* not yet */
    engine_adopted(e);
    assert(used(e) == bytes);
    session_rewind(s[1], 290); /* the mark has come along */
    assert(session_n_missing(s[1]) == 0);
    for (int i = 0; i < 3; i++)
        check_bits(s[i], fresh);
    for (int i = 0; i < 3; i++)
        session_leave(s[i]);
    engine_free(e);

    /* A pool that does not fit: tokens come back, nothing of their K and V counts. */
    for (int i = 0; i < 4; i++) {
        struct engine_options o = {.n_threads = 1,
                                   .max_rows = 64,
                                   .kv_bytes = (uint64_t)4 << 20,
                                   .kv_identity = identity,
                                   .has_kv_fd = true,
                                   .kv_fd = fd};
        uint8_t other[ENGINE_IDENTITY] = {1, 2, 4};

        if (i == 0)
            o.kv_identity = other;
        else if (i == 1)
            o.kv_type = KV_F32;
        else if (i == 2)
            o.kv_bytes /= 2;
        else
            o.activations = ACTIVATIONS_F32;
        e = engine_on(&o);
        assert(!engine_kv_adopted(e));
        for (int k = 0; k < 3; k++) {
            void *copy = new_memory(e);

            memcpy(copy, memory[k], session_memory_bytes(model_config(engine_model(e)), CONTEXT));
            s[k] = adopt(e, copy);
            assert(session_n_tokens(s[k]) == n[k] - (k == 1 ? 200 + 10 : 0));
            assert(session_n_missing(s[k]) == session_n_tokens(s[k]));
            assert(session_kv_bytes(s[k]) == 0);
            if (i == 0)
                check_bits(s[k], fresh);
            session_free(s[k]);
            free_memory(e, copy);
        }
        assert(used(e) == 0);
        engine_adopted(e); /* nothing */
        engine_free(e);
    }

    /* The same after the memory has met another pool: its old pages, and their numbers, are void.
     */
    e = engine_with(-1);
    for (int k = 0; k < 3; k++) {
        s[k] = adopt(e, memory[k]);
        assert(session_n_missing(s[k]) == session_n_tokens(s[k]));
        session_leave(s[k]);
    }
    engine_free(e);
    e = engine_with(fd);
    for (int k = 0; k < 3; k++) {
        s[k] = adopt(e, memory[k]);
        assert(session_n_missing(s[k]) == session_n_tokens(s[k]));
    }
    assert(used(e) == 0);
    engine_adopted(e);
    check_bits(s[0], fresh);
    for (int k = 0; k < 3; k++) {
        session_free(s[k]);
        free_memory(e, memory[k]);
    }
    assert(used(e) == 0);
    engine_free(e);
    engine_free(fresh);
    close(fd);
}

/* Each word of the memory changed: tokens are as they were, or their session is refused; and what
 * is computed from K and V that are taken is right. */
static void check_damage(void)
{
    struct engine *e = engine_with(-1), *fresh = engine_with(-1);
    size_t bytes = session_memory_bytes(model_config(engine_model(e)), CONTEXT);
    uint32_t *memory = new_memory(e), *copy = new_memory(e);
    struct session *s = session_in(e, memory);
    int fd = fcntl(engine_kv_fd(e), F_DUPFD_CLOEXEC, 3), n_refused = 0, n_missing = 0, n_none = 0,
        other_fd;
    CLEANUP(freep) uint32_t *tokens = calloc(CONTEXT, sizeof(*tokens));
    const _Atomic uint64_t *tables = s->memory.tables;
    struct error err;

    feed(s, 200, 4);
    memcpy(tokens, session_tokens(s), 200 * sizeof(*tokens));
    session_leave(s);
    engine_free(e);

    e = engine_with(fd);
    for (size_t k = 0; k < bytes; k++) { /* four bits of each word */
        size_t i = k / 4, bit = k % 4 * 8 + i % 8;
        struct session *got;
        int r;

        if (memory[i] == 0 && i % 97 > 0) /* of what was never written, some */
            continue;
        memcpy(copy, memory, bytes);
        copy[i] ^= (uint32_t)1 << bit;
        err.text[0] = 0;
        r = session_adopt(&got, e, CONTEXT, copy, &err);
        if (r < 0) {
            assert(r == -EBADMSG && err.text[0] && used(e) == 0);
            n_refused++;
            continue;
        }
        assert(session_n_tokens(got) == 200);
        assert(memcmp(session_tokens(got), tokens, 200 * sizeof(*tokens)) == 0);
        if (session_n_missing(got) == 0) {
            for (uint32_t l = 0; l < got->kv.n_layers; l++) /* the same pages, so the same bits */
                for (uint32_t p = 0; p < got->kv.layers[l].n; p++) {
                    const void *data = got->kv.layers[l].data[p];

                    assert((data ? kv_entry(kv_pool_page_of(e->pool, data), l, p) : 0) ==
                           tables[l * got->memory.n_entries + p]);
                }
            n_none++;
        } else {
            assert(session_n_missing(got) == 200 && session_kv_bytes(got) == 0);
            n_missing++;
        }
        session_free(got);
        assert(used(e) == 0);
    }
    printf("damage: %d refused, %d without K and V, %d not seen\n", n_refused, n_missing, n_none);
    assert(n_refused >= 1600 && n_missing >= 100);

    /* Memory of another size, never completed, or none of a session. */
    assert(session_adopt(&s, e, CONTEXT - 1, memory, &err) == -EBADMSG);
    assert(session_adopt(&s, e, 8193, memory, &err) == -EBADMSG);
    memset(copy, 0, bytes);
    assert(session_adopt(&s, e, CONTEXT, copy, &err) == -EBADMSG);
    memset(copy, 0xff, bytes);
    assert(session_adopt(&s, e, CONTEXT, copy, &err) == -EBADMSG);
    memset(copy, 0, bytes);
    engine_free(e);

    /* Of another pool, just like its own. */
    e = engine_with(-1);
    s = session_in(e, copy);
    feed(s, 300, 9);
    session_leave(s);
    other_fd = fcntl(engine_kv_fd(e), F_DUPFD_CLOEXEC, 3);
    engine_free(e);
    e = engine_with(other_fd);
    close(other_fd);
    memcpy(copy, memory, bytes);
    s = adopt(e, copy);
    assert(engine_kv_adopted(e) && session_n_missing(s) == 200 && used(e) == 0);
    session_free(s);
    engine_free(e);

    /* Two sessions that cannot both be right about a page: the second goes without. */
    e = engine_with(fd);
    memcpy(copy, memory, bytes);
    s = adopt(e, memory);
    assert(session_n_missing(s) == 0);
    {
        struct session_memory view;
        struct session *other;

        session_memory_lay_out(&view, copy, CONTEXT, s->kv.n_layers);
        view.tables[1] = kv_entry(kv_pool_page_of(e->pool, s->kv.layers[0].data[0]), 0, 1);
        other = adopt(e, copy);
        assert(session_n_missing(other) == 200 && session_n_missing(s) == 0);
        session_free(other);
        memcpy(copy, memory, bytes);
        session_memory_put_tokens(&view, 100, (uint32_t[]){1, 2, 3}, 3);
        session_memory_put_tokens(&view, 103, tokens + 103, 97); /* another history, so its own */
        other = adopt(e, copy);
        assert(session_n_missing(other) == 200 && session_n_missing(s) == 0);
        session_free(other);
    }
    engine_adopted(e);
    check_bits(s, fresh);
    session_free(s);
    engine_free(e);
    engine_free(fresh);
    close(fd);
    munmap(memory, bytes);
    munmap(copy, bytes);
}

/* What is no pool is not taken; memory of free pages goes back. */
static void check_pool(void)
{
    struct engine *e = engine_with(-1), *other;
    struct session *s = session_in(e, NULL), *kept = session_in(e, NULL);
    struct stat full, st;
    uint64_t bytes;
    char byte;
    int fd;

    assert(fstat(engine_kv_fd(e), &st) == 0 && st.st_blocks * 512 <= 4096);
    feed(kept, 10, 1);
    feed(s, 300, 1);
    bytes = used(e);
    assert(fstat(engine_kv_fd(e), &full) == 0 && (uint64_t)full.st_blocks * 512 >= bytes);
    session_free(s);
    bytes -= used(e);
    assert(engine_give_back(e) >= bytes / 2);
    assert(engine_give_back(e) == 0);
    assert(fstat(engine_kv_fd(e), &st) == 0 && (uint64_t)st.st_blocks * 512 <= used(e) + 8192);
    other = engine_with(-1);
    check_bits(kept, other);
    s = session_in(e, NULL); /* in pages that were given back */
    feed(s, 300, 5);
    check_bits(s, other);
    engine_free(other);

    /* Nobody may cut off what is mapped. */
    assert(ftruncate(engine_kv_fd(e), 4096) < 0 && errno == EPERM);
    assert(fcntl(engine_kv_fd(e), F_ADD_SEALS, F_SEAL_WRITE) < 0 && errno == EPERM);

    /* A copy without the seals, one with another header, something else altogether. */
    fd = memfd_create("copy", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert(ftruncate(fd, st.st_size) == 0);
    for (off_t at = 0; at < 4096; at++)
        assert(pread(engine_kv_fd(e), &byte, 1, at) == 1 && pwrite(fd, &byte, 1, at) == 1);
    other = engine_with(fd);
    assert(!engine_kv_adopted(other));
    engine_free(other);
    assert(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    other = engine_with(fd);
    assert(engine_kv_adopted(other));
    engine_adopted(other);
    engine_free(other);
    for (off_t at = 0; at < 48; at++) {
        assert(pread(fd, &byte, 1, at) == 1);
        byte ^= 4;
        assert(pwrite(fd, &byte, 1, at) == 1);
        other = engine_with(fd);
        assert(!engine_kv_adopted(other));
        engine_free(other);
        byte ^= 4;
        assert(pwrite(fd, &byte, 1, at) == 1);
    }
    close(fd);
    fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    other = engine_with(fd);
    assert(!engine_kv_adopted(other));
    engine_free(other);
    close(fd);

    session_free(s);
    session_free(kept);
    engine_free(e);
}

static int new_file(void)
{
    int fd = memfd_create("spilled", MFD_CLOEXEC);

    assert(fd >= 0);
    return fd;
}

/* K and V in a file, in pieces; who gives up in between and comes with another file begins anew. */
static void check_spilled(void)
{
    struct engine *e = engine_with(-1), *fresh = engine_with(-1);
    struct session *s = session_in(e, NULL);
    int given_up = new_file(), full = open("/dev/full", O_WRONLY | O_CLOEXEC), fd = new_file();
    uint8_t byte;
    int r, n = 0;

    feed(s, 300, 1);
    assert(session_spill(s, given_up, 1) == 1 && session_spill(s, given_up, 1) == 1);
    assert(full >= 0 && session_spill(s, full, 1) < 0 && session_n_missing(s) == 0);
    assert(session_spill(s, given_up, 1) == 1);
    while ((r = session_spill(s, fd, 1)) == 1)
        n++;
    assert(r == 0 && n > 2 && session_n_missing(s) == 300 && used(e) == 0);
    while ((r = session_unspill(s, fd, 1)) == 1)
        ;
    assert(r == 0 && session_n_missing(s) == 0 && used(e) > 0);
    check_bits(s, fresh);

    /* One bit of it, and nothing is taken. */
    assert(ftruncate(fd, 0) == 0);
    while ((r = session_spill(s, fd, UINT64_MAX)) == 1)
        ;
    assert(r == 0 && pread(fd, &byte, 1, 2000) == 1);
    byte ^= 1;
    assert(pwrite(fd, &byte, 1, 2000) == 1);
    while ((r = session_unspill(s, fd, 1)) == 1)
        ;
    assert(r == -EBADMSG && session_n_missing(s) == session_n_tokens(s) && used(e) == 0);
    check_bits(s, fresh);

    close(given_up);
    close(full);
    close(fd);
    session_free(s);
    engine_free(e);
    engine_free(fresh);
}

int main(int argc, char **argv)
{
    struct model_builder b = {.type = WEIGHT_F32, .seed = 1};

    assert(argc == 2);
    model_builder_config(&b.config, 5, 5, WINDOW);
    model_builder_write(&b, argv[1]);
    vocab = b.config.vocab_size;
    model = must_open(argv[1]);
    check_left();
    check_damage();
    check_pool();
    check_spilled();
    model_free(model);
    unlink(argv[1]);
    return 0;
}
