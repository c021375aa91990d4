/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/test-engine-harness.h"
#include "engine/engine-internal.h"
#include "engine/tokenizer.h"
#include "tests/queued-backend.h"

#undef NDEBUG
#include <assert.h>

/* ---- the wrapped functions ---- */

struct gate gate = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

int __real_engine_start(struct engine *e, enum engine_lane lane, struct step_item *items, size_t n);
int __wrap_engine_start(struct engine *e, enum engine_lane lane, struct step_item *items, size_t n);
int __real_engine_end(struct engine *e, enum engine_lane lane);
int __wrap_engine_end(struct engine *e, enum engine_lane lane);
int __real_engine_wait(struct engine *e, enum engine_lane lane, uint64_t usec);
int __wrap_engine_wait(struct engine *e, enum engine_lane lane, uint64_t usec);
int __wrap_engine_add_gpu(struct engine *e, struct error *err);
bool __real_engine_has_gpu(const struct engine *e);
bool __wrap_engine_has_gpu(const struct engine *e);
bool __wrap_engine_may_add_gpu(const struct engine *e);
void __real_engine_remove_gpu(struct engine *e);
void __wrap_engine_remove_gpu(struct engine *e);
const char *__real_engine_lane_failure(const struct engine *e, enum engine_lane lane);
const char *__wrap_engine_lane_failure(const struct engine *e, enum engine_lane lane);
void __real_session_drop_kv(struct session *s);
void __wrap_session_drop_kv(struct session *s);
struct session *__real_session_free(struct session *s);
struct session *__wrap_session_free(struct session *s);
unsigned __real_session_lanes(const struct session *s);
unsigned __wrap_session_lanes(const struct session *s);
int __real_tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                            const struct encode_options *options, struct token_array *ids);
int __wrap_tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                            const struct encode_options *options, struct token_array *ids);

/* ---- the second lane ---- */

struct second_lane second = {.joins = -ENOENT};
static struct queued_backend *device; /* the engine's */

/* Engine thread: whose K and V are by whom, as the engine would know it. */
static struct {
    const struct session *session;
    unsigned lanes;
} computed[256];

static unsigned *lanes_of(const struct session *s)
{
    size_t free = ARRAY_SIZE(computed);

    for (size_t i = 0; i < ARRAY_SIZE(computed); i++) {
        if (computed[i].session == s)
            return &computed[i].lanes;
        if (!computed[i].session && free == ARRAY_SIZE(computed))
            free = i;
    }
    assert(free < ARRAY_SIZE(computed));
    computed[free].session = s;
    computed[free].lanes = 0;
    return &computed[free].lanes;
}

static void note_lanes(const struct step_item *items, size_t n, enum engine_lane lane)
{
    for (size_t i = 0; i < n; i++)
        *lanes_of(items[i].session) |= 1u << lane;
}

unsigned __wrap_session_lanes(const struct session *s)
{
    return second.real ? __real_session_lanes(s) : *lanes_of(s);
}

static struct step_item *pass_items;
static size_t n_pass_items;

static bool in_pass(const struct session *s)
{
    for (size_t i = 0; i < n_pass_items; i++)
        if (pass_items[i].session == s)
            return true;
    return false;
}

void __wrap_session_drop_kv(struct session *s)
{
    assert(!in_pass(s));
    pthread_mutex_lock(&gate.mutex);
    second.n_dropped += __wrap_session_lanes(s) != 0;
    pthread_mutex_unlock(&gate.mutex);
    *lanes_of(s) = 0;
    __real_session_drop_kv(s);
}

struct session *__wrap_session_free(struct session *s)
{
    assert(!s || !in_pass(s));
    for (size_t i = 0; i < ARRAY_SIZE(computed); i++)
        if (s && computed[i].session == s)
            computed[i].session = NULL;
    return __real_session_free(s);
}

