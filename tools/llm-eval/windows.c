/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-eval/windows.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/model-file.h"
#include "tools/llm-eval/eval.h"

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

int input_read(struct input *ret, const struct model *m, const char *text, const char *tokens,
               struct error *err)
{
    CLEANUP(input_done) struct input in = {.bos = TOKENIZER_NONE};
    int r;

    if (text)
        r = read_text(&in, m, text, err);
    else
        r = token_file_read(&in.file, tokens, model_config(m)->vocab_size, SIZE_MAX, err);
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

int choose_windows(const struct model *m, bool overlap, uint32_t *context, uint32_t *stride,
                   struct error *err)
{
    uint32_t most = model_config(m)->context_max;

    if (*context == 0)
        *context = MIN(most, (uint32_t)DEFAULT_CONTEXT);
    if (*context > most)
        return error_set(err, EINVAL, "a context of %u is more than the %u of %s", *context, most,
                         model_file_path(model_get_file(m)));
    if (*context < 2)
        return error_set(err, EINVAL, "%s: a context of one token predicts nothing",
                         model_file_path(model_get_file(m)));
    if (*stride == 0)
        *stride = overlap ? *context / 2 : *context - 1;
    if (*stride >= *context)
        return error_set(err, EINVAL, "a stride of %u must be less than the context, %u", *stride,
                         *context);
    return 0;
}

bool windows_next(struct windows *w, struct window *ret)
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
