/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A machine that exists in numbers only: it says what a step takes by a formula, and clients
 * generate, wait, come and go on it. No clock is read and nothing is random but what a fixed seed
 * gives, so that what is asserted about shares and times holds or does not.
 */

#undef NDEBUG
#include "engine/scheduler.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

#define MOST_CLIENTS 400

/* ---- allocations, counted and made to fail ---- */

void *__real_calloc(size_t n, size_t size);
void *__real_reallocarray(void *p, size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_reallocarray(void *p, size_t n, size_t size);

/* volatile: the optimiser knows calloc() and that it would not touch them. fail_at: the so many-th
 * from now, 0: none */
static volatile unsigned n_allocations, fail_at;

static bool fails(void)
{
    n_allocations++;
    return fail_at > 0 && --fail_at == 0;
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_reallocarray(void *p, size_t n, size_t size)
{
    return fails() ? NULL : __real_reallocarray(p, n, size);
}

static uint64_t state = 1;

static uint32_t below(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

/* ---- the machine and its clients ---- */

/* Microseconds. Memory has to be read once a step, meanwhile rows are computed. */
struct machine {
    double base, decode, prompt; /* the step, each row */
    double read;                 /* at least so long */
    uint32_t noise_percent;
};

static const struct machine slow = {.base = 90000, .decode = 10000, .prompt = 12000};
static const struct machine fast = {.base = 900, .decode = 50, .prompt = 60};
static const struct machine reading = {.decode = 11000, .prompt = 11000, .read = 100000};

static double takes(const struct machine *m, uint32_t n_decoding, uint32_t n_prompt)
{
    double usec = m->base + m->decode * n_decoding + m->prompt * n_prompt;

    usec = MAX(usec, m->read);
    if (m->noise_percent > 0)
        usec *= 1 + below(2 * m->noise_percent + 1) / 100.0 - m->noise_percent / 100.0;
    return usec;
}

struct client {
    struct scheduler_task task;
    bool is_added, is_running;
    /* what it asks for, again and again; answer 0: decodes for ever */
    uint32_t prompt, answer, pause; /* tokens, steps */
    uint32_t left, waits;

    uint64_t decoded, prompt_rows, requests;
    double usec; /* of steps it was in with a prompt: its part beyond the decoding */
};

struct world {
    struct scheduler *s;
    const struct machine *m;
    struct scheduler_options o;
    struct client c[MOST_CLIENTS];
    size_t n;
    double now;
    /* of the last step */
    uint32_t n_decoding, n_prompt;
    double took;
};

static void world_init(struct world *w, const struct machine *m, uint32_t max_rows,
                       uint32_t max_logits)
{
    *w = (struct world){.m = m, .o = {.max_rows = max_rows, .max_logits = max_logits}};
    assert(scheduler_new(&w->s, &w->o) == 0);
}

static struct client *client(struct world *w, uint64_t account, enum scheduler_class class,
                             uint32_t prompt, uint32_t answer, uint32_t pause)
{
    struct client *c = &w->c[w->n++];

    assert(w->n <= MOST_CLIENTS);
    *c = (struct client){.prompt = prompt, .answer = answer, .pause = pause};
    c->task = (struct scheduler_task){.account = account, .flow = w->n, .class = class, .lanes = 1};
    return c;
}

static void ask(struct world *w, struct client *c)
{
    c->task.n_pending = c->prompt;
    c->task.is_prompt = true;
    c->left = c->answer;
    assert(scheduler_add(w->s, &c->task) == 0);
    c->is_added = true;
    c->is_running = false;
}

static void leave(struct world *w, struct client *c)
{
    scheduler_remove(w->s, &c->task);
    c->is_added = c->is_running = false;
    c->waits = c->pause;
}

static void world_done(struct world *w)
{
    for (size_t i = 0; i < w->n; i++)
        if (w->c[i].is_added)
            leave(w, &w->c[i]);
    w->s = scheduler_free(w->s);
}

/* One step of all that came; those with a pause of UINT32_MAX ask when the test says so. */
static size_t step(struct world *w)
{
    struct scheduler_pick picks[MOST_CLIENTS];
    struct scheduler_task *t;
    unsigned allocations;
    uint32_t rows = 0, logits = 0;
    size_t n;

    for (size_t i = 0; i < w->n; i++) {
        struct client *c = &w->c[i];

        if (c->is_added || c->pause == UINT32_MAX)
            continue;
        if (c->waits > 0)
            c->waits--;
        else
            ask(w, c);
    }
    allocations = n_allocations;
    while ((t = scheduler_admit(w->s, UINT64_MAX)))
        ((struct client *)t)->is_running = true;
    n = scheduler_choose(w->s, 0, picks, MOST_CLIENTS);

    w->n_decoding = w->n_prompt = 0;
    for (size_t i = 0; i < n; i++) {
        const struct client *c = (struct client *)picks[i].task;

        assert(c->is_running && !c->task.is_blocked);
        assert(picks[i].n_rows >= 1 && picks[i].n_rows <= c->task.n_pending);
        for (size_t k = 0; k < i; k++)
            assert(picks[k].task != picks[i].task);
        rows += picks[i].n_rows;
        logits += picks[i].n_rows == c->task.n_pending;
        if (c->task.n_pending == 1)
            w->n_decoding++;
        else
            w->n_prompt += picks[i].n_rows;
    }
    assert(rows <= w->o.max_rows && logits <= w->o.max_logits);
    if (n == 0) {
        w->now += 1000;
        return 0;
    }
    w->took = takes(w->m, w->n_decoding, w->n_prompt);
    w->now += w->took;
    scheduler_account(w->s, 0, picks, n, (uint64_t)w->took);
    assert(n_allocations == allocations);

    for (size_t i = 0; i < n; i++) {
        struct client *c = (struct client *)picks[i].task;

        if (c->task.is_prompt) {
            c->prompt_rows += picks[i].n_rows;
            if (c->task.n_pending > 1)
                c->usec += (w->took - (w->n_decoding ? takes(w->m, w->n_decoding, 0) : 0)) *
                           picks[i].n_rows / w->n_prompt;
        } else {
            c->decoded++;
        }
        c->task.n_pending -= picks[i].n_rows;
        if (c->task.n_pending > 0)
            continue;
        c->task.is_prompt = false;
        c->task.n_pending = 1;
        if (c->answer > 0 && c->left-- == 0) {
            c->requests++;
            leave(w, c);
        }
    }
    return n;
}

static void steps(struct world *w, int n)
{
    for (int i = 0; i < n; i++)
        step(w);
}

static double decoded_by(const struct world *w, uint64_t account)
{
    double n = 0;

    for (size_t i = 0; i < w->n; i++)
        if (w->c[i].task.account == account)
            n += (double)w->c[i].decoded;
    return n;
}

/* Of what accounts 1 and 2 decoded. */
static double part_of_1(const struct world *w)
{
    return decoded_by(w, 1) / (decoded_by(w, 1) + decoded_by(w, 2));
}

static void forget_counts(struct world *w)
{
    for (size_t i = 0; i < w->n; i++)
        w->c[i].decoded = w->c[i].prompt_rows = 0;
}

static void near(double got, double want, double tolerance, const char *what)
{
    printf("%-50s %8.4f (%.4f)\n", what, got, want);
    fflush(stdout);
    assert(got >= want - tolerance && got <= want + tolerance);
}

/* ---- shares ---- */

static void check_one_against_seven(const struct machine *m)
{
    struct world w;

    world_init(&w, m, 256, 16);
    for (int i = 0; i < 8; i++)
        client(&w, i == 0 ? 1 : 2, CLASS_INTERACTIVE, 1, 0, 0);
    steps(&w, 1000);
    near(part_of_1(&w), 0.5, 0.01, "1 against 7, endless");
    for (int i = 2; i < 8; i++) /* flows of an account are equal */
        assert(w.c[i].decoded + 2 >= w.c[1].decoded && w.c[i].decoded <= w.c[1].decoded + 2);
    world_done(&w);

    /* A flow with three tasks has no more than one with one. */
    world_init(&w, m, 256, 16);
    for (int i = 0; i < 4; i++)
        client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0)->task.flow = MIN(i, 1);
    steps(&w, 1000);
    near((double)w.c[0].decoded / decoded_by(&w, 1), 0.5, 0.02, "flows of one and three tasks");
    world_done(&w);

    /* Requests as programs make them: the next one some steps after the last one's end. */
    for (uint32_t pause = 0; pause < 4; pause++) {
        world_init(&w, m, 256, 16);
        for (int i = 0; i < 8; i++)
            client(&w, i == 0 ? 1 : 2, CLASS_INTERACTIVE, 30, 64, pause);
        steps(&w, 4000);
        near(part_of_1(&w), 0.5, 0.05, "1 against 7, requests of 30 and 64 tokens");
        world_done(&w);
    }
}

static void check_weights(void)
{
    struct world w;

    world_init(&w, &slow, 256, 16);
    assert(scheduler_set_weight(w.s, 1, 300) == 0);
    for (int i = 0; i < 16; i++)
        client(&w, i < 4 ? 1 : 2, CLASS_INTERACTIVE, 1, 0, 0);
    steps(&w, 1000);
    near(part_of_1(&w), 0.75, 0.01, "weights 300 and 100");

    assert(scheduler_set_weight(w.s, 1, 100) == 0);
    assert(scheduler_set_weight(w.s, 2, 1900) == 0);
    steps(&w, 200);
    forget_counts(&w);
    steps(&w, 1000);
    near(part_of_1(&w), 0.05, 0.01, "weights 100 and 1900");
    world_done(&w);

    /* Prompts as well: beside each other, both always have some. */
    world_init(&w, &slow, 256, 16);
    assert(scheduler_set_weight(w.s, 1, 200) == 0);
    client(&w, 1, CLASS_INTERACTIVE, 500, 1, 0);
    client(&w, 2, CLASS_INTERACTIVE, 500, 1, 0);
    steps(&w, 3000);
    near((double)w.c[0].prompt_rows / (double)(w.c[0].prompt_rows + w.c[1].prompt_rows), 0.667,
         0.03, "prompts, weights 200 and 100");
    world_done(&w);

    /* A prompt beside decoding is passed over for that as well. */
    world_init(&w, &slow, 256, 16);
    assert(scheduler_set_weight(w.s, 1, 1000) == 0);
    client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
    client(&w, 2, CLASS_INTERACTIVE, 100000, 1, 0);
    steps(&w, 2000);
    near(w.c[1].usec / w.now, 1 / 11.0, 0.01, "time of a prompt beside ten times the weight");
    world_done(&w);

    /* Idle tasks' weights, of before and after there were any. */
    world_init(&w, &slow, 256, 16);
    assert(scheduler_set_weight(w.s, 1, 300) == 0);
    for (int i = 0; i < 16; i++)
        client(&w, i < 4 ? 1 : 2, CLASS_IDLE, 1, 0, 0);
    steps(&w, 1000);
    near(part_of_1(&w), 0.75, 0.01, "idle, weights 300 and 100");
    assert(scheduler_set_weight(w.s, 2, 900) == 0);
    steps(&w, 100);
    forget_counts(&w);
    steps(&w, 1000);
    near(part_of_1(&w), 0.25, 0.01, "idle, weights 300 and 900");
    world_done(&w);
}

static void check_batch_and_idle(void)
{
    struct client *c[3];
    struct world w;

    world_init(&w, &slow, 256, 16);
    client(&w, 1, CLASS_BATCH, 1, 0, 0);
    client(&w, 2, CLASS_INTERACTIVE, 1, 0, 0);
    steps(&w, 1000);
    near(part_of_1(&w), 0.2, 0.02, "an account with batch only");
    client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0); /* whoever runs both has no less for it */
    steps(&w, 100);
    forget_counts(&w);
    steps(&w, 1000);
    near(part_of_1(&w), 0.5, 0.02, "an account with both");
    near((double)w.c[0].decoded / decoded_by(&w, 1), 0.2, 0.02, "batch within an account");
    world_done(&w);

    world_init(&w, &slow, 256, 16);
    client(&w, 1, CLASS_BATCH, 1, 4, 0); /* who comes anew is not a new one */
    client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
    steps(&w, 2000);
    near((double)(w.c[0].decoded + w.c[0].prompt_rows) / (double)w.c[1].decoded, 0.25, 0.03,
         "batch within an account, short requests");
    world_done(&w);

    world_init(&w, &slow, 256, 16);
    c[0] = client(&w, 1, CLASS_IDLE, 200, 0, 0);
    c[1] = client(&w, 2, CLASS_BATCH, 1, 0, UINT32_MAX);
    c[2] = client(&w, 3, CLASS_IDLE, 1, 0, 0);
    steps(&w, 100);
    assert(c[0]->decoded > 50 && c[2]->decoded > 90);
    near((double)c[2]->decoded, (double)(c[0]->decoded + 100 - c[0]->decoded), 6, "idle tasks");
    ask(&w, c[1]);
    forget_counts(&w);
    steps(&w, 100);
    assert(c[0]->decoded == 0 && c[2]->decoded == 0 && c[1]->decoded >= 99);
    c[1]->task.is_blocked = true;
    steps(&w, 100);
    assert(c[0]->decoded == 100 && c[2]->decoded == 100);
    c[1]->task.is_blocked = false;
    steps(&w, 100);
    assert(c[0]->decoded == 100 && c[2]->decoded == 100);
    /* What was done while nobody else wanted to is no debt: the account is as others are. */
    forget_counts(&w);
    client(&w, 1, CLASS_BATCH, 1, 0, 0);
    steps(&w, 200);
    near((double)w.c[3].decoded, 200, 6, "after idle work");
    world_done(&w);
}

static void check_absence(void)
{
    struct client *away, *there[7];
    struct world w;
    uint64_t others;

    world_init(&w, &slow, 256, 16);
    away = client(&w, 1, CLASS_INTERACTIVE, 1, 0, UINT32_MAX);
    ask(&w, away);
    for (int i = 0; i < 7; i++)
        there[i] = client(&w, 2, CLASS_INTERACTIVE, 1, 0, 0);
    steps(&w, 100);
    leave(&w, away);
    steps(&w, 1000);
    assert(there[0]->decoded > 1000); /* all of it is theirs meanwhile */
    forget_counts(&w);
    ask(&w, away);
    steps(&w, 20);
    others = (uint64_t)decoded_by(&w, 2);
    assert(others >= 15 && others <= 26 && away->decoded >= 19);

    /* Nor while its reader sleeps, and it holds nobody back. */
    away->task.is_blocked = true;
    forget_counts(&w);
    steps(&w, 500);
    assert(away->decoded == 0 && decoded_by(&w, 2) > 3490);
    away->task.is_blocked = false;
    forget_counts(&w);
    steps(&w, 20);
    others = (uint64_t)decoded_by(&w, 2);
    assert(others >= 15 && others <= 26 && away->decoded == 20);

    /* Nor while nothing is pending. */
    away->task.n_pending = 0;
    forget_counts(&w);
    steps(&w, 500);
    assert(away->decoded == 0 && decoded_by(&w, 2) > 3490);
    away->task.n_pending = 1;
    world_done(&w);

    /* Both away, at different times: when they come back together nobody is ahead. */
    world_init(&w, &slow, 256, 16);
    for (int i = 0; i < 2; i++) {
        client(&w, (uint64_t)i + 1, CLASS_INTERACTIVE, 1, 0, UINT32_MAX);
        client(&w, (uint64_t)i + 1, CLASS_INTERACTIVE, 1, 0, UINT32_MAX);
    }
    ask(&w, &w.c[0]);
    steps(&w, 500);
    leave(&w, &w.c[0]);
    steps(&w, 100);
    for (int i = 0; i < 4; i++)
        ask(&w, &w.c[i]);
    forget_counts(&w);
    steps(&w, 20);
    near(part_of_1(&w), 0.5, 0.03, "together after different absences");
    world_done(&w);

    /* Nor when neither of them was the last that had something to do. */
    world_init(&w, &slow, 256, 16);
    for (uint32_t i = 1; i <= 3; i++)
        client(&w, i, CLASS_INTERACTIVE, 1, 0, UINT32_MAX);
    assert(scheduler_set_weight(w.s, 1, 101) == 0); /* it is remembered for ever */
    ask(&w, &w.c[0]);
    steps(&w, 500);
    leave(&w, &w.c[0]);
    ask(&w, &w.c[2]);
    steps(&w, 30);
    leave(&w, &w.c[2]);
    for (int i = 0; i < 2; i++)
        ask(&w, &w.c[i]);
    forget_counts(&w);
    steps(&w, 40);
    near(part_of_1(&w), 0.5, 0.1, "together after a third");
    world_done(&w);
}

/* ---- time ---- */

static void check_prompt_beside(const struct machine *m, uint32_t n_decoding, double slack,
                                const char *what)
{
    struct client *reads;
    double start, worst = 0, without;
    uint64_t n_long = 0, n = 0;
    struct world w;
    char line[128];

    world_init(&w, m, 256, 16);
    for (uint32_t i = 0; i < n_decoding; i++)
        client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
    steps(&w, 50);
    without = MAX(m->base + m->decode * n_decoding, m->read);
    reads = client(&w, 2, CLASS_INTERACTIVE, 4000, 10, UINT32_MAX);
    ask(&w, reads);
    start = w.now;
    while (reads->prompt_rows < 4000) {
        uint32_t pending = reads->task.n_pending;

        step(&w);
        assert(w.n_decoding >= n_decoding || pending == 1); /* decoding goes on in every step */
        worst = MAX(worst, w.took / without);
        n_long += w.took / without > 2.5 * (1 + slack);
        n++;
    }
    snprintf(line, sizeof(line), "%s, beside %u: worst step", what, n_decoding);
    near(worst, 2.4, 0.1 + 2.5 * slack, line);
    assert(n_long * 100 <= n);
    snprintf(line, sizeof(line), "%s, beside %u: time of the prompt", what, n_decoding);
    near(reads->usec / (w.now - start), n_decoding == 1 ? 0.5 : 0.58, 0.03, line);

    /* Nobody is stopped to make up for that. */
    forget_counts(&w);
    steps(&w, 10);
    assert(decoded_by(&w, 1) >= 9);
    world_done(&w);
}

/* The scheduler has seen nothing at all, and both come at once. */
/* A prompt and greedy decoding of the same account share what that account gets of two. */
static void check_prompt_among_own(const struct machine *m, uint32_t n_decoding)
{
    uint64_t n = 0, first, others;
    struct client *reads;
    struct world w;

    world_init(&w, m, 256, 16);
    client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
    for (uint32_t i = 0; i < n_decoding; i++)
        client(&w, 2, CLASS_INTERACTIVE, 1, 0, 0);
    steps(&w, 50);
    reads = client(&w, 2, CLASS_INTERACTIVE, 2000, 10, UINT32_MAX);
    ask(&w, reads);
    forget_counts(&w);
    while (reads->prompt_rows < 2000) {
        step(&w);
        assert(w.n_decoding >= 1 && ++n < 20000);
    }
    first = (uint64_t)decoded_by(&w, 1);
    others = (uint64_t)decoded_by(&w, 2);
    assert(first * 10 >= n * 9);                /* the other account feels nothing of it */
    assert(others * (n_decoding + 3) >= first); /* and its own others go on */
    for (uint32_t i = 0; i < n_decoding; i++)
        assert(w.c[1 + i].decoded * 10 * n_decoding >= others * 7);
    world_done(&w);
}

static void check_cold(const struct machine *m)
{
    double without = MAX(m->base + m->decode, m->read), worst = 0;
    struct world w;

    world_init(&w, m, 256, 16);
    client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
    client(&w, 2, CLASS_INTERACTIVE, 4000, 10, UINT32_MAX);
    ask(&w, &w.c[1]);
    for (int i = 0; i < 400 && w.c[1].prompt_rows < 4000; i++) {
        step(&w);
        worst = MAX(worst, w.took / without);
    }
    near(worst, 2.4, 0.5, "knowing nothing: worst step");
    world_done(&w);

    /* Prompts alone were seen, in large chunks: a row of a small one costs another time. */
    world_init(&w, m, 256, 16);
    client(&w, 2, CLASS_INTERACTIVE, 8000, 1, UINT32_MAX);
    ask(&w, &w.c[0]);
    steps(&w, 20);
    client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
    worst = 0;
    for (int i = 0; i < 100; i++) {
        step(&w);
        worst = MAX(worst, w.took / without);
    }
    near(worst, 2.4, 0.5, "knowing large chunks: worst step");
    assert(w.c[1].decoded == 100 || w.c[1].decoded == 99);
    world_done(&w);
}

static void check_alone(void)
{
    static const struct {
        struct machine m;
        double usec; /* expected of a step */
    } cases[] = {
        {{.base = 90000, .decode = 10000, .prompt = 12000}, 200000},
        {{.base = 9000, .decode = 1000, .prompt = 1200}, 200000},
        {{.base = 900, .decode = 100, .prompt = 60}, 256 * 60 + 900},  /* all rows there are */
        {{.base = 500000, .decode = 10000, .prompt = 400000}, 900000}, /* not less than one */
        {{.decode = 11000, .prompt = 11000, .read = 100000}, 200000},
    };
    struct world w;

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        world_init(&w, &cases[i].m, 256, 16);
        client(&w, 1, CLASS_INTERACTIVE, 20000, 1, 0);
        for (int k = 0; k < 40; k++) {
            step(&w);
            /* On the way as well, but for the first of all, of four rows. */
            assert(k == 0 ? w.n_prompt <= 4 : w.took <= 1.3 * cases[i].usec);
        }
        near(w.took / cases[i].usec, 1, 0.1, "alone: a step, of what it should take");
        world_done(&w);
    }

    /* Beside decoding of its own account, an answer and a prompt share the time. */
    world_init(&w, &slow, 256, 16);
    client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
    client(&w, 1, CLASS_INTERACTIVE, 2000, 10, 0);
    steps(&w, 200);
    assert(w.c[0].decoded >= 195 && w.c[1].prompt_rows > 1000);
    near(w.c[1].usec / w.now, 0.5, 0.02, "time of a prompt beside its account's decoding");
    world_done(&w);

    /* Nobody hurries for its sake, nor for a batch's. */
    for (int i = 0; i < 2; i++) {
        double longest = 0;

        world_init(&w, &fast, 256, 16);
        client(&w, i ? 2 : 1, i ? CLASS_BATCH : CLASS_INTERACTIVE, 1, 0, 0);
        client(&w, 1, CLASS_INTERACTIVE, 100000, 10, 0);
        for (int k = 0; k < 200; k++) {
            step(&w);
            longest = MAX(longest, w.took);
        }
        near(longest, 16250, 100, "a step where nobody waits");
        world_done(&w);
    }
}

