/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/client-identity.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "ipc/runtime-dir.h"

#ifndef SO_PEERPIDFD /* newer than Debian 12's headers */
#define SO_PEERPIDFD 77
#endif

/* Field 22 of /proc/PID/stat, counted behind the name, which may hold anything; 0: unknown. */
static uint64_t start_time_of(pid_t pid)
{
    CLEANUP(fclosep) FILE *f = NULL;
    char path[64], line[1024], *at;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    f = fopen(path, "re");
    if (!f || !fgets(line, sizeof(line), f))
        return 0;
    at = strrchr(line, ')');
    for (int field = 2; at && field < 22; field++) {
        at = strchr(at, ' ');
        if (at)
            at++;
    }
    return at ? strtoull(at, NULL, 10) : 0;
}

int client_identity_is_alive(const struct client_identity *who)
{
    struct pollfd p = {.fd = who->pidfd, .events = POLLIN};

    if (who->pidfd < 0)
        return -EOPNOTSUPP;
    return poll(&p, 1, 0) == 0;
}

int client_identity_of_socket(struct client_identity *ret, int fd)
{
    struct client_identity who = {.pidfd = -EBADF};
    struct peer peer;
    socklen_t n = sizeof(who.pidfd);
    int r;

    r = peer_of(fd, &peer);
    if (r < 0)
        return r;
    who.uid = peer.uid;
    who.pid = peer.pid;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &who.pidfd, &n) < 0)
        who.pidfd = -EBADF;
    who.start_time = start_time_of(who.pid);
    if (client_identity_is_alive(&who) == 0) {
        /* It has ended since it connected: what was just read may be another process's. */
        who.pid = 0;
        who.start_time = 0;
    }
    *ret = who;
    return 0;
}

void client_identity_done(struct client_identity *who)
{
    closep(&who->pidfd);
    who->pidfd = -EBADF;
}
