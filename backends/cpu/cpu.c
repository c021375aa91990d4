/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The CPU backend's object: which level this machine and build have, how many threads are worth
 * starting, memory, and the one place where work is handed to threads.
 */

#include "backends/cpu/cpu.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if HAVE_CPU_AVX2
#include <cpuid.h>
#endif
#if HAVE_CPU_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "backends/cpu/cores.h"
#include "backends/cpu/matmul.h"
#include "backends/cpu/sparse.h"
#include "backends/cpu/team.h"
#include "base/checked.h"
#include "base/cleanup.h"

/* Multiplications that make a piece: handing over less costs more than it brings. */
#define PIECE_MIN ((size_t)1 << 12)

/* Pieces per thread: enough that a core that is also busy elsewhere does not hold up the others. */
#define PIECES_PER_THREAD 4

/* Transparent huge pages are asked for from here on. */
#define HUGE_MIN ((size_t)4 << 20)

struct level {
    const char *name;
    bool (*supported)(void);
    void (*use)(struct cpu_backend *c); /* NULL: not in this build */
};

static bool always(void)
{
    return true;
}

#if HAVE_CPU_AVX2
/* Not among the names that __builtin_cpu_supports() of gcc 12 and clang 14 know: leaf 1, ecx. */
static bool have_f16c(void)
{
    unsigned a, b, c, d;

    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* __builtin_cpu_supports() asks the system as well whether it keeps the registers (xgetbv). */
static bool have_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && have_f16c();
}
#endif

#if HAVE_CPU_AVX512
static bool have_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

#if HAVE_CPU_AMX
/* asm/prctl.h; Linux 5.16. A number of its own, since older headers lack it. */
#define REQUEST_XSTATE_PERMISSION 0x1023
/* CPUID leaf 7, edx; the compilers' names differ */
#define CPUID_AMX (1u << 22 | 1u << 24 | 1u << 25) /* bf16, tiles, int8 */

#define XSTATE_TILE_CONFIG 17
#define XSTATE_TILE_DATA 18

/* Whether the tiles have the size that amx-tile.h counts on: CPUID leaves 0x1d and 0x1e. */
static bool have_tile_size(void)
{
    unsigned a, b, c, d;

    if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1)
        return false; /* no palette 1 */
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) || a >> 16 < 1024 || (b & 0xffff) < 64 ||
        b >> 16 < 8 || (c & 0xffff) < 16)
        return false; /* bytes of a tile and of its rows, tiles, rows */
    return __get_cpuid_count(0x1e, 0, &a, &b, &c, &d) && (b & 0xff) >= 16 &&
           (b >> 8 & 0xffff) >= 64;
}

/*
 * The system keeps 8 KiB of tiles only for processes that asked for it, and the first instruction
 * on a tile kills the others. The permission is the process's: threads that exist have it as well,
 * and asking again changes nothing. What refuses is a kernel before 5.16, a system call filter, or
 * a thread with a signal stack too small for the larger frame.
 */
static bool have_amx(void)
{
    unsigned a, b, c, d, low, high;

    if (!have_avx512() || !__builtin_cpu_supports("gfni"))
        return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & CPUID_AMX) != CPUID_AMX ||
        !have_tile_size())
        return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return false;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!(low >> XSTATE_TILE_CONFIG & 1) || !(low >> XSTATE_TILE_DATA & 1))
        return false;
    return syscall(SYS_arch_prctl, REQUEST_XSTATE_PERMISSION, XSTATE_TILE_DATA) == 0;
}
#endif

/* In rising order; each builds upon those before it. */
static const struct level levels[] = {
    {"reference", always, cpu_use_reference},
#if HAVE_CPU_AVX2
    {"avx2", have_avx2, cpu_use_avx2},
#else
    {"avx2", NULL, NULL},
#endif
#if HAVE_CPU_AVX512
    {"avx512", have_avx512, cpu_use_avx512},
#else
    {"avx512", NULL, NULL},
#endif
#if HAVE_CPU_AMX
    {"amx", have_amx, cpu_use_amx},
#else
    {"amx", NULL, NULL},
#endif
};

