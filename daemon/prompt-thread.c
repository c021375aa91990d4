/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Each of the two threads takes from a list of its own: of the account whose job is first in it the
 * smallest prompt, unless a bigger one of that account has been passed over PASSED_MOST times. Then
 * all of the account's jobs go behind everybody else's. So an account with a hundred prompts delays
 * others by one, and itself, for what is small, by none.
 */

#include "daemon/prompt-thread.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/model.h"

#define SMALL_BYTES 65536u /* of text: some ten milliseconds of work */
#define PASSED_MOST 4u
#define BIG_NICE 10 /* big prompts take what the small ones and the engine leave */

struct lane {
    struct prompt_thread *prompt_thread;
    pthread_t thread;
    bool has_thread, is_big;
    struct job *waiting; /* by job::next */
    pthread_cond_t changed;
};

struct prompt_thread {
    const struct model *model;
    prompt_done done;
    void *userdata;
    pthread_mutex_t mutex; /* guards the lanes' lists, quit and job::prompt */
    bool quit;
    struct lane lanes[2];
};

static size_t text_bytes(const struct job_request *q)
{
    size_t n = 0;

    for (size_t i = 0; i < q->n_messages; i++)
        n += q->messages[i].n; /* the bus allows LLM_PROMPT_BYTES_MAX in all */
    return n;
}

/* ---- the work ---- */

static struct chat_message *chat_messages(const struct job_request *q)
{
    struct chat_message *messages = calloc(MAX(q->n_messages, (size_t)1), sizeof(*messages));

    for (size_t i = 0; messages && i < q->n_messages; i++)
        messages[i] =
            (struct chat_message){q->messages[i].role, q->messages[i].text, q->messages[i].n};
    return messages;
}

/* *ret_least is set, to the tokens that there are at least, when these are too many: -EMSGSIZE. */
static int check(const struct model *m, const struct job_request *q,
                 const struct chat_message *messages, enum chat_position position, uint32_t room,
                 size_t *ret_least, struct error *err)
{
    const struct tokenizer *tokenizer = model_tokenizer(m);
    struct chat_options options = {.position = position, .generate = q->kind != JOB_APPEND};
    size_t least = 0;
    int r;

    if (!tokenizer)
        return error_set(err, EOPNOTSUPP, "the model has no tokenizer");
    if (!q->raw) {
        if (tokenizer_table(tokenizer)->start_of_turn == TOKENIZER_NONE ||
            tokenizer_table(tokenizer)->end_of_turn == TOKENIZER_NONE)
            return error_set(err, EOPNOTSUPP,
                             "the model's vocabulary has no turns: it takes raw prompts only");
        r = chat_check(tokenizer, messages, q->n_messages, &options, err);
        if (r < 0)
            return r == -EINVAL ? -EBADF : r; /* what can be wrong is the order of the roles */
        least = chat_ids_least(tokenizer, messages, q->n_messages);
    } else {
        if (q->n_messages == 0)
            return error_set(err, EBADF, "the prompt is empty");
        least = tokenizer_ids_least(tokenizer, q->messages[0].n);
    }
    if (q->kind == JOB_MEASURE)
        return 0;
    if (least > room) {
        *ret_least = least;
        return error_set(err, EMSGSIZE,
                         "the prompt has at least %zu tokens and the session has room for %u",
                         least, room);
    }
    return 0;
}

int prompt_check(const struct model *m, const struct job_request *q, enum chat_position position,
                 uint32_t room, struct error *err)
{
    CLEANUP(freep) struct chat_message *messages = chat_messages(q);
    size_t least;

    if (!messages)
        return error_set(err, ENOMEM, "out of memory");
    return check(m, q, messages, position, room, &least, err);
}

static int encode(const struct model *m, struct job *j, struct error *err)
{
    const struct tokenizer *tokenizer = model_tokenizer(m);
    const struct job_request *q = &j->request;
    CLEANUP(freep) struct chat_message *messages = chat_messages(q);
    bool at_start = j->position == CHAT_START && !j->has_tail;
    int r;

    if (!messages)
        return error_set(err, ENOMEM, "out of memory");
    r = check(m, q, messages, j->position, j->room, &j->n_wanted, err);
    if (r < 0)
        return r;
    if (j->has_tail) {
        r = token_array_append(&j->ids, &j->tail, 1);
        if (r < 0)
            return r;
    }
    if (q->raw) {
        struct encode_options options = {.bos = at_start, .cancelled = &j->stop};

        r = tokenizer_encode(tokenizer, q->messages[0].text, q->messages[0].n, &options, &j->ids);
        if (r == 0 && j->ids.n == 0)
            return error_set(err, EBADF, "the prompt is empty");
        /* Raw text has no turns, but what goes on with the user's open one is part of it. */
        if (q->kind != JOB_APPEND || j->position != CHAT_OPEN_USER)
            j->position = CHAT_OPEN_MODEL;
        return r;
    }
    return chat_encode(tokenizer, messages, q->n_messages,
                       &(struct chat_options){.position = j->position,
                                              .generate = q->kind != JOB_APPEND,
                                              .cancelled = &j->stop},
                       &j->ids, &j->position, err);
}

