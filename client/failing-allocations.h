/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * failing-allocations: for tests, a C library without memory. The test is linked with --wrap of
 * malloc, calloc, realloc, reallocarray, strdup and asprintf; only what it links statically is
 * reached.
 */

/* How many more of this thread's allocations succeed; -1, as it is at first: as many as it likes.
 */
extern __thread int allocations_left;