int __wrap_engine_add_gpu(struct engine *e, struct error *err)
{
    int r;

    pthread_mutex_lock(&gate.mutex);
    r = second.joins;
    if (second.real && r == 0) {
        device = queued_backend_new(&e->limits, &(struct queued_options){.map_limit = 1 << 22});
        r = engine_add_lane(e, queued_backend_base(device), err);
        if (r < 0)
            fprintf(stderr, "%s\n", err->text);
        assert(r == 0);
    }
    assert(!second.there);
    second.there = r == 0;
    second.n_joined += r == 0;
    pthread_mutex_unlock(&gate.mutex);
    return r < 0 ? error_set(err, -r, "no such device") : 0;
}

bool __wrap_engine_may_add_gpu(const struct engine *e)
{
    (void)e;
    return !second.hangs;
}

bool __wrap_engine_has_gpu(const struct engine *e)
{
    return second.real ? __real_engine_has_gpu(e) : second.there;
}

void __wrap_engine_remove_gpu(struct engine *e)
{
    pthread_mutex_lock(&gate.mutex);
    assert(second.there && !second.under_way);
    second.there = false;
    second.n_removed++;
    pthread_mutex_unlock(&gate.mutex);
    if (second.real)
        __real_engine_remove_gpu(e);
}

const char *__wrap_engine_lane_failure(const struct engine *e, enum engine_lane lane)
{
    if (second.real)
        return __real_engine_lane_failure(e, lane);
    return lane == LANE_GPU && second.fails ? "it fell off the bus" : NULL;
}

/* The device is slow, now more and now less, and perhaps lost. */
static int start_real(struct engine *e, struct step_item *items, size_t n)
{
    static uint32_t k;
    bool fails;
    int r;

    pthread_mutex_lock(&gate.mutex);
    fails = second.fails;
    pthread_mutex_unlock(&gate.mutex);
    if (fails)
        queued_backend_lose(device, 1);
    queued_backend_delay(device, k++ * 7 % 11);
    r = __real_engine_start(e, LANE_GPU, items, n);
    pass_items = items;
    n_pass_items = r == 0 ? n : 0;
    pthread_mutex_lock(&gate.mutex);
    second.under_way = r == 0;
    pthread_mutex_unlock(&gate.mutex);
    return r;
}

static int start_second(struct step_item *items, size_t n)
{
    int r = 0;

    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < i; k++)
            assert(items[i].session != items[k].session);
    pthread_mutex_lock(&gate.mutex);
    assert(second.there && !second.under_way);
    if (second.fails && !second.hold) {
        r = -ENODEV;
    } else {
        pass_items = items;
        n_pass_items = n;
        second.under_way = true;
        pthread_cond_broadcast(&gate.changed);
    }
    pthread_mutex_unlock(&gate.mutex);
    return r;
}

/* With the mutex held. */
static bool may_end(void)
{
    return !second.hold || second.allowed > 0;
}

int __wrap_engine_wait(struct engine *e, enum engine_lane lane, uint64_t usec)
{
    struct timespec until;
    int r = 0;

    assert(lane == LANE_GPU && second.under_way);
    if (second.real)
        return __real_engine_wait(e, lane, usec);
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)(usec % 1000000) * 1000;
    until.tv_sec += (time_t)(usec / 1000000) + until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&gate.mutex);
    second.is_waited_for = usec > 0;
    pthread_cond_broadcast(&gate.changed);
    while (!may_end() && r == 0)
        r = pthread_cond_timedwait(&gate.changed, &gate.mutex, &until);
    r = may_end() ? 0 : -ETIMEDOUT;
    pthread_mutex_unlock(&gate.mutex);
    return r;
}

static int end_second(struct engine *e)
{
    struct step_item *items = pass_items;
    size_t n = n_pass_items;
    bool fails;
    int r;

    pthread_mutex_lock(&gate.mutex);
    assert(second.under_way);
    while (!second.real && !may_end())
        pthread_cond_wait(&gate.changed, &gate.mutex);
    if (second.hold)
        second.allowed--;
    fails = second.fails;
    pthread_mutex_unlock(&gate.mutex);

    n_pass_items = 0; /* no longer looked at */
    r = second.real ? __real_engine_end(e, LANE_GPU) : fails ? -ENODEV : engine_step(e, items, n);
    pthread_mutex_lock(&gate.mutex);
    second.under_way = false;
    second.n_ended++;
    if (r == 0) {
        second.n_passes++;
        for (size_t i = 0; i < n; i++)
            second.n_rows += items[i].n_tokens;
    }
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.mutex);
    if (r == 0)
        note_lanes(items, n, LANE_GPU);
    return r;
}

