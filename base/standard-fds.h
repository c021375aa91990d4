/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * For the first line of a main(): where a program was started with standard input, output or error
 * closed, the next files it opens get these numbers, and what it prints goes into a lock file or a
 * socket. This fills the gaps with /dev/null opened for reading, so that printing still fails.
 */
void standard_fds_fill(void);
