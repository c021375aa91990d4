/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * libllm with the real daemon: what client/test-libllm.c lets a fake one answer, answered.
 *
 *   test-libllm-daemon LLMD MODEL      (one of make-chat-model's: a byte is a token)
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "client/llm.h"

static char folder[] = "/tmp/test-libllm-daemon-XXXXXX";
static char socket_path[128];

static pid_t start(const char *llmd, const char *model)
{
    const char *backend = getenv("LLMD_TEST_BACKEND"), *device = getenv("LLMD_TEST_DEVICE");
    char number[16], answer[16] = "", backend_option[64], device_option[256];
    int ready[2];
    pid_t pid;

    snprintf(backend_option, sizeof(backend_option), "--backend=%s", backend ? backend : "");
    snprintf(device_option, sizeof(device_option), "--device=%s", device ? device : "llvmpipe");
    assert(pipe(ready) == 0);
    pid = fork();
    assert(pid >= 0);
    if (pid == 0) {
        close(ready[0]);
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* else it would outlive a failure */
        snprintf(number, sizeof(number), "%d", ready[1]);
        execl(llmd, llmd, "--private", "--model", model, "--socket", socket_path, "--ready-fd",
              number, "--idle-timeout", "0", backend ? backend_option : NULL, device_option,
              (char *)NULL);
        _exit(127);
    }
    close(ready[1]);
    assert(read(ready[0], answer, sizeof(answer) - 1) == 8 && strcmp(answer, "READY=1\n") == 0);
    close(ready[0]);
    return pid;
}

static void stop(pid_t pid)
{
    int status;

    assert(kill(pid, SIGTERM) == 0 && waitpid(pid, &status, 0) == pid);
    assert(WIFEXITED(status) && WEXITSTATUS(status) == 0); /* sanitizers have their say there */
}

#define OK(call)                                                                        \
    do {                                                                                \
        struct llm_error err;                                                           \
        int r_ = (call);                                                                \
        if (r_ < 0) {                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, err.message); \
            abort();                                                                    \
        }                                                                               \
    } while (0)

/* Raw text, so that tokens can be counted, and always the same answer of n tokens. */
static struct llm_options *prompt(const char *text, uint32_t n)
{
    struct llm_options *o;

    assert(llm_options_new(&o) == 0);
    assert(llm_options_set_string(o, "prompt", text) == 0);
    assert(llm_options_set_bool(o, "raw", true) == 0);
    if (n > 0) {
        assert(llm_options_set_uint32(o, "max-tokens", n) == 0);
        assert(llm_options_set_bool(o, "ignore-end", true) == 0);
        assert(llm_options_set_uint64(o, "seed", 7) == 0);
    }
    return o;
}

struct answer {
    char text[4096];
    size_t n;
    uint32_t prompt_tokens, completion_tokens, cached_tokens;
    char reason[32];
};

static int take(const struct llm_event *e, void *userdata)
{
    struct answer *a = userdata;

    if (e->type == LLM_DELTA) {
        assert(a->n + e->n_text <= sizeof(a->text));
        memcpy(a->text + a->n, e->text, e->n_text);
        a->n += e->n_text;
    } else if (e->type == LLM_USAGE) {
        a->prompt_tokens = e->prompt_tokens;
        a->completion_tokens = e->completion_tokens;
        a->cached_tokens = e->cached_tokens;
    } else if (e->type == LLM_END) {
        snprintf(a->reason, sizeof(a->reason), "%s", e->reason);
    }
    return 0;
}

static struct answer ask(struct llm_session *s, const char *text, uint32_t n)
{
    struct llm_options *o = prompt(text, n);
    struct answer a = {0};

    OK(llm_session_run(s, o, take, &a, &err));
    llm_options_free(o);
    return a;
}

static bool same(const struct answer *a, const struct answer *b)
{
    return a->n == b->n && memcmp(a->text, b->text, a->n) == 0;
}

static void append(struct llm_session *s, const char *text)
{
    struct llm_options *o = prompt(text, 0);
    struct llm_stream *stream;
    struct answer a = {0};
    struct llm_event e;
    uint64_t request = 0;
    int fd, r;

    OK(llm_session_append(s, o, &fd, &request, &err));
    assert(request > 0 && llm_stream_new(&stream, fd) == 0);
    while ((r = llm_stream_next(stream, &e)) > 0)
        take(&e, &a);
    assert(r == 0 && a.n == 0 && strcmp(a.reason, "appended") == 0);
    llm_stream_free(stream);
    llm_options_free(o);
}

