/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A request is three objects: the job, which the engine thread works on; the stream, which the
 * client reads; and the session, which it belongs to. Each may end first. The job points to the
 * other two and they to it, and whoever goes takes its name out of the others; the job itself is
 * freed in on_news() alone, when the engine thread has let it go.
 */

#include "daemon/client-session.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "daemon/fd-store.h"
#include "daemon/kept.h"
#include "daemon/log.h"
#include "daemon/request-record.h"
#include "daemon/saved-session.h"
#include "daemon/session-record.h"
#include "daemon/stream.h"
#include "daemon/users.h"
#include "engine/model-file.h"
#include "engine/model.h"
#include "ipc/names.h"

/* Of the daemon; a user's own limits are in users.h. Streams of ended requests that nobody has read
 * count too: each is a descriptor. The units' FileDescriptorStoreMax= is above what all this makes:
 * one for a session, one for its owner's connection, two for a stream. */
#define SESSIONS_MAX 4096u
#define STREAMS_MAX 512u
#define STREAMS_OF_USER_MAX 256u

/* Text that waits to be tokenised, or stays until its request ends. Eight of the longest prompts.
 */
#define PROMPT_BYTES_OF_USER_MAX (8 * (uint64_t)LLM_PROMPT_BYTES_MAX)

#define LINGER_USEC_DEFAULT (3600 * UINT64_C(1000000))
#define BUCKETS 256u /* a power of two */

struct session_set {
    sd_event *event;              /* borrowed */
    struct engine_thread *engine; /* borrowed; NULL: there is none, nor what follows */
    sd_event_source *news_source;
    struct fd_store *store; /* borrowed; NULL: nobody keeps anything */
    char *model_name, *model_path;
    uint8_t model_id[SAVED_MODEL_BYTES];
    bool has_model_id; /* else nothing of it is kept: nobody could know it again */
    uint32_t context_max;
    session_set_changed changed;
    void *userdata;
    const struct session_observer *observer;
    void *observer_userdata;
    uint64_t last_session_id, last_request_id;
    struct kept_ids *ids; /* borrowed; NULL: they are not kept */
    uint32_t n_sessions, n_jobs, n_streams;
    bool stopping, low_memory;
    bool in_news; /* whoever waits for quiet is told at its end: it may take the engine away */
    uint64_t n_refused;
    struct engine_statistics past;         /* of the engines that are gone: totals */
    struct request *requests;              /* those whose stream or job is there */
    struct client_session *first, *last;   /* client_session::next */
    struct client_session *by_id[BUCKETS]; /* client_session::bucket_next */
    uint64_t linger_usec;
    sd_event_source *linger_timer; /* the next that may be due */
};

/* What a stream's end is told with; also what lists the running requests. */
struct request {
    struct session_set *set;
    struct user *user; /* who pays */
    uint64_t id;
    uint64_t prompt_bytes;           /* of the job's text */
    bool is_kept;                    /* in the store */
    bool is_unanswered;              /* session_set_answered() is yet to come */
    struct job *job;                 /* NULL: has come back */
    struct stream *stream;           /* NULL: gone */
    struct request *previous, *next; /* session_set::requests */
};

struct client_session {
    struct session_set *set;
    uint64_t id;
    char *path, *label;
    struct user *user;
    struct timeline *timeline;
    uint32_t context_max;
    enum scheduler_class class;
    bool linger;
    uint64_t created_usec; /* CLOCK_REALTIME */
    uint64_t used_usec;    /* CLOCK_MONOTONIC, when it was made or its last request ended */
    struct job *job;       /* the request that runs, or NULL */
    enum timeline_state told_state; /* what was last told */
    uint32_t told_position;
    struct session_owner *owner;                        /* NULL: lingers, or is yet to be found */
    struct owner_name *former;                          /* of another process; or NULL */
    struct client_session *owned_previous, *owned_next; /* session_owner::first */
    struct client_session *previous, *next;             /* session_set::first */
    struct client_session *bucket_next;                 /* session_set::by_id */
};

/* Before anybody hears of a number: nobody else shall ever have it. */
static void keep_ids(const struct session_set *set)
{
    const uint64_t last[] = {set->last_session_id, set->last_request_id};

    if (set->ids)
        kept_commit(&set->ids->sequence, set->ids->slots, last, sizeof(last));
}

static uint64_t next_request_id(struct session_set *set)
{
    set->last_request_id++;
    keep_ids(set);
    return set->last_request_id;
}

static void tell(struct client_session *s, void (*what)(void *, struct client_session *))
{
    if (what)
        what(s->set->observer_userdata, s);
}

static void tell_quiet(struct session_set *set)
{
    if (!set->in_news)
        set->changed(set->userdata);
}

/*
 * As the engine thread has it. But where that has finished and the loop has yet to hear of it the
 * session is not idle: another request would be refused.
 */
static void get_info(const struct client_session *s, struct timeline_info *ret)
{
    timeline_get_info(s->set->engine, s->timeline, ret);
    if (s->job && ret->state == TIMELINE_IDLE)
        ret->state = s->told_state == TIMELINE_IDLE ? TIMELINE_QUEUED : s->told_state;
}

