/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * What is asked of a request with a stream (generate, append), as bytes: for its record, which may
 * be read by another version. Little-endian; strings have their length before them. What is read is
 * bounded as what comes over the bus is (ipc/names.h); whether it makes sense for the model is for
 * engine_thread_check() to say.
 */

#include <stddef.h>

#include "base/error.h"
#include "daemon/job.h"
#include "ipc/buffer.h"

/* Appends. 0, -ENOMEM */
int request_bytes_write(struct buffer *out, const struct job_request *q);

/* 0; -EBADMSG: not such bytes, some are missing or too many, or a value cannot be; -ENOMEM.
 * *ret is the caller's, by job_request_done(); untouched on failure. */
int request_bytes_read(struct job_request *ret, const void *data, size_t n, struct error *err);
