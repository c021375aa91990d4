/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * K and V go to a file and come back bit by bit, in pieces of any size, whatever happens between
 * two pieces; a file that is not just this leaves the session as it was.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine-internal.h"
#include "engine/session.h"
#include "tests/model-builder.h"
#include "tests/must.h"

#define WINDOW 70
#define N 300u

static struct model *model;
static uint32_t vocab, tokens[1000];

static struct engine *engine_with(uint64_t kv_bytes, enum kv_type type, uint8_t first)
{
    uint8_t identity[ENGINE_IDENTITY] = {first};
    struct engine_options o = {.n_threads = 1,
                               .max_rows = 64,
                               .kv_bytes = kv_bytes,
                               .kv_type = type,
                               .kv_identity = identity};

    return must_engine(model, &o);
}

static struct engine *engine(void)
{
    return engine_with((uint64_t)4 << 20, KV_AUTO, 1);
}

static struct session *session_of(struct engine *e, uint32_t n)
{
    struct session *s;

    assert(session_new(&s, e, 1000, NULL) == 0);
    assert(session_eval(s, tokens, n, NULL) == 0);
    return s;
}

static int new_file(void)
{
    int fd = memfd_create("spill", MFD_CLOEXEC);

    assert(fd >= 0);
    return fd;
}

static int spill(struct session *s, int fd, uint64_t n_bytes, int *ret_pieces)
{
    int r;

    for (*ret_pieces = 1; (r = session_spill(s, fd, n_bytes)) == 1; ++*ret_pieces)
        assert(session_n_missing(s) < session_n_tokens(s));
    return r;
}

static int unspill(struct session *s, int fd, uint64_t n_bytes, int *ret_pieces)
{
    int r;

    for (*ret_pieces = 1; (r = session_unspill(s, fd, n_bytes)) == 1; ++*ret_pieces)
        assert(session_n_missing(s) == session_n_tokens(s));
    return r;
}

static uint64_t used(const struct engine *e)
{
    struct engine_memory m;

    engine_memory(e, &m);
    return m.kv_bytes_used;
}

static size_t file_size(int fd)
{
    struct stat st;

    assert(fstat(fd, &st) == 0);
    return (size_t)st.st_size;
}

/* All pages of a session, one behind the other. */
static char *pages_of(const struct session *s, size_t *ret_n)
{
    size_t page = kv_pool_page_bytes(s->engine->pool), n = 0;
    char *p = malloc(session_kv_bytes(s) + 1);

    for (uint32_t l = 0; l < s->kv.n_layers; l++)
        for (uint32_t i = 0; i < s->kv.layers[l].n; i++)
            if (s->kv.layers[l].data[i]) {
                memcpy(p + n, s->kv.layers[l].data[i], page);
                n += page;
            }
    *ret_n = n;
    return p;
}

static void check_bits(struct session *s)
{
    CLEANUP(freep) float *got = calloc(vocab, sizeof(*got));
    uint32_t n = session_n_tokens(s);
    struct engine *e = engine();
    struct session *fresh = session_of(e, n);
    const float *l;

    assert(session_eval(s, (uint32_t[]){7}, 1, &l) == 0);
    memcpy(got, l, vocab * sizeof(*got));
    assert(session_eval(fresh, (uint32_t[]){7}, 1, &l) == 0);
    assert(memcmp(got, l, vocab * sizeof(*got)) == 0);
    session_rewind(s, n);
    session_free(fresh);
    engine_free(e);
}

