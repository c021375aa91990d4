/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * model_writer: makes one model file (docs/model-file.md), streaming. The caller announces every
 * tensor and blob in file order, which is execution order, and sets the metadata; begin() then
 * fixes the layout, reserves the disk space and takes payload bytes in that order; commit() puts
 * in the hashes and gives the file its name. Until then nothing with the target's name exists, and
 * what exists has no name (O_TMPFILE) or, on file systems without that, the name
 * ".NAME.part-XXXXXX" beside the target; either way it does not open as a model.
 *
 * Order of calls: new, then set / add_tensor / add_blob in any mixture, (file_bytes,) begin, append
 * until all announced bytes are in, commit, free. free without commit abandons everything. After a
 * failed call only free remains. One thread at a time.
 *
 * Vectors (norms, correct_output_scale) are weights with n_out 1 and n_in their length.
 */

#include <stddef.h>
#include <stdint.h>

#include "backends/weight.h"
#include "base/cleanup.h"
#include "base/error.h"

struct model_writer;

/* Touches no disk. 0, -ENOMEM */
int model_writer_new(struct model_writer **ret, const char *path, struct error *err);
struct model_writer *model_writer_free(struct model_writer *w);
DEFINE_CLEANUP(struct model_writer *, model_writer_free)

/*
 * Sets one string of `__metadata__`, such as "llmd.config" (copied, valid UTF-8); again: replaces
 * it. "llmd.header_sha256", "llmd.format" and "llmd.tensors" are the writer's own.
 * 0, -EINVAL, -ENOMEM
 */
int model_writer_set(struct model_writer *w, const char *key, const char *value, struct error *err);

/*
 * Announces the next payload: weight_size() bytes of a packed matrix, or a blob of bytes >= 1.
 * 0, -EINVAL: name not usable or taken, or shape not supported, -EOVERFLOW, -ENOMEM
 */
int model_writer_add_tensor(struct model_writer *w, const char *name, enum weight_type type,
                            enum weight_layout layout, uint32_t n_out, uint32_t n_in,
                            struct error *err);
int model_writer_add_blob(struct model_writer *w, const char *name, size_t bytes,
                          struct error *err);

/* Size of the whole file with what was added so far; before begin(), for --dry-run. 0 or -errno */
int model_writer_file_bytes(struct model_writer *w, uint64_t *ret_bytes, struct error *err);

/*
 * Creates the temporary file and reserves the space of the whole model.
 * 0, -ENOSPC: told before any work is done, -errno of open, -EINVAL: nothing was added, -ENOMEM
 */
int model_writer_begin(struct model_writer *w, struct error *err);

/*
 * Appends payload bytes; a call may end within a tensor or reach over several. Padding between
 * payloads is the writer's business.
 * 0, -errno of write, -EINVAL: more bytes than announced
 */
int model_writer_append(struct model_writer *w, const void *data, size_t n, struct error *err);

/*
 * Writes the header, syncs the file, renames it to the target (an older file there is replaced)
 * and syncs the folder. 0, -EINVAL: bytes are missing, -errno
 */
int model_writer_commit(struct model_writer *w, struct error *err);

/*
 * The temporary file's path between begin() and commit() if it has a name, else NULL. For a signal
 * handler, which may unlink() it before the process ends; the string lives until free().
 */
const char *model_writer_temporary(const struct model_writer *w);
