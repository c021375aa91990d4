/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A token's way out: sampler -> end token? -> decoder (whole characters only) -> stop strings
 * (hold back what could begin one) -> delta. The token that finishes a request is never evaluated:
 * the session then holds everything before it.
 */

#include "engine/generation.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/stop-strings.h"
#include "engine/tokenizer.h"

#define FINISH_ROOM 12 /* what decoder_finish() may write */

struct generation {
    struct session *session; /* outlives the generation */
    const struct model_generation *defaults;
    const struct tokenizer *tokenizer; /* the model's; NULL: ids only */
    struct sampler *sampler;
    struct stop_strings *stops;
    struct decoder decoder;
    char *raw, *text; /* a token's text before and after the stop strings */

    uint32_t max_tokens; /* 0: no limit */
    bool ignore_end, special, logprobs;

    uint32_t start;   /* the session's tokens before the prompt */
    uint32_t *prompt; /* with what had been sampled, of a generation that was resumed */
    size_t n_prompt;
    uint32_t token;          /* the last one sampled */
    const uint32_t *pending; /* into prompt, or &token */
    size_t n_pending;
    uint32_t n_completion;
    enum finish_reason finish;
};

const char *finish_reason_name(enum finish_reason r)
{
    switch (r) {
    case FINISH_NONE:
        return "none";
    case FINISH_STOP:
        return "stop";
    case FINISH_LENGTH:
        return "length";
    case FINISH_CANCELLED:
        return "cancelled";
    case FINISH_ERROR:
        return "error";
    }
    return NULL;
}

static int check_stops(const struct generation_options *o, const struct tokenizer *t,
                       struct error *err)
{
    if (o->n_stop > 0 && !t)
        return error_set(err, EINVAL, "stop: the model has no tokenizer, so there is no text");
    for (size_t i = 0; i < o->n_stop; i++) {
        if (o->stop[i][0] == 0)
            return error_set(err, EINVAL, "stop: string %zu is empty", i + 1);
        /* A match then begins and ends between characters, so no cut goes through one. */
        if (!utf8_valid(o->stop[i], strlen(o->stop[i])))
            return error_set(err, EINVAL, "stop: string %zu is not valid UTF-8", i + 1);
    }
    return 0;
}

static int check_prompt(const struct session *s, uint32_t used, const uint32_t *prompt,
                        size_t n_prompt, uint32_t vocab_size, struct error *err)
{
    uint32_t most = session_n_ctx(s);

    if (n_prompt == 0)
        return error_set(err, EINVAL, "prompt: no tokens");
    for (size_t i = 0; i < n_prompt; i++)
        if (prompt[i] >= vocab_size)
            return error_set(err, EINVAL, "prompt: token %u at %zu: the vocabulary ends at %u",
                             prompt[i], i, vocab_size - 1);
    if (n_prompt > most - used)
        return error_set(err, EMSGSIZE,
                         "prompt: %zu tokens do not fit: the context has %u of %u free", n_prompt,
                         most - used, most);
    return 0;
}

/*
 * All but what depends on where the session is: nothing is pending, it has no mark. more[n_more]
 * follow the prompt in g->prompt.
 */
static int make(struct generation **ret, struct session *s, uint32_t start, const uint32_t *prompt,
                size_t n_prompt, const uint32_t *more, size_t n_more,
                const struct generation_options *options, struct error *err)
{
    CLEANUP(generation_freep) struct generation *g = NULL;
    const struct model *m = engine_model(session_engine(s));
    const struct tokenizer *t = model_tokenizer(m);
    uint32_t vocab_size = model_config(m)->vocab_size;
    size_t raw_room, n_all;
    int r;

    r = check_stops(options, t, err);
    if (r == 0)
        r = check_prompt(s, start, prompt, n_prompt, vocab_size, err);
    if (r < 0)
        return r;
    if (ckd_add(&n_all, n_prompt, n_more))
        goto no_memory;

    g = calloc(1, sizeof(*g));
    if (!g)
        goto no_memory;
    g->session = s;
    g->defaults = model_generation(m);
    g->tokenizer = t;
    g->max_tokens = options->max_tokens;
    g->ignore_end = options->ignore_end;
    g->special = options->special;
    g->logprobs = options->logprobs;
    g->start = start;

    r = sampler_new(&g->sampler, vocab_size, &options->sampler, err);
    if (r < 0)
        return r;
    r = stop_strings_new(&g->stops, options->stop, options->n_stop);
    if (r < 0)
        goto no_memory;

    raw_room = (t ? decoder_room(t) : 0) + FINISH_ROOM;
    g->raw = malloc(raw_room);
    g->text = malloc(raw_room + stop_strings_max_held(g->stops) + 1);
    g->prompt = reallocarray(NULL, n_all, sizeof(*prompt));
    if (!g->raw || !g->text || !g->prompt)
        goto no_memory;
    memcpy(g->prompt, prompt, n_prompt * sizeof(*prompt));
    if (n_more > 0)
        memcpy(g->prompt + n_prompt, more, n_more * sizeof(*more));
    g->n_prompt = n_prompt;

    /* Penalties see the whole conversation: it must not matter which part of it came with this
     * prompt and which was there already. */
    r = sampler_observe(g->sampler, session_tokens(s), g->start);
    if (r == 0)
        r = sampler_observe(g->sampler, prompt, n_prompt);
    if (r < 0)
        goto no_memory;
    *ret = TAKE_PTR(g);
    return 0;

no_memory:
    return error_set(err, ENOMEM, "out of memory");
}

