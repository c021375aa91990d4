/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The order: no new privileges, without which the kernel takes neither of the two others from a
 * process that has none; landlock; capabilities, when nothing needs them any more; the filter at
 * last, since it does not know the system calls of the others.
 */

#include "daemon/sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/landlock.h"
#include "daemon/reachable-sockets.h"
#include "daemon/system-call-filter.h"

#define JOURNAL_SOCKET "/run/systemd/journal/socket"
#define LISTS_MAX 8u
#define CAPABILITIES_MAX 64 /* the kernel's sets have so many bits */

struct sandbox {
    enum sandbox_mode mode;
    struct refusal_teller teller;
    bool abstract_sockets;
    struct allowed_path *paths; /* [n_paths] */
    size_t n_paths;
    const struct seccomp_list *lists[LISTS_MAX];
    size_t n_lists;
};

int sandbox_parse_mode(const char *text, enum sandbox_mode *ret)
{
    static const char *const names[] = {"strict", "report", "off"};

    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (strcmp(text, names[i]) == 0) {
            *ret = (enum sandbox_mode)i;
            return 0;
        }
    return -EINVAL;
}

/* They look at the threads, and at the program for the names in their reports. */
static int allow_sanitizers(struct sandbox *s)
{
    static const char *const paths[] = {"/proc", "/proc/self/exe", "/usr"};
    int r = 0;

    for (size_t i = 0; i < ARRAY_SIZE(paths) && r >= 0; i++)
        r = sandbox_allow_path(s, paths[i], SANDBOX_READ, NULL);
    s->lists[s->n_lists++] = &seccomp_sanitizers;
    return r;
}

int sandbox_new(struct sandbox **ret, enum sandbox_mode mode)
{
    struct sandbox *s = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    s->mode = mode;
    s->teller = (struct refusal_teller){.program = "sandbox", .journal_fd = -EBADF};
    s->lists[s->n_lists++] = &seccomp_process;
    *ret = s;
    return SANITIZED ? allow_sanitizers(s) : 0;
}

struct sandbox *sandbox_free(struct sandbox *s)
{
    if (!s)
        return NULL;
    for (size_t i = 0; i < s->n_paths; i++)
        free(s->paths[i].path);
    free(s->paths);
    free(s);
    return NULL;
}

void sandbox_freep(struct sandbox **s)
{
    *s = sandbox_free(*s);
}

void sandbox_tell_stderr(struct sandbox *s, const char *program, bool prefixes)
{
    s->teller.program = program;
    s->teller.prefixes = prefixes;
}

void sandbox_tell_journal(struct sandbox *s, const char *program, const char *message_id)
{
    const struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = JOURNAL_SOCKET};
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    s->teller.program = program;
    s->teller.message_id = message_id;
    s->teller.prefixes = true; /* standard error is the journal's too, only without fields */
    if (fd >= 0 && connect(fd, (const struct sockaddr *)&address, sizeof(address)) < 0)
        close(TAKE_FD(fd));
    s->teller.journal_fd = fd;
}

void sandbox_allow_abstract_sockets(struct sandbox *s)
{
    s->abstract_sockets = true;
}

int sandbox_allow_calls(struct sandbox *s, const struct seccomp_list *list)
{
    if (s->n_lists >= LISTS_MAX)
        return -ENOMEM;
    s->lists[s->n_lists++] = list;
    return 0;
}

int sandbox_allow_path(struct sandbox *s, const char *path, enum sandbox_access access,
                       bool *ret_there)
{
    struct allowed_path *more;
    char *real = realpath(path, NULL);
    struct stat st;

    if (!real && errno == ENOMEM)
        return -ENOMEM;
    if (real && access == SANDBOX_DEVICE && (stat(real, &st) < 0 || !S_ISCHR(st.st_mode)))
        free(TAKE_PTR(real));
    if (ret_there)
        *ret_there = real;
    if (!real)
        return 0;
    more = reallocarray(s->paths, s->n_paths + 1, sizeof(*more));
    if (!more) {
        free(real);
        return -ENOMEM;
    }
    s->paths = more;
    more[s->n_paths++] = (struct allowed_path){.path = real, .access = access};
    return 0;
}

