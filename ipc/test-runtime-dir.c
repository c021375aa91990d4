/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "ipc/runtime-dir.h"

int main(void)
{
    char base[] = "/tmp/test-runtime-dir-XXXXXX", path[64], other[64];
    CLEANUP(freep) char *dir = NULL;
    char *unchanged = base;
    struct error err;
    struct stat st;
    struct peer peer;
    int pair[2];

    assert(mkdtemp(base));
    snprintf(path, sizeof(path), "%s/llmd", base);
    snprintf(other, sizeof(other), "%s/elsewhere", base);
    setenv("XDG_RUNTIME_DIR", base, 1);

    umask(0);
    assert(runtime_dir(&dir, &err) == 0 && strcmp(dir, path) == 0);
    assert(stat(path, &st) == 0 && (st.st_mode & 07777) == 0700);

    /* open to others, a link, a file: refused, and nothing is returned */
    assert(chmod(path, 0750) == 0);
    assert(runtime_dir(&unchanged, &err) == -EPERM && strstr(err.text, "chmod 700"));
    assert(rename(path, other) == 0 && chmod(other, 0700) == 0 && symlink(other, path) == 0);
    assert(runtime_dir(&unchanged, &err) == -ENOTDIR);
    assert(unlink(path) == 0 && rmdir(other) == 0);
    setenv("XDG_RUNTIME_DIR", other, 1);
    assert(runtime_dir(&unchanged, &err) == -ENOENT && strstr(err.text, other));
    assert(unchanged == base);

    if (geteuid() == 0) { /* somebody else's */
        setenv("XDG_RUNTIME_DIR", base, 1);
        assert(mkdir(path, 0700) == 0 && chown(path, 65534, 65534) == 0);
        assert(runtime_dir(&unchanged, &err) == -EPERM && strstr(err.text, "65534"));
        assert(rmdir(path) == 0);
    }
    assert(rmdir(base) == 0);

    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    assert(peer_of(pair[0], &peer) == 0 && peer.uid == geteuid() && peer.pid == getpid());
    close(pair[0]);
    close(pair[1]);
    assert(peer_of(pair[0], &peer) == -EBADF);
    return 0;
}
