/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Pieces are taken from a ticket, one atomic word with the number of pieces and of the next one.
 * The caller takes pieces like everybody, so that the job gets done by those who are there: a
 * thread that sleeps, or whose core another program has just now, takes no piece and nobody waits
 * for it. That is why this is not an OpenMP region, at whose end each thread must arrive: with one
 * busy program beside it on two cores, regions of libgomp made steps take several times as long
 * (docs/performance.md).
 *
 * Who finds no piece looks for the next job for SPIN_USEC, which is longer than the gaps within a
 * step of the model, then sleeps on a futex. So an idle process uses no processor time.
 *
 * Whoever has taken a piece may read the job's description: it stays until all its pieces are done.
 */

#include "backends/cpu/team.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "backends/cpu/cores.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/thread-signals.h"

#define SPIN_USEC 100
#define SPIN_PAUSES 32 /* between looks at the clock */

struct worker {
    struct team *team;
    uint32_t number;
    pthread_t thread;
};

/* An affinity mask of any number of CPUs; empty: set is NULL. */
struct mask {
    cpu_set_t *set;
    size_t size;
};

struct team {
    uint32_t n_threads;

    struct mask caller_mask; /* to be given to the next caller */
    struct mask old_mask;    /* what the caller had before */
    pthread_t caller;        /* where there is an old mask */

    /* the job; changed by the caller when none is at work */
    team_body body;
    const void *args;

    _Alignas(64) _Atomic uint64_t ticket; /* n_pieces << 16 | next piece */
    _Alignas(64) _Atomic uint32_t done;   /* pieces; the caller sleeps on it */
    _Atomic uint32_t caller_sleeps;
    _Alignas(64) _Atomic uint32_t jobs; /* so far; the others sleep on it */
    _Atomic uint32_t sleepers;
    atomic_bool quit;
    struct worker workers[]; /* [n_threads - 1] */
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, uint32_t n)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static uint32_t n_pieces_of(uint64_t ticket)
{
    return (uint32_t)(ticket >> 16);
}

static bool has_piece(struct team *t)
{
    uint64_t ticket = atomic_load(&t->ticket);

    return (ticket & 0xffff) < n_pieces_of(ticket);
}

/* Does pieces until none is left. */
static void work(struct team *t, uint32_t thread)
{
    uint64_t ticket = atomic_load(&t->ticket);

    while ((ticket & 0xffff) < n_pieces_of(ticket)) {
        if (!atomic_compare_exchange_weak(&t->ticket, &ticket, ticket + 1))
            continue;
        t->body(t->args, (uint32_t)(ticket & 0xffff), thread);
        if (atomic_fetch_add(&t->done, 1) + 1 == n_pieces_of(ticket) &&
            atomic_load(&t->caller_sleeps))
            futex_wake(&t->done, 1);
        ticket = atomic_load(&t->ticket);
    }
}

/* Waits a little for the word to leave the value; false: it has not. */
static bool spin_while(_Atomic uint32_t *word, uint32_t value)
{
    uint64_t end = now_usec() + SPIN_USEC;

    do {
        for (unsigned i = 0; i < SPIN_PAUSES; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != value)
                return true;
            pause_briefly();
        }
    } while (now_usec() < end);
    return false;
}

static void *worker_run(void *userdata)
{
    struct worker *w = userdata;
    struct team *t = w->team;

    /* Its own name it asks for; another's is a file in /proc, which the sandbox keeps it from. */
    pthread_setname_np(pthread_self(), "llmd-compute");
    for (;;) {
        uint32_t jobs = atomic_load(&t->jobs);

        work(t, w->number);
        if (atomic_load(&t->quit))
            return NULL;
        if (spin_while(&t->jobs, jobs))
            continue;
        atomic_fetch_add(&t->sleepers, 1);
        if (!has_piece(t))
            futex_wait(&t->jobs, jobs);
        atomic_fetch_sub(&t->sleepers, 1);
    }
}

/* One more for those who wait for jobs to see. */
static void call(struct team *t, uint32_t n)
{
    atomic_fetch_add(&t->jobs, 1);
    if (n > 0 && atomic_load(&t->sleepers) > 0)
        futex_wake(&t->jobs, n);
}

static void mask_done(struct mask *m)
{
    if (m->set)
        CPU_FREE(m->set);
    *m = (struct mask){0};
}

/* The CPUs of one thread; empty when there is no memory. */
static struct mask mask_of(const struct cores *c, uint32_t thread, bool whole_core)
{
    struct mask m = {0};
    uint32_t most = 0;

