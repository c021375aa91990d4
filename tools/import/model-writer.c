/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Offsets in a safetensors header count from its end, and the header's length is padded to the
 * page, so the layout of the payloads does not depend on the header's text. The header is built
 * twice: by begin() with hashes of zeros, which gives its length, and by commit() with the real
 * ones, which have the same length. Until the second one is written the file starts with zeros and
 * nobody takes it for a model.
 *
 * Payload bytes pass through one buffer, so that callers may append rows as they come.
 */

#include "tools/import/model-writer.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "base/checked.h"
#include "base/utf8.h"
#include "base/whole-io.h"
#include "engine/json-text.h"
#include "engine/model-file.h"

#define BUFFER_BYTES ((size_t)1 << 20)
#define WRITE_START_BYTES ((uint64_t)32 << 20)
#define HASH_BYTES 32
#define ZERO_HASH "0000000000000000000000000000000000000000000000000000000000000000"

struct entry {
    char *name;
    bool is_blob;
    struct weight weight; /* without data; unused for a blob */
    size_t bytes;
    uint64_t begin; /* of the padding, from the end of the header */
    size_t pad;
    char sha256[2 * HASH_BYTES + 1];
};

struct model_writer {
    char *path;
    json_object *metadata; /* what set() was given */
    json_object *names;    /* the set of entry names */
    struct entry *entries;
    size_t n_entries, n_allocated;

    /* from begin() on */
    int dir_fd, fd;
    char *dir, *base;    /* of path */
    char *temporary;     /* "dir/.base.part-XXXXXX" while the file has that name */
    size_t header_bytes; /* the JSON text with its padding */
    EVP_MD_CTX *hash;
    size_t current;  /* the entry being appended */
    uint64_t filled; /* bytes of it, padding included, that went into the buffer */
    uint8_t *buffer;
    size_t n_buffered;
    uint64_t file_offset;   /* where the buffer goes */
    uint64_t write_started; /* up to here the kernel was told to write */
};

static int no_memory(struct error *err)
{
    return error_set(err, ENOMEM, "out of memory");
}

int model_writer_new(struct model_writer **ret, const char *path, struct error *err)
{
    CLEANUP(model_writer_freep) struct model_writer *w = calloc(1, sizeof(*w));

    if (!w)
        return no_memory(err);
    w->dir_fd = w->fd = -EBADF;
    w->path = strdup(path);
    w->metadata = json_object_new_object();
    w->names = json_object_new_object();
    if (!w->path || !w->metadata || !w->names)
        return no_memory(err);
    *ret = TAKE_PTR(w);
    return 0;
}

struct model_writer *model_writer_free(struct model_writer *w)
{
    if (!w)
        return NULL;
    if (w->temporary)
        unlink(w->temporary);
    for (size_t i = 0; i < w->n_entries; i++)
        free(w->entries[i].name);
    free(w->entries);
    json_object_put(w->metadata);
    json_object_put(w->names);
    closep(&w->fd);
    closep(&w->dir_fd);
    EVP_MD_CTX_free(w->hash);
    free(w->buffer);
    free(w->temporary);
    free(w->dir);
    free(w->base);
    free(w->path);
    free(w);
    return NULL;
}

int model_writer_set(struct model_writer *w, const char *key, const char *value, struct error *err)
{
    json_object *v;

    if (strcmp(key, "llmd.header_sha256") == 0 || strcmp(key, "llmd.format") == 0 ||
        strcmp(key, "llmd.tensors") == 0)
        return error_set(err, EINVAL, "metadata %s: written by the writer itself", key);
    if (!utf8_valid(key, strlen(key)) || !utf8_valid(value, strlen(value)))
        return error_set(err, EINVAL, "metadata %s: invalid UTF-8", key);
    v = json_object_new_string(value);
    if (!v)
        return no_memory(err);
    if (json_object_object_add(w->metadata, key, v) < 0) {
        json_object_put(v);
        return no_memory(err);
    }
    return 0;
}

static int add_entry(struct model_writer *w, const char *name, const struct entry *entry,
                     struct error *err)
{
    struct entry *e;

