/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * SentencePiece's tokenizer.model: one message in protobuf's wire format, of which a few fields
 * matter. The reader below knows that format only so far: tags, varints, fixed numbers, and bytes
 * with a length, each bounded by the message it lies in. Whatever it skips need not make sense.
 */

#include <errno.h>
#include <string.h>

#include "base/checked.h"
#include "tools/import/foreign-tokenizer-private.h"

enum wire_type { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

struct wire {
    const uint8_t *at, *end;
};

struct field {
    uint64_t number;
    enum wire_type type;
    uint64_t value;    /* of the three kinds of numbers, as unsigned bits */
    struct wire bytes; /* of WIRE_BYTES */
};

static int read_varint(struct wire *w, uint64_t *ret)
{
    uint64_t v = 0;

    for (unsigned shift = 0; shift < 70; shift += 7) {
        uint8_t byte;

        if (w->at == w->end)
            return -EINVAL;
        byte = *w->at++;
        if (shift == 63 && byte > 1)
            return -EINVAL;
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            *ret = v;
            return 0;
        }
    }
    return -EINVAL;
}

static int read_fixed(struct wire *w, size_t n, uint64_t *ret)
{
    uint64_t v = 0;

    if ((size_t)(w->end - w->at) < n)
        return -EINVAL;
    for (size_t i = 0; i < n; i++)
        v |= (uint64_t)w->at[i] << (8 * i);
    w->at += n;
    *ret = v;
    return 0;
}

/* 1: a field, 0: the message's end, -EINVAL */
static int read_field(struct wire *w, struct field *ret)
{
    struct field f = {0};
    uint64_t tag;
    int r;

    if (w->at == w->end)
        return 0;
    r = read_varint(w, &tag);
    if (r < 0)
        return r;
    f.number = tag >> 3;
    if (f.number == 0 || tag > UINT32_MAX)
        return -EINVAL;
    switch (tag & 7) {
    case WIRE_VARINT:
        r = read_varint(w, &f.value);
        break;
    case WIRE_64:
        r = read_fixed(w, 8, &f.value);
        break;
    case WIRE_32:
        r = read_fixed(w, 4, &f.value);
        break;
    case WIRE_BYTES:
        r = read_varint(w, &f.value);
        if (r == 0 && f.value > (uint64_t)(w->end - w->at))
            r = -EINVAL;
        if (r == 0) {
            f.bytes = (struct wire){.at = w->at, .end = w->at + f.value};
            w->at += f.value;
        }
        break;
    default: /* groups are long out of use */
        r = -EINVAL;
    }
    if (r < 0)
        return r;
    f.type = (enum wire_type)(tag & 7);
    *ret = f;
    return 1;
}

struct text {
    const char *data;
    size_t n;
};

/* What matters of the trainer's and the normaliser's settings, with the format's defaults. */
struct settings {
    uint64_t model_type; /* 1 unigram, 2 BPE, 3 words, 4 characters */
    bool space_as_suffix, dummy_prefix, remove_extra_spaces, escape_spaces, normalizes;
    struct text bos, eos, pad;
};

static const struct settings defaults = {
    .model_type = 1,
    .dummy_prefix = true,
    .remove_extra_spaces = true,
    .escape_spaces = true,
    .bos = {"<s>", 3},
    .eos = {"</s>", 4},
    .pad = {"<pad>", 5},
};

static struct text as_text(const struct field *f)
{
    return (struct text){(const char *)f->bytes.at, (size_t)f->value};
}

static int read_trainer(struct wire w, struct settings *s)
{
    struct field f;
    int r;

    while ((r = read_field(&w, &f)) > 0) {
        if (f.number == 3 && f.type == WIRE_VARINT)
            s->model_type = f.value;
        else if (f.number == 24 && f.type == WIRE_VARINT)
            s->space_as_suffix = f.value != 0;
        else if (f.number == 46 && f.type == WIRE_BYTES)
            s->bos = as_text(&f);
        else if (f.number == 47 && f.type == WIRE_BYTES)
            s->eos = as_text(&f);
        else if (f.number == 48 && f.type == WIRE_BYTES)
            s->pad = as_text(&f);
    }
    return r;
}

static int read_normalizer(struct wire w, struct settings *s)
{
    struct field f;
    int r;

    while ((r = read_field(&w, &f)) > 0) {
        if (f.number == 2 && f.type == WIRE_BYTES)
            s->normalizes = f.value > 0; /* the compiled rules; none for "identity" */
        else if (f.number == 3 && f.type == WIRE_VARINT)
            s->dummy_prefix = f.value != 0;
        else if (f.number == 4 && f.type == WIRE_VARINT)
            s->remove_extra_spaces = f.value != 0;
        else if (f.number == 5 && f.type == WIRE_VARINT)
            s->escape_spaces = f.value != 0;
    }
    return r;
}

