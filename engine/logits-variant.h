/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The passes of logits.h for one kind of processor; included by logits.c once for each, with
 *   VARIANT(name)  that name made the variant's own
 *   TARGET         attribute of every function, or nothing
 *   LANES          doubles in a vector
 *   LINKAGE        of its table: static or nothing
 * Vectors are the compilers' own type: gcc does not vectorise these loops by itself.
 */

#define PART static inline __attribute__((always_inline)) TARGET
#define doubles VARIANT(doubles)
#define integers VARIANT(integers)
#define floats VARIANT(floats)
#define narrow VARIANT(narrow)

typedef double doubles __attribute__((vector_size(LANES * 8)));
typedef int64_t integers __attribute__((vector_size(LANES * 8)));
typedef float floats __attribute__((vector_size(LANES * 8)));
typedef int32_t VARIANT(words) __attribute__((vector_size(LANES * 8)));
typedef float narrow __attribute__((vector_size(LANES * 4))); /* becomes doubles */

/* Vectors that go through exp together: one alone mostly waits for itself. */
#define GROUP 4

PART floats VARIANT(larger)(floats a, floats b)
{
    VARIANT(words) m = b > a; /* not where b is NaN */

    return (floats)(((VARIANT(words))b & m) | ((VARIANT(words))a & ~m));
}

TARGET static float VARIANT(find_maxima)(const float *x, size_t n, float *ret)
{
    float all = -INFINITY, space[LOGITS_BLOCK];

    for (size_t i = 0; i < n; i += LOGITS_BLOCK) {
        const float *block = block_of(x + i, n - i, space);
        floats a = (floats){0} - INFINITY, b = a, v, w;
        float max;

        for (size_t k = 0; k < LOGITS_BLOCK; k += 4 * LANES) {
            memcpy(&v, block + k, sizeof(v));
            memcpy(&w, block + k + 2 * LANES, sizeof(w));
            a = VARIANT(larger)(a, v);
            b = VARIANT(larger)(b, w);
        }
        a = VARIANT(larger)(a, b);
        max = a[0];
        for (size_t k = 1; k < 2 * LANES; k++)
            max = a[k] > max ? a[k] : max;
        max = (max > FLT_MAX ? FLT_MAX : max) + 0.0f; /* -0 is 0 */
        ret[i / LOGITS_BLOCK] = max;
        all = max > all ? max : all;
    }
    return all;
}

/*
 * d = (x - max) / temperature and e = exp_negative(d), in the same operations; both 0 where
 * exp_negative() is. A group of x.
 */
PART void VARIANT(exponentials)(const float *x, double max, double temperature, doubles *d,
                                doubles *e)
{
    static const double factors[] = {
        1.0 / 479001600,
        1.0 / 39916800,
        1.0 / 3628800,
        1.0 / 362880,
        1.0 / 40320,
        1.0 / 5040,
        1.0 / 720,
        1.0 / 120,
        1.0 / 24,
        1.0 / 6,
        0.5,
        1,
        1,
    };
    const double magic = 0x1.8p52;
    integers keep[GROUP];
    doubles t[GROUP], r[GROUP], p[GROUP];

#pragma GCC unroll 4
    for (size_t j = 0; j < GROUP; j++) {
        narrow v;

        memcpy(&v, x + j * LANES, sizeof(v));
        d[j] = __builtin_convertvector(v, doubles) - max;
        if (temperature != 1)
            d[j] /= temperature;
        d[j] = (doubles)((integers)d[j] & ~(integers)(d[j] > 0)); /* +infinity, which max is */
        keep[j] = (integers)(d[j] > -700);
        d[j] = (doubles)((integers)d[j] & keep[j]);

        t[j] = d[j] * 0x1.71547652b82fep0 + magic;
        r[j] = (d[j] - (t[j] - magic) * 0x1.62e42feep-1) - (t[j] - magic) * 0x1.a39ef35793c76p-33;
        p[j] = r[j] * (1.0 / 6227020800) + factors[0];
    }
#pragma GCC unroll 12
    for (size_t i = 1; i < ARRAY_SIZE(factors); i++)
#pragma GCC unroll 4
        for (size_t j = 0; j < GROUP; j++)
            p[j] = p[j] * r[j] + factors[i];
#pragma GCC unroll 4
    for (size_t j = 0; j < GROUP; j++)
        e[j] =
            (doubles)((integers)(p[j] * (doubles)(((integers)t[j] << 52) + ((int64_t)1023 << 52))) &
                      keep[j]);
}

