/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A daemon that goes in the middle of calls and between them, and what takes its place: that each
 * call has then been made once, or says that it has not.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <time.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/failing-allocations.h"
#include "client/fake-daemon.h"
#include "client/llm.h"
#include "ipc/names.h"

#define SESSION "/org/llmd/Llm1/session/"
#define ROOT "/org/llmd/Llm1"

static char folder[] = "/tmp/test-llm-call-XXXXXX";
static char left_out[256];

static const char *in_folder(const char *name)
{
    static char path[128];

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

/* ---- time, which passes at once ---- */

static uint64_t slept_usec;
static void (*after_a_while)(void); /* called once, when a second has been slept */

int __wrap_nanosleep(const struct timespec *t, struct timespec *left);

int __wrap_nanosleep(const struct timespec *t, struct timespec *left)
{
    void (*call)(void) = after_a_while;

    (void)left;
    slept_usec += (uint64_t)t->tv_sec * 1000000 + (uint64_t)t->tv_nsec / 1000;
    if (call && slept_usec >= 1000000) {
        after_a_while = NULL;
        call();
    }
    return 0;
}

/* ---- helpers ---- */

static struct fake_daemon *fake;
static struct llm_connection *c;
static struct llm_error err;

static void start(void)
{
    fake = fake_daemon_listen(in_folder("socket"));
}

/* Killed and started again, with all that it had. */
static void restart(void)
{
    fake_daemon_stop(fake);
    start();
}

static struct llm_session *session_new(void)
{
    struct llm_session *s;

    assert(llm_session_new(&s, c, NULL, &err) == 0);
    return s;
}

/* What the daemon was asked since this was last looked at, in words; sessions without their folder:
 * "Adopt 7, Cancel 7". Get is "State 7" and the like no more: its path alone is there. */
static const char *asked(void)
{
    static char calls[8192], out[8192];
    size_t n = 0;

    fake_daemon_calls(fake, calls, sizeof(calls));
    out[0] = 0;
    for (char *line = calls; *line;) {
        char *end = strchr(line, '\n'), *path = strchr(line, ' ');

        *end = 0;
        *path++ = 0;
        n += (size_t)snprintf(out + n, sizeof(out) - n, "%s%s", n > 0 ? ", " : "", line);
        if (strncmp(path, SESSION, strlen(SESSION)) == 0)
            n += (size_t)snprintf(out + n, sizeof(out) - n, " %s", path + strlen(SESSION));
        line = end + 1;
    }
    return out;
}

static void expect_asked(const char *wanted)
{
    const char *seen = asked();

    if (strcmp(seen, wanted) != 0) {
        fprintf(stderr, "asked:  %s\nwanted: %s\n", seen, wanted);
        abort();
    }
}

static bool is_lost(int r)
{
    return r == -ESTALE && strcmp(err.name, LLM_ERROR_PREFIX "SessionLost") == 0;
}

/* ---- in the middle of a call ---- */

static int call_status(struct llm_session *s)
{
    struct llm_status status;

    (void)s;
    return llm_get_status(c, &status, &err);
}

static int call_new(struct llm_session *s)
{
    struct llm_session *other;
    int r = llm_session_new(&other, c, NULL, &err);

    (void)s;
    if (r == 0)
        llm_session_free(other);
    return r;
}

static int call_open(struct llm_session *s)
{
    struct llm_session *other;
    int r = llm_session_open(&other, c, "12", &err);

    (void)s;
    if (r == 0)
        llm_session_free(other);
    return r;
}

static int call_fork(struct llm_session *s)
{
    struct llm_session *other;
    int r = llm_session_fork(&other, s, NULL, &err);

    if (r == 0)
        llm_session_free(other);
    return r;
}

/* Descriptors and all types of options are to come the second time as well. */
static int call_generate(struct llm_session *s)
{
    struct llm_options *o = NULL;
    uint64_t request = 0;
    int fd = -EBADF, r;

    r = llm_options_new(&o);
    if (r >= 0)
        r = llm_options_set_memory(o, "prompt-fd", "in a file", 9);
    if (r >= 0)
        r = llm_options_set_double(o, "temperature", 0.5);
    if (r >= 0)
        r = llm_options_add_message(o, "user", "hi");
    if (r < 0)
        llm_options_free(o);
    if (r == -ENOMEM)
        snprintf(err.message, sizeof(err.message), "out of memory");
    if (r < 0)
        return r;
    r = llm_session_generate(s, o, &fd, &request, &err);
    llm_options_free(o);
    if (r == 0) {
        assert(request == UINT64_C(1) << 40);
        close(fd);
    }
    return r;
}

static int call_append(struct llm_session *s)
{
    int fd, r = llm_session_append(s, NULL, &fd, NULL, &err);

    if (r == 0)
        close(fd);
    return r;
}

static int call_measure(struct llm_session *s)
{
    uint32_t n;

    (void)s;
    return llm_measure(c, NULL, &n, &err);
}

static int call_cancel(struct llm_session *s)
{
    return llm_session_cancel(s, &err);
}

static int call_rewind(struct llm_session *s)
{
    return llm_session_rewind(s, 5, &err);
}

static const struct {
    int (*call)(struct llm_session *s);
    const char *asked; /* by it, the loss and the repetition included */
    bool is_of_session;
} calls[] = {
    {call_status, "GetAll, Get, Adopt 7, GetAll", false},
    {call_new, "CreateSession, Get, Adopt 7, CreateSession", false},
    {call_open, "Get 12, Get, Adopt 7, Get 12", false},
    {call_fork, "Fork 7, Get, Adopt 7, Fork 7", true},
    {call_generate, "Generate 7, Get, Adopt 7, Generate 7", true},
    {call_append, "Append 7, Get, Adopt 7, Append 7", true},
    {call_measure, "Measure, Get, Adopt 7, Measure", false},
    {call_cancel, "Cancel 7, Get, Adopt 7, Cancel 7", true},
    {call_rewind, "Rewind 7, Get, Adopt 7, Rewind 7", true},
};

/* Makes sure that an asynchronous Close has come: the daemon takes calls in turn. */
static void expect_calls(size_t i)
{
    char wanted[256];

    snprintf(wanted, sizeof(wanted), "%s%s", calls[i].asked,
             calls[i].call == call_new    ? ", Close 7"
             : calls[i].call == call_fork ? ", Close 8"
                                          : "");
    assert(sd_bus_call_method(llm_connection_bus(c), llm_connection_destination(c), ROOT,
                              "org.freedesktop.DBus.Peer", "Ping", NULL, NULL, NULL) >= 0);
    expect_asked(wanted);
}

static void test_each_call(void)
{
    struct llm_session *s = session_new();
    char seen[512];

    expect_asked("Get, CreateSession");
    for (size_t i = 0; i < ARRAY_SIZE(calls); i++) {
        fake_daemon_lose(fake, FAKE_LOSE_ONE);
        assert(calls[i].call(s) == 0);
        expect_calls(i);
        /* The former connection is the sign of life, until the sessions are adopted. */
        assert(fake_daemon_formers_at_adopt(fake) == 1);
    }

    fake_daemon_lose(fake, FAKE_LOSE_ONE);
    fake_daemon_seen(fake, seen, sizeof(seen));
    assert(call_generate(s) == 0);
    fake_daemon_seen(fake, seen, sizeof(seen));
    assert(strcmp(seen, "Generate " SESSION "7 [s=prompt-fd,h=in a file,s=temperature,d=0.5,"
                        "s=messages,[(s=user,s=hi)]]") == 0);
    asked();

    /* One that ends whoever carries it out is not made for ever. */
    fake_daemon_lose_method(fake, FAKE_LOSE_ALL, "Measure");
    assert(call_measure(s) == -ENOTCONN && strcmp(err.message, "llmd has gone away") == 0);
    expect_asked("Measure, Get, Adopt 7, Measure, Get, Adopt 7, Measure, Get, Adopt 7, Measure");
    fake_daemon_lose(fake, FAKE_LOSE_NOTHING);
    assert(call_measure(s) == 0);
    expect_asked("Get, Adopt 7, Measure");

    /* On the way back, too. */
    fake_daemon_lose_method(fake, FAKE_LOSE_ALL, "Adopt");
    assert(call_measure(s) == 0); /* there is no need to go */
    restart();
    fake_daemon_lose_method(fake, FAKE_LOSE_ONE, "Adopt");
    asked();
    assert(call_measure(s) == 0);
    expect_asked("Get, Adopt 7, Get, Adopt 7, Measure");

    /* An error is an answer, whatever it is. */
    fake_daemon_set(fake, FAKE_ERROR);
    assert(call_measure(s) == -EBUSY);
    expect_asked("Measure");
    fake_daemon_set(fake, FAKE_RIGHT);
    llm_session_free(s);
}

/* Each allocation fails once, also those on the way back. */
static void test_allocations(void)
{
#ifdef ALLOCATIONS_ARE_BOUND
    strcat(left_out, " failing allocations (link-time optimisation)");
#else
    struct llm_session *s = session_new();

    for (size_t i = 0; i < ARRAY_SIZE(calls); i++) {
        for (int n = 0, r = -ENOMEM; r != 0; n++) {
            fake_daemon_lose(fake, FAKE_LOSE_ONE);
            allocations_left = n;
            r = calls[i].call(s);
            allocations_left = -1;
            assert(r == 0 || (r == -ENOMEM && strstr(err.message, "memory")));
            fake_daemon_lose(fake, FAKE_LOSE_NOTHING);
            assert(calls[i].call(s) == 0);
        }
    }
    llm_session_free(s);
    asked();
#endif
}

/* ---- between two calls ---- */

static void test_between(void)
{
    struct llm_session *s, *opened, *lingering;
    struct llm_options *o;

    s = session_new();
    assert(llm_session_open(&opened, c, "12", &err) == 0);
    assert(llm_options_new(&o) == 0 && llm_options_set_bool(o, "linger", true) == 0);
    assert(llm_session_new(&lingering, c, o, &err) == 0);
    llm_options_free(o);
    asked();

    restart();
    assert(call_cancel(s) == 0);
    expect_asked("Get, Adopt 7, Cancel 7"); /* what is not ours to close is not ours to adopt */
    assert(call_cancel(opened) == 0 && call_cancel(lingering) == 0);
    expect_asked("Cancel 12, Cancel 7");

    /* Another one: nothing is left of what was, and none of its sessions is taken for ours. */
    restart();
    fake_daemon_set_instance(fake, "two");
    assert(is_lost(call_cancel(s)) && strstr(err.message, "has lost this session"));
    assert(is_lost(call_generate(opened)) && is_lost(call_rewind(lingering)));
    assert(is_lost(call_fork(s)) && is_lost(call_append(s)));
    expect_asked("Get");
    assert(llm_session_close(s, &err) == 0); /* it is */
    llm_session_free(s);
    llm_session_free(opened);
    llm_session_free(lingering);
    assert(call_status(NULL) == 0);
    expect_asked("GetAll");
    s = session_new();
    restart();
    fake_daemon_set_instance(fake, "two");
    assert(call_cancel(s) == 0);
    expect_asked("Get, Adopt 7, Cancel 7");

    /* One that does not tell cannot be known for the same. */
    restart();
    fake_daemon_set_instance(fake, NULL);
    assert(is_lost(call_cancel(s)));
    llm_session_free(s);
    s = session_new();
    restart();
    fake_daemon_set_instance(fake, NULL);
    assert(is_lost(call_cancel(s)));
    llm_session_free(s);
    restart();
    s = session_new();

    /* One that could not be brought back is lost alone. */
    restart();
    fake_daemon_set_adopt(fake, LLM_ERROR_PREFIX "NoSuchSession");
    assert(is_lost(call_cancel(s)));
    assert(call_measure(s) == 0);
    llm_session_free(s);
    expect_asked("Get, Adopt 7, Measure");
    restart();
    s = session_new();
    asked();

    /* Another program was faster: it can still be used, and is not closed by us. */
    restart();
    fake_daemon_set_adopt(fake, LLM_ERROR_PREFIX "Busy");
    assert(call_cancel(s) == 0);
    llm_session_free(s);
    assert(call_status(NULL) == 0);
    expect_asked("Get, Adopt 7, Cancel 7, GetAll");
    fake_daemon_set_adopt(fake, NULL);
}

/* ---- closing ---- */

static void test_closing(void)
{
    struct llm_session *s = session_new();

    asked();
    fake_daemon_lose(fake, FAKE_LOSE_ONE);
    fake_daemon_set_adopt(fake, LLM_ERROR_PREFIX "NoSuchSession");
    assert(llm_session_close(s, &err) == 0); /* it had been done */
    expect_asked("Close 7, Get, Adopt 7");
    llm_session_free(s);
    fake_daemon_set_adopt(fake, NULL);

    s = session_new();
    asked();
    fake_daemon_lose(fake, FAKE_LOSE_ONE);
    assert(llm_session_close(s, &err) == 0); /* it had not */
    expect_asked("Close 7, Get, Adopt 7, Close 7");
    llm_session_free(s);
    assert(call_status(NULL) == 0);
    expect_asked("GetAll");

    /* What is freed while nobody is there costs no time, and is not adopted later. */
    s = session_new();
    restart();
    slept_usec = 0;
    llm_session_free(s);
    assert(slept_usec == 0);
    assert(call_status(NULL) == 0);
    expect_asked("Get, GetAll");
}

/* ---- files ---- */

static void expect_file(int fd, const char *text)
{
    char got[64] = "";

    assert(pread(fd, got, sizeof(got) - 1, 0) == (ssize_t)strlen(text));
    assert(strcmp(got, text) == 0);
}

static void test_files(void)
{
    struct llm_session *s = session_new();
    int fd, ends[2];

    /* What the first daemon had written is not left in front of, or behind, what the second does.
     */
    fd = memfd_create("saved", MFD_CLOEXEC);
    assert(fd >= 0 && write(fd, "before ", 7) == 7);
    fake_daemon_lose(fake, FAKE_LOSE_ONE);
    assert(llm_session_save(s, fd, &err) == 0);
    expect_file(fd, "before whole");
    close(fd);
    fd = open(in_folder("appended"), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    assert(fd >= 0 && write(fd, "before ", 7) == 7);
    fake_daemon_lose(fake, FAKE_LOSE_ONE);
    assert(llm_session_save(s, fd, &err) == 0);
    expect_file(fd, "before whole");
    close(fd);

    assert(pipe(ends) == 0);
    fake_daemon_lose(fake, FAKE_LOSE_ONE);
    asked();
    assert(llm_session_save(s, ends[1], &err) == -ENOTCONN && strstr(err.message, "pipe"));
    expect_asked("Save 7, Get, Adopt 7");
    assert(llm_session_save(s, ends[1], &err) == 0);

    /* Restored or not: the session says it. */
    asked();
    fd = memfd_create("saved", MFD_CLOEXEC);
    assert(fd >= 0 && write(fd, "bytes", 5) == 5 && lseek(fd, 2, SEEK_SET) == 2);
    fake_daemon_set_used(fake, 0, 0);
    fake_daemon_lose(fake, FAKE_LOSE_NOTHING);
    assert(llm_session_restore(s, fd, &err) == 0);
    expect_asked("Get 7, Restore 7");
    close(fd);
    close(ends[0]);
    close(ends[1]);
    llm_session_free(s);
}

/* Loses what comes after ContextUsed. */
static void test_restore(bool had_been_done, bool was_empty)
{
    struct llm_session *s = session_new();
    int fd = memfd_create("saved", MFD_CLOEXEC), r;

    assert(fd >= 0 && write(fd, "bytes", 5) == 5 && lseek(fd, 2, SEEK_SET) == 2);
    fake_daemon_set_used(fake, was_empty ? 0 : 9, had_been_done || !was_empty ? 9 : 0);
    asked();
    fake_daemon_lose_method(fake, FAKE_LOSE_ONE, "Restore");
    r = llm_session_restore(s, fd, &err);
    assert(r == 0 && lseek(fd, 0, SEEK_CUR) == 2);
    expect_asked(had_been_done && was_empty ? "Get 7, Restore 7, Get, Adopt 7, Get 7"
                                            : "Get 7, Restore 7, Get, Adopt 7, Get 7, Restore 7");
    close(fd);
    fake_daemon_set_used(fake, 0, 0);
    llm_session_free(s);
}

/* ---- nobody is there ---- */

static void test_absence(void)
{
    struct llm_session *s = session_new(), *private_session;
    struct llm_connection *private;
    struct fake_daemon *other;

    asked();
    fake_daemon_stop(fake);
    slept_usec = 0;
    after_a_while = start;
    assert(call_cancel(s) == 0);
    assert(!after_a_while && slept_usec >= 1000000 && slept_usec < 2000000);
    expect_asked("Get, Adopt 7, Cancel 7");

    /* For good; and back, after it was given up. */
    fake_daemon_stop(fake);
    slept_usec = 0;
    assert(call_cancel(s) == -ENOTCONN && strcmp(err.message, "llmd has gone away") == 0);
    assert(slept_usec >= 5000000 && slept_usec < 6000000);
    start();
    assert(call_cancel(s) == 0);
    expect_asked("Get, Adopt 7, Cancel 7");
    llm_session_free(s);

    /* Nobody but llmctl starts a private one. */
    other = fake_daemon_listen(in_folder("private.sock"));
    assert(llm_connect(&private, in_folder("private.sock"), &err) == 0);
    assert(llm_session_new(&private_session, private, NULL, &err) == 0);
    fake_daemon_stop(other);
    slept_usec = 0;
    assert(llm_session_cancel(private_session, &err) == -ENOTCONN && slept_usec == 0);
    llm_session_free(private_session);
    llm_disconnect(private);
}

/* A path that is not absolute means the same daemon from everywhere. */
static void test_folder(void)
{
    struct llm_connection *relative;
    struct fake_daemon *other = fake_daemon_listen(in_folder("other"));
    uint32_t n;

    assert(chdir(folder) == 0 && llm_connect(&relative, "other", &err) == 0 && chdir("/") == 0);
    fake_daemon_lose(other, FAKE_LOSE_ONE);
    assert(llm_measure(relative, NULL, &n, &err) == 0 && n == 42);
    llm_disconnect(relative);
    fake_daemon_stop(other);
}

/* What stays of a connection when it is made again, and what a child of fork() may do with it. */
static void test_settings(void)
{
    uint64_t usec;
    int status;
    pid_t pid;

    sd_bus_set_method_call_timeout(llm_connection_bus(c), 77000000);
    sd_bus_set_allow_interactive_authorization(llm_connection_bus(c), true);
    restart();
    pid = fork();
    assert(pid >= 0);
    if (pid == 0)
        _exit(call_status(NULL) == -ECHILD ? 0 : 1);
    assert(waitpid(pid, &status, 0) == pid && status == 0);
    assert(call_status(NULL) == 0);
    assert(sd_bus_get_method_call_timeout(llm_connection_bus(c), &usec) >= 0 && usec == 77000000);
    assert(sd_bus_get_allow_interactive_authorization(llm_connection_bus(c)) > 0);
}

/* llm_disconnect() is meant: nothing connects again. */
static void test_disconnected(void)
{
    struct llm_session *s = session_new();

    llm_disconnect(c);
    assert(call_cancel(s) == -ENOTCONN && strstr(err.message, "llm_disconnect"));
    llm_session_free(s);
}

/* ---- on a bus ---- */

static char address[256];

static void start_on_bus(void)
{
    fake = fake_daemon_on_bus(address);
}

static void test_bus(void)
{
    pid_t pid = fake_bus_start(folder, address, sizeof(address));
    struct llm_session *s;
    sd_bus *bus;

    if (pid == 0) {
        strcat(left_out, " the bus (no dbus-daemon)");
        return;
    }
    setenv("DBUS_SESSION_BUS_ADDRESS", address, 1);
    start_on_bus();
    assert(llm_connect_scope(&c, LLM_SCOPE_USER, &err) == 0);
    bus = llm_connection_bus(c);
    s = session_new();
    asked();

    /* The connection to the bus stays as it was. */
    fake_daemon_stop(fake);
    start_on_bus();
    assert(call_cancel(s) == 0 && llm_connection_bus(c) == bus);
    expect_asked("Get, Adopt 7, Cancel 7");
    fake_daemon_stop(fake);
    slept_usec = 0;
    after_a_while = start_on_bus;
    assert(call_generate(s) == 0 && !after_a_while && llm_connection_bus(c) == bus);
    expect_asked("Get, Adopt 7, Generate 7");

    /* A call of the Manager is not for whoever has the name now, before it is known who that is. */
    fake_daemon_stop(fake);
    start_on_bus();
    fake_daemon_set_instance(fake, "two");
    assert(call_status(s) == 0);
    expect_asked("Get, GetAll");
    assert(is_lost(call_cancel(s)));
    llm_session_free(s);
    s = session_new();

    /* The bus is started again, and with it all that was on it. */
    fake_daemon_stop(fake);
    assert(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
    slept_usec = 0;
    assert(call_cancel(s) == -ENOTCONN && slept_usec >= 5000000);
    pid = fake_bus_start(folder, address, sizeof(address));
    assert(pid > 0);
    setenv("DBUS_SESSION_BUS_ADDRESS", address, 1);
    start_on_bus();
    fake_daemon_set_instance(fake, "two");
    assert(call_cancel(s) == 0);
    expect_asked("Get, Adopt 7, Cancel 7");
    llm_session_free(s);
    llm_disconnect(c);
    fake_daemon_stop(fake);
    assert(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
}

int main(void)
{
    char command[64];

    assert(mkdtemp(folder));
    setenv("XDG_RUNTIME_DIR", folder, 1);
    setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent", 1);
    setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent", 1);

    start();
    assert(llm_connect(&c, in_folder("socket"), &err) == 0);
    test_each_call();
    test_allocations();
    test_between();
    test_closing();
    test_files();
    test_restore(/* had_been_done= */ true, /* was_empty= */ true);
    test_restore(/* had_been_done= */ false, /* was_empty= */ true);
    test_restore(/* had_been_done= */ false, /* was_empty= */ false);
    test_absence();
    test_folder();
    test_settings();
    test_disconnected();
    fake_daemon_stop(fake);
    test_bus();

    snprintf(command, sizeof(command), "rm -rf %s", folder);
    assert(system(command) == 0);
    if (left_out[0])
        printf("left out:%s\n", left_out);
    return 0;
}
