/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * system_call_filter: the seccomp part of the sandbox. In report mode a thread outside of it lets
 * pass what would be refused, and looks at the paths that landlock would not allow.
 */

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "daemon/sandbox.h"
#include "daemon/seccomp-list.h"

/* Where what is refused is told. One for the process, set before the filter is entered. */
struct refusal_teller {
    const char *program;
    int journal_fd; /* connected to the journal; -EBADF: standard error */
    const char *message_id;
    bool prefixes;
};

/* A path of the file system that report mode takes as allowed, links resolved. */
struct allowed_path {
    char *path;
    enum sandbox_access access;
};

struct filter_options {
    bool report;
    const struct seccomp_list *const *lists;
    size_t n_lists;
    const struct refusal_teller *teller;
    /* report: they must live as long as the process */
    const struct allowed_path *paths;
    size_t n_paths;
};

/* 0; -EOPNOTSUPP: the kernel, or this build, has no seccomp; -errno. err says what */
int system_call_filter_enter(const struct filter_options *options, struct error *err);