/* ret may be NULL */
PART integers VARIANT(weigh_block)(const struct logits_scale *s, const float *x, double temperature,
                                   uint64_t *ret)
{
    const double whole = 0x1p52; /* from here on doubles are, and their last bits the value */
    double max = s->max, one = s->one, least = s->least;
    integers sum = {0};

    for (size_t i = 0; i < LOGITS_BLOCK; i += GROUP * LANES) {
        doubles d[GROUP], e[GROUP];

        VARIANT(exponentials)(x + i, max, temperature, d, e);
#pragma GCC unroll 4
        for (size_t j = 0; j < GROUP; j++) {
            doubles w = e[j] * one, rounded = w + whole;
            integers v = (integers)rounded - ((int64_t)0x433 << 52);

            v += (integers)(rounded - whole > w); /* down, not to the nearest */
            v &= (integers)(w >= least);
            sum += v;
            if (ret)
                memcpy(ret + i + j * LANES, &v, sizeof(v));
        }
    }
    return sum;
}

PART uint64_t VARIANT(total)(integers v)
{
    uint64_t sum = 0;

    for (size_t k = 0; k < LANES; k++)
        sum += (uint64_t)v[k];
    return sum;
}

TARGET static uint64_t VARIANT(weigh)(const struct logits_scale *s, const float *x, size_t n,
                                      uint64_t *ret)
{
    uint64_t weights[LOGITS_BLOCK];
    float space[LOGITS_BLOCK];
    integers sum = {0};

    for (size_t i = 0; i < n; i += LOGITS_BLOCK) {
        const float *block = block_of(x + i, n - i, space);

        sum += VARIANT(weigh_block)(s, block, s->temperature, weights);
        memcpy(ret + i, weights, MIN(n - i, (size_t)LOGITS_BLOCK) * sizeof(*ret));
    }
    return VARIANT(total)(sum);
}

PART uint64_t VARIANT(weigh_all)(const struct logits_scale *s, const float *x, size_t n,
                                 double temperature, const float *maxima, uint64_t *ret_sums)
{
    float space[LOGITS_BLOCK];
    uint64_t total = 0;

    for (size_t i = 0; i < n; i += LOGITS_BLOCK) {
        uint64_t sum = 0;

        if (maxima[i / LOGITS_BLOCK] >= s->low)
            sum = VARIANT(total)(
                VARIANT(weigh_block)(s, block_of(x + i, n - i, space), temperature, NULL));
        ret_sums[i / LOGITS_BLOCK] = sum;
        total += sum;
    }
    return total;
}

TARGET static uint64_t VARIANT(weigh_blocks)(const struct logits_scale *s, const float *x, size_t n,
                                             const float *maxima, uint64_t *ret_sums)
{
    if (s->temperature == 1) /* no division */
        return VARIANT(weigh_all)(s, x, n, 1, maxima, ret_sums);
    return VARIANT(weigh_all)(s, x, n, s->temperature, maxima, ret_sums);
}

TARGET static struct logits_sums VARIANT(sum)(const float *x, size_t n, float max)
{
    double e[LOGITS_BLOCK] = {0}, ed[LOGITS_BLOCK] = {0};
    float space[LOGITS_BLOCK];

    for (size_t i = 0; i < n; i += LOGITS_BLOCK) {
        const float *block = block_of(x + i, n - i, space);

        for (size_t k = 0; k < LOGITS_BLOCK; k += GROUP * LANES) {
            doubles d[GROUP], one[GROUP], v;

            VARIANT(exponentials)(block + k, (double)max, 1, d, one);
#pragma GCC unroll 4
            for (size_t j = 0; j < GROUP; j++) {
                memcpy(&v, e + k + j * LANES, sizeof(v));
                v += one[j];
                memcpy(e + k + j * LANES, &v, sizeof(v));
                memcpy(&v, ed + k + j * LANES, sizeof(v));
                v += one[j] * d[j];
                memcpy(ed + k + j * LANES, &v, sizeof(v));
            }
        }
    }
    for (size_t k = 1; k < LOGITS_BLOCK; k++) {
        e[0] += e[k];
        ed[0] += ed[k];
    }
    return (struct logits_sums){e[0], ed[0]};
}

LINKAGE const struct logits_passes VARIANT(logits) = {
    .find_maxima = VARIANT(find_maxima),
    .weigh = VARIANT(weigh),
    .weigh_blocks = VARIANT(weigh_blocks),
    .sum = VARIANT(sum),
};

#undef PART
#undef GROUP
#undef doubles
#undef integers
#undef floats
#undef narrow
#undef VARIANT
#undef TARGET
#undef LINKAGE
#undef LANES
