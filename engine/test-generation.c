/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The state machine with a real tokenizer, and with a session and model of this test's own: the
 * session only counts, and the "model" says what a script tells it to.
 */

#undef NDEBUG
#include "engine/generation.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/tokenizer.h"

/* Every allocation comes through here (see meson.build). */
static size_t n_allocations, fail_at = SIZE_MAX;

void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__real_reallocarray(void *p, size_t n, size_t size);
void *__wrap_reallocarray(void *p, size_t n, size_t size);
char *__real_strdup(const char *s);
char *__wrap_strdup(const char *s);

void *__wrap_calloc(size_t n, size_t size)
{
    return n_allocations++ == fail_at ? NULL : __real_calloc(n, size);
}

void *__wrap_malloc(size_t size)
{
    return n_allocations++ == fail_at ? NULL : __real_malloc(size);
}

void *__wrap_reallocarray(void *p, size_t n, size_t size)
{
    return n_allocations++ == fail_at ? NULL : __real_reallocarray(p, n, size);
}

char *__wrap_strdup(const char *s)
{
    return n_allocations++ == fail_at ? NULL : __real_strdup(s);
}

/* ---- the doubles ---- */

struct session {
    uint32_t tokens[256], n, n_ctx, mark;
};

static struct model_config config;
static struct model_generation defaults;
static const struct tokenizer *the_tokenizer;

struct engine *session_engine(const struct session *s)
{
    (void)s;
    return NULL;
}

const struct model *engine_model(const struct engine *e)
{
    (void)e;
    return NULL;
}

const struct model_config *model_config(const struct model *m)
{
    (void)m;
    return &config;
}

const struct model_generation *model_generation(const struct model *m)
{
    (void)m;
    return &defaults;
}

const struct tokenizer *model_tokenizer(const struct model *m)
{
    (void)m;
    return the_tokenizer;
}

uint32_t session_n_tokens(const struct session *s)
{
    return s->n;
}

uint32_t session_n_ctx(const struct session *s)
{
    return s->n_ctx;
}

const uint32_t *session_tokens(const struct session *s)
{
    return s->tokens;
}

void session_rewind(struct session *s, uint32_t n)
{
    assert(n <= s->n);
    s->n = n;
}

void session_set_mark(struct session *s, uint32_t n)
{
    assert(n == SESSION_NO_MARK || n <= s->n);
    s->mark = n;
}

/* ---- a vocabulary ---- */

enum {
    EOS = 1,
    BOS = 2,
    START_OF_TURN = 4,
    END_OF_TURN = 5,
    FIRST_BYTE = 6,
    FIRST_PIECE = FIRST_BYTE + 256,
};

static const char *const pieces[] = {"a",    "b",    "ab", "\xe2\x96\x81the", "\n",   "User",
                                     ":",    "\nUs", "er", "\xc3\xbc",        "stop", "s",
                                     "topp", "\n\n", "ba", "\xe2\x82\xac",    "",     ""};
#define N_PIECES 16u
#define N_VOCAB (FIRST_PIECE + N_PIECES)

enum { A, B, AB, THE, NEWLINE, USER, COLON, NEWLINE_US, ER, UE, STOP, S, TOPP, NEWLINES, BA, EURO };

static uint32_t piece(uint32_t i)
{
    return FIRST_PIECE + i;
}

static uint32_t byte(uint8_t b)
{
    return FIRST_BYTE + b;
}

static struct tokenizer *make_tokenizer(void)
{
    static char text[8192];
    static uint32_t offsets[N_VOCAB + 1];
    static float scores[N_VOCAB];
    static uint8_t types[N_VOCAB];
    static const char *const control[] = {"<pad>", "<eos>",           "<bos>",
                                          "<unk>", "<start_of_turn>", "<end_of_turn>"};
    struct tokenizer_table table = {
        .n_pieces = N_VOCAB,
        .text = text,
        .offsets = offsets,
        .scores = scores,
        .types = types,
        .pad = 0,
        .eos = EOS,
        .bos = BOS,
        .unk = 3,
        .start_of_turn = START_OF_TURN,
        .end_of_turn = END_OF_TURN,
        .add_bos = true,
    };
    struct tokenizer *t;
    struct error err;
    int r;

