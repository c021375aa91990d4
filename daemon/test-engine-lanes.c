/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * test-engine-lanes MODEL: the engine thread with two lanes, and a small random model, which is
 * written to MODEL. The second lane's passes go on until the test lets them end (struct
 * second_lane), so that everything can be done to a request that is in one. What a request says is
 * compared with what it says on the processor alone.
 */

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/engine-thread-internal.h"
#include "daemon/engine-thread.h"
#include "daemon/test-engine-harness.h"
#include "engine/model.h"
#include "tests/chat-model.h"
#include "tests/must.h"

#undef NDEBUG
#include <assert.h>

#define LONG_TEXT 500u

static struct run short_alone, long_alone, next_alone; /* said by the processor alone */
static uint64_t session_bytes;                         /* of the long one's session */
static char *text;

static struct second_lane look(void)
{
    struct second_lane s;

    pthread_mutex_lock(&gate.mutex);
    s = second;
    pthread_mutex_unlock(&gate.mutex);
    return s;
}

static void fail_passes(void)
{
    pthread_mutex_lock(&gate.mutex);
    second.fails = true;
    pthread_mutex_unlock(&gate.mutex);
}

static unsigned n_steps(void)
{
    unsigned n;

    pthread_mutex_lock(&gate.mutex);
    n = gate.n_steps;
    pthread_mutex_unlock(&gate.mutex);
    return n;
}

/* What was done before is published: this is done in a later turn. */
static struct engine_statistics statistics(void)
{
    struct timeline *tl = timeline_for(9);
    struct engine_statistics s;
    struct run r = {0};

    do_kind(&r, tl, JOB_SAVE);
    engine_thread_get_statistics(engine, &s);
    run_done(&r);
    engine_thread_close(engine, tl);
    return s;
}

/* A request of an account that decodes on the processor until it is stopped. */
static struct timeline *begin_decoding(struct run *r)
{
    struct timeline *tl = timeline_for(1);

    ask(r, tl, "Go on", 0);
    wait_for_state(tl, TIMELINE_DECODE);
    return tl;
}

static void stop_decoding(struct timeline *tl, struct run *r)
{
    engine_thread_stop(engine, r->job, JOB_CANCELLED);
    wait_for(r);
    assert(r->result == 0);
    run_done(r);
    engine_thread_close(engine, tl);
}

static void wait_for_more(const struct run *r)
{
    size_t n = r->out.n;

    while (r->out.n < n + 5)
        pump();
}

/* ---- coming ---- */

static void test_joins(void)
{
    struct timeline *tl;
    struct lane_info lanes[ENGINE_LANES];
    struct pollfd p;
    struct run x = {0};
    char line[128];
    const char *description;

    /* Not while the model is loaded; nobody waits for it. */
    second = (struct second_lane){0};
    start_engine(0);
    description = engine_thread_description(engine);
    engine_thread_set_placement(engine, PLACE_GPU);
    engine_thread_set_loading(engine, true);
    tl = timeline_for(1);
    ask(&x, tl, "Hello", 20);
    wait_for(&x);
    expect_same(&x.out, &short_alone.out);
    assert(look().n_joined == 0 && !engine_thread_lanes_changed(engine));
    engine_thread_get_lanes(engine, lanes);
    assert(lanes[LANE_CPU].works && !lanes[LANE_GPU].works && lanes[LANE_GPU].failure[0] == 0);

    engine_thread_set_loading(engine, false);
    p = (struct pollfd){.fd = engine_thread_fd(engine), .events = POLLIN};
    assert(poll(&p, 1, -1) == 1);
    assert(engine_thread_lanes_changed(engine) && !engine_thread_lanes_changed(engine));
    engine_thread_get_lanes(engine, lanes);
    assert(lanes[LANE_CPU].works && lanes[LANE_GPU].works);
    assert(strcmp(engine_thread_explain(engine, line, sizeof(line)),
                  "prompts: GPU; decoding: GPU") == 0);
    assert(description[0] && engine_thread_description(engine)[0]);
    engine_thread_close(engine, tl);
    run_done(&x);
    stop_engine();

    /* Not at all. */
    second = (struct second_lane){.joins = -EIO};
    start_engine(0);
    engine_thread_set_loading(engine, false);
    while (!engine_thread_lanes_changed(engine))
        poll(&(struct pollfd){.fd = engine_thread_fd(engine), .events = POLLIN}, 1, -1);
    engine_thread_get_lanes(engine, lanes);
    assert(lanes[LANE_CPU].works && !lanes[LANE_GPU].works);
    assert(strcmp(lanes[LANE_GPU].failure, "no such device") == 0);
    alone(&x, "Hello", 20);
    expect_same(&x.out, &short_alone.out);
    run_done(&x);
    stop_engine();

    /* Not wanted. */
    second = (struct second_lane){0};
    start_engine(0);
    engine_thread_set_placement(engine, PLACE_CPU);
    engine_thread_set_loading(engine, false);
    alone(&x, "Hello", 20);
    expect_same(&x.out, &short_alone.out);
    assert(look().n_joined == 0);
    run_done(&x);
    stop_engine();
}

