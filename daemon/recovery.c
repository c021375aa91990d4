/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * All records are read first; then it is worked out what each session is to be; then the engine
 * takes the sessions, all at once, since it must know which of the pool's pages have a holder; at
 * last requests go on, or what is left of their streams is sent.
 *
 * A request ends in two steps: its own record says so, then its session's. Between the two, or
 * after both, the process may have been killed; so the end is applied to a session that has not
 * heard of it (session_state.last_request). A request whose client was never told that there is
 * one, and cannot be told any more, has not been: the client will ask again.
 */

#include "daemon/recovery.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/sealed-memory.h"
#include "daemon/client-session.h"
#include "daemon/engine-thread.h"
#include "daemon/fd-store.h"
#include "daemon/job.h"
#include "daemon/kept.h"
#include "daemon/log.h"
#include "daemon/request-record.h"
#include "daemon/service.h"
#include "daemon/session-record.h"
#include "daemon/timeline.h"
#include "daemon/users.h"
#include "engine/model.h"
#include "ipc/bus-error.h"
#include "ipc/record.h"

#define INSTANCE_BYTES (INSTANCE_DIGITS / 2)

/* A process that dies at work on the same request so often, and gets no further, dies of it. Where
 * others kill it and steps are slow, a few times are chance. */
#define RECOVERIES_MAX 15u

struct kept_request {
    uint64_t id;
    struct request_record *record; /* NULL: not sound */
    int record_fd;                 /* of one that is not sound, else negative */
    int socket;                    /* negative: its client has gone */
    struct error error;            /* why it is not sound */
    struct request_commit commit;
    enum job_stop stop;
};

struct kept_session {
    uint64_t id;
    struct session_record *record;
    struct session_state state;
    struct kept_request *request; /* that goes on */
    struct client_session *session;
};

struct recovery {
    struct service *service;
    struct recovery_result *result;
    struct kept_session *sessions;
    struct kept_request *requests;
    size_t n_sessions, n_requests;
};

/* ---- the instance ---- */

struct instance {
    uint8_t name[INSTANCE_BYTES];
    struct kept_ids ids;
};

/* Of the process before. Mapped for good; NULL: there is none */
static struct instance *inherited_instance(struct fd_store *store)
{
    CLEANUP(closep) int fd = -EBADF;
    uint64_t size;

    if (fd_store_next(store, "instance", &fd) == 0 || sealed_memory_check(fd, &size) < 0 ||
        size != sizeof(struct instance))
        return NULL;
    return kept_map(fd, sizeof(struct instance));
}

static struct instance *new_instance(struct fd_store *store)
{
    CLEANUP(closep) int fd = sealed_memory_new("llmd-instance", sizeof(struct instance));
    struct instance *i;

    if (fd < 0 || posix_fallocate(fd, 0, sizeof(*i)) != 0)
        return NULL;
    i = kept_map(fd, sizeof(*i));
    if (!i)
        return NULL;
    fd_store_remove(store, "instance");
    fd_store_push(store, "instance", &fd, 1);
    return i;
}

int recovery_instance(struct service *s, bool changes, char ret[INSTANCE_DIGITS + 1],
                      bool *ret_inherited)
{
    struct instance *i = inherited_instance(s->store);
    bool inherited = i && !changes;

    if (!i)
        i = new_instance(s->store);
    if (!i)
        return -ENOMEM;
    /* Should it be torn by a kill, it is another one all the same. */
    if (!inherited && getrandom(i->name, INSTANCE_BYTES, 0) != INSTANCE_BYTES)
        return -EIO;
    for (size_t n = 0; n < INSTANCE_BYTES; n++)
        snprintf(ret + 2 * n, 3, "%02x", i->name[n]);
    session_set_keep_ids(s->sessions, &i->ids);
    *ret_inherited = inherited;
    return 0;
}

/* ---- what is lost ---- */

static void say_session_lost(struct recovery *c, uint64_t id, const struct error *err)
{
    c->result->n_lost++;
    log_with(LOG_ERR, &(struct log_fields){.message_id = LOG_ID_SESSION_LOST, .session = id},
             "session %" PRIu64 " is lost with the restart: %s", id, err->text);
}

