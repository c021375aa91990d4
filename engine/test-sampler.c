/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Against a reference that sorts everything and adds in double. */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/exp-negative.h"
#include "engine/sampler.h"

/* Every allocation of the sampler comes through here (see meson.build). */
static size_t n_allocations, fail_at = SIZE_MAX;

void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__real_reallocarray(void *p, size_t n, size_t size);
void *__wrap_reallocarray(void *p, size_t n, size_t size);

void *__wrap_calloc(size_t n, size_t size)
{
    return n_allocations++ == fail_at ? NULL : __real_calloc(n, size);
}

void *__wrap_reallocarray(void *p, size_t n, size_t size)
{
    return n_allocations++ == fail_at ? NULL : __real_reallocarray(p, n, size);
}

/* The test's own randomness; also the seeding of the generator under test. */
static uint64_t splitmix64(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

struct xoshiro {
    uint64_t s[4];
};

static uint64_t xoshiro_next(struct xoshiro *x)
{
    uint64_t *s = x->s, m = s[1] * 5, t = s[1] << 17, r = ((m << 7) | (m >> 57)) * 9;

    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = (s[3] << 45) | (s[3] >> 19);
    return r;
}

static struct xoshiro xoshiro_seed(uint64_t seed)
{
    struct xoshiro x;

    for (size_t i = 0; i < 4; i++)
        x.s[i] = splitmix64(&seed);
    return x;
}

static uint64_t test_state = 20240607;

static uint32_t below(uint32_t n)
{
    return (uint32_t)(splitmix64(&test_state) % n);
}

static float uniform(float low, float high)
{
    return low + (high - low) * (float)(splitmix64(&test_state) >> 40) * 0x1p-24f;
}

static float normal(float deviation)
{
    double u = ((double)(splitmix64(&test_state) >> 12) + 0.5) * 0x1p-52;
    double v = ((double)(splitmix64(&test_state) >> 12) + 0.5) * 0x1p-52;

    return (float)((double)deviation * sqrt(-2 * log(u)) * cos(2 * M_PI * v));
}

/* ---- the reference ---- */

struct ranked {
    float x;
    uint32_t id;
    double p;
};

static int by_rank(const void *pa, const void *pb)
{
    const struct ranked *a = pa, *b = pb;

    if (a->x != b->x)
        return a->x < b->x ? 1 : -1;
    return a->id < b->id ? -1 : 1;
}

static float clean(float x)
{
    if (isnan(x))
        return -INFINITY;
    return x == INFINITY ? FLT_MAX : x;
}

/* Sorted by rank; x is clean. */
static struct ranked *rank_all(const float *x, uint32_t n)
{
    struct ranked *r = malloc(n * sizeof(*r));

    assert(r);
    for (uint32_t i = 0; i < n; i++)
        r[i] = (struct ranked){.x = x[i], .id = i};
    qsort(r, n, sizeof(*r), by_rank);
    return r;
}

/*
 * Probabilities p [n] after everything, by id. Returns how far the nearest decision (top-p, min-p)
 * was from going the other way, as a share of the probability; -1 when no logit is finite.
 */
static double ref_distribution(const struct sampler_options *o, const float *logits, uint32_t n,
                               const uint32_t *history, size_t n_history, double *p)
{
    float *x = calloc(n, sizeof(*x));
    double sum = 0, run = 0, margin = 1;
    uint32_t kept = n;
    struct ranked *r;
    size_t first;

    assert(x);
    for (uint32_t i = 0; i < n; i++)
        x[i] = clean(logits[i]);
    for (size_t i = 0; i < o->n_bias; i++)
        x[o->bias[i].id] = clean(x[o->bias[i].id] + o->bias[i].bias);

    first =
        o->penalty_last_n > 0 && n_history > o->penalty_last_n ? n_history - o->penalty_last_n : 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t seen = 0;
        double v = (double)x[i];

        for (size_t k = first; k < n_history; k++)
            seen += history[k] == i;
        if (!seen)
            continue;
        if (o->repetition_penalty != 0 && v > 0)
            v /= (double)o->repetition_penalty;
        else if (o->repetition_penalty != 0)
            v *= (double)o->repetition_penalty;
        x[i] = clean((float)(v - ((double)o->presence_penalty +
                                  (double)o->frequency_penalty * (double)seen)));
    }

    r = rank_all(x, n);
    if (o->temperature == 0) {
        for (uint32_t i = 0; i < n; i++)
            r[i].p = i == 0;
    } else {
        if (o->top_k > 0)
            kept = MIN(kept, o->top_k);
        for (uint32_t i = 0; i < kept; i++) {
            r[i].p = exp(((double)r[i].x - (double)r[0].x) / (double)o->temperature);
            sum += r[i].p;
        }
        if (o->top_p > 0 && o->top_p < 1) {
            uint32_t i = 0;

            while (i < kept && run < (double)o->top_p * sum) {
                run += r[i++].p;
                margin = MIN(margin, fabs(run / sum - (double)o->top_p));
            }
            kept = i;
        }
        for (uint32_t i = 0; i < n; i++) {
            if (i >= kept)
                r[i].p = 0;
            else if (o->min_p > 0) {
                if (r[i].x != r[0].x) /* those are never below */
                    margin = MIN(margin, fabs(r[i].p - (double)o->min_p));
                if (r[i].p < (double)o->min_p)
                    r[i].p = 0;
            }
        }
    }
    sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += r[i].p;
    for (uint32_t i = 0; i < n; i++)
        p[r[i].id] = r[i].p / sum;
    if (r[0].x == -INFINITY)
        margin = -1;
    free(r);
    free(x);
    return margin;
}

