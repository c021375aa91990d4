/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Finding the daemon, or starting one. Who looks for a daemon and finds none takes SOCKET.start
 * (see daemon/server.h), looks again, and starts one while holding it. The daemon tells through an
 * inherited pipe that it serves; that it failed is told by the pipe's end and the last line of its
 * log.
 */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/close_range.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "client/llmctl-output.h"
#include "client/llmctl.h"

#define MODEL_SUFFIX ".llmd"
#define PREDECESSOR_USEC UINT64_C(10000000) /* then the daemon is to say why it cannot start */

/* ---- which model ---- */

static bool has_suffix(const char *name)
{
    size_t n = strlen(name), suffix = strlen(MODEL_SUFFIX);

    return n > suffix && strcmp(name + n - suffix, MODEL_SUFFIX) == 0;
}

/*
 * The model of a folder: default.llmd, else the only one besides demo.llmd, which is there so that
 * a fresh installation answers and steps back for any other, else that. 1: *ret; 0: there is none;
 * -ENOTUNIQ: several; -ENOMEM
 */
static int model_in(const char *folder, char **ret)
{
    CLEANUP(closedirp) DIR *dir = opendir(folder);
    CLEANUP(freep) char *found = NULL;
    struct dirent *e;
    size_t n = 0;

    if (!dir)
        return 0;
    while ((e = readdir(dir))) {
        bool is_default = strcmp(e->d_name, "default" MODEL_SUFFIX) == 0;
        bool is_demo = strcmp(e->d_name, "demo" MODEL_SUFFIX) == 0;

        if (!has_suffix(e->d_name) || e->d_name[0] == '.')
            continue;
        n += !is_demo;
        if (found && (is_demo || n > 1) && !is_default)
            continue;
        free(found);
        found = NULL;
        if (asprintf(&found, "%s/%s", folder, e->d_name) < 0) {
            found = NULL;
            return -ENOMEM;
        }
        if (is_default) {
            n = 1;
            break;
        }
    }
    if (n > 1)
        return -ENOTUNIQ;
    if (!found)
        return 0;
    *ret = TAKE_PTR(found);
    return 1;
}

/* The folder llmctl runs from, without a slash at the end; its length, or 0. */
static size_t own_folder(char out[PATH_MAX])
{
    ssize_t n = readlink("/proc/self/exe", out, PATH_MAX - 1);
    char *slash;

    if (n <= 0)
        return 0;
    out[n] = 0;
    slash = strrchr(out, '/');
    *slash = 0;
    return (size_t)(slash - out);
}

struct model_folders {
    char *owned[2];
    const char *paths[3];
    size_t n;
};

static void model_folders_done(struct model_folders *f)
{
    free(f->owned[0]);
    free(f->owned[1]);
}

/* The user's own, the build's, the installation's. */
static int find_folders(struct model_folders *f)
{
    const char *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    char program[PATH_MAX];
    int r;

    if (!home || !home[0]) { /* a service, perhaps */
        const struct passwd *me = getpwuid(geteuid());

        home = me ? me->pw_dir : "";
    }
    if (data && data[0] == '/')
        r = asprintf(&f->owned[0], "%s/llmd/models", data);
    else
        r = asprintf(&f->owned[0], "%s/.local/share/llmd/models", home);
    if (r < 0) {
        f->owned[0] = NULL;
        return complain(STATUS_FAILED, "out of memory");
    }
    f->paths[f->n++] = f->owned[0];
    if (own_folder(program) > 0) { /* where the build puts the demo model */
        if (asprintf(&f->owned[1], "%s/../models", program) < 0) {
            f->owned[1] = NULL;
            return complain(STATUS_FAILED, "out of memory");
        }
        f->paths[f->n++] = f->owned[1];
    }
    f->paths[f->n++] = LLMD_DATADIR "/models";
    return STATUS_OK;
}

static int default_model(char **ret)
{
    CLEANUP(model_folders_done) struct model_folders f = {0};
    int r = find_folders(&f);

    if (r != STATUS_OK)
        return r;
    for (size_t i = 0; i < f.n; i++) {
        r = model_in(f.paths[i], ret);
        if (r == -ENOTUNIQ)
            return complain(STATUS_FAILED,
                            "%s holds several models: name one with --model, or link one as "
                            "default" MODEL_SUFFIX " there",
                            f.paths[i]);
        if (r < 0)
            return complain(STATUS_FAILED, "%s: %s", f.paths[i], strerror(-r));
        if (r > 0)
            return STATUS_OK;
    }
    return complain(STATUS_FAILED,
                    "there is no model in %s or %s: make one with llm-import, or name one with "
                    "--model",
                    f.paths[0], LLMD_DATADIR "/models");
}

