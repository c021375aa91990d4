/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Requests at work. Each is a task of the scheduler: queued there until there is memory for it,
 * then running, which is to say picked for steps. In a step it computes what its session lost (when
 * its KV had been given up), then its prompt, then one token at a time.
 *
 * Memory is found in this order: pages that are free; KV of timelines without a request, the least
 * recently used first; KV of requests that wait in the queue or for a slow reader; at last the
 * scheduler names a victim among those that run, which goes back into the queue. What waits to be
 * let in makes victims of lower classes only. The oldest of the highest class is never a victim, so
 * somebody always gets to the end. Giving KV up loses nothing
 * but time: the tokens stay, and computing them again gives the same bits.
 *
 * A request whose reader is slow stops being picked while OUTPUT_PAUSE bytes of it wait. It keeps
 * its place and its memory until somebody needs them; then it leaves the scheduler ("parked") until
 * its reader has caught up.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "daemon/engine-thread-internal.h"
#include "engine/model.h"
#include "ipc/record.h"

#define MAX_RUNNING 64u
#define HEADROOM 256u          /* tokens that a request shall find room for when it is let in */
#define PROGRESS_LEAST 256u    /* rows; no progress is told of shorter prompts */
#define POSITIONS_USEC 100000u /* between two looks at the queue that only time has changed */

struct job *job_of(struct scheduler_task *task)
{
    return (struct job *)((char *)task - offsetof(struct job, work.task));
}

static struct session *session_of(const struct job *j)
{
    return j->timeline->session;
}

/* Tokens of the conversation when the request began. */
static uint32_t used_before(const struct job *j)
{
    return MIN(j->work.start + j->has_tail, j->timeline->options.n_ctx);
}

/* ---- what a request has before it ---- */

static const uint32_t *pending_tokens(const struct job *j, size_t *ret_n)
{
    if (j->work.generation)
        return generation_pending(j->work.generation, ret_n);
    *ret_n = j->ids.n - j->work.n_done;
    return j->ids.data + j->work.n_done;
}

static uint32_t n_pending(const struct job *j)
{
    size_t n;

    pending_tokens(j, &n);
    return (uint32_t)n; /* at most n_ctx */
}

static bool in_prefill(const struct job *j)
{
    return j->work.n_sampled == 0 || session_n_missing(session_of(j)) > 0;
}

/* Rows until the next token is sampled: what is missing, and a prompt's. */
static uint32_t rows_left(const struct job *j)
{
    uint32_t missing = session_n_missing(session_of(j));

    return missing + (j->work.n_sampled == 0 ? n_pending(j) : 0);
}

/* Bytes that it will take beyond those that it has, to get on for a while. */
static uint64_t bytes_wanted(struct engine_thread *t, const struct job *j)
{
    uint64_t held = session_kv_bytes(session_of(j)), need;
    uint32_t n = session_n_tokens(session_of(j)) + n_pending(j), most = j->timeline->options.n_ctx;
    uint32_t max_tokens = j->request.options.max_tokens;
    uint32_t headroom = HEADROOM << MIN(j->work.n_preempted, 16u);

    if (j->request.kind == JOB_APPEND)
        headroom = 0;
    else if (max_tokens > 0)
        headroom = MIN(headroom, max_tokens - MIN(j->work.n_sampled, max_tokens));
    n += MIN(headroom, most - MIN(n, most));
    /* What may not be enough is tried all the same: alone. */
    need = MIN(engine_kv_bytes(t->engine, n), t->statistics.kv_bytes_max);
    return need - MIN(need, held);
}

/* By whom its next rows may be computed. */
static unsigned lanes_of(struct engine_thread *t, const struct job *j)
{
    if (j->request.deterministic)
        return 1u << j->work.lane;
    return in_prefill(j) ? t->choice.prefill : t->choice.decode;
}

