/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/power.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"

/* The file's first line; "": there is none. */
static void read_line(int supply_fd, const char *name, char ret[32])
{
    CLEANUP(closep) int fd = openat(supply_fd, name, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, ret, 31);

    ret[n < 0 ? 0 : n] = 0;
    ret[strcspn(ret, "\n")] = 0;
}

enum supply {
    SUPPLY_NONE, /* or one that says nothing */
    SUPPLY_MAINS,
    SUPPLY_BATTERY,
};

/* What it gives at the moment. */
static enum supply look_at(int supply_fd)
{
    char type[32], text[32];

    read_line(supply_fd, "type", type);
    if (strcmp(type, "Battery") == 0) {
        read_line(supply_fd, "scope", text);
        if (strcmp(text, "Device") == 0)
            return SUPPLY_NONE;
        read_line(supply_fd, "status", text);
        return strcmp(text, "Discharging") == 0 ? SUPPLY_BATTERY : SUPPLY_NONE;
    }
    read_line(supply_fd, "online", text);
    return text[0] && strcmp(text, "0") != 0 ? SUPPLY_MAINS : SUPPLY_NONE;
}

bool power_on_battery(const char *folder)
{
    CLEANUP(closedirp) DIR *dir = opendir(folder);
    const struct dirent *d;
    bool discharges = false;

    while (dir && (d = readdir(dir))) {
        CLEANUP(closep) int fd = -EBADF;

        if (d->d_name[0] == '.')
            continue;
        fd = openat(dirfd(dir), d->d_name, O_PATH | O_DIRECTORY | O_CLOEXEC);
        switch (fd < 0 ? SUPPLY_NONE : look_at(fd)) {
        case SUPPLY_NONE:
            break;
        case SUPPLY_MAINS:
            return false;
        case SUPPLY_BATTERY:
            discharges = true;
            break;
        }
    }
    return discharges;
}