void hold_passes(bool hold)
{
    pthread_mutex_lock(&gate.mutex);
    second.hold = hold;
    second.allowed = 0;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.mutex);
}

void wait_for_pass(void)
{
    pthread_mutex_lock(&gate.mutex);
    while (!second.under_way)
        pthread_cond_wait(&gate.changed, &gate.mutex);
    pthread_mutex_unlock(&gate.mutex);
}

void wait_for_idle_pass(void)
{
    pthread_mutex_lock(&gate.mutex);
    second.is_waited_for = false;
    while (!second.under_way || !second.is_waited_for)
        pthread_cond_wait(&gate.changed, &gate.mutex);
    pthread_mutex_unlock(&gate.mutex);
}

void let_pass_end(void)
{
    unsigned n;

    pthread_mutex_lock(&gate.mutex);
    assert(second.under_way);
    n = second.n_ended;
    second.allowed++;
    pthread_cond_broadcast(&gate.changed);
    while (second.n_ended == n)
        pthread_cond_wait(&gate.changed, &gate.mutex);
    pthread_mutex_unlock(&gate.mutex);
}

/* ---- gates ---- */

int __wrap_engine_end(struct engine *e, enum engine_lane lane)
{
    return lane == LANE_GPU ? end_second(e) : __real_engine_end(e, lane);
}

int __wrap_engine_start(struct engine *e, enum engine_lane lane, struct step_item *items, size_t n)
{
    int result;

    if (lane == LANE_GPU)
        return second.real ? start_real(e, items, n) : start_second(items, n);
    for (size_t i = 0; i < n; i++)
        assert(!in_pass(items[i].session));

    pthread_mutex_lock(&gate.mutex);
    while (gate.hold_steps && gate.steps_allowed == 0) {
        gate.step_waits = true;
        pthread_cond_broadcast(&gate.changed);
        pthread_cond_wait(&gate.changed, &gate.mutex);
    }
    gate.step_waits = false;
    if (gate.hold_steps)
        gate.steps_allowed--;
    gate.n_steps++;
    result = gate.result;
    pthread_mutex_unlock(&gate.mutex);
    if (result < 0)
        return result;
    note_lanes(items, n, LANE_CPU);
    return __real_engine_start(e, lane, items, n);
}

int __wrap_tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                            const struct encode_options *options, struct token_array *ids)
{
    int r;

    pthread_mutex_lock(&gate.mutex);
    while (gate.hold_encode && n >= BIG_TEXT) {
        gate.encode_waits = true;
        pthread_cond_broadcast(&gate.changed);
        pthread_cond_wait(&gate.changed, &gate.mutex);
    }
    if (n >= BIG_TEXT)
        gate.encode_waits = false;
    pthread_mutex_unlock(&gate.mutex);
    r = __real_tokenizer_encode(t, text, n, options, ids);
    if (n >= BIG_TEXT) {
        pthread_mutex_lock(&gate.mutex);
        gate.encode_result = r;
        pthread_mutex_unlock(&gate.mutex);
    }
    return r;
}

/* Lets n more steps begin, then holds the next; returns when it is held there. */
void allow_steps(unsigned n)
{
    pthread_mutex_lock(&gate.mutex);
    gate.hold_steps = true;
    gate.steps_allowed = n;
    gate.step_waits = false;
    pthread_cond_broadcast(&gate.changed);
    while (!gate.step_waits)
        pthread_cond_wait(&gate.changed, &gate.mutex);
    pthread_mutex_unlock(&gate.mutex);
}

void hold_steps(bool hold)
{
    pthread_mutex_lock(&gate.mutex);
    gate.hold_steps = hold;
    gate.steps_allowed = 0;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.mutex);
}

