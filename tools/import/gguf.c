/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * One cursor walks the mapped file front to back. It can only be advanced through take(), which
 * refuses to pass the end, and counts are compared with what is left divided by the smallest
 * possible element before they size an allocation. Two index arrays, sorted by name, serve both
 * the search for duplicates and look-ups.
 */

#include "tools/import/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/checked.h"
#include "base/cleanup.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "values are read as they lie in the file, which is little-endian"
#endif

/* The format's own limits. */
#define MAX_KEY 65535
#define MAX_TENSOR_NAME 64

#define DEFAULT_ALIGNMENT 32
#define MAX_ALIGNMENT (1u << 20)

struct gguf {
    char *path;
    int fd;
    void *map; /* NULL when the bytes are borrowed */
    size_t map_size;
    uint64_t file_size;

    size_t n_entries;
    struct gguf_entry *entries;
    const struct gguf_entry **entries_by_name;

    size_t n_tensors;
    struct gguf_tensor *tensors;
    const struct gguf_tensor **tensors_by_name;
};

struct cursor {
    const uint8_t *begin, *at;
    size_t left;
};

static const struct tensor_type {
    enum gguf_tensor_type type;
    const char *name;
    size_t values, bytes;
} tensor_types[] = {
    {GGUF_TENSOR_F32, "F32", 1, 4},       {GGUF_TENSOR_F16, "F16", 1, 2},
    {GGUF_TENSOR_BF16, "BF16", 1, 2},     {GGUF_TENSOR_Q4_0, "Q4_0", 32, 18},
    {GGUF_TENSOR_Q8_0, "Q8_0", 32, 34},   {GGUF_TENSOR_Q4_K, "Q4_K", 256, 144},
    {GGUF_TENSOR_Q5_K, "Q5_K", 256, 176}, {GGUF_TENSOR_Q6_K, "Q6_K", 256, 210},
};

static const struct tensor_type *find_tensor_type(uint32_t type)
{
    for (size_t i = 0; i < ARRAY_SIZE(tensor_types); i++)
        if ((uint32_t)tensor_types[i].type == type)
            return &tensor_types[i];
    return NULL;
}

size_t gguf_block_values(enum gguf_tensor_type type)
{
    return find_tensor_type(type)->values;
}

size_t gguf_block_bytes(enum gguf_tensor_type type)
{
    return find_tensor_type(type)->bytes;
}

const char *gguf_tensor_type_name(enum gguf_tensor_type type)
{
    return find_tensor_type(type)->name;
}

/* The next n bytes, or NULL. */
static const void *take(struct cursor *c, uint64_t n)
{
    const void *at = c->at;

    if (n > c->left)
        return NULL;
    c->at += n;
    c->left -= n;
    return at;
}

static bool take_u32(struct cursor *c, uint32_t *ret)
{
    const void *p = take(c, sizeof(*ret));

    if (p)
        memcpy(ret, p, sizeof(*ret));
    return p;
}

static bool take_u64(struct cursor *c, uint64_t *ret)
{
    const void *p = take(c, sizeof(*ret));

    if (p)
        memcpy(ret, p, sizeof(*ret));
    return p;
}

static bool take_string(struct cursor *c, struct gguf_string *ret)
{
    struct cursor before = *c;
    const char *text;
    uint64_t n;

    if (!take_u64(c, &n) || !(text = take(c, n))) {
        *c = before;
        return false;
    }
    *ret = (struct gguf_string){text, (size_t)n};
    return true;
}

/* Bytes of a value in the file; of a string, the least. 0: no such type. */
static size_t value_bytes(uint32_t type)
{
    switch (type) {
    case GGUF_U8:
    case GGUF_I8:
    case GGUF_BOOL:
        return 1;
    case GGUF_U16:
    case GGUF_I16:
        return 2;
    case GGUF_U32:
    case GGUF_I32:
    case GGUF_F32:
        return 4;
    case GGUF_U64:
    case GGUF_I64:
    case GGUF_F64:
    case GGUF_STRING:
        return 8;
    default:
        return 0;
    }
}