/* Also of one in a pass, which is then as it was before that. */
static void update_task(struct engine_thread *t, struct job *j)
{
    struct scheduler_task *task = &j->work.task;
    uint32_t missing = session_n_missing(session_of(j)), max = j->request.options.max_tokens;

    task->n_pending = missing > 0 ? missing : n_pending(j);
    task->is_prompt = in_prefill(j);
    task->is_blocked = j->work.is_paused || j->work.waits_for_pass || spill_is_away(j->timeline);
    task->lanes = lanes_of(t, j);
    task->kv_bytes = bytes_wanted(t, j);
    task->max_tokens = max - MIN(j->work.n_sampled, max);
}

/*
 * A deterministic request keeps to one lane, and so must have done what its session has of others,
 * and of that lane when it computed with something else.
 * In the GPU's mode it waits for the GPU to join.
 */
void work_choose_lane(struct engine_thread *t, struct job *j)
{
    struct timeline *tl = j->timeline;

    if (!j->request.deterministic)
        return;
    j->work.lane = placement_fixed_lane(&t->placement);
    if (t->gpu == GPU_WAITS && t->placement.mode == PLACE_GPU)
        j->work.lane = LANE_GPU;
    if ((session_lanes(tl->session) & ~(1u << j->work.lane)) == 0)
        return;
    spill_forget(t, tl);
    session_drop_kv(tl->session);
    work_publish_timeline(t, tl);
}

/* ---- ends ---- */

static void take_out(struct engine_thread *t, struct job *j)
{
    struct job_work *w = &j->work;

    if (w->in_scheduler)
        scheduler_remove(t->scheduler, &w->task);
    w->in_scheduler = w->is_running = false;
    t->queue_changed = true;
}

/* What belongs to the engine goes; the answer is in the job. */
static void leave(struct engine_thread *t, struct job *j)
{
    struct job_work *w = &j->work;

    take_out(t, j);
    if (w->generation)
        generation_usage(w->generation, &j->usage);
    else if (w->begun)
        j->usage = (struct generation_usage){.prompt_tokens = (uint32_t)j->ids.n,
                                             .cached_tokens = w->start};
    if (w->begun && j->has_tail) { /* the answer's before, not the prompt's */
        j->usage.prompt_tokens--;
        j->usage.cached_tokens++;
    }
    w->generation = generation_free(w->generation);
    if (!w->begun)
        return;
    if (w->previous)
        w->previous->work.next = w->next;
    else
        t->active = w->next;
    if (w->next)
        w->next->work.previous = w->previous;
    w->previous = w->next = NULL;
    session_set_mark(session_of(j), SESSION_NO_MARK);
    if (spill_is_away(j->timeline)) /* it did not come to that */
        session_drop_kv(session_of(j));
    j->timeline->is_used = false;
    j->timeline->last_used = ++t->n_uses;
    work_publish_timeline(t, j->timeline);
}

/* As if the request had not been. */
static void roll_back(struct job *j)
{
    if (j->work.generation)
        generation_cancel(j->work.generation);
    if (j->work.begun) /* one that had come to its end already does not cancel */
        session_rewind(session_of(j), j->work.start);
}

/* Goes with the end: a process that takes this one's place shall find both or none. */
static void append_usage(struct job *j)
{
    job_append(j, &(struct record){.type = RECORD_USAGE,
                                   .prompt_tokens = j->usage.prompt_tokens,
                                   .completion_tokens = j->usage.completion_tokens,
                                   .cached_tokens = j->usage.cached_tokens});
}

static void finish_error(struct engine_thread *t, struct job *j, int code, const struct error *err)
{
    roll_back(j);
    leave(t, j);
    job_finish_error(t, j, code, err);
}

static void finish_stopped(struct engine_thread *t, struct job *j)
{
    bool begun = j->work.begun;

    roll_back(j);
    leave(t, j);
    if (begun)
        append_usage(j);
    job_finish_stopped(t, j);
}

void work_finish_well(struct engine_thread *t, struct job *j, const char *reason, bool has_tail)
{
    struct timeline *tl = j->timeline;

    leave(t, j);
    j->end_reason = reason;
    append_usage(j);
    j->work.commit.phase = REQUEST_DONE;
    j->work.commit.usage = j->usage;
    j->work.commit.after = (struct request_before){.n_tokens = session_n_tokens(tl->session),
                                                   .position = j->position,
                                                   .has_tail = has_tail,
                                                   .tail = has_tail ? j->work.last_id : 0};
    job_emit_last(t, j, &(struct record){.type = RECORD_END, .reason = reason});
    pthread_mutex_lock(&t->mutex);
    tl->position = j->position;
    tl->has_tail = has_tail;
    tl->tail = j->work.last_id;
    pthread_mutex_unlock(&t->mutex);
    work_publish_timeline(t, tl);
    job_let_go(t, j);
}