    for (uint32_t i = 0; i < N_VOCAB; i++) {
        char name[32];

        if (i < FIRST_BYTE) {
            snprintf(name, sizeof(name), "%s", control[i]);
            types[i] = i == 3 ? PIECE_UNKNOWN : PIECE_CONTROL;
        } else if (i < FIRST_PIECE) {
            snprintf(name, sizeof(name), "<0x%02X>", i - FIRST_BYTE);
            types[i] = PIECE_BYTE;
        } else {
            snprintf(name, sizeof(name), "%s", pieces[i - FIRST_PIECE]);
            types[i] = PIECE_NORMAL;
        }
        memcpy(text + offsets[i], name, strlen(name));
        offsets[i + 1] = offsets[i] + (uint32_t)strlen(name);
    }
    r = tokenizer_new(&t, &table, &err);
    if (r < 0)
        fprintf(stderr, "%s\n", err.text);
    assert(r == 0);
    return t;
}

/* ---- driving ---- */

struct outcome {
    char text[1024];
    size_t n;
    size_t n_accepted;
    enum finish_reason finish;
};

/* Evaluates what is pending, in chunks of `chunk`. */
static void evaluate(struct generation *g, struct session *s, size_t chunk)
{
    const uint32_t *pending;
    size_t n, k;

    while ((pending = generation_pending(g, &n)), n > 0) {
        k = MIN(n, chunk);
        assert(s->n + k <= s->n_ctx);
        memcpy(s->tokens + s->n, pending, k * sizeof(*pending));
        s->n += (uint32_t)k;
        generation_advance(g, k);
    }
}

static int accept_token(struct generation *g, uint32_t id, struct generation_delta *delta)
{
    static float logits[N_VOCAB];

    for (uint32_t i = 0; i < N_VOCAB; i++)
        logits[i] = i == id ? 5 : 0;
    return generation_accept(g, logits, delta);
}

/* Lets the model say script until the request finishes or the script is over. */
static void play(struct generation *g, struct session *s, const uint32_t *script, size_t n,
                 struct outcome *ret)
{
    *ret = (struct outcome){0};
    for (size_t i = 0; i < n && ret->finish == FINISH_NONE; i++) {
        struct generation_delta delta;
        size_t pending;

        evaluate(g, s, 1 + i % 3);
        assert(accept_token(g, script[i], &delta) == 0);
        assert(delta.sample.id == script[i]);
        assert(strlen(delta.text) == delta.n && utf8_valid(delta.text, delta.n));
        assert(ret->n + delta.n < sizeof(ret->text));
        memcpy(ret->text + ret->n, delta.text, delta.n);
        ret->n += delta.n;
        ret->n_accepted++;
        ret->finish = delta.finish;
        assert(generation_finish(g) == delta.finish);
        generation_pending(g, &pending);
        assert(pending == (delta.finish == FINISH_NONE));
    }
    ret->text[ret->n] = 0;
}

static const uint32_t prompt[] = {BOS, FIRST_PIECE, FIRST_PIECE + 1};

static struct generation *start(struct session *s, const struct generation_options *o)
{
    struct generation *g;
    struct error err;
    int r = generation_new(&g, s, prompt, ARRAY_SIZE(prompt), o, &err);

    if (r < 0)
        fprintf(stderr, "%s\n", err.text);
    assert(r == 0);
    return g;
}

static struct session fresh(uint32_t n_ctx)
{
    return (struct session){.n_ctx = n_ctx, .mark = SESSION_NO_MARK};
}

