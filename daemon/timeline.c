/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/timeline.h"

#include <errno.h>
#include <stdlib.h>

#include "daemon/engine-thread-internal.h"

int timeline_new(struct timeline **ret, const struct timeline_options *options)
{
    struct timeline *tl = calloc(1, sizeof(*tl));

    if (!tl)
        return -ENOMEM;
    tl->options = *options;
    tl->spill_fd = -EBADF;
    *ret = tl;
    return 0;
}

struct timeline *timeline_free(struct timeline *tl)
{
    if (!tl)
        return NULL;
    session_free(tl->session);
    session_record_free(tl->options.record);
    free(tl);
    return NULL;
}

struct session_record *timeline_record(const struct timeline *tl)
{
    return tl->options.record;
}

void timeline_commit(struct timeline *tl)
{
    if (tl->options.record)
        session_record_commit(tl->options.record,
                              &(struct session_state){
                                  .n_tokens = tl->n_settled,
                                  .position = tl->position,
                                  .has_tail = tl->has_tail,
                                  .tail = tl->tail,
                                  .last_request = tl->last_request,
                                  .prompt_tokens = tl->info.prompt_tokens,
                                  .completion_tokens = tl->info.completion_tokens,
                              });
}

const char *timeline_state_name(enum timeline_state s)
{
    switch (s) {
    case TIMELINE_IDLE:
        return "idle";
    case TIMELINE_QUEUED:
        return "queued";
    case TIMELINE_PREFILL:
        return "prefill";
    case TIMELINE_DECODE:
        return "decode";
    case TIMELINE_PAUSED:
        return "paused";
    }
    return NULL;
}

void timeline_get_info(struct engine_thread *t, struct timeline *tl, struct timeline_info *ret)
{
    pthread_mutex_lock(&t->mutex);
    *ret = tl->info;
    pthread_mutex_unlock(&t->mutex);
    ret->n_tokens = atomic_load(&tl->n_tokens);
}

uint32_t timeline_n_tokens(const struct timeline *tl)
{
    return atomic_load(&tl->n_tokens);
}
