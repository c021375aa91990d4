/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/import/safetensors.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/whole-io.h"
#include "engine/json-text.h"

struct safetensors {
    char *path;
    json_object *root; /* owns names and types */
    uint64_t file_size;
    size_t n_tensors;
    struct safetensors_tensor *tensors; /* by name */
};

/* A multimodal checkpoint has some 2500 tensors of about eight values. */
static const struct json_limits limits = {.depth = 8, .max_values = 1 << 20};

/* Bytes of one element; 0: not known, so that the size cannot be checked. */
static unsigned element_bytes(const char *dtype)
{
    static const struct {
        const char *name;
        unsigned bytes;
    } types[] = {
        {"F64", 8},  {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4},  {"F16", 2},
        {"BF16", 2}, {"I16", 2}, {"U16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1},
    };

    for (size_t i = 0; i < ARRAY_SIZE(types); i++)
        if (strcmp(types[i].name, dtype) == 0)
            return types[i].bytes;
    return 0;
}

static int parse_tensor(const struct safetensors *s, struct safetensors_tensor *t, json_object *v,
                        uint64_t data_begin, struct error *err)
{
    json_object *shape = json_text_get(v, "shape"), *offsets = json_text_get(v, "data_offsets");
    uint64_t begin, end, bytes;
    unsigned each;

    t->dtype = json_text_string(json_text_get(v, "dtype"));
    if (!t->dtype)
        return error_set(err, EINVAL, "%s: tensor %s: dtype is missing or not a string", s->path,
                         t->name);
    if (!json_object_is_type(shape, json_type_array) ||
        json_object_array_length(shape) > SAFETENSORS_MAX_DIMS)
        return error_set(err, EINVAL,
                         "%s: tensor %s: shape is missing or not an array of at most "
                         "%d numbers",
                         s->path, t->name, SAFETENSORS_MAX_DIMS);
    each = element_bytes(t->dtype);
    bytes = each;
    t->n_dims = (unsigned)json_object_array_length(shape);
    for (unsigned i = 0; i < t->n_dims; i++) {
        if (!json_text_u64(json_object_array_get_idx(shape, i), &t->dims[i]))
            return error_set(err, EINVAL, "%s: tensor %s: shape[%u] is not a count", s->path,
                             t->name, i);
        if (ckd_mul(&bytes, bytes, t->dims[i]))
            return error_set(err, EINVAL, "%s: tensor %s: shape is larger than any file", s->path,
                             t->name);
    }
    if (!json_object_is_type(offsets, json_type_array) || json_object_array_length(offsets) != 2 ||
        !json_text_u64(json_object_array_get_idx(offsets, 0), &begin) ||
        !json_text_u64(json_object_array_get_idx(offsets, 1), &end))
        return error_set(err, EINVAL, "%s: tensor %s: data_offsets is missing or not two numbers",
                         s->path, t->name);
    if (begin > end || end > s->file_size - data_begin)
        return error_set(err, EINVAL,
                         "%s: tensor %s: data_offsets end beyond the end of the file; "
                         "is the file complete?",
                         s->path, t->name);
    if (each != 0 && end - begin != bytes)
        return error_set(err, EINVAL,
                         "%s: tensor %s: data_offsets hold %llu bytes, but %s of this "
                         "shape takes %llu",
                         s->path, t->name, (unsigned long long)(end - begin), t->dtype,
                         (unsigned long long)bytes);
    t->offset = data_begin + begin;
    t->bytes = end - begin;
    return 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct safetensors_tensor *)a)->name,
                  ((const struct safetensors_tensor *)b)->name);
}

static int compare_offsets(const void *a, const void *b)
{
    const struct safetensors_tensor *x = a, *y = b;

    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes); /* empty ones first */
}