/* A model that is still being read: every step takes a second and says nothing about later ones. */
static void check_loading(void)
{
    static const struct machine disk = {.base = 1000000, .decode = 100, .prompt = 100};
    struct scheduler_statistics statistics;
    uint32_t n_prompt = 0;
    struct world w;

    world_init(&w, &disk, 256, 16);
    scheduler_set_loading(w.s, true);
    client(&w, 1, CLASS_INTERACTIVE, 2000, 1, 0);
    client(&w, 2, CLASS_INTERACTIVE, 1, 0, 0);
    for (int i = 0; i < 5; i++) {
        step(&w);
        /* all that fits, or nothing: of the other account, which is behind, it is the turn */
        assert(w.n_decoding == 1 && (w.n_prompt == 255 || w.n_prompt == 0));
        n_prompt += w.n_prompt;
    }
    assert(n_prompt > 0);
    scheduler_get_statistics(w.s, &statistics);
    assert(statistics.prefill_rate == 0 && statistics.decode_rate == 0);
    scheduler_set_loading(w.s, false);
    w.m = &fast;
    step(&w); /* what decoding takes is to be found out, as by a new one */
    assert(w.n_decoding == 1 && w.n_prompt == 0);
    for (int i = 0; i < 1000 && w.n_prompt == 0; i++)
        step(&w);
    assert(w.n_decoding == 1 && w.n_prompt > 0 && w.n_prompt <= 4);
    world_done(&w);
}

