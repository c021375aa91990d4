/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Writer and reader of model files against each other, and the reader against broken files.
 *
 *   test-model-file              the tests
 *   test-model-file --write FILE writes the sample model and ends, for tests/test-model-file.py,
 *                                which knows its contents by the same formulas
 *   test-model-file --tiny FILE  one that is small, to grow the fuzzer's corpus from
 */

#undef NDEBUG
#include "engine/model-file.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "tools/import/model-writer.h"

/* The sample model. */

static const struct sample {
    const char *name;
    enum weight_type type;
    enum weight_layout layout;
    uint32_t n_out, n_in; /* n_out 0: a blob of n_in bytes */
} samples[] = {
    {"blob.small", WEIGHT_F32, LAYOUT_PLAIN, 0, 5},
    {"blob.large", WEIGHT_F32, LAYOUT_PLAIN, 0, 5000},
    {"plain.norm", WEIGHT_F32, LAYOUT_PLAIN, 1, 48}, /* padded after the blob: listed as U8 */
    {"plain.norm2", WEIGHT_F32, LAYOUT_PLAIN, 1, 16},
    {"plain.router", WEIGHT_F32, LAYOUT_PLAIN, 4, 48},
    {"plain.odd", WEIGHT_F32, LAYOUT_PLAIN, 3, 7},
    {"plain.large", WEIGHT_F32, LAYOUT_PLAIN, 33, 41},
    {"tile16.f32", WEIGHT_F32, LAYOUT_TILE16, 17, 5},
    {"tile16.f16", WEIGHT_F16, LAYOUT_TILE16, 33, 7},
    {"tile16.bf16", WEIGHT_BF16, LAYOUT_TILE16, 5, 96},
    {"tile16.q8", WEIGHT_Q8, LAYOUT_TILE16, 40, 96},
    {"tile16.q4", WEIGHT_Q4, LAYOUT_TILE16, 35, 160},
    {"tile16.q4.one", WEIGHT_Q4, LAYOUT_TILE16, 1, 32},
    {"rows.f32", WEIGHT_F32, LAYOUT_ROWS, 3, 17},
    {"rows.f16", WEIGHT_F16, LAYOUT_ROWS, 4, 33},
    {"rows.bf16", WEIGHT_BF16, LAYOUT_ROWS, 2, 1},
    {"rows.q8", WEIGHT_Q8, LAYOUT_ROWS, 7, 64},
    {"rows.q4", WEIGHT_Q4, LAYOUT_ROWS, 9, 96},
    {"cols.f32", WEIGHT_F32, LAYOUT_COLS, 19, 3},
    {"cols.f16", WEIGHT_F16, LAYOUT_COLS, 31, 5},
    {"cols.bf16", WEIGHT_BF16, LAYOUT_COLS, 33, 9},
    {"cols.q8", WEIGHT_Q8, LAYOUT_COLS, 96, 64},
    {"cols.q4", WEIGHT_Q4, LAYOUT_COLS, 160, 96},
};

/* Number i of the tensor: FNV-1a of its name, then of i's bytes, stirred. */
static uint32_t sample_bits(const char *name, uint32_t i)
{
    uint32_t h = 2166136261u;

    for (; *name; name++)
        h = (h ^ (uint8_t)*name) * 16777619u;
    for (int b = 0; b < 4; b++)
        h = (h ^ (i >> 8 * b & 0xff)) * 16777619u;
    h ^= h >> 15;
    h *= 2246822519u;
    return h ^ h >> 13;
}

static int sample_q(const struct sample *s, uint32_t i)
{
    uint32_t h = sample_bits(s->name, i);

    return s->type == WEIGHT_Q4 ? (int)(h % 16) - 8 : (int)(h % 256) - 128;
}

static float sample_x(const struct sample *s, uint32_t i)
{
    return (float)((int)(sample_bits(s->name, i) % 256) - 128) / 64; /* exact in every type */
}

static uint16_t sample_d(const struct sample *s, uint32_t i)
{
    return half_from_float((float)(1 + (sample_bits(s->name, i) >> 8) % 1000) / 512); /* exact */
}

/* The packed bytes, malloc'ed. */
static uint8_t *sample_bytes(const struct sample *s, size_t *ret_bytes)
{
    struct weight w = {s->type, s->layout, s->n_out, s->n_in, NULL};
    CLEANUP(freep) float *x = calloc(s->n_in, sizeof(*x));
    CLEANUP(freep) int8_t *q = calloc(s->n_in, 1);
    CLEANUP(freep) uint16_t *d = calloc(s->n_in, 2);
    uint8_t *data;

    assert(x && q && d);
    if (s->n_out == 0) {
        data = malloc(s->n_in);
        assert(data);
        for (uint32_t i = 0; i < s->n_in; i++)
            data[i] = (uint8_t)sample_bits(s->name, i);
        *ret_bytes = s->n_in;
        return data;
    }
    assert(weight_size(s->type, s->layout, s->n_out, s->n_in, ret_bytes) == 0);
    data = calloc(1, *ret_bytes);
    assert(data);
    for (uint32_t r = 0; r < s->n_out; r++) {
        for (uint32_t k = 0; k < s->n_in; k++) {
            x[k] = sample_x(s, r * s->n_in + k);
            q[k] = (int8_t)sample_q(s, r * s->n_in + k);
            d[k / 32] = sample_d(s, r * (s->n_in / 32) + k / 32);
        }
        if (weight_type_is_quantized(s->type))
            weight_put_row_q(&w, data, r, q, d);
        else
            weight_put_row(&w, data, r, x);
    }
    return data;
}

