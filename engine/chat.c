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

static int encode(const struct tokenizer *t, const char *text, size_t n,
                  const atomic_int *cancelled, struct token_array *ids)
{
    return tokenizer_encode(t, text, n, &(struct encode_options){.cancelled = cancelled}, ids);
}

static int close_turn(const struct tokenizer *t, struct token_array *ids)
{
    int r = token_array_append(ids, &tokenizer_table(t)->end_of_turn, 1);

    return r < 0 ? r : encode(t, "\n", 1, NULL, ids);
}

/*
 * A turn, or what of it is still missing: without role it has begun already; without message it
 * stays open behind the prefix.
 */
static int append_turn(const struct tokenizer *t, const char *role,
                       const struct chat_message *prefix, const struct chat_message *m,
                       const atomic_int *cancelled, struct token_array *ids)
{
    const struct tokenizer_table *table = tokenizer_table(t);
    CLEANUP(freep) char *text = NULL;
    size_t n_role = strlen(role), n_content = m ? m->n : 0, n;
    const char *content = m ? m->text : "";
    char *p;
    int r;

    trim(&content, &n_content);
    if (ckd_add(&n, n_role, n_content) ||
        (prefix && (ckd_add(&n, n, prefix->n) || ckd_add(&n, n, (size_t)2))))
        return -EOVERFLOW;
    p = text = malloc(n + 1);
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

    if (n_role > 0) {
        r = token_array_append(ids, &table->start_of_turn, 1);
        if (r < 0)
            return r;
    }
    r = encode(t, text, n, cancelled, ids);
    explicit_bzero(text, n);
    return r < 0 || !m ? r : close_turn(t, ids);
}

static bool is_after_user(enum chat_position position)
{
    return position == CHAT_CLOSED_USER || position == CHAT_AFTER_USER;
}

static int check_roles(const struct chat_message *messages, size_t n_messages,
                       const struct chat_options *options, struct error *err)
{
    bool model_first = is_after_user(options->position);
    size_t first = 0;

    if (n_messages > 0 && messages[0].role == CHAT_SYSTEM) {
        if (options->position != CHAT_START)
            return error_set(err, EINVAL, "chat: a system message can only begin a session");
        first = 1;
    }
    if (n_messages == first && (options->generate || first == 0))
        return error_set(err, EINVAL, "chat: there is no user message");
    for (size_t i = first; i < n_messages; i++) {
        enum chat_role expected = ((i - first) % 2 == 0) != model_first ? CHAT_USER : CHAT_MODEL;

        if (messages[i].role == expected)
            continue;
        if (model_first)
            return error_set(
                err, EINVAL,
                "chat: message %zu must be the %s's: user and model alternate, and the "
                "session ends with a user's turn",
                i + 1, expected == CHAT_USER ? "user" : "model");
        return error_set(err, EINVAL,
                         "chat: message %zu must be the %s's: after an optional system message, "
                         "user and model alternate, the user first",
                         i + 1, expected == CHAT_USER ? "user" : "model");
    }
    return 0;
}

int chat_check(const struct tokenizer *t, const struct chat_message *messages, size_t n_messages,
               const struct chat_options *options, struct error *err)
{
    const struct tokenizer_table *table = tokenizer_table(t);

    if (table->start_of_turn == TOKENIZER_NONE || table->end_of_turn == TOKENIZER_NONE)
        return error_set(err, EINVAL,
                         "chat: the vocabulary has no <start_of_turn> and "
                         "<end_of_turn>: this is no model for chats");
    return check_roles(messages, n_messages, options, err);
}

/* What has to stand before the first message. */
static int append_begin(const struct tokenizer *t, enum chat_position position,
                        struct token_array *ids)
{
    const struct tokenizer_table *table = tokenizer_table(t);

    switch (position) {
    case CHAT_START: /* the template spells it out, so it does not depend on add_bos */
        return table->bos == TOKENIZER_NONE ? 0 : token_array_append(ids, &table->bos, 1);
    case CHAT_OPEN_MODEL:
        return close_turn(t, ids);
    case CHAT_CLOSED_USER:
    case CHAT_CLOSED_MODEL:
        return encode(t, "\n", 1, NULL, ids);
    case CHAT_OPEN_USER:
    case CHAT_AFTER_USER:
    case CHAT_AFTER_MODEL:
        return 0;
    }
    return -EINVAL;
}