/* ---- who does what ---- */

static void on_rest(void *userdata)
{
    sem_post(userdata);
}

static void test_all_on_gpu(void)
{
    struct engine_statistics s;
    struct run x = {0};
    unsigned steps;
    sem_t rests;

    assert(sem_init(&rests, 0, 0) == 0);
    start_lanes(PLACE_GPU, 0);
    engine_thread_set_gpu_rests(engine, on_rest, &rests);
    steps = n_steps();
    alone(&x, text, 40);
    expect_same(&x.out, &long_alone.out);
    assert(n_steps() == steps && look().n_passes > 40);
    s = statistics();
    assert(s.lanes[LANE_CPU].passes == 0 && s.lanes[LANE_GPU].passes == look().n_passes);
    assert(s.steps == look().n_passes);
    assert(s.lanes[LANE_GPU].prompt_rows == x.usage.prompt_tokens);
    assert(s.lanes[LANE_GPU].decoded_rows == 39); /* the last one is never evaluated */
    while (sem_wait(&rests) < 0)
        ;
    run_done(&x);
    stop_engine();
}

/* The first one that the engine thread measures; its sums are the test's. */
static void note_measured(void *userdata, const struct calibration_result *c)
{
    struct calibration_result *ret = userdata;

    pthread_mutex_lock(&gate.mutex);
    *ret = *c;
    pthread_mutex_unlock(&gate.mutex);
}

static void wait_for_lanes(void)
{
    while (!engine_thread_lanes_changed(engine))
        poll(&(struct pollfd){.fd = engine_thread_fd(engine), .events = POLLIN}, 1, -1);
}

/* A GPU that reads prompts, beside a processor that decodes. */
static const struct calibration_result usual = {
    .rates = {.lane = {{.prefill = 100, .decode = 20, .decode_many = 60},
                       {.prefill = 400, .decode = 10, .decode_many = 50}}},
    .gpu_activations = ACTIVATIONS_F32};

static struct placement_info placement(void)
{
    struct placement_info i;

    engine_thread_get_placement(engine, &i);
    return i;
}

static void start_auto(const struct calibration_result *known, struct calibration_result *ret)
{
    second = (struct second_lane){0};
    start_engine(0);
    engine_thread_set_placement(engine, PLACE_AUTO);
    engine_thread_set_calibration(engine, known, note_measured, ret);
    engine_thread_set_loading(engine, false);
    wait_for_lanes();
    while (known && !placement().is_measured) /* it may have been told of the mode only */
        wait_for_lanes();
}

