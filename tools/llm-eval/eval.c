/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-eval/eval.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "tools/llm-eval/llm-eval.h"

int read_file(const char *path, char **ret, size_t *ret_n, struct error *err)
{
    CLEANUP(fclosep) FILE *opened = NULL;
    FILE *f = stdin;
    int r;

    if (strcmp(path, "-") != 0) {
        f = opened = fopen(path, "re");
        if (!f)
            return error_set(err, errno, "%s: cannot open: %s", path, strerror(errno));
    }
    r = read_all(f, ret, ret_n);
    if (r < 0)
        return error_set(err, -r, "%s: cannot read: %s", opened ? path : "stdin", strerror(-r));
    return 0;
}

int eval_session(struct session **ret, struct engine *e, uint32_t n_ctx, struct error *err)
{
    int r = session_new(ret, e, n_ctx, NULL);

    if (r == -EINVAL)
        return error_set(err, EINVAL, "a context of %u tokens is more than the model was made for",
                         n_ctx);
    if (r < 0)
        return error_set(err, -r, "cannot make a session: %s", strerror(-r));
    return 0;
}

static int explain(int r, const struct session *s, struct error *err)
{
    switch (-r) {
    case EMSGSIZE:
        return error_set(err, EMSGSIZE, "the context of %u tokens is full", session_n_ctx(s));
    case ENOBUFS:
        return error_set(err, ENOBUFS, "no memory left for K and V after %u tokens",
                         session_n_tokens(s));
    default:
        return error_set(err, -r, "evaluation failed: %s", strerror(-r));
    }
}

int eval_step(struct session *s, const uint32_t *ids, size_t n, const float **ret_logits,
              struct error *err)
{
    struct step_item item = {
        .session = s, .tokens = ids, .n_tokens = (uint32_t)n, .wanted = LOGITS_ALL};
    int r = engine_step(session_engine(s), &item, 1);

    if (r == 0)
        r = item.ret_error;
    if (r < 0)
        return explain(r, s, err);
    *ret_logits = item.ret_logits;
    return 0;
}

int eval_skip(struct session *s, const uint32_t *ids, size_t n, struct error *err)
{
    int r = session_eval(s, ids, n, NULL);

    return r < 0 ? explain(r, s, err) : 0;
}
