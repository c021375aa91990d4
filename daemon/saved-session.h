/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * saved_session: a session as a file: its tokens and where among the turns they end. K and V are
 * not in it: they are computed again, to the same bits. Little-endian throughout:
 *
 *     offset size
 *     0      12  "llmd-session"
 *     12     4   version, 1
 *     16     32  SHA-256 of the model file's header, which has those of all its tensors
 *     48     4   enum chat_position
 *     52     4   1: the next token is there and not yet evaluated, else 0
 *     56     4   that token, else 0
 *     60     4   n: tokens
 *     64     4n  the tokens
 *     64+4n  32  SHA-256 of all before
 *
 * Another model's vocabulary would give the tokens another meaning, so the file belongs to one
 * model file. Bytes in, structs out; foreign bytes.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "engine/chat.h"
#include "ipc/buffer.h"

#define SAVED_MODEL_BYTES 32

struct saved_session {
    uint8_t model[SAVED_MODEL_BYTES];
    enum chat_position position;
    bool has_tail;
    uint32_t tail;
    uint32_t n_tokens;
    uint32_t *tokens; /* [n_tokens]; when written, borrowed; when read, owned */
};
void saved_session_done(struct saved_session *s);

struct model_file;

/* What the format knows a model file by. 0, -EINVAL: it has none */
int saved_session_model(const struct model_file *f, uint8_t ret[SAVED_MODEL_BYTES]);

int saved_session_write(struct buffer *out, const struct saved_session *s); /* 0, -ENOMEM, -EIO */

/*
 * vocab_size bounds the tokens. 0, -EPROTO: not such a file, a damaged one, or of another model;
 * -EMSGSIZE: more than tokens_max, -ENOMEM, -EIO
 */
int saved_session_read(struct saved_session *ret, const void *data, size_t n,
                       const uint8_t model[SAVED_MODEL_BYTES], uint32_t vocab_size,
                       uint32_t tokens_max, struct error *err);