/* One call of cpu_parallel(). */
struct parallel {
    const struct cpu_backend *backend;
    cpu_body body;
    const void *args;
    uint32_t n, piece;
};

static void do_piece(const void *userdata, uint32_t number, uint32_t thread)
{
    const struct parallel *p = userdata;
    uint32_t first = number * p->piece;

    p->body(p->args, first, MIN(first + p->piece, p->n),
            p->backend->scratch + p->backend->scratch_each * (size_t)thread);
}

void cpu_parallel(struct cpu_backend *c, uint32_t n, size_t cost, cpu_body body, const void *args)
{
    struct parallel p = {c, body, args, n, MAX(n / (c->n_threads * PIECES_PER_THREAD), 1u)};

    if (n == 0)
        return;
    if (cost < PIECE_MIN)
        p.piece = MAX(p.piece, (uint32_t)(PIECE_MIN / MAX(cost, (size_t)1)));
    if (c->n_threads > 1 && p.piece < n) {
        uint32_t n_pieces = DIV_ROUND_UP(n, p.piece);

        p.piece = DIV_ROUND_UP(n, n_pieces); /* so that the last is not much smaller */
        team_run(c->team, DIV_ROUND_UP(n, p.piece), do_piece, &p);
        return;
    }
    body(args, 0, n, c->scratch);
}

size_t cpu_scratch_each(const struct backend_limits *limits)
{
    size_t width = ALIGN_UP((size_t)limits->max_width, (size_t)64);
    size_t row = width * 4 + width + width / WEIGHT_BLOCK * 4; /* decoded, integers, scales */
    size_t matmul = packed_bytes(width) + stripe_scratch(width);

    row = MAX(MAX(row, matmul), sparse_scratch_each(limits));
    return ALIGN_UP(MAX(MAX(row, 2 * stripe_scratch(width)), CPU_ATTENTION_SCRATCH), (size_t)4096);
}

size_t cpu_scratch_shared(const struct backend_limits *limits)
{
    return MAX(MAX(sparse_scratch_shared(limits), panels_bytes(limits->max_width)),
               CPU_ATTENTION_SHARED);
}

static void *map(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED)
        return NULL;
    if (bytes >= HUGE_MIN)
        (void)madvise(p, bytes, MADV_HUGEPAGE); /* a wish: without it the memory is only slower */
    return p;
}

int cpu_map_scratch(struct cpu_backend *c)
{
    size_t total;

    if (c->scratch)
        (void)munmap(c->scratch, c->scratch_total);
    c->scratch = NULL;
    if (ckd_mul(&total, c->scratch_each, c->n_threads) || ckd_add(&total, total, c->scratch_shared))
        return -ENOMEM;
    c->scratch = map(total);
    c->scratch_total = total;
    return c->scratch ? 0 : -ENOMEM;
}

static void *cpu_alloc(struct backend *b, size_t bytes)
{
    (void)b;
    return map(MAX(bytes, (size_t)1));
}

static void cpu_release(struct backend *b, void *p, size_t bytes)
{
    (void)b;
    (void)munmap(p, MAX(bytes, (size_t)1));
}

static size_t cpu_map_limit(const struct backend *b)
{
    (void)b;
    return SIZE_MAX;
}

static int cpu_map(struct backend *b, const void *p, size_t bytes, enum backend_memory kind)
{
    (void)b, (void)p, (void)bytes, (void)kind;
    return 0;
}

static void cpu_unmap(struct backend *b, const void *p)
{
    (void)b, (void)p;
}

static bool cpu_begin(struct backend *b, uint64_t key)
{
    (void)b, (void)key;
    return true;
}

static void cpu_end(struct backend *b)
{
    (void)b;
}

static int cpu_submit(struct backend *b)
{
    (void)b;
    return 0; /* every operation is done when it returns */
}

static int cpu_wait(struct backend *b, uint64_t timeout_usec)
{
    (void)b, (void)timeout_usec;
    return 0;
}

static const char *cpu_failure(const struct backend *b)
{
    (void)b;
    return NULL;
}

static bool cpu_hangs(const struct backend *b)
{
    (void)b;
    return false;
}

