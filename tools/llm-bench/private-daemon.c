/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "tools/llm-bench/private-daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"

#define MAX_ARGUMENTS 64

/* Static, because a signal's handler must find it. */
static struct {
    volatile pid_t pid;
    char folder[PATH_MAX / 2], socket[PATH_MAX], lock[PATH_MAX], start_lock[PATH_MAX],
        log[PATH_MAX], config[PATH_MAX], state[PATH_MAX];
} daemon_;

static void remove_files(void)
{
    if (!daemon_.folder[0])
        return;
    unlink(daemon_.socket);
    unlink(daemon_.lock);
    unlink(daemon_.start_lock);
    unlink(daemon_.log);
    unlink(daemon_.config);
    rmdir(daemon_.state);
    rmdir(daemon_.folder);
    daemon_.folder[0] = 0;
}

/* Async-signal-safe, all of it. */
static void on_signal(int number)
{
    if (daemon_.pid > 0) {
        kill(daemon_.pid, SIGTERM);
        waitpid(daemon_.pid, NULL, 0);
    }
    remove_files();
    signal(number, SIG_DFL);
    raise(number);
}

static int find_program(const char *named, char out[PATH_MAX], struct error *err)
{
    static const char *const beside[] = {"llmd", "../../daemon/llmd"};
    char self[PATH_MAX];
    ssize_t n;

    if (!named)
        named = getenv("LLMD_BINARY");
    if (named && named[0]) {
        if (!realpath(named, out) || access(out, X_OK) < 0)
            return error_set(err, ENOENT, "%s: %s", named, strerror(errno));
        return 0;
    }
    n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (n > 0) {
        self[n] = 0;
        *strrchr(self, '/') = 0;
        for (size_t i = 0; i < ARRAY_SIZE(beside); i++) {
            CLEANUP(freep) char *path = NULL;

            if (asprintf(&path, "%s/%s", self, beside[i]) < 0) {
                path = NULL;
                return error_set(err, ENOMEM, "out of memory");
            }
            if (access(path, X_OK) == 0 && realpath(path, out))
                return 0;
        }
    }
    return error_set(err, ENOENT, "llmd is not found; --llmd names it");
}

static int make_folder(struct error *err)
{
    const char *parent = getenv("TMPDIR");

    snprintf(daemon_.folder, sizeof(daemon_.folder), "%s/llm-bench-XXXXXX",
             parent && parent[0] == '/' ? parent : "/tmp");
    if (!mkdtemp(daemon_.folder)) {
        int code = errno;

        error_set(err, code, "%s: %s", daemon_.folder, strerror(code));
        daemon_.folder[0] = 0;
        return -code;
    }
    snprintf(daemon_.socket, PATH_MAX, "%s/socket", daemon_.folder);
    snprintf(daemon_.lock, PATH_MAX, "%s/socket.lock", daemon_.folder);
    snprintf(daemon_.start_lock, PATH_MAX, "%s/socket.start", daemon_.folder);
    snprintf(daemon_.log, PATH_MAX, "%s/log", daemon_.folder);
    snprintf(daemon_.config, PATH_MAX, "%s/config", daemon_.folder);
    snprintf(daemon_.state, PATH_MAX, "%s/state", daemon_.folder);
    return 0;
}