static void test_measured(void)
{
    struct calibration_result x = {0};
    struct engine_statistics s;
    struct run r = {0};
    char line[256];

    /* What is not known is measured first, with a request as without. */
    start_auto(NULL, &x);
    alone(&r, "Hello", 20);
    expect_same(&r.out, &short_alone.out);
    run_done(&r);
    wait_for_lanes();
    assert(x.rates.lane[LANE_CPU].prefill > 0 && x.rates.lane[LANE_GPU].decode > 0);
    assert(x.rates.both_prefill > 0 && x.rates.both_decode > 0);
    assert(placement().is_measured && placement().mode == PLACE_AUTO);
    assert(placement().rates.lane[LANE_GPU].prefill == x.rates.lane[LANE_GPU].prefill);
    assert(strstr(engine_thread_explain(engine, line, sizeof(line)), " tokens/s"));
    assert(!strstr(line, "not measured"));
    s = statistics();
    assert(s.kv_bytes_used == 0); /* what measured has gone */
    stop_engine();

    /* Not on battery: when there is mains again. */
    x = (struct calibration_result){0};
    second = (struct second_lane){0};
    start_engine(0);
    engine_thread_set_placement(engine, PLACE_AUTO);
    engine_thread_set_calibration(engine, NULL, note_measured, &x);
    engine_thread_set_on_battery(engine, true);
    engine_thread_set_loading(engine, false);
    wait_for_lanes();
    alone(&r, "Hello", 20);
    expect_same(&r.out, &short_alone.out);
    run_done(&r);
    statistics(); /* after which the request's session is not counted any more */
    s = statistics();
    assert(!placement().is_measured && look().n_passes == 0 && s.kv_bytes_used == 0);
    engine_thread_set_on_battery(engine, false);
    wait_for_lanes();
    assert(placement().is_measured && look().n_passes > 0);
    stop_engine();

    /* What is known is not. */
    start_auto(&usual, NULL);
    assert(placement().is_measured && placement().activations == ACTIVATIONS_F32);
    alone(&r, text, 40);
    expect_same(&r.out, &long_alone.out);
    s = statistics();
    assert(s.lanes[LANE_GPU].prompt_rows == r.usage.prompt_tokens);
    assert(s.lanes[LANE_GPU].decoded_rows == 0 && s.lanes[LANE_CPU].decoded_rows == 39);
    run_done(&r);

    /* On battery the processor does all, and it is said. */
    engine_thread_set_on_battery(engine, true);
    alone(&r, text, 40);
    expect_same(&r.out, &long_alone.out);
    run_done(&r);
    assert(statistics().lanes[LANE_GPU].prompt_rows == s.lanes[LANE_GPU].prompt_rows);
    assert(placement().state == PLACEMENT_ON_BATTERY);
    assert(strstr(engine_thread_explain(engine, line, sizeof(line)), "on battery"));
    engine_thread_set_on_battery(engine, false);
    alone(&r, text, 40);
    run_done(&r);
    assert(statistics().lanes[LANE_GPU].prompt_rows > s.lanes[LANE_GPU].prompt_rows);
    assert(placement().state == PLACEMENT_WORKS);
    stop_engine();

    /* Nobody has asked for it: no GPU is used. */
    second = (struct second_lane){0};
    start_lanes(PLACE_AUTO, 0);
    alone(&r, text, 40);
    expect_same(&r.out, &long_alone.out);
    assert(look().n_passes == 0 && placement().state == PLACEMENT_UNMEASURED);
    run_done(&r);
    stop_engine();
}

/* Somebody always waits for a token: it is measured in between, and nobody's answer changes. */
static void test_measured_beside(void)
{
    struct calibration_result x = {0};
    struct run d = {0}, r = {0};
    struct timeline *tl;

    second = (struct second_lane){0};
    start_engine(0);
    engine_thread_set_placement(engine, PLACE_AUTO);
    engine_thread_set_calibration(engine, NULL, note_measured, &x);
    engine_thread_set_calibration_patience(engine, 0, 0);
    tl = begin_decoding(&d);
    engine_thread_set_loading(engine, false);
    alone(&r, "Hello", 20);
    expect_same(&r.out, &short_alone.out);
    run_done(&r);
    while (!placement().is_measured)
        wait_for_more(&d);
    assert(x.rates.both_decode > 0);
    stop_decoding(tl, &d);
    stop_engine();
}

/* The GPU is asked for, and does not come. */
static void expect_nothing(bool now)
{
    unsigned n = look().n_joined;

    engine_thread_retry_gpu(engine, now);
    for (int i = 0; i < 2; i++) /* the turn in which it would have come is over then */
        (void)statistics();
    assert(look().n_joined == n);
}

/* Whatever took it away is over. */
static void comes_back(void)
{
    unsigned n = look().n_joined;
    struct lane_info lanes[ENGINE_LANES];

    pthread_mutex_lock(&gate.mutex);
    second.fails = false;
    second.joins = 0;
    pthread_mutex_unlock(&gate.mutex);
    expect_nothing(false);
    engine_thread_retry_gpu(engine, true);
    wait_for_lanes();
    assert(look().n_joined == n + 1);
    engine_thread_get_lanes(engine, lanes);
    assert(lanes[LANE_CPU].works && lanes[LANE_GPU].works && lanes[LANE_GPU].failure[0] == 0);
    expect_nothing(true);
}

/* It goes while it is measured: that is what is told, and the processor goes on. */
static void test_lost_in_measuring(void)
{
    struct calibration_result x = {0};
    struct lane_info lanes[ENGINE_LANES];
    struct run r = {0};

    second = (struct second_lane){.fails = true};
    start_engine(0);
    engine_thread_set_placement(engine, PLACE_AUTO);
    engine_thread_set_calibration(engine, NULL, note_measured, &x);
    engine_thread_set_loading(engine, false);
    do {
        wait_for_lanes();
        engine_thread_get_lanes(engine, lanes);
    } while (lanes[LANE_GPU].works);
    assert(strcmp(lanes[LANE_GPU].failure, "it fell off the bus") == 0);
    assert(x.rates.lane[LANE_CPU].prefill == 0 && !placement().is_measured);
    alone(&r, "Hello", 20);
    expect_same(&r.out, &short_alone.out);
    run_done(&r);
    pthread_mutex_lock(&gate.mutex);
    second.fails = false;
    pthread_mutex_unlock(&gate.mutex);
    expect_nothing(true);
    stop_engine();
}