static void fail(int r, const struct error *err)
{
    if (r < 0)
        fprintf(stderr, "unexpected: %s\n", err->text);
    assert(r == 0);
}

static void announce(struct model_writer *w, const struct sample *s, size_t n)
{
    struct error err = {0};

    fail(model_writer_set(w, "llmd.source", "a test \"of\" /quotes\\ and \xc3\xa9", &err), &err);
    for (size_t i = 0; i < n; i++)
        fail(s[i].n_out == 0 ? model_writer_add_blob(w, s[i].name, s[i].n_in, &err)
                             : model_writer_add_tensor(w, s[i].name, s[i].type, s[i].layout,
                                                       s[i].n_out, s[i].n_in, &err),
             &err);
}

/* chunk: bytes per append, over the borders of tensors. */
static void write_model(const char *path, const struct sample *s, size_t n, size_t chunk)
{
    CLEANUP(model_writer_freep) struct model_writer *w = NULL;
    CLEANUP(freep) uint8_t *all = NULL;
    struct error err = {0};
    uint64_t announced;
    struct stat st;
    size_t n_all = 0;

    fail(model_writer_new(&w, path, &err), &err);
    announce(w, s, n);
    fail(model_writer_file_bytes(w, &announced, &err), &err);
    fail(model_writer_begin(w, &err), &err);
    for (size_t i = 0; i < n; i++) {
        size_t bytes;
        CLEANUP(freep) uint8_t *data = sample_bytes(&s[i], &bytes);

        all = realloc(all, n_all + bytes);
        assert(all);
        memcpy(all + n_all, data, bytes);
        n_all += bytes;
    }
    for (size_t at = 0; at < n_all; at += chunk)
        fail(model_writer_append(w, all + at, MIN(chunk, n_all - at), &err), &err);
    fail(model_writer_commit(w, &err), &err);
    assert(model_writer_temporary(w) == NULL);
    assert(stat(path, &st) == 0 && (uint64_t)st.st_size == announced);
}

static void check_sample(const struct model_file *f, const struct sample *s)
{
    CLEANUP(freep) float *x = calloc(s->n_in, sizeof(*x));
    const struct model_tensor *t = model_file_find(f, s->name);
    size_t bytes, blob_bytes = 0, map_bytes;
    CLEANUP(freep) uint8_t *expected = sample_bytes(s, &bytes);
    const char *map = model_file_map(f, &map_bytes);
    const void *blob = model_file_blob(f, s->name, &blob_bytes);
    const char *data;

    assert(x);
    if (s->n_out == 0) {
        assert(!t && blob && blob_bytes == bytes && memcmp(blob, expected, bytes) == 0);
        data = blob;
    } else {
        assert(t && !blob);
        assert(strcmp(t->name, s->name) == 0 && t->bytes == bytes);
        assert(t->weight.type == s->type && t->weight.layout == s->layout);
        assert(t->weight.n_out == s->n_out && t->weight.n_in == s->n_in);
        data = t->weight.data;
        assert(map + t->offset == data);
        assert(memcmp(data, expected, bytes) == 0);
        for (uint32_t r = 0; r < s->n_out; r++) {
            weight_get_row(&t->weight, r, x);
            for (uint32_t k = 0; k < s->n_in; k++) {
                uint32_t i = r * s->n_in + k;

                assert(x[k] == (weight_type_is_quantized(s->type)
                                    ? half_to_float(sample_d(s, r * (s->n_in / 32) + k / 32)) *
                                          (float)sample_q(s, i)
                                    : sample_x(s, i)));
            }
        }
    }
    assert((uintptr_t)(data - map) % (bytes >= 4096 ? 4096 : 64) == 0);
    assert(data + bytes <= map + map_bytes);
}

static size_t files_in(const char *dir)
{
    CLEANUP(closedirp) DIR *d = opendir(dir);
    size_t n = 0;

    assert(d);
    while (readdir(d))
        n++;
    return n - 2;
}

