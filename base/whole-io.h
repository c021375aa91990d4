/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * whole_io: all n bytes at an offset of a file, however many calls that takes; signals do not
 * matter. What was done before a failure is not told. Any thread.
 */

#include <stddef.h>
#include <stdint.h>

/* 0; -ENODATA: the file ends before; -errno of pread() */
int read_whole(int fd, void *data, size_t n, uint64_t at);

/* 0; -EIO: nothing more is taken; -errno of pwrite() */
int write_whole(int fd, const void *data, size_t n, uint64_t at);
