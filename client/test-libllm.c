/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Every function's success and errors, against a daemon that answers as it is told, peer to peer
 * and on a bus of the test's own; streams against bytes written here. What needs root (other users'
 * sockets) or dbus-daemon is left out without, and the last line says so.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/failing-allocations.h"
#include "client/fake-daemon.h"
#include "client/llm.h"
#include "ipc/names.h"
#include "ipc/record.h"

#define SESSION "/org/llmd/Llm1/session/"
#define NOBODY 65534
#define PATIENCE_MS 120000 /* until a wait for an event gives up; decides nothing else */

static char folder[] = "/tmp/test-libllm-XXXXXX";
static char left_out[256];

static const char *in_folder(const char *name)
{
    static char path[128];

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

/* ---- time that passes at once ---- */

int __wrap_nanosleep(const struct timespec *t, struct timespec *left);

int __wrap_nanosleep(const struct timespec *t, struct timespec *left)
{
    (void)t;
    (void)left;
    return 0;
}

/* ---- streams ---- */

/* A stream of what is in text, and then its end. */
static struct llm_stream *stream_of(const char *text, size_t n)
{
    struct llm_stream *s;
    int ends[2];

    assert(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    assert(write(ends[1], text, n) == (ssize_t)n);
    close(ends[1]);
    assert(llm_stream_new(&s, ends[0]) == 0);
    assert(llm_stream_fd(s) == ends[0]);
    return s;
}

static const char whole[] =
    "{\"type\":\"queued\",\"position\":2,\"estimated_usec\":1500000}\n"
    "{\"type\":\"of a later version\",\"x\":1}\n"
    "{\"type\":\"progress\",\"done\":512,\"total\":4000}\n"
    "{\"type\":\"delta\",\"text\":\"He\\u0000l\"}\n"
    "{\"type\":\"delta\",\"text\":\"lo\",\"id\":5,\"logprob\":-0.5,\"entropy\":1.5,"
    "\"top\":[{\"id\":5,\"logprob\":-0.5,\"text\":\"lo\"},"
    "{\"id\":6,\"logprob\":null,\"text\":\"\\u0000\"}]}\n"
    "{\"type\":\"usage\",\"prompt_tokens\":3,\"completion_tokens\":4,\"cached_tokens\":5}\n"
    "{\"type\":\"end\",\"reason\":\"stop\"}\n";

static void read_whole(struct llm_stream *s)
{
    struct llm_event e;

    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_QUEUED);
    assert(e.position == 2 && e.estimated_usec == 1500000);
    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_PROGRESS);
    assert(e.done == 512 && e.total == 4000 && e.position == 0);
    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_DELTA);
    assert(e.n_text == 4 && memcmp(e.text, "He\0l", 4) == 0 && !e.has_token);
    assert(e.n_top == 0);
    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_DELTA);
    assert(e.n_text == 2 && e.has_token && e.id == 5 && e.logprob == -0.5 && e.entropy == 1.5);
    assert(e.n_top == 2 && e.top[0].id == 5 && e.top[0].logprob == -0.5);
    assert(e.top[0].n_text == 2 && memcmp(e.top[0].text, "lo", 2) == 0);
    assert(e.top[1].id == 6 && isnan(e.top[1].logprob));
    assert(e.top[1].n_text == 1 && e.top[1].text[0] == 0);
    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_USAGE);
    assert(e.prompt_tokens == 3 && e.completion_tokens == 4 && e.cached_tokens == 5);
    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_END && strcmp(e.reason, "stop") == 0);
    for (size_t i = 0; i < ARRAY_SIZE(e.reserved); i++)
        assert(e.reserved[i] == 0);
    assert(llm_stream_next(s, &e) == 0 && llm_stream_next(s, &e) == 0);
}

struct tapped {
    char text[sizeof(whole)];
    size_t n;
    int answer;
};

static int tap(const void *data, size_t n, void *userdata)
{
    struct tapped *t = userdata;

    assert(t->n + n <= sizeof(t->text));
    memcpy(t->text + t->n, data, n);
    t->n += n;
    return t->answer;
}

