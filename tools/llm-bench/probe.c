/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The sum of all 64-bit words: less arithmetic than any use of them, and a result that the compiler
 * must compute. Eight at a time in vectors, so that it is memory that is waited for.
 */

#include "tools/llm-bench/probe.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "base/checked.h"

#define N_PASSES 5 /* the first brings pages in */

typedef uint64_t words __attribute__((vector_size(64)));

static uint64_t sum_words(const words *x, size_t n)
{
    words v = {0};
    uint64_t sum = 0;

    for (size_t i = 0; i < n; i++)
        v += x[i];
    for (size_t k = 0; k < 8; k++)
        sum += v[k];
    return sum;
}

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int probe_bandwidth(struct probe *ret, const void *data, size_t bytes, unsigned n_threads,
                    struct error *err)
{
    static volatile uint64_t result;
    void *own = NULL;
    double best = 0;

#ifdef _OPENMP
    if (n_threads == 0)
        n_threads = (unsigned)omp_get_num_procs();
#else
    n_threads = 1;
#endif
    if (!data) {
        own = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (own == MAP_FAILED)
            return error_set(err, ENOMEM, "no %zu bytes of memory to read", bytes);
        madvise(own, bytes, MADV_HUGEPAGE);
        memset(own, 1, bytes);
        data = own;
    }

    for (int pass = 0; pass < N_PASSES; pass++) {
        size_t part = bytes / n_threads / sizeof(words) * sizeof(words);
        uint64_t sum = 0;
        double start = now(), seconds;

#pragma omp parallel for num_threads(n_threads) schedule(static) reduction(+ : sum)
        for (unsigned i = 0; i < n_threads; i++)
            sum += sum_words((const words *)((const char *)data + i * part), part / sizeof(words));
        seconds = now() - start;
        result = sum;
        best = MAX(best, (double)part * n_threads / seconds);
    }
    (void)result;
    if (own)
        munmap(own, bytes);
    *ret = (struct probe){.bytes_per_second = best, .bytes = bytes, .n_threads = n_threads};
    return 0;
}
