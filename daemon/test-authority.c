/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Whom authority asks and what it makes of the answers: a dbus-daemon of our own, a polkit of our
 * own on it, and authority on another connection, all but the first in this process's loop.
 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <systemd/sd-event.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/authority.h"

#define POLKIT "org.freedesktop.PolicyKit1"
#define POLKIT_PATH "/org/freedesktop/PolicyKit1/Authority"
#define POLKIT_INTERFACE "org.freedesktop.PolicyKit1.Authority"

static char folder[] = "/tmp/test-authority-XXXXXX";
static sd_event *event;

/* ---- polkit ---- */

static struct {
    sd_bus *bus;
    bool yes, challenge, fail, hold; /* how it answers; hold: not at all */
    unsigned n_checks, n_cancelled;
    char kind[64], name[64], action[64], id[64], cancelled[64];
    uint32_t pid, flags;
    uint64_t start_time;
    int32_t uid;
} polkit;

static int on_check(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    const char *kind, *key, *action, *id;

    (void)userdata;
    polkit.n_checks++;
    polkit.name[0] = 0;
    assert(sd_bus_message_enter_container(m, 'r', "sa{sv}") > 0);
    assert(sd_bus_message_read(m, "s", &kind) > 0);
    snprintf(polkit.kind, sizeof(polkit.kind), "%s", kind);
    assert(sd_bus_message_enter_container(m, 'a', "{sv}") > 0);
    while (sd_bus_message_enter_container(m, 'e', "sv") > 0) {
        const char *text;

        assert(sd_bus_message_read(m, "s", &key) > 0);
        if (strcmp(key, "name") == 0) {
            assert(sd_bus_message_read(m, "v", "s", &text) > 0);
            snprintf(polkit.name, sizeof(polkit.name), "%s", text);
        } else if (strcmp(key, "pid") == 0) {
            assert(sd_bus_message_read(m, "v", "u", &polkit.pid) > 0);
        } else if (strcmp(key, "start-time") == 0) {
            assert(sd_bus_message_read(m, "v", "t", &polkit.start_time) > 0);
        } else {
            assert(strcmp(key, "uid") == 0);
            assert(sd_bus_message_read(m, "v", "i", &polkit.uid) > 0);
        }
        assert(sd_bus_message_exit_container(m) >= 0);
    }
    assert(sd_bus_message_exit_container(m) >= 0 && sd_bus_message_exit_container(m) >= 0);
    assert(sd_bus_message_read(m, "sa{ss}us", &action, 0, &polkit.flags, &id) > 0);
    snprintf(polkit.action, sizeof(polkit.action), "%s", action);
    snprintf(polkit.id, sizeof(polkit.id), "%s", id);
    if (polkit.hold)
        return 1;
    if (polkit.fail)
        return sd_bus_error_set(error, POLKIT ".Error.Failed", "the test wants it");
    return sd_bus_reply_method_return(m, "(bba{ss})", polkit.yes, polkit.challenge, 0);
}

static int on_cancel(sd_bus_message *m, void *userdata, sd_bus_error *error)
{
    const char *id;

    (void)userdata;
    (void)error;
    assert(sd_bus_message_read(m, "s", &id) > 0);
    snprintf(polkit.cancelled, sizeof(polkit.cancelled), "%s", id);
    polkit.n_cancelled++;
    return sd_bus_reply_method_return(m, NULL);
}

