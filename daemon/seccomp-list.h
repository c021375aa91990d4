/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * seccomp_list: the lists of system calls in policy/, as policy/seccomp-to-c.py makes C of them;
 * that script says what they look like.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Holds if (argument & mask) == value. */
struct seccomp_condition {
    unsigned argument;
    uint64_t mask, value;
    bool is_self; /* value: the number of this process */
};

struct seccomp_rule {
    const char *name;
    int number; /* -1: by name */
    int error;  /* 0: allowed; else refused with it, quietly */
    unsigned n_conditions;
    struct seccomp_condition conditions[3];
};

struct seccomp_list {
    const struct seccomp_rule *rules;
    size_t n;
};

extern const struct seccomp_list seccomp_process;  /* what every process needs */
extern const struct seccomp_list seccomp_llmd;     /* the daemon, besides */
extern const struct seccomp_list seccomp_llm_import;
extern const struct seccomp_list seccomp_vulkan;       /* the daemon with a GPU, besides */
extern const struct seccomp_list seccomp_machine_code; /* with one in software, besides that */
extern const struct seccomp_list seccomp_prefetch;   /* the child that reads the model ahead */
extern const struct seccomp_list seccomp_sanitizers; /* what ASan, LSan, UBSan and TSan call */