/* ---- beginning ---- */

int work_make_session(struct engine_thread *t, struct timeline *tl)
{
    struct session_record *record = tl->options.record;
    int r;

    if (tl->session)
        return 0;
    r = session_new(&tl->session, t->engine, tl->options.n_ctx,
                    record ? session_record_memory(record) : NULL);
    if (r == 0 && record)
        session_record_set_has_engine(record);
    return r;
}

static int begin(struct engine_thread *t, struct job *j, struct error *err)
{
    struct job_work *w = &j->work;
    struct timeline *tl = j->timeline;
    uint32_t used;
    int r;

    if (t->lost < 0)
        return lost_error(err, t->lost);
    r = work_make_session(t, tl);
    if (r < 0)
        return error_set(err, -r, "out of memory");
    used = j->resumes ? request_record_before(j->record)->n_tokens : session_n_tokens(tl->session);
    if (j->ids.n > tl->options.n_ctx - used)
        return error_set(
            err, EMSGSIZE, "the prompt has %zu tokens and the session has room for %u of %u",
            j->ids.n - j->has_tail, tl->options.n_ctx - work_n_tokens(tl), tl->options.n_ctx);
    if (j->resumes)
        r = j->request.kind == JOB_GENERATE ? recover_generation(j, err) : recover_append(j, err);
    else if (j->request.kind == JOB_GENERATE)
        r = generation_new(&w->generation, tl->session, j->ids.data, j->ids.n, &j->request.options,
                           err);
    if (r < 0)
        return r;
    session_set_mark(tl->session, used);
    w->start = used;
    w->begun = true;
    w->next = t->active;
    if (w->next)
        w->next->work.previous = j;
    t->active = j;
    tl->is_used = true;
    tl->last_used = ++t->n_uses;
    w->task = (struct scheduler_task){
        .account = tl->options.account, .flow = tl->options.flow, .class = tl->options.class};
    work_choose_lane(t, j);
    update_task(t, j);
    r = scheduler_add(t->scheduler, &w->task);
    if (r < 0)
        return error_set(err, -r, "out of memory");
    w->in_scheduler = true;
    t->queue_changed = true;
    job_commit(t, j); /* the generator's state before the first token */
    return 0;
}

static void finish_generation(struct engine_thread *t, struct job *j, enum finish_reason reason)
{
    /*
     * At the end the session has everything but the last token. Where that one belongs to the
     * answer, it goes before the next prompt; the end of the turn is the chat template's business.
     */
    work_finish_well(t, j, finish_reason_name(reason), reason == FINISH_LENGTH);
}

void work_begin(struct engine_thread *t, struct job *j)
{
    struct error err = {0};
    int r;

    if (atomic_load(&j->stop) != JOB_GOES_ON) {
        recover_nothing(j);
        finish_stopped(t, j);
        return;
    }
    if (j->result < 0) { /* the prompt's thread found it wrong */
        recover_nothing(j);
        job_finish_error(t, j, j->result, &j->error);
        return;
    }
    r = begin(t, j, &err);
    if (r < 0) {
        recover_nothing(j);
        finish_error(t, j, r, &err);
        return;
    }
    if (j->work.generation && generation_finish(j->work.generation) != FINISH_NONE)
        finish_generation(t, j, generation_finish(j->work.generation)); /* the last thing it did */
}

/* ---- memory ---- */

static void note_kv(struct engine_thread *t)
{
    struct engine_memory m;

    engine_memory(t->engine, &m);
    pthread_mutex_lock(&t->mutex);
    t->statistics.kv_bytes_used = m.kv_bytes_used;
    t->statistics.kv_bytes_max = m.kv_bytes_max;
    pthread_mutex_unlock(&t->mutex);
}