static void say_request_lost(uint64_t session, uint64_t id, const struct error *err)
{
    log_with(
        LOG_ERR,
        &(struct log_fields){.message_id = LOG_ID_SESSION_LOST, .session = session, .request = id},
        "request %" PRIu64 " is lost with the restart: %s", id, err->text);
}

static struct record lost_record(const char *message)
{
    return (struct record){
        .type = RECORD_ERROR, .name = bus_error_name(ESTALE), .message = message};
}

/* ---- reading ---- */

static void *grow(void *array, size_t n, size_t size)
{
    return n % 64 == 0 ? reallocarray(array, n + 64, size) : array;
}

/* Forgotten by the manager too. */
static void drop_session(struct recovery *c, uint64_t id, const struct error *err)
{
    say_session_lost(c, id, err);
    fd_store_remove_id(c->service->store, "session", id);
}

static void read_session(struct recovery *c, uint64_t id, int fd)
{
    CLEANUP(session_record_freep) struct session_record *record = NULL;
    struct service *s = c->service;
    const uint8_t *model_id = session_set_model_id(s->sessions);
    struct session_state state;
    struct error err = {0};
    void *grown;
    int r;

    r = session_record_open(&record, fd, model_id, model_config(s->model), &err);
    if (r >= 0 && session_record_facts(record)->id != id)
        r = error_set(&err, EBADMSG, "the record is another session's");
    if (r >= 0) {
        r = session_record_state(record, &state);
        /* closed, or a fork that was never answered */
        if (session_record_closed(record) || r == -ENODATA) {
            fd_store_remove_id(s->store, "session", id);
            return;
        }
        if (r < 0)
            error_set(&err, EBADMSG, "the record is not sound: its state is damaged");
    }
    for (size_t i = 0; r >= 0 && i < c->n_sessions; i++)
        if (c->sessions[i].id == id)
            return; /* the manager has it twice */
    if (r >= 0 && !(grown = grow(c->sessions, c->n_sessions, sizeof(*c->sessions))))
        r = error_set(&err, ENOMEM, "out of memory");
    if (r < 0) {
        drop_session(c, id, &err);
        return;
    }
    c->sessions = grown;
    c->sessions[c->n_sessions++] =
        (struct kept_session){.id = id, .record = TAKE_PTR(record), .state = state};
}

static struct kept_request *request_of(struct recovery *c, uint64_t id)
{
    void *grown;

    for (size_t i = 0; i < c->n_requests; i++)
        if (c->requests[i].id == id)
            return &c->requests[i];
    grown = grow(c->requests, c->n_requests, sizeof(*c->requests));
    if (!grown)
        return NULL;
    c->requests = grown;
    c->requests[c->n_requests] =
        (struct kept_request){.id = id, .record_fd = -EBADF, .socket = -EBADF};
    return &c->requests[c->n_requests++];
}

static bool hung_up(int fd)
{
    struct pollfd p = {.fd = fd};

    return poll(&p, 1, 0) < 0 || (p.revents & (POLLHUP | POLLERR | POLLNVAL));
}

/* One of the two descriptors of a request, which come in any order. */
static void read_request(struct recovery *c, uint64_t id, int fd)
{
    CLEANUP(closep) int owned = fd;
    struct kept_request *q = request_of(c, id);
    const uint32_t *sampled;
    struct stat st;

    if (!q || fstat(fd, &st) < 0)
        return;
    if (S_ISSOCK(st.st_mode)) {
        if (q->socket < 0 && !hung_up(fd))
            q->socket = TAKE_FD(owned);
        return;
    }
    if (q->record || q->record_fd >= 0)
        return;
    q->record_fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (request_record_open(&q->record, TAKE_FD(owned), &q->error) < 0)
        return;
    if (request_record_facts(q->record)->id != id) {
        error_set(&q->error, EBADMSG, "the record is another request's");
        q->record = request_record_free(q->record);
        return;
    }
    closep(&q->record_fd);
    q->record_fd = -EBADF;
    request_record_last_commit(q->record, &q->commit, &sampled);
    q->stop = (enum job_stop)request_record_stopped(q->record);
}