    assert(w->fd < 0);
    if (name[0] == 0 || strlen(name) > MODEL_FILE_MAX_NAME || !utf8_valid(name, strlen(name)) ||
        strcmp(name, "__metadata__") == 0)
        return error_set(err, EINVAL, "tensor %s: not a usable name", name);
    if (json_object_object_get_ex(w->names, name, NULL))
        return error_set(err, EINVAL, "tensor %s: there is one of that name already", name);
    if (w->n_entries == w->n_allocated) {
        size_t n = w->n_allocated ? 2 * w->n_allocated : 64;
        struct entry *grown = reallocarray(w->entries, n, sizeof(*grown));

        if (!grown)
            return no_memory(err);
        w->entries = grown;
        w->n_allocated = n;
    }
    e = &w->entries[w->n_entries];
    *e = *entry;
    strcpy(e->sha256, ZERO_HASH);
    e->name = strdup(name);
    if (!e->name)
        return no_memory(err);
    w->n_entries++; /* from here on free() releases the name */
    if (json_object_object_add(w->names, name, NULL) < 0)
        return no_memory(err);
    return 0;
}

int model_writer_add_tensor(struct model_writer *w, const char *name, enum weight_type type,
                            enum weight_layout layout, uint32_t n_out, uint32_t n_in,
                            struct error *err)
{
    struct entry e = {.weight = {type, layout, n_out, n_in, NULL}};
    int r = weight_size(type, layout, n_out, n_in, &e.bytes);

    if (r < 0)
        return error_set(err, -r, "tensor %s: [%u, %u] as %s %s is not possible", name, n_out, n_in,
                         weight_type_name(type), weight_layout_name(layout));
    return add_entry(w, name, &e, err);
}

int model_writer_add_blob(struct model_writer *w, const char *name, size_t bytes, struct error *err)
{
    struct entry e = {.is_blob = true, .bytes = bytes};

    if (bytes == 0)
        return error_set(err, EINVAL, "blob %s: empty", name);
    return add_entry(w, name, &e, err);
}

/* Places every entry; *ret_bytes is the size of all data after the header. */
static int place_entries(struct model_writer *w, uint64_t *ret_bytes, struct error *err)
{
    size_t at = 0;

    for (size_t i = 0; i < w->n_entries; i++) {
        struct entry *e = &w->entries[i];
        size_t payload, align = e->bytes >= MODEL_FILE_PAGE ? MODEL_FILE_PAGE : WEIGHT_ALIGN;

        if (ckd_align(&payload, at, align))
            return error_set(err, EOVERFLOW, "tensor %s: the file gets too large", e->name);
        e->begin = at;
        e->pad = payload - at;
        if (ckd_add(&at, payload, e->bytes) || at > INT64_MAX / 2)
            return error_set(err, EOVERFLOW, "tensor %s: the file gets too large", e->name);
    }
    *ret_bytes = at;
    return 0;
}

/* Puts v into parent, or releases it and fails. */
static int put_member(json_object *parent, const char *key, json_object *v)
{
    if (!v)
        return -ENOMEM;
    if (json_object_object_add(parent, key, v) < 0) {
        json_object_put(v);
        return -ENOMEM;
    }
    return 0;
}

static int put_element(json_object *parent, uint64_t i)
{
    json_object *v = json_object_new_int64((int64_t)i);

    if (!v)
        return -ENOMEM;
    if (json_object_array_add(parent, v) < 0) {
        json_object_put(v);
        return -ENOMEM;
    }
    return 0;
}

/* "shape": as it is, vectors with one dimension where the table wants them so. */
static int put_shape(json_object *parent, const struct entry *e, bool vector_is_flat)
{
    CLEANUP(json_object_putp) json_object *shape = json_object_new_array();

    if (!shape)
        return -ENOMEM;
    if ((!vector_is_flat || e->weight.n_out != 1) && put_element(shape, e->weight.n_out) < 0)
        return -ENOMEM;
    if (put_element(shape, e->weight.n_in) < 0)
        return -ENOMEM;
    return put_member(parent, "shape", TAKE_PTR(shape));
}

