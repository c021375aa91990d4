/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The header is read into memory of our own, once; its hash is compared and its JSON is parsed
 * from that copy, so that nobody can change it in between. The safetensors table and the
 * description in "llmd.tensors" say many things twice: each must agree with the other and with
 * what the layout's arithmetic gives, and sorted by offset the tensors must cover the file without
 * hole or overlap to its last byte. Only then the file is mapped, and nothing of it is touched.
 */

#include "engine/model-file.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/whole-io.h"
#include "engine/json-text.h"
#include "engine/model-fault.h"

#define HASH_BYTES 32
#define HASH_DIGITS 64
#define VERIFY_CHUNK ((size_t)1 << 20)

static const char prefix[] = MODEL_FILE_PREFIX;
#define PREFIX_BYTES (sizeof(prefix) - 1)

/* Far beyond a model's some 2000 tensors with 12 values each. */
static const struct json_limits header_limits = {.depth = 8, .max_values = 1 << 20};

struct entry {
    struct model_tensor tensor; /* a blob has no weight but weight.data */
    bool is_blob;
    uint64_t begin; /* of the padding, in the file */
    char *name;
    char sha256[HASH_DIGITS + 1];
};

/* What is found out about the file after it was opened. */
struct watch {
    struct model_fault *fault;
    _Atomic(int64_t) changed_nsec; /* when the file was last written, as far as it is known */
};

struct model_file {
    char *path;
    int fd;
    void *map;
    size_t size;
    struct watch *watch;
    uint64_t data_start;
    json_object *metadata;
    struct entry *entries; /* [n_entries] in file order */
    size_t n_entries;
    const struct model_tensor **tensors; /* [n_tensors] those that are no blobs, in file order */
    size_t n_tensors;
    const struct entry **by_name; /* [n_entries] sorted */
};

DEFINE_CLEANUP(EVP_MD_CTX *, EVP_MD_CTX_free)

static int broken(const struct model_file *f, struct error *err, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static int broken(const struct model_file *f, struct error *err, const char *format, ...)
{
    char text[sizeof(err->text)];
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    return error_set(err, EINVAL, "%s: %s", f->path, text);
}

static int no_memory(struct error *err)
{
    return error_set(err, ENOMEM, "out of memory");
}

static void to_hex(const uint8_t *bytes, char *ret)
{
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < HASH_BYTES; i++) {
        ret[2 * i] = digits[bytes[i] >> 4];
        ret[2 * i + 1] = digits[bytes[i] & 15];
    }
    ret[HASH_DIGITS] = 0;
}

static bool is_hash(const char *text)
{
    return strlen(text) == HASH_DIGITS && strspn(text, "0123456789abcdef") == HASH_DIGITS;
}

static int cannot_read(const struct model_file *f, int r, struct error *err)
{
    if (r == -ENODATA)
        return broken(f, err, "ends too early");
    return error_set(err, -r, "%s: cannot read: %s", f->path, strerror(-r));
}