void work_drop_kv(struct engine_thread *t, struct timeline *tl)
{
    session_drop_kv(tl->session);
    t->kv_given_back++;
    work_publish_timeline(t, tl);
}

/* The least recently used timeline without a request gives its KV back, and before it what measures
 * the lanes. False: there is none. */
static bool give_back_idle(struct engine_thread *t)
{
    struct timeline *oldest = NULL;

    if (calibrate_give_way(t))
        return true;
    pthread_mutex_lock(&t->mutex);
    for (struct timeline *tl = t->timelines; tl; tl = tl->next)
        if (!tl->is_used && tl->info.kv_bytes > 0 && (!oldest || tl->last_used < oldest->last_used))
            oldest = tl;
    pthread_mutex_unlock(&t->mutex);
    if (oldest)
        work_drop_kv(t, oldest); /* timelines go in this thread alone */
    return oldest;
}

/* The same among requests that are not computed now, but for j itself. */
static bool give_back_waiting(struct engine_thread *t, const struct job *j)
{
    struct job *oldest = NULL;

    for (struct job *i = t->active; i; i = i->work.next)
        if (i != j && (!i->work.is_running || i->work.is_paused) && !i->work.task.is_under_way &&
            (session_kv_bytes(session_of(i)) > 0) &&
            (!oldest || i->timeline->last_used < oldest->timeline->last_used))
            oldest = i;
    if (!oldest)
        return false;
    if (oldest->work.is_running)
        take_out(t, oldest); /* parked until its reader has caught up */
    work_drop_kv(t, oldest->timeline);
    if (oldest->work.in_scheduler)
        update_task(t, oldest);
    return true;
}

/* A paused request gives up its place among those that run. */
static bool park_one(struct engine_thread *t)
{
    for (struct job *i = t->active; i; i = i->work.next) {
        if (i->work.is_running && i->work.is_paused && !i->work.task.is_under_way) {
            take_out(t, i);
            return true;
        }
    }
    return false;
}

/* Free pages, without those that running requests will still take. */
static uint64_t bytes_left(struct engine_thread *t)
{
    struct engine_memory m;
    uint64_t left;

    engine_memory(t->engine, &m);
    left = m.kv_bytes_max - m.kv_bytes_used;
    for (struct job *j = t->active; j; j = j->work.next)
        if (j->work.is_running)
            left -= MIN(left, j->work.task.kv_bytes);
    return left;
}

/* Sends one that runs back into the queue. False: there is none that has to give way to j. */
static bool preempt_for(struct engine_thread *t, struct job *j)
{
    struct scheduler_task *victim = scheduler_victim(t->scheduler, &j->work.task);
    struct job *v;

    if (!victim)
        return false;
    v = job_of(victim);
    session_drop_kv(session_of(v));
    v->work.n_preempted++;
    v->work.is_running = false;
    t->preemptions++;
    t->queue_changed = true;
    work_publish_timeline(t, v->timeline);
    update_task(t, v);
    scheduler_requeue(t->scheduler, victim);
    return true;
}

static void admit(struct engine_thread *t)
{
    struct scheduler_task *task;

    while ((task = scheduler_next_queued(t->scheduler))) {
        struct scheduler_statistics s;
        struct scheduler_task *admitted;
        struct engine_memory m;

        engine_memory(t->engine, &m);
        admitted = scheduler_admit(t->scheduler, m.kv_bytes_max - m.kv_bytes_used);
        if (admitted) {
            job_of(admitted)->work.is_running = true;
            job_of(admitted)->work.total = rows_left(job_of(admitted));
            job_of(admitted)->work.told_left = job_of(admitted)->work.total;
            t->queue_changed = true;
            continue;
        }
        scheduler_get_statistics(t->scheduler, &s);
        if (s.n_running >= MAX_RUNNING) {
            if (!park_one(t) && !preempt_for(t, job_of(task)))
                return;
            continue;
        }
        task = scheduler_next_queued(t->scheduler);
        if (task->kv_bytes <= bytes_left(t))
            return; /* the scheduler has its reasons */
        if (!give_back_idle(t) && !give_back_waiting(t, job_of(task)) &&
            !preempt_for(t, job_of(task)))
            return;
        update_task(t, job_of(task)); /* it may have shared pages */
    }
}

