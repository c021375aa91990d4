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

/*
 * A file of head and data, the user's alone, in the place of path; written as "path.new" first:
 * whoever opens path finds all of it, or all of what was there. 0; -ENOMEM, -errno: that is so yet
 */
int replace_file(const char *path, const void *head, size_t n_head, const void *data, size_t n);