/* News come with every token; what others see changes seldom. */
static void tell_changed(struct client_session *s)
{
    struct timeline_info i;

    get_info(s, &i);
    if (i.state == s->told_state && i.queue_position == s->told_position)
        return;
    s->told_state = i.state;
    s->told_position = i.queue_position;
    tell(s, s->set->observer->changed);
}

/* ---- sessions that linger ---- */

static bool lingers_on(const struct client_session *s)
{
    return s->linger && !s->job;
}

static void arm_linger(struct session_set *set)
{
    uint64_t due = UINT64_MAX;

    for (const struct client_session *s = set->first; s; s = s->next)
        if (lingers_on(s))
            due = MIN(due, s->used_usec);
    if (!set->linger_timer)
        return;
    if (due == UINT64_MAX || set->linger_usec == 0) {
        sd_event_source_set_enabled(set->linger_timer, SD_EVENT_OFF);
    } else {
        sd_event_source_set_time(set->linger_timer, due + set->linger_usec);
        sd_event_source_set_enabled(set->linger_timer, SD_EVENT_ONESHOT);
    }
}

static int on_linger_over(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct session_set *set = userdata;
    struct client_session *next;

    (void)source;
    (void)usec;
    for (struct client_session *s = set->first; s; s = next) {
        next = s->next;
        if (lingers_on(s) && now_usec() - s->used_usec >= set->linger_usec)
            client_session_free(s);
    }
    arm_linger(set);
    return 0;
}

void session_set_set_low_memory(struct session_set *set, bool low)
{
    set->low_memory = low;
}

void session_set_linger_usec(struct session_set *set, uint64_t usec)
{
    set->linger_usec = usec;
    arm_linger(set);
}

/* ---- requests ---- */

static void request_put(struct request *q)
{
    if (q->job || q->stream || q->is_unanswered)
        return;
    if (q->is_kept)
        fd_store_remove_id(q->set->store, "request", q->id);
    user_unref(q->user);
    if (q->previous)
        q->previous->next = q->next;
    else
        q->set->requests = q->next;
    if (q->next)
        q->next->previous = q->previous;
    free(q);
}

static void on_stream_gone(void *userdata)
{
    struct request *q = userdata;
    struct session_set *set = q->set;

    q->stream = NULL;
    q->user->n_streams--;
    set->n_streams--;
    request_put(q);
    tell_quiet(set);
}

static struct request *request_of(struct session_set *set, const struct job *j)
{
    struct request *q = set->requests;

    while (q->job != j)
        q = q->next;
    return q;
}

/* Who, how much and how it ended; never what was said. */
static void log_finished(const struct request *q, const struct job *j)
{
    log_with(LOG_DEBUG,
             &(struct log_fields){.message_id = LOG_ID_REQUEST_FINISHED,
                                  .has_uid = true,
                                  .uid = q->user->uid,
                                  .session = j->session ? j->session->id : 0,
                                  .request = j->id,
                                  .prompt_tokens = j->usage.prompt_tokens,
                                  .completion_tokens = j->usage.completion_tokens},
             "request %" PRIu64 " of user %u ended (%s): %u tokens of prompt, %u of answer", j->id,
             (unsigned)q->user->uid, j->end_reason ? j->end_reason : strerror(abs(j->result)),
             j->usage.prompt_tokens, j->usage.completion_tokens);
}

static void job_came_back(struct session_set *set, struct job *j)
{
    struct request *q = request_of(set, j);
    struct client_session *s = j->session;

    if (job_kind_streams(j->request.kind))
        log_finished(q, j);
    q->job = NULL;
    q->user->n_queued--;
    q->user->prompt_bytes -= q->prompt_bytes;
    set->n_jobs--;
    if (s) {
        s->job = NULL;
        s->used_usec = now_usec();
        j->session = NULL;
        arm_linger(set);
        tell_changed(s);
        if (job_kind_streams(j->request.kind) && set->observer->finished)
            set->observer->finished(set->observer_userdata, s, j);
    }
    user_charge_tokens(q->user, (uint64_t)j->usage.prompt_tokens + j->usage.completion_tokens);
    if (j->request.kind == JOB_RESTORE && j->result >= 0)
        user_charge_tokens(q->user, j->n_tokens); /* they are computed with the next request */
    if (j->on_finished)
        j->on_finished(j, j->userdata);
    if (j->fork) /* nobody took it */
        engine_thread_close(set->engine, TAKE_PTR(j->fork));
    if (j->stream)
        stream_job_finished(j->stream); /* may end it, and with it q */
    else
        request_put(q);
    job_free(j);
}

static int on_news(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct session_set *set = userdata;
    struct job *j;
    bool finished;

    (void)source;
    (void)fd;
    (void)revents;
    if (engine_thread_lanes_changed(set->engine) && set->observer->lanes)
        set->observer->lanes(set->observer_userdata);
    set->in_news = true;
    while ((j = engine_thread_news(set->engine, &finished))) {
        if (finished) {
            job_came_back(set, j);
            continue;
        }
        if (j->session)
            tell_changed(j->session);
        if (j->stream)
            stream_news(j->stream);
    }
    set->in_news = false;
    tell_quiet(set);
    return 0;
}

