/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/reachable-sockets.h"

#include <errno.h>
#include <stdalign.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/checked.h"

#ifndef SYS_mseal
#define SYS_mseal 462 /* the same everywhere */
#endif

struct place {
    alignas(128) struct sockaddr_un address;
    socklen_t length;
};

static struct place *places; /* [n_places], of pages of their own */
static size_t n_places;

static size_t all_bytes(void)
{
    return ALIGN_UP(REACHABLE_SOCKETS_MAX * sizeof(struct place), (size_t)sysconf(_SC_PAGESIZE));
}

int reachable_sockets_add(const char *path)
{
    struct place *p;
    size_t n = strlen(path);

    if (n == 0 || n >= sizeof(p->address.sun_path))
        return -ENAMETOOLONG;
    if (n_places >= REACHABLE_SOCKETS_MAX)
        return -ENOSPC;
    if (!places) {
        void *map =
            mmap(NULL, all_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (map == MAP_FAILED)
            return -ENOMEM;
        places = map;
    }
    p = &places[n_places++];
    p->address.sun_family = AF_UNIX;
    memcpy(p->address.sun_path, path, n);
    p->length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n);
    if (path[0] == '@')
        p->address.sun_path[0] = 0; /* the rest is its name, by the length */
    else
        p->length++;
    return 0;
}

int reachable_sockets_seal(void)
{
    if (!places)
        return 0;
    if (mprotect(places, all_bytes(), PROT_READ) < 0)
        return -errno;
    (void)syscall(SYS_mseal, places, all_bytes(), 0);
    return 0;
}

const struct sockaddr_un *reachable_sockets_get(size_t i, socklen_t *ret_length)
{
    if (i >= n_places)
        return NULL;
    *ret_length = places[i].length;
    return &places[i].address;
}

const struct sockaddr_un *reachable_sockets_find(const struct sockaddr_un *address,
                                                 socklen_t length, socklen_t *ret_length)
{
    const size_t head = offsetof(struct sockaddr_un, sun_path);

    if (!address || length <= head || length > sizeof(*address) || address->sun_family != AF_UNIX)
        return NULL;
    /* A path ends with its NUL, however long the address is said to be. */
    if (address->sun_path[0])
        length = (socklen_t)(head + strnlen(address->sun_path, length - head) + 1);
    for (size_t i = 0; i < n_places; i++)
        if (places[i].length == length &&
            memcmp(places[i].address.sun_path, address->sun_path, length - head - 1) == 0 &&
            (address->sun_path[0] || places[i].address.sun_path[length - head - 1] ==
                                         address->sun_path[length - head - 1])) {
            *ret_length = length;
            return &places[i].address;
        }
    return NULL;
}
