/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * test-engine-thread MODEL: the engine thread as the loop has it, with a small random model, which
 * is written to MODEL. Nothing is decided by time: engine_step() and tokenizer_encode() are
 * wrapped, so that the threads can be held at a known place, and everything else waits for news.
 */

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/engine-thread.h"
#include "daemon/test-engine-harness.h"
#include "engine/model.h"
#include "ipc/record.h"
#include "tests/chat-model.h"
#include "tests/must.h"

#undef NDEBUG
#include <assert.h>

#define N_CLIENTS 16

/* ---- kinds ---- */

static void test_append(void)
{
    struct timeline *a = timeline_for(1), *b = timeline_for(1);
    struct run x = {0}, y = {0};
    struct job_request q;

    /* A system message and a whole pair of turns ahead of the question, or all at once. */
    q = question("So?", 20);
    q.messages[0].role = CHAT_SYSTEM;
    memcpy(q.messages[0].text, "Be", 2);
    q.messages[0].n = 2;
    add_message(&q, CHAT_USER, "Hello", 5);
    add_message(&q, CHAT_MODEL, "Hi", 2);
    add_message(&q, CHAT_USER, "So?", 3);
    submit(&x, a, &q);
    wait_for(&x);
    assert(x.result == 0 && strcmp(x.end_reason, "length") == 0);
    assert(x.usage.completion_tokens == 20 && x.usage.cached_tokens == 0);

    q = (struct job_request){.kind = JOB_APPEND};
    add_message(&q, CHAT_SYSTEM, "Be", 2);
    submit(&y, b, &q);
    wait_for(&y);
    assert(y.result == 0 && strcmp(y.end_reason, "appended") == 0);
    assert(y.usage.prompt_tokens == timeline_n_tokens(b) && y.usage.completion_tokens == 0);
    assert(says(&y.out, "\"type\":\"usage\"") && says(&y.out, "\"reason\":\"appended\""));
    q = (struct job_request){.kind = JOB_APPEND};
    add_message(&q, CHAT_USER, "Hello", 5);
    add_message(&q, CHAT_MODEL, "Hi", 2);
    submit(&y, b, &q);
    wait_for(&y);
    assert(y.result == 0);
    ask(&y, b, "So?", 20);
    wait_for(&y);
    expect_same(&x.out, &y.out);
    assert(timeline_n_tokens(a) == timeline_n_tokens(b));
    assert(x.usage.prompt_tokens == y.usage.prompt_tokens + y.usage.cached_tokens);
    assert(info_of(b).completion_tokens == 20);
    assert(info_of(b).prompt_tokens == x.usage.prompt_tokens);

    run_done(&x);
    run_done(&y);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
}

/* Raw text goes on with the user's turn that a system message began. */
static void test_append_raw(void)
{
    struct timeline *a = timeline_for(1), *b = timeline_for(1);
    struct run x = {0}, y = {0};
    struct job_request q;

    q = question("Summarise: all of it", 20);
    add_message(&q, CHAT_SYSTEM, "Be brief.", 9);
    {
        struct job_message system = q.messages[1];

        q.messages[1] = q.messages[0];
        q.messages[0] = system;
    }
    submit(&x, a, &q);
    wait_for(&x);
    q = (struct job_request){.kind = JOB_APPEND};
    add_message(&q, CHAT_SYSTEM, "Be brief.", 9);
    submit(&y, b, &q);
    wait_for(&y);
    q = (struct job_request){.kind = JOB_APPEND, .raw = true};
    add_message(&q, CHAT_USER, "Summarise: ", 11);
    submit(&y, b, &q);
    wait_for(&y);
    assert(y.result == 0);
    ask(&y, b, "all of it", 20);
    wait_for(&y);
    expect_same(&x.out, &y.out);
    run_done(&x);
    run_done(&y);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
}

static void test_measure(void)
{
    struct timeline *tl = timeline_for(1);
    struct run x = {0}, m = {0};
    struct job_request q;

    q = question("Hello", 0);
    q.kind = JOB_MEASURE;
    submit(&m, NULL, &q);
    wait_for(&m);
    ask(&x, tl, "Hello", 5);
    wait_for(&x);
    assert(m.result == 0 && m.n_tokens == x.usage.prompt_tokens);

    /* As the continuation of a session: what it will say is what a request then takes. */
    q = question("Hello again", 0);
    q.kind = JOB_MEASURE;
    submit(&m, tl, &q);
    wait_for(&m);
    ask(&x, tl, "Hello again", 5);
    wait_for(&x);
    assert(m.result == 0 && m.n_tokens == x.usage.prompt_tokens);

    q = question("", 0);
    q.kind = JOB_MEASURE;
    q.raw = true;
    submit(&m, tl, &q);
    wait_for(&m);
    /* Nothing but the token that max-tokens left over, which the answer before has counted. */
    assert(m.result == 0 && m.n_tokens == 0);
    q = question("", 0);
    q.kind = JOB_MEASURE;
    q.messages[0].role = CHAT_MODEL;
    submit(&m, tl, &q);
    wait_for(&m);
    assert(m.result == -EBADF && strstr(m.error.text, "must be the user's"));

    run_done(&x);
    run_done(&m);
    engine_thread_close(engine, tl);
}

