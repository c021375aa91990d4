/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "daemon/test-engine-harness.h"
#include "engine/tokenizer.h"

#undef NDEBUG
#include <assert.h>

/* ---- the wrapped functions ---- */

struct gate gate = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

int __real_engine_step(struct engine *e, struct step_item *items, size_t n);
int __wrap_engine_step(struct engine *e, struct step_item *items, size_t n);
int __real_tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                            const struct encode_options *options, struct token_array *ids);
int __wrap_tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                            const struct encode_options *options, struct token_array *ids);

int __wrap_engine_step(struct engine *e, struct step_item *items, size_t n)
{
    int result;

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
    return result < 0 ? result : __real_engine_step(e, items, n);
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
    start_with(&(struct engine_options){.n_threads = 1, .max_rows = 64, .kv_bytes = kv_bytes});
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