/* Any length, any piece; the same engine, or the next one. */
static void check_there_and_back(void)
{
    static const uint32_t lengths[] = {0, 1, 63, 64, 65, WINDOW, 200, N};
    static const uint64_t pieces[] = {1, 40000, UINT64_MAX};

    for (size_t i = 0; i < ARRAY_SIZE(lengths); i++)
        for (size_t k = 0; k < ARRAY_SIZE(pieces); k++) {
            struct engine *e = engine(), *other = engine();
            struct session *s = session_of(e, lengths[i]), *fork, *next;
            size_t n, n_back;
            char *before, *after;
            int fd = new_file(), n_pieces, r;
            uint64_t bytes = session_kv_bytes(s);

            assert(session_fork(&fork, s, NULL) == 0); /* whose pages stay */
            before = pages_of(s, &n);
            assert(pwrite(fd, "x", 1, 1 << 24) == 1); /* there was something in the file */
            r = spill(s, fd, pieces[k], &n_pieces);
            assert(r == 0 && (pieces[k] > 1 || n_pieces >= (int)(bytes / 40000)));
            assert(session_n_missing(s) == lengths[i] && session_kv_bytes(s) == 0);
            assert(used(e) == bytes && session_n_missing(fork) == 0);
            r = unspill(s, fd, pieces[k], &n_pieces);
            assert(r == 0 && (pieces[k] > 1 || n_pieces >= (int)(bytes / 40000)));
            assert(session_n_missing(s) == 0 && session_kv_bytes(s) == bytes);
            after = pages_of(s, &n_back);
            assert(n == n_back && memcmp(before, after, n) == 0);
            check_bits(s);
            check_bits(fork);
            if (lengths[i] > 0)
                assert(session_unspill(s, fd, 1) == -EINVAL); /* it has K and V */
            session_free(s);
            session_free(fork);
            assert(used(e) == 0);
            engine_free(e);

            assert(session_new(&next, other, 1000, NULL) == 0);
            assert(session_set_tokens(next, tokens, lengths[i]) == 0);
            assert(unspill(next, fd, pieces[k], &n_pieces) == 0);
            assert(session_n_missing(next) == 0 && session_kv_bytes(next) == bytes);
            check_bits(next);
            session_free(next);
            engine_free(other);
            free(before);
            free(after);
            close(fd);
        }
}

/* Part of K and V was there; more tokens came; a rewind within it. */
static void check_partly(void)
{
    struct engine *e = engine();
    struct session *s = session_of(e, N);
    struct step_item item = {.session = s, .n_tokens = 40};
    int fd = new_file(), n;

    session_drop_kv(s);
    assert(engine_step(e, &item, 1) == 0 && item.ret_error == 0);
    assert(spill(s, fd, 1, &n) == 0 && session_n_missing(s) == N);
    assert(unspill(s, fd, 1, &n) == 0 && session_n_missing(s) == N - 40);
    check_bits(s);
    assert(spill(s, fd, 1, &n) == 0);
    session_rewind(s, N - 1); /* the file holds N tokens' now */
    assert(session_unspill(s, fd, 1) == -EBADMSG && used(e) == 0);
    session_free(s);
    engine_free(e);
    close(fd);
}

/* Each thing that may happen between two pieces. */
static void check_between(void)
{
    for (int what = 0; what < 5; what++) {
        struct engine *e = engine();
        struct session *s = session_of(e, N), *fork = NULL;
        int fd = new_file(), n;

        for (int back = 0; back < 2; back++) {
            if (back) {
                session_drop_kv(s);
                session_rewind(s, 0);
                assert(session_eval(s, tokens, N, NULL) == 0 && spill(s, fd, 1, &n) == 0);
            }
            for (int i = 0; i < 3; i++)
                assert((back ? session_unspill(s, fd, 1) : session_spill(s, fd, 1)) == 1);
            if (what == 0)
                assert(session_eval(s, tokens + N, 1, NULL) == 0);
            else if (what == 1)
                session_rewind(s, N - 1);
            else if (what == 2)
                session_drop_kv(s);
            else if (what == 3)
                assert(session_fork(&fork, s, NULL) == 0);
            else
                assert((back ? session_spill(s, fd, 1) : session_unspill(s, fd, 1)) ==
                       (back ? 0 : -EINVAL));
            if (!back) {
                assert(spill(s, fd, 1, &n) == 0 && used(e) == (fork ? session_kv_bytes(fork) : 0));
                assert(unspill(s, fd, 1, &n) == 0);
            } else {
                n = unspill(s, fd, UINT64_MAX, &n);
                assert(n == 0 || (n == -EINVAL && what == 0) || (n == -EBADMSG && what == 1));
            }
            check_bits(s);
            fork = session_free(fork);
        }
        session_free(s);
        assert(used(e) == 0);
        engine_free(e);
        close(fd);
    }
}

