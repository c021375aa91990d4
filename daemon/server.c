/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Nobody is kept out by somebody who opens many connections: each uid has its own limit, which
 * connection_new() knows; a connection whose peer has not said who it is within HANDSHAKE_USEC is
 * closed; where all places of a uid are taken, its oldest one that was never used makes place; and
 * where all of the daemon's are, one of the uid that has most does.
 */

#include "daemon/server.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <systemd/sd-event.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/client-identity.h"
#include "daemon/connection.h"
#include "daemon/fd-store.h"
#include "daemon/log.h"
#include "daemon/service.h"
#include "daemon/users.h"

#define INHERITED_MAX 8
#define HANDSHAKE_USEC UINT64_C(5000000)

struct guest {
    struct server *server;
    struct connection *connection;
    uid_t uid;
    sd_event_source *handshake_timer;
    bool ready;                    /* it has said who it is, or was not looked at again yet */
    struct guest *previous, *next; /* server::guests, newest first */
};

struct server {
    struct service *service; /* borrowed */
    char *path;              /* NULL: inherited */
    bool any_user;
    uint32_t max_connections;
    int lock_fd;                   /* SOCKET.lock, locked */
    int start_fd;                  /* SOCKET.start, locked while it leaves */
    int listen_fds[INHERITED_MAX]; /* [n_listen] */
    sd_event_source *listen_sources[INHERITED_MAX];
    size_t n_listen;
    struct guest *guests;
    uint32_t n_guests;

    struct log_limit refusals;
};

/* ---- who comes in ---- */

/* Who is refused can try again at once, so the log has a limit. */
static void say_refused(struct server *s, const struct client_identity *who, const char *why)
{
    uint32_t untold;

    if (!log_limit_pass(&s->refusals, &untold))
        return;
    if (untold > 0)
        log_warning("refused %u more connections", untold);
    log_with(LOG_WARNING,
             &(struct log_fields){
                 .message_id = LOG_ID_CONNECTION_REFUSED, .has_uid = true, .uid = who->uid},
             "refused a connection of user %d, process %d: %s", (int)who->uid, (int)who->pid, why);
}

static void guest_free(struct guest *g)
{
    struct server *s = g->server;

    *(g->previous ? &g->previous->next : &s->guests) = g->next;
    if (g->next)
        g->next->previous = g->previous;
    s->n_guests--;
    sd_event_source_disable_unref(g->handshake_timer);
    connection_free(g->connection);
    free(g);
}

static void on_connection_gone(struct connection *c, void *userdata)
{
    struct guest *g = userdata;
    struct service *service = g->server->service;

    (void)c;
    guest_free(g);
    service_something_went(service);
}

static int on_handshake_late(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct guest *g = userdata;

    (void)source;
    (void)usec;
    if (connection_is_ready(g->connection))
        g->ready = true;
    else
        on_connection_gone(g->connection, g);
    return 0;
}

static uint32_t n_of_user(const struct server *s, uid_t uid)
{
    const struct user *u = users_find(s->service->users, uid);

    return u ? u->n_connections : 0;
}

static bool is_silent(struct guest *g)
{
    g->ready = g->ready || connection_is_ready(g->connection);
    return !g->ready;
}

/* The oldest silent connection of the uid that has most; not of one that has no more than uid. */
static bool make_place(struct server *s, uid_t uid)
{
    struct guest *found = NULL;
    uint32_t most = n_of_user(s, uid);

    for (struct guest *g = s->guests; g; g = g->next) {
        uint32_t n = n_of_user(s, g->uid);

        if (!is_silent(g) || n < most || (n == most && (!found || found->uid != g->uid)))
            continue;
        most = n;
        found = g;
    }
    if (!found)
        return false;
    guest_free(found);
    return true;
}

/* Where the uid has as many as it may: its oldest silent one goes. */
static void make_place_among_own(struct server *s, uid_t uid)
{
    const struct user *u = users_find(s->service->users, uid);
    struct guest *found = NULL;

    if (!u || u->n_connections < u->limits.max_connections)
        return;
    for (struct guest *g = s->guests; g; g = g->next)
        if (g->uid == uid && is_silent(g))
            found = g;
    if (found)
        guest_free(found);
}

static void admit(struct server *s, int fd)
{
    CLEANUP(client_identity_done) struct client_identity who = {.pidfd = -EBADF};
    CLEANUP(closep) int owned = fd;
    struct guest *g;
    int r;

    r = client_identity_of_socket(&who, fd);
    if (r < 0) {
        who.uid = (uid_t)-1;
        say_refused(s, &who, strerror(-r));
        return;
    }
    if (!s->any_user && who.uid != geteuid()) {
        say_refused(s, &who, "this daemon serves another user");
        return;
    }
    make_place_among_own(s, who.uid);
    if (s->n_guests >= s->max_connections && !make_place(s, who.uid)) {
        say_refused(s, &who, "all connections of the daemon are in use");
        return;
    }
    g = calloc(1, sizeof(*g));
    if (!g) {
        say_refused(s, &who, "out of memory");
        return;
    }
    *g = (struct guest){.server = s, .uid = who.uid};
    r = sd_event_add_time_relative(s->service->event, &g->handshake_timer, CLOCK_MONOTONIC,
                                   HANDSHAKE_USEC, 0, on_handshake_late, g);
    if (r >= 0) {
        struct client_identity given = who; /* for the log, what it was told is kept */

        who.pidfd = -EBADF;
        r = connection_new(&g->connection, s->service, TAKE_FD(owned), &given, on_connection_gone,
                           g);
    }
    if (r < 0) {
        say_refused(s, &who,
                    r == -EDQUOT ? "it has as many as it may (MaxConnections=)" : strerror(-r));
        sd_event_source_disable_unref(g->handshake_timer);
        free(g);
        return;
    }
    g->next = s->guests;
    if (g->next)
        g->next->previous = g;
    s->guests = g;
    s->n_guests++;
}