/* Script in, text and reason out; in a new session of n_ctx. */
static void expect(const struct generation_options *o, uint32_t n_ctx, const uint32_t *script,
                   size_t n, const char *text, enum finish_reason finish, size_t n_accepted)
{
    struct session s = fresh(n_ctx);
    CLEANUP(generation_freep) struct generation *g = start(&s, o);
    struct generation_usage usage;
    struct outcome got;

    play(g, &s, script, n, &got);
    if (strcmp(got.text, text) != 0)
        fprintf(stderr, "'%s', not '%s'\n", got.text, text);
    assert(strcmp(got.text, text) == 0);
    assert(got.finish == finish);
    assert(got.n_accepted == n_accepted);
    generation_usage(g, &usage);
    assert(usage.prompt_tokens == 3 && usage.completion_tokens == n_accepted);
    assert(usage.cached_tokens == 0);
    assert(s.n == 3 + n_accepted - 1); /* the last one waits, or is never evaluated */
    assert((s.mark == SESSION_NO_MARK) == (finish != FINISH_NONE));
}

#define EXPECT(o, n_ctx, text, finish, n_accepted, ...)                           \
    expect(&(struct generation_options)o, n_ctx, (const uint32_t[]){__VA_ARGS__}, \
           ARRAY_SIZE(((const uint32_t[]){__VA_ARGS__})), text, finish, n_accepted)
#define O(...)      \
    {               \
        __VA_ARGS__ \
    }
#define STOPS(...)                              \
    .stop = (const char *const[]){__VA_ARGS__}, \
    .n_stop = ARRAY_SIZE(((const char *const[]){__VA_ARGS__}))

static void test_ends(void)
{
    EXPECT(O(.max_tokens = 0), 99, "ab", FINISH_NONE, 2, piece(A), piece(B));
    EXPECT(O(.max_tokens = 9), 99, "ab the", FINISH_STOP, 3, piece(AB), piece(THE), END_OF_TURN,
           piece(A));
    EXPECT(O(.max_tokens = 9), 99, "", FINISH_STOP, 1, EOS, piece(A));
    EXPECT(O(.max_tokens = 2), 99, "aba", FINISH_LENGTH, 2, piece(AB), piece(A), piece(A));
    EXPECT(O(.max_tokens = 2), 99, "a", FINISH_STOP, 2, piece(A), EOS); /* not "length" */
    EXPECT(O(.max_tokens = 1), 99, "a", FINISH_LENGTH, 1, piece(A), piece(A));

    /* The context: 3 of the prompt, the last token needs no place. */
    EXPECT(O(.max_tokens = 0), 3, "a", FINISH_LENGTH, 1, piece(A), piece(A));
    EXPECT(O(.max_tokens = 0), 5, "aba", FINISH_LENGTH, 3, piece(A), piece(B), piece(A), piece(B));
    EXPECT(O(.max_tokens = 3), 5, "aba", FINISH_LENGTH, 3, piece(A), piece(B), piece(A), piece(B));

    /* Control pieces are no text unless asked for. */
    EXPECT(O(.ignore_end = true, .max_tokens = 4), 99, "ab", FINISH_LENGTH, 4, piece(A), EOS,
           END_OF_TURN, piece(B), piece(A));
    EXPECT(O(.special = true), 99, "a<start_of_turn><end_of_turn>", FINISH_STOP, 3, piece(A),
           START_OF_TURN, END_OF_TURN);
    EXPECT(O(.special = false), 99, "ab", FINISH_STOP, 4, piece(A), START_OF_TURN, piece(B), EOS);

    /* The model's own list of end ids counts as well. */
    defaults = (struct model_generation){.n_stop_ids = 2, .stop_ids = {BOS, piece(COLON)}};
    EXPECT(O(.special = false), 99, "a", FINISH_STOP, 2, piece(A), piece(COLON));
    EXPECT(O(.special = true), 99, "a:", FINISH_STOP, 2, piece(A), piece(COLON));
    EXPECT(O(.ignore_end = true), 99, "a:", FINISH_NONE, 3, piece(A), piece(COLON), BOS);
    defaults = (struct model_generation){0};
    EXPECT(O(.special = false), 99, "a:", FINISH_NONE, 2, piece(A), piece(COLON));
}