/* The file of a model known by its name. */
static int named_model(const char *name, char **ret)
{
    CLEANUP(model_folders_done) struct model_folders f = {0};
    int r = find_folders(&f);

    if (r != STATUS_OK)
        return r;
    for (size_t i = 0; i < f.n; i++) {
        CLEANUP(freep) char *path = NULL;

        if (asprintf(&path, "%s/%s" MODEL_SUFFIX, f.paths[i], name) < 0) {
            path = NULL;
            return complain(STATUS_FAILED, "out of memory");
        }
        if (access(path, F_OK) == 0) {
            *ret = TAKE_PTR(path);
            return STATUS_OK;
        }
    }
    return complain(STATUS_FAILED, "there is no model %s in %s or %s", name, f.paths[0],
                    LLMD_DATADIR "/models");
}

/* ---- which program ---- */

static bool try_path(char *out, size_t n, const char *folder, size_t n_folder, const char *name)
{
    int length = snprintf(out, n, "%.*s/%s", (int)n_folder, folder, name);

    return length > 0 && (size_t)length < n && access(out, X_OK) == 0;
}

/* $LLMD_BINARY, beside llmctl, where the build puts it, where it is installed. */
static int find_daemon(char out[PATH_MAX])
{
    const char *named = getenv("LLMD_BINARY");
    char self[PATH_MAX];
    size_t n;

    if (named && named[0]) {
        /* The daemon is started in another folder. */
        if (access(named, X_OK) < 0 || !realpath(named, out))
            return complain(STATUS_FAILED, "$LLMD_BINARY: %s: %s", named, strerror(errno));
        return STATUS_OK;
    }
    n = own_folder(self);
    if (n > 0 && (try_path(out, PATH_MAX, self, n, "llmd") ||
                  try_path(out, PATH_MAX, self, n, "../daemon/llmd")))
        return STATUS_OK;
    if (try_path(out, PATH_MAX, LLMD_LIBEXECDIR, strlen(LLMD_LIBEXECDIR), "llmd") ||
        try_path(out, PATH_MAX, LLMD_BINDIR, strlen(LLMD_BINDIR), "llmd"))
        return STATUS_OK;
    return complain(STATUS_NOT_RUNNING,
                    "llmd does not run and the program is not found; $LLMD_BINARY may name it");
}

/* ---- starting ---- */

/* The last line of the log without its priority, or "". */
static void last_line(const char *log_path, char *out, size_t n)
{
    CLEANUP(fclosep) FILE *f = fopen(log_path, "re");
    char line[1024];

    out[0] = 0;
    while (f && fgets(line, sizeof(line), f)) {
        const char *text = line;

        if (text[0] == '<' && text[1] && text[2] == '>')
            text += 3;
        snprintf(out, n, "%.*s", (int)strcspn(text, "\n"), text);
    }
}

static void become_daemon(const char *program, const char *model, const char *socket, int log_fd,
                          int ready_fd)
{
    sigset_t none;
    char number[16];
    int null_fd;

    /* Its own session: a Ctrl-C here is not for it. */
    setsid();
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null_fd < 0 || dup2(null_fd, STDIN_FILENO) < 0 || dup2(log_fd, STDOUT_FILENO) < 0 ||
        dup2(log_fd, STDERR_FILENO) < 0 || chdir("/") < 0)
        _exit(127);
    /* Nothing that llmctl itself got by chance: a caller's pipe would stay open as long as the
     * daemon lives, a caller's lock locked. A kernel before 5.11 cannot; then they are inherited.
     */
    close_range(3, ~0u, CLOSE_RANGE_CLOEXEC);
    ready_fd = fcntl(ready_fd, F_DUPFD, 3); /* without CLOEXEC */
    if (ready_fd < 0)
        _exit(127);
    snprintf(number, sizeof(number), "%d", ready_fd);
    execl(program, program, "--private", "--model", model, "--socket", socket, "--ready-fd", number,
          (char *)NULL);
    dprintf(STDERR_FILENO, "%s: %s\n", program, strerror(errno));
    _exit(127);
}

