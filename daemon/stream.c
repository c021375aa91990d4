/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "base/cleanup.h"

struct stream {
    sd_event_source *source;
    int fd;
    struct engine_thread *engine;
    struct job *job;               /* NULL once finished */
    struct request_record *record; /* the job's, then ours */
    uint64_t end;                  /* of its log, once the job is finished */
    stream_gone gone;
    void *userdata;
};

static void stream_free(struct stream *s)
{
    sd_event_source_disable_unref(s->source);
    (void)shutdown(s->fd, SHUT_RDWR); /* the service manager has it too, until it is told */
    closep(&s->fd);
    if (!s->job)
        request_record_free(s->record);
    free(s);
}

void stream_abandon(struct stream *s)
{
    stream_gone gone = s->gone;
    void *userdata = s->userdata;

    if (s->job) {
        s->job->stream = NULL;
        engine_thread_stop(s->engine, s->job, JOB_CANCELLED);
    }
    stream_free(s);
    gone(userdata);
}

/* Sends what there is as long as the client takes it. The stream may be gone afterwards. */
static void pump(struct stream *s)
{
    for (;;) {
        uint64_t sent = request_record_sent(s->record);
        uint64_t end = s->job ? engine_thread_output(s->engine, s->job, sent) : s->end;
        int r;

        if (sent >= end) {
            if (s->job)
                sd_event_source_set_io_events(s->source, 0);
            else
                stream_abandon(s); /* all is said */
            return;
        }
        r = request_record_send(s->record, s->fd, end);
        if (r == -EAGAIN) {
            sd_event_source_set_io_events(s->source, EPOLLOUT);
            return;
        }
        if (r < 0) {
            stream_abandon(s); /* EPIPE: the usual way to cancel */
            return;
        }
    }
}

/*
 * Asked for without EPOLLOUT, epoll tells of a hangup alone, which is the client's end closed. What
 * a client may write here is never read.
 */
static int on_io(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct stream *s = userdata;

    (void)source;
    (void)fd;
    if (revents & (EPOLLHUP | EPOLLERR))
        stream_abandon(s);
    else
        pump(s);
    return 0;
}

/* Takes fd. */
static int new_stream(struct stream **ret, sd_event *event, struct engine_thread *t, int fd,
                      stream_gone gone, void *userdata)
{
    struct stream *s = calloc(1, sizeof(*s));
    int r;

    if (!s) {
        close(fd);
        return -ENOMEM;
    }
    s->fd = fd;
    s->engine = t;
    s->gone = gone;
    s->userdata = userdata;
    /* sendfile() has no flag for it. The client's end is another open file, and stays as it is. */
    r = fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK) < 0 ? -errno : 0;
    if (r >= 0)
        r = sd_event_add_io(event, &s->source, fd, 0, on_io, s);
    if (r < 0) {
        stream_free(s);
        return r;
    }
    *ret = s;
    return 0;
}

static void join(struct stream *s, struct job *j)
{
    s->job = j;
    s->record = j->record;
    j->stream = s;
}

int stream_new(struct stream **ret, sd_event *event, struct engine_thread *t, struct job *j,
               stream_gone gone, void *userdata, int *ret_client_fd)
{
    int pair[2], r;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    r = new_stream(ret, event, t, pair[0], gone, userdata);
    if (r < 0) {
        close(pair[1]);
        return r;
    }
    join(*ret, j);
    *ret_client_fd = pair[1];
    return 0;
}

int stream_take_back(struct stream **ret, sd_event *event, struct engine_thread *t, struct job *j,
                     struct request_record *record, int fd, stream_gone gone, void *userdata)
{
    int r = new_stream(ret, event, t, fd, gone, userdata);

    if (r < 0)
        return r;
    if (j) {
        join(*ret, j);
    } else {
        (*ret)->record = record;
        (*ret)->end = request_record_log_bytes(record);
    }
    sd_event_source_set_io_events((*ret)->source, EPOLLOUT); /* there may be something to say */
    return 0;
}

int stream_fd(const struct stream *s)
{
    return s->fd;
}

struct request_record *stream_record(const struct stream *s)
{
    return s->record;
}

void stream_news(struct stream *s)
{
    pump(s);
}

void stream_job_finished(struct stream *s)
{
    s->end = engine_thread_output(s->engine, s->job, request_record_sent(s->record));
    s->job->stream = NULL;
    s->job->record = NULL; /* ours from now on */
    s->job = NULL;
    pump(s);
}
