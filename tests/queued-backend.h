/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * A backend for tests that behaves as a device does, with the processor's arithmetic: operations
 * are written down and executed when they are waited for, passes are kept for good and issued again
 * by their key, nothing is found that it was not told of (that is an assertion), and it can be
 * lost. Once it has been told of a pass the caller's rows and page tables are not looked at again.
 */

#include "backends/backend.h"

struct queued_backend;

struct queued_options {
    size_t map_limit;    /* 0: none */
    bool refuses_shared; /* backend_map() of BACKEND_SHARED: -EOPNOTSUPP */
    bool lets_go; /* once lost it writes nothing more: queued_backend_finish_late() is not used */
};

/* Exits with a message where there is no memory: tests only. */
struct queued_backend *queued_backend_new(const struct backend_limits *limits,
                                          const struct queued_options *o);
struct backend *queued_backend_base(struct queued_backend *q); /* freed by backend_free() */

/* From now on wait answers -ETIMEDOUT so many times before anything is done. */
void queued_backend_delay(struct queued_backend *q, uint32_t n);

/* From the n-th submission on (1: the next) it is lost; what was submitted has not been done. */
void queued_backend_lose(struct queued_backend *q, uint32_t n);

/* What was submitted when it was lost is done all the same. */
void queued_backend_finish_late(struct queued_backend *q);

struct queued_counts {
    uint32_t n_recorded, n_replayed; /* passes */
    uint32_t n_maps;
    uint64_t bytes_shared, bytes_weights; /* mapped */
};
struct queued_counts queued_backend_counts(const struct queued_backend *q);
