/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * probe: the limits that kernels run into, measured: how fast the threads read memory, and how fast
 * they multiply with the best instructions that a level may use. For benchmarks; one thread calls,
 * and it is the first of the probe's own team.
 *
 * Beside it stand the kernels of each level, a file each, compiled for its instruction set.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct probe;

enum probe_multiplier {
    PROBE_INT8, /* products of 8 bits, sums of 32: the int8 mode's */
    PROBE_F32,  /* fused multiply-add: the f32 mode's, and attention's */
    PROBE_BF16, /* tiles of bf16, amx alone */
};
#define N_PROBE_MULTIPLIERS 3

/* Of some passes, one after the other. Units in a second: bytes; multiplications and additions. */
struct probe_rate {
    double median, max;
};

/*
 * level: a name as backend_cpu_new() takes it, of a level that this machine has. n_threads: as many
 * work, or fewer where the system gives no more. pin: as backend_cpu_pin() would pin them. Before a
 * pinned backend's first operation, or the threads inherit the caller's one core; freed after it.
 * 0, -ENOMEM, -EINVAL
 */
int probe_new(struct probe **ret, const char *level, uint32_t n_threads, bool pin,
              struct error *err);
struct probe *probe_free(struct probe *p); /* NULL is allowed */
void probe_freep(struct probe **p);

uint32_t probe_n_threads(const struct probe *p);

/* Reads so many bytes, in huge pages where the system has them, which are given back. 0, -ENOMEM */
int probe_read(struct probe *p, size_t bytes, struct probe_rate *ret);

/* Multiplies in registers. 0, -ENOTSUP: the level has no such multiplier */
int probe_multiply(struct probe *p, enum probe_multiplier m, struct probe_rate *ret);

/* ---- for the levels' files ---- */

struct probe_kernels {
    /* Something that depends on every byte of data [bytes], aligned to 64, a multiple of 512. */
    uint64_t (*read)(const void *data, size_t bytes);
    struct probe_multiply_kernel {
        void (*run)(uint64_t n_rounds); /* NULL: the level has none of its own */
        double operations;              /* of one round */
    } multiply[N_PROBE_MULTIPLIERS];
};

/* Each leaves alone what it does no better than the levels below. */
void probe_use_reference(struct probe_kernels *k);
void probe_use_avx2(struct probe_kernels *k);
void probe_use_avx512(struct probe_kernels *k);
void probe_use_amx(struct probe_kernels *k);