static void test_round_trip(const char *dir)
{
    static const size_t chunks[] = {1, 63, 4096, 1 << 30};
    CLEANUP(freep) char *path = NULL;
    struct error err = {0};
    struct stat st;
    mode_t mask = umask(027);

    assert(asprintf(&path, "%s/round.llm", dir) > 0);
    for (size_t i = 0; i < ARRAY_SIZE(chunks); i++) {
        CLEANUP(model_file_freep) struct model_file *f = NULL;
        size_t n_weights = 0;

        write_model(path, samples, ARRAY_SIZE(samples), chunks[i]);
        fail(model_file_open(&f, path, &err), &err);
        for (size_t s = 0; s < ARRAY_SIZE(samples); s++) {
            check_sample(f, &samples[s]);
            if (samples[s].n_out > 0)
                assert(strcmp(model_file_tensor(f, n_weights++)->name, samples[s].name) == 0);
        }
        assert(model_file_n_tensors(f) == n_weights);
        assert(!model_file_find(f, "absent") && !model_file_find(f, "blob.small"));
        assert(!model_file_find(f, "zzz") && !model_file_find(f, ""));
        assert(strcmp(model_file_metadata(f, "llmd.source"),
                      "a test \"of\" /quotes\\ and \xc3\xa9") == 0);
        assert(!model_file_metadata(f, "llmd.config"));
        assert(strcmp(model_file_path(f), path) == 0);
        fail(model_file_verify(f, &err), &err);
    }
    assert(files_in(dir) == 1); /* each replaced the one before */
    assert(stat(path, &st) == 0 && (st.st_mode & 0777) == 0640);
    umask(mask);
    unlink(path);
}

/* Replaced at link time, so that failures of the system can be had. */

static bool fail_linkat;
static int fail_pwrite; /* errno, once n_pwrites have passed */
static int n_pwrites;

int __real_linkat(int from_fd, const char *from, int to_fd, const char *to, int flags);
int __wrap_linkat(int from_fd, const char *from, int to_fd, const char *to, int flags);
ssize_t __real_pwrite64(int fd, const void *data, size_t n, off_t offset);
ssize_t __wrap_pwrite64(int fd, const void *data, size_t n, off_t offset);

int __wrap_linkat(int from_fd, const char *from, int to_fd, const char *to, int flags)
{
    if (fail_linkat) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return __real_linkat(from_fd, from, to_fd, to, flags);
}

ssize_t __wrap_pwrite64(int fd, const void *data, size_t n, off_t offset)
{
    if (fail_pwrite && n_pwrites-- <= 0) {
        errno = fail_pwrite;
        return -1;
    }
    return __real_pwrite64(fd, data, n, offset);
}

/* The n-th allocation from now on fails; 0: none does. */
static int fail_allocation;

static bool allocation_fails(void)
{
    return fail_allocation > 0 && --fail_allocation == 0;
}

#define WRAP(type, function, parameters, arguments)                     \
    type __real_##function parameters;                                  \
    type __wrap_##function parameters;                                  \
    type __wrap_##function parameters                                   \
    {                                                                   \
        return allocation_fails() ? NULL : __real_##function arguments; \
    }

WRAP(void *, malloc, (size_t n), (n))
WRAP(void *, calloc, (size_t n, size_t size), (n, size))
WRAP(void *, reallocarray, (void *p, size_t n, size_t size), (p, n, size))
WRAP(char *, strdup, (const char *s), (s))
WRAP(char *, strndup, (const char *s, size_t n), (s, n))
WRAP(json_object *, json_object_new_object, (void), ())
WRAP(json_object *, json_object_new_array, (void), ())
WRAP(json_object *, json_object_new_string, (const char *s), (s))
WRAP(json_object *, json_object_new_int64, (int64_t i), (i))
WRAP(json_tokener *, json_tokener_new_ex, (int depth), (depth))

static int write_and_read(const char *path)
{
    CLEANUP(model_writer_freep) struct model_writer *w = NULL;
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    uint8_t zeros[64] = {0};
    int r;

    if ((r = model_writer_new(&w, path, NULL)) < 0 ||
        (r = model_writer_set(w, "llmd.source", "x", NULL)) < 0 ||
        (r = model_writer_add_blob(w, "b", 10, NULL)) < 0 ||
        (r = model_writer_add_tensor(w, "t", WEIGHT_F32, LAYOUT_PLAIN, 1, 16, NULL)) < 0 ||
        (r = model_writer_add_tensor(w, "u", WEIGHT_F32, LAYOUT_PLAIN, 1, 16, NULL)) < 0 ||
        (r = model_writer_begin(w, NULL)) < 0 ||
        (r = model_writer_append(w, zeros, 10, NULL)) < 0 ||
        (r = model_writer_append(w, zeros, 64, NULL)) < 0 ||
        (r = model_writer_append(w, zeros, 64, NULL)) < 0 ||
        (r = model_writer_commit(w, NULL)) < 0 || (r = model_file_open(&f, path, NULL)) < 0)
        return r;
    return model_file_verify(f, NULL);
}