static int by_id(const void *a, const void *b)
{
    uint64_t x = ((const struct kept_request *)a)->id, y = ((const struct kept_request *)b)->id;

    return (x > y) - (x < y);
}

static void read_all(struct recovery *c)
{
    struct fd_store *store = c->service->store;
    uint64_t id, last_session = 0, last_request = 0;
    int fd;

    while (fd_store_next_id(store, "session", &id, &fd) > 0) {
        last_session = MAX(last_session, id);
        read_session(c, id, fd);
    }
    while (fd_store_next_id(store, "request", &id, &fd) > 0) {
        last_request = MAX(last_request, id);
        read_request(c, id, fd);
    }
    if (c->n_requests > 0)
        qsort(c->requests, c->n_requests, sizeof(*c->requests), by_id);
    for (size_t i = 0; i < c->n_sessions; i++)
        last_request = MAX(last_request, c->sessions[i].state.last_request);
    session_set_reserve_ids(c->service->sessions, last_session, last_request);
}

/* ---- what becomes of them ---- */

static struct kept_session *session_of(struct recovery *c, uint64_t id)
{
    for (size_t i = 0; i < c->n_sessions; i++)
        if (c->sessions[i].id == id && c->sessions[i].record)
            return &c->sessions[i];
    return NULL;
}

static void forget_request(struct recovery *c, struct kept_request *q)
{
    q->record = request_record_free(q->record);
    closep(&q->record_fd);
    closep(&q->socket);
    q->record_fd = q->socket = -EBADF;
    fd_store_remove_id(c->service->store, "request", q->id);
}

/* It is over; the client may not have read all of it. */
static void flush_request(struct recovery *c, struct kept_request *q, struct user *user)
{
    struct error err = {0};

    if (q->socket < 0 ||
        session_set_take_back_request(c->service->sessions, user, NULL, TAKE_PTR(q->record),
                                      TAKE_FD(q->socket), JOB_GOES_ON, &err) < 0)
        forget_request(c, q);
}

/* Whether or not its session is there, which may have been closed meanwhile. */
static void flush_for_its_user(struct recovery *c, struct kept_request *q)
{
    CLEANUP(user_unrefp) struct user *user = NULL;

    if (users_ref(c->service->users, request_record_facts(q->record)->uid, &user) < 0)
        forget_request(c, q); /* a stream without an end is an error as well */
    else
        flush_request(c, q, user);
}

/* What stands for it now is what the next process is to find: it alone is moved by what is sent. */
static void keep_instead(struct recovery *c, const struct kept_request *q)
{
    int fds[] = {request_record_fd(q->record), q->socket};
    struct fd_store *store = c->service->store;

    if (q->socket < 0)
        return;
    fd_store_remove_id(store, "request", q->id);
    fd_store_push_id(store, "request", q->id, fds, 2);
}

/* What it did to its session is not to be gone on with, and the client hears so. */
static void lose_request(struct recovery *c, struct kept_request *q, const struct error *why)
{
    struct record last = lost_record(why->text);
    int r = -EBADMSG;

    say_request_lost(q->record ? request_record_facts(q->record)->session : 0, q->id, why);
    if (q->record)
        r = request_record_end(q->record, &last);
    else if (q->record_fd >= 0)
        r = request_record_salvage(&q->record, q->record_fd, &last);
    if (r >= 0 && q->record_fd >= 0)
        keep_instead(c, q);
    if (r >= 0)
        flush_for_its_user(c, q);
    else
        forget_request(c, q); /* a stream without an end is an error as well */
}

/* Its session was closed under it, and its client hears that, as it would have. */
static void close_request(struct recovery *c, struct kept_request *q)
{
    const struct record last = {.type = RECORD_END, .reason = "closed"};

    if (request_record_end(q->record, &last) >= 0)
        flush_for_its_user(c, q);
    else
        forget_request(c, q);
}

static bool same(const struct request_before *a, const struct session_state *b)
{
    return a->n_tokens == b->n_tokens && a->position == b->position && a->has_tail == b->has_tail &&
           (!a->has_tail || a->tail == b->tail);
}

static void set_state(struct session_state *state, const struct request_before *to)
{
    state->n_tokens = to->n_tokens;
    state->position = to->position;
    state->has_tail = to->has_tail;
    state->tail = to->tail;
}

