/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/job.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

void job_request_done(struct job_request *r)
{
    for (size_t i = 0; i < r->n_messages; i++) {
        if (r->messages[i].text)
            explicit_bzero(r->messages[i].text, r->messages[i].n);
        free(r->messages[i].text);
    }
    free(r->messages);
    for (size_t i = 0; i < r->options.n_stop; i++)
        free(r->stop[i]);
    free(r->stop);
    free(r->bias);
    if (r->saved.data)
        explicit_bzero(r->saved.data, r->saved.n);
    buffer_done(&r->saved);
    session_record_free(r->fork.record);
    *r = (struct job_request){0};
}

int job_new(struct job **ret, uint64_t id, struct timeline *timeline, struct job_request *request)
{
    struct job *j = calloc(1, sizeof(*j));

    if (!j)
        return -ENOMEM;
    j->id = id;
    j->timeline = timeline;
    j->request = *request;
    *request = (struct job_request){0};
    *ret = j;
    return 0;
}

static void wipe_ids(struct token_array *ids)
{
    if (ids->data)
        explicit_bzero(ids->data, ids->n * sizeof(ids->data[0]));
    free(ids->data);
    *ids = (struct token_array){0};
}

struct job *job_free(struct job *j)
{
    if (!j)
        return NULL;
    assert(!j->work.generation && !j->has_news && !j->stream && !j->session && !j->fork);
    job_request_done(&j->request);
    wipe_ids(&j->ids);
    if (j->saved.data)
        explicit_bzero(j->saved.data, j->saved.n);
    buffer_done(&j->saved);
    if (j->work.line.data)
        explicit_bzero(j->work.line.data, j->work.line.allocated);
    buffer_done(&j->work.line);
    request_record_free(j->record);
    free(j);
    return NULL;
}

void job_freep(struct job **j)
{
    *j = job_free(*j);
}

bool job_kind_streams(enum job_kind kind)
{
    return kind == JOB_GENERATE || kind == JOB_APPEND;
}