/* Each allocation of the writer and the reader fails once; ASan watches that nothing leaks. */
static void test_out_of_memory(const char *dir)
{
    CLEANUP(freep) char *path = NULL;
    int n = 0, r;

    assert(asprintf(&path, "%s/memory.llm", dir) > 0);
    do {
        unlink(path);
        fail_allocation = ++n;
        r = write_and_read(path);
        assert(r == 0 || r == -ENOMEM);
        assert(fail_allocation == 0 || r == 0);
        fail_allocation = 0;
        assert(files_in(dir) == (access(path, F_OK) == 0));
    } while (r < 0);
    assert(n > 50); /* or none was counted */
    unlink(path);
}

/* What the writer refuses, and that nothing stays behind of what was not committed. */
static void test_writer_failures(const char *dir)
{
    CLEANUP(freep) char *path = NULL;
    uint8_t zeros[64] = {0};
    struct error err = {0};

    assert(asprintf(&path, "%s/never.llm", dir) > 0);
    for (int named = 0; named < 2; named++) {
        struct model_writer *w = NULL;

        fail_linkat = named;
        fail(model_writer_new(&w, path, &err), &err);
        assert(model_writer_begin(w, &err) == -EINVAL && strstr(err.text, "at least one tensor"));
        w = model_writer_free(w);

        fail(model_writer_new(&w, path, &err), &err);
        assert(model_writer_set(w, "llmd.tensors", "x", &err) == -EINVAL);
        assert(model_writer_set(w, "llmd.format", "x", &err) == -EINVAL);
        assert(model_writer_set(w, "llmd.header_sha256", "x", &err) == -EINVAL);
        assert(model_writer_set(w, "llmd.source", "\xff", &err) == -EINVAL);
        assert(model_writer_add_blob(w, "b", 0, &err) == -EINVAL && strstr(err.text, "blob b"));
        assert(model_writer_add_tensor(w, "t", WEIGHT_Q4, LAYOUT_TILE16, 3, 31, &err) == -EINVAL);
        assert(strstr(err.text, "[3, 31] as q4 tile16"));
        assert(model_writer_add_blob(w, "__metadata__", 1, &err) == -EINVAL);
        assert(model_writer_add_blob(w, "", 1, &err) == -EINVAL);
        fail(model_writer_add_blob(w, "b", 10, &err), &err);
        assert(model_writer_add_blob(w, "b", 10, &err) == -EINVAL && strstr(err.text, "already"));
        fail(model_writer_begin(w, &err), &err);
        assert(!model_writer_temporary(w) == !named && files_in(dir) == (size_t)named);
        fail(model_writer_append(w, zeros, 9, &err), &err);
        assert(model_writer_commit(w, &err) == -EINVAL && strstr(err.text, "b: bytes are missing"));
        w = model_writer_free(w);
        assert(files_in(dir) == 0);

        fail(model_writer_new(&w, path, &err), &err);
        fail(model_writer_add_blob(w, "b", 10, &err), &err);
        fail(model_writer_begin(w, &err), &err);
        assert(model_writer_append(w, zeros, 11, &err) == -EINVAL);
        w = model_writer_free(w);
        assert(files_in(dir) == 0);

        /* The disk fills up while writing the data, the header, the length. */
        for (n_pwrites = 0; n_pwrites < 3;) {
            int passed = n_pwrites;

            fail(model_writer_new(&w, path, &err), &err);
            fail(model_writer_add_blob(w, "b", 10, &err), &err);
            fail(model_writer_begin(w, &err), &err);
            fail(model_writer_append(w, zeros, 10, &err), &err);
            fail_pwrite = ENOSPC;
            assert(model_writer_commit(w, &err) == -ENOSPC && strstr(err.text, "no space"));
            fail_pwrite = 0;
            w = model_writer_free(w);
            assert(files_in(dir) == 0);
            n_pwrites = passed + 1;
        }

        /* Both ways of naming the file lead to the same end. */
        write_model(path, samples, 1, 100);
        assert(files_in(dir) == 1);
        unlink(path);
    }
    fail_linkat = false;

    {
        CLEANUP(model_writer_freep) struct model_writer *w = NULL;

        fail(model_writer_new(&w, path, &err), &err);
        fail(model_writer_add_tensor(w, "t", WEIGHT_Q8, LAYOUT_TILE16, 1 << 22, 1 << 21, &err),
             &err);
        assert(model_writer_begin(w, &err) == -ENOSPC && strstr(err.text, "no space"));
    }
    {
        CLEANUP(model_writer_freep) struct model_writer *w = NULL;

        fail(model_writer_new(&w, path, &err), &err);
        for (int i = 0; i < 4; i++) {
            char name[] = {(char)('a' + i), 0};

            fail(model_writer_add_tensor(w, name, WEIGHT_F32, LAYOUT_PLAIN, 1u << 30, 1u << 29,
                                         &err),
                 &err);
        }
        assert(model_writer_begin(w, &err) == -EOVERFLOW && strstr(err.text, "too large"));
    }
    {
        CLEANUP(model_writer_freep) struct model_writer *w = NULL;

        fail(model_writer_new(&w, dir, &err), &err);
        fail(model_writer_add_blob(w, "b", 10, &err), &err);
        assert(model_writer_begin(w, &err) == -EISDIR);
    }
    {
        CLEANUP(model_writer_freep) struct model_writer *w = NULL;

        fail(model_writer_new(&w, "/nowhere/at/all", &err), &err);
        fail(model_writer_add_blob(w, "b", 10, &err), &err);
        assert(model_writer_begin(w, &err) == -ENOENT && strstr(err.text, "/nowhere/at"));
    }
    assert(files_in(dir) == 0);
}

