/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Three kinds of files tell: a pressure file of the kernel, into which a threshold is written and
 * which is then polled for EPOLLPRI, and, for whoever wants to tell by hand, a FIFO or a socket,
 * where any byte is an event. The kernel tells at most once in the window of the threshold, two
 * seconds, for as long as it lasts.
 */

#include "daemon/memory-pressure.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"

/* Where nobody says something else: some task waited 0.2 of 2 seconds. What systemd asks for. */
#define THRESHOLD "some 200000 2000000"
#define MACHINE "/proc/pressure/memory"

struct memory_pressure {
    int fd;
    char *path;
    sd_event_source *source, *calm_timer;
    unsigned level;
    memory_pressure_changed changed;
    void *userdata;
};

static void arm_calm(struct memory_pressure *m)
{
    sd_event_source_set_time_relative(m->calm_timer, PRESSURE_CALM_USEC);
    sd_event_source_set_enabled(m->calm_timer, SD_EVENT_ONESHOT);
}

static int on_calm(sd_event_source *source, uint64_t usec, void *userdata)
{
    struct memory_pressure *m = userdata;

    (void)source;
    (void)usec;
    m->level--;
    if (m->level > 0)
        arm_calm(m);
    m->changed(m->userdata, m->level, false);
    return 0;
}

static int on_event(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct memory_pressure *m = userdata;
    char waste[4096];
    ssize_t n;

    if (revents & EPOLLIN) {
        n = read(fd, waste, sizeof(waste));
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            sd_event_source_set_enabled(source, SD_EVENT_OFF); /* whoever told has gone */
        if (n <= 0)
            return 0;
    } else if (!(revents & EPOLLPRI)) {
        sd_event_source_set_enabled(source, SD_EVENT_OFF); /* the control group has gone */
        return 0;
    }
    m->level = MIN(m->level + 1, PRESSURE_MOST);
    arm_calm(m);
    m->changed(m->userdata, m->level, true);
    return 0;
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CLEANUP(closep) int fd = -EBADF;

    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    memcpy(address.sun_path, path, strlen(path) + 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return -errno;
    return TAKE_FD(fd);
}

/* *ret_events: what is to be polled for. The descriptor, -errno */
static int open_source(const char *path, const void *data, size_t n, uint32_t *ret_events)
{
    CLEANUP(closep) int fd = -EBADF;
    struct stat st;

    if (stat(path, &st) < 0)
        return -errno;
    /* A FIFO opened for both ways neither waits for a writer nor ends when one goes. */
    fd = S_ISSOCK(st.st_mode) ? connect_to(path)
                              : open(path, O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0)
        return S_ISSOCK(st.st_mode) ? fd : -errno;
    if (S_ISREG(st.st_mode))
        *ret_events = EPOLLPRI;
    else if (S_ISFIFO(st.st_mode) || S_ISSOCK(st.st_mode))
        *ret_events = EPOLLIN;
    else
        return -EBADF;
    /* Written to a FIFO it would come back as an event. */
    if (n > 0 && !S_ISFIFO(st.st_mode)) {
        ssize_t written = write(fd, data, n);

        if (written != (ssize_t)n)
            return written < 0 ? -errno : -EIO;
    }
    return TAKE_FD(fd);
}

static int watch(struct memory_pressure *m, sd_event *event, const char *path, const void *data,
                 size_t n)
{
    uint32_t events = 0;
    int fd = open_source(path, data, n, &events);

    if (fd < 0)
        return fd;
    m->fd = fd;
    m->path = strdup(path);
    return m->path ? sd_event_add_io(event, &m->source, fd, events, on_event, m) : -ENOMEM;
}

/* Base64 to bytes; *ret is malloc'ed. 0, -EINVAL, -ENOMEM */
static int decode(const char *text, void **ret, size_t *ret_n)
{
    size_t n = strlen(text), padding = n - strcspn(text, "=");
    CLEANUP(freep) unsigned char *data = NULL;
    int decoded;

    if (n > 4096 || padding > 2)
        return -EINVAL;
    data = malloc(n + 1);
    if (!data)
        return -ENOMEM;
    decoded = EVP_DecodeBlock(data, (const unsigned char *)text, (int)n);
    if (decoded < 0 || (size_t)decoded < padding)
        return -EINVAL;
    *ret_n = (size_t)decoded - padding;
    *ret = TAKE_PTR(data);
    return 0;
}

/* As the service manager, or whoever started us, has it. */
static int watch_given(struct memory_pressure *m, sd_event *event, const char *path,
                       struct error *err)
{
    const char *text = getenv("MEMORY_PRESSURE_WRITE");
    CLEANUP(freep) void *data = NULL;
    size_t n = 0;
    int r = 0;

    if (path[0] != '/')
        return error_set(err, EINVAL, "$MEMORY_PRESSURE_WATCH: '%.100s' is no absolute path", path);
    if (strcmp(path, "/dev/null") == 0)
        return 0; /* it is not wanted */
    if (text && text[0])
        r = decode(text, &data, &n);
    if (r < 0)
        return error_set(err, -r, "$MEMORY_PRESSURE_WRITE: cannot be decoded (base64 is wanted)");
    r = watch(m, event, path, data, n);
    return r < 0 ? error_set(err, -r, "$MEMORY_PRESSURE_WATCH: %s: %s", path, strerror(-r)) : 0;
}

/* The control group's own, where it can be written to: which the system's manager of before 254,
 * that names none, grants its services. NULL: not known */
static char *group_path(void)
{
    CLEANUP(fclosep) FILE *f = fopen("/proc/self/cgroup", "re");
    char line[4096], *path;

    while (f && fgets(line, sizeof(line), f)) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "0::/", 4) == 0 && line[4] &&
            asprintf(&path, "/sys/fs/cgroup%s/memory.pressure", line + 3) >= 0)
            return path;
    }
    return NULL;
}

