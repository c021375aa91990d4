/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * tokenizer: text to ids and back, SentencePiece BPE with byte fallback as Gemma uses it
 * (gemma3n.md §6). Immutable after it was made; any thread may encode and decode.
 *
 * It is made from a table of pieces (struct tokenizer_table), which the importers fill from
 * tokenizer.model, tokenizer.json or GGUF and which a model file carries as blobs.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct tokenizer;
struct model_file;

enum piece_type { /* SentencePiece's numbers, which GGUF shares; stored in model files */
    PIECE_NORMAL = 1,
    PIECE_UNKNOWN = 2,
    PIECE_CONTROL = 3,
    PIECE_USER_DEFINED = 4,
    PIECE_UNUSED = 5,
    PIECE_BYTE = 6,
};

#define TOKENIZER_NONE UINT32_MAX

/*
 * The vocabulary in a neutral form. Piece i is text[offsets[i] .. offsets[i + 1]), in UTF-8, with
 * U+2581 for a space in every piece, user-defined ones included. A higher score merges first.
 */
struct tokenizer_table {
    uint32_t n_pieces;
    const char *text;
    const uint32_t *offsets; /* [n_pieces + 1] */
    const float *scores;     /* [n_pieces] */
    const uint8_t *types;    /* [n_pieces] enum piece_type */
    uint32_t bos, eos, unk, pad;           /* TOKENIZER_NONE where there is none */
    uint32_t start_of_turn, end_of_turn;   /* likewise; found by their text if not given */
    bool add_bos;
    bool add_space_prefix;
};

/*
 * Copies nothing: the table's arrays stay borrowed and must outlive the tokenizer. Every entry is
 * checked, whatever the source. 0, -EINVAL: err names the piece and what is wrong with it, -ENOMEM
 */
int tokenizer_new(struct tokenizer **ret, const struct tokenizer_table *table, struct error *err);

/*
 * From the blobs and metadata of a model file, which it copies; -ENODATA when it has no tokenizer.
 */
int tokenizer_from_model_file(struct tokenizer **ret, const struct model_file *f,
                              struct error *err);
struct tokenizer *tokenizer_free(struct tokenizer *t);
void tokenizer_freep(struct tokenizer **t);

const struct tokenizer_table *tokenizer_table(const struct tokenizer *t);

/* The piece's id by its exact text, or TOKENIZER_NONE. */
uint32_t tokenizer_find(const struct tokenizer *t, const char *text, size_t n);

struct encode_options {
    bool bos;     /* put bos first, if the vocabulary wants one (add_bos) */
    bool special; /* control pieces written in the text (<bos>, <start_of_turn>) become their ids */
    const atomic_int *cancelled; /* looked at now and then: not 0 ends it; NULL: cannot be */
};

/* A growing array of ids, zero-initialised. free(ids.data) at the end. */
struct token_array {
    uint32_t *data;
    size_t n, allocated;
};

/*
 * Appends the ids of text[0..n); invalid UTF-8 is read as U+FFFD, NUL is a character like others.
 * Time O(n log n). On failure the array is as before.
 * 0, -ENOMEM, -ECANCELED, -EOVERFLOW (more than 2^31 bytes, or 2^32 when each space counts three)
 */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                     const struct encode_options *options, struct token_array *ids);

int token_array_append(struct token_array *a, const uint32_t *ids, size_t n); /* 0, -ENOMEM */

/*
 * True for control, unknown and unused pieces, which decode to nothing unless asked for. So are,
 * whatever their type, the pieces that the table names (bos to end_of_turn).
 */
bool tokenizer_is_special(const struct tokenizer *t, uint32_t id);

/* Whether generation ends at this id by the vocabulary itself: eos, end of turn. */
bool tokenizer_is_end(const struct tokenizer *t, uint32_t id);

/*
 * Streaming decoder (gemma3n.md §6.5): push ids one by one, get text that never ends within a
 * character. Zero-initialised; owns nothing.
 */
struct decoder {
    char pending[4]; /* bytes of a character still incomplete */
    uint8_t n_pending;
};

/*
 * Appends what id completes to out (capacity at least decoder_room(t)); returns the bytes written.
 * Ids outside the vocabulary write nothing.
 */
size_t decoder_push(struct decoder *d, const struct tokenizer *t, uint32_t id, bool special,
                    char *out);
size_t decoder_room(const struct tokenizer *t);

/* Text of n bytes has at least so many ids: no piece, and no character, stands for more bytes. */
size_t tokenizer_ids_least(const struct tokenizer *t, size_t n);

/* End of the stream: an incomplete character becomes U+FFFD, one per byte. At most 12 bytes. */
size_t decoder_finish(struct decoder *d, char *out);
