/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "ipc/runtime-dir.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "base/cleanup.h"

static int check_own(const char *path, struct error *err)
{
    struct stat st;

    if (lstat(path, &st) < 0)
        return error_set(err, errno, "%s: %s", path, strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return error_set(err, ENOTDIR, "%s: is not a directory", path);
    if (st.st_uid != geteuid())
        return error_set(err, EPERM, "%s: belongs to user %u, not to you (%u)", path,
                         (unsigned)st.st_uid, (unsigned)geteuid());
    if (st.st_mode & 077)
        return error_set(err, EPERM, "%s: is open to other users (mode %04o); chmod 700 it", path,
                         (unsigned)(st.st_mode & 07777));
    return 0;
}

int runtime_dir(char **ret, struct error *err)
{
    CLEANUP(freep) char *path = NULL;
    const char *base = getenv("XDG_RUNTIME_DIR");
    char run[64];
    struct stat st;
    int r;

    if (!base || base[0] != '/') { /* the specification: relative paths are to be ignored */
        snprintf(run, sizeof(run), "/run/user/%u", (unsigned)geteuid());
        base = stat(run, &st) == 0 && st.st_uid == geteuid() ? run : NULL;
    }
    if (base)
        r = asprintf(&path, "%s/llmd", base);
    else
        r = asprintf(&path, "/tmp/llmd-%u", (unsigned)geteuid());
    if (r < 0) {
        path = NULL;
        return error_set(err, ENOMEM, "out of memory");
    }

    if (mkdir(path, 0700) < 0 && errno != EEXIST)
        return error_set(err, errno, "cannot make %s: %s", path, strerror(errno));
    r = check_own(path, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(path);
    return 0;
}

int peer_of(int fd, struct peer *ret)
{
    struct ucred c;
    socklen_t n = sizeof(c);

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &n) < 0)
        return -errno;
    *ret = (struct peer){.pid = c.pid, .uid = c.uid, .gid = c.gid};
    return 0;
}