bool work_find_memory_quietly(struct engine_thread *t, struct job *j)
{
    return give_back_idle(t) || give_back_waiting(t, j);
}

void work_restored(struct engine_thread *t, struct job *j)
{
    work_choose_lane(t, j);
    update_task(t, j);
    j->work.total = j->work.told_left = rows_left(j);
    work_publish_timeline(t, j->timeline);
}

/* The pool was full when j wanted to go on. */
static void find_memory(struct engine_thread *t, struct job *j)
{
    struct error err;

    if (give_back_idle(t) || give_back_waiting(t, j) || preempt_for(t, j))
        return;
    if (pass_is_under_way(t)) { /* of others, who may have to give way when it is over */
        j->work.waits_for_pass = true;
        return;
    }
    error_set(&err, ENOBUFS,
              "the conversation does not fit into the memory for KV caches, %llu bytes",
              (unsigned long long)t->statistics.kv_bytes_max);
    finish_error(t, j, -ENOBUFS, &err);
}

/* ---- steps ---- */

/* An alternative's own text: the piece decoded by itself, of which half a character stays. */
static size_t alternative_text(const struct tokenizer *tokenizer, uint32_t id, char *out)
{
    struct decoder d = {0};
    size_t n = decoder_push(&d, tokenizer, id, true, out);

    return n + decoder_finish(&d, out + n);
}

static void emit_delta(struct engine_thread *t, struct job *j, const struct generation_delta *delta)
{
    const struct tokenizer *tokenizer = model_tokenizer(t->model);
    struct record record = {.type = RECORD_DELTA, .text = delta->text, .n_text = delta->n};
    CLEANUP(freep) char *texts = NULL;

    if (j->request.options.logprobs) {
        size_t room = decoder_room(tokenizer) + 12;

        record.has_token = true;
        record.id = delta->sample.id;
        record.logprob = (double)delta->sample.logprob;
        record.entropy = (double)delta->sample.entropy;
        record.n_top = MIN(delta->sample.n_top, RECORD_TOP_MAX);
        if (record.n_top > 0)
            texts = calloc(record.n_top, room);
        if (record.n_top > 0 && !texts) {
            j->work.cut = true;
            return;
        }
        for (size_t i = 0; i < record.n_top; i++) {
            record.top[i] = (struct record_top){
                .id = delta->sample.top[i].id,
                .logprob = (double)delta->sample.top[i].logprob,
                .text = texts + i * room,
                .n_text = alternative_text(tokenizer, delta->sample.top[i].id, texts + i * room),
            };
        }
    } else if (delta->n == 0) {
        return;
    }
    job_append(j, &record);
}

/* The last token of the prompt, or the last one sampled, has been evaluated. */
static void accept_token(struct engine_thread *t, struct job *j, const float *logits)
{
    struct generation_delta delta = {0};
    struct error err = {0};
    int r = generation_accept(j->work.generation, logits, &delta);

    if (r < 0) {
        if (r == -EDOM)
            error_set(&err, EDOM, "the model gave no finite number");
        finish_error(t, j, r, &err);
        return;
    }
    j->work.last_id = delta.sample.id;
    request_record_add_sampled(j->record, j->work.n_sampled, delta.sample.id);
    j->work.n_sampled++;
    emit_delta(t, j, &delta);
    if (j->work.cut) {
        finish_error(t, j, -ENOMEM, &err);
        return;
    }
    job_commit(t, j);
    if (delta.finish != FINISH_NONE)
        finish_generation(t, j, delta.finish);
}

void work_after_step(struct engine_thread *t, struct job *j, const struct step_item *item)
{
    struct error err = {0};

    if (item->ret_error == -ENOBUFS) {
        if (j->work.is_running) /* else it was a victim already */
            find_memory(t, j);
        return;
    }
    if (item->ret_error < 0) {
        finish_error(t, j, item->ret_error, &err);
        return;
    }
    if (!item->tokens)
        return;
    if (j->work.generation)
        generation_advance(j->work.generation, item->n_tokens);
    else
        j->work.n_done += item->n_tokens;
    if (item->wanted != LOGITS_NONE)
        accept_token(t, j, item->ret_logits);
    else if (!j->work.generation && j->work.n_done == j->ids.n)
        work_finish_well(t, j, "appended", false);
}

