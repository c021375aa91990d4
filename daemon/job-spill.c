/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What the engine thread does when memory is short. KV of timelines without a request goes to a
 * file, the least recently used first, and comes back when there is one: the bits are the same, and
 * nothing is computed twice. Both go on in pieces between the steps of the others.
 *
 * The file has no name, so that it ends with the timeline, or with this process however that ends.
 * It is for a time of need, not for good: what cannot be written, or would fill the disk, is given
 * up instead, and computed again when it is needed.
 */

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/engine-thread-internal.h"
#include "daemon/log.h"
#include "engine/engine.h"

#define PIECE_BYTES (UINT64_C(8) << 20) /* some milliseconds; as long as others wait for it */
#define DISK_SHARE 20u /* of a file system at least one part in so many stays free */

static void add_bytes(struct engine_thread *t, int64_t bytes)
{
    pthread_mutex_lock(&t->mutex);
    t->statistics.kv_bytes_spilled += (uint64_t)bytes;
    pthread_mutex_unlock(&t->mutex);
}

static void count(struct engine_thread *t, uint64_t *what)
{
    pthread_mutex_lock(&t->mutex);
    (*what)++;
    pthread_mutex_unlock(&t->mutex);
}

static void forget(struct engine_thread *t, struct timeline *tl)
{
    if (tl->spill_fd < 0)
        return;
    add_bytes(t, -(int64_t)tl->spilled_bytes);
    close(TAKE_FD(tl->spill_fd));
    tl->spilled_bytes = 0;
}

static void stop_spilling(struct engine_thread *t)
{
    closep(&t->spill.fd);
    t->spill.fd = -EBADF;
    t->spill.timeline = NULL;
}

void spill_forget(struct engine_thread *t, struct timeline *tl)
{
    if (t->spill.timeline == tl)
        stop_spilling(t);
    forget(t, tl);
}

/* Without a descriptor for it the fork computes what it needs. */
void spill_share(struct engine_thread *t, const struct timeline *tl, struct timeline *fork)
{
    int fd = tl->spill_fd >= 0 ? fcntl(tl->spill_fd, F_DUPFD_CLOEXEC, 3) : -EBADF;

    if (fd < 0)
        return;
    fork->spill_fd = fd;
    fork->spilled_bytes = tl->spilled_bytes;
    add_bytes(t, (int64_t)fork->spilled_bytes);
}

/* ---- out ---- */

/* An empty file without a name. The descriptor, -errno */
static int make_file(int folder_fd)
{
    char name[] = ".kv-0123456789abcdef";
    int fd = openat(folder_fd, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT))
        return fd < 0 ? -errno : fd;
    /* A file system without such files. */
    fd = openat(folder_fd, name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0 && errno == EEXIST) { /* of a process killed between these two lines */
        unlinkat(folder_fd, name, 0);
        fd = openat(folder_fd, name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
    }
    if (fd < 0)
        return -errno;
    unlinkat(folder_fd, name, 0);
    return fd;
}

static int check_room(int folder_fd, uint64_t bytes)
{
    struct statvfs st;
    uint64_t left;

    if (fstatvfs(folder_fd, &st) < 0)
        return -errno;
    left = (uint64_t)st.f_bavail * st.f_frsize;
    return left < bytes || left - bytes < (uint64_t)st.f_blocks / DISK_SHARE * st.f_frsize ? -ENOSPC
                                                                                           : 0;
}

static int begin(struct engine_thread *t, struct timeline *tl)
{
    int r;

    if (t->spill.folder_fd < 0)
        return t->spill.folder_fd;
    r = check_room(t->spill.folder_fd, session_kv_bytes(tl->session));
    if (r >= 0)
        r = make_file(t->spill.folder_fd);
    if (r < 0)
        return r;
    t->spill.timeline = tl;
    t->spill.fd = r;
    return 0;
}

/* Said once, until it works again: with every idle session it is the same. */
static void say_given_up(struct engine_thread *t, int r)
{
    if (t->spill.folder_fd == -EBADF || t->spill.failure_said)
        return; /* without a state directory nothing else was promised */
    t->spill.failure_said = true;
    log_with(
        LOG_WARNING, &(struct log_fields){.message_id = LOG_ID_SPILL_FAILED},
        "memory is short, and KV caches of idle sessions cannot be kept in the state directory "
        "(%s); they are given up, and computed again when they are needed",
        r == -ENOSPC ? "there is not enough room" : strerror(-r));
}

static void give_up(struct engine_thread *t, struct timeline *tl, int r)
{
    stop_spilling(t);
    say_given_up(t, r);
    work_drop_kv(t, tl);
}

