/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/common/output-file.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"

static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
static struct sigaction saved[ARRAY_SIZE(signals)];
static const char *volatile to_remove; /* what the handler unlinks */

static void on_signal(int number)
{
    if (to_remove)
        unlink(to_remove);
    signal(number, SIG_DFL);
    raise(number); /* comes when the handler has returned */
}

/* A signal that comes while the file has a name but no handler would leave it behind: it waits. */
static void hold_signals(sigset_t *ret_before)
{
    sigset_t set;

    sigemptyset(&set);
    for (size_t i = 0; i < ARRAY_SIZE(signals); i++)
        sigaddset(&set, signals[i]);
    sigprocmask(SIG_BLOCK, &set, ret_before);
}

static void watch_signals(const char *temporary)
{
    struct sigaction action = {.sa_handler = on_signal};

    sigemptyset(&action.sa_mask);
    to_remove = temporary;
    for (size_t i = 0; i < ARRAY_SIZE(signals); i++) {
        sigaction(signals[i], NULL, &saved[i]);
        if (saved[i].sa_handler != SIG_IGN) /* nohup stays nohup */
            sigaction(signals[i], &action, NULL);
    }
}

static void leave_signals(void)
{
    to_remove = NULL;
    for (size_t i = 0; i < ARRAY_SIZE(signals); i++)
        sigaction(signals[i], &saved[i], NULL);
}

static int open_temporary(struct output_file *o, struct error *err)
{
    mode_t mask = umask(0);
    sigset_t before;
    int fd, r = 0;

    umask(mask);
    if (asprintf(&o->temporary, "%s.XXXXXX", o->path) < 0) {
        o->temporary = NULL;
        return error_set(err, ENOMEM, "out of memory");
    }
    hold_signals(&before);
    fd = mkostemp(o->temporary, O_CLOEXEC);
    if (fd < 0)
        r = -errno;
    else
        watch_signals(o->temporary);
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (fd < 0) {
        free(TAKE_PTR(o->temporary));
        return error_set(err, -r, "%s: cannot create: %s", o->path, strerror(-r));
    }
    fchmod(fd, 0666 & ~mask);
    o->stream = fdopen(fd, "w");
    if (!o->stream) {
        close(fd);
        return error_set(err, ENOMEM, "out of memory");
    }
    return 0;
}

int output_open(struct output_file *ret, const char *path, struct error *err)
{
    CLEANUP(output_done) struct output_file o = {NULL, NULL, NULL};
    struct stat st;
    int r;

    o.path = strdup(strcmp(path, "-") == 0 ? "stdout" : path);
    if (!o.path)
        return error_set(err, ENOMEM, "out of memory");
    if (strcmp(path, "-") == 0) {
        o.stream = stdout;
    } else if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) {
        o.stream = fopen(path, "we");
        if (!o.stream)
            return error_set(err, errno, "%s: cannot open: %s", path, strerror(errno));
    } else {
        r = open_temporary(&o, err);
        if (r < 0)
            return r;
    }
    *ret = o;
    o = (struct output_file){NULL, NULL, NULL};
    return 0;
}

/* Also reports what went wrong on the way: stdio may have noticed before. */
static int close_stream(FILE *f)
{
    int was = ferror(f) ? errno : 0; /* the failed write's: the caller gave up at once */
    bool failed = ferror(f);

    errno = 0;
    if ((f == stdout ? fflush(f) : fclose(f)) != 0) {
        failed = true;
        was = errno > 0 ? errno : was;
    }
    if (!failed)
        return 0;
    return was > 0 ? -was : -EIO;
}

int output_commit(struct output_file *o, struct error *err)
{
    int r = close_stream(TAKE_PTR(o->stream));

    if (r < 0)
        r = error_set(err, -r, "%s: cannot write: %s", o->path, strerror(-r));
    else if (o->temporary && rename(o->temporary, o->path) < 0)
        r = error_set(err, errno, "%s: cannot rename to this name: %s", o->path, strerror(errno));
    else if (o->temporary) {
        leave_signals();
        free(TAKE_PTR(o->temporary));
    }
    output_done(o);
    return r;
}

void output_done(struct output_file *o)
{
    if (o->stream && o->stream != stdout)
        fclose(o->stream);
    if (o->temporary) {
        unlink(o->temporary);
        leave_signals();
    }
    free(o->temporary);
    free(o->path);
    *o = (struct output_file){NULL, NULL, NULL};
}
