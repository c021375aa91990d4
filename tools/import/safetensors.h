/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * safetensors: the header of a foreign safetensors file (gemma3n.md §2.2). Names occur once, and
 * the tensors' bytes fill the rest of the file without overlap or hole, as the format demands, each
 * as many as its shape and type say. Immutable after open; any thread.
 */

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define SAFETENSORS_MAX_DIMS 8
#define SAFETENSORS_MAX_HEADER ((uint64_t)100 << 20) /* the format's own limit */

struct safetensors;

struct safetensors_tensor {
    const char *name;
    const char *dtype; /* as written: "BF16" */
    unsigned n_dims;
    uint64_t dims[SAFETENSORS_MAX_DIMS]; /* the outermost first */
    uint64_t offset, bytes;              /* from the beginning of the file */
};

/*
 * Reads the header of fd, which stays the caller's; path is for messages.
 * 0, -errno, -ENOMEM, -EINVAL: err names file and field
 */
int safetensors_open(struct safetensors **ret, int fd, const char *path, struct error *err);

/* The same from the header's JSON, text[0..n), of a file of file_size bytes >= 8 + n. */
int safetensors_parse(struct safetensors **ret, const char *text, size_t n, uint64_t file_size,
                      const char *path, struct error *err);
struct safetensors *safetensors_free(struct safetensors *s);
void safetensors_freep(struct safetensors **s);

/* In the order of their names. */
size_t safetensors_n_tensors(const struct safetensors *s);
const struct safetensors_tensor *safetensors_tensor(const struct safetensors *s, size_t i);
const struct safetensors_tensor *safetensors_find(const struct safetensors *s, const char *name);
