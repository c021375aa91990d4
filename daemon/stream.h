/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * stream: the daemon's end of what a client reads a request's output from. Loop thread.
 *
 * It sends the log of the job's record as fast as the client reads it and no faster, so that what
 * waits for a slow reader waits in the log, and the job then pauses. When the client's end is
 * closed, the job is stopped and the stream is gone.
 */

#include <systemd/sd-event.h>

#include "daemon/engine-thread.h"

struct stream;

/* Called once when the stream is over, whichever side ended it; it frees itself afterwards. */
typedef void (*stream_gone)(void *userdata);

/*
 * A stream for the job, which learns of it (job::stream). *ret_client_fd is the client's end, a
 * blocking socket. 0, -errno
 */
int stream_new(struct stream **ret, sd_event *event, struct engine_thread *t, struct job *j,
               stream_gone gone, void *userdata, int *ret_client_fd);

/*
 * A stream of another process, whose daemon's end is fd. j: goes on, and has the record; NULL: it
 * is over, and the log of `record` is sent to its end. Takes fd, and on success a record that was
 * given. 0, -errno
 */
int stream_take_back(struct stream **ret, sd_event *event, struct engine_thread *t, struct job *j,
                     struct request_record *record, int fd, stream_gone gone, void *userdata);

int stream_fd(const struct stream *s); /* borrowed */
struct request_record *stream_record(const struct stream *s);

/* Nobody will read it: ends it now and calls gone(). The job is stopped if it still runs. */
void stream_abandon(struct stream *s);

/* The job has news. */
void stream_news(struct stream *s);

/* The job is finished: takes its record, and forgets it. */
void stream_job_finished(struct stream *s);