static void test_stream(void)
{
    static const char error[] =
        "{\"type\":\"error\",\"name\":\"" LLM_ERROR_PREFIX "ContextFull\",\"message\":\"too "
        "much\",\"requested\":9000,\"available\":4096}\n";
    static const char plain_error[] =
        "{\"type\":\"error\",\"name\":\"x\",\"message\":\"y\"}\n{\"type\":\"end\"";
    struct tapped tapped = {0};
    struct llm_stream *s;
    struct llm_event e;

    s = stream_of(whole, sizeof(whole) - 1);
    llm_stream_tap(s, tap, &tapped);
    read_whole(s);
    assert(tapped.n == sizeof(whole) - 1 && memcmp(tapped.text, whole, tapped.n) == 0);
    llm_stream_free(s);

    s = stream_of(error, sizeof(error) - 1);
    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_ERROR);
    assert(strcmp(e.name, LLM_ERROR_PREFIX "ContextFull") == 0);
    assert(strcmp(e.message, "too much") == 0);
    assert(e.has_sizes && e.requested == 9000 && e.available == 4096);
    assert(llm_stream_next(s, &e) == 0);
    llm_stream_free(s);

    /* What follows the last record is nobody's business. */
    s = stream_of(plain_error, sizeof(plain_error) - 1);
    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_ERROR && !e.has_sizes);
    assert(llm_stream_next(s, &e) == 0);
    llm_stream_free(s);

    /* Cut between two bytes, wherever: what came before is given out, then -EPIPE, again and
     * again. */
    for (size_t n = 0; n + 1 < sizeof(whole) - 1; n++) {
        int r;

        s = stream_of(whole, n);
        while ((r = llm_stream_next(s, &e)) == 1)
            assert(e.type != LLM_END);
        assert(r == -EPIPE && llm_stream_next(s, &e) == -EPIPE);
        llm_stream_free(s);
    }

    s = stream_of("{\"type\":5}\n", 11);
    assert(llm_stream_next(s, &e) == -EBADMSG);
    llm_stream_free(s);

    tapped = (struct tapped){.answer = -ENOSPC};
    s = stream_of(whole, sizeof(whole) - 1);
    llm_stream_tap(s, tap, &tapped);
    assert(llm_stream_next(s, &e) == -ENOSPC);
    llm_stream_free(s);

    assert(llm_stream_new(&s, open("/", O_RDONLY | O_CLOEXEC)) == 0);
    assert(llm_stream_next(s, &e) == -EISDIR);
    llm_stream_free(s);
    llm_stream_free(NULL);
}

/* Bytes come one at a time, and the descriptor does not block. */
static void test_stream_in_pieces(void)
{
    struct llm_stream *s;
    struct llm_event e;
    size_t events = 0;
    int ends[2];

    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0);
    assert(llm_stream_new(&s, ends[0]) == 0);
    for (size_t i = 0; i < sizeof(whole) - 1; i++) {
        int r = llm_stream_next(s, &e);

        if (r == 1)
            events++;
        else
            assert(r == -EAGAIN);
        assert(r != 1 || llm_stream_next(s, &e) == -EAGAIN);
        assert(write(ends[1], &whole[i], 1) == 1);
    }
    assert(llm_stream_next(s, &e) == 1 && e.type == LLM_END && events == 5);
    llm_stream_free(s);
    close(ends[1]);
}

struct sender {
    pthread_t to;
    int stop; /* atomically */
};

static void *send_signals(void *userdata)
{
    struct sender *s = userdata;

    while (!__atomic_load_n(&s->stop, __ATOMIC_ACQUIRE)) {
        pthread_kill(s->to, SIGUSR1);
        sched_yield();
    }
    return NULL;
}

static void on_signal(int number)
{
    (void)number;
}