/* Reads the header and compares its hash. *ret_text is the JSON, [*ret_n], not terminated. */
static int read_header(struct model_file *f, char **ret_text, size_t *ret_n, struct error *err)
{
    CLEANUP(freep) char *text = NULL;
    uint8_t bytes[8], digest[EVP_MAX_MD_SIZE];
    char claimed[HASH_DIGITS + 1], actual[HASH_DIGITS + 1];
    uint64_t n = 0;
    int r;

    if (f->size < 8 + PREFIX_BYTES + HASH_DIGITS)
        return broken(f, err, "not a model file: only %zu bytes long", f->size);
    r = read_whole(f->fd, bytes, sizeof(bytes), 0);
    if (r < 0)
        return cannot_read(f, r, err);
    for (int i = 0; i < 8; i++)
        n |= (uint64_t)bytes[i] << 8 * i;
    if (n < PREFIX_BYTES + HASH_DIGITS || n > MODEL_FILE_MAX_HEADER)
        return broken(f, err, "not a model file: header length %llu", (unsigned long long)n);
    if (range_outside(8, n, f->size))
        return broken(f, err, "header length %llu, but the file has only %zu bytes",
                      (unsigned long long)n, f->size);

    text = malloc(n);
    if (!text)
        return no_memory(err);
    r = read_whole(f->fd, text, n, 8);
    if (r < 0)
        return cannot_read(f, r, err);
    if (memcmp(text, prefix, PREFIX_BYTES) != 0)
        return broken(f, err, "not a model file (make one with llm-import)");
    if ((8 + n) % MODEL_FILE_PAGE != 0)
        return broken(f, err, "header length %llu: the data would not begin on a page",
                      (unsigned long long)n);

    memcpy(claimed, text + PREFIX_BYTES, HASH_DIGITS);
    claimed[HASH_DIGITS] = 0;
    memset(text + PREFIX_BYTES, '0', HASH_DIGITS);
    if (EVP_Digest(text, n, digest, NULL, EVP_sha256(), NULL) != 1)
        return error_set(err, EIO, "libcrypto: SHA-256 failed");
    to_hex(digest, actual);
    if (strcmp(claimed, actual) != 0)
        return broken(f, err, "llmd.header_sha256: the header is damaged (or not finished)");
    memcpy(text + PREFIX_BYTES, claimed, HASH_DIGITS); /* saved sessions know their model by it */
    *ret_text = TAKE_PTR(text);
    *ret_n = n;
    f->data_start = 8 + n;
    return 0;
}

/* Takes `__metadata__` out of root; *ret_tensors is the parsed "llmd.tensors". */
static int read_metadata(struct model_file *f, json_object *root, json_object **ret_tensors,
                         struct error *err)
{
    json_object *metadata = json_text_get(root, "__metadata__");
    const char *text;
    char format[16];
    int r;

    if (!json_object_is_type(metadata, json_type_object))
        return broken(f, err, "__metadata__: not an object");
    json_object_object_foreach(metadata, key, value)
    {
        if (!json_text_string(value))
            return broken(f, err, "__metadata__.%s: not a string", key);
    }
    text = json_text_string(json_text_get(metadata, "llmd.format"));
    snprintf(format, sizeof(format), "%d", MODEL_FILE_FORMAT);
    if (!text)
        return broken(f, err, "llmd.format: missing");
    if (strcmp(text, format) != 0)
        return broken(f, err, "llmd.format: %s, this program reads %s: import the model anew", text,
                      format);
    text = json_text_string(json_text_get(metadata, "llmd.tensors"));
    if (!text)
        return broken(f, err, "llmd.tensors: missing");
    r = json_text_parse(ret_tensors, text, strlen(text), &header_limits, err);
    if (r < 0)
        return error_prefix(err, -r, "%s: llmd.tensors", f->path);
    f->metadata = json_object_get(metadata);
    return 0;
}

/* An array of exactly n integers. */
static bool get_integers(json_object *v, uint64_t *ret, size_t n)
{
    if (!json_object_is_type(v, json_type_array) || json_object_array_length(v) != n)
        return false;
    for (size_t i = 0; i < n; i++)
        if (!json_text_u64(json_object_array_get_idx(v, i), &ret[i]))
            return false;
    return true;
}

