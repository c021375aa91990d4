/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Lets each allocation of the daemon's own code fail once, while a client calls each method: the
 * call is answered, with the error OutOfMemory or as if nothing had been, and the daemon goes on
 * with nothing lost. First the loop thread's allocations, then those of the threads beside it.
 * libsystemd's own are not reached: only what this program links statically is wrapped.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "ipc/names.h"
#include "tests/in-process.h"

/* ---- allocations ---- */

enum where {
    NOWHERE,
    ON_LOOP,
    BESIDE, /* on any other thread */
};

static atomic_int failing;    /* enum where */
static atomic_long countdown; /* fails when it is 0, once */
static atomic_bool did_fail;
static _Thread_local bool is_loop;

static bool fails(void)
{
    int at = atomic_load(&failing);

    if (at == NOWHERE || (at == ON_LOOP) != is_loop || atomic_fetch_sub(&countdown, 1) != 0)
        return false;
    atomic_store(&did_fail, true);
    return true;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_reallocarray(void *p, size_t n, size_t size);
char *__real_strdup(const char *s);
char *__real_strndup(const char *s, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_reallocarray(void *p, size_t n, size_t size);
char *__wrap_strdup(const char *s);
char *__wrap_strndup(const char *s, size_t n);
int __wrap_asprintf(char **ret, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void *out_of_memory(void)
{
    errno = ENOMEM;
    return NULL;
}

void *__wrap_malloc(size_t n)
{
    return fails() ? out_of_memory() : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? out_of_memory() : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? out_of_memory() : __real_realloc(p, n);
}

void *__wrap_reallocarray(void *p, size_t n, size_t size)
{
    return fails() ? out_of_memory() : __real_reallocarray(p, n, size);
}

char *__wrap_strdup(const char *s)
{
    return fails() ? out_of_memory() : __real_strdup(s);
}

char *__wrap_strndup(const char *s, size_t n)
{
    return fails() ? out_of_memory() : __real_strndup(s, n);
}

int __wrap_asprintf(char **ret, const char *format, ...)
{
    va_list ap;
    int r;

    if (fails()) {
        *ret = out_of_memory();
        return -1;
    }
    va_start(ap, format);
    r = vasprintf(ret, format, ap);
    va_end(ap);
    return r;
}

/* ---- calls ---- */

struct test {
    struct in_process daemon;
    sd_bus *bus;
    char *session; /* the one that Session's methods are called on */
    long n_calls, n_failed;
};

typedef int (*add_arguments)(sd_bus_message *m);

/* A stream to its end. */
static void read_stream(struct test *t, sd_bus_message *reply)
{
    char data[4096], last[4096] = "";
    size_t used = 0;
    ssize_t n;
    int fd;

    if (sd_bus_message_read(reply, "h", &fd) <= 0) {
        const sd_bus_error *e = sd_bus_message_get_error(reply);

        fprintf(stderr, "no stream: %s: %s\n", e ? e->name : "", e ? e->message : "");
        abort();
    }
    for (;;) {
        n = recv(fd, data, sizeof(data), MSG_DONTWAIT);
        if (n == 0)
            break;
        if (n > 0) { /* what is left of the last record, roughly */
            for (ssize_t i = 0; i < n; i++) {
                if (used > 0 && last[used - 1] == '\n')
                    used = 0;
                if (used < sizeof(last) - 1)
                    last[used++] = data[i];
            }
            continue;
        }
        assert(errno == EAGAIN || errno == EINTR);
        sd_event_run(t->daemon.service.event, 1000);
        sd_bus_process(t->bus, NULL);
    }
    last[used] = 0;
    /* Ended, failed, or cut where no memory was left to say so; never cut otherwise. */
    if (!strstr(last, "\"end\"") && !strstr(last, "\"error\""))
        assert(atomic_load(&did_fail));
    if (strstr(last, "\"error\""))
        assert(atomic_load(&did_fail) && strstr(last, LLM_ERROR_PREFIX "OutOfMemory"));
}

static sd_bus_message *call(struct test *t, const char *interface, const char *path,
                            const char *method, add_arguments add)
{
    sd_bus_message *m, *reply;

    assert(sd_bus_message_new_method_call(t->bus, &m, NULL, path, interface, method) >= 0);
    if (add)
        assert(add(m) >= 0);
    assert(in_process_call(&t->daemon, t->bus, m, &reply) == 0);
    sd_bus_message_unref(m);
    return reply;
}

static void take_session(struct test *t, sd_bus_message *reply)
{
    const char *path;

    assert(sd_bus_message_read(reply, "o", &path) > 0);
    free(t->session);
    t->session = __real_strdup(path);
}

static void close_sessions(struct test *t)
{
    struct session_set *set = t->daemon.service.sessions;

    session_set_close_all(set);
    while (!session_set_is_quiet(set))
        sd_event_run(t->daemon.service.event, 1000);
    assert(session_set_n_sessions(set) == 0);
}

static int no_options(sd_bus_message *m)
{
    return sd_bus_message_append(m, "a{sv}", 0);
}

static int session_options(sd_bus_message *m)
{
    return sd_bus_message_append(m, "a{sv}", 4, "model", "s", "demo", "label", "s", "a label",
                                 "class", "s", "batch", "context", "u", 200);
}

static int fork_options(sd_bus_message *m)
{
    return sd_bus_message_append(m, "a{sv}", 1, "label", "s", "a label");
}

static int prompt_options(sd_bus_message *m)
{
    return sd_bus_message_append(m, "a{sv}", 3, "prompt", "s", "My name is Anna.", "raw", "b", 1,
                                 "format", "s", "json");
}

static int measure_options(sd_bus_message *m)
{
    return sd_bus_message_append(m, "a{sv}", 2, "prompt", "s", "My name is Anna.", "raw", "b", 1);
}

static int generate_options(sd_bus_message *m)
{
    return sd_bus_message_append(m, "a{sv}", 8, "messages", "a(ss)", 2, "user", "My name is Anna.",
                                 "model", "Nice to meet you, Anna.", "prompt", "s",
                                 "What is my name?", "max-tokens", "u", 8, "stop", "as", 2, "xyz",
                                 "zyx", "logit-bias", "a{ud}", 2, 5, 0.5, 6, -0.5, "top-logprobs",
                                 "u", 3, "seed", "t", (uint64_t)1, "frequency-penalty", "d", 0.1);
}

static int rewind_argument(sd_bus_message *m)
{
    return sd_bus_message_append(m, "u", 1);
}

static int memory_file(sd_bus_message *m)
{
    int fd = memfd_create("state", MFD_CLOEXEC), r;

    assert(fd >= 0);
    r = sd_bus_message_append(m, "h", fd);
    close(fd);
    return r;
}

static int own_uid(sd_bus_message *m)
{
    return sd_bus_message_append(m, "u", (uint32_t)getuid());
}

static int quota_options(sd_bus_message *m)
{
    return sd_bus_message_append(m, "ua{sv}", 5u, 1, "weight", "u", 50);
}

static const struct method {
    const char *interface, *name;
    add_arguments add;
    bool is_session, has_stream;
} methods[] = {
    {LLM_MANAGER_INTERFACE, "CreateSession", session_options, false, false},
    {LLM_SESSION_INTERFACE, "Generate", generate_options, true, true},
    {LLM_SESSION_INTERFACE, "Append", prompt_options, true, true},
    {LLM_SESSION_INTERFACE, "Fork", fork_options, true, false},
    {LLM_SESSION_INTERFACE, "Rewind", rewind_argument, true, false},
    {LLM_SESSION_INTERFACE, "Save", memory_file, true, false},
    {LLM_SESSION_INTERFACE, "Cancel", NULL, true, false},
    {LLM_SESSION_INTERFACE, "Adopt", no_options, true, false},
    {LLM_SESSION_INTERFACE, "Close", NULL, true, false},
    {LLM_MANAGER_INTERFACE, "Measure", measure_options, false, false},
    {LLM_MANAGER_INTERFACE, "ListSessions", no_options, false, false},
    {LLM_MANAGER_INTERFACE, "ListModels", no_options, false, false},
    {LLM_MANAGER_INTERFACE, "GetStatistics", NULL, false, false},
    {LLM_MANAGER_INTERFACE, "GetQuota", own_uid, false, false},
    {LLM_MANAGER_INTERFACE, "SetQuota", quota_options, false, false},
    {LLM_MANAGER_INTERFACE, "Subscribe", no_options, false, false},
    {"org.freedesktop.DBus.ObjectManager", "GetManagedObjects", NULL, false, false},
    {"org.freedesktop.DBus.Introspectable", "Introspect", NULL, true, false},
};

/* A session with something in it, and a second one, so that lists have to be made. */
static void make_sessions(struct test *t)
{
    for (int i = 0; i < 2; i++) {
        sd_bus_message *reply =
            call(t, LLM_MANAGER_INTERFACE, LLM_ROOT_PATH, "CreateSession", no_options);

        take_session(t, reply);
        sd_bus_message_unref(reply);
    }
    sd_bus_message_unref(({
        sd_bus_message *reply =
            call(t, LLM_SESSION_INTERFACE, t->session, "Append", prompt_options);

        read_stream(t, reply);
        reply;
    }));
}

/* The n-th allocation of one kind of thread fails. False: there were not so many. */
static bool try_one(struct test *t, const struct method *method, enum where where, long n)
{
    sd_bus_message *reply;
    const sd_bus_error *e;

    make_sessions(t);
    atomic_store(&did_fail, false);
    atomic_store(&countdown, n);
    atomic_store(&failing, where);
    reply = call(t, method->interface, method->is_session ? t->session : LLM_ROOT_PATH,
                 method->name, method->add);
    e = sd_bus_message_get_error(reply);
    if (e) {
        if (!atomic_load(&did_fail) || (strcmp(e->name, LLM_ERROR_PREFIX "OutOfMemory") != 0 &&
                                        strcmp(e->name, SD_BUS_ERROR_NO_MEMORY) != 0)) {
            fprintf(stderr, "%s: %s: %s\n", method->name, e->name, e->message);
            abort();
        }
        t->n_failed++;
    } else if (method->has_stream) {
        read_stream(t, reply);
    }
    /* Signals and what is told later. */
    in_process_run(&t->daemon);
    atomic_store(&failing, NOWHERE);
    sd_bus_message_unref(reply);
    while (sd_bus_process(t->bus, NULL) > 0)
        ;
    t->n_calls++;
    close_sessions(t);
    return atomic_load(&did_fail);
}

/* A session works as if nothing had been. */
static void check_works(struct test *t)
{
    sd_bus_message *reply;

    make_sessions(t);
    reply = call(t, LLM_SESSION_INTERFACE, t->session, "Generate", prompt_options);
    atomic_store(&did_fail, false);
    read_stream(t, reply);
    sd_bus_message_unref(reply);
    close_sessions(t);
}

int main(void)
{
    static struct test t;

#ifdef ALLOCATIONS_ARE_BOUND
    puts("skipped: link-time optimisation has bound the allocator");
    return 77;
#endif
    is_loop = true;
    in_process_start(&t.daemon, LLMD_SOURCE_ROOT "/models/demo.llmd", /* context= */ 256);
    assert(in_process_bus(&t.daemon, getuid(), &t.bus) == 0);
    for (enum where where = ON_LOOP; where <= BESIDE; where++)
        for (size_t i = 0; i < ARRAY_SIZE(methods); i++) {
            long n = 0;

            while (try_one(&t, &methods[i], where, n))
                n++;
            check_works(&t);
            printf("%s, %s: %ld allocations\n", methods[i].name,
                   where == ON_LOOP ? "loop" : "beside", n);
            if (where == ON_LOOP && i == 0)
                assert(n > 2); /* else the wrapping does not work */
        }
    printf("%ld calls, %ld of them refused\n", t.n_calls, t.n_failed);
    assert(t.n_failed > 10);
    free(t.session);
    sd_bus_close_unref(t.bus);
    in_process_stop(&t.daemon);
    return 0;
}