static int on_accept(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct server *s = userdata;
    uint32_t before = s->n_guests;

    (void)revents;
    /* Only so many at once: others are to be served as well. */
    for (int i = 0; i < 64; i++) {
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
    if (s->n_guests != before)
        service_something_went(s->service); /* came, rather: it is not idle now */
    return 0;
}

void server_something_went(struct server *s)
{
    for (size_t i = 0; i < s->n_listen; i++)
        if (s->listen_sources[i])
            sd_event_source_set_enabled(s->listen_sources[i], SD_EVENT_ON);
}

void server_set_max_connections(struct server *s, uint32_t n)
{
    s->max_connections = n;
}

/* ---- sockets ---- */

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

/* Those of the service manager that are meant for this. */
static void take_inherited(struct server *s)
{
    static const char *const names[] = {"llmd", "llmd.socket", "unknown", ""};
    int fd;

    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        while (fd_store_next(s->service->store, names[i], &fd) > 0) {
            if (s->n_listen < INHERITED_MAX && sd_is_socket_unix(fd, SOCK_STREAM, 1, NULL, 0) > 0 &&
                fcntl(fd, F_SETFL, O_NONBLOCK) >= 0) {
                s->listen_fds[s->n_listen++] = fd;
                continue;
            }
            log_warning("inherited descriptor %d (%s) is none of ours: a listening Unix stream "
                        "socket named llmd is wanted; closed",
                        fd, names[i]);
            close(fd);
        }
    }
}

int server_new(struct server **ret, struct service *service, const struct server_options *options,
               struct error *err)
{
    CLEANUP(server_freep) struct server *s = NULL;
    int r;

    s = calloc(1, sizeof(*s));
    if (!s)
        return error_set(err, ENOMEM, "out of memory");
    s->service = service;
    s->any_user = options->any_user;
    s->max_connections = options->max_connections;
    s->lock_fd = s->start_fd = -EBADF;
    take_inherited(s);
    if (s->n_listen > 0) {
        *ret = TAKE_PTR(s);
        return 0;
    }

    if (strlen(options->path) >= sizeof(((struct sockaddr_un *)NULL)->sun_path))
        return error_set(err, ENAMETOOLONG, "%s: the path of a socket has at most %zu bytes",
                         options->path, sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1);
    s->path = strdup(options->path);
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
    /* Now, since the sandbox does not let any file there be opened. */
    s->start_fd = open_lock(s->path, "start", err);
    if (s->start_fd < 0)
        return s->start_fd;
    *ret = TAKE_PTR(s);
    return 0;
}

static int make_socket(struct server *s, struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CLEANUP(closep) int fd = -EBADF;
    mode_t mask;
    int r;

    memcpy(address.sun_path, s->path, strlen(s->path) + 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_set(err, errno, "socket: %s", strerror(errno));
    unlink(s->path);                         /* what a killed one left; ours by the lock */
    mask = umask(s->any_user ? 0111 : 0177); /* no other thread makes files now */
    r = bind(fd, (struct sockaddr *)&address, sizeof(address));
    umask(mask);
    if (r < 0 || listen(fd, 128) < 0)
        return error_set(err, errno, "%s: cannot listen: %s", s->path, strerror(errno));
    s->listen_fds[s->n_listen++] = TAKE_FD(fd);
    return 0;
}

int server_start(struct server *s, struct error *err)
{
    int r = 0;

    if (s->path) {
        r = make_socket(s, err);
        if (r < 0)
            return r;
    }
    for (size_t i = 0; i < s->n_listen && r >= 0; i++)
        r = sd_event_add_io(s->service->event, &s->listen_sources[i], s->listen_fds[i], EPOLLIN,
                            on_accept, s);
    return r < 0 ? error_set(err, -r, "cannot set up the event loop: %s", strerror(-r)) : 0;
}

void server_stop(struct server *s)
{
    if (s->path && s->n_listen > 0)
        unlink(s->path); /* an inherited one stays: who holds it starts us again */
    while (s->n_listen > 0) {
        s->n_listen--;
        s->listen_sources[s->n_listen] =
            sd_event_source_disable_unref(s->listen_sources[s->n_listen]);
        close(TAKE_FD(s->listen_fds[s->n_listen]));
    }
    closep(&s->lock_fd);
    closep(&s->start_fd);
    s->lock_fd = s->start_fd = -EBADF;
}

void server_close_all(struct server *s)
{
    while (s->guests)
        guest_free(s->guests);
}

bool server_leave(struct server *s)
{
    if (s->start_fd >= 0 && flock(s->start_fd, LOCK_EX | LOCK_NB) < 0)
        return false;
    for (size_t i = 0; i < s->n_listen; i++) /* who came while we made up our mind */
        if (s->listen_sources[i])
            on_accept(s->listen_sources[i], s->listen_fds[i], EPOLLIN, s);
    if (s->n_guests > 0) {
        if (s->start_fd >= 0)
            flock(s->start_fd, LOCK_UN);
        return false;
    }
    server_stop(s);
    return true;
}

struct server *server_free(struct server *s)
{
    if (!s)
        return NULL;
    server_stop(s);
    server_close_all(s);
    free(s->path);
    free(s);
    return NULL;
}

void server_freep(struct server **s)
{
    *s = server_free(*s);
}