void wait_for_held_step(void)
{
    pthread_mutex_lock(&gate.mutex);
    while (!gate.step_waits)
        pthread_cond_wait(&gate.changed, &gate.mutex);
    pthread_mutex_unlock(&gate.mutex);
}

void hold_encode(bool hold)
{
    pthread_mutex_lock(&gate.mutex);
    gate.hold_encode = hold;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.mutex);
}

void wait_for_held_encode(void)
{
    pthread_mutex_lock(&gate.mutex);
    while (!gate.encode_waits)
        pthread_cond_wait(&gate.changed, &gate.mutex);
    pthread_mutex_unlock(&gate.mutex);
}

/* The fail_at-th allocation of the threads that work fails; 0: none. */
_Atomic int fail_at;
pthread_t main_thread;

static bool fails(void)
{
    int n = atomic_load(&fail_at);

    if (n <= 0 || pthread_equal(pthread_self(), main_thread))
        return false;
    return atomic_fetch_sub(&fail_at, 1) == 1;
}

void *__real_malloc(size_t n);
void *__wrap_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_realloc(void *p, size_t n);
void *__real_reallocarray(void *p, size_t n, size_t size);
void *__wrap_reallocarray(void *p, size_t n, size_t size);

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? NULL : __real_realloc(p, n);
}

void *__wrap_reallocarray(void *p, size_t n, size_t size)
{
    return fails() ? NULL : __real_reallocarray(p, n, size);
}

/* ---- the loop ---- */

const struct model *model;
struct engine_thread *engine;
static uint64_t last_id;

void run_done(struct run *r)
{
    assert(!r->job && !r->fork);
    buffer_done(&r->out);
    buffer_done(&r->saved);
    *r = (struct run){0};
}

