/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/fd-store.h"

#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/log.h"

#define NAME_BYTES 64u
#define FDS_MAX 4u       /* at once */
#define TELL_USEC 500000 /* to wait for the manager, when it is slow to take a message */

struct fd_store {
    int socket;                 /* to the manager; negative: there is none */
    struct sockaddr_un manager; /* [manager_bytes] */
    socklen_t manager_bytes;
    bool is_slow; /* it did not take the last message */
    bool left;
    bool told; /* that it cannot be told, in the log */
    char **names;
    int *fds; /* [n]; negative: taken */
    size_t n;
};

static void free_names(char **names)
{
    for (char **name = names; name && *name; name++)
        free(*name);
    free(names);
}

static int find_manager(struct fd_store *s)
{
    const struct timeval most = {.tv_usec = TELL_USEC};
    const char *path = getenv("NOTIFY_SOCKET");
    size_t n = path ? strlen(path) : 0;

    if (n < 2 || (path[0] != '/' && path[0] != '@') || n >= sizeof(s->manager.sun_path))
        return 0;
    s->manager.sun_family = AF_UNIX;
    memcpy(s->manager.sun_path, path, n);
    if (path[0] == '@')
        s->manager.sun_path[0] = 0;
    s->manager_bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n + (path[0] == '/'));
    s->socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s->socket < 0 || setsockopt(s->socket, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof(most)) < 0)
        return -errno;
    return 0;
}

int fd_store_take(struct fd_store **ret)
{
    CLEANUP(fd_store_freep) struct fd_store *s = calloc(1, sizeof(*s));
    int n;

    if (!s)
        return -ENOMEM;
    s->socket = -EBADF;
    n = sd_listen_fds_with_names(/* unset_environment= */ 1, &s->names);
    if (n < 0)
        return n;
    if (n > 0) {
        s->fds = calloc((size_t)n, sizeof(s->fds[0]));
        if (!s->fds)
            return -ENOMEM;
    }
    for (; s->n < (size_t)n; s->n++)
        s->fds[s->n] = SD_LISTEN_FDS_START + (int)s->n;
    n = find_manager(s); /* after those: it takes a number */
    if (n < 0)
        return n;
    *ret = TAKE_PTR(s);
    return 0;
}

struct fd_store *fd_store_free(struct fd_store *s)
{
    if (!s)
        return NULL;
    for (size_t i = 0; i < s->n; i++)
        closep(&s->fds[i]);
    free(s->fds);
    free_names(s->names);
    closep(&s->socket);
    free(s);
    return NULL;
}

void fd_store_freep(struct fd_store **s)
{
    *s = fd_store_free(*s);
}

static const char *name_of(const struct fd_store *s, size_t i)
{
    return s->names && s->names[i] ? s->names[i] : "unknown";
}

/* ---- what the manager is told ---- */

/*
 * As sd_pid_notify_with_fds(), which waits for ever where nobody reads the messages: nobody's
 * answer depends on that.
 */
static int tell(struct fd_store *s, const char *text, const int *fds, size_t n)
{
    struct iovec part = {.iov_base = (char *)text, .iov_len = strlen(text)};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * FDS_MAX)] = {0};
    struct msghdr m = {.msg_name = &s->manager,
                       .msg_namelen = s->manager_bytes,
                       .msg_iov = &part,
                       .msg_iovlen = 1};

    if (n > FDS_MAX)
        return -E2BIG;
    if (n > 0) {
        struct cmsghdr *c;

        m.msg_control = control;
        m.msg_controllen = CMSG_SPACE(sizeof(int) * n);
        c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * n);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * n);
    }
    /* Once it did not take one in time, none is waited for until it takes some again. */
    while (sendmsg(s->socket, &m, MSG_NOSIGNAL | (s->is_slow ? MSG_DONTWAIT : 0)) < 0) {
        if (errno == EINTR)
            continue;
        s->is_slow = errno == EAGAIN;
        return -errno;
    }
    s->is_slow = false;
    return 0;
}

int fd_store_push(struct fd_store *s, const char *name, const int *fds, size_t n)
{
    char text[NAME_BYTES + 32];
    int r;

    if (!s || s->socket < 0 || s->left)
        return 0;
    snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=%s", name);
    r = tell(s, text, fds, n);
    if (r >= 0)
        return 0;
    if (!s->told)
        log_warning("the service manager cannot be told what to keep: %s; what is said now may not "
                    "outlive this process",
                    strerror(-r));
    s->told = true;
    return r;
}

/* What it cannot be told of is lost with the service at the latest. */
void fd_store_remove(struct fd_store *s, const char *name)
{
    char text[NAME_BYTES + 32];

    if (!s || s->socket < 0 || s->left)
        return;
    snprintf(text, sizeof(text), "FDSTOREREMOVE=1\nFDNAME=%s", name);
    (void)tell(s, text, NULL, 0);
}

int fd_store_push_id(struct fd_store *s, const char *prefix, uint64_t id, const int *fds, size_t n)
{
    char name[NAME_BYTES];

    snprintf(name, sizeof(name), "%s-%" PRIu64, prefix, id);
    return fd_store_push(s, name, fds, n);
}

void fd_store_remove_id(struct fd_store *s, const char *prefix, uint64_t id)
{
    char name[NAME_BYTES];

    snprintf(name, sizeof(name), "%s-%" PRIu64, prefix, id);
    fd_store_remove(s, name);
}

void fd_store_leave(struct fd_store *s)
{
    s->left = true;
}

/* ---- what was inherited ---- */

int fd_store_next(struct fd_store *s, const char *name, int *ret_fd)
{
    for (size_t i = 0; i < s->n; i++) {
        if (s->fds[i] < 0 || strcmp(name_of(s, i), name) != 0)
            continue;
        *ret_fd = TAKE_FD(s->fds[i]);
        return 1;
    }
    return 0;
}

/* A number as we write them: nothing before it or behind, and no other way to write the same. */
static bool parse_id(const char *text, uint64_t *ret)
{
    char *end;

    if (text[0] < '1' || text[0] > '9')
        return false;
    errno = 0;
    *ret = strtoull(text, &end, 10);
    return errno == 0 && *end == 0;
}

int fd_store_next_id(struct fd_store *s, const char *prefix, uint64_t *ret_id, int *ret_fd)
{
    size_t n = strlen(prefix);

    for (size_t i = 0; i < s->n; i++) {
        const char *name = name_of(s, i);

        if (s->fds[i] < 0 || strncmp(name, prefix, n) != 0 || name[n] != '-' ||
            !parse_id(name + n + 1, ret_id))
            continue;
        *ret_fd = TAKE_FD(s->fds[i]);
        return 1;
    }
    return 0;
}

void fd_store_drop(struct fd_store *s, const char *name)
{
    int fd;

    while (fd_store_next(s, name, &fd) > 0)
        close(fd);
    fd_store_remove(s, name);
}

void fd_store_drop_rest(struct fd_store *s)
{
    for (size_t i = 0; i < s->n; i++) {
        if (s->fds[i] < 0 || strncmp(name_of(s, i), "connection-", strlen("connection-")) == 0)
            continue;
        log_warning("inherited descriptor %d (%s) is none of ours: a listening Unix stream socket "
                    "named llmd is wanted; closed",
                    s->fds[i], name_of(s, i));
        close(TAKE_FD(s->fds[i]));
    }
}
