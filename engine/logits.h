/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Passes over a whole row of logits, which the sampler makes for every token: vectorised, hence one
 * variant for each kind of processor that matters, with the same bits from all of them. Sums of
 * integers do not depend on their order; those of doubles go in LOGITS_BLOCK lanes, by the place in
 * the row, and then in one order.
 *
 * NaN counts as -infinity, +infinity as the largest finite number.
 */

#include <stddef.h>
#include <stdint.h>

#define LOGITS_BLOCK 64 /* logits with one maximum, one sum of weights */

/* The weight of a logit: floor(exp((x - max) / temperature) * one), or 0 if that is below least. */
struct logits_scale {
    double max; /* of the row: no x is larger */
    double temperature;
    double one; /* a power of two, at most 2^52 */
    double least;
    float low; /* no smaller logit has a weight other than 0; may be -INFINITY */
};

/* For log-probabilities; d = x - max */
struct logits_sums {
    double e;  /* sum of exp(d) */
    double ed; /* sum of exp(d) * d */
};

struct logits_passes {
    /* Maxima of the blocks of x [n] into ret [DIV_ROUND_UP(n, LOGITS_BLOCK)]; returns the largest.
     */
    float (*find_maxima)(const float *x, size_t n, float *ret);

    /* Weights of x [n] into ret [n]; returns their sum. */
    uint64_t (*weigh)(const struct logits_scale *s, const float *x, size_t n, uint64_t *ret);

    /* Sums of the weights of each block of x [n], whose maxima are known; returns the sum of all.
     */
    uint64_t (*weigh_blocks)(const struct logits_scale *s, const float *x, size_t n,
                             const float *maxima, uint64_t *ret_sums);

    struct logits_sums (*sum)(const float *x, size_t n, float max);
};

extern const struct logits_passes logits_baseline;

/* Those that this processor can do, best first; NULL when there are no more. */
const struct logits_passes *logits_passes(size_t i);
