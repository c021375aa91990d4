/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Hyper-threads of a core are the CPUs whose lists in sysfs begin with the same number, which holds
 * where some of them are offline or not allowed too. Everything read here is a hint: where a
 * container hides it, each CPU counts as a core.
 */

#include "backends/cpu/cores.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"

/* First line of folder/name without its end; false when there is none. */
static bool read_line(const char *folder, const char *name, char *line, size_t size)
{
    char path[4096 + 64];
    CLEANUP(fclosep) FILE *f = NULL;

    if (snprintf(path, sizeof(path), "%s/%s", folder, name) >= (int)sizeof(path))
        return false;
    f = fopen(path, "re");
    if (!f || !fgets(line, (int)size, f))
        return false;
    line[strcspn(line, "\n")] = '\0';
    return true;
}

/* A whole number at *at, which is then behind it. */
static bool take_number(const char **at, uint32_t *ret)
{
    const char *p = *at;
    uint32_t n = 0;

    for (; *p >= '0' && *p <= '9'; p++)
        if (ckd_mul(&n, n, 10) || ckd_add(&n, n, *p - '0'))
            return false;
    if (p == *at)
        return false;
    *at = p;
    *ret = n;
    return true;
}

/* The least number of a list like "0-3,8,10-11"; member itself if that is not one with it. */
static uint32_t first_of_list(const char *list, uint32_t member)
{
    uint32_t least = UINT32_MAX;
    bool found = false;

    for (const char *p = list;; p++) {
        uint32_t from, to;

        if (!take_number(&p, &from))
            return member;
        to = from;
        if (*p == '-') {
            p++;
            if (!take_number(&p, &to) || to < from)
                return member;
        }
        least = MIN(least, from);
        found = found || (member >= from && member <= to);
        if (*p == '\0')
            return found ? least : member;
        if (*p != ',')
            return member;
    }
}

struct candidate {
    uint32_t number;
    uint32_t first; /* the least number among its core's CPUs, allowed or not */
    uint32_t rank;  /* how many of its core's CPUs are allowed and come before it */
    uint32_t speed; /* 0: unknown */
};

static void describe(struct candidate *c, const char *folder)
{
    char own[4096], line[4096];
    const char *at = line;

    c->first = c->number;
    c->speed = 0;
    if (snprintf(own, sizeof(own), "%s/cpu%u", folder, c->number) >= (int)sizeof(own))
        return;
    if (read_line(own, "topology/core_cpus_list", line, sizeof(line)) ||
        read_line(own, "topology/thread_siblings_list", line, sizeof(line))) /* before 5.3 */
        c->first = first_of_list(line, c->number);
    if ((read_line(own, "cpu_capacity", line, sizeof(line)) ||
         read_line(own, "cpufreq/cpuinfo_max_freq", line, sizeof(line))) &&
        !take_number(&at, &c->speed))
        c->speed = 0;
}

static int compare_first(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;

    if (x->first != y->first)
        return x->first < y->first ? -1 : 1;
    return (x->number > y->number) - (x->number < y->number);
}

/* As threads should take them. */
static int compare_worth(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;

    if (x->rank != y->rank)
        return x->rank < y->rank ? -1 : 1;
    if (x->speed != y->speed)
        return x->speed > y->speed ? -1 : 1;
    return compare_first(a, b);
}

int cores_order(struct cores *ret, const char *folder, const uint32_t *allowed, uint32_t n)
{
    CLEANUP(freep) struct candidate *list = calloc(MAX(n, 1u), sizeof(*list));
    struct cores c = {.n_cpus = n};

    c.cpus = calloc(MAX(n, 1u), sizeof(*c.cpus));
    if (!list || !c.cpus) {
        free(c.cpus);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < n; i++) {
        list[i].number = allowed[i];
        describe(&list[i], folder);
    }
    qsort(list, n, sizeof(*list), compare_first);
    for (uint32_t i = 1; i < n; i++)
        if (list[i].first == list[i - 1].first)
            list[i].rank = list[i - 1].rank + 1;
    qsort(list, n, sizeof(*list), compare_worth);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t core = 0;

        if (list[i].rank == 0)
            core = c.n_cores++;
        else
            while (list[core].first != list[i].first)
                core++;
        c.cpus[i] = (struct cpu){list[i].number, core};
    }
    *ret = c;
    return 0;
}