static void test_hybrid(void)
{
    struct run d = {0}, x = {0};
    struct timeline *tl, *a = timeline_for(2);
    struct engine_statistics s;
    unsigned rows;

    start_lanes(PLACE_HYBRID, 0);
    tl = begin_decoding(&d);
    rows = look().n_rows; /* its prompt may have been the GPU's */
    hold_passes(true);
    ask(&x, a, text, 40);
    wait_for_pass();
    wait_for_more(&d); /* the processor goes on */
    assert(look().under_way && x.job && look().n_rows == rows);
    wait_for_state(a, TIMELINE_PREFILL);
    while (look().n_rows - rows < long_alone.usage.prompt_tokens) { /* each beside steps */
        wait_for_pass();
        wait_for_more(&d);
        let_pass_end();
    }
    hold_passes(false);
    wait_for(&x);
    expect_same(&x.out, &long_alone.out);
    assert(look().n_rows - rows == x.usage.prompt_tokens); /* and nothing else */
    s = statistics();
    assert(s.lanes[LANE_GPU].decoded_rows == 0 && s.lanes[LANE_CPU].decoded_rows > 39);
    stop_decoding(tl, &d);

    /* Where nobody decodes either may read prompts: it comes to the same. */
    ask(&x, a, "Next", 10);
    wait_for(&x);
    expect_same(&x.out, &next_alone.out);
    run_done(&x);
    engine_thread_close(engine, a);
    stop_engine();
}

/* ---- while a pass is under way ---- */

/* A request with a long prompt is in a pass, beside one that decodes. */
struct beside {
    struct run d, x;
    struct timeline *decodes, *tl;
};

static void begin_beside(struct beside *b)
{
    *b = (struct beside){.tl = timeline_for(2)};
    b->decodes = begin_decoding(&b->d);
    hold_passes(true);
    ask(&b->x, b->tl, text, 40);
    wait_for_pass();
}

static void end_beside(struct beside *b)
{
    stop_decoding(b->decodes, &b->d);
    run_done(&b->x);
    engine_thread_close(engine, b->tl);
}

static void test_stop(void)
{
    struct beside b;
    unsigned passes;

    start_lanes(PLACE_HYBRID, 0);
    for (unsigned later = 0; later < 2; later++) {
        begin_beside(&b);
        for (unsigned i = 0; i < later; i++) {
            let_pass_end();
            wait_for_pass();
        }
        engine_thread_stop(engine, b.x.job, JOB_CANCELLED);
        wait_for_more(&b.d);
        assert(b.x.job); /* it is left alone until the pass is over */
        passes = look().n_passes;
        let_pass_end();
        wait_for(&b.x);
        assert(b.x.result == 0 && strcmp(b.x.end_reason, "cancelled") == 0);
        assert(look().n_passes == passes + 1 && !look().under_way); /* and that was the last */
        assert(timeline_n_tokens(b.tl) == 0);
        hold_passes(false);
        ask(&b.x, b.tl, text, 40);
        wait_for(&b.x);
        expect_same(&b.x.out, &long_alone.out);
        end_beside(&b);
    }

    /* The session is closed, and the daemon ends. */
    begin_beside(&b);
    engine_thread_close(engine, b.tl);
    wait_for_more(&b.d);
    assert(b.x.job && look().under_way);
    engine_thread_stop(engine, b.d.job, JOB_SHUTDOWN);
    wait_for(&b.d);
    hold_passes(false);
    wait_for(&b.x);
    assert(b.x.result == 0 && strcmp(b.x.end_reason, "closed") == 0);
    run_done(&b.d);
    run_done(&b.x);
    engine_thread_close(engine, b.decodes);
    stop_engine();
}

