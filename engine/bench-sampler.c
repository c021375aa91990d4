/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Microseconds that a token's sampling takes with Gemma 3n's vocabulary, by what is asked for; rows
 * of logits take turns, so that they come from memory as after a step of many sessions. A figure is
 * the best of several runs, since other programs only ever make a run slower. Not a test.
 */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/checked.h"
#include "base/clock.h"
#include "engine/sampler.h"

#define VOCABULARY 262144
#define N_ROWS 16

/* Roughly normal, as logits are: with many near the largest one. */
static float random_logit(uint64_t *seed)
{
    double sum = 0;

    for (int i = 0; i < 12; i++) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        sum += (double)(*seed >> 33) * 0x1p-31;
    }
    return (float)(30 * tanh((sum - 6) * 4 / 30));
}

int main(void)
{
    static const struct {
        const char *name;
        struct sampler_options options;
    } cases[] = {
        {"greedy", {0}},
        {"greedy, penalties", {.repetition_penalty = 1.1f, .penalty_last_n = 64}},
        {"top-k 64, top-p 0.95", {.temperature = 1, .top_k = 64, .top_p = 0.95f}},
        {"the same, penalties",
         {.temperature = 1, .top_k = 64, .top_p = 0.95f, .presence_penalty = 0.5f}},
        {"min-p 0.05", {.temperature = 1, .min_p = 0.05f}},
        {"top-p 0.95", {.temperature = 1, .top_p = 0.95f}},
        {"temperature alone", {.temperature = 1}},
        {"greedy, 5 logprobs", {.n_logprobs = 5}},
        {"top-k 64, top-p 0.95, 5 logprobs",
         {.temperature = 1, .top_k = 64, .top_p = 0.95f, .n_logprobs = 5}},
    };
    float *logits = malloc((size_t)N_ROWS * VOCABULARY * sizeof(*logits));
    uint64_t seed = 1;

    if (!logits)
        return 1;
    for (size_t i = 0; i < (size_t)N_ROWS * VOCABULARY; i++)
        logits[i] = random_logit(&seed);
    for (size_t c = 0; c < ARRAY_SIZE(cases); c++) {
        struct sampler *s = NULL;
        struct sample sample;
        struct error err;
        double best = 1e9;
        uint64_t ids = 0;

        if (sampler_new(&s, VOCABULARY, &cases[c].options, &err) < 0)
            return 1;
        for (int run = 0; run < 8; run++) {
            double start = now_seconds();

            for (size_t i = 0; i < N_ROWS; i++) {
                if (sampler_draw(s, logits + i * VOCABULARY, false, &sample) < 0)
                    return 1;
                ids = ids * 31 + sample.id;
            }
            best = MIN(best, (now_seconds() - start) / N_ROWS);
        }
        printf("%-34s %8.1f us a token   (drawn: %016llx)\n", cases[c].name, best * 1e6,
               (unsigned long long)ids);
        sampler_free(s);
    }
    free(logits);
    return 0;
}