static uint32_t ref_draw(const double *p, uint32_t n, uint64_t random, double *margin)
{
    double u = (double)random * 0x1p-64, run = 0;
    uint32_t last = 0;

    for (uint32_t i = 0; i < n; i++) {
        if (p[i] == 0)
            continue;
        last = i;
        run += p[i];
        *margin = MIN(*margin, fabs(u - run));
        if (u < run)
            break;
    }
    return last;
}

/* ---- rows ---- */

static void fill_row(float *x, uint32_t n)
{
    uint32_t kind = below(12);
    float deviation = uniform(0.1f, 8);

    for (uint32_t i = 0; i < n; i++)
        x[i] = normal(deviation);
    switch (kind) {
    case 0: /* all equal */
        for (uint32_t i = 0; i < n; i++)
            x[i] = deviation;
        break;
    case 1: /* one only */
        for (uint32_t i = 0; i < n; i++)
            x[i] = -INFINITY;
        x[below(n)] = deviation - 4;
        break;
    case 2: /* NaN here and there */
        for (uint32_t i = 0; i < n; i++)
            if (below(3) == 0)
                x[i] = below(2) ? NAN : -NAN;
        x[below(n)] = 0;
        break;
    case 3: /* huge */
        for (uint32_t i = 0; i < n; i++)
            x[i] *= 1e37f;
        break;
    case 4: /* infinities of both kinds */
        for (uint32_t i = 0; i < n; i++)
            if (below(4) == 0)
                x[i] = below(2) ? INFINITY : -INFINITY;
        x[below(n)] = FLT_MAX;
        break;
    case 5: /* many ties, zeros of both signs among them */
        for (uint32_t i = 0; i < n; i++)
            x[i] = (float)below(3) * (below(2) ? 1.0f : -1.0f);
        break;
    case 6: /* ascending: the worst case of a selection that keeps the best so far */
        for (uint32_t i = 0; i < n; i++)
            x[i] = (float)i * 0.01f;
        break;
    case 7: /* below zero, tiny differences */
        for (uint32_t i = 0; i < n; i++)
            x[i] = -20 + (float)below(8) * FLT_EPSILON * 16;
        break;
    }
}

