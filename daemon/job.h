/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * job: one request on its way between the threads. It owns all that it points to, so that the
 * client, its session's object and its connection may vanish while it runs.
 *
 * The loop thread makes it, submits it, and is the only one to free it, after the engine thread let
 * it go (engine_thread_news() said so). What is asked is not changed after submission.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/chat.h"
#include "engine/generation.h"
#include "ipc/buffer.h"

struct client_session;
struct generation;
struct stream;
struct timeline;

enum job_format {
    JOB_RECORDS, /* ipc/record.h */
    JOB_TEXT,
};

/* Why a job should end; the first reason given stays. */
enum job_stop {
    JOB_GOES_ON,
    JOB_CANCELLED,
    JOB_SHUTDOWN,
};

struct job_message {
    enum chat_role role;
    char *text; /* owned; [n] UTF-8 or nearly so, may hold NUL */
    size_t n;
};

/* What is asked. options.stop and options.sampler.bias point to what is owned here. */
struct job_request {
    struct job_message *messages;
    size_t n_messages;
    bool raw; /* one message, its text without template */
    enum job_format format;
    struct generation_options options;
    char **stop;             /* [options.n_stop] */
    struct logit_bias *bias; /* [options.sampler.n_bias] */
};

void job_request_done(struct job_request *r);

struct job {
    uint64_t id;
    struct job_request request;
    struct timeline *timeline; /* lives longer: it is closed through the same queue */
    atomic_int stop;           /* enum job_stop; any thread, by engine_thread_stop() */

    /* guarded by engine_thread::mutex */
    struct buffer out; /* encoded, not yet taken by the loop */
    bool finished;     /* the engine thread no longer knows it */
    bool has_news;     /* in engine_thread::news */
    struct job *next;  /* engine_thread::submitted, then ::news */

    /* engine thread */
    struct generation *generation;
    uint32_t prompt_tokens; /* what it asks for, for ContextFull */
    uint32_t last_id;       /* sampled last; meaningful when n_sampled > 0 */
    uint32_t n_sampled;
    bool cut; /* output was lost for want of memory: no proper end may follow */

    /* loop thread; NULL once gone */
    struct stream *stream;
    struct client_session *session;
};

/* Takes the request over. */
int job_new(struct job **ret, uint64_t id, struct timeline *timeline, struct job_request *request);
struct job *job_free(struct job *j); /* not while the engine thread has it */
void job_freep(struct job **j);