void work_fail_all(struct engine_thread *t, int code)
{
    struct error err;

    lost_error(&err, code);
    while (t->active)
        finish_error(t, t->active, code, &err);
}

/* What there is to do, and who does what of it. */
static void choose_lanes(struct engine_thread *t)
{
    struct placement_load load = {.now_usec = now_usec()};

    pthread_mutex_lock(&t->mutex);
    load.on_battery = t->on_battery;
    pthread_mutex_unlock(&t->mutex);
    for (const struct job *j = t->active; j; j = j->work.next)
        if (j->work.is_running && !j->work.is_paused)
            *(in_prefill(j) ? &load.n_prompts : &load.n_decoding) += 1;
    if (placement_choose(&t->placement, &load, &t->choice))
        pass_describe_placement(t);
}

/* Sees which readers are slow, and takes those that no longer are back. */
static void look_at_readers(struct engine_thread *t)
{
    struct error err = {0};
    struct job *next;

    pthread_mutex_lock(&t->mutex);
    for (struct job *j = t->active; j; j = j->work.next)
        j->work.is_paused = job_is_paused(j);
    pthread_mutex_unlock(&t->mutex);

    choose_lanes(t);
    for (struct job *j = t->active; j; j = next) {
        next = j->work.next;
        update_task(t, j);
        if (j->work.in_scheduler || j->work.is_paused)
            continue;
        if (scheduler_add(t->scheduler, &j->work.task) < 0) {
            finish_error(t, j, -ENOMEM, &err);
            continue;
        }
        j->work.in_scheduler = true;
        t->queue_changed = true;
    }
}

void work_prepare(struct engine_thread *t)
{
    look_at_readers(t);
    admit(t);
}

void work_make_item(const struct scheduler_pick *pick, struct step_item *item)
{
    struct job *j = job_of(pick->task);
    uint32_t missing = session_n_missing(session_of(j));
    const uint32_t *tokens;
    size_t n;

    tokens = pending_tokens(j, &n);
    *item = (struct step_item){.session = session_of(j), .n_tokens = pick->n_rows};
    if (missing > 0)
        return;
    item->tokens = tokens;
    item->wanted = j->work.generation && pick->n_rows == n ? LOGITS_LAST : LOGITS_NONE;
}

void work_stop_where_asked(struct engine_thread *t)
{
    struct job *next;

    for (struct job *j = t->active; j; j = next) {
        next = j->work.next;
        if (atomic_load(&j->stop) != JOB_GOES_ON && !j->work.task.is_under_way)
            finish_stopped(t, j);
    }
}

/* ---- what the loop sees ---- */

uint32_t work_n_tokens(const struct timeline *tl)
{
    uint32_t n = tl->session ? session_n_tokens(tl->session) : 0;

    return MIN(n + tl->has_tail, tl->options.n_ctx); /* there may be no room left for the tail */
}

void work_publish_timeline(struct engine_thread *t, struct timeline *tl)
{
    uint64_t kv_bytes = tl->session ? session_kv_bytes(tl->session) : 0;

    atomic_store(&tl->n_tokens, work_n_tokens(tl));
    pthread_mutex_lock(&t->mutex);
    tl->info.kv_bytes = kv_bytes;
    pthread_mutex_unlock(&t->mutex);
}

static enum timeline_state state_of(const struct job *j)
{
    if (j->work.is_paused)
        return TIMELINE_PAUSED;
    if (!j->work.is_running)
        return TIMELINE_QUEUED;
    return in_prefill(j) ? TIMELINE_PREFILL : TIMELINE_DECODE;
}