/* The description of one entry in "llmd.tensors": everything but its place. */
static int read_description(struct model_file *f, struct entry *e, json_object *d,
                            uint64_t *ret_pad, struct error *err)
{
    const char *type = json_text_string(json_text_get(d, "type"));
    const char *sha256 = json_text_string(json_text_get(d, "sha256"));
    const char *layout = json_text_string(json_text_get(d, "layout"));
    struct weight *w = &e->tensor.weight;
    uint64_t shape[2];

    if (!json_object_is_type(d, json_type_object))
        return broken(f, err, "llmd.tensors: %s: %s", e->name, d ? "not an object" : "missing");
    if (!type)
        return broken(f, err, "llmd.tensors: %s: type: missing or not a string", e->name);
    if (!sha256 || !is_hash(sha256))
        return broken(f, err, "llmd.tensors: %s: sha256: not 64 hexadecimal digits", e->name);
    memcpy(e->sha256, sha256, sizeof(e->sha256));
    if (!json_text_u64(json_text_get(d, "pad"), ret_pad))
        return broken(f, err, "llmd.tensors: %s: pad: missing or not a count", e->name);

    e->is_blob = strcmp(type, "blob") == 0;
    if (json_object_object_length(d) != (e->is_blob ? 3 : 5))
        return broken(f, err, "llmd.tensors: %s: a key is unknown or missing", e->name);
    if (e->is_blob)
        return 0;
    if (weight_type_parse(type, &w->type) < 0)
        return broken(f, err, "llmd.tensors: %s: type: %s is unknown", e->name, type);
    if (!layout || weight_layout_parse(layout, &w->layout) < 0)
        return broken(f, err, "llmd.tensors: %s: layout: %s", e->name,
                      layout ? "unknown" : "missing or not a string");
    if (!get_integers(json_text_get(d, "shape"), shape, 2) || shape[0] > UINT32_MAX ||
        shape[1] > UINT32_MAX)
        return broken(f, err, "llmd.tensors: %s: shape: not [n_out, n_in]", e->name);
    w->n_out = (uint32_t)shape[0];
    w->n_in = (uint32_t)shape[1];
    if (weight_size(w->type, w->layout, w->n_out, w->n_in, &e->tensor.bytes) < 0)
        return broken(f, err, "llmd.tensors: %s: shape: [%u, %u] as %s %s is not possible", e->name,
                      w->n_out, w->n_in, type, layout);
    return 0;
}

/* Whether "dtype" and "shape" of the safetensors table are what the description makes them. */
static bool table_agrees(const struct entry *e, json_object *t, uint64_t length, uint64_t pad)
{
    const char *dtype = json_text_string(json_text_get(t, "dtype"));
    const struct weight *w = &e->tensor.weight;
    bool plain = !e->is_blob && w->layout == LAYOUT_PLAIN && pad == 0;
    uint64_t shape[2];

    if (!dtype || strcmp(dtype, plain ? "F32" : "U8") != 0)
        return false;
    if (!plain)
        return get_integers(json_text_get(t, "shape"), shape, 1) && shape[0] == length;
    if (w->n_out == 1)
        return get_integers(json_text_get(t, "shape"), shape, 1) && shape[0] == w->n_in;
    return get_integers(json_text_get(t, "shape"), shape, 2) && shape[0] == w->n_out &&
           shape[1] == w->n_in;
}

static int read_entry(struct model_file *f, struct entry *e, json_object *t, json_object *d,
                      struct error *err)
{
    uint64_t offsets[2], length, pad, aligned, data_bytes = f->size - f->data_start;
    int r;

    r = read_description(f, e, d, &pad, err);
    if (r < 0)
        return r;
    if (!json_object_is_type(t, json_type_object) || json_object_object_length(t) != 3)
        return broken(f, err, "%s: not an object of dtype, shape and data_offsets", e->name);
    if (!get_integers(json_text_get(t, "data_offsets"), offsets, 2) || offsets[1] <= offsets[0])
        return broken(f, err, "%s: data_offsets: not [begin, end]", e->name);
    length = offsets[1] - offsets[0];
    if (range_outside(offsets[0], length, data_bytes))
        return broken(f, err, "%s: data_offsets: end %llu, but the file has %llu bytes of data",
                      e->name, (unsigned long long)offsets[1], (unsigned long long)data_bytes);
    if (pad >= length)
        return broken(f, err, "llmd.tensors: %s: pad: %llu of %llu bytes", e->name,
                      (unsigned long long)pad, (unsigned long long)length);
    if (e->is_blob)
        e->tensor.bytes = length - pad;
    else if (e->tensor.bytes != length - pad)
        return broken(f, err, "%s: data_offsets: %llu bytes without padding, its shape takes %zu",
                      e->name, (unsigned long long)(length - pad), e->tensor.bytes);
    aligned = ALIGN_UP(offsets[0], (uint64_t)(e->tensor.bytes >= MODEL_FILE_PAGE ? MODEL_FILE_PAGE
                                                                                 : WEIGHT_ALIGN));
    if (offsets[0] + pad != aligned)
        return broken(f, err, "llmd.tensors: %s: pad: %llu instead of %llu", e->name,
                      (unsigned long long)pad, (unsigned long long)(aligned - offsets[0]));
    if (!table_agrees(e, t, length, pad))
        return broken(f, err, "%s: dtype or shape differs from llmd.tensors", e->name);
    e->begin = f->data_start + offsets[0];
    e->tensor.offset = e->begin + pad;
    return 0;
}

