/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * hostile-import MODE FILE HEADER SOURCE OUTPUT: imports SOURCE again and again while FILE, it or a
 * file in it, is broken on purpose; all in one process, so that thousands of variants take seconds
 * and a sanitizer sees each.
 *
 *   truncate  FILE is cut to every length below HEADER bytes
 *   flip      one to four random bits of the first HEADER bytes are flipped, 600 times
 *
 * Every import must be refused with one line that names a file, or run to the end; nothing may be
 * left at OUTPUT. Cut files must be refused.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "tools/import/convert.h"
#include "tools/import/foreign-tokenizer.h"
#include "tools/import/metadata.h"
#include "tools/import/model-writer.h"
#include "tools/import/plan.h"
#include "tools/import/source.h"

#define N_FLIPS 600

/* As llm-import does it, but for the last step, which gives the file its name. */
static int import(const char *path, const char *output, struct error *err)
{
    CLEANUP(source_freep) struct source *source = NULL;
    CLEANUP(foreign_tokenizer_freep) struct foreign_tokenizer *tokenizer = NULL;
    CLEANUP(plan_freep) struct plan *plan = NULL;
    CLEANUP(model_writer_freep) struct model_writer *writer = NULL;
    struct plan_options options = {.has_type = true, .type = WEIGHT_Q8};
    uint64_t bytes;
    int r;

    r = source_open(&source, path, err);
    if (r < 0)
        return r;
    r = source->gguf ? foreign_tokenizer_from_gguf(&tokenizer, source->gguf, err)
                     : foreign_tokenizer_from_folder(&tokenizer, path, err);
    if (r < 0 && r != -ENODATA)
        return r;
    if ((r = source_set_vocabulary(source, tokenizer ? &tokenizer->table : NULL, err)) < 0 ||
        (r = plan_new(&plan, source, &options, err)) < 0 ||
        (r = model_writer_new(&writer, output, err)) < 0 ||
        (r = metadata_set(writer, source, plan, &options, NULL, err)) < 0 ||
        (r = convert_announce(plan, writer, err)) < 0 ||
        (r = model_writer_file_bytes(writer, &bytes, err)) < 0)
        return r;
    /* Flipped sizes may ask for whatever the file's own size allows, but not for more. */
    if (bytes > (uint64_t)256 << 20) {
        fprintf(stderr, "%s: would write %llu bytes\n", path, (unsigned long long)bytes);
        abort();
    }
    if ((r = model_writer_begin(writer, err)) < 0)
        return r;
    return convert_write(source, plan, writer, NULL, NULL, err);
}

static bool import_survives(const char *path, const char *output, const char *what, size_t at)
{
    struct error err = {""};
    int r = import(path, output, &err);

    if (r == 0)
        return true;
    if (strncmp(err.text, path, strlen(path)) != 0 || strlen(err.text) < strlen(path) + 4 ||
        strchr(err.text, '\n')) {
        fprintf(stderr, "%s %zu: '%s'\n", what, at, err.text);
        abort();
    }
    assert(access(output, F_OK) < 0);
    return false;
}

int main(int argc, char **argv)
{
    CLEANUP(freep) uint8_t *original = NULL;
    CLEANUP(closep) int fd = -EBADF;
    size_t n, header, n_imported = 0;
    struct stat st;
    uint32_t x = 1;

    assert(argc == 6);
    fd = open(argv[2], O_RDWR | O_CLOEXEC);
    assert(fd >= 0 && fstat(fd, &st) == 0);
    n = (size_t)st.st_size;
    header = strtoul(argv[3], NULL, 10);
    assert(header <= n);
    original = malloc(n);
    assert(original && pread(fd, original, n, 0) == (ssize_t)n);
    assert(import_survives(argv[4], argv[5], "unbroken", 0));

    if (strcmp(argv[1], "truncate") == 0) {
        for (size_t cut = header; cut-- > 0;) {
            assert(ftruncate(fd, (off_t)cut) == 0);
            if (import_survives(argv[4], argv[5], "cut", cut)) {
                /* only what was cut off to the last line's end may be done without */
                assert(cut == n - 1 && original[cut] == '\n');
                n_imported++;
            }
        }
        assert(pwrite(fd, original, n, 0) == (ssize_t)n);
    } else {
        for (size_t i = 0; i < N_FLIPS; i++) {
            size_t at[4];
            unsigned n_flips = 1 + i % 4;

            for (unsigned k = 0; k < n_flips; k++) {
                uint8_t byte;

                x = x * 1664525 + 1013904223;
                at[k] = (size_t)(((uint64_t)x * header) >> 32);
                x = x * 1664525 + 1013904223;
                assert(pread(fd, &byte, 1, (off_t)at[k]) == 1);
                byte ^= (uint8_t)(1u << (x >> 29));
                assert(pwrite(fd, &byte, 1, (off_t)at[k]) == 1);
            }
            n_imported += import_survives(argv[4], argv[5], "flip", i);
            for (unsigned k = 0; k < n_flips; k++)
                assert(pwrite(fd, &original[at[k]], 1, (off_t)at[k]) == 1);
        }
    }
    assert(import_survives(argv[4], argv[5], "restored", 0));
    printf("%s %s: %zu imported\n", argv[1], argv[2], n_imported);
    return 0;
}
