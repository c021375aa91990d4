/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * model_file: an opened, validated and mapped model file (docs/model-file.md): names and places of
 * tensors, and the metadata strings. It knows the container, not the architecture: model.h does.
 *
 * Every field of the header is checked before anything is mapped. What cannot be known then is the
 * tensors' contents, so whoever reads them treats them as hostile numbers (no index, no loop
 * bound). Immutable after open; any thread.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backends/weight.h"
#include "base/error.h"

#define MODEL_FILE_FORMAT 1
#define MODEL_FILE_PAGE 4096 /* payloads of at least this size begin at a multiple of it */
#define MODEL_FILE_MAX_HEADER (64 << 20) /* bytes of JSON */
#define MODEL_FILE_MAX_NAME 255          /* bytes of a tensor's name */

/* How the JSON begins; the 64 digits of the header's hash follow, then `",`. */
#define MODEL_FILE_PREFIX "{\"__metadata__\":{\"llmd.header_sha256\":\""

struct model_file;

struct model_tensor {
    const char *name;     /* Hugging Face name without prefix: "layers.0.self_attn.q_proj.weight" */
    struct weight weight; /* data points into the mapping; a vector has n_out 1 */
    size_t bytes;         /* of the payload at weight.data */
    uint64_t offset;      /* of the payload in the file */
    const char *sha256;   /* 64 hex digits: of the payload without its padding */
};

/*
 * Opens path, or takes over fd (closed on failure, else by free) with path for messages only.
 * 0, -errno of open, fstat or mmap, -EINVAL: not a model file or a broken one, -ENOMEM
 */
int model_file_open(struct model_file **ret, const char *path, struct error *err);
int model_file_open_fd(struct model_file **ret, int fd, const char *path, struct error *err);

int model_file_fd(const struct model_file *f); /* borrowed */
struct model_file *model_file_free(struct model_file *f);
void model_file_freep(struct model_file **f);

const char *model_file_path(const struct model_file *f);

/* A string of `__metadata__` such as "llmd.config", or NULL. */
const char *model_file_metadata(const struct model_file *f, const char *key);

/* All tensors, in file order, which is execution order. */
size_t model_file_n_tensors(const struct model_file *f);
const struct model_tensor *model_file_tensor(const struct model_file *f, size_t i);

/* By name, or NULL. Blobs that are not weights (tokenizer.pieces) are not among these. */
const struct model_tensor *model_file_find(const struct model_file *f, const char *name);

/* A blob: a U8 tensor without weight type, such as "tokenizer.pieces". NULL if there is none. */
const void *model_file_blob(const struct model_file *f, const char *name, size_t *ret_bytes);

/* The whole mapping, for prefetch and statistics: file bytes [0, size). */
const void *model_file_map(const struct model_file *f, size_t *ret_size);

/*
 * Whether what the mapping gave so far is the file that was opened. Not when that was shortened,
 * could not be read or has become another one: nothing computed from it since the last time that
 * this was true is to be used. Stays false. A file that was removed, or that another one was put in
 * the place of, is still there for us. One system call; any thread.
 */
bool model_file_is_intact(const struct model_file *f);

/* Reads every payload once and compares its SHA-256. 0, -EBADMSG naming the tensor, -errno */
int model_file_verify(const struct model_file *f, struct error *err);
