/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <stdint.h>
#include <sys/types.h>

/*
 * Who asks, by the kernel's word or the broker's. On the socket the process is pinned by a pidfd
 * where the kernel gives one (6.5), since its number may be another's by the time polkit looks.
 */
struct client_identity {
    const char *bus_name; /* unique name on the system bus; NULL: on the socket */
    uid_t uid;
    pid_t pid;            /* 0: not known */
    int pidfd;            /* owned by whom it belongs to; -EBADF: none */
    uint64_t start_time;  /* of pid, field 22 of /proc/PID/stat; 0: not known */
    uint64_t use_granted; /* authority's: when `use` was granted; 0: it was not */
};

/* Of the process at the other end of a connected Unix socket. 0, -errno */
int client_identity_of_socket(struct client_identity *ret, int fd);

/* Whether that process is still there; -EOPNOTSUPP: no pidfd, it cannot be told. */
int client_identity_is_alive(const struct client_identity *who);

void client_identity_done(struct client_identity *who);
