/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * generation: one request inside a session, as a state machine that whoever schedules drives:
 *
 *     generation_new(&g, session, prompt ids, options)
 *     while (!finished) {
 *         tokens = generation_pending(g, &n);     what to evaluate next; may be split in chunks
 *         engine_step(... the first k of them, wanted = LAST when k == n ...);
 *         generation_advance(g, k);               k were evaluated
 *         if (k == n)
 *             generation_accept(g, logits, &delta);   samples; delta.text is ready to be sent
 *     }
 *
 * Engine thread. It changes the session only through the steps its driver takes, except
 * generation_cancel(), which rolls the session back to before the prompt. The last token (an end
 * token, the one that completed a stop string, the max_tokens-th) is sampled but never evaluated:
 * when a request has finished, the session ends before it.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "engine/sampler.h"

struct generation;
struct session;

enum finish_reason {
    FINISH_NONE,   /* goes on */
    FINISH_STOP,   /* an end token or a stop string */
    FINISH_LENGTH, /* max_tokens, or the context is full */
    FINISH_CANCELLED,
    FINISH_ERROR,
};

/* "none", "stop", "length", "cancelled", "error" */
const char *finish_reason_name(enum finish_reason r);

struct generation_options {
    struct sampler_options sampler;
    uint32_t max_tokens;             /* 0: until the context is full */
    const char *const *stop;         /* [n_stop] strings, not empty, valid UTF-8, copied */
    size_t n_stop;
    bool ignore_end;                 /* goes on past end tokens: benchmarks */
    bool special;                    /* special pieces appear in the text, the end token too */
    bool logprobs;                   /* fill delta.sample's logprob fields */
};

struct generation_delta {
    const char *text; /* whole characters, may be empty, NUL-terminated besides n; until next call */
    size_t n;
    struct sample sample; /* the token; meaningless when finish came without one */
    enum finish_reason finish;
};

/*
 * prompt [n_prompt >= 1] is copied; s must outlive the generation. Penalties look back over the
 * session's earlier tokens as well.
 * 0, -EINVAL, -EMSGSIZE: prompt alone passes n_ctx, -ENOMEM
 */
int generation_new(struct generation **ret, struct session *s, const uint32_t *prompt,
                   size_t n_prompt, const struct generation_options *options, struct error *err);

/* What prompt, options and sampled tokens do not tell of a generation between two tokens. */
struct generation_state {
    uint64_t words[8];
};
void generation_get_state(const struct generation *g, struct generation_state *ret);

/*
 * A generation that another process began, from where it was: `start` tokens were in the session
 * before the prompt; sampled[n_sampled] have been accepted, their deltas given out, and `state` was
 * taken after the last of them (or before the first). The session holds some of these tokens, all
 * from `start` on; one that got further goes back to before the last one sampled. What comes is
 * what the other process would have given. If the tokens sampled ended the request, then
 * generation_finish() tells.
 * As generation_new(); -EINVAL as well: the session's tokens or the state are not of this request
 */
int generation_resume(struct generation **ret, struct session *s, uint32_t start,
                      const uint32_t *prompt, size_t n_prompt, const uint32_t *sampled,
                      size_t n_sampled, const struct generation_options *options,
                      const struct generation_state *state, struct error *err);

struct generation *generation_free(struct generation *g);
void generation_freep(struct generation **g);

const uint32_t *generation_pending(const struct generation *g, size_t *ret_n);
void generation_advance(struct generation *g, size_t n);

/*
 * Samples from the logits that follow the last pending token. The new token becomes pending unless
 * the request finished. Text that could be the start of a stop string is held back.
 * 0, -ENOMEM, -EDOM (no finite logit): the generation is then finished with FINISH_ERROR
 */
int generation_accept(struct generation *g, const float *logits, struct generation_delta *ret);

/* Ends it now, and rewinds the session to before the prompt. Nothing if it has finished. */
void generation_cancel(struct generation *g);

enum finish_reason generation_finish(const struct generation *g);

struct generation_usage {
    uint32_t prompt_tokens, completion_tokens;
    uint32_t cached_tokens; /* of the session, before the prompt */
};
void generation_usage(const struct generation *g, struct generation_usage *ret);