/* What comes in meanwhile is done, though the processor has nothing else to do. */
static void test_others_meanwhile(void)
{
    struct timeline *a, *b;
    struct run x = {0}, y = {0}, z = {0};
    uint64_t used;

    start_lanes(PLACE_HYBRID, 0);
    a = timeline_for(1);
    b = timeline_for(2);
    ask(&y, b, "Hello", 20);
    wait_for(&y);
    used = timeline_n_tokens(b);
    hold_passes(true);
    ask(&x, a, text, 40);
    wait_for_pass();

    do_kind(&y, b, JOB_SAVE);
    assert(y.result == 0 && y.n_tokens == used);
    do_kind(&z, b, JOB_FORK);
    assert(z.result == 0 && z.fork);
    submit(&y, b, &(struct job_request){.kind = JOB_REWIND, .rewind_to = 3});
    wait_for(&y);
    assert(y.result == 0 && timeline_n_tokens(b) == 3);
    engine_thread_close(engine, b);
    engine_thread_relieve(engine, 2);
    engine_thread_set_weight(engine, 1, 50);
    b = TAKE_PTR(z.fork);
    ask(&y, b, "Next", 10); /* nobody decodes, and the GPU is busy: the processor reads it */
    wait_for(&y);
    assert(y.result == 0 && look().under_way);
    let_pass_end();
    hold_passes(false);
    wait_for(&x);
    expect_same(&x.out, &long_alone.out);
    run_done(&x);
    run_done(&y);
    run_done(&z);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
    stop_engine();
}

/* False: the first one was done before the other had taken any memory from it. */
static bool runs_out_of_memory(const struct run *grown, uint64_t kv_bytes)
{
    struct timeline *a, *b;
    struct run x = {0}, y = {0};
    bool runs_out;
    unsigned rows;

    start_lanes(PLACE_HYBRID, kv_bytes);
    a = timeline_for(1);
    b = timeline_for(2);
    ask(&x, a, "Hello", 1200);
    wait_for_state(a, TIMELINE_DECODE);
    hold_passes(true);
    rows = look().n_rows;
    ask(&y, b, text, 40);
    wait_for_pass();
    while (look().n_rows - rows < long_alone.usage.prompt_tokens / 2) {
        let_pass_end();
        wait_for_pass();
    }
    wait_for_idle_pass();
    take(&x);
    runs_out = x.job && x.out.n < grown->out.n;
    assert(y.job && look().n_dropped == 0);
    let_pass_end();
    hold_passes(false);
    wait_for(&x);
    expect_same(&x.out, &grown->out);
    wait_for(&y);
    expect_same(&y.out, &long_alone.out);
    assert(!runs_out || (look().n_dropped > 0 && statistics().preemptions > 0));
    run_done(&x);
    run_done(&y);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
    stop_engine();
    return runs_out;
}

/* Who runs out of memory, while the only one that could give way is in a pass, waits for that. */
static void test_memory(void)
{
    struct run grown = {0};
    struct timeline *a;
    unsigned n_tries = 0;
    uint64_t most;

    start_engine(0);
    a = timeline_for(1);
    ask(&grown, a, "Hello", 1200);
    wait_for(&grown);
    most = info_of(a).kv_bytes;
    engine_thread_close(engine, a);
    stop_engine();
    while (!runs_out_of_memory(&grown, most * 11 / 10))
        assert(++n_tries < 100);
    run_done(&grown);
}

/* Nor is it robbed for one of a better class, before it is over. */
static void test_classes(void)
{
    struct timeline *a, *b;
    struct run x = {0}, y = {0};

    start_lanes(PLACE_GPU, session_bytes * 6 / 5);
    assert(timeline_new(&a, &(struct timeline_options){
                                .n_ctx = CONTEXT, .account = 1, .class = CLASS_BATCH}) == 0);
    b = timeline_for(2);
    hold_passes(true);
    ask(&x, a, text, 40);
    wait_for_pass();
    let_pass_end();
    wait_for_pass();
    ask(&y, b, text, 40);
    wait_until_tokenised();
    wait_for_idle_pass();
    assert(info_of(a).state == TIMELINE_PREFILL && info_of(b).state == TIMELINE_QUEUED);
    assert(look().n_dropped == 0);
    let_pass_end();
    wait_for_pass();
    assert(look().n_dropped == 1);
    hold_passes(false);
    wait_for(&y);
    assert(x.job);
    wait_for(&x);
    expect_same(&x.out, &long_alone.out);
    expect_same(&y.out, &long_alone.out);
    assert(statistics().preemptions == 1);
    run_done(&x);
    run_done(&y);
    engine_thread_close(engine, a);
    engine_thread_close(engine, b);
    stop_engine();
}

/* ---- it fails ---- */

