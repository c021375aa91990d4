/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Cores are told apart by what a folder like sysfs says, whatever it says or lacks. */

#undef NDEBUG
#include <assert.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "backends/cpu/cores.h"
#include "base/checked.h"

static char root[64];

static void run(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void run(const char *format, ...)
{
    char command[512];
    va_list ap;

    va_start(ap, format);
    vsnprintf(command, sizeof(command), format, ap);
    va_end(ap);
    assert(system(command) == 0);
}

/* A file of the fake folder, with the folders it is in. */
static void put(uint32_t cpu, const char *name, const char *text)
{
    char path[256];
    FILE *f;

    snprintf(path, sizeof(path), "%s/cpu%u", root, cpu);
    (void)mkdir(path, 0700);
    if (strchr(name, '/')) {
        snprintf(path, sizeof(path), "%s/cpu%u/%.*s", root, cpu, (int)strcspn(name, "/"), name);
        (void)mkdir(path, 0700);
    }
    snprintf(path, sizeof(path), "%s/cpu%u/%s", root, cpu, name);
    f = fopen(path, "we");
    assert(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

static void siblings(uint32_t cpu, const char *list)
{
    put(cpu, "topology/core_cpus_list", list);
}

static void empty(void)
{
    run("rm -rf %s/*", root);
}

/* allowed: "0,2,3"; wanted: "number:core" of each, in order. */
static void expect(const char *allowed, uint32_t n_cores, const char *wanted)
{
    uint32_t list[64], n = 0;
    char got[512] = "";
    struct cores c;

    for (const char *p = allowed; *p;) {
        list[n++] = (uint32_t)strtoul(p, (char **)&p, 10);
        p += *p == ',';
    }
    assert(cores_order(&c, root, list, n) == 0);
    for (uint32_t i = 0; i < c.n_cpus; i++)
        snprintf(got + strlen(got), sizeof(got) - strlen(got), "%s%u:%u", i ? " " : "",
                 c.cpus[i].number, c.cpus[i].core);
    if (c.n_cpus != n || c.n_cores != n_cores || strcmp(got, wanted) != 0) {
        fprintf(stderr, "%s: %u cores, %s instead of %u cores, %s\n", allowed, c.n_cores, got,
                n_cores, wanted);
        abort();
    }
    cores_done(&c);
    assert(!c.cpus && c.n_cpus == 0);
}

/* Numbered as Intel's (siblings far apart) and as AMD's in some virtual machines (side by side). */
static void hyper_threads(void)
{
    empty();
    for (uint32_t i = 0; i < 4; i++) {
        char list[16];

        snprintf(list, sizeof(list), "%u,%u\n", i, i + 4);
        siblings(i, list);
        siblings(i + 4, list);
    }
    expect("0,1,2,3,4,5,6,7", 4, "0:0 1:1 2:2 3:3 4:0 5:1 6:2 7:3");
    /* a restricted mask: only second threads, and a core of which both are there */
    expect("1,4,5,6", 3, "4:0 1:1 6:2 5:1");
    expect("7", 1, "7:0");

    empty();
    for (uint32_t i = 0; i < 6; i++) {
        char list[16];

        snprintf(list, sizeof(list), "%u-%u\n", i & ~1u, i | 1u);
        put(i, "topology/thread_siblings_list", list); /* the old name */
    }
    expect("0,1,2,3,4,5", 3, "0:0 2:1 4:2 1:0 3:1 5:2");

    empty(); /* four threads a core, with a hole where one is offline */
    for (uint32_t i = 0; i < 8; i++)
        siblings(i, i < 4 ? "0-1,3\n" : "4-7\n");
    expect("0,1,3,4,5,6,7", 2, "0:0 4:1 1:0 5:1 3:0 6:1 7:1");
}

/* Two fast cores with hyper-threads, four slow ones without: fast ones first. */
static void hybrid(void)
{
    static const char *const lists[] = {"0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"};

    empty();
    for (uint32_t i = 0; i < 8; i++) {
        siblings(7 - i, lists[7 - i]);
        put(i, "cpu_capacity", i < 4 ? "1024\n" : "560\n");
    }
    expect("0,1,2,3,4,5,6,7", 6, "0:0 2:1 4:2 5:3 6:4 7:5 1:0 3:1");

    empty(); /* slow ones first in number, told by the frequency */
    for (uint32_t i = 0; i < 4; i++)
        put(i, "cpufreq/cpuinfo_max_freq", i < 2 ? "3800000\n" : "5200000\n");
    expect("0,1,2,3", 4, "2:0 3:1 0:2 1:3");
}

/* Whatever cannot be understood makes a CPU its own core. */
static void odd(void)
{
    static const char *const bad[] = {
        "",
        "\n",
        "x\n",
        "0-\n",
        "-1\n",
        "0-1,\n",
        "0,,1\n",
        "99999999999999999999-1\n",
        "4294967296\n",
        "3-0\n",
        "0-1 2\n",
        "0-3:2/4\n",
        "7\n" /* without the CPU itself */,
    };

    empty();
    expect("", 0, "");
    expect("0,5,900", 3, "0:0 5:1 900:2"); /* no sysfs */
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        empty();
        siblings(0, bad[i]);
        siblings(1, bad[i]);
        expect("0,1", 2, "0:0 1:1");
    }
    empty(); /* they do not agree with each other */
    siblings(0, "0-1");
    siblings(1, "1");
    siblings(2, "0-4294967295");
    expect("0,1,2", 2, "0:0 1:1 2:0");
}

static void this_machine(void)
{
    cpu_set_t before, one;
    struct cores c;
    uint32_t n;

    assert(cores_read(&c) == 0);
    assert(c.n_cpus >= 1 && c.n_cores >= 1 && c.n_cores <= c.n_cpus);
    n = c.cpus[c.n_cpus - 1].number;
    cores_done(&c);

    assert(sched_getaffinity(0, sizeof(before), &before) == 0);
    CPU_ZERO(&one);
    CPU_SET(n, &one);
    assert(sched_setaffinity(0, sizeof(one), &one) == 0);
    assert(cores_read(&c) == 0);
    assert(c.n_cpus == 1 && c.n_cores == 1 && c.cpus[0].number == n && c.cpus[0].core == 0);
    cores_done(&c);
    assert(sched_setaffinity(0, sizeof(before), &before) == 0);
}

int main(void)
{
    snprintf(root, sizeof(root), "/tmp/test-cores-XXXXXX");
    assert(mkdtemp(root));
    hyper_threads();
    hybrid();
    odd();
    this_machine();
    run("rm -rf %s", root);
    return 0;
}