int memory_pressure_new(struct memory_pressure **ret, sd_event *event,
                        memory_pressure_changed changed, void *userdata, struct error *err)
{
    CLEANUP(memory_pressure_freep) struct memory_pressure *m = calloc(1, sizeof(*m));
    const char *given = getenv("MEMORY_PRESSURE_WATCH");
    CLEANUP(freep) char *group = NULL;
    int r;

    if (!m)
        return error_set(err, ENOMEM, "out of memory");
    m->fd = -EBADF;
    m->changed = changed;
    m->userdata = userdata;
    r = sd_event_add_time_relative(event, &m->calm_timer, CLOCK_MONOTONIC, 0, 0, on_calm, m);
    if (r >= 0)
        r = sd_event_source_set_enabled(m->calm_timer, SD_EVENT_OFF);
    if (r < 0)
        return error_set(err, -r, "cannot set up the event loop: %s", strerror(-r));
    if (given && given[0]) {
        r = watch_given(m, event, given, err);
        if (r < 0)
            return r;
    } else {
        group = group_path();
        r = group ? watch(m, event, group, THRESHOLD, sizeof(THRESHOLD)) : -ENOENT;
        if (r < 0 && !m->source)
            r = watch(m, event, MACHINE, THRESHOLD, sizeof(THRESHOLD));
        if (r == -ENOMEM)
            return error_set(err, ENOMEM, "out of memory");
    }
    *ret = TAKE_PTR(m);
    return 0;
}

struct memory_pressure *memory_pressure_free(struct memory_pressure *m)
{
    if (!m)
        return NULL;
    sd_event_source_disable_unref(m->source);
    sd_event_source_disable_unref(m->calm_timer);
    closep(&m->fd);
    free(m->path);
    free(m);
    return NULL;
}

void memory_pressure_freep(struct memory_pressure **m)
{
    *m = memory_pressure_free(*m);
}

unsigned memory_pressure_level(const struct memory_pressure *m)
{
    return m ? m->level : 0;
}
