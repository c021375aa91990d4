/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/server.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/client-session.h"
#include "daemon/connection.h"
#include "daemon/log.h"
#include "daemon/service.h"

#define CONNECTIONS_MAX 64u
#define GRACE_USEC 2000000u /* for readers to take what a stopped request still has to say */

struct client {
    struct server *server;
    struct connection *connection;
    struct client *previous, *next; /* server::clients */
};

struct server {
    char *path;
    int lock_fd;   /* SOCKET.lock, locked */
    int listen_fd; /* after server_start() */
    uint64_t idle_usec;

    sd_event *event;
    struct service *service; /* borrowed */
    sd_event_source *listen_source, *term_source, *int_source;
    sd_event_source *idle_timer, *grace_timer;
    struct session_set *sessions; /* borrowed */
    struct client *clients;
    uint32_t n_clients;
};

/* SOCKET.suffix, opened for flock. */
static int open_lock(const char *path, const char *suffix, struct error *err)
{
    CLEANUP(freep) char *name = NULL;
    int fd;

    if (asprintf(&name, "%s.%s", path, suffix) < 0) {
        name = NULL;
        return error_set(err, ENOMEM, "out of memory");
    }
    fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    return fd < 0 ? error_set(err, errno, "%s: %s", name, strerror(errno)) : fd;
}

/* A killed daemon's socket may lie there; nothing else that does is ours to replace. */
static int check_place(const char *path, struct error *err)
{
    struct stat st;

    if (lstat(path, &st) == 0 && !S_ISSOCK(st.st_mode))
        return error_set(err, EEXIST, "%s: is there and is not a socket; choose another path",
                         path);
    return 0;
}

/* From now on nobody finds us, and another may take our place. */
static void stop_listening(struct server *s)
{
    if (s->listen_fd < 0)
        return;
    unlink(s->path);
    s->listen_source = sd_event_source_disable_unref(s->listen_source);
    close(TAKE_FD(s->listen_fd));
    close(TAKE_FD(s->lock_fd));
}

static void client_gone(struct connection *c, void *userdata)
{
    struct client *client = userdata;
    struct server *s = client->server;

    connection_free(c);
    if (client->previous)
        client->previous->next = client->next;
    else
        s->clients = client->next;
    if (client->next)
        client->next->previous = client->previous;
    s->n_clients--;
    free(client);
}

static bool is_idle(const struct server *s)
{
    return s->n_clients == 0 && session_set_is_quiet(s->sessions);
}

/* After anything that may have been the last: leave, or get ready to. */
void server_something_went(void *userdata)
{
    struct server *s = userdata;

    if (session_set_is_stopping(s->sessions)) {
        if (session_set_is_quiet(s->sessions))
            sd_event_exit(s->event, 0);
        return;
    }
    if (s->listen_source)
        sd_event_source_set_enabled(s->listen_source, SD_EVENT_ON);
    if (s->idle_usec == 0)
        return;
    if (!is_idle(s)) {
        sd_event_source_set_enabled(s->idle_timer, SD_EVENT_OFF);
    } else {
        sd_event_source_set_time_relative(s->idle_timer, s->idle_usec);
        sd_event_source_set_enabled(s->idle_timer, SD_EVENT_ONESHOT);
    }
}

static void on_connection_gone(struct connection *c, void *userdata)
{
    struct client *client = userdata;
    struct server *s = client->server;

    client_gone(c, client);
    server_something_went(s);
}

static void admit(struct server *s, int fd)
{
    CLEANUP(closep) int owned = fd;
    CLEANUP(client_identity_done) struct client_identity peer = {.pidfd = -EBADF};
    struct client *client;
    int r;

    r = client_identity_of_socket(&peer, fd);
    if (r < 0 || peer.uid != geteuid()) {
        log_warning("refused a connection of user %d", r < 0 ? -1 : (int)peer.uid);
        return;
    }
    if (s->n_clients >= CONNECTIONS_MAX) {
        log_warning("refused a connection of process %d: all %u are in use", (int)peer.pid,
                    CONNECTIONS_MAX);
        return;
    }
    client = calloc(1, sizeof(*client));
    if (!client) {
        log_warning("refused a connection: out of memory");
        return;
    }
    client->server = s;
    r = connection_new(&client->connection, s->service, TAKE_FD(owned), &peer, on_connection_gone,
                       client);
    if (r < 0) {
        log_warning("refused a connection: %s", strerror(-r));
        free(client);
        return;
    }
    client->next = s->clients;
    if (client->next)
        client->next->previous = client;
    s->clients = client;
    s->n_clients++;
}

static int on_accept(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct server *s = userdata;

    (void)revents;
    for (;;) {
        int client_fd = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (client_fd >= 0) {
            admit(s, client_fd);
        } else if (errno == EAGAIN) {
            break;
        } else if (errno != EINTR && errno != ECONNABORTED) {
            /* Out of descriptors, it seems: until one is free again. */
            log_warning("cannot accept a connection: %s", strerror(errno));
            sd_event_source_set_enabled(source, SD_EVENT_OFF);
            break;
        }
    }
    if (s->idle_usec > 0 && s->n_clients > 0)
        sd_event_source_set_enabled(s->idle_timer, SD_EVENT_OFF);
    return 0;
}