/* ---- all sessions ---- */

/* "/models/gemma-3n-e4b.safetensors" is "gemma-3n-e4b". */
static char *name_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    const char *dot = strrchr(name, '.');

    return dot && dot > name ? strndup(name, (size_t)(dot - name)) : strdup(name);
}

int session_set_new(struct session_set **ret, sd_event *event, session_set_changed changed,
                    void *userdata)
{
    static const struct session_observer nobody = {0};
    struct session_set *set = calloc(1, sizeof(*set));
    int r;

    if (!set)
        return -ENOMEM;
    set->event = event;
    set->changed = changed;
    set->userdata = userdata;
    set->observer = &nobody;
    set->linger_usec = LINGER_USEC_DEFAULT;
    r = sd_event_add_time(event, &set->linger_timer, CLOCK_MONOTONIC, UINT64_MAX, 0, on_linger_over,
                          set);
    if (r >= 0)
        r = sd_event_source_set_enabled(set->linger_timer, SD_EVENT_OFF);
    if (r < 0) {
        session_set_free(set);
        return r;
    }
    *ret = set;
    return 0;
}

void session_set_observe(struct session_set *set, const struct session_observer *o, void *userdata)
{
    set->observer = o;
    set->observer_userdata = userdata;
}

int session_set_set_engine(struct session_set *set, struct engine_thread *t, uint32_t context_max)
{
    CLEANUP(freep) char *name = NULL, *real = NULL;
    const char *path;
    int r;

    assert(set->n_sessions == 0 && set->n_jobs == 0);
    session_set_cut_streams(set); /* they would look for their job's engine */
    set->news_source = sd_event_source_disable_unref(set->news_source);
    session_set_get_statistics(set, &set->past);
    set->engine = NULL;
    set->has_model_id = false;
    free(TAKE_PTR(set->model_name));
    free(TAKE_PTR(set->model_path));
    if (!t)
        return 0;

    path = model_file_path(model_get_file(engine_thread_model(t)));
    name = name_of(path);
    real = realpath(path, NULL);
    if (!real)
        real = strdup(path);
    if (!name || !real)
        return -ENOMEM;
    r = sd_event_add_io(set->event, &set->news_source, engine_thread_fd(t), EPOLLIN, on_news, set);
    if (r < 0)
        return r;
    set->has_model_id =
        saved_session_model(model_get_file(engine_thread_model(t)), set->model_id) >= 0;
    set->engine = t;
    set->context_max = context_max;
    set->model_name = TAKE_PTR(name);
    set->model_path = TAKE_PTR(real);
    return 0;
}

struct session_set *session_set_free(struct session_set *set)
{
    if (!set)
        return NULL;
    assert(set->n_sessions == 0 && set->n_jobs == 0);
    session_set_cut_streams(set);
    assert(!set->requests);
    sd_event_source_disable_unref(set->news_source);
    sd_event_source_disable_unref(set->linger_timer);
    free(set->model_name);
    free(set->model_path);
    free(set);
    return NULL;
}

void session_set_keep(struct session_set *set, struct fd_store *store)
{
    set->store = store;
}

uint32_t session_set_n_sessions(const struct session_set *set)
{
    return set->n_sessions;
}

bool session_set_has_jobs(const struct session_set *set)
{
    return set->n_jobs > 0;
}

bool session_set_is_quiet(const struct session_set *set)
{
    return set->n_jobs == 0 && set->n_streams == 0;
}

struct engine_thread *session_set_engine(const struct session_set *set)
{
    return set->engine;
}

const char *session_set_model_name(const struct session_set *set)
{
    return set->model_name ? set->model_name : "";
}

bool session_set_serves(const struct session_set *set, const char *model)
{
    return set->engine &&
           (strcmp(model, set->model_name) == 0 || strcmp(model, set->model_path) == 0);
}

void session_set_stop(struct session_set *set)
{
    set->stopping = true;
    for (struct request *q = set->requests; q; q = q->next)
        if (q->job)
            engine_thread_stop(set->engine, q->job, JOB_SHUTDOWN);
}

bool session_set_is_stopping(const struct session_set *set)
{
    return set->stopping;
}

void session_set_cut_streams(struct session_set *set)
{
    struct request *next;

    for (struct request *q = set->requests; q; q = next) {
        next = q->next;
        q->is_unanswered = false;
        if (q->stream)
            stream_abandon(q->stream);
        else
            request_put(q);
    }
}

void session_set_close_all(struct session_set *set)
{
    while (set->first)
        client_session_free(set->first);
}

