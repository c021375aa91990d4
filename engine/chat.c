/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Gemma's turns (gemma3n.md §7.1), put together from ids rather than from one rendered string: the
 * text between two control tokens is encoded as one string, since newlines at its seams merge, and
 * with control pieces off, so that nobody can end their own turn by writing <end_of_turn>.
 */

#include "engine/chat.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/utf8.h"

int chat_role_parse(const char *name, enum chat_role *ret)
{
    static const struct {
        const char *name;
        enum chat_role role;
    } roles[] = {
        {"system", CHAT_SYSTEM},
        {"user", CHAT_USER},
        {"model", CHAT_MODEL},
        {"assistant", CHAT_MODEL},
    };

    for (size_t i = 0; i < ARRAY_SIZE(roles); i++) {
        if (strcmp(roles[i].name, name) == 0) {
            *ret = roles[i].role;
            return 0;
        }
    }
    return -EINVAL;
}

/* What Python's str.strip() takes for white space; Jinja's trim is that. */
static bool is_space(uint32_t c)
{
    return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 ||
           c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

/* Narrows text[0..n) on both sides. Bytes that are not UTF-8 are no space. */
static void trim(const char **text, size_t *n)
{
    uint32_t c;

    while (*n > 0) {
        size_t used = utf8_next(*text, *n, &c);

        if (used == 0 || !is_space(c))
            break;
        *text += used;
        *n -= used;
    }
    while (*n > 0) {
        size_t size = 1;

        while (size < 4 && size < *n && ((unsigned char)(*text)[*n - size] & 0xc0) == 0x80)
            size++;
        if (utf8_next(*text + *n - size, size, &c) != size || !is_space(c))
            break;
        *n -= size;
    }
}

static int encode(const struct tokenizer *t, const char *text, size_t n, struct token_array *ids)
{
    return tokenizer_encode(t, text, n, &(struct encode_options){.bos = false, .special = false},
                            ids);
}

static int append_turn(const struct tokenizer *t, const char *role,
                       const struct chat_message *prefix, const struct chat_message *m,
                       struct token_array *ids)
{
    const struct tokenizer_table *table = tokenizer_table(t);
    CLEANUP(freep) char *text = NULL;
    size_t n_role = strlen(role), n_content = m->n, n;
    const char *content = m->text;
    char *p;
    int r;

    trim(&content, &n_content);
    if (ckd_add(&n, n_role, n_content) ||
        (prefix && (ckd_add(&n, n, prefix->n) || ckd_add(&n, n, (size_t)2))))
        return -EOVERFLOW;
    p = text = malloc(n);
    if (!text)
        return -ENOMEM;
    p = mempcpy(p, role, n_role);
    if (prefix) { /* not trimmed, as in the published template */
        if (prefix->n > 0)
            p = mempcpy(p, prefix->text, prefix->n);
        p = mempcpy(p, "\n\n", 2);
    }
    if (n_content > 0)
        memcpy(p, content, n_content);

    r = token_array_append(ids, &table->start_of_turn, 1);
    if (r < 0)
        return r;
    r = encode(t, text, n, ids);
    if (r < 0)
        return r;
    r = token_array_append(ids, &table->end_of_turn, 1);
    if (r < 0)
        return r;
    return encode(t, "\n", 1, ids);
}

static int check_roles(const struct chat_message *messages, size_t n_messages, bool continuing,
                       struct error *err)
{
    size_t first = 0;

    if (n_messages > 0 && messages[0].role == CHAT_SYSTEM) {
        if (continuing)
            return error_set(err, EINVAL, "chat: a system message can only begin a session");
        first = 1;
    }
    if (n_messages == first)
        return error_set(err, EINVAL, "chat: there is no user message");
    for (size_t i = first; i < n_messages; i++) {
        enum chat_role expected = (i - first) % 2 == 0 ? CHAT_USER : CHAT_MODEL;

        if (messages[i].role != expected)
            return error_set(
                err, EINVAL,
                "chat: message %zu must be the %s's: after an optional system message, "
                "user and model alternate, the user first",
                i + 1, expected == CHAT_USER ? "user" : "model");
    }
    return 0;
}

static int append_all(const struct tokenizer *t, const struct chat_message *messages,
                      size_t n_messages, const struct chat_options *options,
                      struct token_array *ids)
{
    const struct tokenizer_table *table = tokenizer_table(t);
    const struct chat_message *prefix = NULL;
    int r;

    if (options->continuing) {
        if (options->open_turn) {
            r = token_array_append(ids, &table->end_of_turn, 1);
            if (r < 0)
                return r;
        }
        r = encode(t, "\n", 1, ids);
        if (r < 0)
            return r;
    } else if (table->bos != TOKENIZER_NONE) {
        /* The template spells it out, so it does not depend on add_bos. */
        r = token_array_append(ids, &table->bos, 1);
        if (r < 0)
            return r;
    }
    for (size_t i = 0; i < n_messages; i++) {
        if (messages[i].role == CHAT_SYSTEM) {
            prefix = &messages[i];
            continue;
        }
        r = append_turn(t, messages[i].role == CHAT_USER ? "user\n" : "model\n", prefix,
                        &messages[i], ids);
        if (r < 0)
            return r;
        prefix = NULL;
    }
    if (options->generate) {
        r = token_array_append(ids, &table->start_of_turn, 1);
        if (r < 0)
            return r;
        return encode(t, "model\n", 6, ids);
    }
    return 0;
}

int chat_encode(const struct tokenizer *t, const struct chat_message *messages, size_t n_messages,
                const struct chat_options *options, struct token_array *ids, struct error *err)
{
    const struct tokenizer_table *table = tokenizer_table(t);
    size_t before = ids->n;
    int r;

    if (table->start_of_turn == TOKENIZER_NONE || table->end_of_turn == TOKENIZER_NONE)
        return error_set(err, EINVAL,
                         "chat: the vocabulary has no <start_of_turn> and "
                         "<end_of_turn>: this is no model for chats");
    r = check_roles(messages, n_messages, options->continuing, err);
    if (r < 0)
        return r;
    r = append_all(t, messages, n_messages, options, ids);
    if (r < 0) {
        ids->n = before;
        return error_set(err, -r,
                         r == -EOVERFLOW ? "chat: a message is too long" : "chat: out of memory");
    }
    return 0;
}