void start_with(const struct engine_options *options)
{
    struct error err = {0};

    if (engine_thread_new(&engine, model, options, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    engine_thread_set_record_interval(engine, 0);
}

void start_engine(uint64_t kv_bytes)
{
    start_with(&(struct engine_options){.n_threads = 1,
                                        .max_rows = 64,
                                        .kv_bytes = kv_bytes,
                                        /* for the same bits */
                                        .gpu_activations = ACTIVATIONS_INT8});
}

static void start_second_lane(enum placement_mode mode, uint64_t kv_bytes, bool real)
{
    struct pollfd p;

    second = (struct second_lane){.real = real};
    start_engine(kv_bytes);
    engine_thread_set_placement(engine, mode);
    engine_thread_set_loading(engine, false);
    p = (struct pollfd){.fd = engine_thread_fd(engine), .events = POLLIN};
    assert(poll(&p, 1, -1) == 1);
    assert(engine_thread_lanes_changed(engine) && second.there);
}

void start_lanes(enum placement_mode mode, uint64_t kv_bytes)
{
    start_second_lane(mode, kv_bytes, false);
}

void start_real_lanes(enum placement_mode mode, uint64_t kv_bytes)
{
    start_second_lane(mode, kv_bytes, true);
}

void take(struct run *r)
{
    uint64_t end;

    if (!r->reads || !r->job->record)
        return;
    while ((end = engine_thread_output(engine, r->job, r->out.n)) > r->out.n) {
        assert(buffer_reserve(&r->out, end - r->out.n) == 0);
        assert(request_record_read(r->job->record, r->out.n, r->out.data + r->out.n,
                                   end - r->out.n) == 0);
        r->out.n = end;
    }
}

void came_back(struct run *r)
{
    struct job *j = r->job;

    r->reads = true;
    take(r);
    r->result = j->result;
    r->error = j->error;
    r->end_reason = j->end_reason;
    r->usage = j->usage;
    r->n_tokens = j->n_tokens;
    r->fork = TAKE_PTR(j->fork);
    r->saved = j->saved;
    j->saved = (struct buffer){0};
    r->job = job_free(j);
}

/* Takes what news there are; waits for some first. */
void pump(void)
{
    struct pollfd p = {.fd = engine_thread_fd(engine), .events = POLLIN};
    struct job *j;
    bool finished;

    assert(poll(&p, 1, -1) == 1);
    while ((j = engine_thread_news(engine, &finished))) {
        struct run *r = j->userdata;

        if (finished)
            came_back(r);
        else
            take(r);
    }
}

void wait_for(const struct run *r)
{
    while (r->job)
        pump();
}

struct timeline_info info_of(struct timeline *tl)
{
    struct timeline_info info;

    timeline_get_info(engine, tl, &info);
    return info;
}

void wait_for_state(struct timeline *tl, enum timeline_state state)
{
    while (info_of(tl).state != state)
        pump();
}

void stop_engine(void)
{
    engine = engine_thread_free(engine); /* which sees that nothing is left */
}

struct timeline *timeline_for(uint64_t account)
{
    struct timeline *tl;

    assert(timeline_new(&tl, &(struct timeline_options){
                                 .n_ctx = CONTEXT, .account = account, .flow = ++last_id}) == 0);
    return tl;
}

void submit(struct run *r, struct timeline *tl, struct job_request *q)
{
    assert(!r->job);
    run_done(r);
    r->reads = true;
    assert(job_new(&r->job, ++last_id, tl, q) == 0);
    r->job->userdata = r;
    if (job_kind_streams(r->job->request.kind))
        assert(engine_thread_prepare(engine, r->job) == 0);
    engine_thread_submit(engine, r->job);
}

void add_message(struct job_request *q, enum chat_role role, const char *text, size_t n)
{
    char *copy = malloc(n + 1);

    q->messages = reallocarray(q->messages, q->n_messages + 1, sizeof(*q->messages));
    assert(copy && q->messages);
    memcpy(copy, text, n);
    q->messages[q->n_messages++] = (struct job_message){role, copy, n};
}

/* A chat's next turn, answered with max_tokens tokens that the seed chooses, as text. */
struct job_request question(const char *text, uint32_t max_tokens)
{
    struct job_request q = {.kind = JOB_GENERATE, .format = JOB_TEXT};

    add_message(&q, CHAT_USER, text, strlen(text));
    q.options.max_tokens = max_tokens;
    q.options.ignore_end = true;
    q.options.sampler.temperature = 1;
    q.options.sampler.seed = 7;
    return q;
}

void ask(struct run *r, struct timeline *tl, const char *text, uint32_t max_tokens)
{
    struct job_request q = question(text, max_tokens);

    submit(r, tl, &q);
}

void do_kind(struct run *r, struct timeline *tl, enum job_kind kind)
{
    struct job_request q = {.kind = kind, .fork = {.account = 1}};

    submit(r, tl, &q);
    wait_for(r);
}

/* Output has no NUL at its end. */
bool says(const struct buffer *b, const char *text)
{
    return memmem(b->data, b->n, text, strlen(text));
}

bool same(const struct buffer *a, const struct buffer *b)
{
    return a->n == b->n && memcmp(a->data, b->data, a->n) == 0;
}

void expect_same(const struct buffer *a, const struct buffer *b)
{
    assert(a->n > 0);
    assert(same(a, b));
}

char *long_text(size_t n)
{
    char *text = malloc(n + 1);

    assert(text);
    for (size_t i = 0; i < n; i++)
        text[i] = (char)('a' + (i * i / 7 + i) % 26);
    text[n] = 0;
    return text;
}

/* What a request gives on an empty session when nobody else is there and memory is ample. */
void alone(struct run *r, const char *text, uint32_t max_tokens)
{
    struct timeline *tl = timeline_for(1);

    ask(r, tl, text, max_tokens);
    wait_for(r);
    assert(r->result == 0);
    engine_thread_close(engine, tl);
}

/* All prompts submitted so far, one an account, have reached the engine thread: they went first. */
void wait_until_tokenised(void)
{
    struct job_request q = {.kind = JOB_MEASURE, .raw = true, .account = 99};
    struct run m = {0};

    add_message(&q, CHAT_USER, "x", 1);
    submit(&m, NULL, &q);
    wait_for(&m);
    run_done(&m);
}
