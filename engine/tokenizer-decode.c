/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Ids to text, one by one (gemma3n.md §6.5). A character may be spread over up to four byte pieces:
 * what could still become one waits in the decoder, at most three bytes; what cannot any more turns
 * into U+FFFD, byte by byte. Since every other piece is valid UTF-8, the text does not depend on
 * how the ids are cut into calls.
 */

#include <string.h>

#include "base/utf8.h"
#include "engine/tokenizer-private.h"

/* Up to four bytes that wait become three bytes each; then the piece itself. */
size_t decoder_room(const struct tokenizer *t)
{
    return sizeof(((struct decoder *)0)->pending) * REPLACEMENT_SIZE + t->size_max;
}

size_t tokenizer_ids_least(const struct tokenizer *t, size_t n)
{
    if (n == 0)
        return 0;
    return t->has_bytes ? (n - 1) / t->size_max + 1 : 1; /* unknown characters in a row are one */
}

size_t decoder_finish(struct decoder *d, char *out)
{
    size_t n = 0;

    for (size_t i = 0; i < d->n_pending; i++, n += REPLACEMENT_SIZE)
        memcpy(out + n, REPLACEMENT, REPLACEMENT_SIZE);
    d->n_pending = 0;
    return n;
}

static size_t push_byte(struct decoder *d, char byte, char *out)
{
    size_t n = 0;

    d->pending[d->n_pending++] = byte;
    while (d->n_pending > 0) {
        uint32_t code;
        size_t used = utf8_next(d->pending, d->n_pending, &code);

        if (used > 0) {
            memcpy(out + n, d->pending, used);
            n += used;
        } else if (utf8_complete_prefix(d->pending, d->n_pending) == 0) {
            break; /* all of it is the beginning of one character */
        } else {
            memcpy(out + n, REPLACEMENT, REPLACEMENT_SIZE);
            n += REPLACEMENT_SIZE;
            used = 1;
        }
        d->n_pending = (uint8_t)(d->n_pending - used);
        memmove(d->pending, d->pending + used, d->n_pending);
    }
    return n;
}

size_t decoder_push(struct decoder *d, const struct tokenizer *t, uint32_t id, bool special,
                    char *out)
{
    uint32_t size;
    const char *text;
    size_t n;

    if (id >= t->table.n_pieces || (!special && tokenizer_is_special(t, id)))
        return 0;
    text = piece_text(t, id, &size);
    if (t->table.types[id] == PIECE_BYTE) {
        /* Checked by tokenizer_new(): <0xHH>, upper case. */
        int high = text[3] <= '9' ? text[3] - '0' : text[3] - 'A' + 10;
        int low = text[4] <= '9' ? text[4] - '0' : text[4] - 'A' + 10;

        return push_byte(d, (char)(high << 4 | low), out);
    }
    n = decoder_finish(d, out);
    for (uint32_t i = 0; i < size;) {
        if (size - i >= META_SIZE && memcmp(text + i, META, META_SIZE) == 0) {
            out[n++] = ' ';
            i += META_SIZE;
        } else {
            out[n++] = text[i++];
        }
    }
    return n;
}