/* Broken files, made from a small good one. */

static const struct sample tiny[] = {
    {"s", WEIGHT_F32, LAYOUT_PLAIN, 0, 5},
    {"n", WEIGHT_F32, LAYOUT_PLAIN, 1, 16}, /* 59 bytes of padding before it: U8 */
    {"m", WEIGHT_F32, LAYOUT_PLAIN, 2, 16}, /* F32 [2, 16] */
    {"v", WEIGHT_F32, LAYOUT_PLAIN, 1, 16}, /* F32 [16] */
    {"q", WEIGHT_Q4, LAYOUT_TILE16, 16, 32},
};

struct bytes {
    uint8_t *data;
    size_t n;
};

static void bytes_done(struct bytes *b)
{
    free(b->data);
}

static size_t header_end(const struct bytes *b)
{
    uint64_t n = 0;

    for (int i = 0; i < 8; i++)
        n |= (uint64_t)b->data[i] << 8 * i;
    return 8 + n;
}

static struct bytes read_file(const char *path)
{
    CLEANUP(fclosep) FILE *f = fopen(path, "re");
    struct bytes b = {malloc(1 << 20), 0};

    assert(f && b.data);
    b.n = fread(b.data, 1, 1 << 20, f);
    assert(b.n > 0 && b.n < 1 << 20);
    return b;
}

static void fix_hash(uint8_t *json, size_t n)
{
    uint8_t digest[EVP_MAX_MD_SIZE], *at = json + sizeof(MODEL_FILE_PREFIX) - 1;
    char hex[3];

    memset(at, '0', 64);
    assert(EVP_Digest(json, n, digest, NULL, EVP_sha256(), NULL) == 1);
    for (int i = 0; i < 32; i++) {
        snprintf(hex, sizeof(hex), "%02x", digest[i]);
        memcpy(at + 2 * i, hex, 2);
    }
}

static int open_bytes(struct model_file **ret, const void *data, size_t n, struct error *err)
{
    int fd = memfd_create("model", MFD_CLOEXEC);

    assert(fd >= 0 && write(fd, data, n) == (ssize_t)n);
    memset(err, 0, sizeof(*err));
    return model_file_open_fd(ret, fd, "FILE", err);
}

static void refuse_bytes(const void *data, size_t n, const char *expected)
{
    struct model_file *f = NULL;
    struct error err;
    int r = open_bytes(&f, data, n, &err);

    if (r != -EINVAL || f || strncmp(err.text, "FILE: ", 6) != 0 || !strstr(err.text, expected)) {
        fprintf(stderr, "expected \"%s\", got %d: %s\n", expected, r, err.text);
        abort();
    }
}

/* The good file with the first `from` in its JSON become `to`, its hash corrected. */
static struct bytes replaced(const struct bytes *good, const char *from, const char *to)
{
    size_t end = header_end(good), n_data = good->n - end, n;
    CLEANUP(freep) char *json = strndup((const char *)good->data + 8, end - 8);
    char *at = json ? strstr(json, from) : NULL;
    struct bytes b = {NULL, 0};

    if (!at) {
        fprintf(stderr, "not in the header: %s\n", from);
        abort();
    }
    json[strlen(json) - strspn(strrchr(json, '}') + 1, " ")] = 0; /* padding off */
    n = 8 + strlen(json) - strlen(from) + strlen(to);
    n = ALIGN_UP(n, (size_t)4096);
    b.n = n + n_data;
    b.data = malloc(b.n);
    assert(b.data);
    memset(b.data, ' ', n);
    for (int i = 0; i < 8; i++)
        b.data[i] = (uint8_t)((n - 8) >> 8 * i);
    memcpy(b.data + 8, json, (size_t)(at - json));
    memcpy(b.data + 8 + (at - json), to, strlen(to));
    memcpy(b.data + 8 + (at - json) + strlen(to), at + strlen(from), strlen(at + strlen(from)));
    memcpy(b.data + n, good->data + end, n_data);
    fix_hash(b.data + 8, n - 8);
    return b;
}

