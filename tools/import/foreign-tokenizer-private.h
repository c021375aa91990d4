/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* How a loader builds a foreign_tokenizer: begin, add every piece in the order of ids, settle. */

#include "tools/import/foreign-tokenizer.h"

struct foreign_builder {
    struct foreign_tokenizer *f;
    size_t n_pieces; /* announced */
    size_t n_text, text_allocated;
    const char *name; /* for messages: the file */
};

/* 0, -EINVAL: no vocabulary has so many pieces, -ENOMEM */
int foreign_begin(struct foreign_builder *ret, size_t n_pieces, const char *name,
                  struct error *err);

/* Copies the piece, with spaces escaped; at most n_pieces times. */
int foreign_add(struct foreign_builder *b, const char *text, size_t n, enum piece_type type,
                float score, struct error *err);

/* The first piece with that text (escaped), or TOKENIZER_NONE. Looks at all: for a few names. */
uint32_t foreign_find(const struct foreign_builder *b, const char *text);

/*
 * Settles types, scores and the turn pieces, has the table checked and gives it away. merge_ranks
 * is NULL where the scores are the source's; else a function that puts the rank of every piece that
 * a merge makes into ranks [n_pieces], asking t for pieces; the others are UINT32_MAX.
 */
int foreign_settle(struct foreign_builder *b,
                   int (*merge_ranks)(const struct foreign_builder *b, const struct tokenizer *t,
                                      uint32_t *ranks, const void *userdata, struct error *err),
                   const void *userdata, struct foreign_tokenizer **ret, struct error *err);

/*
 * Notes that merge number rank joins left and right; -EINVAL when no piece is both together.
 */
int foreign_merge(const struct tokenizer *t, const char *left, size_t n_left, const char *right,
                  size_t n_right, uint32_t rank, uint32_t *ranks);

/* For CLEANUP. */
static inline void foreign_builder_done(struct foreign_builder *b)
{
    foreign_tokenizer_free(b->f);
}