/* Of one conversation: a fork, a rewound one, a restored one and itself go on alike. */
static void test_copies(void)
{
    struct timeline *a = timeline_for(1), *b, *c = timeline_for(1);
    struct run x = {0}, y = {0}, z = {0};
    struct job_request q;
    uint32_t used;

    ask(&x, a, "What is this?", 30);
    wait_for(&x);
    used = timeline_n_tokens(a);
    do_kind(&y, a, JOB_FORK);
    assert(y.result == 0 && y.fork);
    b = TAKE_PTR(y.fork);
    assert(timeline_n_tokens(b) == used && info_of(b).kv_bytes > 0);
    do_kind(&z, a, JOB_SAVE);
    assert(z.result == 0 && z.saved.n > 4 * used);

    ask(&x, a, "And this?", 30);
    wait_for(&x);
    assert(x.result == 0);
    ask(&y, b, "And this?", 30);
    wait_for(&y);
    expect_same(&x.out, &y.out);

    q = (struct job_request){.kind = JOB_RESTORE, .saved = z.saved};
    z.saved = (struct buffer){0};
    submit(&y, c, &q);
    wait_for(&y);
    assert(y.result == 0 && y.n_tokens == used && timeline_n_tokens(c) == used);
    assert(info_of(c).kv_bytes == 0);
    ask(&y, c, "And this?", 30);
    wait_for(&y);
    expect_same(&x.out, &y.out);

    /* Back to the beginning, and to where its first answer ended. */
    q = (struct job_request){.kind = JOB_REWIND, .rewind_to = used};
    submit(&y, b, &q);
    wait_for(&y);
    assert(y.result == 0 && y.n_tokens == used && timeline_n_tokens(b) == used);
    q = (struct job_request){.kind = JOB_REWIND, .rewind_to = 0};
    submit(&y, b, &q);
    wait_for(&y);
    assert(y.result == 0 && timeline_n_tokens(b) == 0);
    ask(&y, b, "What is this?", 30);
    wait_for(&y);
    ask(&y, b, "And this?", 30);
    wait_for(&y);
    expect_same(&x.out, &y.out);

    run_done(&x);
    run_done(&y);
    run_done(&z);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
    engine_thread_close(engine, c);
}

/* Rewound to a place within a turn, it goes on as one that never went further. */
static void test_rewind_within(void)
{
    struct timeline *a = timeline_for(1), *b = timeline_for(1);
    struct run x = {0}, y = {0};
    struct job_request q;
    uint32_t used;

    q = (struct job_request){.kind = JOB_APPEND};
    add_message(&q, CHAT_SYSTEM, "Be brief.", 9);
    submit(&x, a, &q);
    wait_for(&x);
    used = timeline_n_tokens(a);
    ask(&x, a, "One", 10);
    wait_for(&x);
    q = (struct job_request){.kind = JOB_REWIND, .rewind_to = used};
    submit(&y, a, &q);
    wait_for(&y);
    ask(&y, a, "One", 10); /* goes on with the user's turn that the system message opened */
    wait_for(&y);
    expect_same(&x.out, &y.out);

    run_done(&x);
    run_done(&y);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
}

static void rewind_to(struct timeline *tl, uint32_t keep)
{
    struct run x = {0};
    struct job_request q = {.kind = JOB_REWIND, .rewind_to = keep};

    submit(&x, tl, &q);
    wait_for(&x);
    assert(x.result == 0 && x.n_tokens == keep && timeline_n_tokens(tl) == keep);
    run_done(&x);
}

/* The last token of an answer that was cut is counted, and comes back, although no step saw it. */
static void test_tail(void)
{
    struct timeline *a = timeline_for(1), *b = timeline_for(1), *c, *full = timeline_for(1);
    struct run x = {0}, y = {0}, z = {0};
    struct job_request q;
    uint32_t used;

    ask(&x, a, "What is this?", 5);
    wait_for(&x);
    used = timeline_n_tokens(a);
    assert(strcmp(x.end_reason, "length") == 0);
    assert(used == x.usage.prompt_tokens + x.usage.completion_tokens);
    do_kind(&y, a, JOB_FORK);
    c = TAKE_PTR(y.fork);
    do_kind(&z, a, JOB_SAVE);
    assert(timeline_n_tokens(c) == used && y.n_tokens == used && z.n_tokens == used);
    q = (struct job_request){.kind = JOB_RESTORE, .saved = z.saved};
    z.saved = (struct buffer){0};
    submit(&z, b, &q);
    wait_for(&z);
    assert(z.result == 0 && z.n_tokens == used && timeline_n_tokens(b) == used);

    /* It is the conversation's, not the next prompt's. */
    ask(&x, a, "And this?", 5);
    wait_for(&x);
    assert(x.usage.cached_tokens == used);
    assert(timeline_n_tokens(a) == used + x.usage.prompt_tokens + x.usage.completion_tokens);

    /* Back to where the first answer ended: when there is more, and when there is no more. */
    rewind_to(a, used);
    rewind_to(b, used);
    for (size_t i = 0; i < 3; i++) {
        struct timeline *each[] = {a, b, c};

        ask(&y, each[i], "And this?", 5);
        wait_for(&y);
        expect_same(&x.out, &y.out);
    }
    /* One less is without it, whether it had been evaluated or not. */
    rewind_to(a, used - 1);
    rewind_to(b, 0);
    ask(&y, b, "What is this?", 5);
    wait_for(&y);
    rewind_to(b, used - 1);
    ask(&x, a, "And this?", 5);
    wait_for(&x);
    ask(&y, b, "And this?", 5);
    wait_for(&y);
    expect_same(&x.out, &y.out);
    assert(x.usage.cached_tokens == used - 1 && y.usage.cached_tokens == used - 1);

    /* A request that was cancelled leaves it where it was. */
    used = timeline_n_tokens(b);
    hold_steps(true);
    ask(&y, b, "Go on", 5);
    wait_for_held_step();
    assert(timeline_n_tokens(b) == used);
    engine_thread_stop(engine, y.job, JOB_CANCELLED);
    hold_steps(false);
    wait_for(&y);
    assert(timeline_n_tokens(b) == used);
    ask(&x, a, "Go on", 5);
    wait_for(&x);
    ask(&y, b, "Go on", 5);
    wait_for(&y);
    expect_same(&x.out, &y.out);

    /* There is no room for it: the context is full, and no more than that. */
    ask(&x, full, "Tell me all", 0);
    wait_for(&x);
    assert(strcmp(x.end_reason, "length") == 0 && timeline_n_tokens(full) == CONTEXT);
    rewind_to(full, CONTEXT);
    ask(&x, full, "More", 1);
    wait_for(&x);
    assert(x.result == -EMSGSIZE && strstr(x.error.text, "room for 0"));

    run_done(&x);
    run_done(&y);
    run_done(&z);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
    engine_thread_close(engine, c);
    engine_thread_close(engine, full);
}