static const sd_bus_vtable polkit_vtable[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_METHOD("CheckAuthorization", "(sa{sv})sa{ss}us", "(bba{ss})", on_check,
                  SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD("CancelCheckAuthorization", "s", "", on_cancel, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_SIGNAL("Changed", "", 0),
    SD_BUS_VTABLE_END,
};

static sd_bus *connect_bus(void)
{
    char address[256];
    sd_bus *bus = NULL;

    snprintf(address, sizeof(address), "unix:path=%s/bus", folder);
    assert(sd_bus_new(&bus) >= 0 && sd_bus_set_address(bus, address) >= 0);
    assert(sd_bus_set_bus_client(bus, 1) >= 0 && sd_bus_start(bus) >= 0);
    assert(sd_bus_attach_event(bus, event, 0) >= 0);
    return bus;
}

static void start_polkit(void)
{
    polkit.bus = connect_bus();
    assert(sd_bus_add_object_vtable(polkit.bus, NULL, POLKIT_PATH, POLKIT_INTERFACE, polkit_vtable,
                                    NULL) >= 0);
    assert(sd_bus_request_name(polkit.bus, POLKIT, 0) >= 0);
}

static void stop_polkit(void)
{
    assert(sd_bus_release_name(polkit.bus, POLKIT) >= 0);
    polkit.bus = sd_bus_flush_close_unref(polkit.bus);
}

static pid_t start_broker(void)
{
    char path[300], option[320], line[256];
    int out[2];
    pid_t pid;
    FILE *f;

    snprintf(path, sizeof(path), "%s/bus.conf", folder);
    f = fopen(path, "we");
    assert(f);
    fprintf(
        f,
        "<!DOCTYPE busconfig PUBLIC \"-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN\" "
        "\"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd\"><busconfig>"
        "<listen>unix:path=%s/bus</listen><auth>EXTERNAL</auth><policy context=\"default\">"
        "<allow user=\"*\"/><allow own=\"*\"/><allow send_destination=\"*\" eavesdrop=\"true\"/>"
        "<allow eavesdrop=\"true\"/></policy></busconfig>",
        folder);
    fclose(f);
    assert(pipe(out) == 0);
    pid = fork();
    assert(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(out[0]);
        snprintf(option, sizeof(option), "--config-file=%s", path);
        snprintf(line, sizeof(line), "--print-address=%d", out[1]);
        execlp("dbus-daemon", "dbus-daemon", option, "--nofork", "--nopidfile", line, NULL);
        _exit(127);
    }
    close(out[1]);
    if (read(out[0], line, sizeof(line)) <= 0) {
        puts("dbus-daemon is not there");
        exit(77);
    }
    close(out[0]);
    return pid;
}

/* ---- who asks ---- */

struct answer {
    unsigned n;
    int r;
};

static void on_answer(void *userdata, int r)
{
    struct answer *a = userdata;

    a->n++;
    a->r = r;
}

static int ask(struct authority *a, struct client_identity *who, enum action action)
{
    struct answer answer = {0};

    authority_check(a, who, action, NULL, on_answer, &answer);
    while (answer.n == 0)
        assert(sd_event_run(event, UINT64_MAX) >= 0);
    assert(answer.n == 1);
    return answer.r;
}

/* A round trip through the broker and back: what was sent before has been dealt with. */
static void settle(sd_bus *bus)
{
    for (int i = 0; i < 3; i++) {
        CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;

        assert(sd_bus_call_method(bus, "org.freedesktop.DBus", "/org/freedesktop/DBus",
                                  "org.freedesktop.DBus", "GetId", NULL, &reply, NULL) >= 0);
        while (sd_event_run(event, 0) > 0)
            ;
    }
}

static void test_without_polkit(sd_bus *bus)
{
    struct client_identity root = {.uid = 0, .pidfd = -EBADF};
    struct client_identity self = {.uid = geteuid(), .pidfd = -EBADF};
    struct client_identity other = {.uid = geteuid() + 4711, .bus_name = ":1.99", .pidfd = -EBADF};
    struct authority *a = NULL;

    for (int way = 0; way < 3; way++) {
        assert(authority_new(&a, way > 0) == 0);
        if (way == 2)
            assert(authority_set_bus(a, bus) == 0);
        for (enum action action = 0; action < ACTION_N; action++) {
            assert(ask(a, &root, action) == 1 && ask(a, &self, action) == 1);
            assert(ask(a, &other, action) ==
                   (action == ACTION_USE || action == ACTION_USE_BACKGROUND));
        }
        authority_free(a);
    }
}

static void test_answers(sd_bus *bus)
{
    struct client_identity named = {.uid = geteuid() + 4711, .bus_name = ":1.99", .pidfd = -EBADF};
    struct client_identity second = named;
    struct authority *a = NULL;

    assert(authority_new(&a, true) == 0 && authority_set_bus(a, bus) == 0);
    polkit.yes = true;
    assert(ask(a, &named, ACTION_MANAGE_MODELS) == 1 && polkit.n_checks == 1);
    assert(strcmp(polkit.kind, "system-bus-name") == 0 && strcmp(polkit.name, ":1.99") == 0);
    assert(strcmp(polkit.action, "org.llmd.Llm1.manage-models") == 0 && polkit.flags == 0);
    assert(ask(a, &named, ACTION_MANAGE_MODELS) == 1 && polkit.n_checks == 2);

    /* Only a yes to `use` is remembered, for the one who asked, until something changes. */
    assert(ask(a, &named, ACTION_USE) == 1 && polkit.n_checks == 3);
    assert(ask(a, &named, ACTION_USE) == 1 && polkit.n_checks == 3);
    assert(ask(a, &second, ACTION_USE) == 1 && polkit.n_checks == 4);
    polkit.yes = false;
    assert(ask(a, &named, ACTION_USE) == 1 && polkit.n_checks == 4);
    settle(bus); /* the matches are there */
    assert(sd_bus_emit_signal(polkit.bus, POLKIT_PATH, POLKIT_INTERFACE, "Changed", "") >= 0);
    settle(polkit.bus);
    settle(bus);
    assert(ask(a, &named, ACTION_USE) == 0 && polkit.n_checks == 5);
    assert(ask(a, &named, ACTION_USE) == 0 && polkit.n_checks == 6);
    polkit.challenge = true;
    assert(ask(a, &named, ACTION_USE) == 2 && polkit.n_checks == 7);
    polkit.challenge = false;
    polkit.fail = true;
    assert(ask(a, &named, ACTION_USE) < 0);
    polkit.fail = false;

    /* Once it was there, its absence is no permission. */
    polkit.yes = true;
    assert(ask(a, &named, ACTION_USE) == 1);
    stop_polkit();
    settle(bus);
    assert(ask(a, &named, ACTION_USE) < 0 && ask(a, &named, ACTION_MANAGE_QUOTAS) < 0);
    assert(authority_set_bus(a, NULL) == 0 && ask(a, &named, ACTION_USE) < 0);
    authority_free(a);
    start_polkit();
}

static void test_waiting(sd_bus *bus)
{
    struct client_identity named = {.uid = geteuid() + 4711, .bus_name = ":1.99", .pidfd = -EBADF};
    struct client_identity second = named;
    struct answer first = {0}, other = {0};
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    struct authority *a = NULL;

    assert(authority_new(&a, true) == 0 && authority_set_bus(a, bus) == 0);
    assert(sd_bus_message_new_method_call(bus, &m, "a.b", "/", "a.b", "C") >= 0);
    assert(sd_bus_message_set_allow_interactive_authorization(m, 1) >= 0);
    polkit.hold = true;
    polkit.n_cancelled = polkit.n_checks = 0;
    authority_check(a, &named, ACTION_MANAGE_MODELS, m, on_answer, &first);
    authority_check(a, &second, ACTION_MANAGE_MODELS, NULL, on_answer, &other);
    while (polkit.n_checks < 1)
        assert(sd_event_run(event, UINT64_MAX) >= 0);
    assert(polkit.flags == 1);
    while (polkit.n_checks < 2)
        assert(sd_event_run(event, UINT64_MAX) >= 0);
    assert(polkit.flags == 0 && first.n == 0 && other.n == 0);

    authority_forget(a, &named);
    assert(first.n == 1 && first.r == -ECANCELED && other.n == 0);
    while (polkit.n_cancelled == 0) /* the dialogue goes away */
        assert(sd_event_run(event, UINT64_MAX) >= 0);
    assert(strcmp(polkit.cancelled, "llmd-1") == 0);
    assert(authority_set_bus(a, NULL) == 0);
    assert(other.n == 1 && other.r == -ECONNRESET);

    assert(authority_set_bus(a, bus) == 0);
    other.n = 0;
    authority_check(a, &second, ACTION_MANAGE_MODELS, NULL, on_answer, &other);
    authority_free(a);
    assert(other.n == 1 && other.r == -ECANCELED);
    settle(bus); /* that call arrives all the same */
    settle(polkit.bus);
    polkit.hold = false;
}

/* Connects from another process, which stays until told (a byte) to go. */
static pid_t connect_from_child(int listener, const struct sockaddr_un *address, int *ret_fd)
{
    pid_t pid = fork();

    assert(pid >= 0);
    if (pid == 0) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        char byte;

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 ||
            read(fd, &byte, 1) != 1)
            _exit(1);
        _exit(0);
    }
    *ret_fd = accept(listener, NULL, NULL);
    assert(*ret_fd >= 0);
    return pid;
}