int generation_new(struct generation **ret, struct session *s, const uint32_t *prompt,
                   size_t n_prompt, const struct generation_options *options, struct error *err)
{
    struct generation *g;
    int r = make(&g, s, session_n_tokens(s), prompt, n_prompt, NULL, 0, options, err);

    if (r < 0)
        return r;
    g->pending = g->prompt;
    g->n_pending = n_prompt;
    session_set_mark(s, g->start);
    *ret = g;
    return 0;
}

/* Over: nothing is pending and the session need not remember where it began. */
static void end(struct generation *g, enum finish_reason reason)
{
    g->finish = reason;
    g->pending = NULL;
    g->n_pending = 0;
    session_set_mark(g->session, SESSION_NO_MARK);
}

struct generation *generation_free(struct generation *g)
{
    if (g) {
        if (g->pending && g->finish == FINISH_NONE)
            session_set_mark(g->session, SESSION_NO_MARK);
        sampler_free(g->sampler);
        stop_strings_free(g->stops);
        free(g->raw);
        free(g->text);
        free(g->prompt);
        free(g);
    }
    return NULL;
}

void generation_freep(struct generation **g)
{
    generation_free(*g);
}

const uint32_t *generation_pending(const struct generation *g, size_t *ret_n)
{
    *ret_n = g->n_pending;
    return g->pending;
}

void generation_advance(struct generation *g, size_t n)
{
    assert(n <= g->n_pending);
    g->pending += n;
    g->n_pending -= n;
}

static bool is_end(const struct generation *g, uint32_t id)
{
    for (uint32_t i = 0; i < g->defaults->n_stop_ids; i++)
        if (g->defaults->stop_ids[i] == id)
            return true;
    return g->tokenizer && tokenizer_is_end(g->tokenizer, id);
}

/*
 * What a sampled token does: its text, in g->text, and whether it ends the request. n_before:
 * tokens before it, all that the session has when it was sampled.
 */
static enum finish_reason take(struct generation *g, uint32_t id, uint64_t n_before, size_t *ret_n)
{
    bool ended, full, found;
    size_t n, raw = 0;

    g->token = id;
    g->n_completion++;

    ended = !g->ignore_end && is_end(g, id);
    full = (g->max_tokens > 0 && g->n_completion >= g->max_tokens) ||
           n_before >= session_n_ctx(g->session);

    /* An end token shows only to who asks for special ones, whatever its type. */
    if (g->tokenizer && (!ended || g->special))
        raw = decoder_push(&g->decoder, g->tokenizer, id, g->special, g->raw);
    if (g->tokenizer && (ended || full))
        raw += decoder_finish(&g->decoder, g->raw + raw);
    n = stop_strings_push(g->stops, g->raw, raw, g->text, &found);
    if (!found && (ended || full))
        n += stop_strings_finish(g->stops, g->text + n);
    g->text[n] = 0;
    *ret_n = n;
    return found || ended ? FINISH_STOP : full ? FINISH_LENGTH : FINISH_NONE;
}

int generation_accept(struct generation *g, const float *logits, struct generation_delta *ret)
{
    enum finish_reason finish;
    struct sample sample;
    size_t n;
    int r;

    assert(g->finish == FINISH_NONE && g->n_pending == 0);

    r = sampler_draw(g->sampler, logits, g->logprobs, &sample);
    if (r < 0) {
        end(g, FINISH_ERROR);
        return r;
    }
    finish = take(g, sample.id, session_n_tokens(g->session), &n);
    if (finish != FINISH_NONE) {
        end(g, finish);
    } else {
        g->pending = &g->token;
        g->n_pending = 1;
    }

    ret->text = g->text;
    ret->n = n;
    ret->sample = sample;
    ret->finish = g->finish;
    return 0;
}