static void test_stop_strings(void)
{
    EXPECT(O(STOPS("\nUser:")), 99, "ab", FINISH_STOP, 4, piece(AB), piece(NEWLINE_US), piece(ER),
           piece(COLON), piece(A));
    EXPECT(O(STOPS("\nUser:")), 99, "ab", FINISH_NONE, 3, piece(AB), piece(NEWLINE_US), piece(ER));
    EXPECT(O(STOPS("\nUser:")), 99, "ab\nUserb", FINISH_NONE, 4, piece(AB), piece(NEWLINE_US),
           piece(ER), piece(B));
    /* What was held is let go when the text is over, for whatever reason. */
    EXPECT(O(STOPS("\nUser:")), 99, "ab\nUser", FINISH_STOP, 4, piece(AB), piece(NEWLINE_US),
           piece(ER), EOS);
    EXPECT(O(STOPS("\nUser:"), .max_tokens = 3), 99, "ab\nUser", FINISH_LENGTH, 3, piece(AB),
           piece(NEWLINE_US), piece(ER));
    EXPECT(O(STOPS("\nUser:")), 5, "ab\nUser", FINISH_LENGTH, 3, piece(AB), piece(NEWLINE_US),
           piece(ER));
    /* Inside a token; and the last token allowed finds it: a stop all the same. */
    EXPECT(O(STOPS("top")), 99, "s", FINISH_STOP, 1, piece(STOP), piece(A));
    EXPECT(O(STOPS("stop"), .max_tokens = 2), 99, "", FINISH_STOP, 2, piece(S), piece(TOPP));
    EXPECT(O(STOPS("zz", "ba", "\xe2\x82\xac")), 99, "a", FINISH_STOP, 3, piece(A), piece(B),
           piece(A));
    /* An end token that is shown can be part of one. */
    EXPECT(O(STOPS("b<end_of_turn>"), .special = true), 99, "a", FINISH_STOP, 3, piece(A), piece(B),
           END_OF_TURN);
}

/* Holds back more than a token is long. */
static void test_long_stop_string(void)
{
    char stop[122] = "", text[124] = "";
    uint32_t script[62];
    const struct generation_options o = {STOPS(stop)};

    for (size_t i = 0; i < 60; i++) {
        memcpy(stop + 2 * i, "ab", 3);
        script[i] = piece(AB);
    }
    memcpy(stop + 120, "x", 2);
    memcpy(text, stop, 120);
    script[60] = EOS;
    expect(&o, 99, script, 61, text, FINISH_STOP, 61);
    script[60] = byte(0x78);
    expect(&o, 99, script, 61, "", FINISH_STOP, 61);
    memcpy(text + 120, "b", 2);
    script[60] = piece(B);
    script[61] = EOS;
    expect(&o, 99, script, 62, text, FINISH_STOP, 62);
}

static void test_characters(void)
{
    /* A euro sign and a crab in bytes: nothing until whole. play() checks each delta. */
    EXPECT(O(.max_tokens = 9), 99, "", FINISH_NONE, 2, byte(0xe2), byte(0x82));
    EXPECT(O(.max_tokens = 9), 99, "\xe2\x82\xac", FINISH_NONE, 3, byte(0xe2), byte(0x82),
           byte(0xac));
    EXPECT(O(.max_tokens = 4), 99, "\xf0\x9f\xa6\x80", FINISH_LENGTH, 4, byte(0xf0), byte(0x9f),
           byte(0xa6), byte(0x80));
    /* Cut off: one replacement character a byte. */
    EXPECT(O(.max_tokens = 2), 99, "\xef\xbf\xbd\xef\xbf\xbd", FINISH_LENGTH, 2, byte(0xf0),
           byte(0x9f));
    EXPECT(O(.max_tokens = 9), 99, "\xef\xbf\xbd\xef\xbf\xbd", FINISH_STOP, 3, byte(0xf0),
           byte(0x9f), EOS);
    EXPECT(O(.max_tokens = 9), 99,
           "\xef\xbf\xbd"
           "a",
           FINISH_NONE, 2, byte(0xc3), piece(A));
    /* A stop string that comes in bytes. */
    EXPECT(O(STOPS("\xe2\x82\xac")), 99, "a", FINISH_STOP, 4, piece(A), byte(0xe2), byte(0x82),
           byte(0xac));
}