static int compare_place(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;

    return (x->begin > y->begin) - (x->begin < y->begin);
}

static int compare_name(const void *a, const void *b)
{
    const struct entry *const *x = a, *const *y = b;

    return strcmp((*x)->name, (*y)->name);
}

static int read_entries(struct model_file *f, json_object *root, json_object *tensors,
                        struct error *err)
{
    size_t n = (size_t)json_object_object_length(root) - 1; /* `__metadata__` is no tensor */
    uint64_t end = f->data_start;
    int r;

    if (!json_object_is_type(tensors, json_type_object) ||
        (size_t)json_object_object_length(tensors) != n)
        return broken(f, err, "llmd.tensors: does not describe the %zu tensors of the table", n);
    if (n == 0)
        return broken(f, err, "llmd.tensors: no tensors");
    f->entries = calloc(n, sizeof(*f->entries));
    if (!f->entries)
        return no_memory(err);
    json_object_object_foreach(root, key, value)
    {
        struct entry *e = &f->entries[f->n_entries];

        if (strcmp(key, "__metadata__") == 0)
            continue;
        if (key[0] == 0 || strlen(key) > MODEL_FILE_MAX_NAME)
            return broken(f, err, "%.40s: a name of %zu bytes", key, strlen(key));
        e->name = strdup(key);
        if (!e->name)
            return no_memory(err);
        f->n_entries++; /* from here on free() releases the name */
        r = read_entry(f, e, value, json_text_get(tensors, key), err);
        if (r < 0)
            return r;
    }

    qsort(f->entries, f->n_entries, sizeof(*f->entries), compare_place);
    for (size_t i = 0; i < f->n_entries; i++) {
        const struct entry *e = &f->entries[i];

        if (e->begin != end)
            return broken(f, err, "%s: data_offsets: %s before it", e->name,
                          e->begin > end ? "a hole" : "overlaps the tensor");
        end = e->tensor.offset + e->tensor.bytes;
    }
    if (end != f->size)
        return broken(f, err, "%llu bytes after the last tensor %s",
                      (unsigned long long)(f->size - end), f->entries[f->n_entries - 1].name);
    return 0;
}

/* The entries have their final places now: point at them and into the mapping. */
static int make_indexes(struct model_file *f, struct error *err)
{
    f->tensors = calloc(f->n_entries, sizeof(*f->tensors));
    f->by_name = calloc(f->n_entries, sizeof(*f->by_name));
    if (!f->tensors || !f->by_name)
        return no_memory(err);
    for (size_t i = 0; i < f->n_entries; i++) {
        struct entry *e = &f->entries[i];

        e->tensor.name = e->name;
        e->tensor.sha256 = e->sha256;
        e->tensor.weight.data = (const char *)f->map + e->tensor.offset;
        f->by_name[i] = e;
        if (!e->is_blob)
            f->tensors[f->n_tensors++] = &e->tensor;
    }
    qsort(f->by_name, f->n_entries, sizeof(*f->by_name), compare_name);
    return 0;
}

