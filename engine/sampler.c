/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Every cut (top-k, top-p) keeps the head of one total order: larger logit first, of equal ones the
 * lower id. Finding such a cut is a selection, not a sort: find_cut() walks the bits of the logits
 * from the top, three passes, whatever the data. Before that, bounds rule nearly everything out:
 * the k-th largest of the maxima of blocks of logits, which the search for the largest logit yields
 * anyway, for top-k; a logit whose weight could not matter if all had it, for top-p. What needs no
 * cut is drawn from the sums of the blocks' weights. All passes over the whole row are in logits.c.
 *
 * Probabilities that decide are integers: floor(exp((x - max) / temperature) * 2^weight_bits).
 * Integer sums do not depend on their order, and the exp is our own (libm's differs between
 * versions and processors), so the same token comes out everywhere. The price: a token less
 * probable than 2^-45 times the most probable one (of 262144) is never drawn.
 *
 * The generator is xoshiro256** (Blackman and Vigna), its state four outputs of splitmix64 of the
 * seed. One draw takes one 64-bit output r: the token at r * total / 2^64 of the kept weights laid
 * end to end in order of ids. Greedy decoding takes none.
 */

#include "engine/sampler.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/logits.h"

#define BLOCK LOGITS_BLOCK

#define RADIX_BITS 11
#define BINS 2048

struct sampler {
    struct sampler_options options; /* 0 where 1 means off as well; bias is ours */
    uint32_t vocab_size;
    unsigned weight_bits; /* weights are at most 2^weight_bits, their sum at most 2^63 */
    uint64_t random[4];

    const struct logits_passes *passes;
    float *adjusted;      /* [vocab_size], NULL when nothing adjusts logits */
    float *block_max;     /* [DIV_ROUND_UP(vocab_size, BLOCK)] */
    uint64_t *block_sums; /* the same of weights; NULL when always greedy */

    /* Tokens still in the running, in order of ids, [vocab_size] each; NULL when always greedy.
     * Only what a draw uses is ever touched, so the rest costs no memory. */
    float *x;
    uint32_t *ids;
    uint64_t *weights;

    /* Those of them that a search for a cut looks at more closely; NULL without top_p */
    float *close_x;
    uint64_t *close_weights;

    /* Penalties: occurrences inside the window, and the ids that have some (or had: those leave
     * the list when it is next walked). */
    uint32_t *counts; /* [vocab_size], NULL without penalties */
    bool *listed;     /* [vocab_size] */
    uint32_t *seen;
    size_t n_seen, seen_allocated;
    uint32_t *window; /* the last penalty_last_n tokens; a ring once it is full */
    size_t n_window, window_allocated, window_next;
};

