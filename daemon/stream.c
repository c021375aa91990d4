/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/stream.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "base/cleanup.h"

struct stream {
    sd_event_source *source;
    int fd;
    struct engine_thread *engine;
    struct job *job; /* NULL once finished */
    struct buffer pending;
    size_t sent; /* of pending */
    stream_gone gone;
    void *userdata;
};

static void stream_free(struct stream *s)
{
    sd_event_source_disable_unref(s->source);
    closep(&s->fd);
    buffer_done(&s->pending);
    free(s);
}

void stream_abandon(struct stream *s)
{
    if (s->job) {
        s->job->stream = NULL;
        engine_thread_stop(s->engine, s->job, JOB_CANCELLED);
        s->job = NULL;
    }
    s->gone(s->userdata);
    stream_free(s);
}

/* Sends what there is as long as the client takes it. The stream may be gone afterwards. */
static void pump(struct stream *s)
{
    for (;;) {
        ssize_t n;

        if (s->sent == s->pending.n) {
            s->pending.n = s->sent = 0;
            if (s->job && engine_thread_output(s->engine, s->job, &s->pending) < 0) {
                stream_abandon(s); /* better cut than with a hole */
                return;
            }
            if (s->pending.n == 0) {
                if (s->job)
                    sd_event_source_set_io_events(s->source, 0);
                else
                    stream_abandon(s); /* all is said */
                return;
            }
        }
        n = send(s->fd, s->pending.data + s->sent, s->pending.n - s->sent,
                 MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            s->sent += (size_t)n;
        } else if (errno == EAGAIN) {
            sd_event_source_set_io_events(s->source, EPOLLOUT);
            return;
        } else if (errno != EINTR) {
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

int stream_new(struct stream **ret, sd_event *event, struct engine_thread *t, struct job *j,
               stream_gone gone, void *userdata, int *ret_client_fd)
{
    struct stream *s;
    int pair[2], r;

    s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
        r = -errno;
        free(s);
        return r;
    }
    s->fd = pair[0];
    s->engine = t;
    s->gone = gone;
    s->userdata = userdata;
    r = sd_event_add_io(event, &s->source, s->fd, 0, on_io, s);
    if (r < 0) {
        close(pair[1]);
        stream_free(s);
        return r;
    }
    s->job = j;
    j->stream = s;
    *ret = s;
    *ret_client_fd = pair[1];
    return 0;
}

void stream_news(struct stream *s)
{
    pump(s);
}

void stream_job_finished(struct stream *s)
{
    int r;

    buffer_consume(&s->pending, s->sent);
    s->sent = 0;
    r = engine_thread_output(s->engine, s->job, &s->pending);
    s->job->stream = NULL;
    s->job = NULL;
    if (r < 0)
        stream_abandon(s);
    else
        pump(s);
}
