/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * model_fault: what becomes of a mapped model whose file is shortened, or cannot be read any more,
 * while it is in use. Touching what is no longer there raises SIGBUS, in whatever thread computes,
 * and by default ends the process in the midst of everybody's sessions. Once model_fault_handle()
 * was called the whole mapping becomes zeros instead, the arithmetic goes on to its end, and
 * whoever gives out what it has computed asks first (model_file_is_intact()).
 *
 * Faults anywhere else keep the action that they had.
 */

#include <stdbool.h>
#include <stddef.h>

struct model_fault;

/*
 * For the whole process, once, before there are other threads. wake_fd: an eventfd, borrowed for
 * good, that is written when a model is found to have changed. Threads that read a model must not
 * block SIGBUS. 0, -errno
 */
int model_fault_handle(int wake_fd);

/* ---- for model_file; any thread ---- */

/* size bytes at map are a model's. 0; -EMFILE: too many are open */
int model_fault_watch(struct model_fault **ret, const void *map, size_t size);
void model_fault_unwatch(struct model_fault *f); /* NULL: nothing; before it is unmapped */

/* A fault, or model_fault_report(), which whoever finds out in another way calls. */
bool model_fault_happened(const struct model_fault *f);
void model_fault_report(struct model_fault *f);