/* A slow step now and then, as by another program, changes no more than itself. */
static void check_disturbed(void)
{
    struct machine m = slow;
    double worst = 0, rows[2];
    struct world w;

    world_init(&w, &m, 256, 16);
    client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
    client(&w, 2, CLASS_INTERACTIVE, 20000, 10, 0);
    steps(&w, 100);
    for (int i = 0; i < 600; i++) {
        bool disturbed = i % 37 == 5;

        m.base = disturbed ? 2000000 : slow.base;
        step(&w);
        if (!disturbed)
            worst = MAX(worst, w.took / 100000);
    }
    near(worst, 2.6, 0.4, "disturbed: worst of the other steps");
    assert(w.c[1].prompt_rows > 1500);
    world_done(&w);

    /* A busy machine makes every fifth step long, whatever is in it: no reason for small chunks. */
    for (int busy = 0; busy < 2; busy++) {
        m = fast;
        world_init(&w, &m, 256, 16);
        client(&w, 1, CLASS_INTERACTIVE, 1, 0, 0);
        client(&w, 2, CLASS_INTERACTIVE, 200000, 10, 0);
        for (int i = 0; i < 2000; i++) {
            m.base = busy && i % 5 == 3 ? 20000 : fast.base;
            step(&w);
        }
        rows[busy] = (double)w.c[1].prompt_rows;
        world_done(&w);
    }
    near(rows[1] / rows[0], 1, 0.3, "prompt rows on a busy machine, of those on a quiet one");
}