/* ---- errors ---- */

static void test_errors(void)
{
    struct timeline *a = timeline_for(1);
    struct run x = {0}, y = {0};
    CLEANUP(freep) char *text = long_text(40000);
    struct job_request q;
    struct error err;

    ask(&x, a, "Hello", 5);
    wait_for(&x);
    q = (struct job_request){.kind = JOB_REWIND, .rewind_to = timeline_n_tokens(a) + 1};
    assert(engine_thread_check(engine, a, &q, &err) == -EINVAL);
    submit(&y, a, &q);
    wait_for(&y);
    assert(y.result == -EINVAL && !y.end_reason);

    do_kind(&y, a, JOB_SAVE);
    q = (struct job_request){.kind = JOB_RESTORE, .saved = y.saved};
    y.saved = (struct buffer){0};
    assert(engine_thread_check(engine, a, &q, &err) == -EPROTO);
    submit(&y, a, &q);
    wait_for(&y);
    assert(y.result == -EPROTO);

    /* Too long: exactly, when it has to be tokenised to see it; at once, when its size says so. */
    text[CONTEXT] = 0;
    q = question(text, 5);
    q.format = JOB_RECORDS;
    assert(engine_thread_check(engine, a, &q, &err) == 0);
    submit(&y, a, &q);
    wait_for(&y);
    assert(y.result == -EMSGSIZE && says(&y.out, "ContextFull"));
    assert(says(&y.out, "\"requested\":2") && says(&y.out, "\"available\":20"));
    text[CONTEXT] = 'x';
    q = question(text, 5);
    assert(engine_thread_check(engine, a, &q, &err) == -EMSGSIZE);
    assert(strstr(err.text, "at least 26"));
    submit(&y, a, &q);
    wait_for(&y);
    assert(y.result == -EMSGSIZE);

    q = question("x", 5);
    q.bias = calloc(CHAT_MODEL_PIECES, sizeof(*q.bias));
    q.options.sampler.bias = q.bias;
    q.options.sampler.n_bias = 1;
    q.bias[0].id = CHAT_MODEL_PIECES;
    assert(engine_thread_check(engine, a, &q, &err) == -EINVAL && strstr(err.text, "logit-bias"));
    /* Nothing may be drawn: the model's numbers are of no use. */
    for (uint32_t i = 0; i < CHAT_MODEL_PIECES; i++)
        q.bias[i] = (struct logit_bias){i, -__builtin_inff()};
    q.options.sampler.n_bias = CHAT_MODEL_PIECES;
    q.format = JOB_RECORDS;
    assert(engine_thread_check(engine, a, &q, &err) == 0);
    submit(&y, a, &q);
    wait_for(&y);
    assert(y.result == -EDOM && says(&y.out, "NumericalError"));

    q = question("x", 5);
    q.messages[0].role = CHAT_SYSTEM;
    assert(engine_thread_check(engine, a, &q, &err) == -EBADF);
    submit(&y, a, &q);
    wait_for(&y);
    assert(y.result == -EBADF);

    /* None of them has left a trace. */
    ask(&y, a, "Go on", 20);
    wait_for(&y);
    engine_thread_close(engine, a);
    a = timeline_for(1);
    ask(&x, a, "Hello", 5);
    wait_for(&x);
    ask(&x, a, "Go on", 20);
    wait_for(&x);
    expect_same(&x.out, &y.out);

    run_done(&x);
    run_done(&y);
    engine_thread_close(engine, a);
}

/* One conversation alone that the pool does not hold: the only way to KvExhausted. */
static void test_exhausted(void)
{
    struct timeline *a = timeline_for(1);
    CLEANUP(freep) char *text = long_text(1500);
    struct run x = {0};
    struct job_request q = question(text, 5);

    q.format = JOB_RECORDS;
    submit(&x, a, &q);
    wait_for(&x);
    assert(x.result == -ENOBUFS && says(&x.out, "KvExhausted"));
    assert(timeline_n_tokens(a) == 0);
    ask(&x, a, "short", 5); /* and then it goes on */
    wait_for(&x);
    assert(x.result == 0);
    run_done(&x);
    engine_thread_close(engine, a);
}

/* ---- cancellation ---- */