static uint64_t splitmix64(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static uint64_t rotl(uint64_t x, unsigned k)
{
    return x << k | x >> (64 - k);
}

static uint64_t next_random(uint64_t s[4])
{
    uint64_t r = rotl(s[1] * 5, 7) * 9, t = s[1] << 17;

    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotl(s[3], 45);
    return r;
}

/* NaN is -infinity, +infinity the largest finite number, -0 is 0. */
static float sane(float x)
{
    if (!(x >= -FLT_MAX))
        return -INFINITY;
    return (x <= FLT_MAX ? x : FLT_MAX) + 0.0f;
}

/* Orders as the float does: a larger sane float has a larger key. */
static uint32_t key_of(float x)
{
    uint32_t u;

    memcpy(&u, &x, sizeof(u));
    return u & 0x80000000 ? ~u : u | 0x80000000;
}

/* Kept are all above the key, and the first n_ties of those that equal it. */
struct cut {
    uint32_t key;
    uint64_t n_ties;
};

/*
 * The shortest head of the order whose weights reach target; target is at least 1 and at most the
 * sum. weights NULL: one each. x are sane.
 */
static struct cut find_cut(const float *x, const uint64_t *weights, size_t n, uint64_t target)
{
    uint64_t sums[1 << RADIX_BITS];
    uint32_t key = 0, known = 0; /* bits of the key found so far, and which they are */
    size_t first = 0;

    for (int shift = 32 - RADIX_BITS; known != UINT32_MAX; shift = MAX(shift - RADIX_BITS, 0)) {
        uint32_t digits = ~known >> shift;
        uint32_t digit;

        memset(sums, 0, (digits + 1) * sizeof(sums[0]));
        for (size_t i = 0; i < n; i++) {
            uint32_t k = key_of(x[i]);

            if ((k & known) == key)
                sums[k >> shift & digits] += weights ? weights[i] : 1;
        }
        for (digit = digits; digit > 0 && sums[digit] < target; digit--)
            target -= sums[digit];
        key |= digit << shift;
        known |= digits << shift;
    }

    /* Equal logits have equal weights: so many of them are needed for what is left. */
    while (key_of(x[first]) != key)
        first++;
    return (struct cut){key, weights ? (target - 1) / weights[first] + 1 : target};
}

/* Which of BINS parts of [low, low + BINS / per_one] x lies in, as if there were nothing outside.
 * Of two logits the larger one has no smaller bin. */
static size_t bin_of(float x, float low, float per_one)
{
    float at = (x - low) * per_one;

    at = at > 0 ? at : 0; /* NaN, of 0 times infinity, too */
    return (size_t)(at < BINS - 1 ? at : BINS - 1);
}

/*
 * The same cut among many, of which most should lie in [low, max]: first by sums over equal parts
 * of that range, so that find_cut() sees only one part's logits.
 */
static struct cut find_cut_of_many(struct sampler *s, size_t n, uint64_t target, float low,
                                   float max)
{
    /* Neighbours add to different tables: adding twice in a row to one entry takes longer. */
    static const size_t n_tables = 4;
    uint64_t sums[4][BINS] = {0};
    float per_one = (float)BINS / (max - low);
    size_t close = 0, bin;

    for (size_t i = 0; i < n; i++)
        sums[i % n_tables][bin_of(s->x[i], low, per_one)] += s->weights[i];
    for (bin = BINS - 1; bin > 0; bin--) {
        uint64_t sum = sums[0][bin] + sums[1][bin] + sums[2][bin] + sums[3][bin];

        if (sum >= target)
            break;
        target -= sum;
    }

    for (size_t i = 0; i < n; i++) {
        s->close_x[close] = s->x[i];
        s->close_weights[close] = s->weights[i];
        close += bin_of(s->x[i], low, per_one) == bin;
    }
    return find_cut(s->close_x, s->close_weights, close, target);
}

/* Fills s->x and s->ids with all logits from bound up, a finite number; block_max belongs to
 * logits. Without a branch in the inner loop: what is not kept is written over. Returns how many.
 */
static size_t gather_from(struct sampler *s, const float *logits, float bound)
{
    size_t n_blocks = DIV_ROUND_UP((size_t)s->vocab_size, (size_t)BLOCK), n = 0;

    for (size_t b = 0; b < n_blocks; b++) {
        if (!(s->block_max[b] >= bound))
            continue;
        for (size_t i = b * BLOCK; i < MIN((b + 1) * BLOCK, (size_t)s->vocab_size); i++) {
            s->x[n] = logits[i];
            s->ids[n] = (uint32_t)i;
            n += logits[i] >= bound; /* NaN is not */
        }
    }
    for (size_t i = 0; i < n; i++)
        s->x[i] = sane(s->x[i]);
    return n;
}

/* The float of that key. */
static float of_key(uint32_t key)
{
    uint32_t u = key & 0x80000000 ? key & 0x7fffffff : ~key;
    float x;

    memcpy(&x, &u, sizeof(x));
    return x;
}

/* Fills s->x and s->ids with the k first of the order, in order of ids; with all of finite logit if
 * there are fewer. block_max belongs to logits. Returns how many. */
static size_t gather_first(struct sampler *s, const float *logits, size_t k)
{
    size_t n_blocks = DIV_ROUND_UP((size_t)s->vocab_size, (size_t)BLOCK), n, kept = 0;
    float bound = -FLT_MAX;
    struct cut cut;

    if (k <= n_blocks)
        bound = of_key(MAX(key_of(bound), find_cut(s->block_max, NULL, n_blocks, k).key));
    n = gather_from(s, logits, bound);
    if (n <= k)
        return n;

    cut = find_cut(s->x, NULL, n, k);
    for (size_t i = 0; i < n; i++) {
        uint32_t key = key_of(s->x[i]);

        if (key > cut.key || (key == cut.key && cut.n_ties > 0)) {
            cut.n_ties -= key == cut.key;
            s->x[kept] = s->x[i];
            s->ids[kept++] = s->ids[i];
        }
    }
    return kept;
}

/* The lowest id whose logit is the largest. */
static uint32_t find_first(const struct sampler *s, const float *logits, float max)
{
    size_t b = 0, i;

    while (s->block_max[b] != max)
        b++;
    for (i = b * BLOCK; sane(logits[i]) != max; i++)
        ;
    return (uint32_t)i;
}

/* Bias and penalties, into s->adjusted. */
static const float *adjust(struct sampler *s, const float *logits)
{
    const struct sampler_options *o = &s->options;
    size_t kept = 0;

    if (!s->adjusted)
        return logits;

    memcpy(s->adjusted, logits, s->vocab_size * sizeof(*logits));

    for (size_t i = 0; i < o->n_bias; i++) {
        float *x = &s->adjusted[o->bias[i].id];

        *x = sane(sane(*x) + o->bias[i].bias);
    }

    for (size_t i = 0; i < s->n_seen; i++) {
        uint32_t id = s->seen[i];
        double x;

        if (s->counts[id] == 0) {
            s->listed[id] = false;
            continue;
        }
        s->seen[kept++] = id;

        x = (double)sane(s->adjusted[id]);
        if (o->repetition_penalty != 0)
            x = x > 0 ? x / (double)o->repetition_penalty : x * (double)o->repetition_penalty;
        x -= (double)o->presence_penalty + (double)o->frequency_penalty * s->counts[id];
        s->adjusted[id] = sane((float)x);
    }
    s->n_seen = kept;
    return s->adjusted;
}

/* How much the shortest head that has top_p of the sum weighs at least. */
static uint64_t find_target(const struct sampler *s, uint64_t total)
{
    /* p as a fraction of 2^63, exactly, so that "reaches p" is a comparison of integers */
    uint64_t p = (uint64_t)((double)s->options.top_p * 0x1p63);
    unsigned __int128 product = (unsigned __int128)p * total;
    uint64_t target = (uint64_t)((product + (((unsigned __int128)1 << 63) - 1)) >> 63);

    return MAX(target, (uint64_t)1);
}

/* Keeps of s->ids and s->weights what is inside the cut; returns how many. */
static size_t apply_cut(struct sampler *s, size_t n, struct cut cut)
{
    size_t kept = 0;

    for (size_t i = 0; i < n; i++) {
        uint32_t key = key_of(s->x[i]);
        bool tie = key == cut.key;

        s->ids[kept] = s->ids[i];
        s->weights[kept] = s->weights[i];
        kept += key > cut.key || (tie && cut.n_ties > 0);
        cut.n_ties -= tie && cut.n_ties > 0;
    }
    return kept;
}

static uint64_t random_below(struct sampler *s, uint64_t total)
{
    return (uint64_t)((unsigned __int128)next_random(s->random) * total >> 64);
}

/* From all whose weight is not 0, without gathering them: total and block_sums are theirs. */
static uint32_t draw_of_all(struct sampler *s, const float *logits,
                            const struct logits_scale *scale, uint64_t total)
{
    uint64_t at = random_below(s, total), weights[BLOCK];
    size_t b = 0, i = 0;

    while (at >= s->block_sums[b])
        at -= s->block_sums[b++];
    s->passes->weigh(scale, logits + b * BLOCK, MIN(s->vocab_size - b * BLOCK, (size_t)BLOCK),
                     weights);
    while (at >= weights[i])
        at -= weights[i++];
    return (uint32_t)(b * BLOCK + i);
}

/*
 * Keeps the shortest head of all logits whose weights, total together, reach top_p. It ends above a
 * logit so low that even vocab_size like it would weigh less than what may be left out: only those
 * from there up are gathered.
 */
static size_t cut_top_p_of_all(struct sampler *s, const float *logits,
                               const struct logits_scale *scale, uint64_t total)
{
    uint64_t target = find_target(s, total);
    double share = (double)(total - target) / (scale->one * s->vocab_size);
    float low = scale->low;
    size_t n;

    if (share > 0) /* 0.01: by far more than all of this is rounded, or log() errs */
        low = MAX(low, (float)(scale->max + (log(share) - 0.01) * scale->temperature));
    n = gather_from(s, logits, low);
    s->passes->weigh(scale, s->x, n, s->weights);
    return apply_cut(s, n, find_cut_of_many(s, n, target, low, (float)scale->max));
}

static uint32_t draw(struct sampler *s, const float *logits, float max)
{
    const struct sampler_options *o = &s->options;
    /* Integers below min_p's share are those below the next integer. */
    double one = (double)((uint64_t)1 << s->weight_bits), least = ceil((double)o->min_p * one);
    struct logits_scale scale = {
        .max = (double)max,
        .temperature = (double)o->temperature,
        .one = one,
    };
    double depth = 0.7 * s->weight_bits; /* exp(-depth) is less than 2^-weight_bits */
    uint64_t total, at;
    size_t n, i;

    if (o->top_k != 0) {
        n = gather_first(s, logits, o->top_k);
        total = s->passes->weigh(&scale, s->x, n, s->weights);
        if (o->top_p != 0)
            n = apply_cut(s, n, find_cut(s->x, s->weights, n, find_target(s, total)));
    } else {
        size_t vocab_size = s->vocab_size;

        if (o->top_p == 0) {
            scale.least = least;
            if (o->min_p != 0)
                depth = MIN(depth, 0.01 - log((double)o->min_p)); /* see above */
        }
        /* Of rounding to float: what is less than the rounded one is less than the exact one. */
        scale.low = (float)((double)max - (double)o->temperature * depth);
        total = s->passes->weigh_blocks(&scale, logits, vocab_size, s->block_max, s->block_sums);
        if (o->top_p == 0)
            return draw_of_all(s, logits, &scale, total);
        n = cut_top_p_of_all(s, logits, &scale, total);
    }

    total = 0;
    for (i = 0; i < n; i++) {
        s->weights[i] = (double)s->weights[i] < least ? 0 : s->weights[i];
        total += s->weights[i];
    }
    at = random_below(s, total);
    for (i = 0; at >= s->weights[i]; i++)
        at -= s->weights[i];
    return s->ids[i];
}

/* Of the model's own distribution, softmax(logits); max and block_max are of logits. */
static void fill_logprobs(struct sampler *s, const float *logits, float max, struct sample *ret)
{
    struct logits_sums sums = s->passes->sum(logits, s->vocab_size, max);
    double log_sum = log(sums.e);

    ret->logprob = (float)((double)sane(logits[ret->id]) - (double)max - log_sum);
    ret->entropy = (float)(log_sum - sums.ed / sums.e);

    if (s->options.n_logprobs > 0) {
        size_t n = gather_first(s, logits, s->options.n_logprobs);

        for (size_t i = 0; i < n; i++) { /* an insertion sort: n is at most 64 */
            float x = s->x[i];
            size_t k = i;

            for (; k > 0 && s->x[k - 1] < x; k--) {
                s->x[k] = s->x[k - 1];
                ret->top[k].id = ret->top[k - 1].id;
            }
            s->x[k] = x;
            ret->top[k].id = s->ids[i];
        }
        for (size_t i = 0; i < n; i++)
            ret->top[i].logprob = (float)((double)s->x[i] - (double)max - log_sum);
        ret->n_top = (uint32_t)n;
    }
}

/* Makes room for n entries, or for limit where n is more: there will never be more than that. */
static int reserve(uint32_t **array, size_t *allocated, size_t n, size_t limit)
{
    size_t doubled = MAX(2 * *allocated, (size_t)64), want = MAX(n, doubled);
    uint32_t *grown;

    if (MIN(n, limit) <= *allocated)
        return 0;
    want = MIN(want, limit);
    grown = reallocarray(*array, want, sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    *array = grown;
    *allocated = want;
    return 0;
}

/* Room for n more observed tokens. */
static int reserve_tokens(struct sampler *s, size_t n)
{
    int r;

    if (!s->counts)
        return 0;
    r = reserve(&s->seen, &s->seen_allocated, s->n_seen + n, s->vocab_size);
    if (r < 0)
        return r;
    return reserve(&s->window, &s->window_allocated, s->n_window + n, s->options.penalty_last_n);
}

static void count(struct sampler *s, uint32_t id)
{
    if (id >= s->vocab_size)
        return; /* never drawn (an image's placeholder, say), but a token of the window */
    s->counts[id]++;
    if (!s->listed[id]) {
        s->listed[id] = true;
        s->seen[s->n_seen++] = id;
    }
}

int sampler_observe(struct sampler *s, const uint32_t *ids, size_t n)
{
    uint32_t last_n = s->options.penalty_last_n;
    int r;

    r = reserve_tokens(s, n);
    if (r < 0 || !s->counts)
        return r;

    for (size_t i = 0; i < n; i++) {
        count(s, ids[i]);
        if (last_n == 0)
            continue;
        if (s->n_window < last_n) {
            s->window[s->n_window++] = ids[i];
            continue;
        }
        if (s->window[s->window_next] < s->vocab_size)
            s->counts[s->window[s->window_next]]--;
        s->window[s->window_next] = ids[i];
        s->window_next = (s->window_next + 1) % last_n;
    }
    return 0;
}

int sampler_draw(struct sampler *s, const float *logits, bool want_logprob, struct sample *ret)
{
    const float *adjusted = adjust(s, logits);
    float max = s->passes->find_maxima(adjusted, s->vocab_size, s->block_max);
    uint32_t id;
    int r;

    if (max == -INFINITY)
        return -EDOM;

    /* Room for the token first: a failure must not have used up a random number. */
    r = reserve_tokens(s, 1);
    if (r < 0)
        return r;

    if (s->options.temperature == 0)
        id = find_first(s, adjusted, max);
    else
        id = draw(s, adjusted, max);

    ret->id = id;
    ret->logprob = NAN;
    ret->entropy = NAN;
    ret->n_top = 0;
    if (want_logprob || s->options.n_logprobs > 0) {
        if (adjusted != logits)
            max = s->passes->find_maxima(logits, s->vocab_size, s->block_max);
        fill_logprobs(s, logits, max, ret);
    }

    return sampler_observe(s, &id, 1);
}

void sampler_get_state(const struct sampler *s, struct sampler_state *ret)
{
    memcpy(ret->random, s->random, sizeof(ret->random));
}

int sampler_set_state(struct sampler *s, const struct sampler_state *state)
{
    const uint64_t *r = state->random;

    if ((r[0] | r[1] | r[2] | r[3]) == 0) /* from there the generator never leaves */
        return -EINVAL;
    memcpy(s->random, r, sizeof(s->random));
    return 0;
}

static int check_range(struct error *err, const char *name, float value, float low, float high,
                       bool zero_is_off)
{
    if (value >= low && value <= high) /* NaN is neither */
        return 0;
    if (zero_is_off && value == 0)
        return 0;
    return error_set(err, EINVAL, "%s is %g: %sbetween %g and %g expected", name, (double)value,
                     zero_is_off ? "0 or " : "", (double)low, (double)high);
}

static int check_options(const struct sampler_options *o, uint32_t vocab_size, struct error *err)
{
    int r = check_range(err, "temperature", o->temperature, 0.01f, 100, true);

    if (r == 0)
        r = check_range(err, "top_p", o->top_p, 0, 1, true);
    if (r == 0)
        r = check_range(err, "min_p", o->min_p, 0, 1, true);
    if (r == 0)
        r = check_range(err, "repetition_penalty", o->repetition_penalty, 0.01f, 100, true);
    if (r == 0)
        r = check_range(err, "presence_penalty", o->presence_penalty, -100, 100, false);
    if (r == 0)
        r = check_range(err, "frequency_penalty", o->frequency_penalty, -100, 100, false);
    if (r < 0)
        return r;

    if (o->n_logprobs > SAMPLER_MAX_LOGPROBS)
        return error_set(err, EINVAL, "n_logprobs is %u: at most %u expected", o->n_logprobs,
                         SAMPLER_MAX_LOGPROBS);

    for (size_t i = 0; i < o->n_bias; i++) {
        if (o->bias[i].id >= vocab_size)
            return error_set(err, EINVAL, "bias for token %u: the vocabulary ends at %u",
                             o->bias[i].id, vocab_size - 1);
        if (isnan(o->bias[i].bias) || o->bias[i].bias == INFINITY)
            return error_set(err, EINVAL,
                             "bias for token %u is %g: a finite number or -infinity expected",
                             o->bias[i].id, (double)o->bias[i].bias);
    }
    return 0;
}

int sampler_new(struct sampler **ret, uint32_t vocab_size, const struct sampler_options *options,
                struct error *err)
{
    CLEANUP(sampler_freep) struct sampler *s = NULL;
    struct sampler_options *o;
    struct logit_bias *bias;
    uint64_t seed = options->seed;
    bool penalties;
    int r;

    if (vocab_size == 0)
        return error_set(err, EINVAL, "vocab_size is 0");
    r = check_options(options, vocab_size, err);
    if (r < 0)
        return r;

    s = calloc(1, sizeof(*s));
    if (!s)
        return error_set(err, ENOMEM, "out of memory");
    s->vocab_size = vocab_size;
    s->passes = logits_passes(0);
    s->options = *options;
    o = &s->options;
    o->bias = NULL;
    if (o->top_k >= vocab_size)
        o->top_k = 0;
    if (o->top_p == 1)
        o->top_p = 0;
    if (o->repetition_penalty == 1)
        o->repetition_penalty = 0;

    s->weight_bits = 52; /* what a double tells apart just below 1 */
    while ((unsigned __int128)vocab_size << s->weight_bits > (uint64_t)1 << 63)
        s->weight_bits--;

    for (size_t i = 0; i < 4; i++)
        s->random[i] = splitmix64(&seed);

    s->block_max = calloc(DIV_ROUND_UP((size_t)vocab_size, (size_t)BLOCK), sizeof(*s->block_max));
    if (!s->block_max)
        return error_set(err, ENOMEM, "out of memory");

    if (o->n_bias > 0) {
        bias = reallocarray(NULL, o->n_bias, sizeof(*bias));
        if (!bias)
            return error_set(err, ENOMEM, "out of memory");
        memcpy(bias, options->bias, o->n_bias * sizeof(*bias));
        o->bias = bias;
    }

    penalties = o->repetition_penalty != 0 || o->presence_penalty != 0 || o->frequency_penalty != 0;
    if (penalties) {
        s->counts = calloc(vocab_size, sizeof(*s->counts));
        s->listed = calloc(vocab_size, sizeof(*s->listed));
        if (!s->counts || !s->listed)
            return error_set(err, ENOMEM, "out of memory");
    }
    if (penalties || o->n_bias > 0) {
        s->adjusted = calloc(vocab_size, sizeof(*s->adjusted));
        if (!s->adjusted)
            return error_set(err, ENOMEM, "out of memory");
    }
    if (o->temperature != 0 || o->n_logprobs > 0) {
        s->x = calloc(vocab_size, sizeof(*s->x));
        s->ids = calloc(vocab_size, sizeof(*s->ids));
        if (!s->x || !s->ids)
            return error_set(err, ENOMEM, "out of memory");
    }
    if (o->temperature != 0) {
        s->weights = calloc(vocab_size, sizeof(*s->weights));
        s->block_sums =
            calloc(DIV_ROUND_UP((size_t)vocab_size, (size_t)BLOCK), sizeof(*s->block_sums));
        if (!s->weights || !s->block_sums)
            return error_set(err, ENOMEM, "out of memory");
    }
    if (o->temperature != 0 && o->top_p != 0 && o->top_k == 0) {
        s->close_x = calloc(vocab_size, sizeof(*s->close_x));
        s->close_weights = calloc(vocab_size, sizeof(*s->close_weights));
        if (!s->close_x || !s->close_weights)
            return error_set(err, ENOMEM, "out of memory");
    }

    *ret = TAKE_PTR(s);
    return 0;
}

struct sampler *sampler_free(struct sampler *s)
{
    if (s) {
        free((void *)s->options.bias);
        free(s->adjusted);
        free(s->block_max);
        free(s->block_sums);
        free(s->x);
        free(s->ids);
        free(s->weights);
        free(s->close_x);
        free(s->close_weights);
        free(s->counts);
        free(s->listed);
        free(s->seen);
        free(s->window);
        free(s);
    }
    return NULL;
}

void sampler_freep(struct sampler **s)
{
    sampler_free(*s);
}
