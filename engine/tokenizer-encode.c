/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Text to ids (gemma3n.md §6.2). The text is escaped into one buffer (spaces become U+2581, what is
 * not UTF-8 becomes U+FFFD). Left to right, the longest literal piece is taken wherever one begins;
 * what lies between two of them is a run, on its own, of characters that merge: a heap holds every
 * adjacent pair whose text is an ordinary piece, the highest score first and of equals the
 * leftmost. A merge leaves stale pairs in the heap; they are known by lengths that no longer fit,
 * and dropped when they come up. Every merge adds at most two pairs, so a run of n characters costs
 * O(n log n).
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"
#include "engine/tokenizer-private.h"

#define NO_SYMBOL UINT32_MAX
#define CANCEL_WORK 4096u /* steps of the work between two looks; well below a millisecond */

/* A character or what merged so far, at buffer[start .. start + size). size 0: merged away. */
struct symbol {
    uint32_t start, size;
    uint32_t previous, next; /* NO_SYMBOL at the ends of a run */
    uint32_t id;             /* of the piece it merged to; TOKENIZER_NONE: a single character */
};

struct pair {
    uint64_t key; /* smallest first: the score in its upper half, the left symbol in the lower */
    uint32_t right;
    uint32_t size; /* of both together, when the pair was made */
    uint32_t id;   /* what they merge to */
};

struct encoder {
    const struct tokenizer *t;
    struct token_array *ids;
    char *buffer; /* the escaped text */
    uint32_t size;
    struct symbol *symbols; /* of one run */
    uint32_t n_symbols;
    size_t symbols_allocated;
    struct pair *heap; /* [0] is the next to merge; children of i at 2 i + 1, 2 i + 2 */
    size_t n_heap, heap_allocated;
    bool after_unknown; /* unknown characters in a row are one unknown piece */
    const atomic_int *cancelled;
    uint32_t work; /* since cancelled was looked at */
};

/* To be called for each character or merge. */
static int check_cancelled(struct encoder *e)
{
    if (++e->work < CANCEL_WORK || !e->cancelled)
        return 0;
    e->work = 0;
    return atomic_load_explicit(e->cancelled, memory_order_relaxed) ? -ECANCELED : 0;
}

/* Room for n elements of size bytes in the growing array *data; -ENOMEM leaves it as it was. */
static int reserve(void **data, size_t *allocated, size_t n, size_t size)
{
    size_t want = MAX(n, (size_t)64), bytes;
    void *p;

    if (n <= *allocated)
        return 0;
    if (*allocated <= SIZE_MAX / 2)
        want = MAX(want, *allocated * 2);
    if (ckd_mul(&bytes, want, size))
        return -ENOMEM;
    p = realloc(*data, bytes);
    if (!p)
        return -ENOMEM;
    *data = p;
    *allocated = want;
    return 0;
}

int token_array_append(struct token_array *a, const uint32_t *ids, size_t n)
{
    void *data = a->data;
    size_t want;
    int r;

    if (n == 0)
        return 0;
    if (ckd_add(&want, a->n, n))
        return -ENOMEM;
    r = reserve(&data, &a->allocated, want, sizeof(*ids));
    if (r < 0)
        return r;
    a->data = data;
    memcpy(a->data + a->n, ids, n * sizeof(*ids));
    a->n = want;
    return 0;
}

