/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * convert: carries out a plan: reads the source in pieces of some megabytes, converts rows on all
 * cores and appends them to the model writer, while the piece before is being hashed and written.
 */

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "tools/import/model-writer.h"
#include "tools/import/plan.h"
#include "tools/import/source.h"

/*
 * Called between pieces with the bytes appended so far, on the calling thread; true: stop, please.
 */
typedef bool (*convert_progress)(void *userdata, uint64_t bytes_done);

/* Announces the plan's tensors to the writer, in order. 0 or as model_writer_add_tensor() */
int convert_announce(const struct plan *p, struct model_writer *w, struct error *err);

/*
 * Writes all of them.
 * 0, -ECANCELED: progress said so, -errno of reading and writing, -ENOMEM, -EINVAL: a value or a
 * scale is not finite or does not fit its type; err names file and tensor
 */
int convert_write(const struct source *s, const struct plan *p, struct model_writer *w,
                  convert_progress progress, void *userdata, struct error *err);