static int start_daemon(const char *model, const char *socket)
{
    CLEANUP(freep) char *log_path = NULL;
    CLEANUP(closep) int log_fd = -EBADF, ready_read = -EBADF, ready_write = -EBADF;
    char program[PATH_MAX], line[1024], answer[16];
    int ends[2], status;
    size_t used = 0;
    ssize_t n;
    pid_t pid;

    status = find_daemon(program);
    if (status != STATUS_OK)
        return status;
    if (asprintf(&log_path, "%s.log", socket) < 0) {
        log_path = NULL;
        return complain(STATUS_FAILED, "out of memory");
    }
    log_fd = open(log_path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (log_fd < 0)
        return complain(STATUS_FAILED, "%s: %s", log_path, strerror(errno));
    if (pipe2(ends, O_CLOEXEC) < 0)
        return complain(STATUS_FAILED, "pipe: %s", strerror(errno));
    ready_read = ends[0];
    ready_write = ends[1];

    pid = fork();
    if (pid < 0)
        return complain(STATUS_FAILED, "fork: %s", strerror(errno));
    if (pid == 0)
        become_daemon(program, model, socket, log_fd, ready_write);
    close(TAKE_FD(ready_write));

    status_line("starting llmd: loading %s", strrchr(model, '/') + 1);
    do {
        n = read(ready_read, answer + used, sizeof(answer) - 1 - used);
        if (n > 0)
            used += (size_t)n;
    } while ((n > 0 && used < sizeof(answer) - 1) || (n < 0 && errno == EINTR));
    answer[used] = 0;
    status_line_clear();
    if (strcmp(answer, "READY=1\n") == 0)
        return STATUS_OK;

    waitpid(pid, &status, 0);
    last_line(log_path, line, sizeof(line));
    if (line[0])
        return complain(STATUS_FAILED, "llmd did not start: %s", line);
    if (WIFSIGNALED(status))
        return complain(STATUS_FAILED, "llmd did not start: killed by signal %d", WTERMSIG(status));
    return complain(STATUS_FAILED, "llmd did not start: status %d", WEXITSTATUS(status));
}

static bool is_absent(int r)
{
    return r == -ENOENT || r == -ECONNREFUSED || r == -ECONNRESET;
}

/*
 * A daemon that was killed does not listen any more, and holds its lock still, until the kernel is
 * done with it: one that is started meanwhile would give up. Where the lock's holder is one that
 * somebody else starts, that one serves us. 1: *ret; 0: nobody is there; -ENOMEM
 */
static int wait_for_predecessor(const char *socket, struct llm_connection **ret)
{
    CLEANUP(freep) char *path = NULL;
    CLEANUP(closep) int fd = -EBADF;
    uint64_t until = now_usec() + PREDECESSOR_USEC;
    struct llm_error err;

    if (asprintf(&path, "%s.lock", socket) < 0) {
        path = NULL;
        return -ENOMEM;
    }
    fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    while (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) < 0 && now_usec() < until) {
        if (llm_connect(ret, socket, &err) == 0)
            return 1;
        usleep(5000); /* neither the lock nor the socket can be waited for alone */
    }
    return 0;
}

/* With SOCKET.start locked. */
static int connect_or_start_locked(const char *socket, const char *model,
                                   struct llm_connection **ret)
{
    CLEANUP(freep) char *found = NULL;
    struct llm_error err;
    int r, status;

    r = llm_connect(ret, socket, &err);
    if (r == -ECONNRESET) /* was told to stop just now, and its socket is gone; or it is full */
        r = llm_connect(ret, socket, &err);
    if (r == 0)
        return STATUS_OK;
    if (r == -ECONNRESET)
        return complain(STATUS_BUSY, "llmd takes no more connections (%s): try again later",
                        socket);
    if (!is_absent(r))
        return complain(STATUS_FAILED, "%s", err.message);
    r = wait_for_predecessor(socket, ret);
    if (r != 0)
        return r > 0 ? STATUS_OK : complain(STATUS_FAILED, "out of memory");
    if (!model || model[0] != '/') {
        status = model ? named_model(model, &found) : default_model(&found);
        if (status != STATUS_OK)
            return status;
        model = found;
    }
    status = start_daemon(model, socket);
    if (status != STATUS_OK)
        return status;
    r = llm_connect(ret, socket, &err);
    return r == 0 ? STATUS_OK : complain(STATUS_NOT_RUNNING, "%s", err.message);
}

/* ---- where ---- */

/* Why a service that is there cannot be used; STATUS_OK: nothing is known against any. */
struct trouble {
    int status;
    char text[sizeof(((struct llm_error *)NULL)->message) + 32];
};

/* A service that is there without us. *ret stays as it is where none is, or none that works. */
static void connect_service(enum llm_scope scope, struct llm_connection **ret, struct trouble *t)
{
    struct llm_error err;
    int r = llm_connect_scope(ret, scope, &err);

    if (r >= 0 || is_absent(r) || t->status != STATUS_OK)
        return;
    t->status = status_of(r);
    snprintf(t->text, sizeof(t->text), "the %s's llmd: %s",
             scope == LLM_SCOPE_SYSTEM ? "system" : "user", err.message);
}

/* --socket, or the private daemon's; absolute, since a daemon is started in another folder. */
static int find_socket(char **ret)
{
    CLEANUP(freep) char *folder = NULL;
    struct llm_error err;

    if (!global.socket)
        return llm_default_socket(ret, &err) < 0 ? complain(STATUS_FAILED, "%s", err.message)
                                                 : STATUS_OK;
    folder = global.socket[0] == '/' ? strdup("") : getcwd(NULL, 0);
    if (!folder || asprintf(ret, "%s%s%s", folder, folder[0] ? "/" : "", global.socket) < 0)
        return complain(STATUS_FAILED, "%s: %s", global.socket, strerror(errno));
    return STATUS_OK;
}