static void refuse(const struct bytes *good, const char *from, const char *to, const char *expected)
{
    CLEANUP(bytes_done) struct bytes b = replaced(good, from, to);

    refuse_bytes(b.data, b.n, expected);
}

/* One that must still open, to see that replaced() itself does not break files. */
static void accept(const struct bytes *good, const char *from, const char *to)
{
    CLEANUP(bytes_done) struct bytes b = replaced(good, from, to);
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    struct error err;

    fail(open_bytes(&f, b.data, b.n, &err), &err);
}

static void test_broken_fields(const struct bytes *good)
{
    CLEANUP(freep) char *deep = malloc(5000), *many = malloc((3u << 20) + 100);

    accept(good, "\"llmd.source\"", "\"llmd.other\"");
    accept(good, "\"llmd.source\":\"", "\"llmd.more\":\"\",\"llmd.source\":\"");

    /* the magic */
    refuse(good, "{\"__metadata__\":{\"llmd.header_sha256\":\"",
           "{\"__metadata__\":{\"llmd.header-sha256\":\"", "not a model file");

    /* the JSON itself */
    refuse(good, "\"llmd.source\"", "\"llmd.tensors\"", "a key occurs twice");
    refuse(good, "\"n\":", "\"s\":", "a key occurs twice");
    refuse(good, "\\\"n\\\":", "\\\"s\\\":", "llmd.tensors: a key occurs twice");
    refuse(good, "\"n\":", "\"\\u0073\":", "a key occurs twice");
    refuse(good, "\"n\":", "\"n\\u0000\":", "NUL");
    refuse(good, "\"n\":", "'n':", "not JSON");
    refuse(good, "\"n\":", "/* */\"n\":", "not JSON");
    refuse(good, "\"n\":", "\"\xff\":", "UTF-8");
    refuse(good, "\"n\":", "\"\n\":", "control character");
    refuse(good, "\"n\":", "\"n\"", "header");
    refuse(good, "[0,5]", "[0,NaN]", "not JSON");
    refuse(good, "[0,5]", "[0,5,]", "header");
    refuse(good, "[0,5]}", "[0,5]}}", "header");
    refuse(good, "[0,5]}", "[0,5]", "header");
    refuse(good, "\"s\":{", "\"s\":{},\"x\":{", "llmd.tensors");
    assert(deep && many);
    memset(deep, '[', 2000);
    memset(deep + 2000, ']', 2000);
    deep[4000] = 0;
    refuse(good, "[0,5]", deep, "too deep");
    for (size_t i = 0; i < 3u << 20; i += 2)
        memcpy(many + i, "0,", 2);
    strcpy(many + (3u << 20), "0");
    refuse(good, "0,5", many, "more than");

    /* metadata */
    refuse(good, "\"llmd.source\":\"", "\"llmd.source\":1,\"x\":\"", "llmd.source: not a string");
    refuse(good, "\"llmd.source\":\"", "\"x\":null,\"y\":\"", "x: not a string");
    refuse(good, "\"llmd.format\":\"1\"", "\"llmd.format\":\"2\"", "llmd.format: 2");
    refuse(good, "\"llmd.format\"", "\"llmd.formal\"", "llmd.format: missing");
    refuse(good, "\"llmd.tensors\"", "\"llmd.tensor\"", "llmd.tensors: missing");
    refuse(good, "\"llmd.tensors\":\"", "\"llmd.tensors\":\"[],", "llmd.tensors");
    refuse(good, "\"llmd.tensors\":\"{", "\"llmd.tensors\":\"[]\",\"x\":\"{", "llmd.tensors");
    refuse(good, "\"llmd.tensors\":\"{", "\"llmd.tensors\":\"{}\",\"x\":\"{",
           "llmd.tensors: does not describe");
    refuse(good, "\\\"n\\\":", "\\\"nn\\\":", "llmd.tensors: n: missing");
    refuse(good, "\\\"n\\\":{", "\\\"n\\\":3,\\\"x\\\":{", "llmd.tensors");

    /* "llmd.tensors": s is the blob, n the first weight */
    refuse(good, "\\\"type\\\":\\\"blob\\\"", "\\\"type\\\":\\\"blub\\\"", "s: a key is unknown");
    refuse(good, "\\\"type\\\":\\\"blob\\\"", "\\\"typ\\\":\\\"blob\\\"", "s: type");
    refuse(good, "\\\"type\\\":\\\"f32\\\"", "\\\"type\\\":\\\"f33\\\"", "n: type: f33");
    refuse(good, "\\\"type\\\":\\\"f32\\\"", "\\\"type\\\":3", "n: type");
    refuse(good, "\\\"type\\\":\\\"f32\\\"", "\\\"type\\\":\\\"q4\\\"", "n: shape");
    refuse(good, "\\\"type\\\":\\\"f32\\\"", "\\\"x\\\":0,\\\"type\\\":\\\"f32\\\"", "n: a key");
    refuse(good, "\\\"layout\\\":\\\"plain\\\"", "\\\"layout\\\":\\\"plane\\\"", "n: layout");
    refuse(good, "\\\"layout\\\":\\\"plain\\\",\\\"shape\\\":[2,16]",
           "\\\"layout\\\":\\\"rows\\\",\\\"shape\\\":[2,16]", "m: dtype");
    refuse(good, "\\\"layout\\\":\\\"tile16\\\"", "\\\"layout\\\":\\\"cols\\\"", "q: shape");
    refuse(good, "\\\"shape\\\":[2,16]", "\\\"shape\\\":[16,2]", "m: dtype or shape");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[1,17]", "n: data_offsets");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[0,16]", "n: shape");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[-1,16]", "n: shape");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[1.0,16]", "n: shape");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[16]", "n: shape");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[1,1,16]", "n: shape");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[4294967295,4294967295]", "n: shape");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[4294967297,16]", "n: shape");
    refuse(good, "\\\"shape\\\":[1,16]", "\\\"shape\\\":[1,99999999999999999999]", "n: shape");
    refuse(good, "\\\"pad\\\":59", "\\\"pad\\\":58", "n: data_offsets");
    refuse(good, "\\\"pad\\\":59", "\\\"pad\\\":-59", "n: pad");
    refuse(good, "\\\"pad\\\":59", "\\\"pad\\\":123", "n: pad");
    refuse(good, "\\\"pad\\\":59", "\\\"pad\\\":9223372036854775807", "n: pad");
    refuse(good, "\\\"pad\\\":0", "\\\"pad\\\":1", "s: pad: 1 instead of 0");
    refuse(good, "\\\"pad\\\":0", "\\\"pad\\\":\\\"0\\\"", "s: pad");
    refuse(good, "\\\"sha256\\\":\\\"", "\\\"sha256\\\":\\\"0", "s: sha256");
    refuse(good, "\\\"sha256\\\":\\\"", "\\\"sha256\\\":\\\"\\\",\\\"x\\\":\\\"", "s: sha256");

    /* the table */
    refuse(good, "\"dtype\":\"U8\"", "\"dtype\":\"I8\"", "s: dtype");
    refuse(good, "\"dtype\":\"F32\"", "\"dtype\":\"U8\"", "m: dtype");
    refuse(good, "\"dtype\":\"U8\"", "\"dtype\":8", "s: dtype");
    refuse(good, "\"shape\":[5]", "\"shape\":[4]", "s: dtype or shape");
    refuse(good, "\"shape\":[5]", "\"shape\":[5,1]", "s: dtype or shape");
    refuse(good, "\"shape\":[2,16]", "\"shape\":[16,2]", "m: dtype or shape");
    refuse(good, "\"shape\":[16]", "\"shape\":[1,16]", "v: dtype or shape");
    refuse(good, "\"shape\":[16]", "\"shape\":[17]", "v: dtype or shape");
    refuse(good, "\"shape\":[2,16]", "\"shape\":[32]", "m: dtype or shape");
    refuse(good, "\"shape\":[5],", "", "s: not an object of");
    refuse(good, "\"shape\":[5],", "\"shape\":[5],\"x\":0,", "s: not an object of");
    refuse(good, "[0,5]", "[0,5,5]", "s: data_offsets");
    refuse(good, "[0,5]", "[0]", "s: data_offsets");
    refuse(good, "[0,5]", "[5,0]", "s: data_offsets");
    refuse(good, "[0,5]", "[0,0]", "s: data_offsets");
    refuse(good, "[0,5]", "[-5,5]", "s: data_offsets");
    refuse(good, "[0,5]", "[0,9223372036854775806]", "s: data_offsets: end");
    refuse(good, "[0,5]", "[9223372036854775800,9223372036854775806]", "s: data_offsets: end");
    refuse(good, "[0,5]", "[18446744073709551615,5]", "s: data_offsets");
    refuse(good, "[0,5]", "[0,1e3]", "s: data_offsets");
    {
        CLEANUP(bytes_done) struct bytes b = replaced(good, "\"shape\":[5]", "\"shape\":[6]");
        CLEANUP(bytes_done) struct bytes b2 = replaced(&b, "[0,5]", "[0,6]");
        CLEANUP(bytes_done) struct bytes c = replaced(good, "\"shape\":[5]", "\"shape\":[4]");
        CLEANUP(bytes_done) struct bytes c2 = replaced(&c, "[0,5]", "[0,4]");

        refuse_bytes(b2.data, b2.n, "n: data_offsets: overlaps");
        refuse_bytes(c2.data, c2.n, "n: data_offsets: a hole");
    }
    {
        /* two names for the same bytes */
        CLEANUP(bytes_done) struct bytes b = replaced(good, "[256,320]", "[128,192]");

        refuse_bytes(b.data, b.n, "data_offsets: overlaps");
    }
}

