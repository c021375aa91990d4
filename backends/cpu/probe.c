/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Work is cut into more pieces than there are threads and dealt by the team, as the engine's is: a
 * core that is disturbed then takes less of a pass instead of holding it up. A pass lasts some
 * 20 ms, a probe about half a second.
 */

#include "backends/cpu/probe.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backends/cpu/cores.h"
#include "backends/cpu/probe-read.h"
#include "backends/cpu/team.h"
#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"

#define PIECES_PER_THREAD 16
#define PASSES_MAX 100
#define PASSES_MIN 5
#define PROBE_USEC 500000 /* of all passes together, about */
#define PASS_USEC 20000   /* of one, where we choose */
#define PIECE_ALIGN ((size_t)4096)

struct probe {
    struct cores cores;
    struct team *team;
    struct probe_kernels kernels;
};

static uint64_t read_plain(const void *data, size_t bytes)
{
    return probe_read_lines(data, bytes);
}

void probe_use_reference(struct probe_kernels *k)
{
    k->read = read_plain;
}

static const struct level {
    const char *name;
    void (*use)(struct probe_kernels *k); /* NULL: not in this build */
} levels[] = {
    {"reference", probe_use_reference},
#if HAVE_PROBE_AVX2
    {"avx2", probe_use_avx2},
#else
    {"avx2", NULL},
#endif
#if HAVE_PROBE_AVX512
    {"avx512", probe_use_avx512},
#else
    {"avx512", NULL},
#endif
#if HAVE_PROBE_AMX
    {"amx", probe_use_amx},
#else
    {"amx", NULL},
#endif
};

int probe_new(struct probe **ret, const char *level, uint32_t n_threads, bool pin,
              struct error *err)
{
    CLEANUP(probe_freep) struct probe *p = calloc(1, sizeof(*p));
    bool found = false;

    if (!p || cores_read(&p->cores) < 0 || team_new(&p->team, n_threads) < 0)
        return error_set(err, ENOMEM, "no memory for the probes");
    if (pin && n_threads >= p->cores.n_cores)
        team_pin(p->team, &p->cores);
    for (size_t i = 0; i < ARRAY_SIZE(levels) && !found; i++) {
        if (levels[i].use)
            levels[i].use(&p->kernels);
        found = strcmp(levels[i].name, level) == 0;
    }
    if (!found)
        return error_set(err, EINVAL, "there are no probes for CPU level %s", level);
    *ret = TAKE_PTR(p);
    return 0;
}

struct probe *probe_free(struct probe *p)
{
    if (p) {
        team_free(p->team);
        cores_done(&p->cores);
        free(p);
    }
    return NULL;
}

void probe_freep(struct probe **p)
{
    probe_free(*p);
}

uint32_t probe_n_threads(const struct probe *p)
{
    return team_n_threads(p->team);
}

static int by_size(const void *pa, const void *pb)
{
    const double *a = pa, *b = pb;

    return (*a > *b) - (*a < *b);
}

/* Runs passes of n_pieces, each `amount` in all, and puts the rates together. */
static void run_passes(struct probe *p, uint32_t n_pieces, team_body body, const void *args,
                       double amount, struct probe_rate *ret)
{
    double rates[PASSES_MAX];
    uint64_t begin = now_usec();
    size_t n = 0;

    team_run(p->team, n_pieces, body, args); /* brings everything to its place */
    while (n < PASSES_MIN || (n < PASSES_MAX && now_usec() - begin < PROBE_USEC)) {
        uint64_t start = now_usec();

        team_run(p->team, n_pieces, body, args);
        rates[n++] = amount / ((double)MAX(now_usec() - start, (uint64_t)1) * 1e-6);
    }
    qsort(rates, n, sizeof(*rates), by_size);
    *ret = (struct probe_rate){.median = rates[n / 2], .max = rates[n - 1]};
}

/* ---- reading ---- */

struct reading {
    const struct probe *probe;
    const char *data;
    size_t piece; /* bytes */
};

static void read_piece(const void *args, uint32_t piece, uint32_t thread)
{
    static _Thread_local volatile uint64_t result; /* or the compiler would leave it all out */
    const struct reading *r = args;

    (void)thread;
    result = r->probe->kernels.read(r->data + piece * r->piece, r->piece);
    (void)result;
}

static void fill_piece(const void *args, uint32_t piece, uint32_t thread)
{
    const struct reading *r = args;

    (void)thread;
    memset((char *)r->data + piece * r->piece, 1, r->piece);
}

int probe_read(struct probe *p, size_t bytes, struct probe_rate *ret)
{
    uint32_t n_pieces = MIN(probe_n_threads(p) * PIECES_PER_THREAD, TEAM_PIECES_MAX);
    size_t piece = MAX(bytes / n_pieces / PIECE_ALIGN * PIECE_ALIGN, PIECE_ALIGN), all, size;
    struct reading r = {.probe = p, .piece = piece};
    const size_t huge = (size_t)2 << 20;
    void *map;

    /* A huge page more, so that there is a place that begins with one. */
    if (ckd_mul(&all, piece, (size_t)n_pieces) || ckd_add(&size, all, huge))
        return -ENOMEM;
    map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED)
        return -ENOMEM;
    (void)madvise(map, size, MADV_HUGEPAGE); /* a wish: without it the limit is a lower one */
    r.data = (char *)map + (huge - (uintptr_t)map % huge) % huge;
    team_run(p->team, n_pieces, fill_piece, &r);
    run_passes(p, n_pieces, read_piece, &r, (double)all, ret);
    munmap(map, size);
    return 0;
}

/* ---- multiplying ---- */

struct multiplying {
    const struct probe_multiply_kernel *kernel;
    uint64_t n_rounds;
};

static void multiply_piece(const void *args, uint32_t piece, uint32_t thread)
{
    const struct multiplying *m = args;

    (void)piece;
    (void)thread;
    m->kernel->run(m->n_rounds);
}

int probe_multiply(struct probe *p, enum probe_multiplier multiplier, struct probe_rate *ret)
{
    uint32_t n_pieces = MIN(probe_n_threads(p) * PIECES_PER_THREAD, TEAM_PIECES_MAX);
    struct multiplying m = {.kernel = &p->kernels.multiply[multiplier], .n_rounds = 1024};
    uint64_t start, took;

    if (!m.kernel->run)
        return -ENOTSUP;
    for (;;) { /* so many rounds that a pass takes its time */
        start = now_usec();
        m.kernel->run(m.n_rounds);
        took = now_usec() - start;
        if (took >= PASS_USEC / PIECES_PER_THREAD || m.n_rounds > UINT64_MAX / 4)
            break;
        m.n_rounds *= 2;
    }
    run_passes(p, n_pieces, multiply_piece, &m,
               m.kernel->operations * (double)m.n_rounds * n_pieces, ret);
    return 0;
}