/* The numbers in this thread's mask, ascending; NULL with *ret_n 0 where that cannot be told. */
static uint32_t *allowed_cpus(uint32_t *ret_n)
{
    uint32_t *list = NULL;

    *ret_n = 0;
    /* a fixed cpu_set_t ends at 1024 CPUs; the kernel says EINVAL for a set that is too small */
    for (int n_cpus = 1024; n_cpus <= 1 << 18; n_cpus *= 4) {
        cpu_set_t *set = CPU_ALLOC(n_cpus);
        size_t size = CPU_ALLOC_SIZE(n_cpus);
        int r = set ? sched_getaffinity(0, size, set) : -1;
        bool too_small = set && r < 0 && errno == EINVAL;

        if (r == 0)
            list = calloc((size_t)CPU_COUNT_S(size, set) + 1, sizeof(*list));
        for (int i = 0; list && i < n_cpus; i++)
            if (CPU_ISSET_S((size_t)i, size, set))
                list[(*ret_n)++] = (uint32_t)i;
        if (set)
            CPU_FREE(set);
        if (!too_small)
            break;
    }
    return list;
}

int cores_read(struct cores *ret)
{
    uint32_t n;
    CLEANUP(freep) uint32_t *allowed = allowed_cpus(&n);

    return cores_order(ret, "/sys/devices/system/cpu", allowed, n);
}

void cores_done(struct cores *c)
{
    free(c->cpus);
    *c = (struct cores){0};
}

/* Cores that the quota of one cgroup folder amounts to, rounded up; 0: no quota. */
static uint32_t folder_quota(const char *folder)
{
    char line[64];
    long long quota = 0, period = 0;

    if (read_line(folder, "cpu.max", line, sizeof(line))) {
        if (sscanf(line, "%lld %lld", &quota, &period) != 2)
            return 0; /* "max 100000" */
    } else if (read_line(folder, "cpu.cfs_quota_us", line, sizeof(line))) {
        if (sscanf(line, "%lld", &quota) != 1 ||
            !read_line(folder, "cpu.cfs_period_us", line, sizeof(line)) ||
            sscanf(line, "%lld", &period) != 1)
            return 0;
    }
    if (quota <= 0 || period <= 0 || quota / period >= UINT16_MAX)
        return 0;
    return (uint32_t)((quota + period - 1) / period);
}

/* The least quota from mount/path up to mount. */
static uint32_t tree_quota(const char *mount, const char *path)
{
    char folder[4096];
    size_t mount_length = strlen(mount);
    uint32_t least = 0;

    if (snprintf(folder, sizeof(folder), "%s%s", mount, path) >= (int)sizeof(folder))
        return 0;
    while (strlen(folder) >= mount_length) {
        uint32_t q = folder_quota(folder);
        char *slash;

        if (q && (!least || q < least))
            least = q;
        slash = strrchr(folder, '/');
        if (!slash)
            break;
        *slash = '\0';
    }
    return least;
}

/* Wrong or unreadable files mean no limit. */
uint32_t cores_quota(void)
{
    char line[4096];
    uint32_t least = 0;
    CLEANUP(fclosep) FILE *f = fopen("/proc/self/cgroup", "re");

    while (f && fgets(line, sizeof(line), f)) { /* id:controllers:path */
        char *controllers = strchr(line, ':'), *path, *name, *save = NULL;
        uint32_t q = 0;

        line[strcspn(line, "\n")] = '\0';
        if (!controllers)
            continue;
        path = strchr(++controllers, ':');
        if (!path)
            continue;
        *path++ = '\0';
        if (*controllers == '\0') {
            q = tree_quota("/sys/fs/cgroup", path);
        } else {
            for (name = strtok_r(controllers, ",", &save); name; name = strtok_r(NULL, ",", &save))
                if (strcmp(name, "cpu") == 0)
                    q = tree_quota("/sys/fs/cgroup/cpu", path);
        }
        if (q && (!least || q < least))
            least = q;
    }
    return least;
}