/* After a request was stopped: its session is as before, and answers as if nothing had been. */
static void expect_untouched(struct timeline *tl, uint32_t used, const struct run *stopped,
                             const struct buffer *expected)
{
    struct run y = {0};

    assert(stopped->result == 0 && strcmp(stopped->end_reason, "cancelled") == 0);
    assert(timeline_n_tokens(tl) == used);
    assert(info_of(tl).state == TIMELINE_IDLE);
    ask(&y, tl, "Next", 10);
    wait_for(&y);
    expect_same(&y.out, expected);
    run_done(&y);
    engine_thread_close(engine, tl);
}

static unsigned steps_so_far(void)
{
    unsigned n;

    pthread_mutex_lock(&gate.mutex);
    n = gate.n_steps;
    pthread_mutex_unlock(&gate.mutex);
    return n;
}

/* A session with a turn in it, to be rolled back to. */
static struct timeline *with_a_turn(void)
{
    struct timeline *tl = timeline_for(1);
    struct run x = {0};

    ask(&x, tl, "First", 10);
    wait_for(&x);
    run_done(&x);
    return tl;
}

/* Stops at a step that is held: that one still ends, and no other has anything of the request. */
static void stop_at_step(struct run *x)
{
    unsigned n = steps_so_far();

    engine_thread_stop(engine, x->job, JOB_CANCELLED);
    hold_steps(false);
    wait_for(x);
    assert(steps_so_far() <= n + 1); /* nobody else is there */
}

static void test_cancel(void)
{
    CLEANUP(freep) char *text = long_text(1500), *big = long_text(BIG_TEXT);
    struct run expected = {0}, x = {0}, y = {0}, m = {0};
    struct timeline *a = with_a_turn();
    struct engine_statistics before, after;
    struct job_request q;
    uint32_t used = timeline_n_tokens(a);

    ask(&expected, a, "Next", 10);
    wait_for(&expected);
    engine_thread_close(engine, a);
    engine_thread_get_statistics(engine, &before);

    /* While another prompt is being tokenised and this one waits for that. */
    a = with_a_turn();
    hold_encode(true);
    q = question(big, 0);
    q.kind = JOB_MEASURE;
    submit(&m, NULL, &q);
    wait_for_held_encode();
    big[30000] = 0;
    q = question(big, 5);
    add_message(&q, CHAT_MODEL, big, 30000);
    add_message(&q, CHAT_USER, big, 30000);
    q.messages[0].n = 6000;
    submit(&x, a, &q);
    assert(info_of(a).state == TIMELINE_QUEUED);
    engine_thread_stop(engine, x.job, JOB_CANCELLED);
    wait_for(&x);
    assert(m.job); /* which is still held */
    expect_untouched(a, used, &x, &expected.out);

    /* The one that is being tokenised. */
    engine_thread_stop(engine, m.job, JOB_CANCELLED);
    hold_encode(false);
    wait_for(&m);
    assert(m.result == -ECANCELED && gate.encode_result == -ECANCELED); /* and not by then */
    q = (struct job_request){.kind = JOB_MEASURE, .raw = true};
    big[30000] = 'x'; /* whole again */
    add_message(&q, CHAT_USER, big, BIG_TEXT);
    hold_encode(true);
    submit(&m, NULL, &q);
    wait_for_held_encode();
    engine_thread_stop(engine, m.job, JOB_CANCELLED);
    hold_encode(false);
    wait_for(&m);
    assert(m.result == -ECANCELED && gate.encode_result == -ECANCELED);

    /* With its session closed meanwhile. */
    a = with_a_turn();
    q = question(big, 0);
    q.kind = JOB_MEASURE;
    hold_encode(true);
    submit(&m, a, &q);
    wait_for_held_encode();
    engine_thread_close(engine, a);
    hold_encode(false);
    wait_for(&m);
    assert(m.result == -ESRCH);

    /* In the middle of a long prompt. */
    a = with_a_turn();
    hold_steps(true);
    ask(&x, a, text, 10);
    allow_steps(3);
    wait_for_state(a, TIMELINE_PREFILL);
    stop_at_step(&x);
    assert(timeline_n_tokens(a) == used);
    expect_untouched(a, used, &x, &expected.out);

    /* An append, likewise. */
    a = with_a_turn();
    hold_steps(true);
    q = question(text, 0);
    q.kind = JOB_APPEND;
    submit(&x, a, &q);
    allow_steps(3);
    stop_at_step(&x);
    expect_untouched(a, used, &x, &expected.out);

    /* Between two tokens. */
    a = with_a_turn();
    hold_steps(true);
    ask(&x, a, "Answer", 100);
    allow_steps(5);
    wait_for_state(a, TIMELINE_DECODE);
    stop_at_step(&x);
    expect_untouched(a, used, &x, &expected.out);

    /* While its reader does not read. */
    a = with_a_turn();
    q = question("Answer", 0);
    q.format = JOB_RECORDS;
    q.options.logprobs = true;
    q.options.sampler.n_logprobs = 64;
    submit(&x, a, &q);
    x.reads = false;
    wait_for_state(a, TIMELINE_PAUSED);
    engine_thread_stop(engine, x.job, JOB_CANCELLED);
    wait_for(&x);
    expect_untouched(a, used, &x, &expected.out);

    /* By closing the session; and twice. */
    a = with_a_turn();
    hold_steps(true);
    ask(&x, a, text, 10);
    wait_for_held_step();
    engine_thread_close(engine, a);
    engine_thread_stop(engine, x.job, JOB_CANCELLED);
    hold_steps(false);
    wait_for(&x);
    assert(x.result == 0 && strcmp(x.end_reason, "closed") == 0);

    /* What needs no step, before it is done. */
    a = with_a_turn();
    hold_steps(true);
    ask(&x, a, "x", 1);
    wait_for_held_step();
    q = (struct job_request){.kind = JOB_SAVE};
    submit(&y, a, &q);
    engine_thread_stop(engine, y.job, JOB_SHUTDOWN);
    hold_steps(false);
    wait_for(&x);
    wait_for(&y);
    assert(y.result == -ESHUTDOWN && y.saved.n == 0);
    engine_thread_close(engine, a);

    /* One that is over stays as it is. */
    a = with_a_turn();
    ask(&x, a, "Next", 10);
    while (info_of(a).state != TIMELINE_IDLE || info_of(a).completion_tokens < 20)
        ; /* no news are taken: the job is over, and this side does not know it yet */
    engine_thread_stop(engine, x.job, JOB_CANCELLED);
    wait_for(&x);
    assert(strcmp(x.end_reason, "length") == 0);
    expect_same(&x.out, &expected.out);
    engine_thread_close(engine, a);

    engine_thread_get_statistics(engine, &after);
    assert(after.requests_cancelled - before.requests_cancelled == 6);
    assert(after.requests_failed == before.requests_failed);
    run_done(&expected);
    run_done(&x);
    run_done(&y);
    run_done(&m);
}