/* Its end, told to a session that may have heard of it already. */
static void apply_end(struct kept_session *s, const struct kept_request *q)
{
    bool never = q->socket < 0 && !request_record_replied(q->record);
    struct session_state *state = &s->state;

    if (state->last_request > q->id)
        return;
    if (never && q->commit.phase == REQUEST_DONE) {
        if (state->last_request == q->id)
            set_state(state, request_record_before(q->record));
    } else if (state->last_request < q->id) {
        if (q->commit.phase == REQUEST_DONE)
            set_state(state, &q->commit.after);
        state->prompt_tokens += q->commit.usage.prompt_tokens;
        state->completion_tokens += q->commit.usage.completion_tokens;
    }
    state->last_request = q->id;
}

static void decide_request(struct recovery *c, struct kept_request *q)
{
    struct kept_session *s;
    struct error err;

    if (!q->record) {
        if (q->error.text[0])
            lose_request(c, q, &q->error);
        else
            forget_request(c, q); /* a socket alone: its record never came to the manager */
        return;
    }
    s = session_of(c, request_record_facts(q->record)->session);
    if (q->commit.phase != REQUEST_RUNS) {
        if (s)
            apply_end(s, q);
        return;
    }
    if (!s && q->stop == JOB_CLOSED) {
        close_request(c, q);
        return;
    }
    if (!s) {
        error_set(&err, ESTALE, "its session is lost");
        lose_request(c, q, &err);
        return;
    }
    if (s->state.last_request >= q->id || s->request ||
        !same(request_record_before(q->record), &s->state)) {
        error_set(&err, ESTALE, "it does not fit to its session");
        lose_request(c, q, &err);
        return;
    }
    if (q->socket < 0) { /* that is how one is cancelled */
        s->state.last_request = q->id;
        forget_request(c, q);
        return;
    }
    s->request = q;
}

/* ---- taking back ---- */

static int make_timeline(struct kept_session *s, struct timeline **ret)
{
    const struct session_facts *facts = session_record_facts(s->record);
    struct timeline_options options = {.n_ctx = facts->context,
                                       .account = facts->uid,
                                       .flow = facts->id,
                                       .class = facts->class,
                                       .record = s->record};
    int r = timeline_new(ret, &options);

    if (r >= 0)
        s->record = NULL;
    return r;
}

static void take_session(struct recovery *c, struct kept_session *s, struct adoption *a)
{
    CLEANUP(user_unrefp) struct user *user = NULL;
    uid_t uid = session_record_facts(timeline_record(a->timeline))->uid;
    struct service *service = c->service;
    int r;

    r = users_ref(service->users, uid, &user);
    if (r < 0)
        engine_thread_close(service->engine, TAKE_PTR(a->timeline));
    else
        r = session_set_take_back(&s->session, service->sessions, user, TAKE_PTR(a->timeline));
    if (r < 0) {
        error_set(&a->error, -r,
                  r == -EBADMSG ? "the record is not sound: its owner is damaged"
                                : "out of memory");
        drop_session(c, s->id, &a->error);
        return;
    }
    c->result->n_sessions++;
}

static void adopt_sessions(struct recovery *c, struct adoption *adoptions)
{
    size_t n = 0;

    for (size_t i = 0; i < c->n_sessions; i++) {
        struct kept_session *s = &c->sessions[i];
        struct adoption *a = &adoptions[n];

        *a = (struct adoption){.state = s->state};
        a->continues = s->request && s->request->stop == JOB_GOES_ON;
        if (make_timeline(s, &a->timeline) >= 0) {
            c->sessions[n++] = *s;
        } else {
            error_set(&a->error, ENOMEM, "out of memory");
            drop_session(c, s->id, &a->error);
            session_record_free(s->record);
        }
    }
    c->n_sessions = n;
    engine_thread_adopt(c->service->engine, adoptions, n);
    for (size_t i = 0; i < n; i++) {
        if (adoptions[i].result >= 0) {
            take_session(c, &c->sessions[i], &adoptions[i]);
        } else {
            session_record_set_closed(timeline_record(adoptions[i].timeline));
            timeline_free(adoptions[i].timeline);
            drop_session(c, c->sessions[i].id, &adoptions[i].error);
        }
    }
}