/* Random scripts and stops against the decoder and a search, both over the whole text. */
static void test_random(void)
{
    static const char *const some[] = {"ab",           "ba b",    "\nUser:", "stop",  "bb",
                                       "\xe2\x82\xac", "abab",    "\n\n",    "b the", "a",
                                       "\xef\xbf\xbd", "\xc3\xbc"};
    uint64_t state = 3;
    size_t n_finished[5] = {0};

    for (size_t round = 0; round < 20000; round++) {
#define BELOW(n) ((state = state * 6364136223846793005u + 1442695040888963407u, state >> 33) % (n))
        uint32_t script[24], n_ctx = 3 + (uint32_t)BELOW(30);
        const char *stop[3];
        struct generation_options o = {.stop = stop, .n_stop = BELOW(4)};
        char whole[1024], *text = whole;
        size_t n = 1 + BELOW(ARRAY_SIZE(script)), n_whole = 0, longest = 0, end, limit = 0, used;
        struct decoder d = {{0}, 0};
        enum finish_reason finish = FINISH_NONE;
        bool found = false;
        struct session s = fresh(n_ctx);
        struct outcome got;

        o.max_tokens = (uint32_t)BELOW(30);
        o.special = BELOW(2);
        o.ignore_end = BELOW(3) == 0;
        for (size_t i = 0; i < o.n_stop; i++)
            stop[i] = some[BELOW(ARRAY_SIZE(some))];
        for (size_t i = 0; i < n; i++) {
            uint32_t kind = (uint32_t)BELOW(20);

            if (kind == 0)
                script[i] = (uint32_t)BELOW(FIRST_BYTE);
            else if (kind < 4)
                script[i] = byte((uint8_t[]){0xe2, 0x82, 0xac, 'a'}[BELOW(4)]);
            else
                script[i] = piece((uint32_t)BELOW(N_PIECES));
        }

        /* The whole text, as if nothing were ever held. */
        for (used = 0; used < n && finish == FINISH_NONE;) {
            uint32_t id = script[used++];
            bool ends = !o.ignore_end && tokenizer_is_end(the_tokenizer, id);

            if (!ends || o.special)
                n_whole += decoder_push(&d, the_tokenizer, id, o.special, whole + n_whole);
            if (ends)
                finish = FINISH_STOP;
            else if (used == o.max_tokens || 3 + used - 1 >= n_ctx)
                finish = FINISH_LENGTH;
            if (finish != FINISH_NONE)
                n_whole += decoder_finish(&d, whole + n_whole);

            for (end = limit + 1; end <= n_whole && !found; end++) {
                for (size_t i = 0; i < o.n_stop; i++) {
                    size_t m = strlen(stop[i]);

                    if (m <= end && memcmp(text + end - m, stop[i], m) == 0) {
                        found = true;
                        longest = MAX(longest, m);
                    }
                }
                if (found) {
                    finish = FINISH_STOP;
                    n_whole = end - longest;
                }
            }
            limit = n_whole;
        }

        {
            CLEANUP(generation_freep) struct generation *g = start(&s, &o);

            play(g, &s, script, n, &got);
        }
        assert(got.finish == finish && got.n_accepted == used);
        if (finish == FINISH_NONE) { /* some may still be held */
            assert(got.n <= n_whole && n_whole - got.n < 7);
            n_whole = got.n;
        }
        assert(got.n == n_whole && memcmp(got.text, whole, n_whole) == 0);
        n_finished[finish] += 1 + found;
    }
    assert(n_finished[FINISH_NONE] > 1000 && n_finished[FINISH_STOP] > 1000 &&
           n_finished[FINISH_LENGTH] > 1000);
}