/* A small prompt passes a big one that is being tokenised. */
static void test_small_prompts_first(void)
{
    CLEANUP(freep) char *big = long_text(BIG_TEXT);
    struct timeline *a = timeline_for(2);
    struct run m = {0}, x = {0};
    struct job_request q = question(big, 0);

    q.kind = JOB_MEASURE;
    hold_encode(true);
    submit(&m, NULL, &q);
    wait_for_held_encode();
    ask(&x, a, "small", 3);
    wait_for(&x);
    assert(x.result == 0 && m.job);
    hold_encode(false);
    wait_for(&m);
    assert(m.result == 0 && m.n_tokens > BIG_TEXT);
    run_done(&m);
    run_done(&x);
    engine_thread_close(engine, a);
}

/* Big prompts: accounts take turns, and of an account the smallest goes first, but not for ever. */
static void test_order_of_prompts(void)
{
    static const struct {
        uint64_t account;
        size_t bytes;
    } prompts[] = {{1, 0}, {1, 90}, {1, 10}, {1, 20}, {1, 30}, {2, 80}, {1, 40}, {1, 50}, {2, 70}};
    /* The first is at work before the others come. Then 1 and 2 by turns, of each the smallest; the
     * one of 90 has been passed over four times when it is its turn. */
    static const unsigned expected[] = {0, 2, 8, 3, 5, 4, 6, 1, 7};
    struct run runs[ARRAY_SIZE(prompts)] = {{0}};
    struct pollfd p = {.fd = engine_thread_fd(engine), .events = POLLIN};
    CLEANUP(freep) char *big = long_text(BIG_TEXT + 100);
    unsigned n = 0;

    hold_encode(true);
    for (unsigned i = 0; i < ARRAY_SIZE(prompts); i++) {
        struct job_request q = {.kind = JOB_MEASURE, .raw = true, .account = prompts[i].account};

        add_message(&q, CHAT_USER, big, BIG_TEXT + prompts[i].bytes);
        submit(&runs[i], NULL, &q);
        if (i == 0)
            wait_for_held_encode();
    }
    hold_encode(false);
    while (n < ARRAY_SIZE(prompts)) {
        struct job *j;
        bool finished;

        assert(poll(&p, 1, -1) == 1);
        while ((j = engine_thread_news(engine, &finished))) {
            struct run *r = j->userdata;

            assert(finished && r == &runs[expected[n]]);
            n++;
            came_back(r);
            assert(r->result == 0 && r->n_tokens == BIG_TEXT + prompts[r - runs].bytes + 1);
        }
    }
    for (unsigned i = 0; i < ARRAY_SIZE(prompts); i++)
        run_done(&runs[i]);
}

/* ---- many ---- */

static void test_alone_or_among_others(void)
{
    struct timeline *tl[N_CLIENTS];
    struct run x = {0}, y[N_CLIENTS] = {{0}};
    char text[32];

    alone(&x, "Client 7", 60);
    for (unsigned i = 0; i < N_CLIENTS; i++) {
        tl[i] = timeline_for(i % 4);
        snprintf(text, sizeof(text), "Client %u", i);
        ask(&y[i], tl[i], text, i == 7 ? 60 : 20 + 10 * i);
    }
    for (unsigned i = 0; i < N_CLIENTS; i++) {
        wait_for(&y[i]);
        assert(y[i].result == 0);
        engine_thread_close(engine, tl[i]);
    }
    expect_same(&x.out, &y[7].out);
    assert(!same(&y[6].out, &y[7].out));
    for (unsigned i = 0; i < N_CLIENTS; i++)
        run_done(&y[i]);
    run_done(&x);
}