/* Rates, and what is so now, are the engine's that is there. */
void session_set_get_statistics(const struct session_set *set, struct engine_statistics *ret)
{
    const struct engine_statistics *past = &set->past;
    struct engine_statistics s = {0};

    if (set->engine)
        engine_thread_get_statistics(set->engine, &s);
    s.requests += past->requests;
    s.requests_cancelled += past->requests_cancelled;
    s.requests_failed += past->requests_failed;
    s.prompt_tokens += past->prompt_tokens;
    s.completion_tokens += past->completion_tokens;
    s.steps += past->steps;
    for (int l = 0; l < ENGINE_LANES; l++) {
        s.lanes[l].passes += past->lanes[l].passes;
        s.lanes[l].prompt_rows += past->lanes[l].prompt_rows;
        s.lanes[l].decoded_rows += past->lanes[l].decoded_rows;
        s.lanes[l].usec += past->lanes[l].usec;
    }
    s.preemptions += past->preemptions;
    s.kv_given_back += past->kv_given_back;
    s.kv_spilled += past->kv_spilled;
    s.kv_restored += past->kv_restored;
    *ret = s;
}

uint64_t session_set_n_refused(const struct session_set *set)
{
    return set->n_refused;
}

void session_set_count_refused(struct session_set *set)
{
    set->n_refused++;
}

struct client_session *session_set_find(const struct session_set *set, uint64_t id)
{
    struct client_session *s = set->by_id[id % BUCKETS];

    while (s && s->id != id)
        s = s->bucket_next;
    return s;
}

struct client_session *session_set_first(const struct session_set *set)
{
    return set->first;
}

struct client_session *client_session_next(const struct client_session *s)
{
    return s->next;
}

void session_owner_close_all(struct session_owner *owner)
{
    while (owner->first)
        client_session_free(owner->first);
}

/* ---- one session ---- */

static void session_done(struct client_session *s)
{
    free(s->former);
    user_unref(s->user);
    free(s->path);
    free(s->label);
    free(s);
}

/* It ends with the owner, whose socket is kept too: while that is open, somebody is there. */
static void join_owner(struct client_session *s, struct session_owner *owner)
{
    s->owner = owner;
    s->owned_previous = NULL;
    s->owned_next = owner->first;
    if (s->owned_next)
        s->owned_next->owned_previous = s;
    owner->first = s;
    if (owner->name.kind == OWNER_CONNECTION && !owner->is_kept) {
        owner->is_kept = true;
        fd_store_push_id(s->set->store, "connection", owner->name.connection, &owner->fd, 1);
    }
}

static void leave_owner(struct client_session *s)
{
    struct session_owner *owner = s->owner;

    if (!owner)
        return;
    *(s->owned_previous ? &s->owned_previous->owned_next : &owner->first) = s->owned_next;
    if (s->owned_next)
        s->owned_next->owned_previous = s->owned_previous;
    s->owner = NULL;
    if (owner->first || !owner->is_kept)
        return;
    owner->is_kept = false;
    fd_store_remove_id(s->set->store, "connection", owner->name.connection);
}

static const struct owner_name nobody = {.kind = OWNER_NONE};

void client_session_set_owner(struct client_session *s, struct session_owner *owner)
{
    free(TAKE_PTR(s->former));
    leave_owner(s);
    if (owner)
        join_owner(s, owner);
    session_record_set_owner(timeline_record(s->timeline), owner ? &owner->name : &nobody);
}

const struct owner_name *client_session_former_owner(const struct client_session *s)
{
    return s->former;
}

static void enter(struct client_session *s, struct session_owner *owner)
{
    struct session_set *set = s->set;

    s->previous = set->last;
    *(set->last ? &set->last->next : &set->first) = s;
    set->last = s;
    s->bucket_next = set->by_id[s->id % BUCKETS];
    set->by_id[s->id % BUCKETS] = s;
    if (owner)
        join_owner(s, owner);
    set->n_sessions++;
    s->user->n_sessions++;
}

static void leave(struct client_session *s)
{
    struct session_set *set = s->set;
    struct client_session **at = &set->by_id[s->id % BUCKETS];

    while (*at != s)
        at = &(*at)->bucket_next;
    *at = s->bucket_next;
    *(s->previous ? &s->previous->next : &set->first) = s->next;
    *(s->next ? &s->next->previous : &set->last) = s->previous;
    session_record_set_closed(timeline_record(s->timeline));
    fd_store_remove_id(set->store, "session", s->id);
    leave_owner(s);
    set->n_sessions--;
    s->user->n_sessions--;
}

static int check_engine(const struct session_set *set, struct error *err)
{
    if (set->stopping)
        return error_set(err, ESHUTDOWN, "the daemon is about to end");
    if (!set->engine)
        return error_set(err, EAGAIN, "no model is loaded; see llmctl model list");
    return 0;
}

/* The least recently used first, until the user holds less than that. */
static void release_idle(const struct session_set *set, const struct user *user,
                         const struct client_session *asks, uint64_t most)
{
    while (engine_thread_account_kv_bytes(set->engine, user->uid) >= most) {
        struct client_session *oldest = NULL;

        for (struct client_session *s = set->first; s; s = s->next) {
            struct timeline_info i;

            if (s->user != user || s->job || s == asks ||
                (oldest && oldest->used_usec <= s->used_usec))
                continue;
            timeline_get_info(set->engine, s->timeline, &i);
            if (i.kv_bytes > 0)
                oldest = s;
        }
        if (!oldest)
            return;
        engine_thread_release(set->engine, oldest->timeline);
    }
}

/*
 * KV of the user's other sessions that is not in use is given up first; asks: the session that is
 * to get more, or NULL. What a prompt will take is known only when it is tokenised; so one may pass
 * the limit once.
 */
