/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * chat: messages to ids, by Gemma's turn format built at the level of tokens (gemma3n.md §7), so
 * that text which looks like a control token stays text.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "engine/tokenizer.h"

enum chat_role {
    CHAT_SYSTEM, /* only first; becomes a prefix of the first user message */
    CHAT_USER,
    CHAT_MODEL,
};

struct chat_message {
    enum chat_role role;
    const char *text; /* borrowed, UTF-8, may hold NUL */
    size_t n;
};

/* "system", "user", "model" and its synonym "assistant"; 0 or -EINVAL. */
int chat_role_parse(const char *name, enum chat_role *ret);

/*
 * Where a session's tokens end: what has to come before the next message. "Closed" has
 * <end_of_turn>, "after" also the newline that follows it. Stored in saved sessions: numbers stay.
 */
enum chat_position {
    CHAT_START,     /* no tokens */
    CHAT_OPEN_USER, /* the next user message goes on with the turn: the system message stands there
                     */
    CHAT_CLOSED_USER,
    CHAT_AFTER_USER,
    CHAT_OPEN_MODEL, /* also after text without turns */
    CHAT_CLOSED_MODEL,
    CHAT_AFTER_MODEL,
};
#define CHAT_N_POSITIONS 7

/*
 * Appends the messages. Roles must alternate: a system message (at CHAT_START only), then the
 * user's first, or the model's after a user's turn. generate: ends with <start_of_turn>model\n;
 * then the last message must be the user's or the model's. Without it, a system message may also
 * stand alone. *ret_position (NULL: not wanted): where the ids end. With `cancelled` set by another
 * thread, it ends early with -ECANCELED. On failure ids are as before. 0, -EINVAL: the order of
 * roles; the vocabulary has no turn pieces, -ENOMEM, -EOVERFLOW
 */
struct chat_options {
    enum chat_position position;
    bool generate;
    const atomic_int *cancelled; /* NULL: cannot be */
};
int chat_encode(const struct tokenizer *t, const struct chat_message *messages, size_t n_messages,
                const struct chat_options *options, struct token_array *ids,
                enum chat_position *ret_position, struct error *err);

/* The order of roles alone, and what the vocabulary has. 0, -EINVAL */
int chat_check(const struct tokenizer *t, const struct chat_message *messages, size_t n_messages,
               const struct chat_options *options, struct error *err);

/* As tokenizer_ids_least(), of all messages. */
size_t chat_ids_least(const struct tokenizer *t, const struct chat_message *messages,
                      size_t n_messages);

/* Where ids that once came from here end, wherever they were cut. */
enum chat_position chat_position_find(const struct tokenizer *t, const uint32_t *ids, size_t n);