/* A reader that stops reading stalls itself and nobody else, also when memory is short. */
static void test_slow_reader(void)
{
    struct timeline *a = timeline_for(1), *b = timeline_for(2);
    struct run x = {0}, y = {0}, z = {0};
    CLEANUP(freep) char *text = long_text(400);
    struct job_request q;

    alone(&z, "Fast", 400);
    q = question(text, 100);
    q.format = JOB_RECORDS;
    q.options.logprobs = true;
    q.options.sampler.n_logprobs = 64;
    submit(&x, a, &q);
    x.reads = false;
    wait_for_state(a, TIMELINE_PAUSED);
    ask(&y, b, "Fast", 400);
    wait_for(&y);
    assert(y.result == 0 && info_of(a).state == TIMELINE_PAUSED);
    expect_same(&y.out, &z.out);
    x.reads = true;
    take(&x);
    wait_for(&x);
    assert(x.result == 0 && strcmp(x.end_reason, "length") == 0);
    assert(x.usage.completion_tokens == 100);
    run_done(&x);
    run_done(&y);
    run_done(&z);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
}

/* As many as may run, and none of them reads: others get their turn all the same. */
static void test_many_slow_readers(void)
{
    enum { N = 64 };
    static struct run slow[N];
    struct timeline *tl[N], *a = timeline_for(2);
    struct run x = {0};

    for (unsigned i = 0; i < N; i++) {
        struct job_request q = question("Slow", 60);

        q.format = JOB_RECORDS;
        q.options.logprobs = true;
        q.options.sampler.n_logprobs = 64;
        tl[i] = timeline_for(1);
        submit(&slow[i], tl[i], &q);
        slow[i].reads = false;
    }
    for (unsigned i = 0; i < N; i++)
        wait_for_state(tl[i], TIMELINE_PAUSED);
    ask(&x, a, "Fast", 10);
    wait_for(&x);
    assert(x.result == 0);
    for (unsigned i = 0; i < N; i++) {
        slow[i].reads = true;
        take(&slow[i]);
    }
    for (unsigned i = 0; i < N; i++) {
        wait_for(&slow[i]);
        assert(slow[i].result == 0 && slow[i].usage.completion_tokens == 60);
        expect_same(&slow[i].out, &slow[0].out);
    }
    for (unsigned i = 0; i < N; i++) {
        run_done(&slow[i]);
        engine_thread_close(engine, tl[i]);
    }
    run_done(&x);
    engine_thread_close(engine, a);
}

/* ---- memory ---- */

#define N_PRESSED 8u
#define LONG_ANSWER 500u

struct pressed {
    struct run first[N_PRESSED], second[N_PRESSED];
};

static void two_turns_each(struct pressed *p)
{
    struct timeline *tl[N_PRESSED];
    char text[32];

    for (unsigned i = 0; i < N_PRESSED; i++) {
        tl[i] = timeline_for(i % 3);
        snprintf(text, sizeof(text), "I am number %u", i);
        ask(&p->first[i], tl[i], text, LONG_ANSWER);
    }
    for (unsigned i = 0; i < N_PRESSED; i++)
        wait_for(&p->first[i]);
    for (unsigned i = 0; i < N_PRESSED; i++)
        ask(&p->second[i], tl[i], "Who are you?", 20);
    for (unsigned i = 0; i < N_PRESSED; i++) {
        wait_for(&p->second[i]);
        engine_thread_close(engine, tl[i]);
    }
}

/* What a session of n tokens takes. */
static uint64_t measure_kv(uint32_t n)
{
    struct timeline *tl = timeline_for(1);
    struct run x = {0};
    uint64_t bytes;

    ask(&x, tl, "x", n);
    wait_for(&x);
    bytes = info_of(tl).kv_bytes;
    assert(bytes > 0 && bytes == engine_thread_account_kv_bytes(engine, 1));
    run_done(&x);
    engine_thread_close(engine, tl);
    return bytes;
}

static void test_pressure(uint64_t session_bytes)
{
    static struct pressed ample, scarce;
    struct engine_statistics s;

    start_engine(0);
    two_turns_each(&ample);
    engine_thread_get_statistics(engine, &s);
    assert(s.preemptions == 0 && s.kv_given_back == 0);
    assert(s.requests == 2 * N_PRESSED && s.requests_failed == 0);
    for (unsigned i = 0; i < N_PRESSED; i++) {
        struct run lone = {0};
        char text[32];

        snprintf(text, sizeof(text), "I am number %u", i);
        alone(&lone, text, LONG_ANSWER);
        expect_same(&lone.out, &ample.first[i].out);
        run_done(&lone);
    }
    stop_engine();

    start_engine(session_bytes * 5 / 2);
    two_turns_each(&scarce);
    engine_thread_get_statistics(engine, &s);
    assert(s.preemptions > 0 && s.kv_given_back > 0);
    assert(s.kv_bytes_max <= session_bytes * 5 / 2);
    assert(s.requests == 2 * N_PRESSED && s.requests_failed == 0 && s.requests_cancelled == 0);
    stop_engine();

    for (unsigned i = 0; i < N_PRESSED; i++) {
        assert(scarce.first[i].result == 0 && scarce.second[i].result == 0);
        expect_same(&ample.first[i].out, &scarce.first[i].out);
        expect_same(&ample.second[i].out, &scarce.second[i].out);
        run_done(&ample.first[i]);
        run_done(&ample.second[i]);
        run_done(&scarce.first[i]);
        run_done(&scarce.second[i]);
    }
}