static const uint32_t sizes[] = {1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 257, 1000};

static void fill_options(struct sampler_options *o, struct logit_bias *bias, uint32_t n)
{
    *o = (struct sampler_options){.seed = splitmix64(&test_state), .bias = bias};

    if (below(5) > 0)
        o->temperature = below(4) ? uniform(0.3f, 3) : below(2) ? 0.01f : 100;
    if (below(2))
        o->top_k = 1 + below(below(2) ? n + 2 : 8);
    if (below(2))
        o->top_p = below(8) ? uniform(0.001f, 1) : 1;
    if (below(3) == 0)
        o->min_p = below(8) ? uniform(0, 0.5f) : 1;
    if (below(3) == 0)
        o->repetition_penalty = uniform(0.5f, 2);
    if (below(3) == 0)
        o->presence_penalty = uniform(-2, 2);
    if (below(3) == 0)
        o->frequency_penalty = uniform(-2, 2);
    if (below(2))
        o->penalty_last_n = 1 + below(20);
    if (below(3) == 0)
        for (o->n_bias = below(5); o->n_bias > 0 && below(9); o->n_bias--)
            ;
    for (size_t i = 0; i < o->n_bias; i++)
        bias[i] = (struct logit_bias){below(n), below(4) ? uniform(-9, 9) : -INFINITY};
}

/* The float a is the double b, but for its rounding. */
static bool is_close(float a, double b)
{
    return a == (float)b || fabs((double)a - b) <= 1e-7 * fabs(b) + 1e-12;
}

static void check_logprobs(const struct sample *got, const float *logits, uint32_t n,
                           uint32_t n_logprobs)
{
    float *x = calloc(n, sizeof(*x));
    double sum = 0, entropy = 0;
    struct ranked *r;
    uint32_t finite = 0;

    assert(x);
    for (uint32_t i = 0; i < n; i++) {
        x[i] = clean(logits[i]);
        finite += x[i] != -INFINITY;
    }
    r = rank_all(x, n);
    for (uint32_t i = 0; i < n; i++)
        sum += r[i].p = exp((double)r[i].x - (double)r[0].x);
    for (uint32_t i = 0; i < n; i++)
        if (r[i].p > 0)
            entropy -= r[i].p / sum * log(r[i].p / sum);

    assert(is_close(got->logprob, (double)x[got->id] - (double)r[0].x - log(sum)));
    assert(is_close(got->entropy, entropy));
    assert(got->n_top == MIN(n_logprobs, finite));
    for (uint32_t i = 0; i < got->n_top; i++) {
        assert(got->top[i].id == r[i].id);
        assert(is_close(got->top[i].logprob, (double)r[i].x - (double)r[0].x - log(sum)));
    }
    free(r);
    free(x);
}

