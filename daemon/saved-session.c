/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/saved-session.h"

#include <endian.h>
#include <errno.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "engine/model-file.h"

#define MAGIC "llmd-session"
#define MAGIC_BYTES 12u
#define VERSION 1u
#define HASH_BYTES 32u

/* All of it little-endian, and the size of each field is a multiple of its alignment. */
struct header {
    char magic[MAGIC_BYTES];
    uint32_t version;
    uint8_t model[SAVED_MODEL_BYTES];
    uint32_t position, has_tail, tail, n_tokens;
};
_Static_assert(sizeof(struct header) == 64, "the file's layout");

void saved_session_done(struct saved_session *s)
{
    if (s->tokens)
        explicit_bzero(s->tokens, s->n_tokens * sizeof(s->tokens[0]));
    free(s->tokens);
    *s = (struct saved_session){0};
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int saved_session_model(const struct model_file *f, uint8_t ret[SAVED_MODEL_BYTES])
{
    const char *text = model_file_metadata(f, "llmd.header_sha256");
    uint8_t bytes[SAVED_MODEL_BYTES];

    if (!text || strlen(text) != 2 * SAVED_MODEL_BYTES)
        return -EINVAL;
    for (size_t i = 0; i < SAVED_MODEL_BYTES; i++) {
        int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);

        if (high < 0 || low < 0)
            return -EINVAL;
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    memcpy(ret, bytes, sizeof(bytes));
    return 0;
}

static int hash_of(const void *data, size_t n, uint8_t ret[HASH_BYTES])
{
    return EVP_Digest(data, n, ret, NULL, EVP_sha256(), NULL) == 1 ? 0 : -EIO;
}

int saved_session_write(struct buffer *out, const struct saved_session *s)
{
    struct header h = {
        .version = htole32(VERSION),
        .position = htole32((uint32_t)s->position),
        .has_tail = htole32(s->has_tail),
        .tail = htole32(s->has_tail ? s->tail : 0),
        .n_tokens = htole32(s->n_tokens),
    };
    size_t n, start = out->n;
    uint8_t hash[HASH_BYTES];
    int r;

    memcpy(h.magic, MAGIC, MAGIC_BYTES);
    memcpy(h.model, s->model, sizeof(h.model));
    if (ckd_mul(&n, (size_t)s->n_tokens, sizeof(uint32_t)) ||
        ckd_add(&n, n, sizeof(h) + HASH_BYTES))
        return -ENOMEM;
    r = buffer_reserve(out, n);
    if (r < 0)
        return r;
    buffer_append(out, &h, sizeof(h)); /* there is room for all of it */
    for (uint32_t i = 0; i < s->n_tokens; i++)
        buffer_append(out, &(uint32_t){htole32(s->tokens[i])}, sizeof(uint32_t));
    r = hash_of(out->data + start, out->n - start, hash);
    if (r < 0) {
        out->n = start;
        return r;
    }
    buffer_append(out, hash, sizeof(hash));
    return 0;
}

static int damaged(struct error *err)
{
    return error_set(err, EPROTO, "the saved session is damaged");
}

int saved_session_read(struct saved_session *ret, const void *data, size_t n,
                       const uint8_t model[SAVED_MODEL_BYTES], uint32_t vocab_size,
                       uint32_t tokens_max, struct error *err)
{
    struct saved_session s = {0};
    uint8_t hash[HASH_BYTES];
    uint32_t position, has_tail;
    struct header h;
    size_t expected;

    if (n < sizeof(h) + HASH_BYTES || memcmp(data, MAGIC, MAGIC_BYTES) != 0)
        return error_set(err, EPROTO, "this is no saved session");
    memcpy(&h, data, sizeof(h));
    if (le32toh(h.version) != VERSION)
        return error_set(err, EPROTO, "the saved session has version %u, and this program reads %u",
                         le32toh(h.version), VERSION);
    s.n_tokens = le32toh(h.n_tokens);
    if (ckd_mul(&expected, (size_t)s.n_tokens, sizeof(uint32_t)) ||
        ckd_add(&expected, expected, sizeof(h) + HASH_BYTES) || n != expected)
        return damaged(err);
    if (hash_of(data, n - HASH_BYTES, hash) < 0)
        return error_set(err, EIO, "libcrypto: SHA-256 failed");
    if (memcmp(hash, (const char *)data + n - HASH_BYTES, HASH_BYTES) != 0)
        return damaged(err);
    if (memcmp(h.model, model, SAVED_MODEL_BYTES) != 0)
        return error_set(err, EPROTO, "the saved session belongs to another model");

    /* Whoever wrote a hash that fits may still have written nonsense before it. */
    position = le32toh(h.position);
    has_tail = le32toh(h.has_tail);
    s.tail = le32toh(h.tail);
    if (position >= CHAT_N_POSITIONS || has_tail > 1 || (has_tail ? s.tail >= vocab_size : s.tail))
        return damaged(err);
    if ((position == CHAT_START) != (s.n_tokens == 0) || (has_tail && s.n_tokens == 0))
        return damaged(err);
    s.position = (enum chat_position)position;
    s.has_tail = has_tail;
    memcpy(s.model, h.model, sizeof(s.model));
    if (s.n_tokens > tokens_max)
        return error_set(err, EMSGSIZE, "the saved session has %u tokens, and here is room for %u",
                         s.n_tokens, tokens_max);
    s.tokens = calloc(MAX(s.n_tokens, 1u), sizeof(s.tokens[0]));
    if (!s.tokens)
        return error_set(err, ENOMEM, "out of memory");
    for (uint32_t i = 0; i < s.n_tokens; i++) {
        uint32_t token;

        memcpy(&token, (const char *)data + sizeof(h) + i * sizeof(token), sizeof(token));
        s.tokens[i] = le32toh(token);
        if (s.tokens[i] >= vocab_size) {
            saved_session_done(&s);
            return damaged(err);
        }
    }
    *ret = s;
    return 0;
}