static int check_kv(const struct session_set *set, const struct user *user,
                    const struct client_session *asks, struct error *err)
{
    uint64_t most = user->limits.max_kv_bytes;
    uint64_t used = most > 0 ? engine_thread_account_kv_bytes(set->engine, user->uid) : 0;
    uint64_t idle;

    if (used < most || most == 0)
        return 0;
    idle = engine_thread_idle_kv_bytes(set->engine, user->uid, asks ? asks->timeline : NULL);
    if (used - MIN(used, idle) < most) {
        release_idle(set, user, asks, most);
        return 0;
    }
    return error_set(err, EDQUOT,
                     "KV bytes: requested 1 or more, available 0: user %u holds %" PRIu64
                     " of %" PRIu64 "; close or rewind a session",
                     (unsigned)user->uid, used, most);
}

static int check_may_have_one_more(const struct session_set *set, const struct user *user,
                                   struct error *err)
{
    int r;

    r = check_engine(set, err);
    if (r < 0)
        return r;
    if (user->n_sessions >= user->limits.max_sessions)
        return error_set(
            err, EDQUOT,
            "sessions: requested 1, available 0: all %u of user %u are open; close one",
            user->limits.max_sessions, (unsigned)user->uid);
    if (set->n_sessions >= SESSIONS_MAX)
        return error_set(err, EDQUOT,
                         "sessions: requested 1, available 0: all %u of this daemon are open",
                         SESSIONS_MAX);
    if (set->low_memory)
        return error_set(err, ENOSR,
                         "memory is short on this machine: there are no new sessions until it is "
                         "not; those that are open go on");
    return check_kv(set, user, NULL, err);
}

/* In the service manager's hands before anybody is told of it. */
static void keep_session(struct client_session *s)
{
    struct session_record *record = timeline_record(s->timeline);
    int fd = session_record_fd(record);

    if (s->set->has_model_id)
        fd_store_push_id(s->set->store, "session", s->id, &fd, 1);
    session_record_close_fd(record);
}

/* timeline: taken over in every case. */
static int new_session(struct client_session **ret, struct session_set *set, struct user *user,
                       struct session_owner *owner, const struct client_session_options *options,
                       struct timeline *timeline, uint64_t id, struct error *err)
{
    struct client_session *s = calloc(1, sizeof(*s));

    if (!s || !timeline) {
        if (timeline)
            engine_thread_close(set->engine, timeline);
        free(s);
        return error_set(err, ENOMEM, "out of memory");
    }
    s->set = set;
    s->id = id;
    s->user = user_ref(user);
    s->timeline = timeline;
    s->label = strdup(options->label ? options->label : "");
    if (asprintf(&s->path, "%s/%" PRIu64, LLM_SESSION_PATH, id) < 0)
        s->path = NULL;
    s->class = options->class;
    s->linger = options->linger;
    s->context_max = options->context;
    s->created_usec = session_record_facts(timeline_record(timeline))->created_usec;
    s->used_usec = now_usec();
    if (!s->label || !s->path) {
        engine_thread_close(set->engine, timeline);
        session_done(s);
        return error_set(err, ENOMEM, "out of memory");
    }
    enter(s, s->linger ? NULL : owner);
    engine_thread_set_weight(set->engine, user->uid, user->limits.weight);
    arm_linger(set);
    tell(s, set->observer->came);
    *ret = s;
    return 0;
}

/* Where it lives, in memory that can outlive this process. */
static int new_record(struct session_record **ret, struct session_set *set, const struct user *user,
                      const struct session_owner *owner,
                      const struct client_session_options *options, uint64_t id, struct error *err)
{
    const struct model_config *c = model_config(engine_thread_model(set->engine));
    struct session_facts facts = {.id = id,
                                  .uid = user->uid,
                                  .context = options->context,
                                  .class = options->class,
                                  .linger = options->linger,
                                  .created_usec = clock_usec(CLOCK_REALTIME)};
    int r;

    memcpy(facts.model, set->model_id, sizeof(facts.model));
    if (options->label)
        strncpy(facts.label, options->label, sizeof(facts.label) - 1);
    r = session_record_new(ret, &facts, owner && !options->linger ? &owner->name : &nobody,
                           session_memory_bytes(c, options->context));
    return r < 0 ? error_set(err, -r, "no memory for a session: %s", strerror(-r)) : 0;
}

int client_session_new(struct client_session **ret, struct session_set *set, struct user *user,
                       struct session_owner *owner, const struct client_session_options *options,
                       struct error *err)
{
    CLEANUP(session_record_freep) struct session_record *record = NULL;
    struct client_session_options o = *options;
    struct timeline *timeline = NULL;
    uint64_t id = set->last_session_id + 1;
    uint32_t most;
    int r;