static int append_all(const struct tokenizer *t, const struct chat_message *messages,
                      size_t n_messages, const struct chat_options *options,
                      struct token_array *ids, enum chat_position *position)
{
    const struct tokenizer_table *table = tokenizer_table(t);
    const struct chat_message *prefix = NULL;
    int r;

    r = append_begin(t, options->position, ids);
    if (r < 0)
        return r;
    *position = options->position;
    for (size_t i = 0; i < n_messages; i++) {
        const struct chat_message *m = &messages[i];
        bool user = m->role != CHAT_MODEL;

        if (m->role == CHAT_SYSTEM && n_messages > 1) {
            prefix = m;
            continue;
        }
        r = append_turn(t,
                        *position == CHAT_OPEN_USER ? ""
                        : user                      ? "user\n"
                                                    : "model\n",
                        m->role == CHAT_SYSTEM ? m : prefix, m->role == CHAT_SYSTEM ? NULL : m,
                        options->cancelled, ids);
        if (r < 0)
            return r;
        prefix = NULL;
        *position = m->role == CHAT_SYSTEM ? CHAT_OPEN_USER
                    : user                 ? CHAT_AFTER_USER
                                           : CHAT_AFTER_MODEL;
    }
    if (options->generate) {
        r = token_array_append(ids, &table->start_of_turn, 1);
        if (r < 0)
            return r;
        *position = CHAT_OPEN_MODEL;
        return encode(t, "model\n", 6, NULL, ids);
    }
    return 0;
}

int chat_encode(const struct tokenizer *t, const struct chat_message *messages, size_t n_messages,
                const struct chat_options *options, struct token_array *ids,
                enum chat_position *ret_position, struct error *err)
{
    enum chat_position position;
    size_t before = ids->n;
    int r;

    r = chat_check(t, messages, n_messages, options, err);
    if (r < 0)
        return r;
    r = append_all(t, messages, n_messages, options, ids, &position);
    if (r < 0) {
        ids->n = before;
        return error_set(err, -r,
                         r == -EOVERFLOW   ? "chat: a message is too long"
                         : r == -ECANCELED ? "chat: cancelled"
                                           : "chat: out of memory");
    }
    if (ret_position)
        *ret_position = position;
    return 0;
}

size_t chat_ids_least(const struct tokenizer *t, const struct chat_message *messages,
                      size_t n_messages)
{
    size_t least = 0;

    for (size_t i = 0; i < n_messages; i++) {
        const char *text = messages[i].text;
        size_t n = messages[i].n;

        if (messages[i].role != CHAT_SYSTEM)
            trim(&text, &n);
        least += tokenizer_ids_least(t, n); /* at most n: what is in memory can be counted */
    }
    return least;
}

enum chat_position chat_position_find(const struct tokenizer *t, const uint32_t *ids, size_t n)
{
    const struct tokenizer_table *table = tokenizer_table(t);
    struct token_array user = {0};
    size_t last = n, start = n; /* places of the last control piece and of the last turn's start */
    bool is_user;

    if (n == 0)
        return CHAT_START;
    for (size_t i = n; i-- > 0 && start == n;) {
        if (ids[i] == table->start_of_turn)
            start = i;
        if (last == n && (ids[i] == table->start_of_turn || ids[i] == table->end_of_turn))
            last = i;
    }
    if (start == n || encode(t, "user", 4, NULL, &user) < 0)
        return CHAT_OPEN_MODEL;
    is_user =
        n - start - 1 >= user.n && memcmp(ids + start + 1, user.data, user.n * sizeof(*ids)) == 0;
    free(user.data);
    if (ids[last] == table->start_of_turn)
        return is_user ? CHAT_OPEN_USER : CHAT_OPEN_MODEL;
    if (last == n - 1)
        return is_user ? CHAT_CLOSED_USER : CHAT_CLOSED_MODEL;
    return is_user ? CHAT_AFTER_USER : CHAT_AFTER_MODEL;
}
