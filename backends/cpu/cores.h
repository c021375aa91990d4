/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * cores: the processors that this process may use, which of them are hyper-threads of one core, and
 * how many threads are worth starting.
 */

#include <stdint.h>

struct cpu {
    uint32_t number; /* the system's */
    uint32_t core;   /* 0 .. n_cores - 1 */
};

/*
 * cpus stand as threads should take them: one of each core, faster cores first (cores 0, 1, ..);
 * then their second hyper-threads, and so on.
 */
struct cores {
    uint32_t n_cpus;  /* that the process may use; 0: unknown */
    uint32_t n_cores; /* that these belong to */
    struct cpu *cpus; /* [n_cpus] */
};

/* By this thread's affinity mask and sysfs. 0; -ENOMEM: nothing to free */
int cores_read(struct cores *ret);
void cores_done(struct cores *c);

/*
 * The same for the given CPUs, allowed[n] ascending, by the folder that is else
 * /sys/devices/system/cpu. What it does not tell, or tells wrongly, makes a CPU a core of its own.
 */
int cores_order(struct cores *ret, const char *folder, const uint32_t *allowed, uint32_t n);

/*
 * Cores by cgroup quota, rounded up, 0: no limit. A process with more runnable threads than its
 * quota is stopped in the middle of a token until the next period.
 */
uint32_t cores_quota(void);
