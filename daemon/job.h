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

#include "base/error.h"
#include "daemon/request-record.h"
#include "daemon/timeline.h"
#include "engine/chat.h"
#include "engine/engine.h"
#include "engine/generation.h"
#include "engine/tokenizer.h"
#include "ipc/buffer.h"

struct client_session;
struct generation;
struct request_record;
struct stream;

enum job_kind {
    JOB_GENERATE, /* with a stream */
    JOB_APPEND,   /* with a stream; the prompt is computed, nothing is generated */
    /* Without a stream: the answer is in the job when it comes back. */
    JOB_MEASURE, /* the one kind that may be submitted while the timeline has another job, or
                    without a timeline */
    JOB_FORK,
    JOB_REWIND,
    JOB_SAVE,
    JOB_RESTORE,
};

enum job_format {
    JOB_RECORDS, /* ipc/record.h */
    JOB_TEXT,
};

/* Why a job should end; the first reason given stays. */
enum job_stop {
    JOB_GOES_ON,
    JOB_CANCELLED,
    JOB_SHUTDOWN,
    JOB_CLOSED, /* its timeline was */
    JOB_LOST,   /* process after process has ended while it was at work */
};

struct job_message {
    enum chat_role role;
    char *text; /* owned; [n] UTF-8 or nearly so, may hold NUL */
    size_t n;
};

/* What is asked. options.stop and options.sampler.bias point to what is owned here. */
struct job_request {
    enum job_kind kind;

    /* generate, append, measure */
    struct job_message *messages;
    size_t n_messages;
    bool raw; /* one message, its text without template */
    enum job_format format;
    bool deterministic; /* generate, append: all of it on one lane, and nothing of another's */
    struct generation_options options; /* generate */
    char **stop;                       /* [options.n_stop] */
    struct logit_bias *bias;           /* [options.sampler.n_bias] */

    uint64_t account;             /* measure without a timeline: for whom */
    struct timeline_options fork; /* of the new timeline; n_ctx 0: as its parent's */
    uint32_t rewind_to;           /* tokens to keep */
    struct buffer saved;          /* restore: what a JOB_SAVE gave, or anything else */
};

void job_request_done(struct job_request *r);

/* The engine thread's part of a job. */
struct job_work {
    struct job *previous, *next; /* engine_thread::active */
    struct generation *generation;
    bool begun;       /* the session is there, and what follows is meant */
    uint32_t start;   /* the session's tokens before */
    size_t n_done;    /* append: of job::ids */
    uint32_t last_id; /* sampled last; meaningful when n_sampled > 0 */
    uint32_t n_sampled;
    bool cut;                     /* output was lost for want of memory: no proper end may follow */
    struct buffer line;           /* the record being written; kept for the next one */
    uint64_t log_bytes;           /* written, committed or not */
    struct request_commit commit; /* the last one */

    struct scheduler_task task; /* is_under_way: in a pass; the session is left alone */
    enum engine_lane lane;      /* of one that is deterministic */
    bool waits_for_pass;        /* for memory, that others may give when theirs is over */
    bool in_scheduler;          /* queued or running there */
    bool is_running;            /* was let in */
    bool is_paused;
    uint32_t n_preempted;
    uint32_t total;         /* rows of the prompt or of what is computed again; 0: none */
    uint32_t told_left;     /* of them, when progress was told of last */
    uint64_t noticed_usec;  /* when a record last told how it stands; at first when it came */
    uint32_t told_position; /* in the queue; 0: none yet */
};

struct job {
    uint64_t id;
    struct job_request request;
    struct timeline *timeline; /* lives longer: it is closed through the same queue; NULL: none */
    /* Kinds with a stream: by engine_thread_prepare(), or another process's. When the job has come
     * back, whoever wants it longer takes it. */
    struct request_record *record;
    bool resumes;    /* the record is another process's, which had begun */
    atomic_int stop; /* enum job_stop; any thread, by engine_thread_stop() */

    /*
     * The answer, the loop's once the job came back. With a stream, `result` is negative when the
     * stream ended with an error record. Kinds without one are answered -ECANCELED, -ESHUTDOWN or
     * -ESRCH when they were stopped.
     */
    int result;                    /* 0 or -errno */
    struct error error;            /* text for result < 0, or empty */
    const char *end_reason;        /* static, as in the `end` record; NULL: result says why */
    bool was_stopped;              /* by engine_thread_stop() or engine_thread_close() */
    struct generation_usage usage; /* generate, append; also of those that were cancelled */
    uint32_t n_tokens;             /* measure: of the prompt; rewind, restore: in the session now */
    struct timeline *fork;         /* JOB_FORK: the loop takes it, and closes it; NULL: failed */
    struct buffer saved;           /* JOB_SAVE: what is to be written */

    /* guarded by engine_thread::mutex */
    uint64_t sendable;     /* bytes of the record's log that may be sent: the last record not before
                              the loop has heard of the end */
    uint64_t sent;         /* of them, as the loop told */
    bool finished;         /* the engine thread no longer knows it */
    bool has_news;         /* in engine_thread::news */
    struct job *news_next; /* engine_thread::news */
    struct job *next;      /* engine_thread::submitted, or a list of the prompt thread */
    struct job *timeline_next; /* timeline::jobs */

    struct { /* guarded by the prompt thread's mutex */
        uint64_t account;
        size_t bytes;
        uint32_t passed; /* how many smaller ones went before */
        int lane;        /* waiting there; 0: not waiting */
    } prompt;

    /* The prompt thread's until it hands the job on, then the engine thread's. */
    struct token_array ids; /* the prompt */
    size_t n_wanted;        /* tokens of it; when they do not fit, at least so many; 0: not known */
    enum chat_position position; /* submitted from, later where it ends */
    bool has_tail;
    uint32_t tail, room; /* tokens: submitted from */

    struct job_work work; /* engine thread */

    /* loop thread; NULL once gone */
    struct stream *stream;
    struct client_session *session;
    /* Called by the loop's side when the job has come back, before it is freed; NULL: nobody. */
    void (*on_finished)(struct job *j, void *userdata);
    void *userdata;
};

/* Takes the request over. timeline: NULL for a JOB_MEASURE of what stands alone. 0, -ENOMEM */
int job_new(struct job **ret, uint64_t id, struct timeline *timeline, struct job_request *request);
struct job *job_free(struct job *j); /* not while the engine thread has it */
void job_freep(struct job **j);

/* Whether a stream belongs to it. */
bool job_kind_streams(enum job_kind kind);