static void test_stream_interrupted(void)
{
    struct sigaction action = {.sa_handler = on_signal}; /* without SA_RESTART */
    struct sender sender = {.to = pthread_self()};
    struct llm_stream *s;
    struct llm_event e;
    pthread_t thread;
    int ends[2];

    assert(sigaction(SIGUSR1, &action, NULL) == 0);
    assert(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    assert(llm_stream_new(&s, ends[0]) == 0);
    assert(pthread_create(&thread, NULL, send_signals, &sender) == 0);
    assert(llm_stream_next(s, &e) == -EINTR);
    __atomic_store_n(&sender.stop, 1, __ATOMIC_RELEASE);
    assert(pthread_join(thread, NULL) == 0);
    assert(write(ends[1], whole, sizeof(whole) - 1) == sizeof(whole) - 1);
    read_whole(s); /* and nothing was lost */
    llm_stream_free(s);
    close(ends[1]);
}

/* ---- errors ---- */

static void test_error_numbers(void)
{
    assert(llm_error_number(LLM_ERROR_PREFIX "Busy") == EBUSY);
    assert(llm_error_number(LLM_ERROR_PREFIX "ContextFull") == EMSGSIZE);
    assert(llm_error_number("com.example.Odd") == EIO && llm_error_number("") == EIO);
}

/* ---- calls ---- */

struct context {
    struct fake_daemon *fake;
    struct llm_connection *c;
    struct llm_session *s;
    struct llm_options *o;
};

/* The options that every call with options gets, as the fake daemon shows them. */
#define OPTIONS                                                                              \
    "[s=prompt,s=why?,s=temperature,d=0.5,s=max-tokens,u=7,s=seed,t=18446744073709551615,"   \
    "s=raw,b=1,s=session,o=/a/b,s=stop,[s=x,s=y],s=messages,[(s=user,s=hi),(s=model,s=ho)]," \
    "s=logit-bias,[u=3,d=-1.5,u=4,d=2],s=prompt-fd,h=in a file,s=linger,b=0]"

static int make_options(struct llm_options **ret)
{
    struct llm_options *o = NULL;
    int r;

    if ((r = llm_options_new(&o)) < 0)
        return r;
    if ((r = llm_options_set_string(o, "prompt", "why?")) < 0 ||
        (r = llm_options_set_double(o, "temperature", 0.5)) < 0 ||
        (r = llm_options_set_uint32(o, "max-tokens", 7)) < 0 ||
        (r = llm_options_set_uint64(o, "seed", UINT64_MAX)) < 0 ||
        (r = llm_options_set_bool(o, "raw", true)) < 0 ||
        (r = llm_options_set_object(o, "session", "/a/b")) < 0 ||
        (r = llm_options_add_string(o, "stop", "x")) < 0 ||
        (r = llm_options_add_message(o, "user", "hi")) < 0 ||
        (r = llm_options_add_string(o, "stop", "y")) < 0 ||
        (r = llm_options_add_message(o, "model", "ho")) < 0 ||
        (r = llm_options_add_logit_bias(o, 3, -1.5)) < 0 ||
        (r = llm_options_add_logit_bias(o, 4, 2)) < 0 ||
        (r = llm_options_set_memory(o, "prompt-fd", "in a file", 9)) < 0 ||
        (r = llm_options_set_bool(o, "linger", false)) < 0) {
        llm_options_free(o);
        return r;
    }
    *ret = o;
    return 0;
}

static int call_status(struct context *x, struct llm_error *err)
{
    struct llm_status s;
    int r = llm_get_status(x->c, &s, err);

    if (r == 0) {
        assert(strcmp(s.version, "9.9") == 0 && strcmp(s.state, "loading") == 0);
        assert(strcmp(s.model, "small") == 0 && strcmp(s.backend, "cpu") == 0);
        assert(strlen(s.default_model) == sizeof(s.default_model) - 1);
        assert(s.load_progress == 0.25 && s.sessions == 3);
        assert(s.kv_bytes_used == UINT64_C(1) << 33 && s.kv_bytes_max == UINT64_C(1) << 34);
    }
    return r;
}

static int call_new(struct context *x, struct llm_error *err)
{
    struct llm_session *s;
    int r = llm_session_new(&s, x->c, x->o, err);

    if (r == 0) {
        assert(strcmp(llm_session_path(s), SESSION "7") == 0);
        llm_session_free(s);
    }
    return r;
}

static int call_open(struct context *x, struct llm_error *err)
{
    struct llm_session *s;
    int r = llm_session_open(&s, x->c, "12", err);

    if (r == 0) {
        assert(strcmp(llm_session_path(s), SESSION "12") == 0);
        llm_session_free(s);
    }
    return r;
}

static int call_fork(struct context *x, struct llm_error *err)
{
    struct llm_session *s;
    int r = llm_session_fork(&s, x->s, x->o, err);

    if (r == 0) {
        assert(strcmp(llm_session_path(s), SESSION "8") == 0);
        llm_session_free(s);
    }
    return r;
}

static int call_generate(struct context *x, struct llm_error *err)
{
    uint64_t request = 0;
    int fd, r = llm_session_generate(x->s, x->o, &fd, &request, err);

    if (r == 0) {
        assert(request == UINT64_C(1) << 40 && (fcntl(fd, F_GETFD) & FD_CLOEXEC));
        close(fd);
    }
    return r;
}

static int call_append(struct context *x, struct llm_error *err)
{
    int fd, r = llm_session_append(x->s, x->o, &fd, NULL, err);

    if (r == 0)
        close(fd);
    return r;
}

static int call_run(struct context *x, struct llm_error *err)
{
    return llm_session_run(x->s, x->o, NULL, NULL, err);
}

static int call_measure(struct context *x, struct llm_error *err)
{
    uint32_t n = 0;
    int r = llm_measure(x->c, x->o, &n, err);

    assert(r < 0 || n == 42);
    return r;
}

static int call_cancel(struct context *x, struct llm_error *err)
{
    return llm_session_cancel(x->s, err);
}

static int call_rewind(struct context *x, struct llm_error *err)
{
    return llm_session_rewind(x->s, 5, err);
}

static int call_save(struct context *x, struct llm_error *err)
{
    CLEANUP(closep) int fd = memfd_create("saved", MFD_CLOEXEC);

    assert(fd >= 0 && write(fd, "bytes", 5) == 5);
    return llm_session_save(x->s, fd, err);
}

static int call_restore(struct context *x, struct llm_error *err)
{
    CLEANUP(closep) int fd = memfd_create("saved", MFD_CLOEXEC);

    assert(fd >= 0 && write(fd, "bytes", 5) == 5);
    return llm_session_restore(x->s, fd, err);
}

static int call_close(struct context *x, struct llm_error *err)
{
    return llm_session_close(x->s, err);
}

/* close is the last: the session is then closed. */
static const struct {
    int (*call)(struct context *x, struct llm_error *err);
    const char *seen; /* NULL: that of the call it ends with */
    bool answers;
} calls[] = {
    {call_status, "GetAll /org/llmd/Llm1 s=org.llmd.Llm1.Manager", true},
    {call_new, NULL, true}, /* closed again */
    {call_open, "Get " SESSION "12 s=org.llmd.Llm1.Session,s=State", false},
    {call_fork, NULL, true},
    {call_generate, "Generate " SESSION "7 " OPTIONS, true},
    {call_append, "Append " SESSION "7 " OPTIONS, true},
    {call_run, "Generate " SESSION "7 " OPTIONS, true},
    {call_measure, "Measure /org/llmd/Llm1 " OPTIONS, true},
    {call_cancel, "Cancel " SESSION "7 ", false},
    {call_rewind, "Rewind " SESSION "7 u=5", false},
    {call_save, "Save " SESSION "7 h=bytes", false},
    {call_restore, "Restore " SESSION "7 h=bytes", false},
    {call_close, "Close " SESSION "7 ", false},
};

/* What the daemon saw last, once it has taken all that was sent. It takes messages in turn, and
 * Ping is not noted. */
static const char *last_seen(struct context *x)
{
    static char seen[4096];

    assert(sd_bus_call_method(llm_connection_bus(x->c), llm_connection_destination(x->c),
                              LLM_ROOT_PATH, "org.freedesktop.DBus.Peer", "Ping", NULL, NULL,
                              NULL) >= 0);
    fake_daemon_seen(x->fake, seen, sizeof(seen));
    return seen;
}

static void test_calls(struct context *x)
{
    struct llm_error err;
    const char *seen;

    for (size_t i = 0; i < ARRAY_SIZE(calls); i++) {
        static const struct {
            enum fake_answer answer;
            int error;
            const char *name, *message;
        } failures[] = {
            {FAKE_ERROR, -EBUSY, LLM_ERROR_PREFIX "Busy", "a request runs"},
            {FAKE_FOREIGN_ERROR, -EIO, "com.example.Odd", "odd"},
            {FAKE_WRONG, -EBADMSG, "", "llmd's answer cannot be read: is it of another version?"},
            {FAKE_EMPTY, -EBADMSG, "", "llmd's answer cannot be read: is it of another version?"},
            {FAKE_NONE, -ETIMEDOUT, "", "llmd did not answer in time"},
        };

        for (size_t k = 0; k < ARRAY_SIZE(failures); k++) {
            if (failures[k].error == -EBADMSG && !calls[i].answers)
                continue;
            if (failures[k].answer == FAKE_NONE)
                sd_bus_set_method_call_timeout(llm_connection_bus(x->c), 1000);
            fake_daemon_set(x->fake, failures[k].answer);
            memset(&err, 'x', sizeof(err));
            assert(calls[i].call(x, &err) == failures[k].error);
            assert(strcmp(err.name, failures[k].name) == 0);
            assert(strcmp(err.message, failures[k].message) == 0);
            assert(calls[i].call(x, NULL) == failures[k].error);
            sd_bus_set_method_call_timeout(llm_connection_bus(x->c), 0);
        }

        fake_daemon_set(x->fake, FAKE_RIGHT);
        assert(calls[i].call(x, &err) == 0);
        seen = last_seen(x);
        if (calls[i].seen && strcmp(seen, calls[i].seen) != 0) {
            fprintf(stderr, "seen   %s\nwanted %s\n", seen, calls[i].seen);
            abort();
        }
    }
}

/* Which sessions are closed when their structs are freed. */
static void test_closing(struct context *x)
{
    struct llm_options *lingering;
    struct llm_session *s;

    assert(llm_options_new(&lingering) == 0);
    assert(llm_options_set_bool(lingering, "linger", true) == 0);

    assert(llm_session_new(&s, x->c, NULL, NULL) == 0);
    assert(strcmp(last_seen(x), "CreateSession /org/llmd/Llm1 []") == 0);
    llm_session_free(s);
    assert(strcmp(last_seen(x), "Close " SESSION "7 ") == 0);
    assert(llm_session_fork(&s, x->s, x->o, NULL) == 0); /* their linger is false */
    llm_session_free(s);
    assert(strcmp(last_seen(x), "Close " SESSION "8 ") == 0);

    assert(llm_session_new(&s, x->c, lingering, NULL) == 0);
    assert(strcmp(last_seen(x), "CreateSession /org/llmd/Llm1 [s=linger,b=1]") == 0);
    llm_session_free(s);
    assert(strcmp(last_seen(x), "") == 0);
    assert(llm_session_fork(&s, x->s, lingering, NULL) == 0);
    assert(strcmp(last_seen(x), "Fork " SESSION "7 [s=linger,b=1]") == 0);
    llm_session_free(s);
    assert(strcmp(last_seen(x), "") == 0);
    assert(llm_session_open(&s, x->c, SESSION "9", NULL) == 0);
    assert(strncmp(last_seen(x), "Get " SESSION "9", 5) == 0);
    llm_session_free(s);
    assert(strcmp(last_seen(x), "") == 0);
    assert(llm_session_new(&s, x->c, NULL, NULL) == 0 && llm_session_close(s, NULL) == 0);
    assert(strcmp(last_seen(x), "Close " SESSION "7 ") == 0);
    llm_session_free(s); /* is not closed again */
    assert(strcmp(last_seen(x), "") == 0);

    llm_options_free(lingering);
    llm_session_free(NULL);
}

static void test_session_names(struct context *x)
{
    static const char *const wrong[] = {
        "",
        "x",
        "7x",
        "-1",
        "../7",
        "/7",
        SESSION,
        SESSION "7/8",
        "/org/x/7",
        "123456789012345678901",
        " 7",
        SESSION "a",
        "/org/llmd/Llm1/model/7",
    };
    struct llm_session *s = NULL;
    struct llm_error err;

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        assert(llm_session_open(&s, x->c, wrong[i], &err) == -EINVAL);
        assert(strstr(err.message, "is not a session") && !s);
    }
}

