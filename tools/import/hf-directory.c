/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A Hugging Face directory as a source: config.json, then the weights of model.safetensors or of
 * the shards that model.safetensors.index.json names. A shard is a plain file name in this very
 * directory (what it links to is the owner's business: download caches are made of links). Towers
 * for images and sound are left out.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"
#include "engine/json-text.h"
#include "tools/import/hf-config.h"
#include "tools/import/safetensors.h"
#include "tools/import/source.h"

#define SINGLE "model.safetensors"
#define INDEX "model.safetensors.index.json"

/* Real ones: 5 kB, 1 kB, 200 kB, 1.2 MB (with the list of added tokens). */
#define MAX_TEXT ((off_t)32 << 20)
static const struct json_limits limits = {.depth = 32, .max_values = 1 << 20};

struct directory {
    const char *path;
    int fd;
};

/* Opens a regular file of the directory. -ENOENT is returned without a message. */
static int open_file(const struct directory *d, const char *name, uint64_t *ret_size,
                     struct error *err)
{
    CLEANUP(closep) int fd = openat(d->fd, name, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    struct stat st;

    if (fd < 0 && errno == ENOENT)
        return -ENOENT;
    if (fd < 0 || fstat(fd, &st) < 0)
        return error_set(err, errno, "%s/%s: cannot open: %m", d->path, name);
    if (!S_ISREG(st.st_mode))
        return error_set(err, EINVAL, "%s/%s: not a regular file", d->path, name);
    *ret_size = (uint64_t)st.st_size;
    return TAKE_FD(fd);
}

/* The whole file as a string with an end. -ENOENT is returned without a message. */
static int read_text(const struct directory *d, const char *name, char **ret, size_t *ret_n,
                     struct error *err)
{
    CLEANUP(closep) int fd = -EBADF;
    CLEANUP(freep) char *text = NULL;
    uint64_t size = 0;
    size_t n = 0;

    fd = open_file(d, name, &size, err);
    if (fd < 0)
        return fd;
    if (size > (uint64_t)MAX_TEXT)
        return error_set(err, EFBIG, "%s/%s: larger than %lld bytes", d->path, name,
                         (long long)MAX_TEXT);
    text = malloc((size_t)size + 1);
    if (!text)
        return error_set(err, ENOMEM, "%s/%s: out of memory", d->path, name);
    while (n < size) {
        ssize_t done = read(fd, text + n, (size_t)size - n);

        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return error_set(err, errno, "%s/%s: cannot read: %m", d->path, name);
        if (done == 0)
            break;
        n += (size_t)done;
    }
    text[n] = 0;
    *ret = TAKE_PTR(text);
    *ret_n = n;
    return 0;
}

/* *ret is NULL where there is no such file. */
static int read_json(const struct directory *d, const char *name, json_object **ret,
                     struct error *err)
{
    CLEANUP(freep) char *text = NULL;
    size_t n;
    int r = read_text(d, name, &text, &n, err);

    *ret = NULL;
    if (r == -ENOENT)
        return 0;
    if (r < 0)
        return r;
    r = json_text_parse(ret, text, n, &limits, err);
    return r < 0 ? error_prefix(err, -r, "%s/%s", d->path, name) : 0;
}

/* The name within the text model; NULL: not a part of it. */
static const char *strip_prefix(const char *name)
{
    static const char *const towers[] = {"vision_tower.", "audio_tower.", "embed_vision.",
                                         "embed_audio."};
    static const char *const prefixes[] = {"model.language_model.", "language_model.model.",
                                           "language_model.", "model."};

    for (size_t i = 0; i < ARRAY_SIZE(towers); i++)
        if (strstr(name, towers[i]))
            return NULL;
    for (size_t i = 0; i < ARRAY_SIZE(prefixes); i++)
        if (strncmp(name, prefixes[i], strlen(prefixes[i])) == 0) {
            name += strlen(prefixes[i]);
            break;
        }
    if (strcmp(name, "lm_head.weight") == 0)
        return NULL; /* the head is tied: a duplicate of embed_tokens */
    return name;
}

static int add_tensor(struct source *s, unsigned file, const struct safetensors_tensor *t,
                      struct error *err)
{
    static const struct {
        const char *dtype;
        enum gguf_tensor_type type;
    } types[] = {
        {"BF16", GGUF_TENSOR_BF16},
        {"F16", GGUF_TENSOR_F16},
        {"F32", GGUF_TENSOR_F32},
    };
    const char *name = strip_prefix(t->name), *path = s->files[file].path;

    if (!name)
        return 0;
    if (t->n_dims != 1 && t->n_dims != 2)
        return error_set(err, EINVAL, "%s: tensor %s has %u dimensions, not 1 or 2", path, t->name,
                         t->n_dims);
    for (size_t i = 0; i < ARRAY_SIZE(types); i++)
        if (strcmp(t->dtype, types[i].dtype) == 0)
            return source_add_tensor(s, name, file, types[i].type, t->n_dims == 1 ? 1 : t->dims[0],
                                     t->dims[t->n_dims - 1], t->offset, err);
    return error_set(err, EINVAL, "%s: tensor %s has dtype %s; only BF16, F16 and F32 can be read",
                     path, t->name, t->dtype);
}

/* Opens and enters one file of weights. -ENOENT is returned without a message. */
static int open_shard(struct source *s, const struct directory *d, const char *name,
                      struct safetensors **ret, struct error *err)
{
    CLEANUP(freep) char *path = NULL;
    uint64_t size = 0;
    int fd, file, r;

    fd = open_file(d, name, &size, err);
    if (fd < 0)
        return fd;
    if (asprintf(&path, "%s/%s", d->path, name) < 0) {
        path = NULL;
        close(fd);
        return error_set(err, ENOMEM, "%s: out of memory", d->path);
    }
    file = source_add_file(s, path, fd, size, err);
    if (file < 0)
        return file;
    r = safetensors_open(ret, fd, path, err);
    return r < 0 ? r : file;
}

static bool is_plain_name(const char *name)
{
    static const char end[] = ".safetensors";
    size_t n = strlen(name);

    return n > strlen(end) && n < 256 && name[0] != '.' && !strchr(name, '/') &&
           strcmp(name + n - strlen(end), end) == 0;
}

struct shard {
    const char *name;
    int file;
    struct safetensors *header;
};

struct shards {
    size_t n, allocated;
    struct shard *data;
};

static void shards_done(struct shards *s)
{
    for (size_t i = 0; i < s->n; i++)
        safetensors_free(s->data[i].header);
    free(s->data);
}

/* The shard of that name, opened if it is the first time. */
static int find_shard(struct source *s, const struct directory *d, struct shards *shards,
                      const char *name, struct shard **ret, struct error *err)
{
    struct shard shard = {.name = name};

    for (size_t i = 0; i < shards->n; i++)
        if (strcmp(shards->data[i].name, name) == 0) {
            *ret = &shards->data[i];
            return 0;
        }
    if (!is_plain_name(name))
        return error_set(err, EINVAL,
                         "%s/%s: shard '%s' is not the plain name of a .safetensors "
                         "file",
                         d->path, INDEX, name);
    if (shards->n == shards->allocated) {
        size_t n = shards->n ? 2 * shards->n : 8;
        struct shard *grown = reallocarray(shards->data, n, sizeof(*grown));

        if (!grown)
            return error_set(err, ENOMEM, "%s: out of memory", d->path);
        shards->data = grown;
        shards->allocated = n;
    }
    shard.file = open_shard(s, d, name, &shard.header, err);
    if (shard.file == -ENOENT)
        return error_set(err, ENOENT, "%s/%s: missing, but named in %s; is the download complete?",
                         d->path, name, INDEX);
    if (shard.file < 0)
        return shard.file;
    shards->data[shards->n] = shard;
    *ret = &shards->data[shards->n++];
    return 0;
}

static int add_indexed(struct source *s, const struct directory *d, json_object *index,
                       struct error *err)
{
    CLEANUP(shards_done) struct shards shards = {0};
    json_object *map = json_text_get(index, "weight_map");

    if (!json_object_is_type(map, json_type_object) || json_object_object_length(map) == 0)
        return error_set(err, EINVAL, "%s/%s: weight_map is missing or not an object", d->path,
                         INDEX);
    json_object_object_foreach(map, name, v)
    {
        const struct safetensors_tensor *t;
        const char *file = json_text_string(v);
        struct shard *shard = NULL;
        int r;

        if (!file)
            return error_set(err, EINVAL, "%s/%s: weight_map: '%s' is not a string", d->path, INDEX,
                             name);
        r = find_shard(s, d, &shards, file, &shard, err);
        if (r < 0)
            return r;
        t = safetensors_find(shard->header, name);
        if (!t)
            return error_set(err, EINVAL, "%s/%s: tensor %s is missing, but %s says it is here",
                             d->path, file, name, INDEX);
        r = add_tensor(s, (unsigned)shard->file, t, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int add_weights(struct source *s, const struct directory *d, struct error *err)
{
    CLEANUP(safetensors_freep) struct safetensors *single = NULL;
    CLEANUP(json_object_putp) json_object *index = NULL;
    int file, r;

    file = open_shard(s, d, SINGLE, &single, err);
    if (file >= 0) {
        for (size_t i = 0; i < safetensors_n_tensors(single); i++) {
            r = add_tensor(s, (unsigned)file, safetensors_tensor(single, i), err);
            if (r < 0)
                return r;
        }
        return 0;
    }
    if (file != -ENOENT)
        return file;
    r = read_json(d, INDEX, &index, err);
    if (r < 0)
        return r;
    if (!index)
        return error_set(err, ENOENT, "%s: has neither %s nor %s", d->path, SINGLE, INDEX);
    return add_indexed(s, d, index, err);
}

/* chat_template.jinja, or the field of tokenizer_config.json where it used to be. */
static int read_chat_template(struct source *s, const struct directory *d, struct error *err)
{
    CLEANUP(json_object_putp) json_object *root = NULL;
    CLEANUP(freep) char *text = NULL;
    const char *field;
    size_t n;
    int r;

    r = read_text(d, "chat_template.jinja", &text, &n, err);
    if (r < 0 && r != -ENOENT)
        return r;
    if (r == 0) {
        if (strlen(text) != n || !utf8_valid(text, n))
            return error_set(err, EINVAL, "%s/chat_template.jinja: not UTF-8 text", d->path);
        s->chat_template = TAKE_PTR(text);
        return 0;
    }
    r = read_json(d, "tokenizer_config.json", &root, err);
    if (r < 0)
        return r;
    field = json_text_string(json_text_get(root, "chat_template"));
    if (field && !(s->chat_template = strdup(field)))
        return error_set(err, ENOMEM, "%s: out of memory", d->path);
    return 0;
}

/* "license: gemma" between the two lines "---" at the head of the model card. */
static int read_license(struct source *s, const struct directory *d, struct error *err)
{
    static const char key[] = "license:";
    CLEANUP(freep) char *text = NULL;
    char *line, *rest;
    size_t n;
    int r = read_text(d, "README.md", &text, &n, err);

    if (r == -ENOENT)
        return 0;
    if (r < 0)
        return r;
    rest = text;
    line = strsep(&rest, "\n");
    if (strncmp(line, "---", 3) != 0)
        return 0;
    while ((line = strsep(&rest, "\n")) && strncmp(line, "---", 3) != 0) {
        if (strncmp(line, key, strlen(key)) != 0)
            continue;
        line += strlen(key);
        line += strspn(line, " \t\"'");
        line[strcspn(line, " \t\r\"'")] = 0;
        if (line[0] && utf8_valid(line, strlen(line)) && !(s->license = strdup(line)))
            return error_set(err, ENOMEM, "%s: out of memory", d->path);
        return 0;
    }
    return 0;
}

static int read_config(struct source *s, const struct directory *d, struct error *err)
{
    CLEANUP(json_object_putp) json_object *config = NULL;
    CLEANUP(json_object_putp) json_object *generation = NULL;
    int r;

    r = read_json(d, "config.json", &config, err);
    if (r < 0)
        return r;
    if (!config)
        return error_set(err, ENOENT, "%s/config.json: missing; is this a model's directory?",
                         d->path);
    r = hf_config_read(&s->config, &s->generation, config, err);
    if (r < 0)
        return error_prefix(err, -r, "%s/config.json", d->path);
    r = read_json(d, "generation_config.json", &generation, err);
    if (r < 0)
        return r;
    if (generation) {
        r = hf_generation_read(&s->generation, generation, err);
        if (r < 0)
            return error_prefix(err, -r, "%s/generation_config.json", d->path);
    }
    return 0;
}

int hf_directory_open(struct source **ret, const char *path, struct error *err)
{
    CLEANUP(source_freep) struct source *s = calloc(1, sizeof(*s));
    CLEANUP(closep) int fd = -EBADF;
    struct directory d = {.path = path};
    int r;

    if (!s || !(s->path = strdup(path)))
        return error_set(err, ENOMEM, "%s: out of memory", path);
    s->format = "huggingface";
    s->generation = SOURCE_GENERATION_DEFAULTS;
    fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return error_set(err, errno, "%s: cannot open: %m", path);
    d.fd = fd;
    if ((r = read_config(s, &d, err)) < 0 || (r = add_weights(s, &d, err)) < 0 ||
        (r = read_chat_template(s, &d, err)) < 0 || (r = read_license(s, &d, err)) < 0 ||
        (r = source_finish(s, err)) < 0)
        return r;
    *ret = TAKE_PTR(s);
    return 0;
}
