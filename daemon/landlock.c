/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The C library has no functions for this, and headers are older than kernels: the numbers of the
 * interface stand here. Asking for a right that the kernel does not know is an error, so each
 * version has its mask.
 */

#include "daemon/landlock.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_landlock_create_ruleset /* the same everywhere */
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

#define CREATE_RULESET_VERSION 1u
#define RULE_PATH_BENEATH 1

#define FS_EXECUTE (UINT64_C(1) << 0)
#define FS_WRITE_FILE (UINT64_C(1) << 1)
#define FS_READ_FILE (UINT64_C(1) << 2)
#define FS_READ_DIR (UINT64_C(1) << 3)
#define FS_REMOVE_DIR (UINT64_C(1) << 4)
#define FS_REMOVE_FILE (UINT64_C(1) << 5)
#define FS_MAKE_CHAR (UINT64_C(1) << 6)
#define FS_MAKE_DIR (UINT64_C(1) << 7)
#define FS_MAKE_REG (UINT64_C(1) << 8)
#define FS_MAKE_SOCK (UINT64_C(1) << 9)
#define FS_MAKE_FIFO (UINT64_C(1) << 10)
#define FS_MAKE_BLOCK (UINT64_C(1) << 11)
#define FS_MAKE_SYM (UINT64_C(1) << 12)
#define FS_REFER (UINT64_C(1) << 13)     /* version 2 */
#define FS_TRUNCATE (UINT64_C(1) << 14)  /* 3 */
#define FS_IOCTL_DEV (UINT64_C(1) << 15) /* 5 */
#define FS_OF_VERSION_1 ((UINT64_C(1) << 13) - 1)
/* Others have no meaning for what is not a folder. */
#define FS_OF_FILE (FS_EXECUTE | FS_WRITE_FILE | FS_READ_FILE | FS_TRUNCATE | FS_IOCTL_DEV)

#define NET_BIND_TCP (UINT64_C(1) << 0) /* 4 */
#define NET_CONNECT_TCP (UINT64_C(1) << 1)

#define SCOPE_ABSTRACT_UNIX_SOCKET (UINT64_C(1) << 0) /* 6 */
#define SCOPE_SIGNAL (UINT64_C(1) << 1)

struct ruleset_attributes {
    uint64_t handled_fs, handled_net, scoped;
};

struct path_attributes {
    uint64_t allowed;
    int32_t fd;
} __attribute__((packed));

int landlock_version(void)
{
    long r = syscall(SYS_landlock_create_ruleset, NULL, 0, CREATE_RULESET_VERSION);

    return r < 0 ? 0 : (int)r;
}

static uint64_t rights_of(int version)
{
    uint64_t rights = FS_OF_VERSION_1;

    if (version >= 2)
        rights |= FS_REFER;
    if (version >= 3)
        rights |= FS_TRUNCATE;
    if (version >= 5)
        rights |= FS_IOCTL_DEV;
    return rights;
}

int landlock_new(bool abstract_sockets)
{
    struct ruleset_attributes a = {0};
    int version = landlock_version();
    size_t size = offsetof(struct ruleset_attributes, handled_net);
    long r;

    if (version == 0)
        return -EOPNOTSUPP;
    a.handled_fs = rights_of(version);
    if (version >= 4) {
        a.handled_net = NET_BIND_TCP | NET_CONNECT_TCP;
        size = offsetof(struct ruleset_attributes, scoped);
    }
    if (version >= 6) {
        a.scoped = SCOPE_SIGNAL | (abstract_sockets ? 0 : SCOPE_ABSTRACT_UNIX_SOCKET);
        size = sizeof(a);
    }
    r = syscall(SYS_landlock_create_ruleset, &a, size, 0);
    return r < 0 ? -errno : (int)r;
}

int landlock_allow(int ruleset_fd, int fd, enum sandbox_access access)
{
    struct path_attributes a = {.fd = fd};
    struct stat st;

    if (fstat(fd, &st) < 0)
        return -errno;
    switch (access) {
    case SANDBOX_READ:
        a.allowed = FS_READ_FILE | FS_READ_DIR;
        break;
    case SANDBOX_READ_FILE:
        if (S_ISDIR(st.st_mode))
            return 0;
        a.allowed = FS_READ_FILE;
        break;
    case SANDBOX_READ_FILES:
        a.allowed = FS_READ_FILE;
        break;
    case SANDBOX_WRITE:
        a.allowed = FS_READ_FILE | FS_READ_DIR | FS_WRITE_FILE | FS_TRUNCATE | FS_REMOVE_FILE |
                    FS_REMOVE_DIR | FS_MAKE_REG | FS_MAKE_DIR;
        break;
    case SANDBOX_SOCKET:
        a.allowed = FS_MAKE_SOCK | FS_REMOVE_FILE;
        break;
    case SANDBOX_DEVICE:
        a.allowed = FS_READ_FILE | FS_WRITE_FILE | FS_IOCTL_DEV;
        break;
    }
    a.allowed &= rights_of(landlock_version());
    if (!S_ISDIR(st.st_mode))
        a.allowed &= FS_OF_FILE;
    if (a.allowed == 0)
        return 0;
    return syscall(SYS_landlock_add_rule, ruleset_fd, RULE_PATH_BENEATH, &a, 0) < 0 ? -errno : 0;
}

int landlock_enter(int ruleset_fd)
{
    return syscall(SYS_landlock_restrict_self, ruleset_fd, 0) < 0 ? -errno : 0;
}