static void cpu_free(struct backend *b)
{
    struct cpu_backend *c = cpu_backend(b);

    team_free(c->team);
    cores_done(&c->cores);
    if (c->scratch)
        (void)munmap(c->scratch, c->scratch_total);
    free(c);
}

static size_t cpu_scratch_bytes(const struct backend *b)
{
    return ((const struct cpu_backend *)b)->scratch_total;
}

static uint32_t cpu_n_threads(const struct backend *b)
{
    return ((const struct cpu_backend *)b)->n_threads;
}

static const struct backend_vtable vtable = {
    .alloc = cpu_alloc,
    .release = cpu_release,
    .map_limit = cpu_map_limit,
    .map = cpu_map,
    .unmap = cpu_unmap,
    .begin = cpu_begin,
    .end = cpu_end,
    .submit = cpu_submit,
    .wait = cpu_wait,
    .failure = cpu_failure,
    .hangs = cpu_hangs,
    .free = cpu_free,
    .scratch_bytes = cpu_scratch_bytes,
    .n_threads = cpu_n_threads,
};

/*
 * How many threads to start when n are asked for, 0: as many as are worth it, which is one for each
 * core; a second one on the same core shares its multipliers. Never more than there are CPUs: they
 * would wait for each other.
 */
static uint32_t useful_threads(const struct cpu_backend *c, uint32_t n)
{
    uint32_t quota;

    if (n > 0)
        return c->cores.n_cpus ? MIN(n, c->cores.n_cpus) : n;
    quota = cores_quota();
    n = MAX(c->cores.n_cores, 1u);
    return quota ? MIN(n, quota) : n;
}

void backend_cpu_pin(struct backend *b)
{
    struct cpu_backend *c = cpu_backend(b);

    if (c->n_threads >= c->cores.n_cores)
        team_pin(c->team, &c->cores);
}

/* The level to use: the best up to the cap. */
static int choose_level(const char *cap, size_t *ret, struct error *err)
{
    size_t best = 0;

    for (size_t i = 0; i < ARRAY_SIZE(levels); i++) {
        bool in_build = levels[i].use, usable = in_build && levels[i].supported();

        if (usable)
            best = i;
        if (!cap || strcmp(levels[i].name, cap) != 0)
            continue;
        if (!usable)
            return error_set(err, EINVAL, "CPU level %s: %s lacks it; choose a lower one or none",
                             cap, in_build ? "this machine" : "this build");
        *ret = i;
        return 0;
    }
    if (cap)
        return error_set(err, EINVAL,
                         "CPU level %s: unknown; known are reference, avx2, avx512 and amx", cap);
    *ret = best;
    return 0;
}

int backend_cpu_new(struct backend **ret, const char *level, uint32_t n_threads,
                    const struct backend_limits *limits, struct error *err)
{
    struct cpu_backend *c;
    size_t chosen = 0;
    int r;

    r = choose_level(level, &chosen, err);
    if (r < 0)
        return r;
    c = calloc(1, sizeof(*c));
    if (!c)
        return error_set(err, ENOMEM, "CPU backend: out of memory");
    c->base.vtable = &vtable;
    c->base.ops = &c->ops;
    c->limits = *limits;
    if (cores_read(&c->cores) < 0 || team_new(&c->team, useful_threads(c, n_threads)) < 0) {
        backend_free(&c->base);
        return error_set(err, ENOMEM, "CPU backend: out of memory");
    }
    c->n_threads = n_threads = team_n_threads(c->team);
    c->scratch_each = cpu_scratch_each(limits);
    c->scratch_shared = cpu_scratch_shared(limits);
    for (size_t i = 0; i <= chosen; i++)
        if (levels[i].use && levels[i].supported()) {
            levels[i].use(c);
            c->ops.name = levels[i].name;
        }
    if (cpu_map_scratch(c) < 0) {
        backend_free(&c->base);
        return error_set(err, ENOMEM, "CPU backend: no memory for the scratch space of %u thread%s",
                         n_threads, n_threads == 1 ? "" : "s");
    }
    *ret = &c->base;
    return 0;
}
