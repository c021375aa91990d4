/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A generation is cut off at every point between two steps, and goes on in another engine with
 * copies of what was in memory then: the text, the tokens and their logprobs are those of one that
 * was left alone.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/engine.h"
#include "engine/generation.h"
#include "engine/model.h"
#include "tests/chat-model.h"
#include "tests/must.h"

#define WINDOW 70
#define CONTEXT 1024u
#define ROWS 48u
#define MOST 64 /* tokens of an answer */
#define N_BEFORE 230u
#define N_PROMPT 100u

static struct model *model;

/* What a client got. */
struct answer {
    uint32_t tokens[MOST];
    float logprobs[MOST], entropies[MOST];
    uint32_t n;
    size_t text_at[MOST]; /* bytes of text before each token's */
    char text[4096];
    size_t n_text;
    enum finish_reason finish;
    struct generation_usage usage;
};

/* Everything that outlives a process, as it was at one moment. */
struct moment {
    int kv_fd; /* -1: lost */
    void *memory[2];
    uint32_t n_sampled;
    struct generation_state state;
};

struct play {
    struct engine *e;
    struct session *s, *other; /* other shares pages with s */
    void *memory[2];
    struct generation *g;
    struct answer answer;
    struct generation_state state;
};

static struct engine *engine_with(int fd)
{
    struct engine_options o = {.n_threads = 1,
                               .max_rows = ROWS,
                               .kv_bytes = (uint64_t)3 << 20,
                               .has_kv_fd = fd >= 0,
                               .kv_fd = fd};
    struct engine *e;

    e = must_engine(model, &o);
    assert(engine_kv_adopted(e) == (fd >= 0));
    return e;
}

static void *new_memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    assert(p != MAP_FAILED);
    return p;
}

