/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/import/source.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/whole-io.h"
#include "tools/import/dequantize.h"

/* Gemma 3's text vocabulary; what lies beyond in 3n's tables are slots for images and sound. */
#define TEXT_VOCABULARY 262144

int source_open(struct source **ret, const char *path, struct error *err)
{
    struct stat st;

    if (stat(path, &st) < 0)
        return error_set(err, errno, "%s: cannot open: %m", path);
    if (S_ISDIR(st.st_mode))
        return hf_directory_open(ret, path, err);
    return gguf_source_open(ret, path, err);
}

struct source *source_free(struct source *s)
{
    if (!s)
        return NULL;
    for (unsigned i = 0; i < s->n_files; i++) {
        closep(&s->files[i].fd);
        free(s->files[i].path);
    }
    for (size_t i = 0; i < s->n_tensors; i++)
        free(s->tensors[i].name);
    free(s->files);
    free(s->tensors);
    gguf_free(s->gguf);
    free(s->path);
    free(s->model_name);
    free(s->license);
    free(s->chat_template);
    free(s);
    return NULL;
}

void source_freep(struct source **s)
{
    source_free(*s);
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct source_tensor *)a)->name, ((const struct source_tensor *)b)->name);
}

const struct source_tensor *source_find(const struct source *s, const char *name)
{
    struct source_tensor wanted = {.name = (char *)name};

    return bsearch(&wanted, s->tensors, s->n_tensors, sizeof(wanted), compare_names);
}

int source_read(const struct source *s, const struct source_tensor *t, uint32_t first, uint32_t n,
                void *data, struct error *err)
{
    const struct source_file *f = &s->files[t->file];
    uint64_t offset = t->offset + (uint64_t)first * t->row_bytes;
    int r = read_whole(f->fd, data, (size_t)n * t->row_bytes, offset);

    if (r == -ENODATA)
        return error_set(err, ENODATA, "%s: the file ends within %s", f->path, t->name);
    if (r < 0)
        return error_set(err, -r, "%s: cannot read %s: %s", f->path, t->name, strerror(-r));
    return 0;
}

int source_add_file(struct source *s, const char *path, int fd, uint64_t size, struct error *err)
{
    CLEANUP(closep) int owned = fd;
    CLEANUP(freep) char *copy = strdup(path);
    struct source_file *files;

    files = reallocarray(s->files, (size_t)s->n_files + 1, sizeof(*files));
    if (files)
        s->files = files;
    if (!files || !copy)
        return error_set(err, ENOMEM, "%s: out of memory", path);
    files[s->n_files] = (struct source_file){TAKE_PTR(copy), TAKE_FD(owned), size};
    return (int)s->n_files++;
}

int source_add_tensor(struct source *s, const char *name, unsigned file, enum gguf_tensor_type type,
                      uint64_t n_out, uint64_t n_in, uint64_t offset, struct error *err)
{
    CLEANUP(freep) char *copy = strdup(name);
    const char *path = s->files[file].path;
    struct source_tensor *tensors = s->tensors;
    uint64_t bytes;
    size_t row_bytes;

    if (n_out < 1 || n_out > UINT32_MAX || n_in < 1 || n_in > UINT32_MAX)
        return error_set(err, EINVAL, "%s: %s: the shape is [%llu, %llu]", path, name,
                         (unsigned long long)n_out, (unsigned long long)n_in);
    if (n_in % gguf_block_values(type) != 0)
        return error_set(err, EINVAL, "%s: %s: rows of %llu values are not whole blocks of %s",
                         path, name, (unsigned long long)n_in, gguf_tensor_type_name(type));
    if (ckd_mul(&row_bytes, (size_t)n_in / gguf_block_values(type), gguf_block_bytes(type)) ||
        ckd_mul(&bytes, row_bytes, n_out) || range_outside(offset, bytes, s->files[file].size))
        return error_set(err, EINVAL, "%s: %s ends beyond the end of the file; is it complete?",
                         path, name);
    /* Doubling: the array is full when the count is a power of two. */
    if ((s->n_tensors & (s->n_tensors - 1)) == 0) {
        tensors = reallocarray(s->tensors, s->n_tensors ? 2 * s->n_tensors : 1, sizeof(*tensors));
        if (tensors)
            s->tensors = tensors;
    }
    if (!tensors || !copy)
        return error_set(err, ENOMEM, "%s: out of memory", path);
    tensors[s->n_tensors++] = (struct source_tensor){
        .name = TAKE_PTR(copy),
        .file = file,
        .type = type,
        .n_out = (uint32_t)n_out,
        .n_in = (uint32_t)n_in,
        .offset = offset,
        .row_bytes = row_bytes,
    };
    return 0;
}

