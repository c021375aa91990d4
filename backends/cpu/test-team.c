/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* Each piece is done once, by a thread that nobody else is at that moment; jobs do not mix. */

#undef NDEBUG
#include <assert.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "backends/cpu/cores.h"
#include "backends/cpu/team.h"

#define THREADS 5
#define PIECES 300

struct job {
    uint32_t number;
    _Atomic uint32_t *taken;   /* [PIECES] the job that did it last */
    _Atomic uint32_t *present; /* [THREADS] */
};

static void body(const void *args, uint32_t piece, uint32_t thread)
{
    const struct job *j = args;

    assert(thread < THREADS);
    assert(atomic_fetch_add(&j->present[thread], 1) == 0);
    assert(atomic_exchange(&j->taken[piece], j->number) == j->number - 1);
    if (piece % 7 == 0)
        sched_yield();
    atomic_fetch_sub(&j->present[thread], 1);
}

static void many_jobs(void)
{
    static _Atomic uint32_t taken[PIECES], present[THREADS];
    struct team *t;

    memset(taken, 0, sizeof(taken));
    assert(team_new(&t, THREADS) == 0);
    assert(team_n_threads(t) == THREADS);
    team_run(t, 0, NULL, NULL);
    for (uint32_t n = 1; n <= 2000; n++) {
        struct job j = {n, taken, present};

        team_run(t, PIECES, body, &j);
        for (uint32_t i = 0; i < PIECES; i++)
            assert(taken[i] == n);
    }
    team_free(t);
}

/* Both threads are in the job at the same time, though the other slept before. */
static void meet(const void *args, uint32_t piece, uint32_t thread)
{
    atomic_uint *here = (atomic_uint *)args;

    (void)piece;
    (void)thread;
    atomic_fetch_add(here, 1);
    while (atomic_load(here) < 2)
        sched_yield();
}

struct rendezvous {
    pid_t *tids; /* [THREADS] */
    atomic_uint here;
};

/* All threads of the team are in the job at the same time. */
static void gather(const void *args, uint32_t piece, uint32_t thread)
{
    struct rendezvous *r = (struct rendezvous *)args;

    (void)piece;
    r->tids[thread] = gettid();
    atomic_fetch_add(&r->here, 1);
    while (atomic_load(&r->here) < THREADS)
        sched_yield();
}

static bool sleeps(pid_t tid)
{
    char path[64], line[512];
    FILE *f;
    bool answer;

    snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)tid);
    f = fopen(path, "re");
    assert(f && fgets(line, sizeof(line), f));
    fclose(f);
    answer = strstr(line, ") S ");
    return answer;
}

static void remember_tid(const void *args, uint32_t piece, uint32_t thread)
{
    _Atomic pid_t *tid = (_Atomic pid_t *)args;

    (void)piece;
    if (thread == 1)
        atomic_store(tid, gettid());
    while (atomic_load(tid) == 0)
        sched_yield();
}

/* Threads that have nothing to do end up asleep, all of them, and stay so: no time is used. */
static void idle_threads_sleep(void)
{
    pid_t tids[THREADS] = {0};
    struct rendezvous r = {.tids = tids};
    struct team *t;

    assert(team_new(&t, THREADS) == 0);
    team_run(t, THREADS, gather, &r);
    for (uint32_t i = 1; i < THREADS; i++)
        while (!sleeps(tids[i]))
            sched_yield();
    for (uint32_t n = 0; n < 100; n++)
        for (uint32_t i = 1; i < THREADS; i++)
            assert(sleeps(tids[i]));
    team_free(t);
}

static void a_sleeper_is_woken(void)
{
    struct team *t;
    _Atomic pid_t tid = 0;

    assert(team_new(&t, 2) == 0);
    for (unsigned i = 0; i < 20; i++) {
        atomic_uint here = 0;

        tid = 0;
        team_run(t, 2, remember_tid, (const void *)&tid);
        while (!sleeps(tid))
            sched_yield();
        team_run(t, 2, meet, (const void *)&here);
        assert(here == 2);
    }
    team_free(t);
}