/* Words of generation_state */
enum {
    STATE_RANDOM, /* the sampler's four */
    STATE_N_COMPLETION = 4,
    STATE_VERSION, /* of all this */
};
#define STATE_IS 1u

void generation_get_state(const struct generation *g, struct generation_state *ret)
{
    struct sampler_state state;

    sampler_get_state(g->sampler, &state);
    *ret = (struct generation_state){0};
    memcpy(ret->words + STATE_RANDOM, state.random, sizeof(state.random));
    ret->words[STATE_N_COMPLETION] = g->n_completion;
    ret->words[STATE_VERSION] = STATE_IS;
}

/* What was sampled passes through decoder, stop strings and penalties once more. */
static int replay(struct generation *g, const uint32_t *sampled, size_t n_sampled,
                  struct error *err)
{
    uint32_t vocab_size = model_config(engine_model(session_engine(g->session)))->vocab_size;

    for (size_t i = 0; i < n_sampled; i++) {
        enum finish_reason finish;
        size_t n;

        if (sampled[i] >= vocab_size)
            return error_set(err, EINVAL, "resume: token %u at %zu: the vocabulary ends at %u",
                             sampled[i], i, vocab_size - 1);
        finish = take(g, sampled[i], (uint64_t)g->start + g->n_prompt + i, &n);
        if (finish == FINISH_NONE)
            continue;
        if (i + 1 < n_sampled)
            return error_set(err, EINVAL, "resume: the request ended with token %zu of %zu", i + 1,
                             n_sampled);
        g->finish = finish;
    }
    if (sampler_observe(g->sampler, sampled, n_sampled) < 0)
        return error_set(err, ENOMEM, "out of memory");
    return 0;
}

int generation_resume(struct generation **ret, struct session *s, uint32_t start,
                      const uint32_t *prompt, size_t n_prompt, const uint32_t *sampled,
                      size_t n_sampled, const struct generation_options *options,
                      const struct generation_state *state, struct error *err)
{
    CLEANUP(generation_freep) struct generation *g = NULL;
    struct sampler_state random;
    uint32_t n = session_n_tokens(s), held;
    size_t n_all;
    int r;

    if (start > n)
        return error_set(err, EINVAL, "resume: the session has %u tokens, the request began at %u",
                         n, start);
    if (state->words[STATE_VERSION] != STATE_IS || state->words[STATE_N_COMPLETION] != n_sampled)
        return error_set(err, EINVAL, "resume: the state is not one after %zu tokens", n_sampled);
    r = make(&g, s, start, prompt, n_prompt, sampled, n_sampled, options, err);
    if (r == 0)
        r = replay(g, sampled, n_sampled, err);
    if (r < 0)
        return r;
    memcpy(random.random, state->words + STATE_RANDOM, sizeof(random.random));
    if (sampler_set_state(g->sampler, &random) < 0)
        return error_set(err, EINVAL, "resume: the state is not one of a sampler");

    /* All but the last one can have been evaluated; whoever was further has lost the logits. */
    n_all = n_prompt + n_sampled;
    held = (uint32_t)MIN((size_t)(n - start), n_all - 1);
    if (memcmp(session_tokens(s) + start, g->prompt, held * sizeof(*g->prompt)) != 0)
        return error_set(err, EINVAL, "resume: the session's tokens are others");
    if (g->finish != FINISH_NONE && held < n_all - 1)
        return error_set(err, EINVAL, "resume: the session lacks %zu tokens of a finished request",
                         n_all - 1 - held);
    session_rewind(s, start + held);
    if (g->finish == FINISH_NONE) {
        g->pending = g->prompt + held;
        g->n_pending = n_all - held;
        session_set_mark(s, start);
    } else {
        session_set_mark(s, SESSION_NO_MARK);
    }
    *ret = TAKE_PTR(g);
    return 0;
}

void generation_cancel(struct generation *g)
{
    if (g->finish != FINISH_NONE)
        return;
    session_rewind(g->session, g->start);
    end(g, FINISH_CANCELLED);
}

enum finish_reason generation_finish(const struct generation *g)
{
    return g->finish;
}

void generation_usage(const struct generation *g, struct generation_usage *ret)
{
    *ret = (struct generation_usage){
        .prompt_tokens = (uint32_t)g->n_prompt,
        .completion_tokens = g->n_completion,
        .cached_tokens = g->start,
    };
}