/* More tasks than rows or logits: everybody has a turn. */
static void check_limits(void)
{
    static const uint32_t limits[][2] = {{1, 1}, {2, 1}, {2, 2}, {16, 16}, {256, 3}, {5, 16}};
    struct world w;

    for (size_t i = 0; i < ARRAY_SIZE(limits); i++) {
        world_init(&w, &slow, limits[i][0], limits[i][1]);
        for (int k = 0; k < 30; k++)
            client(&w, (uint64_t)k % 6, CLASS_INTERACTIVE, k % 3 ? 1 : 37, k % 3 ? 0 : 5, 0);
        steps(&w, 8000);
        for (size_t k = 0; k < w.n; k++)
            assert(k % 3 ? w.c[k].decoded > 50 : w.c[k].requests > 1);
        world_done(&w);
    }
}

/* ---- admission ---- */

static struct scheduler_task task(uint64_t account, uint64_t flow, enum scheduler_class class,
                                  uint64_t kv)
{
    return (struct scheduler_task){.account = account,
                                   .flow = flow,
                                   .class = class,
                                   .n_pending = 1,
                                   .kv_bytes = kv,
                                   .lanes = 1};
}

static void check_admission(void)
{
    struct scheduler_options o = {.max_rows = 64, .max_logits = 8, .max_running = 3};
    struct scheduler_task t[12], *admitted;
    struct scheduler_pick picks[8];
    CLEANUP(scheduler_freep) struct scheduler *s = NULL;
    struct scheduler_statistics st;
    uint64_t usec, earlier;
    size_t n;

    assert(scheduler_new(&s, &o) == 0);
    assert(!scheduler_admit(s, UINT64_MAX) && !scheduler_next_queued(s));
    t[0] = task(1, 1, CLASS_INTERACTIVE, 60);
    t[1] = task(1, 2, CLASS_INTERACTIVE, 50);
    t[2] = task(1, 3, CLASS_INTERACTIVE, 1);
    t[3] = task(2, 4, CLASS_INTERACTIVE, 1);
    t[4] = task(3, 5, CLASS_BATCH, 1);
    t[5] = task(4, 6, CLASS_IDLE, 1);
    t[6] = task(5, 7, CLASS_INTERACTIVE, 1);
    for (int i = 0; i < 6; i++)
        assert(scheduler_add(s, &t[i]) == 0);
    /* One's three do not all come before the other's first. */
    assert(scheduler_position(s, &t[0], &usec) == 1 && usec == 0);
    assert(scheduler_position(s, &t[3], &usec) == 2);
    assert(scheduler_position(s, &t[1], &usec) == 3);
    assert(scheduler_position(s, &t[2], &usec) == 4);
    assert(scheduler_position(s, &t[4], &usec) == 5);
    assert(scheduler_position(s, &t[5], &usec) == 6);

    /* The first is let in though it needs more than there is; the rest has to fit beside. */
    assert(scheduler_next_queued(s) == &t[0]);
    assert(scheduler_admit(s, 10) == &t[0] && scheduler_position(s, &t[0], &usec) == 0);
    assert(scheduler_admit(s, 61 - 1) == NULL);
    assert(scheduler_admit(s, 61) == &t[3]);
    /* t[1] has no room. Nobody overtakes it, however small. */
    assert(scheduler_admit(s, 110) == NULL && scheduler_next_queued(s) == &t[1]);
    t[0].kv_bytes = 59; /* it has taken some of it */
    assert(scheduler_admit(s, 110) == &t[1]);
    assert(scheduler_admit(s, UINT64_MAX) == NULL); /* three run */
    t[1].kv_bytes = UINT64_MAX;
    scheduler_get_statistics(s, &st);
    assert(st.n_running == 3 && st.n_queued == 3 && st.n_steps == 0 && st.decode_rate == 0);

    /* Estimates: nothing before a step; then by position. */
    for (int i = 0; i < 50; i++) {
        n = scheduler_choose(s, 0, picks, 8);
        assert(n >= 2 && n <= 3);
        scheduler_account(s, 0, picks, n, 100000);
    }
    scheduler_get_statistics(s, &st);
    assert(st.n_steps == 50 && st.decode_rate > 20 && st.decode_rate <= 30);
    earlier = 0;
    for (int i = 0; i < 3; i++) {
        uint32_t position = scheduler_position(s, &t[(int[]){2, 4, 5}[i]], &usec);

        assert(position == (uint32_t)i + 1 && usec > 0 && usec >= earlier);
        earlier = usec;
    }
    t[0].max_tokens = t[1].max_tokens = t[3].max_tokens = 2;
    scheduler_account(s, 0, (struct scheduler_pick[]){{&t[0], 0}}, 1, 5); /* none of it worked */
    n = scheduler_choose(s, 0, picks, 8);
    scheduler_account(s, 0, picks, n, 100000);
    scheduler_position(s, &t[2], &usec);
    near((double)usec, 250000, 100000, "estimate: two tokens of 0.1 s");

    /* Who is new comes first, though younger; but not with all it has. */
    t[7] = task(5, 8, CLASS_INTERACTIVE, 1);
    for (int i = 6; i < 8; i++)
        assert(scheduler_add(s, &t[i]) == 0);
    for (int i = 8; i < 12; i++) {
        t[i] = task(5, 9, CLASS_INTERACTIVE, 1);
        assert(scheduler_add(s, &t[i]) == 0);
    }
    assert(scheduler_position(s, &t[6], &usec) == 1);
    assert(scheduler_position(s, &t[2], &usec) > 2 && scheduler_position(s, &t[2], &usec) < 6);
    for (int i = 6; i < 12; i++)
        scheduler_remove(s, &t[i]);
    assert(!t[6].entry);

    /* Of the last ten seconds only. */
    for (int i = 0; i < 50; i++) {
        n = scheduler_choose(s, 0, picks, 8);
        scheduler_account(s, 0, picks, n, 400000);
    }
    scheduler_get_statistics(s, &st);
    near(st.decode_rate, 2.5 * (double)n, 2.6, "tokens per second");

    /* Back in the queue, at its place. */
    scheduler_requeue(s, &t[3]);
    assert(scheduler_position(s, &t[3], &usec) == 1); /* its account leads less than 1's */
    assert(scheduler_position(s, &t[2], &usec) == 2);
    t[1].kv_bytes = 0;
    admitted = scheduler_admit(s, UINT64_MAX);
    assert(admitted == &t[3]);
    scheduler_requeue(s, &t[0]);
    assert(scheduler_position(s, &t[0], &usec) == 1); /* older than t[2] */
    assert(scheduler_position(s, &t[2], &usec) == 2);
    for (int i = 0; i < 6; i++)
        scheduler_remove(s, &t[i]);
    assert(scheduler_choose(s, 0, picks, 8) == 0);
    scheduler_get_statistics(s, &st);
    assert(st.n_running == 0 && st.n_queued == 0);

    /* By virtual time, not age; also after a while in which nothing was runnable. */
    t[6] = task(1, 1, CLASS_IDLE, 0);
    t[7] = task(2, 2, CLASS_IDLE, 0);
    t[8] = task(3, 3, CLASS_IDLE, 0);
    for (int i = 6; i < 9; i++)
        assert(scheduler_add(s, &t[i]) == 0);
    while (scheduler_admit(s, UINT64_MAX))
        ;
    assert(scheduler_choose(s, 0, picks, 8) > 0);
    scheduler_account(s, 0, (struct scheduler_pick[]){{&t[6], 100}, {&t[7], 10}}, 2, 1000);
    scheduler_requeue(s, &t[6]);
    scheduler_requeue(s, &t[7]);
    for (int i = 0; i < 2; i++) {
        assert(scheduler_position(s, &t[7], &usec) == 1);
        assert(scheduler_position(s, &t[6], &usec) == 2);
        t[8].is_blocked = true;
        assert(scheduler_choose(s, 0, picks, 8) == 0);
        scheduler_set_weight(s, 99, 50); /* the order is made anew */
    }
    for (int i = 6; i < 9; i++)
        scheduler_remove(s, &t[i]);

    /* Of those that are as good, two of one do not come before one of another. */
    t[6].account = t[7].account = 1;
    t[8].account = 2;
    for (int i = 6; i < 9; i++)
        assert(scheduler_add(s, &t[i]) == 0);
    assert(scheduler_position(s, &t[6], &usec) == 1 || scheduler_position(s, &t[8], &usec) == 1);
    assert(scheduler_position(s, &t[7], &usec) == 3);
    for (int i = 6; i < 9; i++)
        scheduler_remove(s, &t[i]);
}

