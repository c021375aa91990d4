/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/model-loader.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/thread-signals.h"
#include "daemon/prefetch-child.h"
#include "engine/model-file.h"
#include "engine/model.h"

struct model_loader {
    pthread_t thread;
    bool started, joined;
    int fd; /* eventfd: the thread is done */
    sd_event_source *source;
    char *path;
    struct prefetch_child *reader; /* borrowed */
    model_loader_done done;
    void *userdata;

    /* the thread's until it is done */
    struct model *model;
    int result;
    struct error error;
};

/* It begins to read before the rest of the file is looked at. What fails there it says itself. */
static void tell_reader(const struct model_loader *l, const struct model_file *f)
{
    CLEANUP(read_order_done) struct read_order order = {0};

    if (l->reader && model_read_order(&order, f, PREFETCH_PIECE_BYTES) == 0)
        (void)prefetch_child_open(l->reader, model_file_fd(f), &order);
}

static int open_model(struct model_loader *l)
{
    struct model_file *f;
    int r;

    r = model_file_open(&f, l->path, &l->error);
    if (r < 0)
        return r;
    tell_reader(l, f);
    return model_open_file(&l->model, f, &l->error);
}

static void *loader_run(void *userdata)
{
    struct model_loader *l = userdata;
    uint64_t one = 1;

    pthread_setname_np(pthread_self(), "loader");
    l->result = open_model(l);
    (void)!write(l->fd, &one, sizeof(one)); /* the counter is 0 */
    return NULL;
}

static int on_done(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct model_loader *l = userdata;
    struct error err;

    (void)fd;
    (void)revents;
    sd_event_source_set_enabled(source, SD_EVENT_OFF);
    pthread_join(l->thread, NULL);
    l->joined = true;
    err = l->error; /* the receiver frees l */
    l->done(l->userdata, TAKE_PTR(l->model), l->result, &err);
    return 0;
}

int model_loader_new(struct model_loader **ret, sd_event *event, const char *path,
                     struct prefetch_child *reader, model_loader_done done, void *userdata)
{
    CLEANUP(model_loader_freep) struct model_loader *l = calloc(1, sizeof(*l));
    sigset_t all, old;
    int r;

    if (!l)
        return -ENOMEM;
    l->reader = reader;
    l->done = done;
    l->userdata = userdata;
    l->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (l->fd < 0)
        return -errno;
    l->path = strdup(path);
    if (!l->path)
        return -ENOMEM;
    r = sd_event_add_io(event, &l->source, l->fd, EPOLLIN, on_done, l);
    if (r < 0)
        return r;
    thread_signals_for_others(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = pthread_create(&l->thread, NULL, loader_run, l);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r != 0)
        return -r;
    l->started = true;
    *ret = TAKE_PTR(l);
    return 0;
}

struct model_loader *model_loader_free(struct model_loader *l)
{
    if (!l)
        return NULL;
    if (l->started && !l->joined)
        pthread_join(l->thread, NULL);
    model_free(l->model);
    sd_event_source_disable_unref(l->source);
    closep(&l->fd);
    free(l->path);
    free(l);
    return NULL;
}

void model_loader_freep(struct model_loader **l)
{
    *l = model_loader_free(*l);
}