    r = check_may_have_one_more(set, user, err);
    if (r < 0)
        return r;
    most = model_config(engine_thread_model(set->engine))->context_max;
    if (o.context > most)
        return error_set(err, EINVAL, "context: requested %u, available %u: the model has no more",
                         o.context, most);
    if (o.context == 0)
        o.context = set->context_max > 0 ? set->context_max : most;
    r = new_record(&record, set, user, owner, &o, id, err);
    if (r < 0)
        return r;
    session_record_commit(record, &(struct session_state){.position = CHAT_START});
    if (timeline_new(&timeline, &(struct timeline_options){.n_ctx = o.context,
                                                           .account = user->uid,
                                                           .flow = id,
                                                           .class = o.class,
                                                           .record = record}) < 0)
        return error_set(err, ENOMEM, "out of memory");
    record = NULL; /* the timeline's */
    set->last_session_id = id;
    keep_ids(set);
    r = new_session(ret, set, user, owner, &o, timeline, id, err);
    if (r >= 0)
        keep_session(*ret);
    return r;
}

int client_session_fork(struct client_session *s, const struct session_owner *owner,
                        const struct client_session_options *options, job_finished finished,
                        void *userdata, struct error *err)
{
    struct client_session_options o = *options;
    struct job_request request = {
        .kind = JOB_FORK,
        .fork = {.account = s->user->uid,
                 .flow = s->set->last_session_id + 1,
                 .class = options->class},
    };
    int r;

    o.context = s->context_max;
    r = check_may_have_one_more(s->set, s->user, err);
    if (r >= 0)
        r = new_record(&request.fork.record, s->set, s->user, owner, &o, request.fork.flow, err);
    if (r >= 0)
        r = client_session_ask(s, &request, finished, userdata, err);
    if (r >= 0) {
        s->set->last_session_id++;
        keep_ids(s->set);
    }
    job_request_done(&request);
    return r;
}

int client_session_new_forked(struct client_session **ret, struct client_session *s,
                              struct session_owner *owner,
                              const struct client_session_options *options, struct job *j,
                              struct error *err)
{
    struct client_session_options o = *options;
    struct timeline *timeline = TAKE_PTR(j->fork);
    int r;

    r = check_may_have_one_more(s->set, s->user, err);
    if (r < 0) {
        engine_thread_close(s->set->engine, timeline);
        return r;
    }
    o.context = s->context_max;
    r = new_session(ret, s->set, s->user, owner, &o, timeline, j->request.fork.flow, err);
    if (r >= 0)
        keep_session(*ret);
    return r;
}

struct client_session *client_session_free(struct client_session *s)
{
    struct session_set *set;

    if (!s)
        return NULL;
    set = s->set;
    tell(s, set->observer->goes);
    if (s->job) {
        s->job->session = NULL;
        /* Before the session's record says so: whoever finds it closed shall find why its request
         * ends. */
        engine_thread_stop(set->engine, s->job, JOB_CLOSED);
    }
    leave(s);
    engine_thread_close(set->engine, s->timeline);
    session_done(s);
    tell_quiet(set);
    return NULL;
}

uint64_t client_session_id(const struct client_session *s)
{
    return s->id;
}

struct user *client_session_user(const struct client_session *s)
{
    return s->user;
}

const struct session_owner *client_session_owner(const struct client_session *s)
{
    return s->owner;
}

const char *client_session_path(const struct client_session *s)
{
    return s->path;
}

const char *client_session_label(const struct client_session *s)
{
    return s->label;
}

enum scheduler_class client_session_class(const struct client_session *s)
{
    return s->class;
}

bool client_session_lingers(const struct client_session *s)
{
    return s->linger;
}

uint64_t client_session_created_usec(const struct client_session *s)
{
    return s->created_usec;
}

bool client_session_is_busy(const struct client_session *s)
{
    return s->job;
}

uint32_t client_session_context_max(const struct client_session *s)
{
    return s->context_max;
}

void client_session_get_info(const struct client_session *s, struct client_session_info *ret)
{
    struct timeline_info i;

    get_info(s, &i);
    *ret = (struct client_session_info){
        .state = timeline_state_name(i.state),
        .context_used = i.n_tokens,
        .queue_position = i.queue_position,
        .estimate_usec = i.estimate_usec,
        .kv_bytes = i.kv_bytes,
        .prompt_tokens = i.prompt_tokens,
        .completion_tokens = i.completion_tokens,
    };
}

/* ---- its requests ---- */

/* asks: the session it is for; runs: its request, NULL: it may have one more. */
static int check_may_ask(const struct session_set *set, struct user *user,
                         const struct client_session *asks, const struct job *runs,
                         struct error *err)
{
    int r;

    if (set->stopping)
        return error_set(err, ESHUTDOWN, "the daemon is about to end");
    if (runs)
        return error_set(err, EBUSY, "request %" PRIu64 " of this session still runs", runs->id);
    if (user->n_queued >= user->limits.max_queued)
        return error_set(err, EDQUOT,
                         "requests: requested 1, available 0: all %u of user %u wait or run",
                         user->limits.max_queued, (unsigned)user->uid);
    r = check_kv(set, user, asks, err);
    return r < 0 ? r : user_check_tokens(user, err);
}

