/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * sealed_memory: memfds whose size nobody can change, so that whoever else holds one cannot take
 * pages away from below a mapping. Any thread.
 */

#include <stdint.h>

/* Of that size for good, all zeros; it takes memory where it is written. fd, -errno */
int sealed_memory_new(const char *name, uint64_t size);

/* Whether fd is such a one. *ret_size. 0, -EBADMSG */
int sealed_memory_check(int fd, uint64_t *ret_size);