    for (uint32_t i = 0; i < c->n_cpus; i++)
        most = MAX(most, c->cpus[i].number);
    m.set = CPU_ALLOC(most + 1);
    if (!m.set)
        return m;
    m.size = CPU_ALLOC_SIZE(most + 1);
    CPU_ZERO_S(m.size, m.set);
    for (uint32_t i = 0; i < c->n_cpus; i++)
        if (i == thread || (whole_core && c->cpus[i].core == c->cpus[thread].core))
            CPU_SET_S((size_t)c->cpus[i].number, m.size, m.set);
    return m;
}

void team_pin(struct team *t, const struct cores *c)
{
    bool whole_core = t->n_threads <= c->n_cores;

    if (t->n_threads < 2 || t->n_threads > c->n_cpus || t->caller_mask.set || t->old_mask.set)
        return;
    t->caller_mask = mask_of(c, 0, whole_core);
    for (uint32_t i = 1; i < t->n_threads; i++) {
        struct mask m = mask_of(c, i, whole_core);

        if (m.set) /* what fails costs speed and nothing else */
            (void)pthread_setaffinity_np(t->workers[i - 1].thread, m.size, m.set);
        mask_done(&m);
    }
}

/* Sets the caller's mask and remembers its old one; without that none is set. */
static void pin_caller(struct team *t)
{
    struct mask old = {0};

    /* the kernel wants room for all CPUs it could have */
    for (int n_cpus = 1024; n_cpus <= 1 << 18 && !old.set; n_cpus *= 4) {
        old.set = CPU_ALLOC(n_cpus);
        old.size = CPU_ALLOC_SIZE(n_cpus);
        if (old.set && pthread_getaffinity_np(pthread_self(), old.size, old.set) != 0)
            mask_done(&old);
    }
    if (old.set &&
        pthread_setaffinity_np(pthread_self(), t->caller_mask.size, t->caller_mask.set) == 0) {
        t->caller = pthread_self();
        t->old_mask = old;
    } else {
        mask_done(&old);
    }
    mask_done(&t->caller_mask);
}

void team_run(struct team *t, uint32_t n_pieces, team_body body, const void *args)
{
    uint32_t done;

    if (n_pieces == 0)
        return;
    if (t->caller_mask.set)
        pin_caller(t);
    t->body = body;
    t->args = args;
    atomic_store(&t->done, 0);
    atomic_store(&t->ticket, (uint64_t)n_pieces << 16);
    call(t, MIN(n_pieces, t->n_threads) - 1);
    work(t, 0);

    while ((done = atomic_load(&t->done)) < n_pieces) {
        if (spin_while(&t->done, done))
            continue;
        atomic_store(&t->caller_sleeps, 1);
        if (atomic_load(&t->done) == done)
            futex_wait(&t->done, done);
        atomic_store(&t->caller_sleeps, 0);
    }
}

int team_new(struct team **ret, uint32_t n_threads)
{
    struct team *t;
    sigset_t all, before;
    size_t bytes;

    n_threads = MIN(MAX(n_threads, 1u), TEAM_THREADS_MAX);
    bytes = sizeof(*t) + (n_threads - 1) * sizeof(t->workers[0]);
    t = aligned_alloc(64, ALIGN_UP(bytes, (size_t)64));
    if (!t)
        return -ENOMEM;
    *t = (struct team){.n_threads = 1};

    thread_signals_for_others(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for others */
    for (uint32_t i = 1; i < n_threads; i++) {
        struct worker *w = &t->workers[i - 1];

        *w = (struct worker){.team = t, .number = i};
        if (pthread_create(&w->thread, NULL, worker_run, w) != 0)
            break; /* those who are there will do */
        t->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    *ret = t;
    return 0;
}

struct team *team_free(struct team *t)
{
    if (!t)
        return NULL;
    atomic_store(&t->quit, true);
    call(t, t->n_threads);
    for (uint32_t i = 1; i < t->n_threads; i++)
        pthread_join(t->workers[i - 1].thread, NULL);
    if (t->old_mask.set && pthread_equal(t->caller, pthread_self()))
        (void)pthread_setaffinity_np(pthread_self(), t->old_mask.size, t->old_mask.set);
    mask_done(&t->caller_mask);
    mask_done(&t->old_mask);
    free(t);
    return NULL;
}

uint32_t team_n_threads(const struct team *t)
{
    return t->n_threads;
}