static int check_streams(const struct session_set *set, const struct user *user, struct error *err)
{
    if (user->n_streams >= STREAMS_OF_USER_MAX)
        return error_set(err, EDQUOT,
                         "streams: requested 1, available 0: %u of user %u wait for their readers",
                         STREAMS_OF_USER_MAX, (unsigned)user->uid);
    if (set->n_streams >= STREAMS_MAX)
        return error_set(err, EDQUOT,
                         "streams: requested 1, available 0: %u of this daemon wait for their "
                         "readers",
                         STREAMS_MAX);
    return 0;
}

static uint64_t prompt_bytes(const struct job_request *request)
{
    uint64_t n = 0;

    for (size_t i = 0; i < request->n_messages; i++)
        n += request->messages[i].n; /* the bus allows LLM_PROMPT_BYTES_MAX in all */
    return n;
}

static int check_prompt_bytes(const struct user *user, const struct job_request *request,
                              struct error *err)
{
    uint64_t n = prompt_bytes(request), left = PROMPT_BYTES_OF_USER_MAX - user->prompt_bytes;

    if (n <= left)
        return 0;
    return error_set(err, EDQUOT,
                     "prompt bytes: requested %" PRIu64 ", available %" PRIu64
                     ": the others wait in requests of user %u that have not ended",
                     n, left, (unsigned)user->uid);
}

static void enter_request(struct session_set *set, struct request *q, struct user *user,
                          uint64_t id)
{
    q->set = set;
    q->id = id;
    q->user = user_ref(user);
    q->next = set->requests;
    if (q->next)
        q->next->previous = q;
    set->requests = q;
}

static void list_request(struct session_set *set, struct request *q, struct user *user,
                         struct job *j)
{
    enter_request(set, q, user, j->id);
    q->job = j;
    q->prompt_bytes = prompt_bytes(&j->request);
    user->prompt_bytes += q->prompt_bytes;
    set->n_jobs++;
    user->n_queued++;
}

/* All that must be so for a job on this timeline. *ret_job takes the request over. */
static int new_job(struct session_set *set, const struct user *user, struct timeline *timeline,
                   struct job_request *request, struct job **ret_job, struct request **ret_request,
                   struct error *err)
{
    CLEANUP(freep) struct request *q = calloc(1, sizeof(*q));
    int r;

    if (!q)
        return error_set(err, ENOMEM, "out of memory");
    r = check_prompt_bytes(user, request, err);
    if (r >= 0)
        r = engine_thread_check(set->engine, timeline, request, err);
    if (r < 0)
        return r;
    if (job_new(ret_job, set->last_request_id + 1, timeline, request) < 0)
        return error_set(err, ENOMEM, "out of memory");
    q->set = set;
    *ret_request = TAKE_PTR(q);
    return 0;
}

static void keep_request(struct session_set *set, struct request *q,
                         const struct request_record *record)
{
    int fds[] = {request_record_fd(record), stream_fd(q->stream)};

    q->is_kept = set->has_model_id;
    if (q->is_kept)
        fd_store_push_id(set->store, "request", request_record_facts(record)->id, fds,
                         ARRAY_SIZE(fds));
}

int client_session_generate(struct client_session *s, struct job_request *request, int *ret_fd,
                            uint64_t *ret_id, struct error *err)
{
    struct session_set *set = s->set;
    CLEANUP(job_freep) struct job *j = NULL;
    CLEANUP(freep) struct request *q = NULL;
    int r;

    r = check_may_ask(set, s->user, s, s->job, err);
    if (r >= 0)
        r = check_streams(set, s->user, err);
    if (r >= 0)
        r = new_job(set, s->user, s->timeline, request, &j, &q, err);
    if (r < 0)
        return r;
    r = engine_thread_prepare(set->engine, j);
    if (r < 0)
        return error_set(err, r == -ENOMEM ? ENOMEM : ENOSPC, "no memory for the request: %s",
                         strerror(-r));
    r = stream_new(&q->stream, set->event, set->engine, j, on_stream_gone, q, ret_fd);
    if (r < 0)
        return error_set(err, -r, "cannot make a stream: %s", strerror(-r));
    keep_request(set, q, j->record);
    q->is_unanswered = true;
    set->n_streams++;
    s->user->n_streams++;
    list_request(set, TAKE_PTR(q), s->user, j);
    *ret_id = next_request_id(set);
    s->job = j;
    j->session = s;
    engine_thread_submit(set->engine, TAKE_PTR(j));
    tell_changed(s);
    return 0;
}

int client_session_ask(struct client_session *s, struct job_request *request, job_finished finished,
                       void *userdata, struct error *err)
{
    bool alone = request->kind != JOB_MEASURE;
    struct session_set *set = s->set;
    CLEANUP(job_freep) struct job *j = NULL;
    CLEANUP(freep) struct request *q = NULL;
    int r;

    r = check_may_ask(set, s->user, s, alone ? s->job : NULL, err);
    if (r >= 0)
        r = new_job(set, s->user, s->timeline, request, &j, &q, err);
    if (r < 0)
        return r;
    j->on_finished = finished;
    j->userdata = userdata;
    list_request(set, TAKE_PTR(q), s->user, j);
    next_request_id(set);
    if (alone) {
        s->job = j;
        j->session = s;
    }
    engine_thread_submit(set->engine, TAKE_PTR(j));
    return 0;
}