int safetensors_parse(struct safetensors **ret, const char *text, size_t n, uint64_t file_size,
                      const char *path, struct error *err)
{
    CLEANUP(safetensors_freep) struct safetensors *s = calloc(1, sizeof(*s));
    uint64_t at = 8 + (uint64_t)n, data_begin = at;
    int r;

    if (!s || !(s->path = strdup(path)))
        return error_set(err, ENOMEM, "%s: out of memory", path);
    s->file_size = file_size;
    r = json_text_parse(&s->root, text, n, &limits, err);
    if (r < 0)
        return error_prefix(err, -r, "%s: header", path);
    if (!json_object_is_type(s->root, json_type_object))
        return error_set(err, EINVAL, "%s: header: not a JSON object", path);
    s->tensors = calloc((size_t)json_object_object_length(s->root) + 1, sizeof(*s->tensors));
    if (!s->tensors)
        return error_set(err, ENOMEM, "%s: out of memory", path);
    {
        json_object_object_foreach(s->root, key, v)
        {
            struct safetensors_tensor *t = &s->tensors[s->n_tensors];

            if (strcmp(key, "__metadata__") == 0)
                continue;
            t->name = key;
            r = parse_tensor(s, t, v, data_begin, err);
            if (r < 0)
                return r;
            s->n_tensors++;
        }
    }
    qsort(s->tensors, s->n_tensors, sizeof(*s->tensors), compare_offsets);
    for (size_t i = 0; i < s->n_tensors; i++) {
        const struct safetensors_tensor *t = &s->tensors[i];

        if (t->offset != at)
            return error_set(err, EINVAL, "%s: tensor %s: data_offsets %s", path, t->name,
                             t->offset < at ? "overlap with another's"
                                            : "leave a hole, which the format does not allow");
        at += t->bytes;
    }
    if (at != file_size)
        return error_set(err, EINVAL, "%s: %llu bytes after the last tensor", path,
                         (unsigned long long)(file_size - at));
    qsort(s->tensors, s->n_tensors, sizeof(*s->tensors), compare_names);
    *ret = TAKE_PTR(s);
    return 0;
}

int safetensors_open(struct safetensors **ret, int fd, const char *path, struct error *err)
{
    CLEANUP(freep) char *text = NULL;
    uint8_t length[8];
    uint64_t n = 0, file_size;
    struct stat st;
    int r;

    if (fstat(fd, &st) < 0)
        return error_set(err, errno, "%s: cannot examine: %m", path);
    if (!S_ISREG(st.st_mode))
        return error_set(err, EINVAL, "%s: not a regular file", path);
    file_size = (uint64_t)st.st_size;
    if (file_size < 8 || pread(fd, length, 8, 0) != 8)
        return error_set(err, EINVAL, "%s: not a safetensors file: shorter than 8 bytes", path);
    for (int i = 0; i < 8; i++)
        n |= (uint64_t)length[i] << 8 * i;
    if (n > file_size - 8)
        return error_set(err, EINVAL, "%s: the header's length, %llu, is more than the file has",
                         path, (unsigned long long)n);
    if (n > SAFETENSORS_MAX_HEADER)
        return error_set(err, EINVAL,
                         "%s: the header's length, %llu, is more than the format "
                         "allows",
                         path, (unsigned long long)n);
    text = malloc((size_t)n + 1);
    if (!text)
        return error_set(err, ENOMEM, "%s: out of memory", path);
    r = read_whole(fd, text, (size_t)n, 8);
    if (r == -ENODATA)
        return error_set(err, EINVAL, "%s: the file ends within the header", path);
    if (r < 0)
        return error_set(err, -r, "%s: cannot read: %s", path, strerror(-r));
    return safetensors_parse(ret, text, (size_t)n, file_size, path, err);
}

struct safetensors *safetensors_free(struct safetensors *s)
{
    if (!s)
        return NULL;
    json_object_put(s->root);
    free(s->tensors);
    free(s->path);
    free(s);
    return NULL;
}

void safetensors_freep(struct safetensors **s)
{
    safetensors_free(*s);
}

size_t safetensors_n_tensors(const struct safetensors *s)
{
    return s->n_tensors;
}

const struct safetensors_tensor *safetensors_tensor(const struct safetensors *s, size_t i)
{
    return &s->tensors[i];
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    struct safetensors_tensor wanted = {.name = name};

    return bsearch(&wanted, s->tensors, s->n_tensors, sizeof(wanted), compare_names);
}