static void publish_job(struct engine_thread *t, struct job *j, bool with_position)
{
    struct timeline_info *info = &j->timeline->info;
    enum timeline_state state = state_of(j);
    uint32_t position = 0;
    uint64_t estimate = 0, kv_bytes = session_kv_bytes(session_of(j));

    if (with_position && j->work.in_scheduler)
        position = scheduler_position(t->scheduler, &j->work.task, &estimate);
    if (position == 0)
        estimate = 0;
    atomic_store(&j->timeline->n_tokens, MAX(session_n_tokens(session_of(j)), used_before(j)));
    pthread_mutex_lock(&t->mutex);
    if (!with_position && state == TIMELINE_QUEUED) {
        position = info->queue_position;
        estimate = info->estimate_usec;
    }
    if (info->state != state || info->queue_position != position)
        job_announce(t, j);
    info->state = state;
    info->queue_position = position;
    info->estimate_usec = estimate;
    info->kv_bytes = kv_bytes;
    pthread_mutex_unlock(&t->mutex);
}

/* Records of waiting and reading, not more often than some times a second. */
static void tell(struct engine_thread *t, struct job *j, uint64_t now, uint64_t interval)
{
    struct job_work *w = &j->work;
    uint64_t due = w->noticed_usec + interval, estimate = 0;
    uint32_t position, left;

    if (w->is_paused)
        return;
    if (w->is_running) {
        left = rows_left(j);
        w->told_position = 0;
        if (left == 0 || w->total < PROGRESS_LEAST || left >= w->told_left || now < due)
            return;
        job_emit(
            t, j,
            &(struct record){.type = RECORD_PROGRESS, .done = w->total - left, .total = w->total});
        w->told_left = left;
        w->noticed_usec = now;
        return;
    }
    if (now < due) {
        if (w->told_position == 0 && (t->due_usec == 0 || due < t->due_usec))
            t->due_usec = due;
        return;
    }
    position = scheduler_position(t->scheduler, &w->task, &estimate);
    if (position == 0 || position == w->told_position)
        return;
    job_emit(
        t, j,
        &(struct record){.type = RECORD_QUEUED, .position = position, .estimated_usec = estimate});
    w->told_position = position;
    w->noticed_usec = now;
}

static void publish_statistics(struct engine_thread *t)
{
    struct engine_statistics *e = &t->statistics;
    struct scheduler_statistics s;

    scheduler_get_statistics(t->scheduler, &s);
    pthread_mutex_lock(&t->mutex);
    e->steps = s.n_steps;
    e->preemptions = t->preemptions;
    e->kv_given_back = t->kv_given_back; /* those of job-spill.c are kept there */
    e->queued = s.n_queued;
    e->running = s.n_running;
    e->prefill_rate = s.prefill_rate;
    e->decode_rate = s.decode_rate;
    memcpy(e->lanes, s.lanes, sizeof(e->lanes));
    pthread_mutex_unlock(&t->mutex);
}

void work_publish(struct engine_thread *t)
{
    uint64_t now = now_usec(), interval;
    bool with_position = t->queue_changed || now >= t->positions_usec + POSITIONS_USEC;

    pthread_mutex_lock(&t->mutex);
    interval = t->record_interval_usec;
    pthread_mutex_unlock(&t->mutex);
    if (with_position) {
        t->positions_usec = now;
        t->queue_changed = false;
    }
    t->due_usec = 0;
    for (struct job *j = t->active; j; j = j->work.next) {
        publish_job(t, j, with_position);
        tell(t, j, now, interval);
    }
    publish_statistics(t);
    note_kv(t);
}

int work_init(struct engine_thread *t, struct error *err)
{
    struct scheduler_options options = {
        .max_rows = engine_lane_max_rows(t->engine, LANE_CPU),
        .lane_rows = {[LANE_GPU] = engine_lane_max_rows(t->engine, LANE_GPU)},
        .max_logits = engine_max_logits(t->engine),
        .max_running = MAX_RUNNING,
        .even_lanes = 1u << LANE_GPU, /* passes that were recorded are replayed */
    };

    if (pass_init(t, err) < 0 || scheduler_new(&t->scheduler, &options) < 0)
        return error_set(err, ENOMEM, "out of memory");
    note_kv(t);
    return 0;
}

void work_done(struct engine_thread *t)
{
    t->scheduler = scheduler_free(t->scheduler);
    pass_done(t);
}