static void end_child(pid_t pid, int fd)
{
    int status;

    assert(write(fd, "x", 1) == 1);
    assert(waitpid(pid, &status, 0) == pid && status == 0);
}

static void test_process(sd_bus *bus)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct client_identity who, late;
    struct answer answer = {0};
    struct authority *a = NULL;
    int listener, fd;
    pid_t pid;

    snprintf(address.sun_path, sizeof(address.sun_path), "%s/socket", folder);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0);
    assert(listen(listener, 5) == 0);
    assert(authority_new(&a, true) == 0 && authority_set_bus(a, bus) == 0);

    pid = connect_from_child(listener, &address, &fd);
    assert(client_identity_of_socket(&who, fd) == 0);
    assert(who.pid == pid && who.uid == geteuid() && who.start_time > 0 && !who.bus_name);
    who.uid += 4711; /* as if it were another's */
    polkit.yes = true;
    polkit.n_checks = 0;
    assert(ask(a, &who, ACTION_USE_BACKGROUND) == 1 && polkit.n_checks == 1);
    assert(strcmp(polkit.kind, "unix-process") == 0 && polkit.pid == (uint32_t)pid);
    assert(polkit.start_time == who.start_time && polkit.uid == (int32_t)who.uid);
    if (who.pidfd < 0) {
        puts("this kernel has no SO_PEERPIDFD: processes that end were left out");
        end_child(pid, fd);
    } else {
        /* It ends while polkit thinks: the yes may be about another process of that number. */
        polkit.hold = true;
        authority_check(a, &who, ACTION_USE_BACKGROUND, NULL, on_answer, &answer);
        while (polkit.n_checks < 2)
            assert(sd_event_run(event, UINT64_MAX) >= 0);
        polkit.hold = false;
        authority_forget(a, &who);
        assert(answer.r == -ECANCELED);
        answer = (struct answer){0};
        authority_check(a, &who, ACTION_USE_BACKGROUND, NULL, on_answer, &answer);
        end_child(pid, fd); /* the call is on its way, or waits in our queue */
        while (answer.n == 0)
            assert(sd_event_run(event, UINT64_MAX) >= 0);
        assert(answer.r == 0 && polkit.n_checks == 3);

        /* It ended before we looked, or before it asks: polkit is not even asked. */
        assert(ask(a, &who, ACTION_USE_BACKGROUND) == 0 && polkit.n_checks == 3);
        assert(client_identity_of_socket(&late, fd) == 0 && late.pid == 0);
        late.uid += 4711;
        assert(ask(a, &late, ACTION_USE) == 0 && polkit.n_checks == 3);
        client_identity_done(&late);
    }
    client_identity_done(&who);
    close(fd);
    close(listener);
    authority_free(a);
}

int main(void)
{
    char command[300];
    pid_t broker;
    sd_bus *bus;

    assert(mkdtemp(folder));
    signal(SIGPIPE, SIG_IGN);
    assert(sd_event_default(&event) >= 0);
    broker = start_broker();
    bus = connect_bus();
    test_without_polkit(bus);
    start_polkit();
    test_answers(bus);
    test_waiting(bus);
    test_process(bus);
    stop_polkit();
    sd_bus_flush_close_unref(bus);
    sd_event_unref(event);
    kill(broker, SIGTERM);
    waitpid(broker, NULL, 0);
    snprintf(command, sizeof(command), "rm -rf '%s'", folder);
    assert(system(command) == 0);
    return 0;
}