static void go_on(struct recovery *c, struct kept_session *s, const struct adoption *a)
{
    struct kept_request *q = s->request;
    struct user *user;
    struct error err = {0};
    uint32_t n;
    int r;

    if (!s->session) {
        error_set(&err, ESTALE, "its session is lost");
        lose_request(c, q, &err);
        return;
    }
    user = client_session_user(s->session);
    n = request_record_count_recovery(q->record, (uint64_t)q->commit.n_sampled + a->n_tokens);
    if (n > RECOVERIES_MAX && q->stop == JOB_GOES_ON) {
        q->stop = JOB_LOST;
        error_set(&err, ESTALE, "llmd ended %u times in a row while it was at work on it", n);
        say_request_lost(s->id, q->id, &err);
    }
    r = session_set_take_back_request(c->service->sessions, user, s->session, TAKE_PTR(q->record),
                                      TAKE_FD(q->socket), q->stop, &err);
    if (r < 0) {
        say_request_lost(s->id, q->id, &err);
        forget_request(c, q);
        return;
    }
    c->result->n_requests++;
}

/* Those that had come to their end. */
static void flush_ended(struct recovery *c)
{
    for (size_t i = 0; i < c->n_requests; i++) {
        struct kept_request *q = &c->requests[i];

        if (q->record && q->commit.phase != REQUEST_RUNS)
            flush_for_its_user(c, q);
    }
}

static void take_back(struct recovery *c, struct adoption *adoptions)
{
    for (size_t i = 0; i < c->n_requests; i++)
        decide_request(c, &c->requests[i]);
    adopt_sessions(c, adoptions);
    for (size_t i = 0; i < c->n_sessions; i++)
        if (c->sessions[i].request)
            go_on(c, &c->sessions[i], &adoptions[i]);
    flush_ended(c);
}

static void done(struct recovery *c)
{
    for (size_t i = 0; i < c->n_sessions; i++)
        session_record_free(c->sessions[i].record);
    for (size_t i = 0; i < c->n_requests; i++)
        if (c->requests[i].record || c->requests[i].record_fd >= 0 || c->requests[i].socket >= 0)
            forget_request(c, &c->requests[i]);
    free(c->sessions);
    free(c->requests);
}

void recovery_run(struct service *s, struct recovery_result *ret)
{
    struct recovery c = {.service = s, .result = ret};
    CLEANUP(freep) struct adoption *adoptions = NULL;

    if (!session_set_model_id(s->sessions)) {
        engine_thread_adopt(s->engine, NULL, 0);
        recovery_give_up(s, ret);
        return;
    }
    read_all(&c);
    adoptions = calloc(MAX(c.n_sessions, (size_t)1), sizeof(*adoptions));
    if (adoptions)
        take_back(&c, adoptions);
    else
        engine_thread_adopt(s->engine, NULL, 0);
    done(&c);
    if (ret->n_sessions > 0 || ret->n_requests > 0 || ret->n_lost > 0)
        log_with(LOG_NOTICE, &(struct log_fields){.message_id = LOG_ID_TAKEN_BACK},
                 "went on after a restart with %" PRIu32 " sessions and %" PRIu32
                 " requests; %" PRIu32 " sessions lost",
                 ret->n_sessions, ret->n_requests, ret->n_lost);
}

void recovery_give_up(struct service *s, struct recovery_result *ret)
{
    struct recovery c = {.service = s, .result = ret};
    struct error err;
    uint64_t id;
    int fd;

    error_set(&err, ESTALE, "there is no model that could go on with it");
    while (fd_store_next_id(s->store, "session", &id, &fd) > 0) {
        close(fd);
        drop_session(&c, id, &err);
    }
    while (fd_store_next_id(s->store, "request", &id, &fd) > 0)
        read_request(&c, id, fd);
    for (size_t i = 0; i < c.n_requests; i++)
        if (!c.requests[i].record || c.requests[i].commit.phase == REQUEST_RUNS)
            lose_request(&c, &c.requests[i], &err);
    flush_ended(&c);
    done(&c);
}