static void test_against_reference(void)
{
    size_t n_compared = 0, n_unclear = 0, n_empty = 0;

    for (size_t round = 0; round < 6000; round++) {
        CLEANUP(sampler_freep) struct sampler *s = NULL;
        uint32_t n = sizes[below(ARRAY_SIZE(sizes))], history[64];
        size_t n_history = below(24);
        struct logit_bias bias[4];
        struct sampler_options o;
        struct xoshiro random;
        struct error err;
        float *x = calloc(n, sizeof(*x)), *before = calloc(n, sizeof(*x));
        double *p = malloc(n * sizeof(*p));

        assert(x && before && p);
        fill_options(&o, bias, n);
        o.n_logprobs = below(3) ? 0 : below(SAMPLER_MAX_LOGPROBS + 1);
        assert(sampler_new(&s, n, &o, &err) == 0);
        random = xoshiro_seed(o.seed);

        /* an id outside the vocabulary takes its place in the window and does nothing else */
        for (size_t i = 0; i < n_history; i++)
            history[i] = below(8) ? below(n) : n + below(3);
        assert(sampler_observe(s, history, n_history / 2) == 0);
        assert(sampler_observe(s, history + n_history / 2, n_history - n_history / 2) == 0);

        for (size_t turn = 0; turn < 12; turn++) {
            bool want = below(4) == 0;
            struct sample got;
            double margin;
            uint32_t id;
            int r;

            fill_row(x, n);
            memcpy(before, x, n * sizeof(*x));
            margin = ref_distribution(&o, x, n, history, n_history, p);
            r = sampler_draw(s, x, want, &got);
            assert(memcmp(before, x, n * sizeof(*x)) == 0);
            if (r == -EDOM) { /* bias may have banned all that was finite; nothing was drawn */
                assert(margin == -1);
                n_empty++;
                continue;
            }
            assert(r == 0 && margin >= 0);
            assert(got.id < n);
            id = ref_draw(p, n, o.temperature == 0 ? 0 : xoshiro_next(&random), &margin);
            n_compared++;
            if (o.temperature != 0 && margin < 1e-10)
                n_unclear++;
            else
                assert(got.id == id);
            if (want || o.n_logprobs > 0)
                check_logprobs(&got, x, n, o.n_logprobs);
            else
                assert(isnan(got.logprob) && got.n_top == 0);
            history[n_history++] = got.id;
        }
        free(x);
        free(before);
        free(p);
    }
    printf("%zu draws compared, %zu too close to call, %zu of nothing\n", n_compared, n_unclear,
           n_empty);
    assert(n_empty > 10);
    assert(n_compared > 60000);
    assert(n_unclear < n_compared / 50);
}

/* Where the reference's rounding could go either way, the answer is still defined. */
static void test_exact_borders(void)
{
    for (uint32_t n = 2; n <= 2000; n += n < 20 ? 2 : 222) {
        CLEANUP(sampler_freep) struct sampler *s = NULL;
        struct sampler_options o = {.temperature = 1, .top_p = 0.5f, .seed = n};
        float *x = calloc(n, sizeof(*x));
        bool *drawn = calloc(n, sizeof(*drawn));
        struct error err;
        struct sample got;

        assert(x && drawn);
        assert(sampler_new(&s, n, &o, &err) == 0);
        for (uint32_t i = 0; i < 20 * n; i++) {
            assert(sampler_draw(s, x, false, &got) == 0);
            assert(got.id < n / 2); /* half of n equal ones, the lower ids */
            drawn[got.id] = true;
        }
        assert(drawn[0] && drawn[n / 2 - 1]);
        free(x);
        free(drawn);
    }
}

static void test_exp(void)
{
    assert(exp_negative(0) == 1 && exp_negative(-0.0) == 1);
    assert(exp_negative((double)-INFINITY) == 0 && exp_negative((double)NAN) == 0);
    for (size_t i = 0; i < 200000; i++) {
        double d = -(double)uniform(0, 1) * pow(10, (double)uniform(-9, 2.84f)), e = exp(d);

        assert(d < -700 || fabs(exp_negative(d) - e) <= 0x1p-50 * e);
    }
}

/* A p too small to be a share of anything still keeps the first. */
static void test_tiny_top_p(void)
{
    static const float x[3] = {1, 2, 2}, p[] = {FLT_MIN, 1e-45f, 1e-15f};

    for (size_t i = 0; i < ARRAY_SIZE(p); i++) {
        CLEANUP(sampler_freep) struct sampler *s = NULL;
        struct sampler_options o = {.temperature = 1, .top_p = p[i]};
        struct error err;
        struct sample got;

        assert(sampler_new(&s, 3, &o, &err) == 0);
        for (size_t k = 0; k < 20; k++)
            assert(sampler_draw(s, x, false, &got) == 0 && got.id == 1);
    }
}