/*
 * Rows of embed_tokens that carry pieces. The official checkpoints have 262400 rows, of which the
 * last 256 are slots for images and sound, filled with copies of row 0, <pad>; a token there has
 * <pad>'s logit and must never be sampled. They are recognised by being such copies, which holds in
 * every container and type, and leaves tables that are full to their last row (also of models made
 * for tests) as they are.
 */
static int count_vocabulary(struct source *s, const struct source_tensor *t, struct error *err)
{
    CLEANUP(freep) uint8_t *first = malloc(t->row_bytes);
    CLEANUP(freep) uint8_t *row = malloc(t->row_bytes);
    uint32_t n = t->n_out;
    int r;

    if (!first || !row)
        return error_set(err, ENOMEM, "%s: out of memory", s->path);
    r = source_read(s, t, 0, 1, first, err);
    if (r < 0)
        return r;
    for (; n > 1; n--) {
        r = source_read(s, t, n - 1, 1, row, err);
        if (r < 0)
            return r;
        if (memcmp(first, row, t->row_bytes) != 0)
            break;
    }
    s->config.vocab_size = n;
    return 0;
}

/*
 * Rows of the per-layer-embedding table. Newer GGUF files fill it with zeros to the length of
 * embed_tokens; in the reference these ids use row 0, so the filling is left out.
 */
static int count_ple_vocabulary(struct source *s, const struct source_tensor *t, struct error *err)
{
    CLEANUP(freep) uint8_t *row = malloc(t->row_bytes);
    CLEANUP(freep) float *x = calloc(t->n_in, sizeof(*x));
    uint32_t n = t->n_out;
    int r;

    if (!row || !x)
        return error_set(err, ENOMEM, "%s: out of memory", s->path);
    for (; n > TEXT_VOCABULARY; n--) {
        bool zero = true;

        r = source_read(s, t, n - 1, 1, row, err);
        if (r < 0)
            return r;
        dequantize(t->type, row, t->n_in, x);
        for (uint32_t i = 0; i < t->n_in; i++)
            zero = zero && x[i] == 0;
        if (!zero)
            break;
    }
    s->config.vocab_size_ple = n;
    return 0;
}

int source_finish(struct source *s, struct error *err)
{
    qsort(s->tensors, s->n_tensors, sizeof(*s->tensors), compare_names);
    for (size_t i = 1; i < s->n_tensors; i++)
        if (compare_names(&s->tensors[i - 1], &s->tensors[i]) == 0)
            return error_set(err, EINVAL, "%s: tensor %s occurs twice, also in %s",
                             s->files[s->tensors[i].file].path, s->tensors[i].name,
                             s->files[s->tensors[i - 1].file].path);
    return 0;
}

/*
 * Ids that can be sampled are those below config.vocab_size: the rows of embed_tokens that are not
 * such copies, and, where there is a vocabulary, have a piece in it; a run of unused pieces at its
 * end ([PAD262144] and the like) only fills it up to the table's length.
 */
int source_set_vocabulary(struct source *s, const struct tokenizer_table *table, struct error *err)
{
    const struct source_tensor *embed = source_find(s, "embed_tokens.weight");
    const struct source_tensor *ple = source_find(s, "embed_tokens_per_layer.weight");
    int r;

    if (!embed || !ple)
        return error_set(err, EINVAL, "%s: tensor %s is missing; is this a whole Gemma 3n model?",
                         s->path, embed ? "embed_tokens_per_layer.weight" : "embed_tokens.weight");
    /* Rows are looked at one by one, and a file with holes may claim any number of them. */
    if (embed->n_out > MODEL_MAX_VOCAB || ple->n_out > MODEL_MAX_VOCAB) {
        const struct source_tensor *t = embed->n_out > MODEL_MAX_VOCAB ? embed : ple;

        return error_set(err, EINVAL, "%s: tensor %s has %u rows; at most %u can be run",
                         s->files[t->file].path, t->name, t->n_out, MODEL_MAX_VOCAB);
    }
    r = count_vocabulary(s, embed, err);
    if (r < 0)
        return r;
    if (table) {
        uint32_t n = table->n_pieces;

        while (n > 1 && table->types[n - 1] == PIECE_UNUSED)
            n--;
        s->config.vocab_size = MIN(s->config.vocab_size, n);
    }
    return count_ple_vocabulary(s, ple, err);
}
