/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-eval/windows.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/model-file.h"
#include "tools/common/engine-args.h"
#include "tools/llm-eval/eval.h"

struct windows {
    const struct sequence *sequence;
    uint32_t bos;         /* or TOKENIZER_NONE */
    size_t n_ctx, stride; /* 2 <= n_ctx, 1 <= stride <= n_ctx - 1 */
    uint32_t *ids;        /* [n_ctx], the window is put here */
    /* Where the next window begins, how many tokens the ones before had. */
    size_t next, covered;
    bool done;
};

int input_args_take(struct input_args *a, int option, const char *value, struct error *err)
{
    switch (option) {
    case INPUT_ARG_CONTEXT:
        return parse_number("--context", value, 2, MODEL_MAX_CONTEXT, &a->context, err);
    case INPUT_ARG_STRIDE:
        return parse_number("--stride", value, 1, MODEL_MAX_CONTEXT, &a->stride, err);
    case INPUT_ARG_TEXT:
        a->text = value;
        return 0;
    default:
        a->tokens = value;
        return 0;
    }
}

/* The whole text as one sequence. */
static int read_text(struct input *in, const struct model *m, const char *path, struct error *err)
{
    const struct tokenizer *t = model_tokenizer(m);
    CLEANUP(freep) char *text = NULL;
    struct token_array ids = {NULL, 0, 0};
    size_t n;
    int r;

    if (!t)
        return error_set(err, ENODATA, "%s: has no tokenizer: give ids with --tokens",
                         model_file_path(model_get_file(m)));
    r = read_file(path, &text, &n, err);
    if (r < 0)
        return r;
    r = tokenizer_encode(t, text, n, &(struct encode_options){0}, &ids);
    if (r < 0)
        return error_set(err, -r, "%s: %s", path, strerror(-r));
    in->file.ids = ids.data;
    if (ids.n == 0)
        return error_set(err, EINVAL, "%s: no text", path);
    in->file.sequences = calloc(1, sizeof(*in->file.sequences));
    if (!in->file.sequences)
        return error_set(err, ENOMEM, "out of memory");
    in->file.sequences[0] = (struct sequence){ids.data, ids.n};
    in->file.n = 1;
    if (tokenizer_table(t)->add_bos)
        in->bos = tokenizer_table(t)->bos;
    return 0;
}

int input_read(struct input *ret, const struct model *m, const struct input_args *a,
               struct error *err)
{
    CLEANUP(input_done) struct input in = {.bos = TOKENIZER_NONE};
    int r;

    if (a->text)
        r = read_text(&in, m, a->text, err);
    else
        r = token_file_read(&in.file, a->tokens, model_config(m)->vocab_size, SIZE_MAX, err);
    if (r < 0)
        return r;
    *ret = in;
    in.file = (struct token_file){NULL, NULL, 0};
    return 0;
}

void input_done(struct input *in)
{
    token_file_done(&in->file);
}

int choose_windows(const struct model *m, bool overlap, struct input_args *a, struct error *err)
{
    uint32_t most = model_config(m)->context_max;

    if (a->context == 0)
        a->context = MIN(most, (uint32_t)DEFAULT_CONTEXT);
    if (a->context > most)
        return error_set(err, EINVAL, "a context of %u is more than the %u of %s", a->context, most,
                         model_file_path(model_get_file(m)));
    if (a->context < 2)
        return error_set(err, EINVAL, "%s: a context of one token predicts nothing",
                         model_file_path(model_get_file(m)));
    if (a->stride == 0)
        a->stride = overlap ? a->context / 2 : a->context - 1;
    if (a->stride >= a->context)
        return error_set(err, EINVAL, "a stride of %u must be less than the context, %u", a->stride,
                         a->context);
    return 0;
}

/* False when there is none any more. */
static bool windows_next(struct windows *w, struct window *ret)
{
    size_t bos = w->bos != TOKENIZER_NONE, at = w->next, n;

    if (w->done)
        return false;
    n = MIN(w->n_ctx - bos, w->sequence->n - at);
    if (bos)
        w->ids[0] = w->bos;
    memcpy(w->ids + bos, w->sequence->ids + at, n * sizeof(*w->ids));

    *ret = (struct window){
        .ids = w->ids,
        .n = n + bos,
        .first_row = at > 0 ? w->covered - at - 1 + bos : 0,
        .last = at + n == w->sequence->n,
    };
    w->covered = at + n;
    w->next += w->stride;
    w->done = ret->last;
    return true;
}

int windows_each(const struct input *in, const struct input_args *a,
                 int (*f)(void *userdata, const struct window *w, struct error *err),
                 void *userdata, struct error *err)
{
    CLEANUP(freep) uint32_t *ids = calloc(a->context, sizeof(*ids));
    int r = ids ? 0 : error_set(err, ENOMEM, "out of memory");

    for (size_t i = 0; r >= 0 && i < in->file.n; i++) {
        struct windows windows = {.sequence = &in->file.sequences[i],
                                  .bos = in->bos,
                                  .n_ctx = a->context,
                                  .stride = a->stride,
                                  .ids = ids};
        struct window w;

        while (r >= 0 && windows_next(&windows, &w))
            r = f(userdata, &w, err);
    }
    return r < 0 ? r : 0;
}
