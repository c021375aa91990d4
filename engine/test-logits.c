/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Every variant that this processor can do, bit for bit against plain loops. */

#undef NDEBUG
#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "engine/exp-negative.h"
#include "engine/logits.h"

#define MAX_N 1000
#define MAX_BLOCKS DIV_ROUND_UP(MAX_N, LOGITS_BLOCK)

static uint64_t state = 20240608;

static uint32_t below(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((state >> 33) % n);
}

static float uniform(float low, float high)
{
    return low + (high - low) * (float)below(1 << 24) * 0x1p-24f;
}

static void fill_row(float *x, size_t n)
{
    static const float special[] = {NAN,   -NAN,  INFINITY, -INFINITY, FLT_MAX, -FLT_MAX,     0,
                                    -0.0f, 1e37f, -1e37f,   -700,      -699,    FLT_MIN / 16, 1};
    float width = below(2) ? 30 : 2000;
    uint32_t kind = below(4);

    for (size_t i = 0; i < n; i++) {
        x[i] = uniform(-width, width / 4);
        if (kind == 0 || (kind == 1 && below(20) == 0))
            x[i] = special[below(ARRAY_SIZE(special))];
        if (kind == 2 && below(3) == 0)
            x[i] = below(2) ? NAN : -INFINITY;
    }
}

static float sane(float x)
{
    if (isnan(x))
        return -INFINITY;
    return x == INFINITY ? FLT_MAX : x;
}

static bool same_bits(double a, double b)
{
    return memcmp(&a, &b, sizeof(a)) == 0;
}

static uint64_t ref_weight(const struct logits_scale *s, float x)
{
    double w = exp_negative(((double)sane(x) - s->max) / s->temperature) * s->one;
    uint64_t weight = (uint64_t)w;

    return (double)weight < s->least ? 0 : weight;
}

static void check_maxima(const struct logits_passes *p, const float *x, size_t n, float *maxima)
{
    float all = -INFINITY, guard = 123;

    maxima[DIV_ROUND_UP(n, LOGITS_BLOCK)] = guard;
    for (size_t i = 0; i < n; i++)
        all = MAX(all, sane(x[i]));
    assert(p->find_maxima(x, n, maxima) == all);
    for (size_t i = 0; i < n; i += LOGITS_BLOCK) {
        float max = -INFINITY;

        for (size_t k = i; k < MIN(n, i + LOGITS_BLOCK); k++)
            max = MAX(max, sane(x[k]));
        assert(maxima[i / LOGITS_BLOCK] == max);
        assert(max != 0 || !signbit(maxima[i / LOGITS_BLOCK]));
    }
    assert(maxima[DIV_ROUND_UP(n, LOGITS_BLOCK)] == guard);
}

static void check_weights(const struct logits_passes *p, const float *x, size_t n,
                          const float *maxima, const struct logits_scale *s)
{
    uint64_t weights[MAX_N + 1], sums[MAX_BLOCKS + 1], total = 0, guard = 4711;
    size_t n_blocks = DIV_ROUND_UP(n, LOGITS_BLOCK);

    weights[n] = guard;
    sums[n_blocks] = guard;
    for (size_t i = 0; i < n; i++)
        total += ref_weight(s, x[i]);
    assert(p->weigh(s, x, n, weights) == total);
    for (size_t i = 0; i < n; i++)
        assert(weights[i] == ref_weight(s, x[i]));

    total = p->weigh_blocks(s, x, n, maxima, sums);
    for (size_t b = 0; b < n_blocks; b++) {
        uint64_t sum = 0;

        for (size_t i = b * LOGITS_BLOCK; i < MIN(n, (b + 1) * LOGITS_BLOCK); i++)
            sum += ref_weight(s, x[i]);
        assert(sums[b] == (maxima[b] >= s->low ? sum : 0));
        total -= sums[b];
    }
    assert(total == 0);
    assert(weights[n] == guard && sums[n_blocks] == guard);
}

static void check_sums(const struct logits_passes *p, const float *x, size_t n, float max)
{
    double e[LOGITS_BLOCK] = {0}, ed[LOGITS_BLOCK] = {0};
    struct logits_sums sums = p->sum(x, n, max);

    for (size_t i = 0; i < n; i++) {
        double d = (double)sane(x[i]) - (double)max;

        if (d > -700) {
            e[i % LOGITS_BLOCK] += exp_negative(d);
            ed[i % LOGITS_BLOCK] += exp_negative(d) * d;
        }
    }
    for (size_t k = 1; k < LOGITS_BLOCK; k++) {
        e[0] += e[k];
        ed[0] += ed[k];
    }
    assert(same_bits(sums.e, e[0]) && same_bits(sums.ed + 0.0, ed[0] + 0.0));
}

static void test_variant(const struct logits_passes *p)
{
    static const size_t sizes[] = {1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, MAX_N};

    for (size_t round = 0; round < 2000; round++) {
        size_t n = sizes[below(ARRAY_SIZE(sizes))], shift = below(3);
        float *row = malloc((n + shift) * sizeof(*row)), *x = row + shift; /* also not aligned */
        float maxima[MAX_BLOCKS + 1], max;
        struct logits_scale s;

        assert(row);
        fill_row(x, n);
        check_maxima(p, x, n, maxima);
        max = maxima[0];
        for (size_t b = 1; b < DIV_ROUND_UP(n, LOGITS_BLOCK); b++)
            max = MAX(max, maxima[b]);
        if (max != -INFINITY) {
            s = (struct logits_scale){
                .max = (double)max,
                .temperature = below(2) ? 1 : (double)uniform(0.01f, 3),
                .one = below(2) ? 0x1p52 : 0x1p45,
                .low = below(2) ? -INFINITY : max - uniform(0, 20),
            };
            s.least = below(2) ? 0 : ceil(s.one * (double)uniform(0, below(2) ? 1 : 1e-6f));
            if (below(4) == 0)
                s.least = s.one; /* as many as the largest ones weigh */
            check_weights(p, x, n, maxima, &s);
            check_sums(p, x, n, max);
        }
        free(row);
    }
}

int main(void)
{
    size_t n = 0;

    for (; logits_passes(n); n++)
        test_variant(logits_passes(n));
    printf("%zu variants\n", n);
    assert(n > 0 && logits_passes(n - 1) == &logits_baseline);
    return 0;
}