/* Unsigned order that runs against the scores' order, with 0.0 and -0.0 as equals. */
static uint32_t score_rank(float score)
{
    uint32_t bits;

    score += 0.0f;
    memcpy(&bits, &score, sizeof(bits));
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

static int heap_push(struct encoder *e, struct pair pair)
{
    void *data = e->heap;
    size_t i;
    int r;

    if (e->n_heap == e->heap_allocated) {
        r = reserve(&data, &e->heap_allocated, e->n_heap + 1, sizeof(pair));
        if (r < 0)
            return r;
        e->heap = data;
    }
    for (i = e->n_heap++; i > 0 && pair.key < e->heap[(i - 1) / 2].key; i = (i - 1) / 2)
        e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = pair;
    return 0;
}

static struct pair heap_pop(struct encoder *e)
{
    struct pair top = e->heap[0], last = e->heap[--e->n_heap];
    size_t i = 0;

    for (;;) {
        size_t child = 2 * i + 1;

        if (child >= e->n_heap)
            break;
        if (child + 1 < e->n_heap && e->heap[child + 1].key < e->heap[child].key)
            child++;
        if (last.key <= e->heap[child].key)
            break;
        e->heap[i] = e->heap[child];
        i = child;
    }
    e->heap[i] = last;
    return top;
}

/* Puts the pair into the heap if it can merge. */
static int consider(struct encoder *e, uint32_t left, uint32_t right)
{
    const struct tokenizer *t = e->t;
    uint32_t size, id;

    if (left == NO_SYMBOL || right == NO_SYMBOL)
        return 0;
    size = e->symbols[left].size + e->symbols[right].size;
    if (size > t->normal_size_max)
        return 0;
    id = tokenizer_find(t, e->buffer + e->symbols[left].start, size);
    if (id == TOKENIZER_NONE || t->table.types[id] != PIECE_NORMAL)
        return 0;
    return heap_push(e, (struct pair){
                            .key = (uint64_t)score_rank(t->table.scores[id]) << 32 | left,
                            .right = right,
                            .size = size,
                            .id = id,
                        });
}

static int merge_all(struct encoder *e)
{
    int r;

    e->n_heap = 0;
    for (uint32_t i = 1; i < e->n_symbols; i++) {
        r = consider(e, i - 1, i);
        if (r < 0)
            return r;
        r = check_cancelled(e);
        if (r < 0)
            return r;
    }
    while (e->n_heap > 0) {
        struct pair pair = heap_pop(e);
        uint32_t left_index = (uint32_t)pair.key;
        struct symbol *left = &e->symbols[left_index], *right = &e->symbols[pair.right];

        /*
         * Stale if one side has merged since: the right one into this or another left one (size 0),
         * the left one likewise, or either has grown (the sum differs).
         */
        if (left->size == 0 || right->size == 0 || left->size + right->size != pair.size)
            continue;
        r = check_cancelled(e);
        if (r < 0)
            return r;
        left->size = pair.size;
        left->id = pair.id;
        left->next = right->next;
        right->size = 0;
        if (left->next != NO_SYMBOL)
            e->symbols[left->next].previous = left_index;
        r = consider(e, left->previous, left_index);
        if (r < 0)
            return r;
        r = consider(e, left_index, left->next);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Appends the ids of one symbol: its piece, its bytes, or the unknown piece. */
static int emit(struct encoder *e, const struct symbol *s)
{
    const struct tokenizer *t = e->t;
    const char *text = e->buffer + s->start;
    uint32_t id = s->id;
    int r;

    if (id == TOKENIZER_NONE) {
        id = tokenizer_find(t, text, s->size);
        if (id != TOKENIZER_NONE && t->table.types[id] != PIECE_NORMAL)
            id = TOKENIZER_NONE;
    }
    if (id != TOKENIZER_NONE) {
        e->after_unknown = false;
        return token_array_append(e->ids, &id, 1);
    }
    if (!t->has_bytes) {
        if (e->after_unknown)
            return 0;
        e->after_unknown = true;
        return token_array_append(e->ids, &t->table.unk, 1);
    }
    for (uint32_t i = 0; i < s->size; i++) {
        r = token_array_append(e->ids, &t->byte_ids[(unsigned char)text[i]], 1);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Encodes buffer[start..end), in which no literal piece is taken. */
static int encode_run(struct encoder *e, uint32_t start, uint32_t end)
{
    int r;

    e->n_symbols = 0;
    while (start < end) {
        uint32_t code, size = (uint32_t)utf8_next(e->buffer + start, end - start, &code);
        void *data = e->symbols;

        r = reserve(&data, &e->symbols_allocated, (size_t)e->n_symbols + 1, sizeof(*e->symbols));
        if (r < 0)
            return r;
        e->symbols = data;
        e->symbols[e->n_symbols] = (struct symbol){
            .start = start,
            .size = size,
            .previous = e->n_symbols > 0 ? e->n_symbols - 1 : NO_SYMBOL,
            .next = e->n_symbols + 1,
            .id = TOKENIZER_NONE,
        };
        e->n_symbols++;
        start += size;
    }
    if (e->n_symbols == 0)
        return 0;
    e->symbols[e->n_symbols - 1].next = NO_SYMBOL;
    r = merge_all(e);
    if (r < 0)
        return r;
    for (uint32_t i = 0; i != NO_SYMBOL; i = e->symbols[i].next) {
        r = emit(e, &e->symbols[i]);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Fills the buffer: valid UTF-8 without spaces. */
static int escape(struct encoder *e, const char *text, size_t n)
{
    bool prefix = e->t->table.add_space_prefix && n > 0;
    size_t size = prefix ? META_SIZE : 0;
    uint32_t code;
    char *out;

    /* Each byte that is not UTF-8 is a character of its own, as in SentencePiece. */
    for (size_t i = 0; i < n;) {
        size_t used = utf8_next(text + i, n - i, &code);

        size += used == 0 ? REPLACEMENT_SIZE : text[i] == ' ' ? META_SIZE : used;
        i += MAX(used, (size_t)1);
    }
    if (size >= UINT32_MAX)
        return -EOVERFLOW;
    e->buffer = out = malloc(size + 1);
    if (!out)
        return -ENOMEM;
    e->size = (uint32_t)size;

    if (prefix) {
        memcpy(out, META, META_SIZE);
        out += META_SIZE;
    }
    for (size_t i = 0; i < n;) {
        size_t used = utf8_next(text + i, n - i, &code);

        if (used == 0) {
            memcpy(out, REPLACEMENT, REPLACEMENT_SIZE);
            out += REPLACEMENT_SIZE;
        } else if (text[i] == ' ') {
            memcpy(out, META, META_SIZE);
            out += META_SIZE;
        } else {
            memcpy(out, text + i, used);
            out += used;
        }
        i += MAX(used, (size_t)1);
    }
    return 0;
}

static int encode(struct encoder *e, const char *text, size_t n,
                  const struct encode_options *options)
{
    const struct tokenizer *t = e->t;
    uint32_t run = 0, at = 0; /* the run's start, the place looked at */
    uint32_t code, previous = 0;
    int r;

    if (n > INT32_MAX)
        return -EOVERFLOW;
    if (options->bos && t->table.add_bos && t->table.bos != TOKENIZER_NONE) {
        r = token_array_append(e->ids, &t->table.bos, 1);
        if (r < 0)
            return r;
    }
    r = escape(e, text, n);
    if (r < 0)
        return r;
    while (at < e->size) {
        size_t size;
        uint32_t id = tokenizer_match(t, e->buffer + at, e->size - at, options->special, &size);

        r = check_cancelled(e);
        if (r < 0)
            return r;
        if (id == TOKENIZER_NONE) {
            uint32_t next = at + (uint32_t)utf8_next(e->buffer + at, e->size - at, &code);

            if (at > run && !tokenizer_neighbours(t, previous, code)) {
                r = encode_run(e, run, at);
                if (r < 0)
                    return r;
                run = at;
            }
            previous = code;
            at = next;
            continue;
        }
        r = encode_run(e, run, at);
        if (r < 0)
            return r;
        r = token_array_append(e->ids, &id, 1);
        if (r < 0)
            return r;
        e->after_unknown = false;
        at += (uint32_t)size;
        run = at;
    }
    return encode_run(e, run, e->size);
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n,
                     const struct encode_options *options, struct token_array *ids)
{
    struct encoder e = {.t = t, .ids = ids, .cancelled = options->cancelled};
    size_t before = ids->n;
    int r;

    r = encode(&e, text, n, options);
    if (r < 0)
        ids->n = before;
    free(e.buffer);
    free(e.symbols);
    free(e.heap);
    return r;
}