static void test_greedy(void)
{
    CLEANUP(sampler_freep) struct sampler *s = NULL;
    struct sampler_options zero = {0};
    struct error err;
    struct sample got;
    float x[200];

    assert(sampler_new(&s, ARRAY_SIZE(x), &zero, &err) == 0);
    for (size_t i = 0; i < ARRAY_SIZE(x); i++)
        x[i] = -INFINITY;
    assert(sampler_draw(s, x, true, &got) == -EDOM);
    x[3] = NAN;
    assert(sampler_draw(s, x, false, &got) == -EDOM);
    x[12] = -FLT_MAX;
    assert(sampler_draw(s, x, false, &got) == 0 && got.id == 12);
    x[199] = -1e30f;
    assert(sampler_draw(s, x, false, &got) == 0 && got.id == 199);
    x[150] = x[77] = 2;
    assert(sampler_draw(s, x, false, &got) == 0 && got.id == 77);
    x[5] = INFINITY;
    assert(sampler_draw(s, x, false, &got) == 0 && got.id == 5);
    x[4] = FLT_MAX;
    assert(sampler_draw(s, x, false, &got) == 0 && got.id == 4);
}

/* ---- distributions ---- */

/* Upper 1e-6 quantile of chi-square (Wilson and Hilferty), a little above the exact one for few
 * degrees of freedom. */
static double chi_square_limit(double df)
{
    double c = 2 / (9 * df);

    return df * pow(1 - c + 4.753424 * sqrt(c), 3);
}

static void check_chi_square(const struct sampler_options *o, const float *x, uint32_t n)
{
    enum { DRAWS = 100000 };
    CLEANUP(sampler_freep) struct sampler *s = NULL;
    double *p = malloc(n * sizeof(*p)), chi = 0, rest = 0;
    uint32_t *count = calloc(n, sizeof(*count)), rest_count = 0;
    int bins = 0;
    struct error err;
    struct sample got;

    assert(p && count);
    ref_distribution(o, x, n, NULL, 0, p);
    assert(sampler_new(&s, n, o, &err) == 0);
    for (size_t i = 0; i < DRAWS; i++) {
        assert(sampler_draw(s, x, false, &got) == 0);
        count[got.id]++;
    }
    for (uint32_t i = 0; i < n; i++) {
        double expected = p[i] * DRAWS;

        if (p[i] == 0) {
            assert(count[i] == 0);
        } else if (expected < 10) {
            rest += expected;
            rest_count += count[i];
        } else {
            chi += (count[i] - expected) * (count[i] - expected) / expected;
            bins++;
        }
    }
    if (rest >= 10) {
        chi += (rest_count - rest) * (rest_count - rest) / rest;
        bins++;
    }
    printf("T %g k %u p %g min_p %g seed %llu: %d bins, chi-square %.1f\n", (double)o->temperature,
           o->top_k, (double)o->top_p, (double)o->min_p, (unsigned long long)o->seed, bins, chi);
    assert(bins >= 3);
    assert(chi < chi_square_limit(bins - 1));
    free(p);
    free(count);
}

static void test_distributions(void)
{
    static const struct sampler_options cases[] = {
        {.temperature = 1, .seed = 1},
        {.temperature = 0.5f, .seed = 2},
        {.temperature = 2, .seed = 3},
        {.temperature = 1, .top_k = 12, .seed = 4},
        {.temperature = 1, .top_p = 0.9f, .seed = 5},
        {.temperature = 1, .min_p = 0.05f, .seed = 6},
        {.temperature = 1, .top_k = 64, .top_p = 0.95f, .seed = 7},
        {.temperature = 0.7f, .top_k = 40, .min_p = 0.02f, .seed = 8},
        {.temperature = 1.5f, .top_p = 0.8f, .min_p = 0.03f, .seed = 9},
        {.temperature = 1.2f, .top_k = 30, .top_p = 0.9f, .min_p = 0.05f, .seed = 10},
        {.temperature = 1, .seed = 0},
        {.temperature = 1, .seed = UINT64_MAX},
    };
    float x[150];

    for (size_t i = 0; i < ARRAY_SIZE(x); i++)
        x[i] = normal(2);
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++)
        check_chi_square(&cases[i], x, ARRAY_SIZE(x));
}