static void test_cancel(void)
{
    struct session s = fresh(50);
    struct generation_options o = {.max_tokens = 3};
    struct generation_delta delta;
    struct generation_usage usage;
    struct generation *g;
    size_t n;

    s.n = 10; /* an earlier turn */
    g = start(&s, &o);
    assert(s.mark == 10);
    generation_usage(g, &usage);
    assert(usage.cached_tokens == 10);
    generation_cancel(g); /* before anything */
    assert(s.n == 10 && s.mark == SESSION_NO_MARK);
    assert(generation_finish(g) == FINISH_CANCELLED);
    generation_pending(g, &n);
    assert(n == 0);
    assert(!generation_free(g));

    g = start(&s, &o);
    s.n += 2; /* within the prompt */
    generation_advance(g, 2);
    generation_cancel(g);
    assert(s.n == 10 && s.mark == SESSION_NO_MARK);
    generation_free(g);

    g = start(&s, &o);
    evaluate(g, &s, 9);
    assert(accept_token(g, piece(A), &delta) == 0);
    evaluate(g, &s, 9);
    assert(s.n == 14);
    generation_cancel(g);
    assert(s.n == 10);
    s.n = 11; /* the session's next user; a second cancel is nobody's business */
    generation_cancel(g);
    assert(s.n == 11);
    generation_free(g);

    g = start(&s, &o);
    evaluate(g, &s, 9);
    assert(accept_token(g, EOS, &delta) == 0);
    assert(delta.finish == FINISH_STOP);
    generation_cancel(g); /* too late: it stands */
    assert(s.n == 14 && generation_finish(g) == FINISH_STOP);
    generation_free(g);

    g = start(&s, &o);
    assert(s.mark == 14);
    generation_free(g); /* dropped without a word: the session keeps what it has */
    assert(s.n == 14 && s.mark == SESSION_NO_MARK);
    assert(!generation_free(NULL));
}

static void test_no_finite_logit(void)
{
    struct session s = fresh(50);
    CLEANUP(generation_freep)
    struct generation *g = start(&s, &(struct generation_options){.max_tokens = 3});
    struct generation_delta delta;
    float logits[N_VOCAB];
    size_t n;

    for (size_t i = 0; i < N_VOCAB; i++)
        logits[i] = NAN;
    evaluate(g, &s, 9);
    assert(generation_accept(g, logits, &delta) == -EDOM);
    assert(generation_finish(g) == FINISH_ERROR && s.mark == SESSION_NO_MARK);
    generation_pending(g, &n);
    assert(n == 0);
    generation_cancel(g);
    assert(generation_finish(g) == FINISH_ERROR && s.n == 3);
}

/* Penalties see earlier turns, the prompt and the answer alike. */
static void test_penalties(void)
{
    for (uint32_t earlier = 0; earlier < 2; earlier++) {
        struct session s = fresh(50);
        struct generation_options o = {.sampler = {.presence_penalty = 2}, .logprobs = true};
        CLEANUP(generation_freep) struct generation *g = NULL;
        struct generation_delta delta;
        float logits[N_VOCAB] = {0};

        if (earlier)
            s.tokens[s.n++] = piece(STOP);
        g = start(&s, &o);
        evaluate(g, &s, 9);
        logits[piece(A)] = 5; /* in the prompt */
        logits[piece(STOP)] = 4.5f;
        logits[piece(THE)] = 4;
        assert(generation_accept(g, logits, &delta) == 0);
        assert(delta.sample.id == piece(earlier ? THE : STOP));
        assert(delta.sample.logprob < 0); /* NaN is not */
        evaluate(g, &s, 9);
        assert(generation_accept(g, logits, &delta) == 0);
        assert(delta.sample.id == piece(earlier ? A : THE));
    }
}

static void refuse(const uint32_t *ids, size_t n, const struct generation_options *o, int code,
                   const char *message)
{
    struct session s = fresh(20);
    struct generation *g = NULL;
    struct error err = {""};

    s.n = 15;
    assert(generation_new(&g, &s, ids, n, o, &err) == -code);
    if (strcmp(err.text, message) != 0)
        fprintf(stderr, "%s\n", err.text);
    assert(strcmp(err.text, message) == 0);
    assert(!g && s.mark == SESSION_NO_MARK && s.n == 15);
    assert(generation_new(&g, &s, ids, n, o, NULL) == -code);
}