static void test_lost(enum placement_mode mode)
{
    struct timeline *a[4], *tl;
    struct run x[4] = {0}, d = {0};
    struct engine_statistics before, after;
    struct lane_info lanes[ENGINE_LANES];
    unsigned rows;

    start_lanes(mode, 0);
    tl = begin_decoding(&d);
    before = statistics();
    hold_passes(true);
    for (unsigned i = 0; i < ARRAY_SIZE(a); i++) {
        a[i] = timeline_for(i % 3);
        ask(&x[i], a[i], text, 40);
    }
    wait_until_tokenised();
    wait_for_pass();
    let_pass_end(); /* some of a prompt has been read */
    wait_for_pass();
    rows = look().n_rows;
    fail_passes();
    hold_passes(false);
    for (unsigned i = 0; i < ARRAY_SIZE(a); i++) {
        wait_for(&x[i]);
        assert(x[i].result == 0);
        expect_same(&x[i].out, &long_alone.out);
    }
    assert(look().n_removed == 1 && look().n_rows == rows);
    assert(engine_thread_lanes_changed(engine));
    engine_thread_get_lanes(engine, lanes);
    assert(lanes[LANE_CPU].works && !lanes[LANE_GPU].works);
    assert(strcmp(lanes[LANE_GPU].failure, "it fell off the bus") == 0);
    wait_for_more(&d);
    stop_decoding(tl, &d);
    after = statistics();
    assert(after.requests_failed == 0 && after.preemptions == before.preemptions);
    for (unsigned i = 0; i < ARRAY_SIZE(a); i++) { /* and so it stays */
        ask(&x[i], a[i], "Next", 10);
        wait_for(&x[i]);
        expect_same(&x[i].out, &next_alone.out);
        run_done(&x[i]);
        engine_thread_close(engine, a[i]);
    }
    stop_engine();
}

/* It comes back, and goes again, any number of times; where it cannot come back, later. */
static void test_comes_back(void)
{
    struct lane_info lanes[ENGINE_LANES];
    struct run x = {0};
    unsigned rows;

    start_lanes(PLACE_GPU, 0);
    for (int i = 0; i < 6; i++) {
        fail_passes();
        alone(&x, text, 40);
        expect_same(&x.out, &long_alone.out);
        run_done(&x);
        wait_for_lanes();
        if (i == 3) {
            pthread_mutex_lock(&gate.mutex);
            second.joins = -EIO;
            pthread_mutex_unlock(&gate.mutex);
            engine_thread_retry_gpu(engine, true);
            wait_for_lanes();
            engine_thread_get_lanes(engine, lanes);
            assert(!lanes[LANE_GPU].works);
            assert(strcmp(lanes[LANE_GPU].failure, "no such device") == 0);
        }
        comes_back();
        rows = look().n_rows;
        alone(&x, text, 40);
        expect_same(&x.out, &long_alone.out);
        assert(look().n_rows > rows);
        run_done(&x);
    }
    pthread_mutex_lock(&gate.mutex);
    second.fails = second.hangs = true;
    pthread_mutex_unlock(&gate.mutex);
    alone(&x, text, 40);
    expect_same(&x.out, &long_alone.out);
    run_done(&x);
    expect_nothing(true);
    stop_engine();
}

static void test_retry_time(void)
{
    const uint64_t minute = 60 * 1000000;

    assert(pass_retry_usec(1) == minute && pass_retry_usec(2) == 2 * minute);
    assert(pass_retry_usec(6) == 32 * minute && pass_retry_usec(7) == 60 * minute);
    assert(pass_retry_usec(UINT_MAX) == 60 * minute);
}

/* The pass cannot even be begun. */
static void test_lost_at_start(void)
{
    struct run x = {0};

    start_lanes(PLACE_GPU, 0);
    fail_passes();
    alone(&x, text, 40);
    expect_same(&x.out, &long_alone.out);
    assert(look().n_removed == 1 && look().n_rows == 0);
    run_done(&x);
    stop_engine();
}

/* The model's file changes while a pass is under way: nothing of that is given out either. */
static void test_all_lost(void)
{
    struct beside b;

    start_lanes(PLACE_HYBRID, 0);
    begin_beside(&b);
    hold_steps(true);
    wait_for_held_step();
    pthread_mutex_lock(&gate.mutex);
    gate.result = -ENOTRECOVERABLE;
    pthread_mutex_unlock(&gate.mutex);
    hold_passes(false);
    hold_steps(false);
    wait_for(&b.d);
    wait_for(&b.x);
    assert(b.d.result == -ENOTRECOVERABLE && b.x.result == -ENOTRECOVERABLE);
    assert(timeline_n_tokens(b.tl) == 0 && timeline_n_tokens(b.decodes) == 0);
    pthread_mutex_lock(&gate.mutex);
    gate.result = 0;
    pthread_mutex_unlock(&gate.mutex);
    run_done(&b.d);
    run_done(&b.x);
    engine_thread_close(engine, b.decodes);
    engine_thread_close(engine, b.tl);
    stop_engine();
}

/* ---- deterministic ---- */