static void test_broken_files(const struct bytes *good)
{
    size_t end = header_end(good);
    CLEANUP(freep) uint8_t *b = malloc(good->n + 1);
    static const uint64_t lengths[] = {0, 1, 103, 4087, 4089, 8184, UINT64_MAX, INT64_MAX, 1 << 20};
    struct model_file *f = NULL;
    struct error err;
    uint32_t seed = 1;

    assert(b);
    for (size_t n = 0; n < good->n; n++)
        refuse_bytes(good->data, n, "");
    memcpy(b, good->data, good->n);
    b[good->n] = 0;
    refuse_bytes(b, good->n + 1, "1 bytes after the last tensor q");

    for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
        memcpy(b, good->data, good->n);
        memcpy(b, &lengths[i], 8);
        refuse_bytes(b, good->n, "header");
    }

    /* 64 bytes less of padding, the hash correct: the data no longer begins on a page. */
    memcpy(b, good->data, end - 64);
    memcpy(b + end - 64, good->data + end, good->n - end);
    for (int i = 0; i < 8; i++)
        b[i] = (uint8_t)((uint64_t)(end - 64 - 8) >> 8 * i);
    fix_hash(b + 8, end - 64 - 8);
    refuse_bytes(b, good->n - 64, "would not begin on a page");

    /* One flipped bit anywhere in the header: the hash tells. */
    for (size_t bit = 0; bit < end * 8; bit++) {
        memcpy(b, good->data, good->n);
        b[bit / 8] ^= (uint8_t)(1 << bit % 8);
        refuse_bytes(b, good->n, "");
    }
    /* Up to four of them, with the hash made to fit: anything but a crash. */
    for (int i = 0; i < 20000; i++) {
        memcpy(b, good->data, good->n);
        for (int k = 0; k <= i % 4; k++) {
            seed = seed * 1664525u + 1013904223u;
            b[8 + (seed >> 8) % (end - 8)] ^= (uint8_t)(1 << (seed >> 5 & 7));
        }
        fix_hash(b + 8, end - 8);
        assert(!open_bytes(&f, b, good->n, &err) == !!f);
        f = model_file_free(f);
    }
    /* A bit of the data: opens, and verification names the tensor, for padding as well. */
    for (size_t at = end; at < good->n; at++) {
        memcpy(b, good->data, good->n);
        b[at] ^= 1;
        fail(open_bytes(&f, b, good->n, &err), &err);
        assert(model_file_verify(f, &err) == -EBADMSG);
        assert(strstr(err.text, at < end + 5     ? "FILE: s: SHA-256"
                                : at < end + 64  ? "FILE: n: padding"
                                : at < end + 128 ? "FILE: n: SHA-256"
                                : at < end + 256 ? "FILE: m: SHA-256"
                                : at < end + 320 ? "FILE: v: SHA-256"
                                                 : "FILE: q: SHA-256"));
        f = model_file_free(f);
    }
}

