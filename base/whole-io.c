/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "base/whole-io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "base/cleanup.h"

int read_whole(int fd, void *data, size_t n, uint64_t at)
{
    char *p = data;

    while (n > 0) {
        ssize_t got = pread(fd, p, n, (off_t)at);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -ENODATA;
        p += got;
        n -= (size_t)got;
        at += (uint64_t)got;
    }
    return 0;
}

int write_whole(int fd, const void *data, size_t n, uint64_t at)
{
    const char *p = data;

    while (n > 0) {
        ssize_t put = pwrite(fd, p, n, (off_t)at);

        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put < 0 ? -errno : -EIO;
        p += put;
        n -= (size_t)put;
        at += (uint64_t)put;
    }
    return 0;
}

int replace_file(const char *path, const void *head, size_t n_head, const void *data, size_t n)
{
    CLEANUP(closep) int fd = -EBADF;
    CLEANUP(freep) char *new = NULL;
    int r;

    if (asprintf(&new, "%s.new", path) < 0) {
        new = NULL;
        return -ENOMEM;
    }
    fd = open(new, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    r = write_whole(fd, head, n_head, 0);
    if (r >= 0)
        r = write_whole(fd, data, n, n_head);
    if (r >= 0 && rename(new, path) < 0)
        r = -errno;
    if (r < 0)
        unlink(new);
    return r;
}
