/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * gguf: the container of a GGUF file, versions 2 and 3, little-endian: typed metadata and a table
 * of tensors. It knows neither architectures nor tokenizers.
 *
 * Everything is checked before gguf_open() returns: each count against the bytes that are left
 * before anything is allocated for it, each string and array lies in the file, keys and tensor
 * names occur once, tensors are of known types, aligned, inside the file and do not overlap. After
 * that, entries can be read without further checks; only what they mean is the caller's business.
 *
 * Strings and arrays are not copied: they point into the mapped file, unaligned and not terminated.
 * Immutable after open; any thread.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct gguf;

enum gguf_type { /* the format's numbers */
                 GGUF_U8 = 0,
                 GGUF_I8 = 1,
                 GGUF_U16 = 2,
                 GGUF_I16 = 3,
                 GGUF_U32 = 4,
                 GGUF_I32 = 5,
                 GGUF_F32 = 6,
                 GGUF_BOOL = 7,
                 GGUF_STRING = 8,
                 GGUF_ARRAY = 9, /* only in files: an entry has its elements' type and is_array */
                 GGUF_U64 = 10,
                 GGUF_I64 = 11,
                 GGUF_F64 = 12,
};

struct gguf_string { /* any bytes, not even UTF-8 is promised */
    const char *text;
    size_t n;
};

struct gguf_entry {
    struct gguf_string key;
    enum gguf_type type; /* of the value, or of each element; never GGUF_ARRAY */
    bool is_array;
    size_t n;            /* elements; 1 when not an array */
    const uint8_t *data; /* the first element, as it lies in the file */
};

enum gguf_tensor_type { /* the format's numbers, of those types that are read */
                        GGUF_TENSOR_F32 = 0,
                        GGUF_TENSOR_F16 = 1,
                        GGUF_TENSOR_Q4_0 = 2,
                        GGUF_TENSOR_Q8_0 = 8,
                        GGUF_TENSOR_Q4_K = 12,
                        GGUF_TENSOR_Q5_K = 13,
                        GGUF_TENSOR_Q6_K = 14,
                        GGUF_TENSOR_BF16 = 30,
};

#define GGUF_MAX_DIMS 4

struct gguf_tensor {
    struct gguf_string name;
    enum gguf_tensor_type type;
    unsigned n_dims;
    uint64_t dims[GGUF_MAX_DIMS]; /* the innermost, ne0, first; unused ones are 1 */
    uint64_t offset, bytes;       /* from the beginning of the file */
};

/*
 * Maps path. 0, -errno of open, fstat or mmap, -ENOMEM, -EINVAL: err names file and field
 */
int gguf_open(struct gguf **ret, const char *path, struct error *err);

/*
 * The same for n bytes in memory, which are borrowed; name is for messages only. file_size is what
 * tensors are checked against: n, or more when only the head of a file is in memory.
 */
int gguf_parse(struct gguf **ret, const void *data, size_t n, uint64_t file_size, const char *name,
               struct error *err);
struct gguf *gguf_free(struct gguf *g);
void gguf_freep(struct gguf **g);

/* Whether the bytes begin like a GGUF file. */
bool gguf_detect(const void *data, size_t n);

const char *gguf_path(const struct gguf *g);
int gguf_fd(const struct gguf *g); /* borrowed; negative for gguf_parse() */
uint64_t gguf_file_size(const struct gguf *g);

size_t gguf_n_entries(const struct gguf *g);
const struct gguf_entry *gguf_entry(const struct gguf *g, size_t i);
const struct gguf_entry *gguf_find(const struct gguf *g, const char *key); /* or NULL */

/* In the order of their offsets in the file. */
size_t gguf_n_tensors(const struct gguf *g);
const struct gguf_tensor *gguf_tensor(const struct gguf *g, size_t i);
const struct gguf_tensor *gguf_find_tensor(const struct gguf *g, const char *name); /* or NULL */

/*
 * Element i (< n; 0 when not an array) converted: a whole number in range, any number, a truth
 * value, a string. 0 or -EINVAL when the entry is of another kind or the value does not fit.
 */
int gguf_get_u32(const struct gguf_entry *e, size_t i, uint32_t *ret);
int gguf_get_i64(const struct gguf_entry *e, size_t i, int64_t *ret);
int gguf_get_float(const struct gguf_entry *e, size_t i, float *ret);
int gguf_get_bool(const struct gguf_entry *e, size_t i, bool *ret);       /* bool only */
int gguf_get_string(const struct gguf_entry *e, struct gguf_string *ret); /* not of an array */

/*
 * Walks an array of strings, whose elements have no fixed size:
 *     struct gguf_strings s = gguf_strings_begin(e);
 *     while (gguf_strings_next(&s, &string)) ...
 * Any other entry has none.
 */
struct gguf_strings {
    const uint8_t *at; /* in the entry's data */
    size_t left;
};

struct gguf_strings gguf_strings_begin(const struct gguf_entry *e);
bool gguf_strings_next(struct gguf_strings *s, struct gguf_string *ret);

bool gguf_string_is(struct gguf_string s, const char *text);

/* Values and bytes of one block of a tensor type, and its name as people write it: "Q4_0". */
size_t gguf_block_values(enum gguf_tensor_type type);
size_t gguf_block_bytes(enum gguf_tensor_type type);
const char *gguf_tensor_type_name(enum gguf_tensor_type type);