/* The entry's part of "llmd.tensors". */
static int put_description(json_object *parent, const struct entry *e)
{
    CLEANUP(json_object_putp) json_object *d = json_object_new_object();
    const char *type = e->is_blob ? "blob" : weight_type_name(e->weight.type);

    if (!d || put_member(d, "type", json_object_new_string(type)) < 0)
        return -ENOMEM;
    if (!e->is_blob &&
        (put_member(d, "layout", json_object_new_string(weight_layout_name(e->weight.layout))) <
             0 ||
         put_shape(d, e, /* vector_is_flat= */ false) < 0))
        return -ENOMEM;
    if (put_member(d, "pad", json_object_new_int64((int64_t)e->pad)) < 0 ||
        put_member(d, "sha256", json_object_new_string(e->sha256)) < 0)
        return -ENOMEM;
    return put_member(parent, e->name, TAKE_PTR(d));
}

/* The entry's line in the safetensors table. */
static int put_table_entry(json_object *parent, const struct entry *e)
{
    CLEANUP(json_object_putp) json_object *t = json_object_new_object();
    CLEANUP(json_object_putp) json_object *array = NULL;
    bool plain = !e->is_blob && e->weight.layout == LAYOUT_PLAIN && e->pad == 0;

    if (!t || put_member(t, "dtype", json_object_new_string(plain ? "F32" : "U8")) < 0)
        return -ENOMEM;
    if (plain) {
        if (put_shape(t, e, /* vector_is_flat= */ true) < 0)
            return -ENOMEM;
    } else {
        array = json_object_new_array();
        if (!array || put_element(array, e->pad + e->bytes) < 0 ||
            put_member(t, "shape", TAKE_PTR(array)) < 0)
            return -ENOMEM;
    }
    array = json_object_new_array();
    if (!array || put_element(array, e->begin) < 0 ||
        put_element(array, e->begin + e->pad + e->bytes) < 0 ||
        put_member(t, "data_offsets", TAKE_PTR(array)) < 0)
        return -ENOMEM;
    return put_member(parent, e->name, TAKE_PTR(t));
}

/* The header as a JSON object, its own hash still zero; NULL: out of memory. */
static json_object *make_header(const struct model_writer *w)
{
    CLEANUP(json_object_putp) json_object *root = json_object_new_object();
    CLEANUP(json_object_putp) json_object *metadata = json_object_new_object();
    CLEANUP(json_object_putp) json_object *tensors = json_object_new_object();
    char format[16];
    const char *text;

    if (!root || !metadata || !tensors)
        return NULL;
    for (size_t i = 0; i < w->n_entries; i++)
        if (put_description(tensors, &w->entries[i]) < 0)
            return NULL;

    /* The order of these two is the file's magic. */
    snprintf(format, sizeof(format), "%d", MODEL_FILE_FORMAT);
    if (put_member(metadata, "llmd.header_sha256", json_object_new_string(ZERO_HASH)) < 0 ||
        put_member(metadata, "llmd.format", json_object_new_string(format)) < 0)
        return NULL;
    json_object_object_foreach(w->metadata, key, value)
    {
        if (put_member(metadata, key, json_object_get(value)) < 0)
            return NULL;
    }
    text = json_object_to_json_string_ext(tensors,
                                          JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
    if (!text || put_member(metadata, "llmd.tensors", json_object_new_string(text)) < 0 ||
        put_member(root, "__metadata__", TAKE_PTR(metadata)) < 0)
        return NULL;
    for (size_t i = 0; i < w->n_entries; i++)
        if (put_table_entry(root, &w->entries[i]) < 0)
            return NULL;
    return TAKE_PTR(root);
}

/* The header's text, padded with spaces so that the data after it begins on a page. */
static int header_text(const struct model_writer *w, char **ret_text, size_t *ret_n,
                       struct error *err)
{
    CLEANUP(json_object_putp) json_object *root = make_header(w);
    const char *text;
    char *padded;
    size_t n, n_padded;

    text = root ? json_object_to_json_string_length(
                      root, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE, &n)
                : NULL;
    if (!text)
        return no_memory(err);
    if (ckd_align(&n_padded, n + 8, MODEL_FILE_PAGE) || n_padded - 8 > MODEL_FILE_MAX_HEADER)
        return error_set(err, EOVERFLOW, "%s: a header of %zu bytes, at most %d are possible",
                         w->path, n, MODEL_FILE_MAX_HEADER);
    n_padded -= 8;
    padded = malloc(n_padded);
    if (!padded)
        return no_memory(err);
    memcpy(padded, text, n);
    memset(padded + n, ' ', n_padded - n);
    *ret_text = padded;
    *ret_n = n_padded;
    return 0;
}

int model_writer_file_bytes(struct model_writer *w, uint64_t *ret_bytes, struct error *err)
{
    CLEANUP(freep) char *text = NULL;
    uint64_t data_bytes;
    size_t header_bytes;
    int r;

    r = place_entries(w, &data_bytes, err);
    if (r < 0)
        return r;
    r = header_text(w, &text, &header_bytes, err);
    if (r < 0)
        return r;
    *ret_bytes = 8 + header_bytes + data_bytes;
    return 0;
}

static int split_path(struct model_writer *w)
{
    const char *slash = strrchr(w->path, '/');

    if (!slash)
        w->dir = strdup(".");
    else if (slash == w->path)
        w->dir = strdup("/");
    else
        w->dir = strndup(w->path, (size_t)(slash - w->path));
    w->base = strdup(slash ? slash + 1 : w->path);
    return w->dir && w->base ? 0 : -ENOMEM;
}

/* "DIR/.BASE.part-XXXXXX" with six random letters. */
static char *random_name(const struct model_writer *w)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz234567";
    uint8_t random[6] = {0};
    char suffix[7] = "", *name;

    if (getrandom(random, sizeof(random), GRND_NONBLOCK) < 0)
        memset(random, 0, sizeof(random)); /* O_EXCL tells when that is not enough */
    for (int i = 0; i < 6; i++)
        suffix[i] = letters[random[i] % 32];
    return asprintf(&name, "%s/.%s.part-%s", w->dir, w->base, suffix) < 0 ? NULL : name;
}