static void test_bad_text(struct context *x)
{
    struct llm_options *o;
    struct llm_error err;
    uint32_t n;

    assert(llm_options_new(&o) == 0 && llm_options_set_string(o, "prompt", "\xff") == 0);
    assert(llm_measure(x->c, o, &n, &err) == -EINVAL && strstr(err.message, "UTF-8"));
    llm_options_free(o);
    assert(llm_options_new(&o) == 0 && llm_options_set_object(o, "session", "no path") == 0);
    assert(llm_measure(x->c, o, &n, &err) == -EINVAL && strstr(err.message, "object path"));
    llm_options_free(o);
    llm_options_free(NULL);
}

struct events {
    int n, stop_at, stop_with;
};

static int on_event(const struct llm_event *e, void *userdata)
{
    struct events *events = userdata;

    (void)e;
    return ++events->n == events->stop_at ? events->stop_with : 0;
}

static void test_run(struct context *x)
{
    struct events events = {0};
    struct llm_error err;
    struct pollfd p;

    fake_daemon_set(x->fake, FAKE_RIGHT);
    fake_daemon_set_stream(x->fake, whole);
    assert(llm_session_run(x->s, NULL, on_event, &events, &err) == 0 && events.n == 6);

    /* Stopped by the callback: the stream is closed, which the daemon takes for a cancellation. */
    events = (struct events){.stop_at = 2, .stop_with = -ECANCELED};
    assert(llm_session_run(x->s, NULL, on_event, &events, &err) == -ECANCELED && events.n == 2);
    assert(strcmp(err.message, "stopped by the caller") == 0 && err.name[0] == 0);
    p = (struct pollfd){.fd = fake_daemon_take_stream(x->fake), .events = POLLIN};
    assert(poll(&p, 1, PATIENCE_MS) == 1 && (p.revents & POLLHUP));
    close(p.fd);

    fake_daemon_set_stream(x->fake, "{\"type\":\"delta\",\"text\":\"x\"}\n{\"type\":\"error\","
                                    "\"name\":\"" LLM_ERROR_PREFIX "ContextFull\","
                                    "\"message\":\"too much\"}\n");
    events = (struct events){0};
    assert(llm_session_run(x->s, NULL, on_event, &events, &err) == -EMSGSIZE && events.n == 2);
    assert(strcmp(err.name, LLM_ERROR_PREFIX "ContextFull") == 0);
    assert(strcmp(err.message, "too much") == 0);
    assert(llm_session_run(x->s, NULL, NULL, NULL, NULL) == -EMSGSIZE);

    fake_daemon_set_stream(x->fake, "{\"type\":\"delta\",\"text\":\"x\"}\n{\"type\"");
    assert(llm_session_run(x->s, NULL, on_event, &events, &err) == -EPIPE);
    assert(strcmp(err.message, "llmd went away before the answer's end") == 0);

    fake_daemon_set_stream(x->fake, "rubbish\n");
    assert(llm_session_run(x->s, NULL, on_event, &events, &err) == -EBADMSG);
    fake_daemon_set_stream(x->fake, whole);
}

