/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/prefetch.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/thread-signals.h"
#include "daemon/log.h"
#include "daemon/prefetch-child.h"
#include "engine/model-file.h"
#include "engine/model.h"

#ifndef MADV_POPULATE_READ /* newer than Linux 5.13 */
#define MADV_POPULATE_READ 22
#endif

/* One call of WILLNEED fetches at most the device's read-ahead, so it is given small ones. */
#define POPULATE_BYTES (size_t)(8u << 20)
#define WILLNEED_BYTES (size_t)(2u << 20)

struct prefetch {
    prefetch_handler handler;
    void *userdata;
    sd_event_source *source; /* of the child's socket, or of wake_fd */
    const char *map;
    size_t size;
    uint64_t skip_from, skip_to; /* bytes; the part between is left out */
    struct prefetch_child *child;
    uint64_t child_bytes;

    pthread_t thread;
    bool started;
    int wake_fd; /* eventfd: the thread has gone on */
    atomic_bool stop;
    atomic_bool over;
    atomic_size_t done;
};

/* ---- a thread ---- */

static void wake(struct prefetch *p)
{
    uint64_t one = 1;

    (void)!write(p->wake_fd, &one, sizeof(one)); /* full: it is readable anyway */
}

/* 0, -errno: give up */
static int fetch(struct prefetch *p, size_t from, size_t to)
{
    static atomic_bool populates = true;

    if (populates) {
        if (madvise((void *)(p->map + from), to - from, MADV_POPULATE_READ) == 0)
            return 0;
        if (errno == EFAULT || errno == EHWPOISON || errno == ENOMEM)
            return -errno; /* the file cannot be read there; who needs it will find out */
        if (errno != EINVAL && errno != EAGAIN && errno != EINTR)
            return -errno;
        populates = errno != EINVAL;
    }
    for (size_t at = from; at < to; at += WILLNEED_BYTES)
        if (madvise((void *)(p->map + at), MIN(WILLNEED_BYTES, to - at), MADV_WILLNEED) < 0)
            return -errno;
    return 0;
}

static void *prefetch_run(void *userdata)
{
    struct prefetch *p = userdata;
    const size_t end[2] = {p->skip_from, p->size}, begin[2] = {0, p->skip_to};

    pthread_setname_np(pthread_self(), "prefetch");
    for (int part = 0; part < 2; part++) {
        for (size_t at = begin[part]; at < end[part] && !p->stop;) {
            size_t to = MIN(at + POPULATE_BYTES, end[part]);

            if (fetch(p, at, to) < 0)
                goto out;
            p->done += to - at;
            at = to;
            wake(p);
        }
    }
out:
    p->over = true;
    wake(p);
    return NULL;
}

static int on_thread(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct prefetch *p = userdata;
    uint64_t n;

    (void)source;
    (void)revents;
    (void)!read(fd, &n, sizeof(n));
    p->handler(p->userdata);
    return 0;
}

static int start_thread(struct prefetch *p, sd_event *event)
{
    sigset_t blocked, old;
    int r;

    p->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p->wake_fd < 0)
        return -errno;
    r = sd_event_add_io(event, &p->source, p->wake_fd, EPOLLIN, on_thread, p);
    if (r < 0)
        return r;
    thread_signals_for_others(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &old);
    r = pthread_create(&p->thread, NULL, prefetch_run, p);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r != 0)
        return -r;
    p->started = true;
    return 0;
}

/* ---- a child ---- */

/* r < 0: it cannot go on. What it has read costs the thread nothing. */
static void child_ended(struct prefetch *p, int r)
{
    sd_event *event = sd_event_source_get_event(p->source);

    p->child = prefetch_child_free(p->child);
    p->source = sd_event_source_disable_unref(p->source);
    if (r < 0 && r != -EFAULT) {
        if (r == -EPERM || r == -ENOSYS)
            log_info("the model is read ahead by a thread: io_uring: %s", strerror(-r));
        else
            log_warning("the model is read ahead by a thread: the process for it %s%s",
                        r == -EPIPE ? "died" : "failed: ", r == -EPIPE ? "" : strerror(-r));
        r = start_thread(p, event);
        if (r >= 0)
            return;
    }
    p->over = true; /* where the file cannot be read, who needs that part will find out */
}

static int on_child(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct prefetch *p = userdata;
    int r = prefetch_child_read(p->child, &p->child_bytes);

    (void)source;
    (void)fd;
    (void)revents;
    if (r != 1)
        child_ended(p, r);
    p->handler(p->userdata);
    return 0;
}

/* ---- the whole ---- */

int prefetch_new(struct prefetch **ret, sd_event *event, const struct model *m,
                 struct prefetch_child *child, prefetch_handler handler, void *userdata)
{
    CLEANUP(prefetch_freep) struct prefetch *p = calloc(1, sizeof(*p));
    CLEANUP(read_order_done) struct read_order order = {0};
    int r;

    if (!p) {
        prefetch_child_free(child);
        return -ENOMEM;
    }
    p->child = child;
    p->wake_fd = -EBADF;
    p->handler = handler;
    p->userdata = userdata;
    p->map = model_file_map(model_get_file(m), &p->size);
    r = model_read_order(&order, model_get_file(m), POPULATE_BYTES);
    if (r < 0)
        return r;
    p->skip_from = order.not_from;
    p->skip_to = order.not_to;
    if (child)
        r = sd_event_add_io(event, &p->source, prefetch_child_fd(child), EPOLLIN, on_child, p);
    else
        r = start_thread(p, event);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(p);
    return 0;
}

struct prefetch *prefetch_free(struct prefetch *p)
{
    if (!p)
        return NULL;
    p->stop = true;
    if (p->started)
        pthread_join(p->thread, NULL);
    sd_event_source_disable_unref(p->source);
    prefetch_child_free(p->child);
    closep(&p->wake_fd);
    free(p);
    return NULL;
}

void prefetch_freep(struct prefetch **p)
{
    *p = prefetch_free(*p);
}

double prefetch_progress(const struct prefetch *p)
{
    uint64_t all = p->size - (p->skip_to - p->skip_from);
    uint64_t done = MAX(p->child_bytes, (uint64_t)p->done); /* each begins with nothing */

    return p->over || done >= all ? 1 : (double)done / (double)all;
}

bool prefetch_is_over(const struct prefetch *p)
{
    return p->over;
}