static int on_idle(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct server *s = userdata;
    CLEANUP(closep) int start_fd = -EBADF;

    (void)source;
    (void)usec;
    if (!is_idle(s) || session_set_is_stopping(s->sessions))
        return 0;
    start_fd = open_lock(s->path, "start", NULL);
    if (start_fd >= 0 && flock(start_fd, LOCK_EX | LOCK_NB) < 0) {
        server_something_went(s); /* somebody is about to come: wait again */
        return 0;
    }
    on_accept(s->listen_source, s->listen_fd, EPOLLIN, s); /* came while we made up our mind */
    if (!is_idle(s))
        return 0;
    stop_listening(s);
    log_info("nobody is here any more; leaving");
    session_set_stop(s->sessions);
    sd_event_exit(s->event, 0);
    return 0;
}

static int on_grace_over(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct server *s = userdata;

    (void)source;
    (void)usec;
    session_set_cut_streams(s->sessions); /* its changes lead to server_something_went() */
    return 0;
}

static int on_signal(sd_event_source *source, const struct signalfd_siginfo *info, void *userdata)
{
    struct server *s = userdata;

    (void)source;
    if (session_set_is_stopping(s->sessions)) {
        session_set_cut_streams(s->sessions); /* asked twice: no grace */
        return 0;
    }
    log_info("stopping (signal %u)", info->ssi_signo);
    sd_notify(0, "STOPPING=1");
    stop_listening(s);
    session_set_stop(s->sessions);
    sd_event_source_set_enabled(s->grace_timer, SD_EVENT_ONESHOT);
    sd_event_source_set_time_relative(s->grace_timer, GRACE_USEC);
    server_something_went(s);
    return 0;
}

int server_new(struct server **ret, const struct server_options *options, struct error *err)
{
    CLEANUP(server_freep) struct server *s = NULL;
    int r;

    s = calloc(1, sizeof(*s));
    if (!s)
        return error_set(err, ENOMEM, "out of memory");
    s->lock_fd = s->listen_fd = -EBADF;
    s->idle_usec = options->idle_usec;
    if (strlen(options->socket_path) >= sizeof(((struct sockaddr_un *)NULL)->sun_path))
        return error_set(err, ENAMETOOLONG, "%s: the path of a socket has at most %zu bytes",
                         options->socket_path, sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1);
    s->path = strdup(options->socket_path);
    if (!s->path)
        return error_set(err, ENOMEM, "out of memory");
    r = check_place(s->path, err);
    if (r < 0)
        return r;
    s->lock_fd = open_lock(s->path, "lock", err);
    if (s->lock_fd < 0)
        return s->lock_fd;
    if (flock(s->lock_fd, LOCK_EX | LOCK_NB) < 0)
        return error_set(err, EADDRINUSE, "%s: another llmd serves there, or is about to", s->path);
    *ret = TAKE_PTR(s);
    return 0;
}

static int start_listening(struct server *s, struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CLEANUP(closep) int fd = -EBADF;

    memcpy(address.sun_path, s->path, strlen(s->path) + 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_set(err, errno, "socket: %s", strerror(errno));
    unlink(s->path); /* what a killed one left; ours by the lock */
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 64) < 0)
        return error_set(err, errno, "%s: cannot listen: %s", s->path, strerror(errno));
    s->listen_fd = TAKE_FD(fd);
    return 0;
}

int server_start(struct server *s, struct service *service, struct error *err)
{
    sd_event *event = service->event;
    int r;

    s->service = service;
    s->sessions = service->sessions;
    s->event = sd_event_ref(event);
    r = sd_event_add_time_relative(event, &s->idle_timer, CLOCK_MONOTONIC, s->idle_usec, 0, on_idle,
                                   s);
    if (r >= 0)
        r = sd_event_add_time_relative(event, &s->grace_timer, CLOCK_MONOTONIC, 0, 0, on_grace_over,
                                       s);
    if (r >= 0)
        r = sd_event_source_set_enabled(s->grace_timer, SD_EVENT_OFF);
    if (r >= 0 && s->idle_usec == 0)
        r = sd_event_source_set_enabled(s->idle_timer, SD_EVENT_OFF);
    if (r >= 0)
        r = sd_event_add_signal(event, &s->term_source, SIGTERM, on_signal, s);
    if (r >= 0)
        r = sd_event_add_signal(event, &s->int_source, SIGINT, on_signal, s);
    if (r < 0)
        return error_set(err, -r, "cannot set up the event loop: %s", strerror(-r));

    r = start_listening(s, err);
    if (r < 0)
        return r;
    r = sd_event_add_io(event, &s->listen_source, s->listen_fd, EPOLLIN, on_accept, s);
    return r < 0 ? error_set(err, -r, "cannot set up the event loop: %s", strerror(-r)) : 0;
}

struct server *server_free(struct server *s)
{
    if (!s)
        return NULL;
    stop_listening(s);
    while (s->clients)
        client_gone(s->clients->connection, s->clients);
    sd_event_source_disable_unref(s->idle_timer);
    sd_event_source_disable_unref(s->grace_timer);
    sd_event_source_disable_unref(s->term_source);
    sd_event_source_disable_unref(s->int_source);
    sd_event_unref(s->event);
    closep(&s->lock_fd);
    free(s->path);
    free(s);
    return NULL;
}

void server_freep(struct server **s)
{
    *s = server_free(*s);
}