/* Each allocation fails once. How many there are is found out on the way. */
static void test_allocations(struct context *x)
{
#ifdef ALLOCATIONS_ARE_BOUND
    (void)x;
    if (!strstr(left_out, "allocations"))
        strcat(left_out, " failing allocations (link-time optimisation)");
#else
    int most = 0;

    fake_daemon_set(x->fake, FAKE_RIGHT);
    for (int n = 0, r = -ENOMEM; r != 0; n++) {
        struct llm_options *o;

        allocations_left = n;
        r = make_options(&o);
        allocations_left = -1;
        assert(r == 0 || r == -ENOMEM);
        if (r == 0)
            llm_options_free(o);
        most = n;
    }
    assert(most > 30);
    for (size_t i = 0; i + 1 < ARRAY_SIZE(calls); i++) {
        for (int n = 0, r = -ENOMEM; r != 0; n++) {
            struct llm_error err;

            allocations_left = n;
            r = calls[i].call(x, &err);
            allocations_left = -1;
            assert(r == 0 || (r == -ENOMEM && strstr(err.message, "memory")));
        }
    }
#endif
}

/* All of it, on a connection that was just made; stops the daemon. */
static void test_connection(struct llm_connection *c, struct fake_daemon *fake)
{
    struct context x = {.fake = fake, .c = c};
    struct llm_error err;
    struct llm_session *other;

    fake_daemon_set_stream(fake, whole);
    assert(make_options(&x.o) == 0);
    assert(llm_session_new(&x.s, c, NULL, &err) == 0);
    test_run(&x);
    test_session_names(&x);
    test_bad_text(&x);
    test_closing(&x);
    test_allocations(&x);
    assert(llm_session_new(&other, c, NULL, &err) == 0);
    test_calls(&x);

    /* Gone, in the middle of a call and before one. */
    fake_daemon_set(fake, FAKE_HANGUP);
    assert(call_measure(&x, &err) == -ENOTCONN && strcmp(err.message, "llmd has gone away") == 0);
    assert(err.name[0] == 0);
    for (size_t i = 0; i < ARRAY_SIZE(calls); i++) {
        assert(calls[i].call(&x, &err) == -ENOTCONN);
        assert(strcmp(err.message, "llmd has gone away") == 0 && err.name[0] == 0);
    }
    fake_daemon_stop(fake);
    llm_options_free(x.o);
    llm_session_free(x.s);
    llm_disconnect(c);
    llm_session_free(other); /* may outlive its connection */
    llm_disconnect(NULL);
}