int sandbox_allow_connect(struct sandbox *s, const char *path)
{
    int r = s->mode == SANDBOX_OFF ? 0 : reachable_sockets_add(path);

    return r == -ENOMEM ? r : 0; /* nobody can connect to one whose path is too long */
}

/* ---- entering ---- */

/* Adds to a list of words. */
static void lack(struct error *lacks, const char *what, int r)
{
    size_t n = lacks ? strlen(lacks->text) : 0;

    if (lacks)
        snprintf(lacks->text + n, sizeof(lacks->text) - n, "%s%s (%s)", n > 0 ? ", " : "", what,
                 strerror(-r));
}

/* Also from a process that has none, so that it cannot get any. */
static int drop_capabilities(struct error *err)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {0};
    struct __user_cap_data_struct now[_LINUX_CAPABILITY_U32S_3] = {0};
    int r;

    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    /* Only who may change the bounding set can; for others no_new_privs keeps it from mattering. */
    for (unsigned long c = 0; c < CAPABILITIES_MAX; c++)
        if (prctl(PR_CAPBSET_DROP, c, 0, 0, 0) < 0)
            break;
    if (syscall(SYS_capset, &header, none) == 0)
        return 0;
    /* A filter around us, as the unit's, may refuse even that; where there are none it is no
     * matter. */
    r = -errno;
    if (syscall(SYS_capget, &header, now) == 0 && memcmp(now, none, sizeof(now)) == 0)
        return 0;
    return error_set(err, -r, "cannot drop capabilities: %s", strerror(-r));
}

static int enter_landlock(const struct sandbox *s, struct error *lacks, struct error *err)
{
    CLEANUP(closep) int ruleset_fd = landlock_new(s->abstract_sockets);
    int r;

    if (ruleset_fd == -EOPNOTSUPP || ruleset_fd == -ENOSYS || ruleset_fd == -EPERM) {
        lack(lacks, "landlock", ruleset_fd); /* EPERM: another sandbox around us refuses it */
        return 0;
    }
    if (ruleset_fd < 0)
        return error_set(err, -ruleset_fd, "cannot set up landlock: %s", strerror(-ruleset_fd));
    for (size_t i = 0; i < s->n_paths; i++) {
        CLEANUP(closep) int fd = open(s->paths[i].path, O_PATH | O_CLOEXEC);

        if (fd < 0) /* gone, or not ours to look at */
            continue;
        r = landlock_allow(ruleset_fd, fd, s->paths[i].access);
        if (r < 0)
            return error_set(err, -r, "%s: cannot be left open to the sandbox: %s",
                             s->paths[i].path, strerror(-r));
    }
    r = landlock_enter(ruleset_fd);
    return r < 0 ? error_set(err, -r, "cannot enter landlock: %s", strerror(-r)) : 0;
}

int sandbox_enter(struct sandbox *s, struct error *ret_lacks, struct error *err)
{
    /* Asked by signal handlers and a thread that ends with the process. */
    static struct refusal_teller teller;
    struct filter_options options = {.report = s->mode == SANDBOX_REPORT,
                                     .lists = s->lists,
                                     .n_lists = s->n_lists,
                                     .teller = &teller};
    struct error why = {0};
    int r;

    if (ret_lacks)
        ret_lacks->text[0] = 0;
    if (s->mode == SANDBOX_OFF)
        return 0;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return error_set(err, errno, "cannot give up new privileges: %s", strerror(errno));
    if (s->mode == SANDBOX_STRICT) {
        if ((r = enter_landlock(s, ret_lacks, err)) < 0 || (r = drop_capabilities(err)) < 0)
            return r;
    } else {
        options.paths = s->paths;
        options.n_paths = s->n_paths;
        s->paths = NULL; /* that thread's now */
        s->n_paths = 0;
    }
    teller = s->teller;
    r = system_call_filter_enter(&options, &why);
    if (r == -EOPNOTSUPP) {
        lack(ret_lacks, "seccomp", r);
        return 0;
    }
    return r < 0 ? error_set(err, -r, "%s", why.text) : 0;
}