static void check_victim(void)
{
    struct scheduler_options o = {.max_rows = 64, .max_logits = 1};
    struct scheduler_task t[6], queued[3];
    struct scheduler_pick picks[1];
    CLEANUP(scheduler_freep) struct scheduler *s = NULL;

    assert(scheduler_new(&s, &o) == 0);
    t[0] = task(1, 1, CLASS_INTERACTIVE, 0);
    t[1] = task(2, 2, CLASS_INTERACTIVE, 0);
    t[2] = task(2, 3, CLASS_INTERACTIVE, 0);
    t[3] = task(3, 4, CLASS_BATCH, 0);
    t[4] = task(4, 5, CLASS_IDLE, 0);
    for (int i = 0; i < 5; i++) {
        assert(scheduler_add(s, &t[i]) == 0);
        while (scheduler_admit(s, UINT64_MAX))
            ;
        if (i == 0)
            assert(!scheduler_victim(s, &t[0])); /* nobody else runs */
    }
    assert(scheduler_choose(s, 0, picks, 1) == 1); /* all are at the start: who is charged leads */
    for (int i = 0; i < 5; i++)
        queued[i % 3] = task(9, 9, (enum scheduler_class)(i % 3), 0);
    for (int i = 0; i < 3; i++)
        assert(scheduler_add(s, &queued[i]) == 0);
    assert(scheduler_victim(s, &t[0]) == &t[4]);
    assert(scheduler_victim(s, &t[4]) == &t[4]);
    assert(scheduler_victim(s, &queued[CLASS_INTERACTIVE]) == &t[4]);
    assert(scheduler_victim(s, &queued[CLASS_BATCH]) == &t[4]);
    assert(!scheduler_victim(s, &queued[CLASS_IDLE]));
    scheduler_requeue(s, &t[4]);
    assert(scheduler_victim(s, &t[0]) == &t[3]);
    assert(!scheduler_victim(s, &queued[CLASS_BATCH]));
    scheduler_requeue(s, &t[3]);
    assert(!scheduler_victim(s, &queued[CLASS_INTERACTIVE]));

    /* Of one class: the account that leads, though it is the older one, but for the oldest. */
    assert(scheduler_victim(s, &t[0]) == &t[2]); /* nobody leads: the youngest */
    t[5] = task(5, 6, CLASS_INTERACTIVE, 0);
    assert(scheduler_add(s, &t[5]) == 0);
    while (scheduler_next_queued(s) == &queued[0] || scheduler_next_queued(s) == &t[5])
        assert(scheduler_admit(s, UINT64_MAX));
    assert(scheduler_victim(s, &t[0]) == &t[5]);
    for (int i = 0; i < 3; i++)
        scheduler_account(s, 0, (struct scheduler_pick[]){{&t[2], 1}}, 1, 1000);
    assert(scheduler_victim(s, &t[0]) == &t[2] && scheduler_victim(s, &t[2]) == &t[2]);
    for (int i = 0; i < 20; i++)
        scheduler_account(s, 0, (struct scheduler_pick[]){{&t[0], 1}}, 1, 1000);
    assert(scheduler_victim(s, &t[0]) == &t[2]); /* the oldest never */
    for (int i = 0; i < 6; i++)
        scheduler_remove(s, &t[i]);
    for (int i = 0; i < 3; i++)
        scheduler_remove(s, &queued[i]);
}

