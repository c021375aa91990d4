/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * source: a foreign model, whatever files it came in: the configuration, and where each tensor
 * lies, by the names and shapes of the Hugging Face checkpoint without its prefix (gemma3n.md
 * §2.1). What is stacked or fused in the source is listed here as its parts.
 *
 * The importer reads tensors with pread() through source_read(): a file that shrinks underneath is
 * an error then, where a mapping would be a SIGBUS. Immutable after open; any thread.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "engine/model-config.h"
#include "engine/model.h"
#include "engine/tokenizer.h"
#include "tools/import/gguf.h"

/* Of the model family (gemma3n.md §7.2), where the source carries none. */
#define SOURCE_GENERATION_DEFAULTS                    \
    (struct model_generation)                         \
    {                                                 \
        .temperature = 1, .top_p = 0.95f, .top_k = 64 \
    }

struct source_file {
    char *path;
    int fd;
    uint64_t size;
};

struct source_tensor {
    char *name;
    unsigned file;              /* index of source.files */
    enum gguf_tensor_type type; /* plain types serve for safetensors as well */
    uint32_t n_out, n_in;       /* a vector has n_out 1 */
    uint64_t offset;            /* of row 0 in the file; rows follow without gaps */
    size_t row_bytes;
};

struct source {
    char *path;         /* as given, for messages and the model file's metadata */
    const char *format; /* "gguf" or "huggingface" */

    unsigned n_files;
    struct source_file *files;
    size_t n_tensors;
    struct source_tensor *tensors; /* sorted by name after open */

    struct model_config config;
    struct model_generation generation;
    char *model_name, *license, *chat_template; /* NULL: the source does not tell */

    struct gguf *gguf; /* of "gguf": carries the vocabulary */
};

/*
 * Opens a GGUF file or a Hugging Face directory, told apart by what they are, not by their names.
 * 0, -errno, -ENOMEM, -EINVAL: err names file and field
 */
int source_open(struct source **ret, const char *path, struct error *err);
struct source *source_free(struct source *s);
void source_freep(struct source **s);

const struct source_tensor *source_find(const struct source *s, const char *name); /* or NULL */

/*
 * Settles config.vocab_size and config.vocab_size_ple by what the two embedding tables and the
 * vocabulary (NULL: none) hold; see source.c. 0, -errno, -EINVAL, -ENOMEM
 */
int source_set_vocabulary(struct source *s, const struct tokenizer_table *table, struct error *err);

/*
 * Reads rows [first, first + n) of t to data [n * t->row_bytes].
 * 0, -errno, -ENODATA: the file ends before; err is set
 */
int source_read(const struct source *s, const struct source_tensor *t, uint32_t first, uint32_t n,
                void *data, struct error *err);

/* Whether the type is a block format, not plain numbers. */
static inline bool source_is_quantized(enum gguf_tensor_type type)
{
    return type != GGUF_TENSOR_F32 && type != GGUF_TENSOR_F16 && type != GGUF_TENSOR_BF16;
}

/*
 * For the readers of containers, before the tensors are sorted.
 *
 * source_add_file    takes over fd, also on failure; returns the index or negative errno
 * source_add_tensor  a tensor whose bytes are known to lie in the file; 0, -EINVAL, -ENOMEM
 * source_finish      sorts, and refuses names that occur twice
 */
int source_add_file(struct source *s, const char *path, int fd, uint64_t size, struct error *err);
int source_add_tensor(struct source *s, const char *name, unsigned file, enum gguf_tensor_type type,
                      uint64_t n_out, uint64_t n_in, uint64_t offset, struct error *err);
int source_finish(struct source *s, struct error *err);

int gguf_source_open(struct source **ret, const char *path, struct error *err);
int hf_directory_open(struct source **ret, const char *path, struct error *err);
