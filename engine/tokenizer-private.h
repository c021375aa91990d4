/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What the tokenizer's own files share. Nobody else includes this. */

#include "engine/tokenizer.h"

#define META "\xe2\x96\x81" /* U+2581, which stands for a space inside pieces */
#define META_SIZE 3u
#define REPLACEMENT "\xef\xbf\xbd" /* U+FFFD, for bytes that are not UTF-8 */
#define REPLACEMENT_SIZE 3u

/* A vocabulary beyond these is a broken file; they also bound the work per input byte. */
#define PIECES_MAX (1u << 24)
#define PIECE_SIZE_MAX 1024u

/* Open addressing, linear probing. The hash beside the id saves the look at most wrong pieces. */
struct piece_slot {
    uint32_t hash;
    uint32_t id; /* TOKENIZER_NONE: empty */
};

/* A node of the trie over the pieces that are matched literally. Node 0 is the root. */
struct trie_node {
    uint32_t parent;
    uint32_t id; /* the piece that ends here, or TOKENIZER_NONE */
    uint8_t byte;
};

/* Bits of the table of neighbours: some 7 % are set for Gemma's vocabulary. */
#define NEIGHBOURS_BITS (1u << 21)

struct tokenizer {
    struct tokenizer_table table; /* arrays borrowed, or `owned` */
    void *owned;                  /* memory of the table's arrays; NULL: borrowed */

    struct piece_slot *index; /* [index_mask + 1], all pieces by their text */
    uint32_t index_mask;

    struct trie_node *nodes;
    uint32_t n_nodes;
    uint32_t *edges; /* [edges_mask + 1]: nodes by (parent, byte), 0: empty */
    uint32_t edges_mask;
    uint32_t root[256]; /* the root's children, 0: none */

    uint64_t *neighbours; /* [NEIGHBOURS_BITS / 64], see tokenizer_neighbours() */

    uint32_t byte_ids[256]; /* valid if has_bytes */
    bool has_bytes;
    uint32_t normal_size_max; /* of the longest NORMAL piece, in bytes */
    uint32_t size_max;        /* of any piece */
};

static inline const char *piece_text(const struct tokenizer *t, uint32_t id, uint32_t *ret_size)
{
    *ret_size = t->table.offsets[id + 1] - t->table.offsets[id];
    return t->table.text + t->table.offsets[id];
}

static inline uint32_t neighbours_bit(uint32_t left, uint32_t right)
{
    return (uint32_t)((((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u) >> 32) %
           NEIGHBOURS_BITS;
}

/*
 * False if the characters stand side by side in no ordinary piece: then no merge ever joins them,
 * and a text can be cut between them without a change to its ids.
 */
static inline bool tokenizer_neighbours(const struct tokenizer *t, uint32_t left, uint32_t right)
{
    uint32_t bit = neighbours_bit(left, right);

    return t->neighbours[bit / 64] >> (bit % 64) & 1;
}

/*
 * The longest literally matched piece that text[0..n), escaped, begins with; special: control
 * pieces count, too. TOKENIZER_NONE if there is none.
 */
uint32_t tokenizer_match(const struct tokenizer *t, const char *text, size_t n, bool special,
                         size_t *ret_size);