/* A file of the same contents and seals. */
static int copy_of(int fd)
{
    int copy = memfd_create("copy", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    char *from, *to;
    struct stat st;
    off_t at = 0, end;

    assert(copy >= 0 && fstat(fd, &st) == 0 && ftruncate(copy, st.st_size) == 0);
    from = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    to = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, copy, 0);
    assert(from != MAP_FAILED && to != MAP_FAILED);
    while ((at = lseek(fd, at, SEEK_DATA)) >= 0) {
        end = lseek(fd, at, SEEK_HOLE);
        memcpy(to + at, from + at, (size_t)(end - at));
        at = end;
    }
    munmap(from, (size_t)st.st_size);
    munmap(to, (size_t)st.st_size);
    assert(fcntl(copy, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    return copy;
}

static void take_moment(const struct play *p, bool with_kv, struct moment *ret)
{
    size_t bytes = session_memory_bytes(model_config(engine_model(p->e)), CONTEXT);

    ret->kv_fd = with_kv ? copy_of(engine_kv_fd(p->e)) : -1;
    for (int i = 0; i < 2; i++) {
        ret->memory[i] = new_memory(bytes);
        memcpy(ret->memory[i], p->memory[i], bytes);
    }
    ret->n_sampled = p->answer.n;
    ret->state = p->state;
}

static uint32_t token_at(uint32_t seed, uint32_t i)
{
    return 4 + (seed * 7919 + i * i * 31 + i) % 256;
}

static uint32_t *tokens_of(uint32_t seed, uint32_t n)
{
    uint32_t *t = calloc(n, sizeof(*t));

    for (uint32_t i = 0; i < n; i++)
        t[i] = token_at(seed, i);
    return t;
}

/* The next step of the generation. False: it was the last. */
static bool step(struct play *p, uint32_t chunk, bool *ret_accepted, const float **ret_logits)
{
    size_t n;
    const uint32_t *pending = generation_pending(p->g, &n);
    uint32_t missing = session_n_missing(p->s);
    struct step_item item = {.session = p->s};

    *ret_logits = NULL;
    if (missing > 0) {
        item.n_tokens = MIN(missing, chunk);
    } else {
        item.tokens = pending;
        item.n_tokens = (uint32_t)MIN(n, (size_t)chunk);
        item.wanted = item.n_tokens == n ? LOGITS_LAST : LOGITS_NONE;
    }
    assert(engine_step(p->e, &item, 1) == 0 && item.ret_error == 0);
    if (item.tokens)
        generation_advance(p->g, item.n_tokens);
    *ret_logits = item.ret_logits;
    *ret_accepted = item.ret_logits != NULL;
    return true;
}

static void accept(struct play *p, const float *logits)
{
    struct answer *a = &p->answer;
    struct generation_delta d;

    assert(generation_accept(p->g, logits, &d) == 0);
    assert(a->n < MOST);
    a->tokens[a->n] = d.sample.id;
    a->logprobs[a->n] = d.sample.logprob;
    a->entropies[a->n] = d.sample.entropy;
    a->text_at[a->n++] = a->n_text;
    memcpy(a->text + a->n_text, d.text, d.n);
    a->n_text += d.n;
    a->finish = d.finish;
    generation_get_state(p->g, &p->state);
    generation_usage(p->g, &a->usage);
}

static struct session *adopt(struct engine *e, void *memory)
{
    struct error err = {""};
    struct session *s;

    if (session_adopt(&s, e, CONTEXT, memory, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return s;
}

/* Goes on from a moment to the end, and compares. */
static void go_on(struct moment *m, const struct answer *want, const uint32_t *prompt,
                  const struct generation_options *o)
{
    struct play p = {.e = engine_with(m->kv_fd), .memory = {m->memory[0], m->memory[1]}};
    size_t bytes = session_memory_bytes(model_config(engine_model(p.e)), CONTEXT);
    struct error err = {""};
    bool accepted;

    p.s = adopt(p.e, p.memory[0]);
    p.other = adopt(p.e, p.memory[1]);
    assert(m->kv_fd >= 0 || session_n_missing(p.s) == session_n_tokens(p.s));
    engine_adopted(p.e);
    if (generation_resume(&p.g, p.s, N_BEFORE, prompt, N_PROMPT, want->tokens, m->n_sampled, o,
                          &m->state, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    p.answer.n = m->n_sampled;
    if (m->n_sampled == want->n) {
        assert(generation_finish(p.g) == want->finish);
    } else {
        const float *l;

        memcpy(p.answer.text, want->text, want->text_at[m->n_sampled]);
        p.answer.n_text = want->text_at[m->n_sampled];
        while (generation_finish(p.g) == FINISH_NONE) {
            step(&p, 17, &accepted, &l);
            if (accepted)
                accept(&p, l);
        }
        assert(p.answer.finish == want->finish && p.answer.n_text == want->n_text);
        assert(memcmp(p.answer.text, want->text, want->n_text) == 0);
        for (uint32_t i = m->n_sampled; i < want->n; i++)
            assert(memcmp(&p.answer.logprobs[i], &want->logprobs[i], sizeof(float)) == 0 &&
                   memcmp(&p.answer.entropies[i], &want->entropies[i], sizeof(float)) == 0 &&
                   p.answer.tokens[i] == want->tokens[i]);
        assert(memcmp(&p.answer.usage, &want->usage, sizeof(want->usage)) == 0);
    }
    assert(p.answer.n == want->n);
    assert(session_n_tokens(p.s) == N_BEFORE + N_PROMPT + want->n - 1);
    generation_free(p.g);
    session_free(p.s);
    session_free(p.other);
    engine_free(p.e);
    for (int i = 0; i < 2; i++)
        munmap(m->memory[i], bytes);
    if (m->kv_fd >= 0)
        close(m->kv_fd);
}

enum start {
    START_PLAIN,
    START_REWOUND, /* the session was longer once */
    START_DROPPED, /* all K and V are missing at first */
    START_NO_POOL, /* and the pool is lost with the process */
    N_STARTS,
};

/* A request on a session of N_BEFORE tokens, half of them shared with another one. */
static void begin(struct play *p, enum start start, const struct generation_options *o)
{
    CLEANUP(freep) uint32_t *before = tokens_of(1, N_BEFORE), *prompt = tokens_of(2, N_PROMPT);
    struct error err = {""};

    *p = (struct play){.e = engine_with(-1)};
    for (int i = 0; i < 2; i++)
        p->memory[i] = new_memory(session_memory_bytes(model_config(engine_model(p->e)), CONTEXT));
    assert(session_new(&p->other, p->e, CONTEXT, p->memory[1]) == 0);
    assert(session_eval(p->other, before, N_BEFORE / 2, NULL) == 0);
    assert(session_fork(&p->s, p->other, p->memory[0]) == 0);
    assert(session_eval(p->s, before + N_BEFORE / 2, N_BEFORE - N_BEFORE / 2, NULL) == 0);
    assert(session_eval(p->other, before, 50, NULL) == 0);
    if (start == START_REWOUND) {
        assert(session_eval(p->s, before, 60, NULL) == 0);
        session_rewind(p->s, N_BEFORE);
    } else if (start == START_DROPPED) {
        session_drop_kv(p->s);
    }
    if (generation_new(&p->g, p->s, prompt, N_PROMPT, o, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    generation_get_state(p->g, &p->state);
}

static void end(struct play *p)
{
    size_t bytes = session_memory_bytes(model_config(engine_model(p->e)), CONTEXT);

    generation_free(p->g);
    session_free(p->s);
    session_free(p->other);
    engine_free(p->e);
    for (int i = 0; i < 2; i++)
        munmap(p->memory[i], bytes);
}

/* Runs it once alone; then again, cut off at each point. Returns the points. */
static uint32_t check(enum start start, const struct generation_options *o, struct answer *ret)
{
    CLEANUP(freep) uint32_t *prompt = tokens_of(2, N_PROMPT);
    struct answer want;
    struct play p;
    const float *l;
    bool accepted;
    uint32_t n = 0;

    begin(&p, start, o);
    while (generation_finish(p.g) == FINISH_NONE) {
        step(&p, 17, &accepted, &l);
        if (accepted)
            accept(&p, l);
    }
    want = p.answer;
    end(&p);

    begin(&p, start, o);
    for (bool over = false; !over; n++) {
        struct moment m;

        take_moment(&p, start != START_NO_POOL, &m); /* between two tokens, or chunks */
        go_on(&m, &want, prompt, o);
        over = generation_finish(p.g) != FINISH_NONE;
        if (over)
            break;
        step(&p, 17, &accepted, &l);
        if (accepted) {
            take_moment(&p, start != START_NO_POOL, &m); /* computed, not yet sampled */
            go_on(&m, &want, prompt, o);
            accept(&p, l);
        }
    }
    assert(p.answer.n == want.n && p.answer.n_text == want.n_text);
    end(&p);
    *ret = want;
    return n;
}

static void check_all(void)
{
    static const struct logit_bias bias[] = {{.id = 1, .bias = -INFINITY}, {.id = 40, .bias = 2}};
    struct generation_options plain = {.max_tokens = 30, .ignore_end = true},
                              rich = {.sampler = {.temperature = 1.3f,
                                                  .top_k = 100,
                                                  .top_p = 0.95f,
                                                  .repetition_penalty = 1.2f,
                                                  .presence_penalty = 0.4f,
                                                  .frequency_penalty = 0.3f,
                                                  .penalty_last_n = 90,
                                                  .seed = 11,
                                                  .bias = bias,
                                                  .n_bias = ARRAY_SIZE(bias),
                                                  .n_logprobs = 3},
                                      .max_tokens = 45,
                                      .logprobs = true,
                                      .ignore_end = true};
    struct answer a;
    uint32_t n = 0;

    for (int start = 0; start < N_STARTS; start++) {
        n += check((enum start)start, &plain, &a);
        assert(a.n == 30 && a.finish == FINISH_LENGTH);
    }
    for (int start = 0; start < N_STARTS; start += 2)
        n += check((enum start)start, &rich, &a);
    assert(a.n == 45);

    /* A stop string that begins in one token, ends in another, and has been held back between. */
    {
        size_t first = a.text_at[20], length = 0;
        char stop[8] = "";
        const char *stops[2] = {"never seen in it", stop};
        struct answer b;

        /* whole characters only */
        while (first < a.n_text && (a.text[first] & 0xc0) == 0x80)
            first++;
        do
            length++;
        while (length < 6 && (length < 3 || (a.text[first + length] & 0xc0) == 0x80));
        memcpy(stop, a.text + first, length);
        rich.stop = stops;
        rich.n_stop = 2;
        n += check(START_PLAIN, &rich, &b);
        assert(b.finish == FINISH_STOP && b.n < a.n && b.n_text <= first);
        assert(memcmp(a.text, b.text, b.n_text) == 0);
    }
    printf("%u points\n", n);
}

static void refuse(struct play *p, uint32_t start, const uint32_t *prompt, size_t n_prompt,
                   const uint32_t *sampled, size_t n_sampled, const struct generation_options *o,
                   const struct generation_state *state, int code)
{
    uint32_t n = session_n_tokens(p->s);
    struct error err = {""};
    struct generation *g;

    assert(generation_resume(&g, p->s, start, prompt, n_prompt, sampled, n_sampled, o, state,
                             &err) == code);
    assert(err.text[0] && session_n_tokens(p->s) == n);
}

/* What a damaged record may say. */
static void check_refused(void)
{
    CLEANUP(freep) uint32_t *prompt = tokens_of(2, N_PROMPT), *others = tokens_of(3, N_PROMPT);
    struct generation_options o = {.max_tokens = 10, .ignore_end = true};
    struct generation_state state;
    struct play p;
    uint32_t *t, wrong[4];
    const float *l;
    bool accepted;

    begin(&p, START_PLAIN, &o);
    while (p.answer.n < 4) {
        step(&p, 17, &accepted, &l);
        if (accepted)
            accept(&p, l);
    }
    t = p.answer.tokens;
    refuse(&p, 1000, prompt, N_PROMPT, t, 4, &o, &p.state, -EINVAL);
    refuse(&p, N_BEFORE - 1, prompt, N_PROMPT, t, 4, &o, &p.state, -EINVAL);
    refuse(&p, N_BEFORE, others, N_PROMPT, t, 4, &o, &p.state, -EINVAL);
    refuse(&p, N_BEFORE, prompt, 0, t, 4, &o, &p.state, -EINVAL);
    refuse(&p, N_BEFORE, prompt, N_PROMPT, t, 3, &o, &p.state, -EINVAL);
    memcpy(wrong, t, sizeof(wrong));
    wrong[1] ^= 1;
    refuse(&p, N_BEFORE, prompt, N_PROMPT, wrong, 4, &o, &p.state, -EINVAL);
    wrong[1] = 100000;
    refuse(&p, N_BEFORE, prompt, N_PROMPT, wrong, 4, &o, &p.state, -EINVAL);
    state = p.state;
    memset(state.words, 0, 4 * sizeof(state.words[0]));
    refuse(&p, N_BEFORE, prompt, N_PROMPT, t, 4, &o, &state, -EINVAL);
    memset(&state, 0, sizeof(state));
    refuse(&p, N_BEFORE, prompt, N_PROMPT, t, 4, &o, &state, -EINVAL);
    o.max_tokens = 3; /* it would have ended */
    refuse(&p, N_BEFORE, prompt, N_PROMPT, t, 4, &o, &p.state, -EINVAL);
    end(&p);
}

int main(int argc, char **argv)
{

    assert(argc == 2);
    chat_model_write(argv[1], WINDOW, CONTEXT);
    model = must_open(argv[1]);
    check_all();
    check_refused();
    model_free(model);
    unlink(argv[1]);
    return 0;
}
