/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * foreign_tokenizer: a vocabulary as others store it (gemma3n.md §6.3, §6.4), brought into one
 * form, so that the same vocabulary gives the same table from each of its sources:
 * - spaces are U+2581 in every piece;
 * - pieces that only mark something (turns, masks, images, <unusedN>) are control pieces, whatever
 *   the source calls them, so that their text does nothing unless asked for;
 * - scores are the source's, or made from the order of merges where it has only that; pieces that
 *   never merge have 0.
 * tokenizer_new() has checked the table by the time a loader returns.
 */

#include <stddef.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "engine/tokenizer.h"

struct gguf;

struct foreign_tokenizer {
    struct tokenizer_table table; /* points to what follows */
    char *text;
    uint32_t *offsets;
    float *scores;
    uint8_t *types;
};

/*
 * Each takes what it is given as hostile; name (a path) is for messages only.
 * 0, -EINVAL: broken, or of a kind that is not ours (err says what), -ENODATA: no tokenizer in
 * there, -ENOMEM
 */
int foreign_tokenizer_from_gguf(struct foreign_tokenizer **ret, const struct gguf *g,
                                struct error *err);
/* A SentencePiece model, "tokenizer.model". */
int foreign_tokenizer_from_spm(struct foreign_tokenizer **ret, const void *data, size_t n,
                               const char *name, struct error *err);
/* Hugging Face's "tokenizer.json". */
int foreign_tokenizer_from_json(struct foreign_tokenizer **ret, const char *text, size_t n,
                                const char *name, struct error *err);

/*
 * From a Hugging Face folder: tokenizer.model, or else tokenizer.json, with what
 * tokenizer_config.json may say about add_bos_token.
 * As above, or -errno of open and read; -ENODATA when neither file is there
 */
int foreign_tokenizer_from_folder(struct foreign_tokenizer **ret, const char *path,
                                  struct error *err);

struct foreign_tokenizer *foreign_tokenizer_free(struct foreign_tokenizer *f);
DEFINE_CLEANUP(struct foreign_tokenizer *, foreign_tokenizer_free)

/* The value of the model file's "llmd.tokenizer" (docs/model-file.md). free() it. 0, -ENOMEM */
int foreign_tokenizer_metadata(const struct tokenizer_table *table, char **ret);