/* ---- the rest ---- */

/* Frozen: another compiler, processor or release must draw the same. */
static void test_frozen_draws(void)
{
    static const uint32_t expected[][12] = {
        {22002, 99352, 178270, 242399, 259997, 201785, 188551, 222829, 199586, 152922, 178906,
         76201},
        {28657, 103682, 182888, 244383, 259510, 193834, 180304, 219907, 191250, 136520, 160996,
         68260},
        {22002, 99365, 178270, 242396, 259997, 201785, 188551, 222834, 199578, 152909, 178906,
         76198},
        {22000, 99350, 178270, 242399, 259995, 201785, 188551, 222829, 199586, 152920, 178906,
         76198},
        {21992, 99347, 178270, 242399, 259992, 201783, 188551, 222824, 199586, 152920, 178901,
         76198},
    };
    static const struct sampler_options cases[] = {
        {.temperature = 1, .seed = 42},
        {.temperature = 1, .top_k = 64, .top_p = 0.95f, .repetition_penalty = 1.1f, .seed = 42},
        {.temperature = 0.6f, .top_p = 0.9f, .seed = 42},
        {.temperature = 1.3f, .min_p = 0.01f, .seed = 42},
        {.temperature = 2, .top_p = 0.97f, .min_p = 0.001f, .seed = 42},
    };
    enum { N = 262144 };
    float *x = malloc(N * sizeof(*x));

    assert(x);
    for (uint32_t i = 0; i < N; i++) /* exact in float, so the same everywhere */
        x[i] = (float)(i * 2654435761u >> 8) * 0x1p-20f;
    for (size_t c = 0; c < ARRAY_SIZE(cases); c++) {
        CLEANUP(sampler_freep) struct sampler *s = NULL;
        struct error err;
        struct sample got;

        assert(sampler_new(&s, N, &cases[c], &err) == 0);
        for (size_t i = 0; i < 12; i++) {
            assert(sampler_draw(s, x, false, &got) == 0);
            assert(got.id == expected[c][i]);
        }
    }
    free(x);
}

static void expect_refusal(struct sampler_options o, const char *name)
{
    struct sampler *s = NULL;
    struct error err = {""};

    assert(sampler_new(&s, 100, &o, &err) == -EINVAL);
    assert(!s);
    assert(strstr(err.text, name) == err.text);
    assert(sampler_new(&s, 100, &o, NULL) == -EINVAL);
}

static void test_validation(void)
{
    static const struct logit_bias outside = {100, 1}, nan = {1, NAN}, infinite = {1, INFINITY};
    static const struct sampler_options bounds[] = {
        {.temperature = 0.01f, .top_p = 1, .min_p = 1, .repetition_penalty = 0.01f},
        {.temperature = 100, .presence_penalty = -100, .frequency_penalty = 100},
        {.top_k = UINT32_MAX, .penalty_last_n = UINT32_MAX, .presence_penalty = 1},
        {.n_logprobs = SAMPLER_MAX_LOGPROBS, .repetition_penalty = 100},
    };
    static const float wrong[] = {-1, NAN, INFINITY, -INFINITY, 101};
    static const uint32_t ids[] = {1, 2, 3};
    struct sampler *s;
    struct error err;

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        expect_refusal((struct sampler_options){.temperature = wrong[i]}, "temperature is ");
        expect_refusal((struct sampler_options){.top_p = wrong[i]}, "top_p is ");
        expect_refusal((struct sampler_options){.min_p = wrong[i]}, "min_p is ");
        expect_refusal((struct sampler_options){.repetition_penalty = wrong[i]},
                       "repetition_penalty is ");
        if (wrong[i] == -1)
            continue;
        expect_refusal((struct sampler_options){.presence_penalty = wrong[i]},
                       "presence_penalty is ");
        expect_refusal((struct sampler_options){.frequency_penalty = wrong[i]},
                       "frequency_penalty is ");
    }
    expect_refusal((struct sampler_options){.temperature = 0.009f}, "temperature is 0.009: 0 or ");
    expect_refusal((struct sampler_options){.n_logprobs = 65}, "n_logprobs is 65: at most 64");
    expect_refusal((struct sampler_options){.bias = &outside, .n_bias = 1}, "bias for token 100");
    expect_refusal((struct sampler_options){.bias = &nan, .n_bias = 1}, "bias for token 1");
    expect_refusal((struct sampler_options){.bias = &infinite, .n_bias = 1}, "bias for token 1");

    for (size_t i = 0; i < ARRAY_SIZE(bounds); i++) {
        assert(sampler_new(&s, 100, &bounds[i], &err) == 0);
        assert(sampler_observe(s, ids, 3) == 0);
        assert(!sampler_free(s));
    }
    assert(!sampler_free(NULL));
}

