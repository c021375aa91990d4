/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * sampler: picks the next token from one row of logits. Order, as Hugging Face: (softcap is in the
 * model) -> bias -> penalties -> temperature -> top-k -> top-p -> min-p -> draw.
 * One per request; engine thread. Deterministic: same options, same logits, same seed, same tokens,
 * on every machine (its own generator and exponential, probabilities summed as integers).
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct sampler;

struct logit_bias {
    uint32_t id;
    float bias; /* added to the logit; -INFINITY bans the token */
};

#define SAMPLER_MAX_LOGPROBS 64

/* A zeroed struct is greedy decoding with everything else off. */
struct sampler_options {
    float temperature;        /* 0: greedy; else >= 0.01 .. 100 */
    uint32_t top_k;           /* 0: off */
    float top_p;              /* 0 or 1: off; smallest set reaching p, at least one */
    float min_p;              /* 0: off; drops tokens below min_p * the largest probability */
    float repetition_penalty; /* 0 or 1: off; logit > 0 divided, else multiplied */
    float presence_penalty;   /* subtracted once from every token seen */
    float frequency_penalty;  /* subtracted once per occurrence */
    uint32_t penalty_last_n;  /* tokens looked back, prompt included; 0: all */
    uint64_t seed;
    const struct logit_bias *bias; /* [n_bias], copied */
    size_t n_bias;
    uint32_t n_logprobs; /* alternatives reported with each token */
};

struct token_logprob {
    uint32_t id;
    float logprob;
};

struct sample {
    uint32_t id;
    float logprob; /* natural log of the token's probability under the model: before bias,
                      penalties, temperature and cuts */
    float entropy; /* of that distribution, nats */
    uint32_t n_top;
    struct token_logprob top[SAMPLER_MAX_LOGPROBS]; /* most probable first */
};

/*
 * vocab_size: logits per row; all ids must be below it.
 * 0, -EINVAL: err names the option and its bounds, -ENOMEM
 */
int sampler_new(struct sampler **ret, uint32_t vocab_size, const struct sampler_options *options,
                struct error *err);
struct sampler *sampler_free(struct sampler *s);
void sampler_freep(struct sampler **s);

/* Tells it a token of the prompt or an accepted one, for the penalties. 0, -ENOMEM */
int sampler_observe(struct sampler *s, const uint32_t *ids, size_t n);

/*
 * Draws from logits [vocab_size] (not changed; NaN counts as -infinity) and observes the token.
 * logprob, entropy and top are filled when n_logprobs > 0 or want_logprob; else logprob is NaN.
 * 0, -ENOMEM, -EDOM: no token has a finite logit
 */
int sampler_draw(struct sampler *s, const float *logits, bool want_logprob, struct sample *ret);

/* The generator: all that options and observed tokens do not tell. 0; -EINVAL: no such state */
struct sampler_state {
    uint64_t random[4];
};
void sampler_get_state(const struct sampler *s, struct sampler_state *ret);
int sampler_set_state(struct sampler *s, const struct sampler_state *state);
