/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include "client/fake-daemon.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <systemd/sd-event.h>
#include <systemd/sd-id128.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "ipc/names.h"

#define BUSES_MAX 16
#define FORMERS_MAX 64

struct fake_daemon {
    pthread_t thread;
    int listen_fd, quit_fd;
    sd_event *event;          /* the thread's, and so are these two */
    sd_bus *buses[BUSES_MAX]; /* [n_buses] */
    size_t n_buses;

    pthread_mutex_t lock; /* of what follows */
    enum fake_answer answer;
    const char *stream;
    int stream_fd;
    char seen[8192], calls[8192];
    enum fake_loss loss;
    const char *lost_member; /* NULL: any */
    const char *instance, *adopt_error;
    unsigned used, used_then;
    int formers[FORMERS_MAX]; /* [n_formers], our ends: shut down, not closed */
    unsigned n_formers, formers_at_adopt;
};

/* ---- what was asked ---- */

__attribute__((format(printf, 3, 4))) static void put(char *out, size_t n, const char *format, ...)
{
    size_t used = strlen(out);
    va_list ap;

    va_start(ap, format);
    vsnprintf(out + used, n - used, format, ap);
    va_end(ap);
}

static void put_fd(char *out, size_t n, int fd)
{
    char text[256];
    ssize_t got = pread(fd, text, sizeof(text) - 1, 0);

    text[got > 0 ? got : 0] = 0;
    put(out, n, "%s", text);
}

static void put_arguments(sd_bus_message *m, char *out, size_t n)
{
    const char *contents;
    bool first = true;
    char type;

    while (sd_bus_message_peek_type(m, &type, &contents) > 0) {
        union {
            const char *s;
            uint32_t u;
            uint64_t t;
            double d;
            int i;
        } v;

        put(out, n, "%s", first ? "" : ",");
        first = false;
        if (strchr("avre", type)) {
            assert(sd_bus_message_enter_container(m, type, contents) > 0);
            put(out, n, "%s", type == 'a' ? "[" : type == 'r' ? "(" : "");
            put_arguments(m, out, n);
            put(out, n, "%s", type == 'a' ? "]" : type == 'r' ? ")" : "");
            assert(sd_bus_message_exit_container(m) >= 0);
            continue;
        }
        assert(sd_bus_message_read_basic(m, type, &v) > 0);
        put(out, n, "%c=", type);
        switch (type) {
        case 's':
        case 'o':
            put(out, n, "%s", v.s);
            break;
        case 'u':
            put(out, n, "%" PRIu32, v.u);
            break;
        case 't':
            put(out, n, "%" PRIu64, v.t);
            break;
        case 'd':
            put(out, n, "%g", v.d);
            break;
        case 'b':
            put(out, n, "%d", v.i);
            break;
        case 'h':
            put_fd(out, n, v.i);
            break;
        }
    }
}

/* ---- answers ---- */

static int answer_stream(struct fake_daemon *f, sd_bus_message *m)
{
    CLEANUP(closep) int theirs = -EBADF;
    int ends[2];

    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    theirs = ends[1];
    if (f->stream_fd >= 0)
        close(f->stream_fd);
    f->stream_fd = ends[0];
    assert(write(ends[0], f->stream, strlen(f->stream)) == (ssize_t)strlen(f->stream));
    if (f->stream[0])
        shutdown(ends[0], SHUT_WR);
    return sd_bus_reply_method_return(m, "ht", theirs, UINT64_C(1) << 40);
}

static int answer_properties(sd_bus_message *m)
{
    /* One is of a later version, two backends where the library takes the first, and one text is
     * longer than its field. */
    static char long_name[400];

    memset(long_name, 'x', sizeof(long_name) - 1);
    return sd_bus_reply_method_return(
        m, "a{sv}", 11, "Version", "s", "9.9", "State", "s", "loading", "LoadProgress", "d", 0.25,
        "Later", "a{sv}", 1, "x", "u", 1u, "Models", "as", 1, "a", "DefaultModel", "s", long_name,
        "Model", "s", "small", "Backends", "as", 2, "cpu", "gpu", "Sessions", "u", 3u,
        "KvBytesUsed", "t", UINT64_C(1) << 33, "KvBytesMax", "t", UINT64_C(1) << 34);
}