/* ---- the lists ---- */

/* With the mutex held. */
static struct job *take_next(struct lane *l)
{
    struct job *first = l->waiting, *chosen = first, **end = &l->waiting, *others = NULL;
    struct job **others_end = &others;
    uint64_t account;

    if (!first)
        return NULL;
    account = first->prompt.account;
    if (first->prompt.passed < PASSED_MOST)
        for (struct job *j = first; j; j = j->next)
            if (j->prompt.account == account && j->prompt.bytes < chosen->prompt.bytes)
                chosen = j;

    for (struct job *j = l->waiting, *next; j; j = next) {
        next = j->next;
        j->next = NULL;
        if (j == chosen)
            continue;
        if (j->prompt.account == account) {
            j->prompt.passed++;
            *others_end = j;
            others_end = &j->next;
        } else {
            *end = j;
            end = &j->next;
        }
    }
    *end = others;
    chosen->prompt.lane = 0;
    return chosen;
}

static void *lane_run(void *userdata)
{
    struct lane *l = userdata;
    struct prompt_thread *p = l->prompt_thread;

    pthread_setname_np(pthread_self(), l->is_big ? "llmd-prompts" : "llmd-prompt");
    if (l->is_big) /* the thread's own, on Linux; where it is refused nothing is lost */
        (void)setpriority(PRIO_PROCESS, 0, BIG_NICE); /* of this thread */
    pthread_mutex_lock(&p->mutex);
    for (;;) {
        struct job *j = take_next(l);

        if (!j && p->quit)
            break;
        if (!j) {
            pthread_cond_wait(&l->changed, &p->mutex);
            continue;
        }
        pthread_mutex_unlock(&p->mutex);
        if (j->record)
            request_record_set_working(j->record, true);
        j->result = encode(p->model, j, &j->error);
        if (j->record)
            request_record_set_working(j->record, false);
        if (j->result == 0)
            j->n_wanted = j->ids.n - MIN(j->ids.n, (size_t)j->has_tail);
        p->done(j, p->userdata);
        pthread_mutex_lock(&p->mutex);
    }
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

/* ---- from outside ---- */

void prompt_thread_submit(struct prompt_thread *p, struct job *j, uint64_t account)
{
    size_t bytes = text_bytes(&j->request);
    size_t lane = bytes > SMALL_BYTES;
    struct job **end = &p->lanes[lane].waiting;

    pthread_mutex_lock(&p->mutex);
    j->prompt.account = account;
    j->prompt.bytes = bytes;
    j->prompt.passed = 0;
    j->prompt.lane = (int)lane + 1;
    j->next = NULL;
    while (*end)
        end = &(*end)->next;
    *end = j;
    pthread_cond_signal(&p->lanes[lane].changed);
    pthread_mutex_unlock(&p->mutex);
}

bool prompt_thread_withdraw(struct prompt_thread *p, struct job *j)
{
    struct job **link;
    bool waiting;

    pthread_mutex_lock(&p->mutex);
    waiting = j->prompt.lane > 0;
    if (waiting) {
        link = &p->lanes[j->prompt.lane - 1].waiting;
        while (*link != j)
            link = &(*link)->next;
        *link = j->next;
        j->next = NULL;
        j->prompt.lane = 0;
    }
    pthread_mutex_unlock(&p->mutex);
    return waiting;
}

int prompt_thread_new(struct prompt_thread **ret, const struct model *m, prompt_done done,
                      void *userdata, struct error *err)
{
    struct prompt_thread *p = calloc(1, sizeof(*p));
    int r = 0;

    if (!p)
        return error_set(err, ENOMEM, "out of memory");
    p->model = m;
    p->done = done;
    p->userdata = userdata;
    pthread_mutex_init(&p->mutex, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(p->lanes); i++) {
        p->lanes[i].prompt_thread = p;
        p->lanes[i].is_big = i == 1;
        pthread_cond_init(&p->lanes[i].changed, NULL);
    }
    for (size_t i = 0; i < ARRAY_SIZE(p->lanes) && r == 0; i++) {
        r = pthread_create(&p->lanes[i].thread, NULL, lane_run, &p->lanes[i]);
        p->lanes[i].has_thread = r == 0;
    }
    if (r > 0) {
        prompt_thread_free(p);
        return error_set(err, r, "cannot start the prompts' threads: %s", strerror(r));
    }
    *ret = p;
    return 0;
}

struct prompt_thread *prompt_thread_free(struct prompt_thread *p)
{
    if (!p)
        return NULL;
    pthread_mutex_lock(&p->mutex);
    p->quit = true;
    for (size_t i = 0; i < ARRAY_SIZE(p->lanes); i++)
        pthread_cond_signal(&p->lanes[i].changed);
    pthread_mutex_unlock(&p->mutex);
    for (size_t i = 0; i < ARRAY_SIZE(p->lanes); i++) {
        if (p->lanes[i].has_thread)
            pthread_join(p->lanes[i].thread, NULL);
        pthread_cond_destroy(&p->lanes[i].changed);
    }
    pthread_mutex_destroy(&p->mutex);
    free(p);
    return NULL;
}