int session_set_measure(struct session_set *set, struct user *user, struct job_request *request,
                        job_finished finished, void *userdata, struct error *err)
{
    CLEANUP(job_freep) struct job *j = NULL;
    CLEANUP(freep) struct request *q = NULL;
    int r;

    r = check_engine(set, err);
    if (r >= 0)
        r = check_may_ask(set, user, NULL, NULL, err);
    request->account = user->uid;
    if (r >= 0)
        r = new_job(set, user, NULL, request, &j, &q, err);
    if (r < 0)
        return r;
    j->on_finished = finished;
    j->userdata = userdata;
    list_request(set, TAKE_PTR(q), user, j);
    next_request_id(set);
    engine_thread_submit(set->engine, TAKE_PTR(j));
    return 0;
}

void session_set_answered(struct session_set *set, uint64_t request_id, bool sent)
{
    struct request *q = set->requests;

    while (q && q->id != request_id)
        q = q->next;
    if (!q)
        return;
    if (sent && q->stream)
        request_record_set_replied(stream_record(q->stream));
    q->is_unanswered = false;
    request_put(q);
}

/* ---- what another process left ---- */

void session_set_reserve_ids(struct session_set *set, uint64_t session, uint64_t request)
{
    set->last_session_id = MAX(set->last_session_id, session);
    set->last_request_id = MAX(set->last_request_id, request);
    keep_ids(set);
}

void session_set_keep_ids(struct session_set *set, struct kept_ids *ids)
{
    uint64_t last[2];

    if (kept_read(&ids->sequence, ids->slots, last, sizeof(last)) < 0)
        last[0] = last[1] = 0;
    set->ids = ids;
    session_set_reserve_ids(set, last[0], last[1]);
}

const uint8_t *session_set_model_id(const struct session_set *set)
{
    return set->has_model_id ? set->model_id : NULL;
}

int session_set_take_back(struct client_session **ret, struct session_set *set, struct user *user,
                          struct timeline *timeline)
{
    struct session_record *record = timeline_record(timeline);
    const struct session_facts *facts = session_record_facts(record);
    struct client_session_options options = {.context = facts->context,
                                             .class = facts->class,
                                             .label = facts->label,
                                             .linger = facts->linger};
    CLEANUP(freep) struct owner_name *former = malloc(sizeof(*former));
    int r;

    r = former ? session_record_owner(record, former) : -ENOMEM;
    if (r < 0) {
        engine_thread_close(set->engine, timeline);
        return r;
    }
    r = new_session(ret, set, user, NULL, &options, timeline, facts->id, NULL);
    if (r < 0)
        return r;
    session_record_close_fd(record);
    if (former->kind != OWNER_NONE)
        (*ret)->former = TAKE_PTR(former);
    return 0;
}

/* The job takes the record. */
static int new_job_of(struct job **ret, struct client_session *s, struct request_record **record,
                      enum job_stop stop, struct error *err)
{
    CLEANUP(job_request_done) struct job_request request = {0};
    struct job *j;
    int r;

    r = request_record_request(*record, &request, err);
    if (r < 0)
        return r;
    r = job_new(&j, request_record_facts(*record)->id, s->timeline, &request);
    if (r < 0)
        return error_set(err, -r, "out of memory");
    j->sendable = request_record_log_bytes(*record);
    j->sent = request_record_sent(*record);
    j->record = TAKE_PTR(*record);
    j->resumes = true;
    atomic_store(&j->stop, (int)stop);
    *ret = j;
    return 0;
}

int session_set_take_back_request(struct session_set *set, struct user *user,
                                  struct client_session *s, struct request_record *record, int fd,
                                  enum job_stop stop, struct error *err)
{
    CLEANUP(request_record_freep) struct request_record *owned = record;
    CLEANUP(freep) struct request *q = calloc(1, sizeof(*q));
    uint64_t id = request_record_facts(record)->id;
    CLEANUP(job_freep) struct job *j = NULL;
    CLEANUP(closep) int socket = fd;
    int r = 0;

    if (!q)
        return error_set(err, ENOMEM, "out of memory");
    if (s) {
        r = new_job_of(&j, s, &owned, stop, err);
        if (r < 0)
            return r;
    }
    r = stream_take_back(&q->stream, set->event, set->engine, j, record, TAKE_FD(socket),
                         on_stream_gone, q);
    if (r < 0)
        return error_set(err, -r, "its stream: %s", strerror(-r));
    owned = NULL; /* the job's, or the stream's */
    q->is_kept = true;
    request_record_set_replied(record); /* who has the other end had the reply */
    set->n_streams++;
    user->n_streams++;
    if (j) {
        list_request(set, TAKE_PTR(q), user, j);
        s->job = j;
        j->session = s;
        engine_thread_submit(set->engine, TAKE_PTR(j));
    } else {
        enter_request(set, TAKE_PTR(q), user, id);
    }
    return 0;
}

void client_session_cancel(struct client_session *s)
{
    if (s->job && job_kind_streams(s->job->request.kind)) /* the others are done in a moment */
        engine_thread_stop(s->set->engine, s->job, JOB_CANCELLED);
}