static int connect_private(const struct start_options *o, const char *model,
                           struct llm_connection **ret)
{
    CLEANUP(freep) char *socket = NULL, *lock_path = NULL;
    CLEANUP(closep) int lock_fd = -EBADF;
    struct llm_error err;
    int r, status;

    status = find_socket(&socket);
    if (status != STATUS_OK)
        return status;
    r = llm_connect(ret, socket, &err);
    if (r == 0)
        return STATUS_OK;
    if (!is_absent(r))
        return complain(STATUS_FAILED, "%s", err.message);
    if (o->no_start)
        return complain(STATUS_NOT_RUNNING, "llmd does not run (%s)", err.message);
    if (asprintf(&lock_path, "%s.start", socket) < 0) {
        lock_path = NULL;
        return complain(STATUS_FAILED, "out of memory");
    }
    lock_fd = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (lock_fd < 0)
        return complain(STATUS_FAILED, "%s: %s", lock_path, strerror(errno));
    while (flock(lock_fd, LOCK_EX) < 0)
        if (errno != EINTR)
            return complain(STATUS_FAILED, "%s: %s", lock_path, strerror(errno));
    return connect_or_start_locked(socket, model, ret);
}

/* A file's absolute path where the argument can only be one; else the name as it is. */
static int find_model(const char *asked, char **ret)
{
    if (strchr(asked, '/') || has_suffix(asked))
        *ret = realpath(asked, NULL);
    else
        *ret = strdup(asked);
    return *ret ? STATUS_OK : complain(STATUS_FAILED, "%s: %s", asked, strerror(errno));
}

/* The private daemon, if it runs, in the place of a service that does not work. */
static int connect_instead(const struct trouble *t, struct llm_connection **ret)
{
    CLEANUP(freep) char *socket = NULL;
    int status = find_socket(&socket);

    if (status != STATUS_OK)
        return status;
    if (llm_connect(ret, socket, NULL) < 0)
        return complain(t->status, "%s (with --private, one of your own is used)", t->text);
    return STATUS_OK;
}

/*
 * A service that is there and does not work is not taken for none: who installed it wants it to be
 * used, with its models and its limits, and a private daemon in its place would be a surprise in
 * memory and in answers. Those that run already may be used, which is told.
 */
static int connect_any(const struct start_options *o, const char *model,
                       struct llm_connection **ret)
{
    bool any = !global.socket && global.scope == LLM_SCOPE_ANY;
    struct llm_connection *c = NULL;
    struct trouble trouble = {0};
    int status = STATUS_OK;

    if (any || (!global.socket && global.scope == LLM_SCOPE_SYSTEM))
        connect_service(LLM_SCOPE_SYSTEM, &c, &trouble);
    if (!c && (any || (!global.socket && global.scope == LLM_SCOPE_USER)))
        connect_service(LLM_SCOPE_USER, &c, &trouble);
    if (!c && trouble.status != STATUS_OK && !any)
        return complain(trouble.status, "%s", trouble.text);
    if (!c && global.scope == LLM_SCOPE_SYSTEM)
        return complain(STATUS_NOT_RUNNING, "the system's llmd does not run");
    if (!c && global.scope == LLM_SCOPE_USER)
        return complain(STATUS_NOT_RUNNING, "the user's llmd does not run");
    if (!c)
        status = trouble.status != STATUS_OK ? connect_instead(&trouble, &c)
                                             : connect_private(o, model, &c);
    if (status != STATUS_OK)
        return status;
    if (trouble.status != STATUS_OK)
        note("%s; the %s one answers", trouble.text,
             llm_connection_scope(c) == LLM_SCOPE_USER ? "user's" : "private");
    sd_bus_set_allow_interactive_authorization(llm_connection_bus(c), !global.no_ask_password);
    *ret = c;
    return STATUS_OK;
}

int connect_or_start(const struct start_options *o, struct llm_connection **ret, char **ret_model)
{
    CLEANUP(freep) char *model = NULL;
    const char *asked = o->model ? o->model : getenv("LLMD_MODEL");
    int status;

    if (asked && asked[0]) {
        status = find_model(asked, &model);
        if (status != STATUS_OK)
            return status;
    }
    status = connect_any(o, model, ret);
    if (status == STATUS_OK)
        *ret_model = TAKE_PTR(model);
    return status;
}

int connect_running(struct llm_connection **ret)
{
    return connect_any(&(struct start_options){.no_start = true}, NULL, ret);
}