static bool may_spill(const struct timeline *tl)
{
    return !tl->is_used && tl->session && session_kv_bytes(tl->session) > 0;
}

/* The least recently used of those that are to go. */
static struct timeline *next_to_go(struct engine_thread *t)
{
    struct timeline *oldest = NULL;

    pthread_mutex_lock(&t->mutex); /* they come in other threads, but go in this one alone */
    for (struct timeline *tl = t->timelines; tl; tl = tl->next) {
        if (!tl->is_to_spill)
            continue;
        if (!may_spill(tl)) /* it has been used since, and is so no longer among the idle ones */
            tl->is_to_spill = false;
        else if (!oldest || tl->last_used < oldest->last_used)
            oldest = tl;
    }
    pthread_mutex_unlock(&t->mutex);
    return oldest;
}

/* True: there may be more. */
static bool spill_piece(struct engine_thread *t)
{
    struct timeline *tl = t->spill.timeline;
    uint64_t bytes;
    int r = 0;

    if (tl && !may_spill(tl)) {
        stop_spilling(t);
        tl = NULL;
    }
    if (!tl) {
        tl = next_to_go(t);
        if (!tl)
            return false;
        r = begin(t, tl);
    }
    bytes = session_kv_bytes(tl->session);
    if (r >= 0)
        r = session_spill(tl->session, t->spill.fd, PIECE_BYTES);
    if (r > 0)
        return true;
    if (r < 0) {
        give_up(t, tl, r);
    } else {
        tl->spill_fd = TAKE_FD(t->spill.fd);
        tl->spilled_bytes = bytes;
        stop_spilling(t);
        t->spill.failure_said = false;
        count(t, &t->statistics.kv_spilled);
        add_bytes(t, (int64_t)bytes);
        work_publish_timeline(t, tl);
    }
    tl->is_to_spill = false;
    engine_give_back(t->engine); /* each in its turn: a little at a time */
    return true;
}

/* ---- and back ---- */

bool spill_is_away(const struct timeline *tl)
{
    return tl->spill_fd >= 0;
}

/* One that has been let in. True: there may be more. */
static bool restore_piece(struct engine_thread *t, struct job *j)
{
    struct timeline *tl = j->timeline;
    int r = session_unspill(tl->session, tl->spill_fd, PIECE_BYTES);

    if (r > 0)
        return true;
    if (r == -ENOBUFS && work_find_memory_quietly(t, j))
        return true;
    if (r < 0) {
        session_drop_kv(tl->session);
        if (r != -ENOBUFS && r != -ENOMEM)
            log_with(LOG_WARNING, &(struct log_fields){.message_id = LOG_ID_SPILL_FAILED},
                     "a KV cache that was kept in the state directory cannot be read (%s); it is "
                     "computed again",
                     strerror(-r));
    }
    if (r == 0)
        count(t, &t->statistics.kv_restored);
    forget(t, tl);
    work_restored(t, j);
    return true;
}

static bool restore_pieces(struct engine_thread *t)
{
    bool more = false;

    /* The list is not changed by this. */
    for (struct job *j = t->active; j; j = j->work.next)
        if (j->work.is_running && spill_is_away(j->timeline) && !j->work.is_paused)
            more = restore_piece(t, j) || more;
    return more;
}

/* ---- when ---- */

/* With the mutex held: those that are idle now. */
static void mark_idle(struct engine_thread *t)
{
    for (struct timeline *tl = t->timelines; tl; tl = tl->next)
        tl->is_to_spill = !tl->is_used && tl->info.kv_bytes > 0;
}

static void drop_released(struct engine_thread *t)
{
    struct timeline *released = NULL;

    do {
        released = NULL;
        pthread_mutex_lock(&t->mutex);
        for (struct timeline *tl = t->timelines; tl && !released; tl = tl->next) {
            if (!tl->is_released)
                continue;
            tl->is_released = false;
            released = tl;
        }
        pthread_mutex_unlock(&t->mutex);
        if (released && may_spill(released))
            work_drop_kv(t, released);
        else if (released)
            work_publish_timeline(t, released);
    } while (released);
}

bool spill_turn(struct engine_thread *t)
{
    unsigned relief;
    bool has_released, more;

    pthread_mutex_lock(&t->mutex);
    relief = t->relief;
    t->relief = 0;
    has_released = t->has_released;
    t->has_released = false;
    if (relief >= 2)
        mark_idle(t);
    pthread_mutex_unlock(&t->mutex);

    if (has_released)
        drop_released(t);
    if (relief >= 1) {
        engine_give_back(t->engine);
        malloc_trim(0);
    }
    more = restore_pieces(t);
    return spill_piece(t) || more;
}