static void ask_deterministic(struct run *r, struct timeline *tl, const char *what, uint32_t n)
{
    struct job_request q = question(what, n);

    q.deterministic = true;
    submit(r, tl, &q);
}

static void test_deterministic(void)
{
    struct timeline *a = timeline_for(1), *tl;
    struct run x = {0}, d = {0};
    struct second_lane before;

    /* In hybrid mode it is the processor's, and what the GPU did before is done again there. */
    start_lanes(PLACE_HYBRID, 0);
    tl = begin_decoding(&d);
    ask(&x, a, text, 40);
    wait_for(&x);
    before = look();
    assert(before.n_rows >= x.usage.prompt_tokens);
    ask_deterministic(&x, a, "Next", 10);
    wait_for(&x);
    expect_same(&x.out, &next_alone.out);
    assert(look().n_rows == before.n_rows && look().n_dropped == before.n_dropped + 1);
    ask_deterministic(&x, a, "And", 10); /* once is enough */
    wait_for(&x);
    assert(look().n_rows == before.n_rows && look().n_dropped == before.n_dropped + 1);
    stop_decoding(tl, &d);
    engine_thread_close(engine, a);
    stop_engine();

    /* In the GPU's it waits for that. */
    second = (struct second_lane){0};
    start_engine(0);
    engine_thread_set_placement(engine, PLACE_GPU);
    engine_thread_set_loading(engine, true);
    a = timeline_for(1);
    tl = timeline_for(2);
    ask_deterministic(&x, a, text, 40);
    ask(&d, tl, "Hello", 20);
    wait_for(&d); /* who does not ask for it does not wait */
    expect_same(&d.out, &short_alone.out);
    assert(x.job && timeline_n_tokens(a) == 0 && look().n_rows == 0);
    engine_thread_set_loading(engine, false);
    wait_for(&x);
    expect_same(&x.out, &long_alone.out);
    assert(look().n_rows == x.usage.prompt_tokens + 39 && look().n_dropped == 0);
    ask_deterministic(&d, tl, "Hello", 10); /* begun on the processor */
    wait_for(&d);
    assert(look().n_dropped == 1);

    /* And goes on without it. */
    before = look();
    hold_passes(true);
    ask_deterministic(&x, a, "Next", 10);
    wait_for_pass();
    fail_passes();
    hold_passes(false);
    wait_for(&x);
    expect_same(&x.out, &next_alone.out);
    assert(look().n_rows == before.n_rows && look().n_dropped == before.n_dropped + 1);
    run_done(&x);
    run_done(&d);
    engine_thread_close(engine, a);
    engine_thread_close(engine, tl);
    stop_engine();

    /* It never comes. */
    second = (struct second_lane){.joins = -EIO};
    start_engine(0);
    engine_thread_set_placement(engine, PLACE_GPU);
    engine_thread_set_loading(engine, true);
    a = timeline_for(1);
    ask_deterministic(&x, a, text, 40);
    engine_thread_set_loading(engine, false);
    wait_for(&x);
    expect_same(&x.out, &long_alone.out);
    run_done(&x);
    engine_thread_close(engine, a);
    stop_engine();
}

/* ---- whatever comes ---- */

static uint64_t state = 1;

