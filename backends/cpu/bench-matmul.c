/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Speed of the matrix product at the shapes of Gemma 3n E4B, of a level or a GPU: bytes of weights
 * per second for one row (what decoding is bound by, next to what the memory delivers) and
 * operations per second for many rows (prefill). A figure is the best of several runs, since other
 * programs only ever make a run slower; a GPU is given several products at a time, since asking it
 * takes a while. Not a test.
 */

#include <getopt.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backends/backend.h"
#include "backends/cpu/probe.h"
#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "base/cleanup.h"

#define SPACE ((size_t)512 << 20)
#define MAX_ROWS 512

/* A single thread is measured by its own time, which a busy machine disturbs less. */
static clockid_t clock_used = CLOCK_MONOTONIC;

static double seconds(void)
{
    struct timespec t;

    clock_gettime(clock_used, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static const struct {
    uint32_t n_out, n_in;
} shapes[] = {{2048, 2048}, {16384, 2048}, {2048, 16384}};

static const struct {
    enum weight_type type;
    enum weight_layout layout;
    enum { F32, COARSE, FINE } activations;
} kinds[] = {
    {WEIGHT_Q4, LAYOUT_TILE16, COARSE}, {WEIGHT_Q8, LAYOUT_TILE16, COARSE},
    {WEIGHT_Q4, LAYOUT_TILE16, FINE},   {WEIGHT_Q4, LAYOUT_TILE16, F32},
    {WEIGHT_BF16, LAYOUT_TILE16, F32},  {WEIGHT_Q4, LAYOUT_ROWS, COARSE},
};

static const char *const activation_names[] = {"f32", "coarse", "fine"};

/* n products, each of the next copy; -ENODEV ends the program. ret: seconds for one */
static double run(struct backend *b, const struct weight *w, size_t bytes, size_t n_copies,
                  size_t *next, struct activations *x, float *y, size_t n)
{
    struct weight copy = *w;
    double start = seconds();

    for (size_t i = 0; i < n; i++) {
        copy.data = (const char *)w->data + (*next)++ % n_copies * bytes;
        b->ops->matmul(b, &copy, x, y, w->n_out);
    }
    if (backend_finish(b) < 0) {
        fprintf(stderr, "bench-matmul: %s\n", backend_failure(b));
        exit(1);
    }
    return (seconds() - start) / (double)n;
}

static double bench(struct backend *b, bool is_device, const struct weight *w, size_t bytes,
                    size_t n_copies, struct activations *x, float *y, double min_seconds)
{
    size_t next = 0, n = 1;
    double best = run(b, w, bytes, n_copies, &next, x, y, 1), end;

    if (is_device) { /* the first may have had to wait for the driver's compiler */
        best = run(b, w, bytes, n_copies, &next, x, y, 1);
        n = (size_t)MAX(1.0, MIN(64.0, 0.02 / best));
    }
    end = seconds() + min_seconds;
    for (size_t i = 0; i < 2 || seconds() < end; i++)
        best = MIN(best, run(b, w, bytes, n_copies, &next, x, y, n));
    return best;
}

/* What the machine gives these threads, measured beside the matrices. ret: Gop/s of int8 products
 */
static int print_limits(const struct backend *b, double *ret)
{
    static const char *const units[] = {"int8 Gop/s", "f32 GFLOP/s", "bf16 GFLOP/s"};
    CLEANUP(probe_freep) struct probe *p = NULL;
    struct probe_rate rate;
    struct error err;

    if (probe_new(&p, b->ops->name, b->vtable->n_threads(b), /* pin= */ false, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return -1;
    }
    printf("%s, %u threads; ", b->ops->name, probe_n_threads(p));
    if (probe_read(p, SPACE, &rate) == 0)
        printf("memory reads at %.1f GB/s", 1e-9 * rate.max);
    for (enum probe_multiplier m = 0; m < N_PROBE_MULTIPLIERS; m++)
        if (probe_multiply(p, m, &rate) == 0) {
            printf(", %.0f %s", 1e-9 * rate.max, units[m]);
            if (m == PROBE_INT8)
                *ret = 1e-9 * rate.max;
        }
    putchar('\n');
    return 0;
}

/* device: a GPU's name, or NULL for the CPU's level `name`. cold_bytes: copies of a matrix take
 * this much, so that none stays in a cache. only: kinds whose name begins so, NULL for all */
static int run_level(const char *device, const char *name, uint32_t n_threads, double min_seconds,
                     size_t cold_bytes, const char *only)
{
    static const uint32_t batches[] = {1, 2, 4, 8, 16, 128, 512};
    const struct backend_limits limits = {MAX_ROWS, 16384, 8};
    CLEANUP(vulkan_device_freep) struct vulkan_device *d = NULL;
    CLEANUP(backend_freep) struct backend *b = NULL;
    struct error err = {{0}};
    double limit = 0;
    int r;
    float *x, *y;
    char *data, *q;

    if (device) {
        r = vulkan_device_find(&d, &(struct vulkan_options){.name = device}, &err);
        if (r == 0)
            r = backend_vulkan_new(&b, d, &limits, &err);
    } else {
        r = backend_cpu_new(&b, name, n_threads, &limits, &err);
    }
    if (r < 0) {
        fprintf(stderr, "%s\n", err.text);
        return -1;
    }
    if (!d && b->vtable->n_threads(b) == 1)
        clock_used = CLOCK_THREAD_CPUTIME_ID;
    data = backend_alloc(b, SPACE);
    x = backend_alloc(b, (size_t)MAX_ROWS * 16384 * 4);
    y = backend_alloc(b, (size_t)MAX_ROWS * 16384 * 4);
    q = backend_alloc(b, (size_t)MAX_ROWS * 16384 * 3);
    if (!data || !x || !y || !q) {
        fprintf(stderr, "bench-matmul: out of memory\n");
        return -1;
    }
    for (size_t i = 0; i < SPACE; i++) /* ordinary numbers in every type */
        data[i] = (char)(0x20 | (i * 2654435761u >> 9 & 0xf));
    for (size_t i = 0; i < (size_t)MAX_ROWS * 16384; i++)
        x[i] = (float)(i * 2654435761u >> 8 & 0xfff) / 2048 - 1;
    if (d)
        puts(vulkan_device_name(d));
    else if (print_limits(b, &limit) < 0)
        return -1;
    printf("%-18s %-12s   GB/s at 1 row   Gop/s at", "weight", "shape");
    for (size_t i = 0; i < ARRAY_SIZE(batches); i++)
        printf(" %6u", batches[i]);
    printf(" rows, the last in %% of int8\n");
    for (size_t k = 0; k < ARRAY_SIZE(kinds); k++)
        for (size_t s = 0; s < ARRAY_SIZE(shapes); s++) {
            struct weight w = {kinds[k].type, kinds[k].layout, shapes[s].n_out, shapes[s].n_in,
                               data};
            size_t bytes, n_blocks = w.n_in / WEIGHT_BLOCK;
            struct activations a = {.k = w.n_in, .f32 = x, .ld = w.n_in, .ld_q = w.n_in};
            char text[32];

            if (weight_size(w.type, w.layout, w.n_out, w.n_in, &bytes) < 0)
                continue;
            if (kinds[k].activations != F32) {
                a.q = (int8_t *)q;
                a.d = (float *)(q + (size_t)MAX_ROWS * w.n_in);
                a.sum = (int32_t *)(a.d + MAX_ROWS * n_blocks);
                if (kinds[k].activations == FINE) {
                    a.sum_low = a.sum + MAX_ROWS * n_blocks;
                    a.q_low = (int8_t *)(a.sum_low + MAX_ROWS * n_blocks);
                }
                a.n = MAX_ROWS;
                b->ops->quantize(b, &a);
            }
            snprintf(text, sizeof(text), "%s %s %s", weight_type_name(w.type),
                     weight_layout_name(w.layout), activation_names[kinds[k].activations]);
            if (only && strncmp(text, only, strlen(only)) != 0)
                continue;
            printf("%-18s %5ux%-6u", text, w.n_out, w.n_in);
            for (size_t i = 0; i < ARRAY_SIZE(batches); i++) {
                double t, rate;

                a.n = batches[i];
                t = bench(b, d, &w, bytes, cold_bytes / bytes + 1, &a, y, min_seconds);
                if (i == 0)
                    printf("   %13.1f           ", (double)bytes / t * 1e-9);
                rate = 2e-9 * w.n_out * w.n_in * batches[i] / t;
                printf(" %6.0f", rate);
                if (i == ARRAY_SIZE(batches) - 1 && kinds[k].activations != F32 && limit > 0)
                    printf(" %5.1f", 100 * rate / limit);
                fflush(stdout);
            }
            printf("\n");
        }
    backend_release(b, data, SPACE);
    backend_release(b, x, (size_t)MAX_ROWS * 16384 * 4);
    backend_release(b, y, (size_t)MAX_ROWS * 16384 * 4);
    backend_release(b, q, (size_t)MAX_ROWS * 16384 * 3);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"device", required_argument, NULL, 'd'},  {"level", required_argument, NULL, 'l'},
        {"threads", required_argument, NULL, 't'}, {"seconds", required_argument, NULL, 's'},
        {"hot", no_argument, NULL, 'c'},           {"kind", required_argument, NULL, 'k'},
        {"help", no_argument, NULL, 'h'},          {0}};
    const char *device = NULL, *level = NULL, *kind = NULL;
    double min_seconds = 0.3;
    uint32_t n_threads = 0;
    bool hot = false;
    int o;

    while ((o = getopt_long(argc, argv, "d:l:t:s:ck:h", options, NULL)) != -1)
        switch (o) {
        case 'd':
            device = optarg;
            break;
        case 'l':
            level = optarg;
            break;
        case 't':
            n_threads = (uint32_t)strtoul(optarg, NULL, 10);
            break;
        case 's':
            min_seconds = strtod(optarg, NULL);
            break;
        case 'c':
            hot = true;
            break;
        case 'k':
            kind = optarg;
            break;
        case 'h':
            printf(
                "usage: bench-matmul [--level NAME] [--threads N] [--device NAME] [--kind TEXT]\n"
                "                    [--seconds PER-FIGURE] [--hot]\n"
                "  --device a GPU instead of the CPU, by a part of its name\n"
                "  --hot    the same matrix each time, so that small ones stay in the cache\n"
                "  --kind   only those whose name begins so, as 'q4 tile16 fine'\n");
            return 0;
        default:
            fprintf(stderr, "Try 'bench-matmul --help'.\n");
            return 2;
        }
    return run_level(device, level, n_threads, min_seconds, hot ? 0 : SPACE / 2, kind) < 0;
}