static void test_not_files(const char *dir)
{
    CLEANUP(freep) char *fifo = NULL;
    struct model_file *f = NULL;
    struct error err = {0};

    assert(asprintf(&fifo, "%s/fifo", dir) > 0 && mkfifo(fifo, 0600) == 0);
    assert(model_file_open(&f, fifo, &err) == -EINVAL && strstr(err.text, "not a regular file"));
    unlink(fifo);
    assert(model_file_open(&f, dir, &err) == -EINVAL && strstr(err.text, ": is a folder, not a"));
    assert(model_file_open(&f, "/nowhere", &err) == -ENOENT && strstr(err.text, "/nowhere"));
    assert(model_file_open(&f, "/nowhere", NULL) == -ENOENT);
}

int main(int argc, char **argv)
{
    char dir[] = "/tmp/test-model-file.XXXXXX";
    CLEANUP(freep) char *path = NULL;

    if (argc == 3 && strcmp(argv[1], "--write") == 0) {
        write_model(argv[2], samples, ARRAY_SIZE(samples), 1000);
        return 0;
    }
    if (argc == 3 && strcmp(argv[1], "--tiny") == 0) {
        write_model(argv[2], tiny, ARRAY_SIZE(tiny), 1000);
        return 0;
    }
    assert(argc == 1);
    assert(mkdtemp(dir));
    test_round_trip(dir);
    test_writer_failures(dir);
    test_not_files(dir);
    test_out_of_memory(dir);

    assert(asprintf(&path, "%s/tiny.llm", dir) > 0);
    write_model(path, tiny, ARRAY_SIZE(tiny), 100);
    {
        CLEANUP(bytes_done) struct bytes good = read_file(path);

        test_broken_fields(&good);
        test_broken_files(&good);
    }
    unlink(path);
    assert(rmdir(dir) == 0);
    return 0;
}
