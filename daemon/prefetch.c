/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/prefetch.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/thread-signals.h"
#include "engine/model-file.h"
#include "engine/model.h"

#ifndef MADV_POPULATE_READ /* newer than Linux 5.13 */
#define MADV_POPULATE_READ 22
#endif

/* One call of WILLNEED fetches at most the device's read-ahead, so it is given small ones. */
#define POPULATE_BYTES (size_t)(8u << 20)
#define WILLNEED_BYTES (size_t)(2u << 20)

struct prefetch {
    pthread_t thread;
    bool started;
    int wake_fd; /* borrowed */
    const char *map;
    size_t size, skip_from, skip_to; /* bytes; the part between the last two is left out */
    size_t page;
    atomic_bool stop, over;
    atomic_size_t done;
};

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

int prefetch_new(struct prefetch **ret, const struct model *m, int wake_fd)
{
    CLEANUP(prefetch_freep) struct prefetch *p = calloc(1, sizeof(*p));
    const struct model_file *file = model_get_file(m);
    const struct weight *table = &model_weights(m)->ple_embed;
    sigset_t all, old;
    int r;

    if (!p)
        return -ENOMEM;
    p->wake_fd = wake_fd;
    p->map = model_file_map(file, &p->size);
    p->page = (size_t)sysconf(_SC_PAGESIZE);
    p->skip_from = p->skip_to = p->size;
    for (size_t i = 0; i < model_file_n_tensors(file); i++) {
        const struct model_tensor *t = model_file_tensor(file, i);

        if (t->weight.data != table->data)
            continue;
        /* The pages that lie within it alone. */
        p->skip_from = ALIGN_UP((size_t)t->offset, p->page);
        p->skip_to = (size_t)(t->offset + t->bytes) & ~(p->page - 1);
        if (p->skip_to <= p->skip_from)
            p->skip_from = p->skip_to = p->size;
    }
    thread_signals_for_others(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = pthread_create(&p->thread, NULL, prefetch_run, p);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r != 0)
        return -r;
    p->started = true;
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
    free(p);
    return NULL;
}

void prefetch_freep(struct prefetch **p)
{
    *p = prefetch_free(*p);
}

uint64_t prefetch_bytes(const struct prefetch *p)
{
    return p->size - (p->skip_to - p->skip_from);
}

double prefetch_progress(const struct prefetch *p)
{
    uint64_t all = prefetch_bytes(p);

    return p->over || all == 0 ? 1 : (double)p->done / (double)all;
}

bool prefetch_is_over(const struct prefetch *p)
{
    return p->over;
}