static int64_t written_nsec(const struct stat *st)
{
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

/* From now on faults in the mapping are known to be this file's. */
static int begin_watch(struct model_file *f, const struct stat *st, struct error *err)
{
    int r;

    f->watch = calloc(1, sizeof(*f->watch));
    if (!f->watch)
        return no_memory(err);
    atomic_store(&f->watch->changed_nsec, written_nsec(st));
    r = model_fault_watch(&f->watch->fault, f->map, f->size);
    return r < 0 ? error_set(err, -r, "%s: too many models are open", f->path) : 0;
}

static int is_folder(const char *path, struct error *err)
{
    return error_set(err, EINVAL, "%s: is a folder, not a model file", path);
}

int model_file_open_fd(struct model_file **ret, int fd, const char *path, struct error *err)
{
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    CLEANUP(closep) int own_fd = fd;
    CLEANUP(freep) char *text = NULL;
    CLEANUP(json_object_putp) json_object *root = NULL;
    CLEANUP(json_object_putp) json_object *tensors = NULL;
    struct stat st;
    size_t n = 0;
    int r;

    f = calloc(1, sizeof(*f));
    if (!f)
        return no_memory(err);
    f->fd = TAKE_FD(own_fd);
    f->path = strdup(path);
    if (!f->path)
        return no_memory(err);
    if (fstat(f->fd, &st) < 0)
        return error_set(err, errno, "%s: cannot look at it: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode))
        return is_folder(path, err);
    if (!S_ISREG(st.st_mode))
        return broken(f, err, "not a regular file");
    if (ckd_add(&f->size, st.st_size, 0))
        return broken(f, err, "too large for this machine's address space");

    r = read_header(f, &text, &n, err);
    if (r < 0)
        return r;
    r = json_text_parse(&root, text, n, &header_limits, err);
    if (r < 0)
        return error_prefix(err, -r, "%s: header", path);
    r = read_metadata(f, root, &tensors, err);
    if (r < 0)
        return r;
    r = read_entries(f, root, tensors, err);
    if (r < 0)
        return r;

    f->map = mmap(NULL, f->size, PROT_READ, MAP_SHARED, f->fd, 0);
    if (f->map == MAP_FAILED) {
        f->map = NULL;
        return error_set(err, errno, "%s: cannot map %zu bytes: %s", path, f->size,
                         strerror(errno));
    }
    r = begin_watch(f, &st, err);
    if (r < 0)
        return r;
    r = make_indexes(f, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(f);
    return 0;
}

int model_file_open(struct model_file **ret, const char *path, struct error *err)
{
    /* Not waiting for the writer of a fifo that bears a model's name; files do not mind. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);

    if (fd < 0) {
        int e = errno;
        struct stat st;

        /* A sandbox that lets files be read only says that it is not permitted. */
        if (e == EACCES && stat(path, &st) == 0 && S_ISDIR(st.st_mode))
            return is_folder(path, err);
        return error_set(err, e, "%s: cannot open: %s", path, strerror(e));
    }
    return model_file_open_fd(ret, fd, path, err);
}

int model_file_fd(const struct model_file *f)
{
    return f->fd;
}

struct model_file *model_file_free(struct model_file *f)
{
    if (!f)
        return NULL;
    if (f->watch)
        model_fault_unwatch(f->watch->fault);
    free(f->watch);
    if (f->map)
        munmap(f->map, f->size);
    closep(&f->fd);
    for (size_t i = 0; i < f->n_entries; i++)
        free(f->entries[i].name);
    free(f->entries);
    free(f->tensors);
    free(f->by_name);
    json_object_put(f->metadata);
    free(f->path);
    free(f);
    return NULL;
}

void model_file_freep(struct model_file **f)
{
    model_file_free(*f);
}

const char *model_file_path(const struct model_file *f)
{
    return f->path;
}

const char *model_file_metadata(const struct model_file *f, const char *key)
{
    return json_text_string(json_text_get(f->metadata, key));
}

size_t model_file_n_tensors(const struct model_file *f)
{
    return f->n_tensors;
}

const struct model_tensor *model_file_tensor(const struct model_file *f, size_t i)
{
    return f->tensors[i];
}

static const struct entry *find(const struct model_file *f, const char *name, bool blob)
{
    size_t low = 0, high = f->n_entries;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(name, f->by_name[middle]->name);

        if (order == 0)
            return f->by_name[middle]->is_blob == blob ? f->by_name[middle] : NULL;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

const struct model_tensor *model_file_find(const struct model_file *f, const char *name)
{
    const struct entry *e = find(f, name, /* blob= */ false);

    return e ? &e->tensor : NULL;
}

const void *model_file_blob(const struct model_file *f, const char *name, size_t *ret_bytes)
{
    const struct entry *e = find(f, name, /* blob= */ true);

    if (!e)
        return NULL;
    *ret_bytes = e->tensor.bytes;
    return e->tensor.weight.data;
}

const void *model_file_map(const struct model_file *f, size_t *ret_size)
{
    *ret_size = f->size;
    return f->map;
}

/* Whether the file still begins as it did: its hash stands for the hashes of all tensors. */
static bool has_same_header(const struct model_file *f)
{
    const char *known = model_file_metadata(f, "llmd.header_sha256");
    char now[PREFIX_BYTES + HASH_DIGITS];

    return known && read_whole(f->fd, now, sizeof(now), 8) == 0 &&
           memcmp(now, prefix, PREFIX_BYTES) == 0 &&
           memcmp(now + PREFIX_BYTES, known, HASH_DIGITS) == 0;
}

bool model_file_is_intact(const struct model_file *f)
{
    struct watch *w = f->watch;
    int64_t written;
    struct stat st;

    if (model_fault_happened(w->fault))
        return false;
    if (fstat(f->fd, &st) < 0)
        return true; /* what it cannot tell now a fault will */
    written = written_nsec(&st);
    if ((uint64_t)st.st_size == f->size && written == atomic_load(&w->changed_nsec))
        return true;
    /*
     * Shortened within its last page it raises no fault, nor when it was written anew meanwhile.
     * Touched, or overwritten with the same, it is as good as before.
     */
    if ((uint64_t)st.st_size == f->size && has_same_header(f)) {
        atomic_store(&w->changed_nsec, written);
        return true;
    }
    model_fault_report(w->fault);
    return false;
}

static int damaged(const struct model_file *f, const struct entry *e, const char *what,
                   struct error *err)
{
    return error_set(err, EBADMSG, "%s: %s: %s: the file is damaged, import the model anew",
                     f->path, e->name, what);
}

static int verify_entry(const struct model_file *f, const struct entry *e, EVP_MD_CTX *hash,
                        uint8_t *chunk, struct error *err)
{
    uint8_t digest[EVP_MAX_MD_SIZE];
    char hex[HASH_DIGITS + 1];
    uint64_t at = e->begin, end = e->tensor.offset + e->tensor.bytes;
    size_t n = e->tensor.offset - e->begin; /* below a page */
    int r;

    r = read_whole(f->fd, chunk, n, at);
    if (r < 0)
        return cannot_read(f, r, err);
    for (size_t i = 0; i < n; i++)
        if (chunk[i] != 0)
            return damaged(f, e, "padding is not zero", err);
    if (EVP_DigestInit_ex(hash, EVP_sha256(), NULL) != 1)
        return error_set(err, EIO, "libcrypto: SHA-256 failed");
    for (at += n; at < end; at += n) {
        n = MIN(end - at, VERIFY_CHUNK);
        r = read_whole(f->fd, chunk, n, at);
        if (r < 0)
            return cannot_read(f, r, err);
        if (EVP_DigestUpdate(hash, chunk, n) != 1)
            return error_set(err, EIO, "libcrypto: SHA-256 failed");
    }
    if (EVP_DigestFinal_ex(hash, digest, NULL) != 1)
        return error_set(err, EIO, "libcrypto: SHA-256 failed");
    to_hex(digest, hex);
    if (strcmp(hex, e->sha256) != 0)
        return damaged(f, e, "SHA-256 differs", err);
    return 0;
}

int model_file_verify(const struct model_file *f, struct error *err)
{
    CLEANUP(EVP_MD_CTX_freep) EVP_MD_CTX *hash = EVP_MD_CTX_new();
    CLEANUP(freep) uint8_t *chunk = malloc(VERIFY_CHUNK);

    if (!hash || !chunk)
        return no_memory(err);
    for (size_t i = 0; i < f->n_entries; i++) {
        int r = verify_entry(f, &f->entries[i], hash, chunk, err);

        if (r < 0)
            return r;
    }
    return 0;
}
