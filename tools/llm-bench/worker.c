/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-bench/worker.h"

#include <errno.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "client/llm.h"

DEFINE_CLEANUP(struct llm_connection *, llm_disconnect)
DEFINE_CLEANUP(struct llm_session *, llm_session_free)
DEFINE_CLEANUP(struct llm_options *, llm_options_free)
DEFINE_CLEANUP(struct llm_stream *, llm_stream_free)

#define STATUS_PAUSE_NSEC 5000000 /* between two calls */
#define WATCH_PAUSE_NSEC 500000   /* of the parent, which only reads memory */

uint64_t worker_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

static void pause_nsec(long n)
{
    nanosleep(&(struct timespec){0, n}, NULL);
}

/* ---- in the worker's process ---- */

static void record(struct worker_log *log, uint64_t at, uint64_t took)
{
    uint64_t n = atomic_load(&log->n_events);

    if (n < WORKER_EVENTS_MAX)
        log->events[n] = (struct worker_event){at, took};
    atomic_store(&log->n_events, n + 1);
}

static int ask_status(const struct worker_task *task, struct worker_log *log,
                      struct llm_connection *c, struct llm_error *err)
{
    struct llm_status status;

    (void)task;
    for (;;) {
        uint64_t at = worker_now();
        int r = llm_get_status(c, &status, err);

        if (r < 0)
            return r;
        record(log, at, worker_now() - at);
        pause_nsec(STATUS_PAUSE_NSEC);
    }
}

/* Greedy, so that nothing but the load differs; with ids, so that each token is a record. */
static int make_options(struct llm_options **ret, const struct worker_task *task)
{
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    CLEANUP(freep) char *text = malloc(2 * (size_t)task->n_words + 1);
    int r;

    if (!text)
        return -ENOMEM;
    for (uint32_t i = 0; i < task->n_words; i++)
        memcpy(text + 2 * (size_t)i, " a", 2);
    text[2 * (size_t)task->n_words] = 0;
    if ((r = llm_options_new(&o)) < 0 || (r = llm_options_set_string(o, "prompt", text)) < 0 ||
        (r = llm_options_set_bool(o, "raw", true)) < 0 ||
        (r = llm_options_set_bool(o, "ignore-end", true)) < 0 ||
        (r = llm_options_set_bool(o, "logprobs", true)) < 0 ||
        (r = llm_options_set_double(o, "temperature", 0)) < 0 ||
        (r = llm_options_set_uint32(o, "max-tokens", task->n_tokens)) < 0)
        return r;
    *ret = TAKE_PTR(o);
    return 0;
}

static int read_answer(struct worker_log *log, int fd, struct llm_error *err)
{
    CLEANUP(llm_stream_freep) struct llm_stream *stream = NULL;
    struct llm_event event;
    uint64_t last = 0;
    int r;

    r = llm_stream_new(&stream, fd);
    while (r >= 0 && (r = llm_stream_next(stream, &event)) > 0) {
        uint64_t at = worker_now();

        switch (event.type) {
        case LLM_DELTA:
            record(log, at, last > 0 ? at - last : 0);
            if (last == 0)
                atomic_store(&log->first_at, at);
            last = at;
            break;
        case LLM_USAGE:
            atomic_store(&log->prompt_tokens, event.prompt_tokens);
            break;
        case LLM_ERROR:
            snprintf(err->message, sizeof(err->message), "%s", event.message);
            return -EIO;
        default:
            break;
        }
    }
    if (r < 0)
        snprintf(err->message, sizeof(err->message), "a stream broke: %s", strerror(-r));
    return r;
}

static int make_requests(const struct worker_task *task, struct worker_log *log,
                         struct llm_connection *c, struct llm_error *err)
{
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    int r;

    r = make_options(&options, task);
    if (r < 0) {
        snprintf(err->message, sizeof(err->message), "out of memory");
        return r;
    }
    do {
        CLEANUP(llm_session_freep) struct llm_session *session = NULL;
        uint64_t request, now;
        int fd;

        r = llm_session_new(&session, c, NULL, err);
        if (r < 0)
            return r;
        atomic_store(&log->first_at, 0);
        now = worker_now();
        atomic_store(&log->started_at, now);
        if (atomic_load(&log->began_at) == 0)
            atomic_store(&log->began_at, now);
        r = llm_session_generate(session, options, &fd, &request, err);
        if (r >= 0)
            r = read_answer(log, fd, err);
    } while (r >= 0 && task->kind == WORKER_REPEAT);
    return r;
}

static int work(const struct worker_task *task, struct worker_log *log)
{
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    struct llm_error err = {.message = ""};
    int r;

    if (task->has_uid &&
        (setgroups(0, NULL) < 0 || setresgid(task->uid, task->uid, task->uid) < 0 ||
         setresuid(task->uid, task->uid, task->uid) < 0)) {
        snprintf(log->message, sizeof(log->message), "cannot become uid %u: %s", task->uid,
                 strerror(errno));
        return EXIT_FAILURE;
    }
    r = llm_connect(&c, task->socket, &err);
    if (r >= 0)
        r = (task->kind == WORKER_STATUS ? ask_status : make_requests)(task, log, c, &err);
    if (r >= 0)
        return EXIT_SUCCESS;
    snprintf(log->message, sizeof(log->message), "%s", err.message[0] ? err.message : strerror(-r));
    return EXIT_FAILURE;
}

/* ---- in the parent's ---- */

int worker_start(struct worker *w, const struct worker_task *task, struct error *err)
{
    pid_t parent = getpid();

    *w = (struct worker){0};
    /* Memory that nobody touched costs nothing. */
    w->log = mmap(NULL, sizeof(*w->log), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (w->log == MAP_FAILED) {
        w->log = NULL;
        return error_set(err, errno, "no memory for a client: %s", strerror(errno));
    }
    w->pid = fork();
    if (w->pid < 0) {
        int code = errno;

        w->pid = 0;
        worker_done(w);
        return error_set(err, code, "cannot start a client: %s", strerror(code));
    }
    if (w->pid == 0) {
        int status;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(EXIT_FAILURE);
        status = work(task, w->log);
        atomic_store(&w->log->failed, status != EXIT_SUCCESS);
        _exit(status);
    }
    return 0;
}

static int failure(struct worker *w, struct error *err)
{
    return error_set(err, EIO, "a client failed: %s",
                     w->log->message[0] ? w->log->message : "it was killed");
}

int worker_wait(struct worker *w, struct error *err)
{
    int status;

    while (waitpid(w->pid, &status, 0) < 0 && errno == EINTR)
        ;
    w->pid = 0;
    return WIFEXITED(status) && WEXITSTATUS(status) == EXIT_SUCCESS ? 0 : failure(w, err);
}

int worker_wait_first(struct worker *w, struct error *err)
{
    while (atomic_load(&w->log->n_events) == 0) {
        int status;

        if (waitpid(w->pid, &status, WNOHANG) == w->pid) {
            w->pid = 0;
            if (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_SUCCESS)
                return 0;
            return failure(w, err);
        }
        pause_nsec(WATCH_PAUSE_NSEC);
    }
    return 0;
}

void worker_done(struct worker *w)
{
    if (w->pid > 0) {
        kill(w->pid, SIGKILL);
        while (waitpid(w->pid, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    if (w->log)
        munmap(w->log, sizeof(*w->log));
    *w = (struct worker){0};
}