static void become_daemon(const char *program, const struct private_daemon_options *o, int ready_fd)
{
    const char *arguments[MAX_ARGUMENTS];
    char number[16];
    FILE *f = NULL;
    size_t n = 0;
    int null_fd = open("/dev/null", O_RDONLY);
    int log_fd = open(daemon_.log, O_WRONLY | O_CREAT | O_APPEND, 0600);

    if (null_fd < 0 || log_fd < 0 || dup2(null_fd, 0) < 0 || dup2(log_fd, 1) < 0 ||
        dup2(log_fd, 2) < 0)
        _exit(127);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    fcntl(ready_fd, F_SETFD, 0);
    snprintf(number, sizeof(number), "%d", ready_fd);
    arguments[n++] = program;
    if (o->other_users) {
        /* A system's daemon in all but its places. */
        if (mkdir(daemon_.state, 0700) < 0 || setenv("STATE_DIRECTORY", daemon_.state, 1) < 0 ||
            !(f = fopen(daemon_.config, "we")) || fclose(f) != 0 ||
            chmod(daemon_.folder, 0711) < 0) {
            dprintf(2, "%s: %s\n", daemon_.folder, strerror(errno));
            _exit(127);
        }
        arguments[n++] = "--system";
        arguments[n++] = "--no-bus";
        arguments[n++] = "--config";
        arguments[n++] = daemon_.config;
    } else {
        arguments[n++] = "--private";
    }
    arguments[n++] = "--model";
    arguments[n++] = o->model;
    arguments[n++] = "--socket";
    arguments[n++] = daemon_.socket;
    arguments[n++] = "--ready-fd";
    arguments[n++] = number;
    for (char *const *more = o->more; *more && n < MAX_ARGUMENTS - 1; more++)
        arguments[n++] = *more;
    arguments[n] = NULL;
    execv(program, (char *const *)arguments);
    dprintf(2, "%s: %s\n", program, strerror(errno));
    _exit(127);
}

/* The log's last line without its priority. */
static void last_line(char *out, size_t n)
{
    CLEANUP(fclosep) FILE *f = fopen(daemon_.log, "re");
    char line[1024];

    snprintf(out, n, "it said nothing");
    while (f && fgets(line, sizeof(line), f)) {
        const char *text = line[0] == '<' && line[1] && line[2] == '>' ? line + 3 : line;

        snprintf(out, n, "%.*s", (int)strcspn(text, "\n"), text);
    }
}

int private_daemon_start(const struct private_daemon_options *o, struct error *err)
{
    CLEANUP(closep) int ready_read = -EBADF, ready_write = -EBADF;
    char program[PATH_MAX], answer[16], line[400];
    int ends[2], r;
    size_t used = 0;
    ssize_t n;
    pid_t pid;

    r = find_program(o->program, program, err);
    if (r < 0)
        return r;
    r = make_folder(err);
    if (r < 0)
        return r;
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    signal(SIGHUP, on_signal);
    if (pipe2(ends, O_CLOEXEC) < 0) {
        r = error_set(err, errno, "pipe: %s", strerror(errno));
        remove_files();
        return r;
    }
    ready_read = ends[0];
    ready_write = ends[1];
    pid = fork();
    if (pid < 0) {
        r = error_set(err, errno, "fork: %s", strerror(errno));
        remove_files();
        return r;
    }
    if (pid == 0)
        become_daemon(program, o, ready_write);
    daemon_.pid = pid;
    close(TAKE_FD(ready_write));
    do {
        n = read(ready_read, answer + used, sizeof(answer) - 1 - used);
        if (n > 0)
            used += (size_t)n;
    } while ((n > 0 && used < sizeof(answer) - 1) || (n < 0 && errno == EINTR));
    answer[used] = 0;
    if (strcmp(answer, "READY=1\n") == 0)
        return 0;
    waitpid(pid, NULL, 0);
    daemon_.pid = 0;
    last_line(line, sizeof(line));
    remove_files();
    return error_set(err, EIO, "llmd did not start: %s", line);
}

const char *private_daemon_socket(void)
{
    return daemon_.socket;
}

int private_daemon_stop(struct error *err)
{
    char line[400];
    int status = 0;
    bool well;

    if (daemon_.pid > 0) {
        kill(daemon_.pid, SIGTERM);
        while (waitpid(daemon_.pid, &status, 0) < 0 && errno == EINTR)
            ;
        daemon_.pid = 0;
    }
    well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (!well)
        last_line(line, sizeof(line));
    remove_files();
    return well ? 0 : error_set(err, EIO, "llmd did not end well: %s", line);
}