/* What a file may be instead. */
static void check_hostile(void)
{
    struct engine *e = engine(), *f32 = engine_with((uint64_t)8 << 20, KV_F32, 1),
                  *other = engine_with((uint64_t)4 << 20, KV_AUTO, 2);
    struct session *s = session_of(e, N), *t;
    int good = new_file(), fd, n;
    size_t size;
    char *file;

    assert(spill(s, good, UINT64_MAX, &n) == 0);
    size = file_size(good);
    file = malloc(size + 1);
    assert(pread(good, file, size, 0) == (ssize_t)size);
    for (size_t cut = 0; cut <= size + 1; cut += cut < 600 || cut + 40 > size ? 1 : 5003) {
        if (cut == size)
            continue;
        fd = new_file();
        assert(ftruncate(fd, (off_t)cut) == 0);
        assert(pwrite(fd, file, MIN(cut, size), 0) == (ssize_t)MIN(cut, size));
        assert(session_unspill(s, fd, UINT64_MAX) == -EBADMSG && used(e) == 0);
        close(fd);
    }
    fd = new_file();
    assert(pwrite(fd, file, size, 0) == (ssize_t)size);
    for (size_t at = 0; at < size; at += at < 800 || at + 40 > size ? 1 : 4099)
        for (int bit = 0; bit < 8; bit += at < 800 ? 1 : 7) {
            char c = (char)(file[at] ^ 1 << bit);

            assert(pwrite(fd, &c, 1, (off_t)at) == 1);
            assert(unspill(s, fd, at % 2 ? UINT64_MAX : 65536, &n) == -EBADMSG && used(e) == 0);
            assert(session_n_missing(s) == N && session_kv_bytes(s) == 0);
            assert(pwrite(fd, file + at, 1, (off_t)at) == 1);
        }
    assert(unspill(s, fd, UINT64_MAX, &n) == 0); /* all is as it was again */
    check_bits(s);
    session_drop_kv(s);
    close(fd);

    /* Another session's, even by one token; another engine's. */
    assert(session_new(&t, e, 1000, NULL) == 0);
    assert(session_set_tokens(t, tokens + 1, N) == 0);
    assert(session_unspill(t, good, UINT64_MAX) == -EBADMSG);
    session_free(t);
    assert(session_new(&t, f32, 1000, NULL) == 0 && session_set_tokens(t, tokens, N) == 0);
    assert(session_unspill(t, good, UINT64_MAX) == -EBADMSG);
    session_free(t);
    assert(session_new(&t, other, 1000, NULL) == 0 && session_set_tokens(t, tokens, N) == 0);
    assert(session_unspill(t, good, UINT64_MAX) == -EBADMSG);
    session_free(t);

    /* No file to speak of. */
    fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert(session_unspill(s, fd, 1) == -EBADMSG);
    close(fd);
    assert(session_unspill(s, -1, 1) == -EBADF);
    assert(used(e) == 0 && session_n_missing(s) == N);

    session_free(s);
    engine_free(e);
    engine_free(f32);
    engine_free(other);
    free(file);
    close(good);
}

/* A full disk, a full pool: nothing is lost. */
static void check_full(const char *path)
{
    struct engine *e = engine_with((uint64_t)240 << 10, KV_AUTO, 1);
    struct session *s = session_of(e, N), *t;
    struct rlimit limit, small;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600), n, r;
    uint32_t had;

    assert(fd >= 0 && getrlimit(RLIMIT_FSIZE, &limit) == 0);
    signal(SIGXFSZ, SIG_IGN);
    small = limit;
    small.rlim_cur = 100000;
    assert(setrlimit(RLIMIT_FSIZE, &small) == 0);
    assert(spill(s, fd, 30000, &n) == -EFBIG && n > 1);
    assert(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    assert(session_n_missing(s) == 0);
    check_bits(s);
    close(fd);
    fd = open("/dev/full", O_RDWR | O_CLOEXEC);
    r = session_spill(s, fd, UINT64_MAX);
    assert((r == -ENOSPC || r == -EINVAL) && session_n_missing(s) == 0);
    close(fd);

    fd = new_file();
    assert(spill(s, fd, UINT64_MAX, &n) == 0);
    assert(session_new(&t, e, 1000, NULL) == 0);
    while (session_eval(t, tokens, 64, NULL) == 0)
        ;
    had = (uint32_t)used(e);
    assert(unspill(s, fd, 1, &n) == -ENOBUFS && used(e) == had && session_n_missing(s) == N);
    session_free(t);
    assert(unspill(s, fd, 1, &n) == 0);
    check_bits(s);
    session_free(s);
    engine_free(e);
    close(fd);
    unlink(path);
}

int main(int argc, char **argv)
{
    struct model_builder b = {.type = WEIGHT_F32, .seed = 1};
    uint32_t x = 1;

    assert(argc == 2);
    model_builder_config(&b.config, 5, 5, WINDOW);
    b.config.head_dim = 16;
    model_builder_write(&b, argv[1]);
    vocab = b.config.vocab_size;
    for (size_t i = 0; i < ARRAY_SIZE(tokens); i++) {
        x = x * 1664525u + 1013904223u;
        tokens[i] = (x >> 8) % vocab;
    }
    model = must_open(argv[1]);
    unlink(argv[1]);
    check_there_and_back();
    check_partly();
    check_between();
    check_hostile();
    check_full(argv[1]);
    model_free(model);
    return 0;
}