static void test_refusals(void)
{
    const struct tokenizer *t = the_tokenizer;
    struct generation_options none = {0}, hot = {.sampler = {.temperature = -1}};
    struct generation_options empty = {STOPS("a", "")}, half = {STOPS("\xe2\x82")};
    uint32_t ids[6] = {0, 1, 2, 3, 4, N_VOCAB};

    refuse(ids, 0, &none, EINVAL, "prompt: no tokens");
    refuse(ids + 5, 1, &none, EINVAL, "prompt: token 278 at 0: the vocabulary ends at 277");
    ids[5] = 5;
    refuse(ids, 6, &none, EMSGSIZE, "prompt: 6 tokens do not fit: the context has 5 of 20 free");
    refuse(ids, 1, &hot, EINVAL, "temperature is -1: 0 or between 0.01 and 100 expected");
    refuse(ids, 1, &empty, EINVAL, "stop: string 2 is empty");
    refuse(ids, 1, &half, EINVAL, "stop: string 1 is not valid UTF-8");
    the_tokenizer = NULL;
    empty.n_stop = 1;
    refuse(ids, 1, &empty, EINVAL, "stop: the model has no tokenizer, so there is no text");
    the_tokenizer = t;
}

/* Ids in, ids out. */
static void test_without_tokenizer(void)
{
    const struct tokenizer *t = the_tokenizer;

    the_tokenizer = NULL;
    defaults = (struct model_generation){.n_stop_ids = 1, .stop_ids = {EOS}};
    EXPECT(O(.max_tokens = 9), 99, "", FINISH_STOP, 3, piece(A), END_OF_TURN, EOS);
    EXPECT(O(.max_tokens = 2), 99, "", FINISH_LENGTH, 2, piece(A), piece(A));
    defaults = (struct model_generation){0};
    the_tokenizer = t;
}

static void test_allocation(void)
{
    struct generation_options o = {STOPS("not in", "the vocabulary"), .ignore_end = true,
                                   .sampler = {.temperature = 1, .frequency_penalty = 1}};
    struct session s = fresh(99);
    struct generation *g;
    struct error err;
    size_t needed;

    n_allocations = 0;
    g = start(&s, &o);
    needed = n_allocations;
    assert(needed > 10);
    n_allocations = 0; /* none of the 50 tokens that follow needs any */
    for (size_t i = 0; i < 50; i++) {
        struct generation_delta delta;

        evaluate(g, &s, 9);
        assert(accept_token(g, piece(A), &delta) == 0);
    }
    assert(n_allocations == 0);
    generation_free(g);

    s = fresh(99);
    for (size_t i = 0; i < needed; i++) {
        n_allocations = 0;
        fail_at = i;
        err.text[0] = 0;
        assert(generation_new(&g, &s, prompt, 3, &o, &err) == -ENOMEM);
        assert(strcmp(err.text, "out of memory") == 0);
        assert(s.mark == SESSION_NO_MARK);
    }
    fail_at = SIZE_MAX;
}

static void test_names(void)
{
    assert(strcmp(finish_reason_name(FINISH_STOP), "stop") == 0);
    assert(strcmp(finish_reason_name(FINISH_LENGTH), "length") == 0);
    assert(strcmp(finish_reason_name(FINISH_CANCELLED), "cancelled") == 0);
    assert(strcmp(finish_reason_name(FINISH_ERROR), "error") == 0);
    assert(strcmp(finish_reason_name(FINISH_NONE), "none") == 0);
}

int main(void)
{
    struct tokenizer *t = make_tokenizer();

    the_tokenizer = t;
    config.vocab_size = N_VOCAB;
    test_names();
    test_ends();
    test_stop_strings();
    test_long_stop_string();
    test_characters();
    test_random();
    test_cancel();
    test_no_finite_logit();
    test_penalties();
    test_refusals();
    test_without_tokenizer();
    test_allocation();
    tokenizer_free(t);
    return 0;
}
