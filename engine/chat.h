/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * chat: messages to ids, by Gemma's turn format built at the level of tokens (gemma3n.md §7), so
 * that text which looks like a control token stays text.
 */

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
 * Appends the messages. continuing: the session already holds earlier turns, the last of which is
 * the model's and ended with <end_of_turn> (or was cut, then `open_turn` says that the end is still
 * missing): no <bos>, and what closes the model's turn comes first. generate: ends with
 * <start_of_turn>model\n.
 * 0, -EINVAL: roles must alternate, user first; the vocabulary has no turn pieces, -ENOMEM
 */
struct chat_options {
    bool continuing;
    bool open_turn;
    bool generate;
};
int chat_encode(const struct tokenizer *t, const struct chat_message *messages, size_t n_messages,
                const struct chat_options *options, struct token_array *ids, struct error *err);