static void test_peer_to_peer(void)
{
    struct fake_daemon *fake = fake_daemon_listen(in_folder("socket"));
    struct llm_connection *c;
    struct llm_error err;

    assert(llm_connect(&c, in_folder("socket"), &err) == 0);
    assert(llm_connection_scope(c) == LLM_SCOPE_ANY && !llm_connection_destination(c));
    test_connection(c, fake);
}

/* ---- where daemons are looked for ---- */

static void test_no_daemon(void)
{
    struct llm_connection *c = NULL;
    CLEANUP(freep) char *path = NULL;
    struct fake_daemon *fake;
    struct llm_error err;
    char longest[200];
    int fd;

    memset(longest, 'x', sizeof(longest) - 1);
    longest[sizeof(longest) - 1] = 0;
    assert(llm_connect(&c, longest, &err) == -ENAMETOOLONG);
    assert(llm_connect(&c, in_folder("absent"), &err) == -ENOENT);
    assert(strstr(err.message, "absent: No such file"));
    fd = open(in_folder("file"), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    assert(fd >= 0);
    close(fd);
    assert(llm_connect(&c, in_folder("file"), &err) == -ENOTSOCK);
    assert(strstr(err.message, "is not a socket"));
    assert(llm_connect_scope(&c, (enum llm_scope)77, &err) == -EINVAL);

    /* One that leaves, or will have no more clients. */
    fake = fake_daemon_listen(in_folder("leaving"));
    fake_daemon_set(fake, FAKE_HANGUP);
    assert(llm_connect(&c, in_folder("leaving"), &err) == -ECONNRESET);
    fake_daemon_stop(fake);
    assert(llm_connect(&c, in_folder("leaving"), NULL) == -ECONNREFUSED);

    assert(llm_default_socket(&path, &err) == 0);
    assert(strcmp(path, in_folder("run/llmd/private.sock")) == 0);
    assert(llm_connect_scope(&c, LLM_SCOPE_PRIVATE, &err) == -ENOENT);
    assert(llm_connect(&c, NULL, &err) == -ENOENT && strstr(err.message, path));
    assert(llm_connect_scope(&c, LLM_SCOPE_USER, &err) == -ENOENT);
    assert(strstr(err.message, "run/llmd/llmd.socket") && strstr(err.message, "no session bus"));
    assert(!c);
}

static void expect_scope(enum llm_scope asked, enum llm_scope got, const char *destination)
{
    struct llm_connection *c;
    struct llm_error err;
    int r = llm_connect_scope(&c, asked, &err);

    if (r < 0) {
        fprintf(stderr, "scope %d: %s\n", (int)asked, err.message);
        abort();
    }
    assert(llm_connection_scope(c) == got);
    if (destination)
        assert(strcmp(llm_connection_destination(c), destination) == 0);
    else
        assert(!llm_connection_destination(c));
    llm_disconnect(c);
}

static void test_user_scopes(void)
{
    struct fake_daemon *fake;
    struct llm_connection *c;
    struct llm_error err;

    fake = fake_daemon_listen(in_folder("run/llmd/private.sock"));
    expect_scope(LLM_SCOPE_PRIVATE, LLM_SCOPE_PRIVATE, NULL);
    fake_daemon_stop(fake);
    fake = fake_daemon_listen(in_folder("run/llmd/llmd.socket"));
    expect_scope(LLM_SCOPE_USER, LLM_SCOPE_USER, NULL);
    fake_daemon_stop(fake);

    /* Whoever could write there could answer for us. */
    assert(chmod(in_folder("run/llmd"), 0777) == 0);
    assert(llm_connect_scope(&c, LLM_SCOPE_PRIVATE, &err) == -EPERM);
    assert(llm_connect_scope(&c, LLM_SCOPE_USER, &err) == -EPERM);
    assert(strstr(err.message, "is open to other users"));
    assert(chmod(in_folder("run/llmd"), 0700) == 0);
}

/* ---- other users' sockets ---- */

/* A daemon in a process of its own, as that user. */
static pid_t start_as(uid_t uid, const char *path)
{
    int ready[2];
    char byte;
    pid_t pid;

    assert(pipe2(ready, O_CLOEXEC) == 0);
    pid = fork();
    assert(pid >= 0);
    if (pid == 0) {
        assert(setresuid(uid, uid, uid) == 0);
        fake_daemon_listen(path);
        assert(write(ready[1], "", 1) == 1);
        for (;;)
            pause();
    }
    close(ready[1]);
    assert(read(ready[0], &byte, 1) == 1);
    close(ready[0]);
    return pid;
}

static void end(pid_t pid)
{
    assert(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
}

/* In a mount namespace, where /run is ours. */
static void other_users(void)
{
    struct llm_connection *c;
    struct llm_error err;
    pid_t pid;

    /* The system's: of root, or of whom root gave /run/llmd. */
    assert(mkdir("/run/llmd", 0755) == 0 && chmod("/run/llmd", 0777) == 0);
    pid = start_as(NOBODY, "/run/llmd/llmd.socket");
    assert(llm_connect_scope(&c, LLM_SCOPE_SYSTEM, &err) == -EPERM);
    assert(strstr(err.message, "neither you nor root"));
    assert(llm_connect(&c, "/run/llmd/llmd.socket", NULL) == -EPERM);
    assert(llm_connect_scope(&c, LLM_SCOPE_ANY, &err) == -EPERM); /* worth more than "nobody" */
    assert(chown("/run/llmd", NOBODY, 0) == 0);
    expect_scope(LLM_SCOPE_SYSTEM, LLM_SCOPE_SYSTEM, NULL);
    expect_scope(LLM_SCOPE_ANY, LLM_SCOPE_SYSTEM, NULL);
    assert(llm_connect(&c, "/run/llmd/llmd.socket", &err) == 0);
    llm_disconnect(c);
    end(pid);
    assert(llm_connect_scope(&c, LLM_SCOPE_SYSTEM, &err) == -ENOENT);
    assert(strstr(err.message, "/run/llmd/llmd.socket: Connection refused; no system bus"));

    /* Anywhere else that owner means nothing. */
    assert(chmod(folder, 0777) == 0);
    pid = start_as(NOBODY, in_folder("foreign"));
    assert(llm_connect(&c, in_folder("foreign"), &err) == -EPERM);
    end(pid);

    /* Others trust root's. */
    pid = start_as(0, in_folder("root's"));
    assert(chmod(in_folder("root's"), 0777) == 0);
    assert(setresuid(NOBODY, NOBODY, NOBODY) == 0);
    assert(llm_connect(&c, in_folder("root's"), &err) == 0);
    llm_disconnect(c);
    _exit(pid > 0 ? 0 : 1); /* the caller ends what is left */
}

static void test_other_users(void)
{
    int status;
    pid_t pid;

    pid = fork();
    assert(pid >= 0);
    if (pid == 0) {
        setpgid(0, 0);
        if (geteuid() != 0 || unshare(CLONE_NEWNS) < 0 ||
            mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
            mount("none", "/run", "tmpfs", 0, "mode=755") < 0)
            _exit(77);
        other_users();
    }
    assert(waitpid(pid, &status, 0) == pid);
    kill(-pid, SIGKILL);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        strcat(left_out, " other users' sockets (needs root)");
    else
        assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* ---- on a bus ---- */

static void test_bus(void)
{
    struct fake_daemon *fake;
    struct llm_connection *c;
    struct llm_session *s;
    struct llm_error err;
    char address[256];
    pid_t bus = fake_bus_start(folder, address, sizeof(address));

    if (bus == 0) {
        strcat(left_out, " the bus (no dbus-daemon)");
        return;
    }
    setenv("DBUS_SESSION_BUS_ADDRESS", address, 1);
    assert(llm_connect_scope(&c, LLM_SCOPE_USER, &err) == -ENOENT);
    assert(strstr(err.message, "nobody is org.llmd.Llm1 on the session bus"));

    fake = fake_daemon_on_bus(address);
    expect_scope(LLM_SCOPE_USER, LLM_SCOPE_USER, LLM_BUS_NAME);
    assert(llm_connect_scope(&c, LLM_SCOPE_USER, &err) == 0);
    test_connection(c, fake); /* ends it */

    fake = fake_daemon_on_bus(address);
    setenv("DBUS_SYSTEM_BUS_ADDRESS", address, 1);
    if (access("/run/llmd/llmd.socket", F_OK) < 0)
        expect_scope(LLM_SCOPE_SYSTEM, LLM_SCOPE_SYSTEM, LLM_BUS_NAME);
    fake_daemon_stop(fake);
    setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent", 1);

    /* The bus itself goes. */
    fake = fake_daemon_on_bus(address);
    assert(llm_connect_scope(&c, LLM_SCOPE_USER, &err) == 0);
    fake_daemon_stop(fake);
    end(bus);
    assert(llm_session_new(&s, c, NULL, &err) == -ENOTCONN);
    llm_disconnect(c);
    assert(llm_connect_scope(&c, LLM_SCOPE_USER, &err) == -ENOENT);
    assert(strstr(err.message, "no session bus"));
}

/* A child cannot go on with its parent's connection, and is told. */
static void test_fork(void)
{
    struct fake_daemon *fake = fake_daemon_listen(in_folder("socket"));
    struct llm_connection *c;
    struct llm_error err;
    uint32_t n;
    int status;
    pid_t pid;

    assert(llm_connect(&c, in_folder("socket"), &err) == 0);
    pid = fork();
    assert(pid >= 0);
    if (pid == 0)
        _exit(llm_measure(c, NULL, &n, &err) == -ECHILD && strstr(err.message, "fork") ? 0 : 1);
    assert(waitpid(pid, &status, 0) == pid && status == 0);
    assert(llm_measure(c, NULL, &n, &err) == 0);
    llm_disconnect(c);
    fake_daemon_stop(fake);
}

int main(void)
{
    char command[64];

    assert(mkdtemp(folder));
    assert(mkdir(in_folder("run"), 0700) == 0);
    setenv("XDG_RUNTIME_DIR", in_folder("run"), 1);
    setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent", 1);
    setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent", 1);

    test_error_numbers();
    test_stream();
    test_stream_in_pieces();
    test_stream_interrupted();
    test_no_daemon();
    test_user_scopes();
    test_other_users();
    test_peer_to_peer();
    test_bus();
    test_fork();

    snprintf(command, sizeof(command), "rm -rf %s", folder);
    assert(system(command) == 0);
    if (left_out[0])
        printf("left out:%s\n", left_out);
    return 0;
}