static void check_names(void)
{
    static const char *const names[] = {"interactive", "batch", "idle"};
    enum scheduler_class c;

    for (int i = 0; i < 3; i++) {
        assert(strcmp(scheduler_class_name((enum scheduler_class)i), names[i]) == 0);
        assert(scheduler_class_parse(names[i], &c) == 0 && c == (enum scheduler_class)i);
    }
    c = CLASS_BATCH;
    assert(scheduler_class_parse("Batch", &c) == -EINVAL && c == CLASS_BATCH);
    assert(scheduler_class_parse("", &c) == -EINVAL);
}

static void check_memory(void)
{
    struct scheduler_options o = {.max_rows = 64, .max_logits = 8};
    struct scheduler *s;
    static struct scheduler_task t[200];
    int r;

#ifdef ALLOCATIONS_ARE_BOUND
    printf("allocations do not fail in a build with link-time optimisation\n");
#else
    fail_at = 1;
    assert(scheduler_new(&s, &o) == -ENOMEM);
    assert(scheduler_new(&s, &o) == 0);
    fail_at = 1;
    assert(scheduler_set_weight(s, 1, 5) == -ENOMEM);
    scheduler_free(s);
#endif
    fail_at = 0;
    assert(scheduler_new(&s, &o) == 0);
    for (unsigned i = 0; i < ARRAY_SIZE(t); i++) {
        t[i] = task(i / 2, i, i % 7 ? CLASS_INTERACTIVE : CLASS_IDLE, 0);
        for (unsigned at = 1;; at++) {
            fail_at = at;
            r = scheduler_add(s, &t[i]);
            if (r == 0)
                break;
            assert(r == -ENOMEM && fail_at == 0 && !t[i].entry);
        }
        fail_at = 0;
    }
    for (unsigned i = 0; i < ARRAY_SIZE(t); i++)
        scheduler_remove(s, &t[i]);
    scheduler_free(s);
}

/* ---- two lanes ---- */

enum { CPU, GPU };
enum { ON_CPU = 1u << CPU, ON_GPU = 1u << GPU, ON_BOTH = ON_CPU | ON_GPU };

/* As the engine thread drives it: between two steps of the CPU it looks at the GPU. */
struct pair {
    struct scheduler *s;
    const struct machine *m[SCHEDULER_LANES];
    double beside; /* a step of the CPU takes so much longer while the GPU works */
    struct client c[40];
    unsigned decode_lanes[40], prompt_lanes[40];
    size_t n;
    double now, began, ends; /* of the GPU's pass */
    struct scheduler_pick picks[SCHEDULER_LANES][40];
    size_t n_picks[SCHEDULER_LANES];
    /* what was seen */
    double longest[SCHEDULER_LANES], busy[SCHEDULER_LANES];
    uint32_t n_decoding, n_prompt; /* of the CPU's last step */
};

static void pair_init(struct pair *p, const struct machine *cpu, const struct machine *gpu)
{
    struct scheduler_options o = {.max_rows = 256, .max_logits = 16, .even_lanes = ON_GPU};

    *p = (struct pair){.m = {cpu, gpu}, .beside = 1.2};
    assert(scheduler_new(&p->s, &o) == 0);
}

static struct client *pair_client(struct pair *p, uint64_t account, enum scheduler_class class,
                                  uint32_t prompt, uint32_t answer)
{
    struct client *c = &p->c[p->n];

    assert(p->n < ARRAY_SIZE(p->c));
    p->prompt_lanes[p->n] = ON_GPU;
    p->decode_lanes[p->n++] = ON_CPU;
    *c = (struct client){.prompt = prompt, .answer = answer};
    c->task = (struct scheduler_task){.account = account, .flow = p->n, .class = class};
    return c;
}

static void pair_done(struct pair *p)
{
    for (size_t i = 0; i < p->n; i++) {
        p->c[i].task.is_under_way = false;
        if (p->c[i].is_added)
            scheduler_remove(p->s, &p->c[i].task);
    }
    p->s = scheduler_free(p->s);
}

static void pair_end(struct pair *p, unsigned lane, double took)
{
    size_t n = p->n_picks[lane];

    p->n_picks[lane] = 0;
    p->longest[lane] = MAX(p->longest[lane], took);
    p->busy[lane] += took;
    for (size_t i = 0; i < n; i++)
        p->picks[lane][i].task->is_under_way = false;
    scheduler_account(p->s, lane, p->picks[lane], n, (uint64_t)took);
    for (size_t i = 0; i < n; i++) {
        struct client *c = (struct client *)p->picks[lane][i].task;

        *(c->task.is_prompt ? &c->prompt_rows : &c->decoded) += p->picks[lane][i].n_rows;
        c->task.n_pending -= p->picks[lane][i].n_rows;
        if (c->task.n_pending > 0)
            continue;
        c->task.is_prompt = false;
        c->task.n_pending = 1;
        if (c->answer > 0 && c->left-- == 0) {
            c->requests++;
            scheduler_remove(p->s, &c->task);
            c->is_added = false;
        }
    }
}

/* Microseconds that it will take, 0: there is nothing for the lane. */
static double pair_begin(struct pair *p, unsigned lane)
{
    uint32_t decoding = 0, prompt = 0;
    size_t n;

    for (size_t i = 0; i < p->n; i++)
        p->c[i].task.lanes = p->c[i].task.is_prompt ? p->prompt_lanes[i] : p->decode_lanes[i];
    n = p->n_picks[lane] = scheduler_choose(p->s, lane, p->picks[lane], ARRAY_SIZE(p->c));
    for (size_t i = 0; i < n; i++) {
        const struct scheduler_pick *pick = &p->picks[lane][i];

        assert(!pick->task->is_under_way && !pick->task->is_blocked);
        assert(pick->task->lanes & 1u << lane);
        assert(pick->n_rows >= 1 && pick->n_rows <= pick->task->n_pending);
        pick->task->is_under_way = true;
        *(pick->task->n_pending == 1 ? &decoding : &prompt) += pick->n_rows;
    }
    if (lane == GPU && n > 0 &&
        p->picks[lane][n - 1].n_rows < p->picks[lane][n - 1].task->n_pending) {
        uint32_t rows = decoding + prompt; /* as many as a step before, most of the time */

        assert(rows < 8 || rows % (rows < 32 ? 4 : 16) == 0);
    }
    if (lane == CPU) {
        p->n_decoding = decoding;
        p->n_prompt = prompt;
    }
    return n > 0 ? takes(p->m[lane], decoding, prompt) : 0;
}

static void turn(struct pair *p)
{
    double took;

    for (size_t i = 0; i < p->n; i++) {
        struct client *c = &p->c[i];

        if (c->is_added)
            continue;
        c->task.n_pending = c->prompt;
        c->task.is_prompt = true;
        c->left = c->answer;
        assert(scheduler_add(p->s, &c->task) == 0);
        c->is_added = true;
    }
    while (scheduler_admit(p->s, UINT64_MAX))
        ;
    if (p->n_picks[GPU] > 0 && p->now >= p->ends)
        pair_end(p, GPU, p->ends - p->began);
    if (p->n_picks[GPU] == 0) {
        p->began = p->now;
        p->ends = p->now + pair_begin(p, GPU);
    }
    took = pair_begin(p, CPU) * (p->n_picks[GPU] > 0 ? p->beside : 1);
    if (took > 0) {
        p->now += took;
        pair_end(p, CPU, took);
    } else {
        assert(p->n_picks[GPU] > 0);
        p->now = MAX(p->now, p->ends);
    }
}