/* Waiting for memory; the queue is told of, and a request leaves it when it is stopped. */
static void test_queue(uint64_t session_bytes)
{
    struct timeline *a, *b, *c;
    struct run x = {0}, y = {0}, z = {0}, alone_run = {0};
    CLEANUP(freep) char *text = long_text(700);
    struct record_reader reader = {0};
    struct record record;
    struct job_request q;
    bool queued = false, progress = false;
    uint64_t done = 0;

    start_engine(session_bytes * 3 / 2);
    alone(&alone_run, text, 40);
    a = timeline_for(1);
    b = timeline_for(2);
    c = timeline_for(3);
    hold_steps(true);
    ask(&x, a, text, 40);
    wait_for_held_step();
    q = question(text, 40);
    q.format = JOB_RECORDS;
    submit(&y, b, &q);
    q = question(text, 40);
    submit(&z, c, &q);
    wait_until_tokenised();
    /* What came in is looked at between two steps, and told of after the second. */
    allow_steps(2);
    assert(info_of(b).state == TIMELINE_QUEUED && info_of(c).state == TIMELINE_QUEUED);
    assert(info_of(b).queue_position + info_of(c).queue_position == 3);
    assert(info_of(a).state == TIMELINE_PREFILL);

    engine_thread_stop(engine, z.job, JOB_CANCELLED);
    allow_steps(1);
    wait_for(&z);
    assert(strcmp(z.end_reason, "cancelled") == 0 && info_of(c).state == TIMELINE_IDLE);
    assert(info_of(c).queue_position == 0);
    hold_steps(false);
    wait_for(&x);
    wait_for(&y);
    assert(x.result == 0 && y.result == 0);
    expect_same(&x.out, &alone_run.out);

    assert(record_reader_feed(&reader, y.out.data, y.out.n) == 0);
    while (record_reader_next(&reader, &record) == 1) {
        if (record.type == RECORD_QUEUED) {
            assert(!progress && record.position >= 1 && record.position <= 2);
            queued = true;
        } else if (record.type == RECORD_PROGRESS) {
            assert(record.done > done && record.done < record.total);
            assert(record.total == y.usage.prompt_tokens);
            done = record.done;
            progress = true;
        }
    }
    assert(queued && progress);
    record_reader_done(&reader);

    run_done(&x);
    run_done(&y);
    run_done(&z);
    run_done(&alone_run);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
    engine_thread_close(engine, c);
    stop_engine();
}

/* While what had been given back is computed again: stopping it there leaves the session as it was.
 */
static void test_cancel_while_recomputing(uint64_t session_bytes)
{
    struct timeline *a, *b;
    struct run x = {0}, y = {0}, expected = {0};
    CLEANUP(freep) char *text = long_text(600);
    uint32_t used;

    start_engine(session_bytes * 3 / 2);
    a = timeline_for(1);
    ask(&x, a, text, 20);
    wait_for(&x);
    used = timeline_n_tokens(a);
    ask(&expected, a, "Next", 10);
    wait_for(&expected);
    engine_thread_close(engine, a);

    a = timeline_for(1);
    b = timeline_for(2);
    ask(&x, a, text, 20);
    wait_for(&x);
    ask(&y, b, text, 500); /* takes a's memory */
    wait_for(&y);
    assert(info_of(a).kv_bytes == 0 && timeline_n_tokens(a) == used);
    hold_steps(true);
    ask(&x, a, "Next", 10);
    allow_steps(3);
    wait_for_state(a, TIMELINE_PREFILL);
    stop_at_step(&x);
    expect_untouched(a, used, &x, &expected.out);
    engine_thread_close(engine, b);
    run_done(&x);
    run_done(&y);
    run_done(&expected);
    stop_engine();
}

/* What is interactive does not wait for a batch that has the memory, and both come to their end. */
static void test_classes(uint64_t session_bytes)
{
    struct timeline *a, *b;
    struct run x = {0}, y = {0}, slow = {0}, fast = {0};
    CLEANUP(freep) char *text = long_text(500);
    struct engine_statistics s;

    start_engine(session_bytes * 3 / 2);
    alone(&slow, text, 300);
    alone(&fast, text, 10);
    assert(timeline_new(&a, &(struct timeline_options){
                                .n_ctx = CONTEXT, .account = 1, .class = CLASS_BATCH}) == 0);
    b = timeline_for(1);
    hold_steps(true);
    ask(&x, a, text, 300);
    allow_steps(100);
    ask(&y, b, text, 10);
    wait_until_tokenised();
    hold_steps(false);
    wait_for(&y);
    assert(x.job); /* 200 tokens are missing */
    wait_for(&x);
    expect_same(&x.out, &slow.out);
    expect_same(&y.out, &fast.out);
    engine_thread_get_statistics(engine, &s);
    assert(s.preemptions == 1);
    run_done(&x);
    run_done(&y);
    run_done(&slow);
    run_done(&fast);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
    stop_engine();
}

/* The device is lost: all that is there fails, and all that comes; the thread lives. */
static void test_device_lost(void)
{
    struct timeline *a, *b;
    struct run x = {0}, y = {0};
    struct job_request q;

    start_engine(0);
    a = timeline_for(1);
    b = timeline_for(2);
    hold_steps(true);
    q = question("Hello", 100);
    q.format = JOB_RECORDS;
    submit(&x, a, &q);
    allow_steps(3);
    ask(&y, b, "Hello", 100);
    pthread_mutex_lock(&gate.mutex);
    gate.result = -ENODEV;
    pthread_mutex_unlock(&gate.mutex);
    hold_steps(false);
    wait_for(&x);
    wait_for(&y);
    assert(x.result == -ENODEV && says(&x.out, "DeviceLost") && y.result == -ENODEV);
    assert(timeline_n_tokens(a) == 0);
    ask(&y, b, "Hello", 100);
    wait_for(&y);
    assert(y.result == -ENODEV);
    pthread_mutex_lock(&gate.mutex);
    gate.result = 0;
    pthread_mutex_unlock(&gate.mutex);
    run_done(&x);
    run_done(&y);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
    stop_engine();
}

