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
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "base/cleanup.h"
#include "daemon/stream.h"
#include "engine/model-file.h"
#include "engine/model.h"

#define SESSIONS_MAX 64u
#define STREAMS_MAX 256u /* those of ended requests that nobody reads included */

struct session_set {
    sd_event *event;              /* borrowed */
    struct engine_thread *engine; /* borrowed; NULL: there is none, nor what follows */
    sd_event_source *news_source;
    char *model_name, *model_path;
    uint32_t context_max;
    session_set_changed changed;
    void *userdata;
    uint64_t last_session_id, last_request_id;
    uint32_t n_sessions, n_jobs, n_streams;
    bool stopping;
    struct request *requests; /* those whose stream or job is there */
};

/* What a stream's end is told with; also what lists the running requests. */
struct request {
    struct session_set *set;
    struct job *job;                 /* NULL: has come back */
    struct stream *stream;           /* NULL: gone */
    struct request *previous, *next; /* session_set::requests */
};

struct client_session {
    struct session_set *set;
    uint64_t id;
    struct timeline *timeline;
    uint32_t context_max;
    struct job *job; /* the request that runs, or NULL */
};

/* ---- requests ---- */

static void request_put(struct request *q)
{
    if (q->job || q->stream)
        return;
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
    set->n_streams--;
    request_put(q);
    set->changed(set->userdata);
}

static struct request *request_of(struct session_set *set, const struct job *j)
{
    struct request *q = set->requests;

    while (q->job != j)
        q = q->next;
    return q;
}

static void job_came_back(struct session_set *set, struct job *j)
{
    struct request *q = request_of(set, j);

    if (j->session) {
        j->session->job = NULL;
        j->session = NULL;
    }
    q->job = NULL;
    set->n_jobs--;
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
    while ((j = engine_thread_news(set->engine, &finished))) {
        if (finished)
            job_came_back(set, j);
        else if (j->stream)
            stream_news(j->stream);
    }
    set->changed(set->userdata);
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
    struct session_set *set = calloc(1, sizeof(*set));

    if (!set)
        return -ENOMEM;
    set->event = event;
    set->changed = changed;
    set->userdata = userdata;
    *ret = set;
    return 0;
}

int session_set_set_engine(struct session_set *set, struct engine_thread *t, uint32_t context_max)
{
    CLEANUP(freep) char *name = NULL, *real = NULL;
    const char *path;
    int r;

    assert(set->n_sessions == 0 && set->n_jobs == 0);
    session_set_cut_streams(set); /* they would look for their job's engine */
    set->news_source = sd_event_source_disable_unref(set->news_source);
    set->engine = NULL;
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
    free(set->model_name);
    free(set->model_path);
    free(set);
    return NULL;
}

void session_set_freep(struct session_set **set)
{
    *set = session_set_free(*set);
}

uint32_t session_set_n_sessions(const struct session_set *set)
{
    return set->n_sessions;
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
        if (q->stream)
            stream_abandon(q->stream);
    }
}

/* ---- one session ---- */

int client_session_new(struct client_session **ret, struct session_set *set, uint32_t context,
                       struct error *err)
{
    const struct model_config *config;
    struct client_session *s;

    if (set->stopping)
        return error_set(err, ESHUTDOWN, "the daemon is about to end");
    if (!set->engine)
        return error_set(err, EAGAIN, "no model is loaded; see llmctl model list");
    config = model_config(engine_thread_model(set->engine));
    if (context > config->context_max)
        return error_set(err, EINVAL, "context: %u is more than the model's %u tokens", context,
                         config->context_max);
    if (set->n_sessions >= SESSIONS_MAX)
        return error_set(err, EDQUOT, "all %u sessions of this daemon are in use", SESSIONS_MAX);

    s = calloc(1, sizeof(*s));
    if (!s)
        return error_set(err, ENOMEM, "out of memory");
    s->context_max = context > 0 ? context : set->context_max;
    if (s->context_max == 0)
        s->context_max = config->context_max;
    if (timeline_new(&s->timeline, &(struct timeline_options){.n_ctx = s->context_max}) < 0) {
        free(s);
        return error_set(err, ENOMEM, "out of memory");
    }
    s->set = set;
    s->id = ++set->last_session_id;
    set->n_sessions++;
    *ret = s;
    return 0;
}

struct client_session *client_session_free(struct client_session *s)
{
    if (!s)
        return NULL;
    client_session_cancel(s);
    if (s->job)
        s->job->session = NULL;
    engine_thread_close(s->set->engine, s->timeline);
    s->set->n_sessions--;
    free(s);
    return NULL;
}

void client_session_freep(struct client_session **s)
{
    *s = client_session_free(*s);
}

uint64_t client_session_id(const struct client_session *s)
{
    return s->id;
}

bool client_session_is_busy(const struct client_session *s)
{
    return s->job;
}

uint32_t client_session_context_used(const struct client_session *s)
{
    return timeline_n_tokens(s->timeline);
}

uint32_t client_session_context_max(const struct client_session *s)
{
    return s->context_max;
}

int client_session_generate(struct client_session *s, struct job_request *request, int *ret_fd,
                            uint64_t *ret_id, struct error *err)
{
    struct session_set *set = s->set;
    CLEANUP(job_freep) struct job *j = NULL;
    struct request *q;
    int r;

    if (set->stopping)
        return error_set(err, ESHUTDOWN, "the daemon is about to end");
    if (s->job)
        return error_set(err, EBUSY, "request %llu of this session still runs",
                         (unsigned long long)s->job->id);

    if (set->n_streams >= STREAMS_MAX)
        return error_set(err, EDQUOT, "%u streams wait for their readers", STREAMS_MAX);

    if (job_new(&j, set->last_request_id + 1, s->timeline, request) < 0)
        return error_set(err, ENOMEM, "out of memory");
    q = calloc(1, sizeof(*q));
    if (!q)
        return error_set(err, ENOMEM, "out of memory");
    q->set = set;
    r = stream_new(&q->stream, set->event, set->engine, j, on_stream_gone, q, ret_fd);
    if (r < 0) {
        free(q);
        return error_set(err, -r, "cannot make a stream: %s", strerror(-r));
    }
    q->next = set->requests;
    if (q->next)
        q->next->previous = q;
    set->requests = q;
    set->n_streams++;
    set->n_jobs++;
    *ret_id = ++set->last_request_id;

    s->job = q->job = j;
    j->session = s;
    engine_thread_submit(set->engine, TAKE_PTR(j));
    return 0;
}

void client_session_cancel(struct client_session *s)
{
    if (s->job)
        engine_thread_stop(s->set->engine, s->job, JOB_CANCELLED);
}
