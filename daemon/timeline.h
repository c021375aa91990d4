/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * timeline: an engine session as the loop may hold it: by name. The session itself is made by the
 * first job that needs it. A timeline has one job at a time (but for JOB_MEASURE): whoever submits
 * sees to that. It ends with engine_thread_close(), which every timeline needs, used or not.
 *
 * Loop thread.
 */

#include <stdint.h>

#include "daemon/session-record.h"
#include "engine/scheduler.h"

struct engine_thread;
struct timeline;

struct timeline_options {
    uint32_t n_ctx;         /* as session_new(), already checked */
    uint64_t account, flow; /* whom its work is charged to: uid, session */
    enum scheduler_class class;
    struct session_record *record; /* where it lives, to outlive the process; NULL: in memory of the
                                      engine's own */
};

/* Takes the record over, on success. 0, -ENOMEM */
int timeline_new(struct timeline **ret, const struct timeline_options *options);
/* Of one that the engine thread was never given. */
struct timeline *timeline_free(struct timeline *tl);

/* NULL: none. Its owner is the loop's to change. Valid until engine_thread_close(). */
struct session_record *timeline_record(const struct timeline *tl);

enum timeline_state {
    TIMELINE_IDLE,
    TIMELINE_QUEUED,  /* is being tokenised, or waits for others or for memory */
    TIMELINE_PREFILL, /* a prompt is computed, or what had been given up is computed again */
    TIMELINE_DECODE,
    TIMELINE_PAUSED, /* the reader of its stream is slow */
};
const char *timeline_state_name(enum timeline_state s); /* as the bus has it: "idle", ... */

struct timeline_info {
    enum timeline_state state;
    uint32_t n_tokens;
    uint32_t queue_position; /* 0: not queued, or not tokenised yet; 1: next */
    uint64_t estimate_usec;  /* until it starts, from now; 0: not queued or not known */
    uint64_t kv_bytes;       /* of the pages it holds; those shared with others in full */
    uint64_t prompt_tokens, completion_tokens; /* totals of its requests */
};

/* As of the last step. Cheap: no step is waited for. */
void timeline_get_info(struct engine_thread *t, struct timeline *tl, struct timeline_info *ret);

uint32_t timeline_n_tokens(const struct timeline *tl); /* after the last step */