/* ---- for want of memory in the process ---- */

/* A life of a session in which everything may fail, and nothing must be lost or leak. */
static int fragile_life(struct run *x)
{
    struct timeline *a = timeline_for(1), *c = timeline_for(1), *b = NULL;
    struct job_request q;
    int r;

    ask(x, a, "Hello", 12);
    wait_for(x);
    r = x->result;
    if (r == 0) {
        do_kind(x, a, JOB_FORK);
        r = x->result;
        b = TAKE_PTR(x->fork);
        assert((r == 0) == (b != NULL));
    }
    if (r == 0) {
        do_kind(x, a, JOB_SAVE);
        r = x->result;
    }
    if (r == 0) {
        q = (struct job_request){.kind = JOB_RESTORE, .saved = x->saved};
        x->saved = (struct buffer){0};
        submit(x, c, &q);
        wait_for(x);
        r = x->result;
    }
    if (r == 0) {
        ask(x, c, "Bye", 12);
        wait_for(x);
        r = x->result;
    }
    engine_thread_close(engine, a);
    engine_thread_close(engine, c);
    if (b)
        engine_thread_close(engine, b);
    return r;
}

static void test_out_of_memory(void)
{
    struct run good = {0}, x = {0};
    int n = 0, failed = 0;

    assert(fragile_life(&good) == 0);
    for (bool reached = true; reached;) {
        int r;

        atomic_store(&fail_at, ++n);
        r = fragile_life(&x);
        reached = atomic_load(&fail_at) <= 0;
        atomic_store(&fail_at, 0);
        assert(r == 0 || r == -ENOMEM || r == -EIO); /* EIO: libcrypto says no more */
        failed += r < 0;
        if (r == 0)
            expect_same(&x.out, &good.out);
        assert(fragile_life(&x) == 0);
        expect_same(&x.out, &good.out);
    }
    assert(failed > 10);
    run_done(&x);
    run_done(&good);
}

/* ---- the rest ---- */

static bool tells_of_progress(size_t prompt_bytes)
{
    CLEANUP(freep) char *text = long_text(prompt_bytes);
    struct timeline *tl = timeline_for(1);
    struct job_request q = question(text, 5);
    struct run x = {0};
    bool told;

    q.format = JOB_RECORDS;
    submit(&x, tl, &q);
    wait_for(&x);
    assert(x.result == 0 && says(&x.out, "\"type\":\"end\""));
    assert(!says(&x.out, "\"type\":\"queued\""));
    told = says(&x.out, "\"type\":\"progress\"");
    run_done(&x);
    engine_thread_close(engine, tl);
    return told;
}

/* Of long prompts, when they take a while. */
static void test_progress(void)
{
    assert(tells_of_progress(700));
    assert(!tells_of_progress(150));
    engine_thread_set_record_interval(engine, UINT64_C(1000000000000));
    assert(!tells_of_progress(700));
    engine_thread_set_record_interval(engine, 0);
}

static void test_statistics(void)
{
    struct engine_statistics s, e;
    struct run x = {0};

    engine_thread_get_statistics(engine, &e);
    assert(engine_thread_set_weight(engine, 5, 300) == 0);
    alone(&x, "Hello", 25);
    engine_thread_get_statistics(engine, &s);
    assert(s.requests == e.requests + 1);
    assert(s.completion_tokens == e.completion_tokens + 25);
    assert(s.prompt_tokens == e.prompt_tokens + x.usage.prompt_tokens);
    assert(engine_thread_is_alive(engine));

    /* Within a step that does not end there is no sign of life; after it there is. */
    hold_steps(true);
    {
        struct timeline *tl = timeline_for(1);
        struct run y = {0};

        ask(&y, tl, "Hello", 5);
        wait_for_held_step();
        engine_thread_is_alive(engine);
        assert(!engine_thread_is_alive(engine));
        allow_steps(1);
        assert(engine_thread_is_alive(engine));
        hold_steps(false);
        wait_for(&y);
        run_done(&y);
        engine_thread_close(engine, tl);
    }
    run_done(&x);
}

static struct model *make_model(const char *path, uint32_t window)
{

    chat_model_write(path, window, CHAT_MODEL_CONTEXT);
    return must_open(path);
}

int main(int argc, char **argv)
{
    struct model *m;
    uint64_t session_bytes;

    assert(argc == 2);
    main_thread = pthread_self();
    model = m = make_model(argv[1], 16);
    start_engine(0);
    test_append();
    test_append_raw();
    test_measure();
    test_copies();
    test_rewind_within();
    test_tail();
    test_errors();
    test_cancel();
    test_small_prompts_first();
    test_order_of_prompts();
    test_alone_or_among_others();
    test_slow_reader();
    test_many_slow_readers();
    test_statistics();
    test_progress();
    test_out_of_memory();
    stop_engine();
    model_free(m);

    /* Whose KV grows with each token in all layers. */
    model = m = make_model(argv[1], 1024);
    start_engine(0);
    session_bytes = measure_kv(LONG_ANSWER);
    stop_engine();
    test_pressure(session_bytes);
    test_queue(session_bytes);
    test_cancel_while_recomputing(session_bytes);
    test_classes(session_bytes);
    test_device_lost();
    start_engine(session_bytes * 11 / 10); /* one of the two at a time */
    test_slow_reader();
    test_exhausted();
    stop_engine();
    model_free(m);
    unlink(argv[1]);
    return 0;
}
