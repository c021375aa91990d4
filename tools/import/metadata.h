/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * metadata: what a model file carries besides its tensors (docs/model-file.md): the strings
 * llmd.config, llmd.generation, llmd.tokenizer, llmd.name, llmd.license, llmd.chat_template,
 * llmd.source and llmd.import, and the tokenizer's blobs.
 */

#include "base/error.h"
#include "tools/import/foreign-tokenizer.h"
#include "tools/import/model-writer.h"
#include "tools/import/plan.h"
#include "tools/import/source.h"

/* Sets all strings. table may be NULL: no tokenizer. 0 or as model_writer_set() */
int metadata_set(struct model_writer *w, const struct source *s, const struct plan *p,
                 const struct plan_options *options, const struct tokenizer_table *table,
                 struct error *err);

/* The tokenizer's blobs, which come first in the file: announced, then appended. */
int metadata_announce_tokenizer(struct model_writer *w, const struct tokenizer_table *table,
                                struct error *err);
int metadata_append_tokenizer(struct model_writer *w, const struct tokenizer_table *table,
                              struct error *err);
