/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Checks a table of pieces and makes three things of it: a hash index over all pieces, which the
 * merges and tokenizer_find() ask; a trie over those pieces that are taken literally from the text
 * (user-defined and, on request, control pieces), for the longest match; and a bit table of the
 * characters that meet within some piece. The table itself is not copied. Encoding is in
 * tokenizer-encode.c, decoding in tokenizer-decode.c.
 */

#include "engine/tokenizer.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"
#include "engine/tokenizer-private.h"

/* Eight bytes a step. Only speed depends on its quality. */
static uint32_t hash_text(const char *text, size_t n)
{
    const uint64_t factor = 0xd6e8feb86659fd93u;
    uint64_t h = n * 0x9e3779b97f4a7c15u, word;

    for (; n >= 8; text += 8, n -= 8) {
        memcpy(&word, text, 8);
        h = (h ^ word) * factor;
        h ^= h >> 32;
    }
    word = 0;
    for (size_t i = 0; i < n; i++)
        word = word << 8 | (unsigned char)text[i];
    h = (h ^ word) * factor;
    h = (h ^ h >> 32) * factor;
    return (uint32_t)(h >> 32);
}

/* Where in the index the piece with this text is, or the empty place where it would go. */
static uint32_t find_slot(const struct tokenizer *t, const char *text, size_t n, uint32_t hash)
{
    uint32_t i = hash & t->index_mask;

    for (;; i = (i + 1) & t->index_mask) {
        const struct piece_slot *slot = &t->index[i];

        if (slot->id == TOKENIZER_NONE)
            return i;
        if (slot->hash == hash) {
            uint32_t size;
            const char *piece = piece_text(t, slot->id, &size);

            if (size == n && memcmp(piece, text, n) == 0)
                return i;
        }
    }
}

uint32_t tokenizer_find(const struct tokenizer *t, const char *text, size_t n)
{
    if (n == 0 || n > t->size_max)
        return TOKENIZER_NONE;
    return t->index[find_slot(t, text, n, hash_text(text, n))].id;
}

/* Where the edge from parent by byte is, or the empty place where it would go. */
static uint32_t find_edge(const struct tokenizer *t, uint32_t parent, uint8_t byte)
{
    uint64_t h = ((uint64_t)parent << 8 | byte) * 0x9e3779b97f4a7c15u;
    uint32_t i = (uint32_t)(h >> 32) & t->edges_mask;

    for (; t->edges[i] != 0; i = (i + 1) & t->edges_mask) {
        const struct trie_node *node = &t->nodes[t->edges[i]];

        if (node->parent == parent && node->byte == byte)
            break;
    }
    return i;
}

uint32_t tokenizer_match(const struct tokenizer *t, const char *text, size_t n, bool special,
                         size_t *ret_size)
{
    uint32_t found = TOKENIZER_NONE, node;

    if (n == 0)
        return TOKENIZER_NONE;
    node = t->root[(unsigned char)text[0]];
    for (size_t i = 1; node != 0; i++) {
        uint32_t id = t->nodes[node].id;

        if (id != TOKENIZER_NONE && (special || !tokenizer_is_special(t, id))) {
            found = id;
            *ret_size = i;
        }
        if (i == n)
            break;
        node = t->edges[find_edge(t, node, (uint8_t)text[i])];
    }
    return found;
}

bool tokenizer_is_special(const struct tokenizer *t, uint32_t id)
{
    const struct tokenizer_table *table = &t->table;

    if (id >= table->n_pieces)
        return true;
    switch ((enum piece_type)table->types[id]) {
    case PIECE_UNKNOWN:
    case PIECE_CONTROL:
    case PIECE_UNUSED:
        return true;
    case PIECE_NORMAL:
    case PIECE_USER_DEFINED:
    case PIECE_BYTE:
        break;
    }
    /* SentencePiece files have the turn marks as user-defined, so that their text would do. */
    return id == table->bos || id == table->eos || id == table->unk || id == table->pad ||
           id == table->start_of_turn || id == table->end_of_turn;
}

bool tokenizer_is_end(const struct tokenizer *t, uint32_t id)
{
    return id < t->table.n_pieces && (id == t->table.eos || id == t->table.end_of_turn);
}

const struct tokenizer_table *tokenizer_table(const struct tokenizer *t)
{
    return &t->table;
}

