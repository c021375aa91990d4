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
    a_sleeper_is_woken();
    extremes();
    return 0;
}