static uint32_t measure(struct llm_connection *c, struct llm_session *s, const char *text)
{
    struct llm_options *o = prompt(text, 0);
    uint32_t n = 0;

    if (s)
        assert(llm_options_set_object(o, "session", llm_session_path(s)) == 0);
    OK(llm_measure(c, o, &n, &err));
    llm_options_free(o);
    return n;
}

/* A conversation goes on the same in copies, after going back, and when it was saved. */
static void test_conversation(struct llm_connection *c)
{
    CLEANUP(closep) int file = memfd_create("saved", MFD_CLOEXEC);
    struct llm_session *s, *fork, *fresh;
    struct answer first, again, forked, restored;
    struct llm_error e;

    assert(file >= 0);
    OK(llm_session_new(&s, c, NULL, &err));
    append(s, "one two ");
    OK(llm_session_fork(&fork, s, NULL, &err));
    assert(strcmp(llm_session_path(fork), llm_session_path(s)) != 0);
    OK(llm_session_save(s, file, &err));

    first = ask(s, "three", 20);
    assert(first.completion_tokens == 20 && first.cached_tokens > 0);
    assert(strcmp(first.reason, "length") == 0);
    forked = ask(fork, "three", 20);
    assert(same(&forked, &first));

    OK(llm_session_rewind(s, first.cached_tokens, &err));
    again = ask(s, "three", 20);
    assert(same(&again, &first) && again.cached_tokens == first.cached_tokens);
    assert(llm_session_rewind(s, 1000000, &e) == -EINVAL);
    assert(strcmp(e.name, "org.llmd.Llm1.Error.InvalidOption") == 0);

    OK(llm_session_new(&fresh, c, NULL, &err));
    assert(lseek(file, 0, SEEK_SET) == 0);
    OK(llm_session_restore(fresh, file, &err));
    restored = ask(fresh, "three", 20);
    assert(same(&restored, &first));
    assert(llm_session_restore(fresh, file, &e) < 0); /* is not empty now */

    llm_session_free(fresh);
    OK(llm_session_close(fork, &err));
    assert(llm_session_cancel(fork, &e) == -ESRCH);
    assert(strcmp(e.name, "org.llmd.Llm1.Error.NoSuchSession") == 0);
    llm_session_free(fork);
    llm_session_free(s);
}

/* Whoever has read a stream's end may go on at once. */
static void test_at_once(struct llm_connection *c)
{
    struct llm_session *s;

    OK(llm_session_new(&s, c, NULL, &err));
    for (int i = 0; i < 200; i++) {
        append(s, "x");
        OK(llm_session_rewind(s, 0, &err));
    }
    llm_session_free(s);
}

static void test_measure(struct llm_connection *c)
{
    struct llm_session *s;
    uint32_t alone = measure(c, NULL, "three");

    OK(llm_session_new(&s, c, NULL, &err));
    assert(measure(c, s, "three") == alone);
    append(s, "one two ");
    assert(measure(c, s, "three") + 1 == alone); /* the beginning is there already */
    assert(measure(c, NULL, "three!") == alone + 1);
    llm_session_free(s);
}

/* One that lingers is found again on another connection; others end with theirs. */
static void test_linger(struct llm_connection *c)
{
    CLEANUP(freep) char *lingering_path = NULL, *path = NULL;
    struct llm_connection *other;
    struct llm_session *s, *opened;
    struct llm_options *linger;
    struct llm_error e;

    assert(llm_options_new(&linger) == 0 && llm_options_set_bool(linger, "linger", true) == 0);
    OK(llm_connect(&other, socket_path, &err));
    OK(llm_session_new(&s, other, linger, &err));
    append(s, "one two ");
    lingering_path = strdup(llm_session_path(s));
    llm_session_free(s);
    OK(llm_session_new(&s, other, NULL, &err));
    path = strdup(llm_session_path(s));
    assert(lingering_path && path);
    llm_disconnect(other);
    llm_session_free(s);

    OK(llm_session_open(&opened, c, lingering_path, &err));
    assert(measure(c, opened, "x") == 1);
    llm_session_free(opened); /* stays */
    OK(llm_session_open(&opened, c, strrchr(lingering_path, '/') + 1, &err));
    OK(llm_session_close(opened, &err));
    llm_session_free(opened);
    assert(llm_session_open(&opened, c, lingering_path, &e) == -ESRCH);
    /* The daemon sees the end of a connection when it does. */
    while (llm_session_open(&opened, c, path, &e) != -ESRCH)
        llm_session_free(opened);
    assert(llm_session_open(&opened, c, "999999", &e) == -ESRCH);
    llm_options_free(linger);
}