static int add_piece(struct foreign_builder *b, struct wire w, struct error *err)
{
    uint32_t id = b->f->table.n_pieces;
    uint64_t type = PIECE_NORMAL;
    struct text text = {"", 0};
    float score = 0;
    struct field f;
    int r;

    while ((r = read_field(&w, &f)) > 0) {
        if (f.number == 1 && f.type == WIRE_BYTES) {
            text = as_text(&f);
        } else if (f.number == 2 && f.type == WIRE_32) {
            uint32_t bits = (uint32_t)f.value;

            memcpy(&score, &bits, sizeof(score));
        } else if (f.number == 3 && f.type == WIRE_VARINT) {
            type = f.value;
        }
    }
    if (r < 0)
        return error_set(err, EINVAL, "%s: piece %u: broken", b->name, id);
    if (type < PIECE_NORMAL || type > PIECE_BYTE)
        return error_set(err, EINVAL, "%s: piece %u: unknown type %llu", b->name, id,
                         (unsigned long long)type);
    return foreign_add(b, text.data, text.n, (enum piece_type)type, score, err);
}

static int check_settings(const struct settings *s, const char *name, struct error *err)
{
    if (s->model_type != 2)
        return error_set(err, EINVAL, "%s: trainer_spec.model_type: only BPE is known", name);
    if (s->space_as_suffix)
        return error_set(err, EINVAL,
                         "%s: trainer_spec.treat_whitespace_as_suffix is not supported", name);
    if (s->normalizes)
        return error_set(err, EINVAL,
                         "%s: normalizer_spec: rules other than 'identity' are not "
                         "supported",
                         name);
    if (s->remove_extra_spaces)
        return error_set(err, EINVAL,
                         "%s: normalizer_spec.remove_extra_whitespaces is not "
                         "supported",
                         name);
    if (!s->escape_spaces)
        return error_set(err, EINVAL,
                         "%s: normalizer_spec.escape_whitespaces is off, which is not "
                         "supported",
                         name);
    return 0;
}

/* SentencePiece finds its control pieces by name, and only if they are of that type. */
static uint32_t find_typed(const struct foreign_tokenizer *f, struct text name,
                           enum piece_type type)
{
    for (uint32_t i = 0; i < f->table.n_pieces; i++)
        if (f->types[i] == type && f->offsets[i + 1] - f->offsets[i] == name.n &&
            memcmp(f->text + f->offsets[i], name.data, name.n) == 0)
            return i;
    return TOKENIZER_NONE;
}

static uint32_t find_first(const struct foreign_tokenizer *f, enum piece_type type)
{
    for (uint32_t i = 0; i < f->table.n_pieces; i++)
        if (f->types[i] == type)
            return i;
    return TOKENIZER_NONE;
}

int foreign_tokenizer_from_spm(struct foreign_tokenizer **ret, const void *data, size_t n,
                               const char *name, struct error *err)
{
    CLEANUP(foreign_builder_done) struct foreign_builder b = {0};
    const struct wire all = {.at = data, .end = (const uint8_t *)data + n};
    struct settings s = defaults;
    struct tokenizer_table *table;
    size_t n_pieces = 0;
    struct wire w = all;
    struct field f;
    int r;

    while ((r = read_field(&w, &f)) > 0) {
        if (f.type != WIRE_BYTES)
            continue;
        if (f.number == 1)
            n_pieces++;
        else if (f.number == 2 && read_trainer(f.bytes, &s) < 0)
            return error_set(err, EINVAL, "%s: trainer_spec: broken", name);
        else if (f.number == 3 && read_normalizer(f.bytes, &s) < 0)
            return error_set(err, EINVAL, "%s: normalizer_spec: broken", name);
    }
    if (r < 0)
        return error_set(err, EINVAL, "%s: not a SentencePiece model, or broken at byte %zu", name,
                         (size_t)(w.at - all.at));
    if (n_pieces == 0)
        return error_set(err, EINVAL, "%s: not a SentencePiece model: it has no pieces", name);
    r = check_settings(&s, name, err);
    if (r < 0)
        return r;
    r = foreign_begin(&b, n_pieces, name, err);
    if (r < 0)
        return r;
    for (w = all; read_field(&w, &f) > 0;) {
        if (f.number != 1 || f.type != WIRE_BYTES)
            continue;
        r = add_piece(&b, f.bytes, err);
        if (r < 0)
            return r;
    }
    table = &b.f->table;
    table->bos = find_typed(b.f, s.bos, PIECE_CONTROL);
    table->eos = find_typed(b.f, s.eos, PIECE_CONTROL);
    table->pad = find_typed(b.f, s.pad, PIECE_CONTROL);
    table->unk = find_first(b.f, PIECE_UNKNOWN);
    if (table->bos == TOKENIZER_NONE)
        table->bos = find_typed(b.f, (struct text){"<bos>", 5}, PIECE_CONTROL);
    if (table->eos == TOKENIZER_NONE)
        table->eos = find_typed(b.f, (struct text){"<eos>", 5}, PIECE_CONTROL);
    table->add_bos = table->bos != TOKENIZER_NONE;
    table->add_space_prefix = s.dummy_prefix;
    return foreign_settle(&b, NULL, NULL, ret, err);
}
