/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A transfer is its thread's from start to the write to its eventfd, then the loop's. When the
 * daemon ends first, the thread and what it works on are left to the end of the process: nothing
 * waits for it.
 */

#include "daemon/file-transfer.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/users.h"

#define TRANSFERS_MAX 64u
#define TRANSFERS_OF_USER_MAX 4u
#define STACK_BYTES (256u * 1024) /* sanitizers want some */
#define READ_BYTES 65536u

struct transfer {
    int fd, done_fd;
    bool writes;
    size_t most;
    struct buffer data;
    int result;

    struct user *user;
    sd_event_source *source;
    file_transferred done;
    void *userdata;
    struct transfer *previous, *next; /* transfers */
};

/* loop thread */
static struct transfer *transfers;
static uint32_t n_transfers;

/* What the loop has of it. */
static void let_go(struct transfer *t)
{
    t->source = sd_event_source_disable_unref(t->source);
    *(t->previous ? &t->previous->next : &transfers) = t->next;
    if (t->next)
        t->next->previous = t->previous;
    t->user->n_transfers--;
    n_transfers--;
    t->user = user_unref(t->user);
}

static void transfer_free(struct transfer *t)
{
    let_go(t);
    closep(&t->fd);
    closep(&t->done_fd);
    if (t->data.data)
        explicit_bzero(t->data.data, t->data.allocated); /* a conversation, or what may be one */
    buffer_done(&t->data);
    free(t);
}

static int read_all(struct transfer *t)
{
    for (;;) {
        ssize_t n;
        int r;

        r = buffer_reserve(&t->data, READ_BYTES);
        if (r < 0)
            return r;
        n = read(t->fd, t->data.data + t->data.n, READ_BYTES);
        if (n == 0)
            return 0;
        if (n < 0 && errno != EINTR)
            return -errno;
        if (n > 0)
            t->data.n += (size_t)n;
        if (t->data.n > t->most)
            return -EFBIG;
    }
}

static int write_all(struct transfer *t)
{
    for (size_t at = 0; at < t->data.n;) {
        ssize_t n = write(t->fd, t->data.data + at, t->data.n - at);

        if (n < 0 && errno != EINTR)
            return -errno;
        if (n > 0)
            at += (size_t)n;
    }
    return 0;
}

static void *transfer_run(void *userdata)
{
    struct transfer *t = userdata;
    uint64_t one = 1;

    pthread_setname_np(pthread_self(), "llmd-file");
    t->result = t->writes ? write_all(t) : read_all(t);
    (void)!write(t->done_fd, &one, sizeof(one)); /* the last that is done with t here */
    return NULL;
}

static int on_done(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct transfer *t = userdata;
    uint64_t count;

    (void)source;
    (void)revents;
    if (read(fd, &count, sizeof(count)) < 0)
        return 0;
    t->done(t->userdata, t->result, &t->data);
    transfer_free(t);
    return 0;
}

static int start_thread(struct transfer *t)
{
    pthread_attr_t attributes;
    pthread_t thread;
    int r;

    r = pthread_attr_init(&attributes);
    if (r > 0)
        return -r;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    r = pthread_create(&thread, &attributes, transfer_run, t);
    pthread_attr_destroy(&attributes);
    return -r;
}

static int start(sd_event *event, struct user *user, int fd, const struct transfer *what,
                 struct buffer *data)
{
    struct transfer *t;
    int r;

    if (n_transfers >= TRANSFERS_MAX || user->n_transfers >= TRANSFERS_OF_USER_MAX)
        return -EDQUOT;
    t = malloc(sizeof(*t));
    if (!t)
        return -ENOMEM;
    *t = *what;
    t->user = user_ref(user);
    user->n_transfers++;
    n_transfers++;
    t->next = transfers;
    if (t->next)
        t->next->previous = t;
    transfers = t;
    t->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    t->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    r = t->fd < 0 || t->done_fd < 0 ? -errno : 0;
    if (r >= 0)
        r = sd_event_add_io(event, &t->source, t->done_fd, EPOLLIN, on_done, t);
    if (data)
        t->data = *data;
    if (r >= 0)
        r = start_thread(t);
    if (r < 0) {
        t->data = (struct buffer){0};
        transfer_free(t);
        return r;
    }
    if (data)
        *data = (struct buffer){0};
    return 0;
}

int file_read_start(sd_event *event, struct user *user, int fd, size_t most, file_transferred done,
                    void *userdata)
{
    struct transfer what = {
        .fd = -EBADF, .done_fd = -EBADF, .most = most, .done = done, .userdata = userdata};

    return start(event, user, fd, &what, NULL);
}

int file_write_start(sd_event *event, struct user *user, int fd, struct buffer *data,
                     file_transferred done, void *userdata)
{
    struct transfer what = {
        .fd = -EBADF, .done_fd = -EBADF, .writes = true, .done = done, .userdata = userdata};

    return start(event, user, fd, &what, data);
}

void file_transfers_abandon(void)
{
    while (transfers) {
        struct transfer *t = transfers;
        struct buffer none = {0};
        uint64_t count;

        if (read(t->done_fd, &count, sizeof(count)) >= 0) { /* it was quicker */
            t->done(t->userdata, t->result, &t->data);
            transfer_free(t);
            continue;
        }
        let_go(t);
        t->done(t->userdata, -ESHUTDOWN, &none);
    }
}