static void test_allocation(void)
{
    static const struct logit_bias bias = {1, 1};
    const struct sampler_options o = {
        .temperature = 1,
        .top_p = 0.9f,
        .presence_penalty = 0.5f,
        .penalty_last_n = 40,
        .bias = &bias,
        .n_bias = 1,
        .n_logprobs = 3,
        .seed = 5,
    };
    uint32_t tokens[100], without[3], with[3];
    struct sampler *s;
    struct error err;
    struct sample got;
    size_t needed, n_failed = 0;
    float x[300];

    for (size_t i = 0; i < ARRAY_SIZE(x); i++)
        x[i] = normal(1);
    for (size_t i = 0; i < ARRAY_SIZE(tokens); i++)
        tokens[i] = below(300);

    n_allocations = 0;
    assert(sampler_new(&s, 300, &o, &err) == 0);
    needed = n_allocations;
    for (size_t i = 0; i < 3; i++) {
        assert(sampler_draw(s, x, false, &got) == 0);
        without[i] = got.id;
    }
    assert(sampler_observe(s, tokens, ARRAY_SIZE(tokens)) == 0);
    for (size_t i = 0; i < 300; i++)
        assert(sampler_observe(s, (uint32_t[]){(uint32_t)i}, 1) == 0);
    n_allocations = 0;
    for (size_t i = 0; i < 1000; i++)
        assert(sampler_draw(s, x, true, &got) == 0);
    assert(n_allocations == 0);
    sampler_free(s);

    for (size_t i = 0; i < needed; i++) {
        n_allocations = 0;
        fail_at = i;
        assert(sampler_new(&s, 300, &o, &err) == -ENOMEM);
        assert(strcmp(err.text, "out of memory") == 0);
    }

    /* A draw that failed has changed nothing: the same tokens follow. */
    fail_at = SIZE_MAX;
    assert(sampler_new(&s, 300, &o, &err) == 0);
    for (size_t i = 0; i < 3; i++) {
        fail_at = 0;
        for (n_allocations = 0; sampler_draw(s, x, false, &got) != 0; n_allocations = 0) {
            fail_at++;
            n_failed++;
        }
        with[i] = got.id;
    }
    assert(n_failed == 2);
    assert(memcmp(with, without, sizeof(with)) == 0);
    n_allocations = 0;
    fail_at = 0;
    assert(sampler_observe(s, tokens, ARRAY_SIZE(tokens)) == -ENOMEM);
    fail_at = SIZE_MAX;
    sampler_free(s);
}

int main(void)
{
    test_exp();
    test_greedy();
    test_validation();
    test_allocation();
    test_against_reference();
    test_exact_borders();
    test_tiny_top_p();
    test_distributions();
    test_frozen_draws();
    return 0;
}