static int answer_property(struct fake_daemon *f, sd_bus_message *m)
{
    const char *interface, *name;

    assert(sd_bus_message_read(m, "ss", &interface, &name) > 0);
    if (strcmp(name, "ContextUsed") == 0)
        return sd_bus_reply_method_return(m, "v", "u", f->used);
    if (strcmp(name, "Instance") != 0)
        return sd_bus_reply_method_return(m, "v", "s", "idle");
    if (!f->instance)
        return sd_bus_reply_method_errorf(m, SD_BUS_ERROR_UNKNOWN_PROPERTY, "what is that?");
    return sd_bus_reply_method_return(m, "v", "s", f->instance);
}

static int answer_adopt(struct fake_daemon *f, sd_bus_message *m)
{
    f->formers_at_adopt = 0;
    for (unsigned i = 0; i < f->n_formers; i++) {
        struct pollfd p = {.fd = f->formers[i]};

        assert(poll(&p, 1, 0) >= 0);
        f->formers_at_adopt += !(p.revents & POLLHUP);
    }
    if (f->adopt_error)
        return sd_bus_reply_method_errorf(m, f->adopt_error, "not this one");
    return sd_bus_reply_method_return(m, NULL);
}

static int answer_save(sd_bus_message *m, const char *text)
{
    int fd;

    assert(sd_bus_message_read(m, "h", &fd) > 0);
    if ((fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY)
        assert(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    return 0;
}

static int answer_rightly(struct fake_daemon *f, sd_bus_message *m)
{
    const char *member = sd_bus_message_get_member(m);

    if (strcmp(member, "CreateSession") == 0)
        return sd_bus_reply_method_return(m, "o", LLM_SESSION_PATH "/7");
    if (strcmp(member, "Fork") == 0)
        return sd_bus_reply_method_return(m, "o", LLM_SESSION_PATH "/8");
    if (strcmp(member, "Measure") == 0)
        return sd_bus_reply_method_return(m, "u", 42u);
    if (strcmp(member, "Generate") == 0 || strcmp(member, "Append") == 0)
        return answer_stream(f, m);
    if (strcmp(member, "Get") == 0)
        return answer_property(f, m);
    if (strcmp(member, "Adopt") == 0)
        return answer_adopt(f, m);
    if (strcmp(member, "Save") == 0)
        answer_save(m, "whole");
    if (strcmp(member, "GetAll") == 0)
        return answer_properties(m);
    return sd_bus_reply_method_return(m, NULL);
}

static int answer(struct fake_daemon *f, sd_bus_message *m)
{
    switch (f->answer) {
    case FAKE_RIGHT:
        return answer_rightly(f, m);
    case FAKE_ERROR:
        return sd_bus_reply_method_errorf(m, LLM_ERROR_PREFIX "Busy", "a request runs");
    case FAKE_FOREIGN_ERROR:
        return sd_bus_reply_method_errorf(m, "com.example.Odd", "odd");
    case FAKE_WRONG:
        return sd_bus_reply_method_return(m, "x", INT64_C(-1));
    case FAKE_EMPTY:
        return sd_bus_reply_method_return(m, NULL);
    case FAKE_NONE:
        return 1;
    case FAKE_HANGUP:
        sd_bus_close(sd_bus_message_get_bus(m));
        return 1;
    }
    return 0;
}

/*
 * As much of it as a daemon may have done. What the client sees is the end of the connection; we
 * keep our end of it, as a service manager would.
 */
static void lose(struct fake_daemon *f, sd_bus_message *m)
{
    sd_bus *bus = sd_bus_message_get_bus(m);
    int fd = dup(sd_bus_get_fd(bus));

    if (f->loss == FAKE_LOSE_ONE)
        f->loss = FAKE_LOSE_NOTHING;
    if (strcmp(sd_bus_message_get_member(m), "Save") == 0)
        answer_save(m, "a part of it");
    f->used = f->used_then;
    assert(fd >= 0 && f->n_formers < FORMERS_MAX);
    f->formers[f->n_formers++] = fd;
    assert(shutdown(fd, SHUT_WR) == 0);
    sd_bus_close(bus);
}

static int on_message(sd_bus_message *m, void *userdata, sd_bus_error *e)
{
    struct fake_daemon *f = userdata;
    const char *interface = sd_bus_message_get_interface(m);
    uint8_t type;
    int r = 0;

    (void)e;
    assert(sd_bus_message_get_type(m, &type) >= 0);
    if (type != SD_BUS_MESSAGE_METHOD_CALL)
        return 0;
    pthread_mutex_lock(&f->lock);
    if (strcmp(interface, "org.freedesktop.DBus.Peer") != 0 || f->answer == FAKE_HANGUP) {
        snprintf(f->seen, sizeof(f->seen), "%s %s ", sd_bus_message_get_member(m),
                 sd_bus_message_get_path(m));
        put_arguments(m, f->seen, sizeof(f->seen));
        assert(sd_bus_message_rewind(m, 1) >= 0);
        put(f->calls, sizeof(f->calls), "%s %s\n", sd_bus_message_get_member(m),
            sd_bus_message_get_path(m));
        if (f->loss != FAKE_LOSE_NOTHING &&
            (!f->lost_member || strcmp(f->lost_member, sd_bus_message_get_member(m)) == 0)) {
            lose(f, m);
            r = 1;
        } else {
            r = answer(f, m);
        }
    }
    pthread_mutex_unlock(&f->lock);
    return r < 0 ? r : r > 0 || strcmp(interface, "org.freedesktop.DBus.Peer") != 0;
}

/* ---- its thread ---- */

static void serve(struct fake_daemon *f, sd_bus *bus)
{
    size_t n = 0;

    for (size_t i = 0; i < f->n_buses; i++) {
        if (sd_bus_is_open(f->buses[i]) > 0)
            f->buses[n++] = f->buses[i];
        else
            sd_bus_close_unref(f->buses[i]);
    }
    f->n_buses = n;
    assert(f->n_buses < BUSES_MAX);
    f->buses[f->n_buses++] = bus;
    assert(sd_bus_add_filter(bus, NULL, on_message, f) >= 0);
    assert(sd_bus_attach_event(bus, f->event, 0) >= 0);
}

static int on_connection(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct fake_daemon *f = userdata;
    sd_id128_t id;
    sd_bus *bus;
    int r;

    (void)source;
    (void)revents;
    fd = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    assert(fd >= 0);
    assert(sd_bus_new(&bus) >= 0 && sd_bus_set_fd(bus, fd, fd) >= 0);
    assert(sd_id128_randomize(&id) >= 0 && sd_bus_set_server(bus, 1, id) >= 0);
    assert(sd_bus_set_anonymous(bus, 1) >= 0); /* who calls does not matter here */
    assert(sd_bus_negotiate_fds(bus, 1) >= 0);
    r = sd_bus_start(bus);
    assert(r >= 0 || r == -ECONNRESET); /* who does not trust us has gone already */
    if (r >= 0)
        serve(f, bus);
    else
        sd_bus_unref(bus);
    return 0;
}

static int on_quit(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    (void)fd;
    (void)revents;
    (void)userdata;
    return sd_event_exit(sd_event_source_get_event(source), 0);
}

static void *run(void *userdata)
{
    struct fake_daemon *f = userdata;

    assert(sd_event_loop(f->event) == 0);
    for (size_t i = 0; i < f->n_buses; i++)
        sd_bus_flush_close_unref(f->buses[i]);
    return NULL;
}

static struct fake_daemon *fake_daemon_new(void)
{
    struct fake_daemon *f = calloc(1, sizeof(*f));

    assert(f);
    f->listen_fd = f->stream_fd = -EBADF;
    f->stream = "";
    f->instance = "one";
    pthread_mutex_init(&f->lock, NULL);
    f->quit_fd = eventfd(0, EFD_CLOEXEC);
    assert(f->quit_fd >= 0 && sd_event_new(&f->event) >= 0);
    assert(sd_event_add_io(f->event, NULL, f->quit_fd, EPOLLIN, on_quit, f) >= 0);
    return f;
}

struct fake_daemon *fake_daemon_listen(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct fake_daemon *f = fake_daemon_new();

    assert(strlen(path) < sizeof(address.sun_path));
    strcpy(address.sun_path, path);
    unlink(path);
    f->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(f->listen_fd >= 0);
    assert(bind(f->listen_fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    assert(listen(f->listen_fd, 8) == 0);
    assert(sd_event_add_io(f->event, NULL, f->listen_fd, EPOLLIN, on_connection, f) >= 0);
    assert(pthread_create(&f->thread, NULL, run, f) == 0);
    return f;
}

struct fake_daemon *fake_daemon_on_bus(const char *address)
{
    struct fake_daemon *f = fake_daemon_new();
    sd_bus *bus;

    assert(sd_bus_new(&bus) >= 0 && sd_bus_set_address(bus, address) >= 0);
    assert(sd_bus_set_bus_client(bus, 1) >= 0 && sd_bus_negotiate_fds(bus, 1) >= 0);
    assert(sd_bus_start(bus) >= 0 && sd_bus_request_name(bus, LLM_BUS_NAME, 0) >= 0);
    serve(f, bus);
    assert(pthread_create(&f->thread, NULL, run, f) == 0);
    return f;
}

void fake_daemon_stop(struct fake_daemon *f)
{
    assert(write(f->quit_fd, &(uint64_t){1}, 8) == 8);
    assert(pthread_join(f->thread, NULL) == 0);
    sd_event_unref(f->event);
    pthread_mutex_destroy(&f->lock);
    closep(&f->listen_fd);
    closep(&f->stream_fd);
    for (unsigned i = 0; i < f->n_formers; i++)
        close(f->formers[i]);
    close(f->quit_fd);
    free(f);
}

/* ---- for the test ---- */

void fake_daemon_set(struct fake_daemon *f, enum fake_answer a)
{
    pthread_mutex_lock(&f->lock);
    f->answer = a;
    pthread_mutex_unlock(&f->lock);
}

void fake_daemon_set_stream(struct fake_daemon *f, const char *text)
{
    pthread_mutex_lock(&f->lock);
    f->stream = text;
    pthread_mutex_unlock(&f->lock);
}

void fake_daemon_lose(struct fake_daemon *f, enum fake_loss loss)
{
    pthread_mutex_lock(&f->lock);
    f->loss = loss;
    f->lost_member = NULL;
    pthread_mutex_unlock(&f->lock);
}

void fake_daemon_lose_method(struct fake_daemon *f, enum fake_loss loss, const char *member)
{
    pthread_mutex_lock(&f->lock);
    f->loss = loss;
    f->lost_member = member;
    pthread_mutex_unlock(&f->lock);
}

void fake_daemon_set_instance(struct fake_daemon *f, const char *instance)
{
    pthread_mutex_lock(&f->lock);
    f->instance = instance;
    pthread_mutex_unlock(&f->lock);
}

void fake_daemon_set_adopt(struct fake_daemon *f, const char *error)
{
    pthread_mutex_lock(&f->lock);
    f->adopt_error = error;
    pthread_mutex_unlock(&f->lock);
}

void fake_daemon_set_used(struct fake_daemon *f, unsigned now, unsigned then)
{
    pthread_mutex_lock(&f->lock);
    f->used = now;
    f->used_then = then;
    pthread_mutex_unlock(&f->lock);
}

unsigned fake_daemon_formers_at_adopt(struct fake_daemon *f)
{
    unsigned n;

    pthread_mutex_lock(&f->lock);
    n = f->formers_at_adopt;
    pthread_mutex_unlock(&f->lock);
    return n;
}

void fake_daemon_calls(struct fake_daemon *f, char *out, size_t n)
{
    pthread_mutex_lock(&f->lock);
    snprintf(out, n, "%s", f->calls);
    f->calls[0] = 0;
    pthread_mutex_unlock(&f->lock);
}

void fake_daemon_seen(struct fake_daemon *f, char *out, size_t n)
{
    pthread_mutex_lock(&f->lock);
    snprintf(out, n, "%s", f->seen);
    f->seen[0] = 0;
    pthread_mutex_unlock(&f->lock);
}

int fake_daemon_take_stream(struct fake_daemon *f)
{
    int fd;

    pthread_mutex_lock(&f->lock);
    fd = TAKE_FD(f->stream_fd);
    pthread_mutex_unlock(&f->lock);
    return fd;
}

pid_t fake_bus_start(const char *folder, char *address, size_t n)
{
    char path[256], number[16];
    int ends[2];
    ssize_t got;
    pid_t pid;
    FILE *f;

    snprintf(path, sizeof(path), "%s/bus.conf", folder);
    f = fopen(path, "we");
    assert(f);
    fprintf(f,
            "<busconfig><type>session</type><listen>unix:path=%s/bus</listen>"
            "<policy context=\"default\"><allow send_destination=\"*\"/><allow eavesdrop=\"true\"/>"
            "<allow own=\"*\"/></policy></busconfig>\n",
            folder);
    fclose(f);
    assert(pipe(ends) == 0);
    pid = fork();
    assert(pid >= 0);
    if (pid == 0) {
        close(ends[0]);
        assert(freopen("/dev/null", "w", stderr)); /* it complains of limits it may not raise */
        snprintf(number, sizeof(number), "%d", ends[1]);
        execlp("dbus-daemon", "dbus-daemon", "--nofork", "--nopidfile", "--nosyslog",
               "--config-file", path, "--print-address", number, (char *)NULL);
        _exit(77);
    }
    close(ends[1]);
    got = read(ends[0], address, n - 1);
    close(ends[0]);
    if (got <= 0) {
        assert(waitpid(pid, NULL, 0) == pid);
        return 0;
    }
    address[got] = 0;
    address[strcspn(address, "\n")] = 0;
    return pid;
}
