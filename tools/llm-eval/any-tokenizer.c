/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-eval/any-tokenizer.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "engine/model-file.h"
#include "tools/import/foreign-tokenizer.h"
#include "tools/import/gguf.h"
#include "tools/llm-eval/llm-eval.h"

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), n_end = strlen(end);

    return n >= n_end && strcmp(s + n - n_end, end) == 0;
}

static int open_gguf(struct foreign_tokenizer **ret, const char *path, struct error *err)
{
    CLEANUP(gguf_freep) struct gguf *g = NULL;
    int r;

    r = gguf_open(&g, path, err);
    if (r < 0)
        return r;
    return foreign_tokenizer_from_gguf(ret, g, err);
}

static int open_alone(struct foreign_tokenizer **ret, const char *path, bool json,
                      struct error *err)
{
    CLEANUP(fclosep) FILE *f = fopen(path, "re");
    CLEANUP(freep) char *data = NULL;
    size_t n;
    int r;

    if (!f)
        return error_set(err, errno, "%s: cannot open: %m", path);
    r = read_all(f, &data, &n);
    if (r < 0)
        return error_set(err, -r, "%s: cannot read: %s", path, strerror(-r));
    return json ? foreign_tokenizer_from_json(ret, data, n, path, err)
                : foreign_tokenizer_from_spm(ret, data, n, path, err);
}

int any_tokenizer_open(struct any_tokenizer *ret, const char *path, struct error *err)
{
    CLEANUP(any_tokenizer_done) struct any_tokenizer a = {0};
    char head[4];
    ssize_t n_head = 0;
    struct stat st;
    int fd, r;

    /* O_NONBLOCK: a FIFO must not hold us; what it is gets judged by its reader below. */
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return error_set(err, errno, "%s: cannot open: %m", path);
    if (fstat(fd, &st) < 0) {
        r = error_set(err, errno, "%s: cannot open: %m", path);
        close(fd);
        return r;
    }
    if (S_ISREG(st.st_mode))
        n_head = pread(fd, head, sizeof(head), 0);
    close(fd);

    if (!S_ISDIR(st.st_mode) && !S_ISREG(st.st_mode))
        return error_set(err, EINVAL, "%s: neither a file nor a folder", path);
    if (S_ISDIR(st.st_mode))
        r = foreign_tokenizer_from_folder(&a.foreign, path, err);
    else if (n_head == sizeof(head) && gguf_detect(head, sizeof(head)))
        r = open_gguf(&a.foreign, path, err);
    else if (ends_with(path, ".json") || ends_with(path, ".model"))
        r = open_alone(&a.foreign, path, ends_with(path, ".json"), err);
    else
        r = model_file_open(&a.file, path, err);
    if (r < 0)
        return r;
    r = a.foreign ? tokenizer_new(&a.t, &a.foreign->table, err)
                  : tokenizer_from_model_file(&a.t, a.file, err);
    if (r < 0)
        return r;
    *ret = a;
    a = (struct any_tokenizer){0};
    return 0;
}

void any_tokenizer_done(struct any_tokenizer *a)
{
    tokenizer_free(a->t);
    foreign_tokenizer_free(a->foreign);
    model_file_free(a->file);
    *a = (struct any_tokenizer){0};
}
