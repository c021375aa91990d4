/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/fd-store.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/log.h"

#define NAME_BYTES 64u

struct fd_store {
    bool has_manager, left;
    bool told; /* that it cannot be told, in the log */
    char **names;
    int *fds; /* [n]; negative: taken */
    size_t n;
};

static void free_names(char **names)
{
    for (char **name = names; name && *name; name++)
        free(*name);
    free(names);
}

int fd_store_take(struct fd_store **ret)
{
    CLEANUP(fd_store_freep) struct fd_store *s = calloc(1, sizeof(*s));
    int n;

    if (!s)
        return -ENOMEM;
    s->has_manager = getenv("NOTIFY_SOCKET");
    n = sd_listen_fds_with_names(/* unset_environment= */ 1, &s->names);
    if (n < 0)
        return n;
    if (n > 0) {
        s->fds = calloc((size_t)n, sizeof(s->fds[0]));
        if (!s->fds)
            return -ENOMEM;
    }
    for (; s->n < (size_t)n; s->n++)
        s->fds[s->n] = SD_LISTEN_FDS_START + (int)s->n;
    *ret = TAKE_PTR(s);
    return 0;
}

struct fd_store *fd_store_free(struct fd_store *s)
{
    if (!s)
        return NULL;
    for (size_t i = 0; i < s->n; i++)
        closep(&s->fds[i]);
    free(s->fds);
    free_names(s->names);
    free(s);
    return NULL;
}

void fd_store_freep(struct fd_store **s)
{
    *s = fd_store_free(*s);
}

static const char *name_of(const struct fd_store *s, size_t i)
{
    return s->names && s->names[i] ? s->names[i] : "unknown";
}

/* ---- what the manager is told ---- */

int fd_store_push(struct fd_store *s, const char *name, const int *fds, size_t n)
{
    char text[NAME_BYTES + 32];
    int r;

    if (!s->has_manager || s->left)
        return 0;
    snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=%s", name);
    r = sd_pid_notify_with_fds(0, /* unset_environment= */ 0, text, fds, (unsigned)n);
    if (r >= 0)
        return 0;
    if (!s->told)
        log_warning(
            "the service manager cannot be told what to keep: %s; sessions will not outlive "
            "this process",
            strerror(-r));
    s->told = true;
    return r;
}

/* What it cannot be told is lost with the service at the latest. */
void fd_store_remove(struct fd_store *s, const char *name)
{
    if (s->has_manager && !s->left)
        (void)sd_notifyf(/* unset_environment= */ 0, "FDSTOREREMOVE=1\nFDNAME=%s", name);
}

int fd_store_push_id(struct fd_store *s, const char *prefix, uint64_t id, const int *fds, size_t n)
{
    char name[NAME_BYTES];

    snprintf(name, sizeof(name), "%s-%" PRIu64, prefix, id);
    return fd_store_push(s, name, fds, n);
}

void fd_store_remove_id(struct fd_store *s, const char *prefix, uint64_t id)
{
    char name[NAME_BYTES];

    snprintf(name, sizeof(name), "%s-%" PRIu64, prefix, id);
    fd_store_remove(s, name);
}

void fd_store_leave(struct fd_store *s)
{
    s->left = true;
}

/* ---- what was inherited ---- */

int fd_store_next(struct fd_store *s, const char *name, int *ret_fd)
{
    for (size_t i = 0; i < s->n; i++) {
        if (s->fds[i] < 0 || strcmp(name_of(s, i), name) != 0)
            continue;
        *ret_fd = TAKE_FD(s->fds[i]);
        return 1;
    }
    return 0;
}

/* A number as we write them: nothing before it or behind, and no other way to write the same. */
static bool parse_id(const char *text, uint64_t *ret)
{
    char *end;

    if (text[0] < '1' || text[0] > '9')
        return false;
    errno = 0;
    *ret = strtoull(text, &end, 10);
    return errno == 0 && *end == 0;
}

int fd_store_next_id(struct fd_store *s, const char *prefix, uint64_t *ret_id, int *ret_fd)
{
    size_t n = strlen(prefix);

    for (size_t i = 0; i < s->n; i++) {
        const char *name = name_of(s, i);

        if (s->fds[i] < 0 || strncmp(name, prefix, n) != 0 || name[n] != '-' ||
            !parse_id(name + n + 1, ret_id))
            continue;
        *ret_fd = TAKE_FD(s->fds[i]);
        return 1;
    }
    return 0;
}

void fd_store_drop_rest(struct fd_store *s)
{
    for (size_t i = 0; i < s->n; i++) {
        if (s->fds[i] < 0)
            continue;
        log_warning("inherited descriptor %d (%s) is none of ours; closed", s->fds[i],
                    name_of(s, i));
        close(TAKE_FD(s->fds[i]));
    }
}