static void test_errors(struct llm_connection *c)
{
    char huge[20000];
    struct llm_options *o;
    struct llm_session *s, *none = NULL;
    struct llm_status status;
    struct llm_error e;
    struct answer a = {0};
    int fd;

    do { /* a private daemon is ready before all of the model is in memory */
        OK(llm_get_status(c, &status, &err));
        assert(strcmp(status.state, "ready") == 0);
    } while (status.load_progress < 1);
    assert(strcmp(status.model, "chat") == 0 && status.kv_bytes_max > 0);

    assert(llm_options_new(&o) == 0 && llm_options_set_string(o, "no-such-option", "") == 0);
    assert(llm_session_new(&none, c, o, &e) == -EINVAL && strstr(e.message, "no-such-option"));
    llm_options_free(o);
    assert(llm_options_new(&o) == 0 && llm_options_set_string(o, "model", "other") == 0);
    assert(llm_session_new(&none, c, o, &e) == -ENOENT && !none);
    llm_options_free(o);

    OK(llm_session_new(&s, c, NULL, &err));
    memset(huge, 'x', sizeof(huge) - 1);
    huge[sizeof(huge) - 1] = 0;
    o = prompt(huge, 1);
    assert(llm_session_run(s, o, take, &a, &e) == -EMSGSIZE);
    assert(strcmp(e.name, "org.llmd.Llm1.Error.ContextFull") == 0);
    llm_options_free(o);

    /* More than all buffers hold, and nobody reads it: so it is at work until it is cancelled. */
    o = prompt("x", 8000);
    assert(llm_options_set_uint32(o, "top-logprobs", 64) == 0);
    OK(llm_session_generate(s, o, &fd, NULL, &err));
    assert(llm_session_generate(s, o, &(int){0}, NULL, &e) == -EBUSY);
    assert(llm_session_fork(&none, s, NULL, &e) == -EBUSY && !none);
    assert(llm_session_rewind(s, 0, &e) == -EBUSY);
    OK(llm_session_cancel(s, &err));
    close(fd);
    llm_options_free(o);
    llm_session_free(s);
}

/* Streams are threads' own, whatever their connections do. */
static void *read_stream(void *userdata)
{
    struct llm_stream *stream = userdata;
    struct answer *a = calloc(1, sizeof(*a));
    struct llm_event e;
    int r;

    assert(a);
    while ((r = llm_stream_next(stream, &e)) > 0)
        take(&e, a);
    assert(r == 0);
    return a;
}

static void test_threads(struct llm_connection *c)
{
    struct llm_options *o = prompt("x", 50);
    struct llm_session *s[4];
    struct llm_stream *stream[4];
    pthread_t thread[4];
    struct answer *a[4];
    int fd;

    for (int i = 0; i < 4; i++) {
        OK(llm_session_new(&s[i], c, NULL, &err));
        OK(llm_session_generate(s[i], o, &fd, NULL, &err));
        assert(llm_stream_new(&stream[i], fd) == 0);
        assert(pthread_create(&thread[i], NULL, read_stream, stream[i]) == 0);
    }
    for (int i = 0; i < 4; i++) {
        assert(pthread_join(thread[i], (void **)&a[i]) == 0);
        assert(a[i]->completion_tokens == 50 && same(a[i], a[0]));
        llm_stream_free(stream[i]);
        llm_session_free(s[i]);
    }
    for (int i = 0; i < 4; i++)
        free(a[i]);
    llm_options_free(o);
}

int main(int argc, char **argv)
{
    struct llm_connection *c;
    struct llm_error e;
    struct llm_session *s;
    char command[64];
    pid_t pid;

    assert(argc == 3 && mkdtemp(folder));
    snprintf(socket_path, sizeof(socket_path), "%s/socket", folder);
    pid = start(argv[1], argv[2]);
    OK(llm_connect(&c, socket_path, &err));
    test_errors(c);
    test_conversation(c);
    test_at_once(c);
    test_measure(c);
    test_linger(c);
    test_threads(c);
    OK(llm_session_new(&s, c, NULL, &err));
    stop(pid);
    assert(llm_session_cancel(s, &e) == -ENOTCONN);
    llm_session_free(s);
    llm_disconnect(c);
    snprintf(command, sizeof(command), "rm -rf %s", folder);
    assert(system(command) == 0);
    return 0;
}