static void turns(struct pair *p, int n)
{
    for (int i = 0; i < n; i++)
        turn(p);
}

/* Somebody decodes on the CPU, somebody else's prompts are for the GPU. */
static void check_prompts_elsewhere(const struct machine *cpu, const struct machine *gpu,
                                    double gpu_usec)
{
    struct client *decodes, *reads;
    struct pair p;
    double start, steps_of; /* time of the steps beside a pass, in passes */
    uint64_t n;

    pair_init(&p, cpu, gpu);
    decodes = pair_client(&p, 1, CLASS_INTERACTIVE, 1, 0);
    p.prompt_lanes[0] = ON_CPU;
    turns(&p, 50);
    reads = pair_client(&p, 2, CLASS_INTERACTIVE, 20000, 0);
    p.longest[CPU] = 0;
    start = p.now;
    n = decodes->decoded;
    while (reads->prompt_rows < 20000) {
        turn(&p);
        assert(p.n_prompt == 0 && p.n_decoding >= 1);
    }
    /* Decoding feels nothing of it but the memory's bandwidth, and has a token in each step. */
    near(p.longest[CPU] / takes(cpu, 1, 0), p.beside, 0.01, "prompts elsewhere: longest step");
    assert((double)(decodes->decoded - n + 1) >= (p.now - start) / p.longest[CPU]);
    /* Passes are as long as they may be, and follow each other as soon as somebody looks. */
    near(p.longest[GPU] / gpu_usec, 1, 0.3, "prompts elsewhere: longest pass");
    start = p.now - start;
    steps_of = ceil(p.longest[GPU] / p.longest[CPU]) * p.longest[CPU] / p.longest[GPU];
    assert(p.busy[GPU] * steps_of > 0.9 * start - 8 * steps_of * p.longest[GPU]);

    /* That was no debt: who has read so much has half of the CPU at once. */
    decodes->decoded = reads->decoded = 0;
    turns(&p, 20);
    assert(decodes->decoded == 20 && reads->decoded == 20);
    for (int i = 0; i < 20; i++)
        pair_client(&p, 1, CLASS_INTERACTIVE, 1, 0);
    turns(&p, 20);
    for (size_t i = 0; i < p.n; i++)
        p.c[i].decoded = 0;
    turns(&p, 400);
    n = 0;
    for (size_t i = 0; i < p.n; i++)
        n += p.c[i].decoded;
    near((double)reads->decoded / (double)n, 0.5, 0.02, "prompts elsewhere: decoding afterwards");
    pair_done(&p);
}

/* Accounts share what they compete for; each lane by itself. */
static void check_lanes_apart(void)
{
    struct client *one, *other, *alone;
    uint64_t all = 0;
    struct pair p;

    pair_init(&p, &slow, &fast);
    assert(scheduler_set_weight(p.s, 1, 200) == 0);
    one = pair_client(&p, 1, CLASS_INTERACTIVE, 5000, 1);
    other = pair_client(&p, 2, CLASS_INTERACTIVE, 5000, 1);
    alone = pair_client(&p, 3, CLASS_INTERACTIVE, 1, 0);
    for (int i = 0; i < 20; i++)
        pair_client(&p, 4, CLASS_INTERACTIVE, 1, 0);
    turns(&p, 2000);
    near((double)one->prompt_rows / (double)(one->prompt_rows + other->prompt_rows), 0.667, 0.03,
         "prompts elsewhere, weights 200 and 100");
    for (int i = 2; i < 23; i++)
        all += p.c[i].decoded;
    near((double)alone->decoded / (double)all, 0.5, 0.03, "decoding meanwhile, 1 against 20");
    pair_done(&p);
}

/* Tasks that either may take: both are busy, and together they do what both can. */
static void check_both(void)
{
    double rows[2], usec[2];
    struct pair p;

    for (int both = 0; both < 2; both++) {
        pair_init(&p, &fast, &fast);
        p.beside = 1;
        for (int i = 0; i < 6; i++) {
            pair_client(&p, (uint64_t)i % 3, CLASS_INTERACTIVE, 3000, 1);
            p.prompt_lanes[i] = p.decode_lanes[i] = both ? ON_BOTH : ON_CPU;
        }
        turns(&p, 2000);
        rows[both] = 0;
        for (int i = 0; i < 6; i++) {
            rows[both] += (double)p.c[i].prompt_rows;
            assert(p.c[i].requests > 5);
        }
        usec[both] = p.now;
        pair_done(&p);
    }
    near(rows[1] / usec[1] / (rows[0] / usec[0]), 1.92, 0.08, "rows of two lanes, of those of one");

    /* A session alone goes from one to the other, and nothing is lost by it. */
    pair_init(&p, &slow, &fast);
    pair_client(&p, 1, CLASS_INTERACTIVE, 400, 10);
    while (p.c[0].requests < 20)
        turn(&p);
    assert(p.c[0].prompt_rows == 8000 && p.c[0].decoded == 200);
    assert(p.busy[CPU] > 0 && p.busy[GPU] > 0);
    pair_done(&p);
}

static void check_under_way(void)
{
    struct scheduler_options o = {.max_rows = 64, .max_logits = 8};
    CLEANUP(scheduler_freep) struct scheduler *s = NULL;
    struct scheduler_pick picks[8];
    struct scheduler_task t[4];
    struct scheduler_statistics st;

    assert(scheduler_new(&s, &o) == 0);
    for (int i = 0; i < 4; i++) {
        t[i] = task((uint64_t)i, (uint64_t)i, i == 3 ? CLASS_IDLE : CLASS_INTERACTIVE, 0);
        t[i].lanes = ON_BOTH;
        assert(scheduler_add(s, &t[i]) == 0);
        while (scheduler_admit(s, UINT64_MAX))
            ;
    }
    t[1].lanes = t[3].lanes = ON_CPU;
    t[2].lanes = 0;
    assert(scheduler_choose(s, GPU, picks, 8) == 1 && picks[0].task == &t[0]);
    t[0].is_under_way = true;
    assert(scheduler_choose(s, GPU, picks, 8) == 0);
    assert(scheduler_choose(s, CPU, picks, 8) == 1 && picks[0].task == &t[1]);
    t[1].is_under_way = true;
    assert(scheduler_choose(s, CPU, picks, 8) == 0); /* the idle one waits for both */
    assert(scheduler_victim(s, &t[0]) == &t[3]);
    t[3].is_under_way = true;
    assert(scheduler_victim(s, &t[0]) == &t[2]);
    t[2].is_under_way = true;
    assert(!scheduler_victim(s, &t[0]) && !scheduler_victim(s, &t[2]));
    for (int i = 0; i < 4; i++)
        t[i].is_under_way = false;

    /* Each in its own order, and counted apart. */
    scheduler_account(s, CPU, (struct scheduler_pick[]){{&t[1], 1}}, 1, 100000);
    scheduler_account(s, GPU, (struct scheduler_pick[]){{&t[0], 1}}, 1, 50000);
    scheduler_get_statistics(s, &st);
    assert(st.n_steps == 2 && st.lanes[CPU].passes == 1 && st.lanes[GPU].passes == 1);
    assert(st.lanes[CPU].decoded_rows == 1 && st.lanes[CPU].usec == 100000);
    assert(st.lanes[GPU].decoded_rows == 1 && st.lanes[GPU].usec == 50000);
    near(st.decode_rate, 30, 0.001, "tokens per second of both");
    near(st.lanes[GPU].decode_rate, 20, 0.001, "tokens per second of one");
    for (int i = 0; i < 3; i++) {
        t[i].n_pending = 0;
        t[i].lanes = ON_BOTH;
    }
    assert(scheduler_choose(s, CPU, picks, 8) == 1 && picks[0].task == &t[3]);
    for (int i = 0; i < 4; i++)
        scheduler_remove(s, &t[i]);
}

