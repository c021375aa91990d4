/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "base/whole-io.h"

#include <errno.h>
#include <unistd.h>

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