/* For "%.*s" in messages: short enough to leave room for the rest. */
#define SHOW(s) (int)MIN((s).n, (size_t)100), (s).text

static int parse_entry(struct gguf *g, struct cursor *c, size_t index, struct gguf_entry *e,
                       struct error *err)
{
    uint32_t type;
    uint64_t n = 1;
    size_t bytes;

    if (!take_string(c, &e->key))
        return error_set(err, EINVAL, "%s: metadata key %zu does not fit the file", g->path, index);
    if (e->key.n == 0 || e->key.n > MAX_KEY)
        return error_set(err, EINVAL, "%s: metadata key %zu has %zu bytes, not 1 to %d", g->path,
                         index, e->key.n, MAX_KEY);
    if (!take_u32(c, &type))
        goto truncated;
    e->is_array = type == GGUF_ARRAY;
    if (e->is_array && (!take_u32(c, &type) || !take_u64(c, &n)))
        goto truncated;
    if (type == GGUF_ARRAY)
        return error_set(err, EINVAL,
                         "%s: metadata '%.*s' is an array of arrays, which no key of "
                         "a Gemma model is",
                         g->path, SHOW(e->key));
    bytes = value_bytes(type);
    if (bytes == 0)
        return error_set(err, EINVAL, "%s: metadata '%.*s' has unknown type %u", g->path,
                         SHOW(e->key), type);
    if (n > c->left / bytes)
        return error_set(err, EINVAL,
                         "%s: metadata '%.*s' claims %llu values, more than the file "
                         "has room for",
                         g->path, SHOW(e->key), (unsigned long long)n);
    e->type = (enum gguf_type)type;
    e->n = (size_t)n;
    e->data = c->at;
    if (type == GGUF_STRING) {
        struct gguf_string ignored;

        for (size_t i = 0; i < e->n; i++)
            if (!take_string(c, &ignored))
                return error_set(err, EINVAL,
                                 "%s: metadata '%.*s': string %zu does not fit the "
                                 "file",
                                 g->path, SHOW(e->key), i);
    } else if (!take(c, n * bytes)) {
        goto truncated;
    }
    if (type == GGUF_BOOL)
        for (size_t i = 0; i < e->n; i++)
            if (e->data[i] > 1)
                return error_set(err, EINVAL, "%s: metadata '%.*s' has %u for a truth value",
                                 g->path, SHOW(e->key), e->data[i]);
    return 0;

truncated:
    return error_set(err, EINVAL, "%s: metadata '%.*s': the file ends within the value", g->path,
                     SHOW(e->key));
}

/* Everything but the place, which needs the end of the table: offset is as in the file. */
static int parse_tensor(struct gguf *g, struct cursor *c, size_t index, struct gguf_tensor *t,
                        struct error *err)
{
    const struct tensor_type *type;
    uint32_t n_dims, number;
    uint64_t n_values = 1;

    if (!take_string(c, &t->name))
        return error_set(err, EINVAL, "%s: name of tensor %zu does not fit the file", g->path,
                         index);
    if (t->name.n == 0 || t->name.n > MAX_TENSOR_NAME)
        return error_set(err, EINVAL, "%s: name of tensor %zu has %zu bytes, not 1 to %d", g->path,
                         index, t->name.n, MAX_TENSOR_NAME);
    if (!take_u32(c, &n_dims))
        goto truncated;
    if (n_dims < 1 || n_dims > GGUF_MAX_DIMS)
        return error_set(err, EINVAL, "%s: tensor '%.*s' has %u dimensions, not 1 to %d", g->path,
                         SHOW(t->name), n_dims, GGUF_MAX_DIMS);
    t->n_dims = n_dims;
    for (unsigned i = 0; i < GGUF_MAX_DIMS; i++) {
        t->dims[i] = 1;
        if (i < n_dims && !take_u64(c, &t->dims[i]))
            goto truncated;
        if (t->dims[i] == 0 || ckd_mul(&n_values, n_values, t->dims[i]) || n_values > INT64_MAX)
            return error_set(err, EINVAL,
                             "%s: tensor '%.*s': dimension %u is %llu, which no file "
                             "can hold",
                             g->path, SHOW(t->name), i, (unsigned long long)t->dims[i]);
    }
    if (!take_u32(c, &number) || !take_u64(c, &t->offset))
        goto truncated;
    type = find_tensor_type(number);
    if (!type)
        return error_set(err, EINVAL,
                         "%s: tensor '%.*s' has type %u; only F32, F16, BF16, Q8_0, "
                         "Q4_0, Q4_K, Q5_K and Q6_K can be read",
                         g->path, SHOW(t->name), number);
    t->type = type->type;
    if (t->dims[0] % type->values != 0)
        return error_set(err, EINVAL,
                         "%s: tensor '%.*s': rows of %llu values are not whole blocks "
                         "of %s",
                         g->path, SHOW(t->name), (unsigned long long)t->dims[0], type->name);
    if (ckd_mul(&t->bytes, n_values / type->values, type->bytes))
        return error_set(err, EINVAL, "%s: tensor '%.*s' is larger than any file", g->path,
                         SHOW(t->name));
    return 0;

truncated:
    return error_set(err, EINVAL, "%s: tensor '%.*s': the file ends within its description",
                     g->path, SHOW(t->name));
}