static uint32_t below(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

/* Many at once, on little memory, some of them stopped; perhaps the GPU is lost among them. */
static void test_many(enum placement_mode mode, bool real, bool lost, uint64_t kv_bytes)
{
    enum { N = 12, REQUESTS = 24 };
    struct timeline *tl[N];
    struct run x[N] = {0};
    bool is_to_stop[N] = {false}, stopped[N] = {false};
    unsigned n_asked = 0, n_compared = 0;

    real ? start_real_lanes(mode, kv_bytes) : start_lanes(mode, kv_bytes);
    for (unsigned i = 0; i < N; i++)
        tl[i] = NULL;
    while (n_asked < REQUESTS) {
        unsigned i = below(N);

        if (x[i].job) {
            if (is_to_stop[i] && below(20) == 0) {
                engine_thread_stop(engine, x[i].job, JOB_CANCELLED);
                stopped[i] = true;
            }
            pump();
            continue;
        }
        if (tl[i]) {
            if (!stopped[i]) {
                expect_same(&x[i].out, &long_alone.out);
                n_compared++;
            }
            assert(x[i].result == 0);
            engine_thread_close(engine, tl[i]);
        }
        tl[i] = timeline_for(i % 4);
        stopped[i] = false;
        is_to_stop[i] = below(3) == 0;
        ask(&x[i], tl[i], text, 40);
        n_asked++;
        if (lost && n_asked == REQUESTS / 2)
            fail_passes();
    }
    for (unsigned i = 0; i < N; i++) {
        if (!tl[i])
            continue;
        wait_for(&x[i]);
        assert(x[i].result == 0);
        if (!stopped[i]) {
            expect_same(&x[i].out, &long_alone.out);
            n_compared++;
        }
        run_done(&x[i]);
        engine_thread_close(engine, tl[i]);
    }
    if (lost && look().n_removed == 0) { /* the processor was quick enough to leave it nothing */
        struct run d = {0}, r = {0};
        struct timeline *decoding = begin_decoding(&d);

        alone(&r, text, 40);
        expect_same(&r.out, &long_alone.out);
        run_done(&r);
        stop_decoding(decoding, &d);
    }
    assert(lost || look().n_rows > 0); /* it may be lost in its first pass */
    assert(look().n_removed == lost);
    printf("%u requests of %u came to their end\n", n_compared, n_asked);
    stop_engine();
}

/* A conversation that goes from lane to lane, is forked and rewound, and loses the device. */
static void test_real(void)
{
    struct timeline *a = timeline_for(2), *f, *tl;
    struct run x = {0}, d = {0};
    struct second_lane before;
    uint32_t used;

    start_real_lanes(PLACE_HYBRID, 0);
    tl = begin_decoding(&d);
    before = look();
    ask(&x, a, text, 40);
    wait_for(&x);
    expect_same(&x.out, &long_alone.out);
    assert(look().n_rows - before.n_rows == x.usage.prompt_tokens);
    used = timeline_n_tokens(a);
    do_kind(&x, a, JOB_FORK);
    f = TAKE_PTR(x.fork);
    ask(&x, a, "Next", 10);
    wait_for(&x);
    expect_same(&x.out, &next_alone.out);
    submit(&x, a, &(struct job_request){.kind = JOB_REWIND, .rewind_to = used - 1});
    wait_for(&x);
    assert(x.result == 0);

    /* What the device has done of the fork is known there, and done again by the processor. */
    before = look();
    ask_deterministic(&x, f, "Next", 10);
    wait_for(&x);
    expect_same(&x.out, &next_alone.out);
    assert(look().n_rows == before.n_rows && look().n_dropped == before.n_dropped + 1);

    engine_thread_close(engine, a);
    a = timeline_for(3);
    fail_passes();
    ask(&x, a, text, 40);
    wait_for(&x);
    expect_same(&x.out, &long_alone.out);
    assert(look().n_rows == before.n_rows && look().n_removed == 1);
    wait_for_more(&d);
    stop_decoding(tl, &d);
    run_done(&x);
    engine_thread_close(engine, a);
    engine_thread_close(engine, f);
    stop_engine();
}

int main(int argc, char **argv)
{
    struct timeline *tl;
    struct model *m;

    assert(argc == 2);
    main_thread = pthread_self();
    setbuf(stdout, NULL);
    chat_model_write(argv[1], 1024, CHAT_MODEL_CONTEXT);
    m = must_open(argv[1]);
    model = m;
    text = long_text(LONG_TEXT);

    start_engine(0);
    alone(&short_alone, "Hello", 20);
    tl = timeline_for(1);
    ask(&long_alone, tl, text, 40);
    wait_for(&long_alone);
    ask(&next_alone, tl, "Next", 10);
    wait_for(&next_alone);
    session_bytes = info_of(tl).kv_bytes;
    engine_thread_close(engine, tl);
    stop_engine();

    test_joins();
    test_all_on_gpu();
    test_measured();
    test_measured_beside();
    test_lost_in_measuring();
    test_hybrid();
    test_stop();
    test_others_meanwhile();
    test_memory();
    test_classes();
    test_lost(PLACE_HYBRID);
    test_lost(PLACE_GPU);
    test_lost_at_start();
    test_comes_back();
    test_retry_time();
    test_all_lost();
    test_deterministic();
    test_many(PLACE_HYBRID, false, false, 0);
    test_many(PLACE_HYBRID, false, true, session_bytes * 3);
    test_many(PLACE_GPU, false, true, session_bytes * 3);

    /* The engine's own. */
    test_real();
    test_many(PLACE_HYBRID, true, false, 0);
    test_many(PLACE_GPU, true, false, session_bytes * 3);
    test_many(PLACE_HYBRID, true, true, session_bytes * 3);
    test_many(PLACE_GPU, true, true, session_bytes * 3);
    run_done(&short_alone);
    run_done(&long_alone);
    run_done(&next_alone);
    free(text);
    model_free(m);
    unlink(argv[1]);
    return 0;
}