/* ---- whatever comes ---- */

/* A step is over, or has come to nothing. */
static void end_random(struct scheduler *s, unsigned lane, struct scheduler_pick *picks, size_t *n)
{
    bool counts = below(10);

    for (size_t k = 0; k < *n; k++) {
        picks[k].task->is_under_way = false;
        if (!counts || below(20) == 0)
            picks[k].n_rows = 0; /* did not work */
    }
    if (counts)
        scheduler_account(s, lane, picks, *n, below(50) ? below(300000) : 0);
    for (size_t k = 0; k < *n; k++) {
        struct scheduler_task *p = picks[k].task;

        p->n_pending -= picks[k].n_rows;
        if (p->n_pending == 0) {
            p->n_pending = 1;
            p->is_prompt = false;
        }
    }
    *n = 0;
}

static void check_random(uint64_t seed)
{
    enum { N = 120 };
    static struct scheduler_task t[N];
    bool added[N] = {false}, running[N] = {false};
    struct scheduler_pick picks[2][N];
    uint32_t n_running = 0, n_queued = 0, max_picks;
    size_t n_under_way[2] = {0};
    struct scheduler_options o;
    struct scheduler *s;

    state = seed;
    o = (struct scheduler_options){.max_rows = 1 + below(300),
                                   .max_logits = 1 + below(20),
                                   .max_running = 1 + below(80),
                                   .lane_rows = {0, below(200)},
                                   .even_lanes = below(4)};
    max_picks = 1 + below(N);
    memset(t, 0, sizeof(t));
    assert(scheduler_new(&s, &o) == 0);
    for (int round = 0; round < 1500; round++) {
        uint32_t i = below(N), lane = below(2), rows = 0, logits = 0;
        struct scheduler_task *a;
        struct scheduler_statistics st;
        bool runnable = false, others = false;
        size_t n;

        switch (below(8)) {
        case 0:
        case 1:
        case 2:
            if (added[i])
                break;
            t[i] = task(below(6), below(20), (enum scheduler_class)below(3), below(1000));
            t[i].n_pending = below(3) ? 1 + below(400) : 1;
            t[i].is_prompt = true;
            t[i].max_tokens = below(100);
            t[i].lanes = below(4);
            assert(scheduler_add(s, &t[i]) == 0 && t[i].entry);
            added[i] = true;
            n_queued++;
            break;
        case 3:
            if (!added[i] || t[i].is_under_way || below(3))
                break;
            scheduler_remove(s, &t[i]);
            assert(!t[i].entry);
            added[i] = false;
            *(running[i] ? &n_running : &n_queued) -= 1;
            running[i] = false;
            break;
        case 4:
            t[i].is_blocked = below(4) == 0;
            t[i].lanes = below(4);
            break;
        case 5:
            if (!running[i])
                break;
            a = scheduler_victim(s, &t[i]);
            assert(!a || (running[a - t] && !a->is_under_way));
            assert(a || n_running <= 1 + n_under_way[0] + n_under_way[1]);
            if (!a)
                break;
            scheduler_requeue(s, a);
            running[a - t] = false;
            n_running--;
            n_queued++;
            break;
        case 6:
            assert(scheduler_set_weight(s, below(8), below(12000)) == 0);
            break;
        case 7:
            if (running[i] && !t[i].is_under_way)
                t[i].n_pending = below(3);
            break;
        }
        while ((a = scheduler_admit(s, below(20000)))) {
            assert(added[a - t] && !running[a - t]);
            running[a - t] = true;
            n_running++;
            n_queued--;
        }
        assert(n_running <= o.max_running && (n_running > 0 || n_queued == 0));
        scheduler_get_statistics(s, &st);
        assert(st.n_running == n_running && st.n_queued == n_queued);
        if (added[i]) {
            uint64_t usec;
            uint32_t position = scheduler_position(s, &t[i], &usec);

            assert((position == 0) == running[i] && position <= n_queued);
        }

        if (n_under_way[lane] == 0) {
            for (uint32_t k = 0; k < N; k++)
                others = others || (running[k] && !t[k].is_blocked && t[k].n_pending > 0 &&
                                    t[k].class != CLASS_IDLE);
            for (uint32_t k = 0; k < N; k++)
                runnable = runnable || (running[k] && !t[k].is_blocked && t[k].n_pending > 0 &&
                                        (t[k].class != CLASS_IDLE || !others) &&
                                        !t[k].is_under_way && t[k].lanes & 1u << lane);
            n = scheduler_choose(s, lane, picks[lane], max_picks);
            assert((n > 0) == runnable && n <= max_picks);
            for (size_t k = 0; k < n; k++) {
                struct scheduler_task *p = picks[lane][k].task;

                assert(running[p - t] && !p->is_blocked && !p->is_under_way);
                assert(picks[lane][k].n_rows > 0 && picks[lane][k].n_rows <= p->n_pending);
                assert((p->class != CLASS_IDLE || !others) && p->lanes & 1u << lane);
                rows += picks[lane][k].n_rows;
                logits += picks[lane][k].n_rows == p->n_pending;
                p->is_under_way = true;
            }
            n_under_way[lane] = n;
            assert(rows <= o.max_rows && logits <= o.max_logits);
            assert(o.lane_rows[lane] == 0 || rows <= o.lane_rows[lane]);
        }
        if (below(3) == 0)
            end_random(s, lane, picks[lane], &n_under_way[lane]);
    }
    for (unsigned lane = 0; lane < 2; lane++)
        end_random(s, lane, picks[lane], &n_under_way[lane]);
    for (uint32_t i = 0; i < N; i++)
        if (added[i])
            scheduler_remove(s, &t[i]);
    scheduler_free(s);
}

int main(void)
{
    struct machine noisy = slow;

    setbuf(stdout, NULL); /* allocates nothing later */
    noisy.noise_percent = 10;
    check_names();
    check_memory();
    check_admission();
    check_victim();
    check_one_against_seven(&slow);
    check_one_against_seven(&fast);
    check_one_against_seven(&reading);
    check_weights();
    check_batch_and_idle();
    check_absence();
    check_limits();
    for (uint32_t n = 1; n <= 16; n += 5) {
        check_prompt_beside(&slow, n, 0.0, "slow");
        check_prompt_beside(&fast, n, 0.0, "fast");
        check_prompt_beside(&reading, n, 0.2, "reading");
        check_prompt_beside(&noisy, n, 0.2, "noisy");
    }
    for (uint32_t n = 1; n <= 7; n += 3) {
        check_prompt_among_own(&slow, n);
        check_prompt_among_own(&fast, n);
        check_prompt_among_own(&reading, n);
    }
    check_cold(&slow);
    check_cold(&fast);
    check_cold(&reading);
    check_alone();
    check_loading();
    check_disturbed();
    check_prompts_elsewhere(&slow, &(struct machine){.base = 2000, .prompt = 1000}, 200000);
    check_prompts_elsewhere(&fast, &(struct machine){.base = 2000, .prompt = 3000}, 200000);
    check_prompts_elsewhere(&reading, &(struct machine){.base = 50000, .prompt = 20000}, 200000);
    check_prompts_elsewhere(&slow, &fast, 256 * 60 + 900); /* all rows there are */
    check_lanes_apart();
    check_both();
    check_under_way();
    for (uint64_t seed = 1; seed <= 40; seed++)
        check_random(seed);
    return 0;
}