static int compare_strings(struct gguf_string a, struct gguf_string b)
{
    int c = memcmp(a.text, b.text, MIN(a.n, b.n));

    return c ? c : (a.n > b.n) - (a.n < b.n);
}

static int compare_entries(const void *a, const void *b)
{
    return compare_strings((*(const struct gguf_entry *const *)a)->key,
                           (*(const struct gguf_entry *const *)b)->key);
}

static int compare_tensors(const void *a, const void *b)
{
    return compare_strings((*(const struct gguf_tensor *const *)a)->name,
                           (*(const struct gguf_tensor *const *)b)->name);
}

static int compare_offsets(const void *a, const void *b)
{
    const struct gguf_tensor *x = a, *y = b;

    return (x->offset > y->offset) - (x->offset < y->offset);
}

static int index_entries(struct gguf *g, struct error *err)
{
    g->entries_by_name = calloc(g->n_entries + 1, sizeof(*g->entries_by_name));
    if (!g->entries_by_name)
        return error_set(err, ENOMEM, "%s: out of memory", g->path);
    for (size_t i = 0; i < g->n_entries; i++)
        g->entries_by_name[i] = &g->entries[i];
    qsort(g->entries_by_name, g->n_entries, sizeof(*g->entries_by_name), compare_entries);
    for (size_t i = 1; i < g->n_entries; i++)
        if (compare_entries(&g->entries_by_name[i - 1], &g->entries_by_name[i]) == 0)
            return error_set(err, EINVAL, "%s: metadata '%.*s' occurs twice", g->path,
                             SHOW(g->entries_by_name[i]->key));
    return 0;
}

static int index_tensors(struct gguf *g, struct error *err)
{
    g->tensors_by_name = calloc(g->n_tensors + 1, sizeof(*g->tensors_by_name));
    if (!g->tensors_by_name)
        return error_set(err, ENOMEM, "%s: out of memory", g->path);
    for (size_t i = 0; i < g->n_tensors; i++)
        g->tensors_by_name[i] = &g->tensors[i];
    qsort(g->tensors_by_name, g->n_tensors, sizeof(*g->tensors_by_name), compare_tensors);
    for (size_t i = 1; i < g->n_tensors; i++)
        if (compare_tensors(&g->tensors_by_name[i - 1], &g->tensors_by_name[i]) == 0)
            return error_set(err, EINVAL, "%s: tensor '%.*s' occurs twice", g->path,
                             SHOW(g->tensors_by_name[i]->name));
    return 0;
}