/* Gives the nameless fd a temporary name. 0 or -errno */
static int name_file(const struct model_writer *w, int fd, char **ret_name)
{
    char link[64];

    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    for (int attempt = 0; attempt < 16; attempt++) {
        CLEANUP(freep) char *name = random_name(w);

        if (!name)
            return -ENOMEM;
        if (linkat(AT_FDCWD, link, AT_FDCWD, name, AT_SYMLINK_FOLLOW) == 0) {
            *ret_name = TAKE_PTR(name);
            return 0;
        }
        if (errno != EEXIST)
            return -errno;
    }
    return -EEXIST;
}

/*
 * A file without a name vanishes by itself however the process ends. Whether it can get a name
 * later (it takes /proc and a file system that knows how) is tried beforehand with an empty one:
 * not after an hour of conversion.
 */
static int open_nameless(const struct model_writer *w)
{
    CLEANUP(closep) int probe = -EBADF;
    CLEANUP(freep) char *name = NULL;
    int r;

    probe = open(w->dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0644);
    if (probe < 0)
        return -errno;
    r = name_file(w, probe, &name);
    if (r < 0)
        return r;
    if (unlink(name) < 0)
        return -errno;
    r = open(w->dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0644);
    return r < 0 ? -errno : r;
}

static int open_named(const struct model_writer *w, char **ret_name)
{
    for (int attempt = 0; attempt < 16; attempt++) {
        CLEANUP(freep) char *name = random_name(w);
        int fd;

        if (!name)
            return -ENOMEM;
        fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
        if (fd >= 0) {
            *ret_name = TAKE_PTR(name);
            return fd;
        }
        if (errno != EEXIST)
            return -errno;
    }
    return -EEXIST;
}