/* The byte that a byte piece spells, "<0x0A>", or -1. */
static int byte_of(const char *text, uint32_t n)
{
    int byte = 0;

    if (n != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>')
        return -1;
    for (int i = 3; i < 5; i++) {
        char c = text[i];

        if (c >= '0' && c <= '9')
            byte = byte << 4 | (c - '0');
        else if (c >= 'A' && c <= 'F')
            byte = byte << 4 | (c - 'A' + 10);
        else
            return -1;
    }
    return byte;
}

/* Everything about piece i that can be said without the other pieces. */
static int check_piece(struct tokenizer *t, uint32_t i, uint32_t *n_bytes, struct error *err)
{
    const struct tokenizer_table *table = &t->table;
    uint8_t type = table->types[i];
    uint32_t size;
    const char *text;
    int byte;

    text = piece_text(t, i, &size);
    if (type < PIECE_NORMAL || type > PIECE_BYTE)
        return error_set(err, EINVAL, "tokenizer: piece %u: unknown type %u", i, type);
    if (!isfinite(table->scores[i]))
        return error_set(err, EINVAL, "tokenizer: piece %u: its score is not a finite number", i);
    if (size == 0 && type != PIECE_UNUSED)
        return error_set(err, EINVAL, "tokenizer: piece %u: empty", i);
    if (size > PIECE_SIZE_MAX)
        return error_set(err, EINVAL, "tokenizer: piece %u: %u bytes, at most %u are possible", i,
                         size, PIECE_SIZE_MAX);
    if (!utf8_valid(text, size))
        return error_set(err, EINVAL, "tokenizer: piece %u: not valid UTF-8", i);
    if (memchr(text, ' ', size))
        return error_set(err, EINVAL, "tokenizer: piece %u: has a space, must have U+2581", i);
    t->size_max = MAX(t->size_max, size);
    if (type == PIECE_NORMAL)
        t->normal_size_max = MAX(t->normal_size_max, size);
    if (type == PIECE_BYTE) {
        byte = byte_of(text, size);
        if (byte < 0)
            return error_set(err, EINVAL, "tokenizer: piece %u: type byte, but not like <0x0A>", i);
        if (t->byte_ids[byte] != TOKENIZER_NONE)
            return error_set(err, EINVAL, "tokenizer: piece %u: byte 0x%02X is also piece %u", i,
                             byte, t->byte_ids[byte]);
        t->byte_ids[byte] = i;
        (*n_bytes)++;
    }
    return 0;
}

static int check_id(uint32_t n_pieces, uint32_t id, const char *name, struct error *err)
{
    if (id != TOKENIZER_NONE && id >= n_pieces)
        return error_set(err, EINVAL, "tokenizer: %s is %u, beyond the %u pieces", name, id,
                         n_pieces);
    return 0;
}

static int check_table(struct tokenizer *t, struct error *err)
{
    const struct tokenizer_table *table = &t->table;
    uint32_t n_bytes = 0;
    int r;

    if (table->n_pieces == 0 || table->n_pieces > PIECES_MAX)
        return error_set(err, EINVAL, "tokenizer: %u pieces, 1 to %u are possible", table->n_pieces,
                         PIECES_MAX);
    if ((r = check_id(table->n_pieces, table->bos, "bos", err)) < 0 ||
        (r = check_id(table->n_pieces, table->eos, "eos", err)) < 0 ||
        (r = check_id(table->n_pieces, table->unk, "unk", err)) < 0 ||
        (r = check_id(table->n_pieces, table->pad, "pad", err)) < 0 ||
        (r = check_id(table->n_pieces, table->start_of_turn, "start_of_turn", err)) < 0 ||
        (r = check_id(table->n_pieces, table->end_of_turn, "end_of_turn", err)) < 0)
        return r;
    /* All of them first: what a piece's end passes may be the end of the whole text. */
    for (uint32_t i = 0; i < table->n_pieces; i++)
        if (table->offsets[i + 1] < table->offsets[i])
            return error_set(err, EINVAL, "tokenizer: piece %u: its offset %u is after its end %u",
                             i, table->offsets[i], table->offsets[i + 1]);
    for (uint32_t i = 0; i < table->n_pieces; i++) {
        r = check_piece(t, i, &n_bytes, err);
        if (r < 0)
            return r;
    }
    t->has_bytes = n_bytes == 256;
    if (n_bytes != 0 && !t->has_bytes)
        return error_set(err, EINVAL, "tokenizer: %u byte pieces, must be 256 or none", n_bytes);
    if (!t->has_bytes && table->unk == TOKENIZER_NONE)
        return error_set(err, EINVAL, "tokenizer: has neither byte pieces nor an unknown piece");
    return 0;
}

/* The smallest power of two that leaves a table of n entries half empty. n < 2^31 */
static uint32_t table_size(uint32_t n)
{
    uint32_t size = 16;

    while (size / 2 < n)
        size *= 2;
    return size;
}

static int build_index(struct tokenizer *t, struct error *err)
{
    uint32_t size = table_size(t->table.n_pieces);

    t->index = malloc(size * sizeof(*t->index));
    if (!t->index)
        return error_set(err, ENOMEM, "tokenizer: out of memory");
    memset(t->index, 0xff, size * sizeof(*t->index)); /* TOKENIZER_NONE everywhere */
    t->index_mask = size - 1;
    for (uint32_t i = 0; i < t->table.n_pieces; i++) {
        uint32_t n, hash, other;
        const char *text = piece_text(t, i, &n);
        struct piece_slot *slot;

        if (n == 0)
            continue;
        hash = hash_text(text, n);
        slot = &t->index[find_slot(t, text, n, hash)];
        other = slot->id;
        if (other != TOKENIZER_NONE && t->table.types[i] == PIECE_UNUSED)
            continue; /* fillers may repeat; the first one, or the used one, is found */
        if (other != TOKENIZER_NONE && t->table.types[other] != PIECE_UNUSED)
            return error_set(err, EINVAL, "tokenizer: piece %u: the same text as piece %u", i,
                             other);
        *slot = (struct piece_slot){.hash = hash, .id = i};
    }
    return 0;
}

static int build_neighbours(struct tokenizer *t, struct error *err)
{
    t->neighbours = calloc(NEIGHBOURS_BITS / 64, sizeof(*t->neighbours));
    if (!t->neighbours)
        return error_set(err, ENOMEM, "tokenizer: out of memory");
    for (uint32_t i = 0; i < t->table.n_pieces; i++) {
        uint32_t n, left, right;
        const char *text = piece_text(t, i, &n);
        size_t at;

        if (t->table.types[i] != PIECE_NORMAL)
            continue;
        for (at = utf8_next(text, n, &left); at < n; left = right) {
            uint32_t bit;

            at += utf8_next(text + at, n - at, &right);
            bit = neighbours_bit(left, right);
            t->neighbours[bit / 64] |= (uint64_t)1 << (bit % 64);
        }
    }
    return 0;
}

/* Whether the piece may be taken literally from a text at all. */
static bool is_literal(const struct tokenizer *t, uint32_t id)
{
    uint8_t type = t->table.types[id];

    return type == PIECE_USER_DEFINED ||
           (type != PIECE_UNUSED && type != PIECE_BYTE && tokenizer_is_special(t, id));
}

static int build_trie(struct tokenizer *t, struct error *err)
{
    uint64_t n_bytes = 0;
    uint32_t size;

    for (uint32_t i = 0; i < t->table.n_pieces; i++)
        if (is_literal(t, i))
            n_bytes += t->table.offsets[i + 1] - t->table.offsets[i];
    if (n_bytes > PIECES_MAX) /* some 93 000 in Gemma's vocabulary */
        return error_set(err, EINVAL, "tokenizer: literal pieces of %llu bytes, too many",
                         (unsigned long long)n_bytes);
    size = table_size((uint32_t)n_bytes + 1);
    t->nodes = malloc((n_bytes + 1) * sizeof(*t->nodes));
    t->edges = calloc(size, sizeof(*t->edges));
    if (!t->nodes || !t->edges)
        return error_set(err, ENOMEM, "tokenizer: out of memory");
    t->edges_mask = size - 1;
    t->nodes[0] = (struct trie_node){.id = TOKENIZER_NONE};
    t->n_nodes = 1;

    for (uint32_t i = 0; i < t->table.n_pieces; i++) {
        uint32_t n, node = 0;
        const char *text = piece_text(t, i, &n);

        if (!is_literal(t, i))
            continue;
        for (uint32_t k = 0; k < n; k++) {
            uint8_t byte = (uint8_t)text[k];
            uint32_t *edge = k == 0 ? &t->root[byte] : &t->edges[find_edge(t, node, byte)];

            if (*edge == 0) {
                *edge = t->n_nodes;
                t->nodes[t->n_nodes++] =
                    (struct trie_node){.parent = node, .id = TOKENIZER_NONE, .byte = byte};
            }
            node = *edge;
        }
        t->nodes[node].id = i;
    }
    return 0;
}

static uint32_t find_control(const struct tokenizer *t, uint32_t given, const char *text)
{
    uint32_t id;

    if (given != TOKENIZER_NONE)
        return given;
    id = tokenizer_find(t, text, strlen(text));
    if (id == TOKENIZER_NONE || t->table.types[id] == PIECE_UNUSED)
        return TOKENIZER_NONE;
    return id;
}

int tokenizer_new(struct tokenizer **ret, const struct tokenizer_table *table, struct error *err)
{
    CLEANUP(tokenizer_freep) struct tokenizer *t = calloc(1, sizeof(*t));
    int r;

    if (!t)
        return error_set(err, ENOMEM, "tokenizer: out of memory");
    t->table = *table;
    memset(t->byte_ids, 0xff, sizeof(t->byte_ids));

    r = check_table(t, err);
    if (r < 0)
        return r;
    r = build_index(t, err);
    if (r < 0)
        return r;
    /* Before the trie, which asks whether a piece is special. */
    t->table.start_of_turn = find_control(t, table->start_of_turn, "<start_of_turn>");
    t->table.end_of_turn = find_control(t, table->end_of_turn, "<end_of_turn>");
    r = build_trie(t, err);
    if (r < 0)
        return r;
    r = build_neighbours(t, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(t);
    return 0;
}

struct tokenizer *tokenizer_free(struct tokenizer *t)
{
    if (!t)
        return NULL;
    free(t->owned);
    free(t->index);
    free(t->nodes);
    free(t->edges);
    free(t->neighbours);
    free(t);
    return NULL;
}

void tokenizer_freep(struct tokenizer **t)
{
    tokenizer_free(*t);
}