/* Turns offsets from the data section into offsets from the file's beginning, and checks them. */
static int place_tensors(struct gguf *g, size_t header_bytes, struct error *err)
{
    const struct gguf_entry *e = gguf_find(g, "general.alignment");
    uint32_t alignment = DEFAULT_ALIGNMENT;
    size_t data_begin;

    if (e && (e->is_array || gguf_get_u32(e, 0, &alignment) < 0 || alignment == 0 ||
              alignment > MAX_ALIGNMENT || (alignment & (alignment - 1))))
        return error_set(err, EINVAL, "%s: general.alignment is not a power of two up to %u",
                         g->path, MAX_ALIGNMENT);
    if (ckd_align(&data_begin, header_bytes, alignment))
        return error_set(err, EINVAL, "%s: the header is too large", g->path);
    for (size_t i = 0; i < g->n_tensors; i++) {
        struct gguf_tensor *t = &g->tensors[i];

        if (t->offset % alignment != 0)
            return error_set(err, EINVAL,
                             "%s: tensor '%.*s': offset %llu is not a multiple of the "
                             "alignment, %u",
                             g->path, SHOW(t->name), (unsigned long long)t->offset, alignment);
        if (ckd_add(&t->offset, t->offset, data_begin) ||
            range_outside(t->offset, t->bytes, g->file_size))
            return error_set(err, EINVAL,
                             "%s: tensor '%.*s' ends beyond the end of the file; is "
                             "the file complete?",
                             g->path, SHOW(t->name));
    }
    qsort(g->tensors, g->n_tensors, sizeof(*g->tensors), compare_offsets);
    for (size_t i = 1; i < g->n_tensors; i++) {
        const struct gguf_tensor *a = &g->tensors[i - 1], *b = &g->tensors[i];

        if (b->offset < a->offset + a->bytes)
            return error_set(err, EINVAL, "%s: tensors '%.*s' and '%.*s' overlap", g->path,
                             SHOW(a->name), SHOW(b->name));
    }
    return 0;
}

static int parse(struct gguf *g, const void *data, size_t n, struct error *err)
{
    struct cursor c = {.begin = data, .at = data, .left = n};
    uint64_t n_tensors, n_entries;
    uint32_t version;
    int r;

    if (!gguf_detect(data, n))
        return error_set(err, EINVAL, "%s: not a GGUF file", g->path);
    take(&c, 4);
    if (!take_u32(&c, &version))
        return error_set(err, EINVAL, "%s: the file ends within its version", g->path);
    if ((version & 0xffff) == 0 && version != 0)
        return error_set(err, EINVAL, "%s: a big-endian GGUF file, which cannot be read", g->path);
    if (version != 2 && version != 3)
        return error_set(err, EINVAL, "%s: GGUF version %u; only 2 and 3 can be read", g->path,
                         version);
    if (!take_u64(&c, &n_tensors) || !take_u64(&c, &n_entries))
        return error_set(err, EINVAL, "%s: the file ends within its counts", g->path);

    /* key length, one byte of key, type, one byte of value */
    if (n_entries > c.left / (8 + 1 + 4 + 1))
        return error_set(err, EINVAL,
                         "%s: claims %llu metadata entries, more than the file has "
                         "room for",
                         g->path, (unsigned long long)n_entries);
    g->entries = calloc(n_entries + 1, sizeof(*g->entries));
    if (!g->entries)
        return error_set(err, ENOMEM, "%s: out of memory", g->path);
    for (uint64_t i = 0; i < n_entries; i++) {
        r = parse_entry(g, &c, i, &g->entries[i], err);
        if (r < 0)
            return r;
    }
    g->n_entries = n_entries;
    r = index_entries(g, err);
    if (r < 0)
        return r;

    /* name length, one byte of name, number of dimensions, one dimension, type, offset */
    if (n_tensors > c.left / (8 + 1 + 4 + 8 + 4 + 8))
        return error_set(err, EINVAL, "%s: claims %llu tensors, more than the file has room for",
                         g->path, (unsigned long long)n_tensors);
    g->tensors = calloc(n_tensors + 1, sizeof(*g->tensors));
    if (!g->tensors)
        return error_set(err, ENOMEM, "%s: out of memory", g->path);
    for (uint64_t i = 0; i < n_tensors; i++) {
        r = parse_tensor(g, &c, i, &g->tensors[i], err);
        if (r < 0)
            return r;
    }
    g->n_tensors = n_tensors;
    r = place_tensors(g, (size_t)(c.at - c.begin), err);
    if (r < 0)
        return r;
    return index_tensors(g, err);
}