static int create_file(struct model_writer *w, struct error *err)
{
    struct stat st;

    if (split_path(w) < 0)
        return no_memory(err);
    if (w->base[0] == 0 || strcmp(w->base, ".") == 0 || strcmp(w->base, "..") == 0)
        return error_set(err, EISDIR, "%s: name a file", w->path);
    w->dir_fd = open(w->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (w->dir_fd < 0)
        return error_set(err, errno, "%s: cannot open the folder: %s", w->dir, strerror(errno));
    if (fstatat(w->dir_fd, w->base, &st, 0) == 0 && !S_ISREG(st.st_mode))
        return error_set(err, S_ISDIR(st.st_mode) ? EISDIR : EINVAL, "%s: exists and is not a file",
                         w->path);
    w->fd = open_nameless(w);
    if (w->fd < 0)
        w->fd = open_named(w, &w->temporary);
    if (w->fd < 0)
        return error_set(err, -w->fd, "%s: cannot create a file here: %s", w->dir,
                         strerror(-w->fd));
    return 0;
}

static int disk_full(const struct model_writer *w, uint64_t bytes, struct error *err)
{
    struct statvfs st;
    uint64_t free_bytes = 0;

    if (fstatvfs(w->dir_fd, &st) == 0)
        free_bytes = (uint64_t)st.f_bavail * st.f_frsize;
    return error_set(err, ENOSPC, "%s: no space: the model takes %.1f MB, %.1f MB are free in %s",
                     w->path, (double)bytes / 1e6, (double)free_bytes / 1e6, w->dir);
}

static int reserve(const struct model_writer *w, uint64_t bytes, struct error *err)
{
    struct statvfs st;
    int r;

    /* Looking first: a reservation that fails would have taken all there is for a moment. */
    if (fstatvfs(w->fd, &st) == 0 && (uint64_t)st.f_bavail * st.f_frsize < bytes)
        return disk_full(w, bytes, err);
    do
        r = fallocate(w->fd, 0, 0, (off_t)bytes) < 0 ? errno : 0;
    while (r == EINTR);
    if (r == ENOSPC || r == EDQUOT)
        return disk_full(w, bytes, err);
    if (r == EOPNOTSUPP || r == ENOSYS) /* a file system that cannot reserve */
        return 0;
    if (r != 0)
        return error_set(err, r, "%s: cannot reserve %.1f MB: %s", w->path, (double)bytes / 1e6,
                         strerror(r));
    return 0;
}

int model_writer_begin(struct model_writer *w, struct error *err)
{
    CLEANUP(freep) char *text = NULL;
    uint64_t data_bytes;
    int r;

    assert(w->fd < 0);
    if (w->n_entries == 0)
        return error_set(err, EINVAL, "%s: a model file needs at least one tensor", w->path);
    r = place_entries(w, &data_bytes, err);
    if (r < 0)
        return r;
    r = header_text(w, &text, &w->header_bytes, err);
    if (r < 0)
        return r;
    w->buffer = malloc(BUFFER_BYTES);
    w->hash = EVP_MD_CTX_new();
    if (!w->buffer || !w->hash)
        return no_memory(err);
    if (EVP_DigestInit_ex(w->hash, EVP_sha256(), NULL) != 1)
        return error_set(err, EIO, "libcrypto offers no SHA-256");
    r = create_file(w, err);
    if (r < 0)
        return r;
    w->file_offset = 8 + w->header_bytes;
    return reserve(w, w->file_offset + data_bytes, err);
}

static int write_at(const struct model_writer *w, const void *data, size_t n, uint64_t offset,
                    struct error *err)
{
    int r = write_whole(w->fd, data, n, offset);

    if (r == -ENOSPC || r == -EDQUOT)
        return disk_full(w, offset + n, err);
    if (r < 0)
        return error_set(err, -r, "%s: cannot write: %s", w->path, strerror(-r));
    return 0;
}

static int flush(struct model_writer *w, struct error *err)
{
    int r = write_at(w, w->buffer, w->n_buffered, w->file_offset, err);

    if (r < 0)
        return r;
    w->file_offset += w->n_buffered;
    w->n_buffered = 0;
    /* Starts writing to the disk now, or gigabytes would wait for commit(). An optimisation only:
     * whether the data got there is fsync()'s to say. */
    if (w->file_offset - w->write_started >= WRITE_START_BYTES) {
        sync_file_range(w->fd, (off_t)w->write_started, (off_t)(w->file_offset - w->write_started),
                        SYNC_FILE_RANGE_WRITE);
        w->write_started = w->file_offset;
    }
    return 0;
}

/* data NULL: zeros. */
static int buffer_bytes(struct model_writer *w, const uint8_t *data, size_t n, struct error *err)
{
    while (n > 0) {
        size_t part = MIN(n, BUFFER_BYTES - w->n_buffered);
        int r;

        if (data) {
            memcpy(w->buffer + w->n_buffered, data, part);
            data += part;
        } else {
            memset(w->buffer + w->n_buffered, 0, part);
        }
        w->n_buffered += part;
        n -= part;
        if (w->n_buffered == BUFFER_BYTES) {
            r = flush(w, err);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

static void to_hex(const uint8_t *bytes, char *ret)
{
    for (size_t i = 0; i < HASH_BYTES; i++)
        snprintf(ret + 2 * i, 3, "%02x", bytes[i]);
}

/* Closes the current entry: its hash is known. */
static int finish_entry(struct model_writer *w, struct error *err)
{
    uint8_t digest[EVP_MAX_MD_SIZE];

    if (EVP_DigestFinal_ex(w->hash, digest, NULL) != 1 ||
        EVP_DigestInit_ex(w->hash, EVP_sha256(), NULL) != 1)
        return error_set(err, EIO, "libcrypto: SHA-256 failed");
    to_hex(digest, w->entries[w->current].sha256);
    w->current++;
    w->filled = 0;
    return 0;
}

int model_writer_append(struct model_writer *w, const void *data, size_t n, struct error *err)
{
    const uint8_t *p = data;
    int r;

    assert(w->fd >= 0);
    while (n > 0) {
        struct entry *e = &w->entries[w->current];
        size_t part;

        if (w->current == w->n_entries)
            return error_set(err, EINVAL, "%s: %zu bytes more than announced", w->path, n);
        if (w->filled == 0 && e->pad > 0) {
            r = buffer_bytes(w, NULL, e->pad, err);
            if (r < 0)
                return r;
        }
        if (w->filled == 0)
            w->filled = e->pad;
        part = MIN(n, e->pad + e->bytes - w->filled);
        if (EVP_DigestUpdate(w->hash, p, part) != 1)
            return error_set(err, EIO, "libcrypto: SHA-256 failed");
        r = buffer_bytes(w, p, part, err);
        if (r < 0)
            return r;
        w->filled += part;
        p += part;
        n -= part;
        if (w->filled == e->pad + e->bytes) {
            r = finish_entry(w, err);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

/* The final header, its own hash included, at the head of the file. */
static int write_header(struct model_writer *w, struct error *err)
{
    static const char prefix[] = MODEL_FILE_PREFIX;
    CLEANUP(freep) char *text = NULL;
    uint8_t digest[EVP_MAX_MD_SIZE], length[8];
    char hex[2 * HASH_BYTES + 1];
    size_t n;
    int r;

    r = header_text(w, &text, &n, err);
    if (r < 0)
        return r;
    assert(n == w->header_bytes && memcmp(text, prefix, sizeof(prefix) - 1) == 0);
    if (EVP_Digest(text, n, digest, NULL, EVP_sha256(), NULL) != 1)
        return error_set(err, EIO, "libcrypto: SHA-256 failed");
    to_hex(digest, hex);
    memcpy(text + sizeof(prefix) - 1, hex, 2 * HASH_BYTES);
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)((uint64_t)n >> 8 * i);
    r = write_at(w, text, n, 8, err);
    return r < 0 ? r : write_at(w, length, sizeof(length), 0, err);
}

int model_writer_commit(struct model_writer *w, struct error *err)
{
    int r;

    assert(w->fd >= 0);
    if (w->current != w->n_entries)
        return error_set(err, EINVAL, "%s: tensor %s: bytes are missing", w->path,
                         w->entries[w->current].name);
    r = flush(w, err);
    if (r < 0)
        return r;
    r = write_header(w, err);
    if (r < 0)
        return r;
    if (fsync(w->fd) < 0)
        return error_set(err, errno, "%s: cannot write: %s", w->path, strerror(errno));
    if (!w->temporary) {
        r = name_file(w, w->fd, &w->temporary);
        if (r < 0)
            return error_set(err, -r, "%s: cannot name the file: %s", w->path, strerror(-r));
    }
    if (rename(w->temporary, w->path) < 0)
        return error_set(err, errno, "%s: cannot rename the finished file: %s", w->path,
                         strerror(errno));
    free(w->temporary);
    w->temporary = NULL;
    if (fsync(w->dir_fd) < 0 && errno != EINVAL)
        return error_set(err, errno, "%s: cannot sync the folder: %s", w->dir, strerror(errno));
    return 0;
}

const char *model_writer_temporary(const struct model_writer *w)
{
    return w->temporary;
}