struct masks {
    cpu_set_t of[2]; /* the caller's, the other's */
    atomic_uint here;
};

static void note_mask(const void *args, uint32_t piece, uint32_t thread)
{
    struct masks *m = (struct masks *)args;

    (void)piece;
    assert(sched_getaffinity(0, sizeof(m->of[0]), &m->of[thread]) == 0);
    atomic_fetch_add(&m->here, 1);
    while (atomic_load(&m->here) < 2) /* so that each thread takes one piece */
        sched_yield();
}

static struct masks masks_of(struct team *t)
{
    struct masks m = {.here = 0};

    team_run(t, 2, note_mask, &m);
    return m;
}

/* Two threads have a core each while the team lives, and the caller its own mask afterwards. */
static void pinned(void)
{
    struct cpu same[2] = {{0, 0}, {1, 0}}, two[2] = {{0, 0}, {1, 1}}, none[2] = {{0, 0}, {9999, 1}};
    struct cores c = {2, 2, two};
    cpu_set_t before, now;
    struct masks m;
    struct team *t;

    assert(sched_getaffinity(0, sizeof(before), &before) == 0);
    if (!CPU_ISSET(0, &before) || !CPU_ISSET(1, &before)) {
        fputs("pinning is not tested: CPUs 0 and 1 are not both there\n", stderr);
        return;
    }
    assert(team_new(&t, 2) == 0);
    m = masks_of(t);
    assert(CPU_EQUAL(&m.of[0], &before) && CPU_EQUAL(&m.of[1], &before)); /* not asked for */
    team_pin(t, &c);
    m = masks_of(t);
    assert(CPU_COUNT(&m.of[0]) == 1 && CPU_ISSET(0, &m.of[0]));
    assert(CPU_COUNT(&m.of[1]) == 1 && CPU_ISSET(1, &m.of[1]));
    /* moved away by somebody, as the system does where a CPU goes */
    assert(sched_setaffinity(0, sizeof(before), &m.of[1]) == 0);
    m = masks_of(t);
    assert(CPU_ISSET(1, &m.of[0]) && CPU_ISSET(1, &m.of[1]));
    team_free(t);
    assert(sched_getaffinity(0, sizeof(now), &now) == 0 && CPU_EQUAL(&now, &before));

    /* one core's hyper-threads: one each, as there is no other core */
    c = (struct cores){2, 1, same};
    assert(team_new(&t, 2) == 0);
    team_pin(t, &c);
    m = masks_of(t);
    assert(CPU_COUNT(&m.of[0]) == 1 && CPU_COUNT(&m.of[1]) == 1);
    team_free(t);

    /* more threads than CPUs, and CPUs that are none: as they are */
    c = (struct cores){1, 1, same};
    assert(team_new(&t, 2) == 0);
    team_pin(t, &c);
    m = masks_of(t);
    assert(CPU_EQUAL(&m.of[0], &before) && CPU_EQUAL(&m.of[1], &before));
    c = (struct cores){2, 2, none};
    team_pin(t, &c);
    m = masks_of(t);
    assert(CPU_EQUAL(&m.of[1], &before));
    team_free(t);
    assert(sched_getaffinity(0, sizeof(now), &now) == 0 && CPU_EQUAL(&now, &before));
}

/* Alone, and with more threads than anybody has. */
static void extremes(void)
{
    struct team *t;
    atomic_uint here = 1;

    assert(team_new(&t, 0) == 0 && team_n_threads(t) == 1);
    team_run(t, 1, meet, (const void *)&here);
    assert(here == 2);
    assert(!team_free(t) && !team_free(NULL));
}

int main(void)
{
    many_jobs();
    idle_threads_sleep();
    a_sleeper_is_woken();
    pinned();
    extremes();
    return 0;
}
