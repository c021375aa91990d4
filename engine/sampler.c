/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Every cut (top-k, top-p) keeps the head of one total order: larger logit first, of equal ones the
 * lower id. Finding such a cut is a selection, not a sort: find_cut() walks the bits of the logits
 * from the top, three passes, whatever the data. Before that, the maxima of blocks of 64 logits,
 * which the search for the largest logit yields anyway, rule nearly everything out: the k-th
 * largest of them is a lower bound of the k-th largest logit.
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
#include "engine/exp-negative.h"

#define BLOCK 64 /* logits per entry of block_max */
#define LANES 16

#define RADIX_BITS 11

struct sampler {
    struct sampler_options options; /* 0 where 1 means off as well; bias is ours */
    uint32_t vocab_size;
    unsigned weight_bits; /* weights are at most 2^weight_bits, their sum at most 2^63 */
    uint64_t random[4];

    float *adjusted;  /* [vocab_size], NULL when nothing adjusts logits */
    float *block_max; /* [DIV_ROUND_UP(vocab_size, BLOCK)] */

    /* Tokens still in the running, in order of ids, [vocab_size] each; NULL when always greedy.
     * Only what a draw uses is ever touched, so the rest costs no memory. */
    float *x;
    uint32_t *ids;
    uint64_t *weights;

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

/* Maxima of the blocks; returns the largest of all. In lanes, since a max that meets NaN may not be
 * reordered by the compiler. */
static float find_block_max(float *block_max, const float *logits, size_t n)
{
    float all = -INFINITY;

    for (size_t b = 0; b * BLOCK < n; b++) {
        const float *p = logits + b * BLOCK;
        size_t here = MIN(n - b * BLOCK, (size_t)BLOCK), i = 0;
        float lane[LANES], m;

        for (size_t k = 0; k < LANES; k++)
            lane[k] = -INFINITY;
        for (; i + LANES <= here; i += LANES)
            for (size_t k = 0; k < LANES; k++)
                lane[k] = p[i + k] > lane[k] ? p[i + k] : lane[k];
        m = lane[0];
        for (size_t k = 1; k < LANES; k++)
            m = lane[k] > m ? lane[k] : m;
        for (; i < here; i++)
            m = p[i] > m ? p[i] : m;

        block_max[b] = sane(m);
        all = block_max[b] > all ? block_max[b] : all;
    }
    return all;
}

/*
 * Fills ret_x and ret_ids with the k first of the order, in order of ids; with all of finite logit
 * if k is 0 or there are fewer. block_max belongs to logits. Returns how many.
 */
static size_t gather(const struct sampler *s, const float *logits, size_t k, float *ret_x,
                     uint32_t *ret_ids)
{
    size_t n_blocks = DIV_ROUND_UP((size_t)s->vocab_size, (size_t)BLOCK), n = 0, kept = 0;
    uint32_t bound = key_of(-FLT_MAX);
    struct cut cut;

    if (k > 0 && k <= n_blocks)
        bound = MAX(bound, find_cut(s->block_max, NULL, n_blocks, k).key);

    for (size_t b = 0; b < n_blocks; b++) {
        if (key_of(s->block_max[b]) < bound)
            continue;
        for (size_t i = b * BLOCK; i < MIN((b + 1) * BLOCK, (size_t)s->vocab_size); i++) {
            float x = sane(logits[i]);

            if (key_of(x) >= bound) {
                ret_x[n] = x;
                ret_ids[n++] = (uint32_t)i;
            }
        }
    }
    if (k == 0 || n <= k)
        return n;

    cut = find_cut(ret_x, NULL, n, k);
    for (size_t i = 0; i < n; i++) {
        uint32_t key = key_of(ret_x[i]);

        if (key > cut.key || (key == cut.key && cut.n_ties > 0)) {
            cut.n_ties -= key == cut.key;
            ret_x[kept] = ret_x[i];
            ret_ids[kept++] = ret_ids[i];
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

/* Keeps the shortest head that has p of the sum; returns how many, and their sum in *total. */
static size_t cut_top_p(struct sampler *s, size_t n, uint64_t *total)
{
    /* p as a fraction of 2^63, exactly, so that "reaches p" is a comparison of integers */
    uint64_t p = (uint64_t)((double)s->options.top_p * 0x1p63);
    unsigned __int128 product = (unsigned __int128)p * *total;
    uint64_t target = (uint64_t)((product + (((unsigned __int128)1 << 63) - 1)) >> 63);
    struct cut cut = find_cut(s->x, s->weights, n, MAX(target, (uint64_t)1));
    size_t kept = 0;

    *total = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t key = key_of(s->x[i]);

        if (key > cut.key || (key == cut.key && cut.n_ties > 0)) {
            cut.n_ties -= key == cut.key;
            s->ids[kept] = s->ids[i];
            s->weights[kept] = s->weights[i];
            *total += s->weights[kept++];
        }
    }
    return kept;
}

static uint32_t draw(struct sampler *s, const float *logits, float max)
{
    const struct sampler_options *o = &s->options;
    size_t n = gather(s, logits, o->top_k, s->x, s->ids);
    uint64_t largest = (uint64_t)1 << s->weight_bits, total = 0, at;
    size_t i;

    for (i = 0; i < n; i++) {
        double d = ((double)s->x[i] - (double)max) / (double)o->temperature;

        s->weights[i] = (uint64_t)(int64_t)(exp_negative(d) * (double)largest);
        total += s->weights[i];
    }

    if (o->top_p != 0)
        n = cut_top_p(s, n, &total);

    if (o->min_p != 0) {
        double bound = (double)o->min_p * (double)largest;

        total = 0;
        for (i = 0; i < n; i++) {
            if ((double)s->weights[i] < bound)
                s->weights[i] = 0;
            total += s->weights[i];
        }
    }

    at = (uint64_t)((unsigned __int128)next_random(s->random) * total >> 64);
    for (i = 0; at >= s->weights[i]; i++)
        at -= s->weights[i];
    return s->ids[i];
}

/* Of the model's own distribution, softmax(logits). */
static void fill_logprobs(struct sampler *s, const float *logits, struct sample *ret)
{
    float max = find_block_max(s->block_max, logits, s->vocab_size);
    double sum = 0, weighted = 0, log_sum;

    for (size_t i = 0; i < s->vocab_size; i++) {
        float x = sane(logits[i]);
        double d = (double)x - (double)max;

        if (d > -700) { /* beyond, the product is 0 (or undefined, at -infinity) */
            double e = exp_negative(d);

            sum += e;
            weighted += e * d;
        }
    }
    log_sum = log(sum);
    ret->logprob = (float)((double)sane(logits[ret->id]) - (double)max - log_sum);
    ret->entropy = (float)(log_sum - weighted / sum);

    if (s->options.n_logprobs > 0) {
        size_t n = gather(s, logits, s->options.n_logprobs, s->x, s->ids);

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
    float max = find_block_max(s->block_max, adjusted, s->vocab_size);
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
    if (want_logprob || s->options.n_logprobs > 0)
        fill_logprobs(s, logits, ret);

    return sampler_observe(s, &id, 1);
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
        if (!s->weights)
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
        free(s->x);
        free(s->ids);
        free(s->weights);
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
