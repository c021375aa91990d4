/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Feeds model files to the reader. The header's hash would stop every mutation, and so would the
 * padding of header to page, so the input is one of
 *   'R' a whole file, as it is
 *   'J' the JSON that follows the hash, NUL, the data: length, padding and hash are put in here
 * What opens is then walked as the engine would.
 */

#include <assert.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/model-config.h"
#include "engine/model-file.h"
#include "engine/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* A file from the input's description, malloc'ed. */
static uint8_t *complete_file(const uint8_t *data, size_t n, size_t *ret_n)
{
    static const char zeros[] = "0000000000000000000000000000000000000000000000000000000000000000";
    const uint8_t *nul = memchr(data, 0, n);
    size_t n_json = nul ? (size_t)(nul - data) : n, n_data = nul ? n - n_json - 1 : 0;
    size_t n_prefix = strlen(MODEL_FILE_PREFIX), n_header = n_prefix + 64 + 2 + n_json;
    uint8_t digest[EVP_MAX_MD_SIZE], *file, *json;
    char hex[3];

    n_header = ALIGN_UP(8 + n_header, (size_t)MODEL_FILE_PAGE) - 8;
    file = malloc(8 + n_header + n_data);
    if (!file)
        abort();
    json = file + 8;
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)n_header >> 8 * i);
    memset(json, ' ', n_header);
    memcpy(json, MODEL_FILE_PREFIX, n_prefix);
    memcpy(json + n_prefix, zeros, 64);
    memcpy(json + n_prefix + 64, "\",", 2);
    memcpy(json + n_prefix + 66, data, n_json);
    if (n_data > 0)
        memcpy(json + n_header, nul + 1, n_data);
    if (EVP_Digest(json, n_header, digest, NULL, EVP_sha256(), NULL) != 1)
        abort();
    for (int i = 0; i < 32; i++) {
        snprintf(hex, sizeof(hex), "%02x", digest[i]);
        memcpy(json + n_prefix + 2 * i, hex, 2);
    }
    *ret_n = 8 + n_header + n_data;
    return file;
}

static int make_fd(const void *data, size_t n)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC);

    if (fd < 0 || write(fd, data, n) != (ssize_t)n)
        abort();
    return fd;
}

static void walk(const struct model_file *f)
{
    static struct model_config config;
    struct model_generation generation;
    const char *text;

    for (size_t i = 0; i < model_file_n_tensors(f); i++) {
        const struct model_tensor *t = model_file_tensor(f, i);
        float *x = malloc(t->weight.n_in * sizeof(*x));

        if (!x)
            abort();
        if (model_file_find(f, t->name) != t)
            abort();
        weight_get_row(&t->weight, 0, x);
        weight_get_row(&t->weight, t->weight.n_out - 1, x);
        free(x);
    }
    text = model_file_metadata(f, "llmd.config");
    if (text && model_config_parse(&config, text, NULL) == 0) {
        free(model_config_to_json(&config));
        for (uint32_t l = 0; l < config.n_layers; l++)
            if (model_config_kv_source(&config, l) >= config.n_layers_kv)
                abort();
    }
    text = model_file_metadata(f, "llmd.generation");
    if (text && model_generation_parse(&generation, text, 1000, NULL) == 0)
        free(model_generation_to_json(&generation));
    model_file_verify(f, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(freep) uint8_t *file = NULL;
    struct error err = {""};

    if (n < 1 || (data[0] != 'R' && data[0] != 'J'))
        return 0;
    if (data[0] == 'J') {
        file = complete_file(data + 1, n - 1, &n);
    } else {
        n--;
        file = malloc(n + 1);
        if (!file)
            abort();
        memcpy(file, data + 1, n);
    }
    if (model_file_open_fd(&f, make_fd(file, n), "FILE", &err) < 0) {
        if (!err.text[0] || strchr(err.text, '\n'))
            abort(); /* an error without its one line */
        return 0;
    }
    walk(f);
    if (model_open_fd(&m, make_fd(file, n), "FILE", &err) < 0 && !err.text[0])
        abort();
    return 0;
}