static int gguf_new(struct gguf **ret, const char *path, struct error *err)
{
    CLEANUP(gguf_freep) struct gguf *g = calloc(1, sizeof(*g));

    if (!g)
        return error_set(err, ENOMEM, "%s: out of memory", path);
    g->fd = -EBADF;
    g->path = strdup(path);
    if (!g->path)
        return error_set(err, ENOMEM, "%s: out of memory", path);
    *ret = TAKE_PTR(g);
    return 0;
}

int gguf_parse(struct gguf **ret, const void *data, size_t n, uint64_t file_size, const char *name,
               struct error *err)
{
    CLEANUP(gguf_freep) struct gguf *g = NULL;
    int r;

    r = gguf_new(&g, name, err);
    if (r < 0)
        return r;
    g->file_size = file_size;
    r = parse(g, data, n, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(g);
    return 0;
}

int gguf_open(struct gguf **ret, const char *path, struct error *err)
{
    CLEANUP(gguf_freep) struct gguf *g = NULL;
    struct stat st;
    int r;

    r = gguf_new(&g, path, err);
    if (r < 0)
        return r;
    g->fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (g->fd < 0 || fstat(g->fd, &st) < 0)
        return error_set(err, errno, "%s: cannot open: %m", path);
    if (!S_ISREG(st.st_mode))
        return error_set(err, EINVAL, "%s: not a regular file", path);
    if (st.st_size == 0)
        return error_set(err, EINVAL, "%s: not a GGUF file: it is empty", path);
    if (ckd_add(&g->map_size, st.st_size, 0))
        return error_set(err, EFBIG, "%s: too large for this machine", path);
    g->file_size = (uint64_t)st.st_size;
    g->map = mmap(NULL, g->map_size, PROT_READ, MAP_PRIVATE, g->fd, 0);
    if (g->map == MAP_FAILED) {
        g->map = NULL;
        return error_set(err, errno, "%s: cannot map: %m", path);
    }
    r = parse(g, g->map, g->map_size, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(g);
    return 0;
}

struct gguf *gguf_free(struct gguf *g)
{
    if (!g)
        return NULL;
    if (g->map)
        munmap(g->map, g->map_size);
    closep(&g->fd);
    free(g->entries);
    free(g->entries_by_name);
    free(g->tensors);
    free(g->tensors_by_name);
    free(g->path);
    free(g);
    return NULL;
}

void gguf_freep(struct gguf **g)
{
    gguf_free(*g);
}

bool gguf_detect(const void *data, size_t n)
{
    return n >= 4 && memcmp(data, "GGUF", 4) == 0;
}

const char *gguf_path(const struct gguf *g)
{
    return g->path;
}

int gguf_fd(const struct gguf *g)
{
    return g->fd;
}

uint64_t gguf_file_size(const struct gguf *g)
{
    return g->file_size;
}

size_t gguf_n_entries(const struct gguf *g)
{
    return g->n_entries;
}

const struct gguf_entry *gguf_entry(const struct gguf *g, size_t i)
{
    return &g->entries[i];
}

const struct gguf_entry *gguf_find(const struct gguf *g, const char *key)
{
    struct gguf_entry wanted = {.key = {key, strlen(key)}};
    const struct gguf_entry *p = &wanted, **found;

    found = bsearch(&p, g->entries_by_name, g->n_entries, sizeof(p), compare_entries);
    return found ? *found : NULL;
}

size_t gguf_n_tensors(const struct gguf *g)
{
    return g->n_tensors;
}

const struct gguf_tensor *gguf_tensor(const struct gguf *g, size_t i)
{
    return &g->tensors[i];
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf *g, const char *name)
{
    struct gguf_tensor wanted = {.name = {name, strlen(name)}};
    const struct gguf_tensor *p = &wanted, **found;

    found = bsearch(&p, g->tensors_by_name, g->n_tensors, sizeof(p), compare_tensors);
    return found ? *found : NULL;
}

/* A number as it is written; false for strings and truth values. */
struct number {
    enum { UNSIGNED, SIGNED, REAL } kind;
    uint64_t u;
    int64_t i;
    double f;
};

static bool get_number(const struct gguf_entry *e, size_t i, struct number *ret)
{
    const uint8_t *p;

    if (e->type == GGUF_STRING || e->type == GGUF_BOOL || i >= e->n)
        return false;
    p = e->data + i * value_bytes(e->type);

#define READ(ctype, k, member)                                              \
    {                                                                       \
        ctype v_;                                                           \
        memcpy(&v_, p, sizeof(v_));                                         \
        *ret = (struct number){.kind = (k)};                                \
        ret->member = (__typeof__(ret->member))v_; /* -Wdouble-promotion */ \
        return true;                                                        \
    }
    switch (e->type) {
    case GGUF_U8:
        READ(uint8_t, UNSIGNED, u)
    case GGUF_U16:
        READ(uint16_t, UNSIGNED, u)
    case GGUF_U32:
        READ(uint32_t, UNSIGNED, u)
    case GGUF_U64:
        READ(uint64_t, UNSIGNED, u)
    case GGUF_I8:
        READ(int8_t, SIGNED, i)
    case GGUF_I16:
        READ(int16_t, SIGNED, i)
    case GGUF_I32:
        READ(int32_t, SIGNED, i)
    case GGUF_I64:
        READ(int64_t, SIGNED, i)
    case GGUF_F32:
        READ(float, REAL, f)
    case GGUF_F64:
        READ(double, REAL, f)
    case GGUF_BOOL:
    case GGUF_STRING:
    case GGUF_ARRAY:
        break;
    }
#undef READ
    return false;
}

int gguf_get_i64(const struct gguf_entry *e, size_t i, int64_t *ret)
{
    struct number v;

    if (!get_number(e, i, &v))
        return -EINVAL;
    switch (v.kind) {
    case UNSIGNED:
        return ckd_add(ret, v.u, 0) ? -EINVAL : 0;
    case SIGNED:
        *ret = v.i;
        return 0;
    case REAL:
        /* 2^53: beyond it, whole numbers have gaps; NaN compares false */
        if (!(fabs(v.f) <= 0x1p53) || v.f != floor(v.f))
            return -EINVAL;
        *ret = (int64_t)v.f;
        return 0;
    }
    return -EINVAL;
}

int gguf_get_u32(const struct gguf_entry *e, size_t i, uint32_t *ret)
{
    int64_t v;

    if (gguf_get_i64(e, i, &v) < 0 || v < 0 || v > UINT32_MAX)
        return -EINVAL;
    *ret = (uint32_t)v;
    return 0;
}

int gguf_get_float(const struct gguf_entry *e, size_t i, float *ret)
{
    struct number v;

    if (!get_number(e, i, &v))
        return -EINVAL;
    *ret = v.kind == UNSIGNED ? (float)v.u : v.kind == SIGNED ? (float)v.i : (float)v.f;
    return 0;
}

int gguf_get_bool(const struct gguf_entry *e, size_t i, bool *ret)
{
    if (e->type != GGUF_BOOL || i >= e->n)
        return -EINVAL;
    *ret = e->data[i];
    return 0;
}

/* Lies in the file: parse_entry() has been here. */
static struct gguf_string string_at(const uint8_t *p)
{
    uint64_t n;

    memcpy(&n, p, sizeof(n));
    return (struct gguf_string){(const char *)p + sizeof(n), (size_t)n};
}

int gguf_get_string(const struct gguf_entry *e, struct gguf_string *ret)
{
    if (e->type != GGUF_STRING || e->is_array)
        return -EINVAL;
    *ret = string_at(e->data);
    return 0;
}

struct gguf_strings gguf_strings_begin(const struct gguf_entry *e)
{
    return (struct gguf_strings){e->data, e->type == GGUF_STRING ? e->n : 0};
}

bool gguf_strings_next(struct gguf_strings *s, struct gguf_string *ret)
{
    if (s->left == 0)
        return false;
    *ret = string_at(s->at);
    s->at = (const uint8_t *)ret->text + ret->n;
    s->left--;
    return true;
}

bool gguf_string_is(struct gguf_string s, const char *text)
{
    return s.n == strlen(text) && memcmp(s.text, text, s.n) == 0;
}
