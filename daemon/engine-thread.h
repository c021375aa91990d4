/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * engine_thread: the one thread that enters the engine, and the two queues between it and the loop.
 *
 * Jobs go in through engine_thread_submit(); what they produce comes back as news: the descriptor
 * becomes readable, engine_thread_news() names the jobs, engine_thread_output() takes their bytes.
 * A job is its submitter's again when engine_thread_news() says that it is finished.
 * Every function here is for the loop thread, and none waits for a step of the model, except
 * engine_thread_new() (for the engine's start) and engine_thread_free() (for its end).
 */

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "daemon/job.h"
#include "engine/engine.h"

struct engine_thread;
struct model;

/* m must outlive it. 0, or engine_new()'s failure, -errno */
int engine_thread_new(struct engine_thread **ret, const struct model *m,
                      const struct engine_options *options, struct error *err);

/* All jobs must have come back and all timelines be closed. */
struct engine_thread *engine_thread_free(struct engine_thread *t);
void engine_thread_freep(struct engine_thread **t);

const struct model *engine_thread_model(const struct engine_thread *t);
const char *engine_thread_description(const struct engine_thread *t);

/* Bytes in KV pages after the last step; the limit. */
void engine_thread_kv_bytes(struct engine_thread *t, uint64_t *ret_used, uint64_t *ret_max);

/*
 * timeline: an engine session as the loop may hold it: by name. The session itself is made by the
 * first job. n_ctx as session_new(), already checked. 0, -ENOMEM
 */
int timeline_new(struct timeline **ret, uint32_t n_ctx);
uint32_t timeline_n_tokens(const struct timeline *tl); /* after the last step */

/* Takes it over; jobs of it that are still there are stopped first. */
void engine_thread_close(struct engine_thread *t, struct timeline *tl);

/* The job is the engine thread's until engine_thread_news() says that it is finished. */
void engine_thread_submit(struct engine_thread *t, struct job *j);

/* Asks for its end within one step. It still comes back as finished. */
void engine_thread_stop(struct engine_thread *t, struct job *j, enum job_stop why);

/* Readable when there are news. */
int engine_thread_fd(const struct engine_thread *t);

/*
 * The next job with news since it was last returned here, oldest first; NULL: no more, and the
 * descriptor is readable again only after others. *ret_finished: the engine thread has let it go,
 * and it will not be returned again; what it still holds is to be taken, then it is to be freed.
 */
struct job *engine_thread_news(struct engine_thread *t, bool *ret_finished);

/*
 * Moves what the job has produced to the end of out, and lets the engine thread go on with a job
 * that had paused because too much of it waited. 0, -ENOMEM: what should have been moved is lost
 */
int engine_thread_output(struct engine_thread *t, struct job *j, struct buffer *out);
