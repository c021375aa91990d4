/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Feeds every file of the folders on the command line to a fuzzer's entry point, so that ordinary
 * test runs replay the corpora under whatever sanitizer the build has. A libFuzzer build
 * (-Dfuzzers=true) brings its own main() instead.
 */

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static int replay(const char *path)
{
    CLEANUP(fclosep) FILE *f = fopen(path, "re");
    CLEANUP(freep) uint8_t *data = NULL;
    long n;

    if (!f || fseek(f, 0, SEEK_END) < 0 || (n = ftell(f)) < 0) {
        fprintf(stderr, "%s: %m\n", path);
        return -1;
    }
    rewind(f);
    /* Exactly n bytes on the heap, so that one byte too far is seen. */
    data = malloc(n > 0 ? (size_t)n : 1);
    if (!data || fread(data, 1, (size_t)n, f) != (size_t)n) {
        fprintf(stderr, "%s: cannot read\n", path);
        return -1;
    }
    LLVMFuzzerTestOneInput(data, (size_t)n);
    return 0;
}

int main(int argc, char **argv)
{
    int n = 0;

    for (int i = 1; i < argc; i++) {
        CLEANUP(closedirp) DIR *dir = opendir(argv[i]);
        struct dirent *e;

        if (!dir) {
            fprintf(stderr, "%s: %m\n", argv[i]);
            return 1;
        }
        while ((e = readdir(dir))) {
            CLEANUP(freep) char *path = NULL;

            if (e->d_name[0] == '.')
                continue;
            if (asprintf(&path, "%s/%s", argv[i], e->d_name) < 0 || replay(path) < 0)
                return 1;
            n++;
        }
    }
    printf("replayed %d inputs\n", n);
    return n > 0 ? 0 : 1; /* an empty corpus proves nothing */
}
