/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <errno.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "daemon/saved-session.h"

#undef NDEBUG
#include <assert.h>

#define VOCAB 1000u

static const uint8_t model[SAVED_MODEL_BYTES] = {1, 2, 3};

static void write_some(struct buffer *out, const struct saved_session *s)
{
    out->n = 0;
    assert(saved_session_write(out, s) == 0);
}

/* Makes the hash at the end fit what stands before it, as an attacker would. */
static void sign(struct buffer *b)
{
    assert(EVP_Digest(b->data, b->n - 32, (unsigned char *)b->data + b->n - 32, NULL, EVP_sha256(),
                      NULL) == 1);
}

static void refuse(const struct buffer *b, int code, const char *because)
{
    struct saved_session s = {0};
    struct error err = {{0}};

    assert(saved_session_read(&s, b->data, b->n, model, VOCAB, 100, &err) == code);
    if (!strstr(err.text, because)) {
        fprintf(stderr, "expected '%s', got '%s'\n", because, err.text);
        assert(!"another message");
    }
    assert(!s.tokens);
}

/* One little-endian field is changed and the rest kept good. */
static void refuse_field(struct buffer *b, size_t offset, uint32_t value, const char *because)
{
    uint8_t old[4], bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16),
                                (uint8_t)(value >> 24)};

    memcpy(old, b->data + offset, 4);
    memcpy(b->data + offset, bytes, 4);
    sign(b);
    refuse(b, -EPROTO, because);
    memcpy(b->data + offset, old, 4);
    sign(b);
}

int main(void)
{
    uint32_t tokens[] = {2, 0, VOCAB - 1, 77};
    struct saved_session s = {.position = CHAT_OPEN_MODEL,
                              .has_tail = true,
                              .tail = 55,
                              .n_tokens = ARRAY_SIZE(tokens),
                              .tokens = tokens};
    struct saved_session got;
    struct buffer b = {0}, cut;
    struct error err;

    memcpy(s.model, model, sizeof(model));
    write_some(&b, &s);
    assert(b.n == 64 + sizeof(tokens) + 32);
    assert(memcmp(b.data, "llmd-session\x01\0\0\0\x01\x02\x03\0", 20) == 0);
    assert(memcmp(b.data + 48, "\x04\0\0\0\x01\0\0\0\x37\0\0\0\x04\0\0\0\x02\0\0\0", 20) == 0);
    assert(saved_session_read(&got, b.data, b.n, model, VOCAB, 4, &err) == 0);
    assert(got.position == s.position && got.has_tail && got.tail == 55 && got.n_tokens == 4);
    assert(memcmp(got.tokens, tokens, sizeof(tokens)) == 0);
    saved_session_done(&got);

    /* Every byte matters, and so does every length. */
    for (size_t i = 0; i < b.n; i++) {
        b.data[i] ^= 0x40;
        assert(saved_session_read(&got, b.data, b.n, model, VOCAB, 100, &err) == -EPROTO);
        b.data[i] ^= 0x40;
        cut = b;
        cut.n = i;
        assert(saved_session_read(&got, cut.data, cut.n, model, VOCAB, 100, &err) == -EPROTO);
    }
    assert(buffer_append(&b, "x", 1) == 0);
    refuse(&b, -EPROTO, "damaged");
    b.n--;

    refuse_field(&b, 12, 2, "version 2");
    refuse_field(&b, 16, 9, "another model");
    refuse_field(&b, 48, CHAT_N_POSITIONS, "damaged");
    refuse_field(&b, 48, CHAT_START, "damaged");
    refuse_field(&b, 52, 2, "damaged");
    refuse_field(&b, 52, 0, "damaged"); /* a tail that is not there */
    refuse_field(&b, 56, VOCAB, "damaged");
    refuse_field(&b, 60, 3, "damaged");
    refuse_field(&b, 60, 0x40000000, "damaged");
    refuse_field(&b, 64 + 4, VOCAB, "damaged");
    assert(saved_session_read(&got, b.data, b.n, model, VOCAB, 3, &err) == -EMSGSIZE);
    assert(strstr(err.text, "4 tokens"));
    assert(saved_session_read(&got, "", 0, model, VOCAB, 3, &err) == -EPROTO);

    /* An empty session is a session. */
    s = (struct saved_session){.position = CHAT_START};
    memcpy(s.model, model, sizeof(model));
    write_some(&b, &s);
    assert(saved_session_read(&got, b.data, b.n, model, VOCAB, 0, &err) == 0);
    assert(got.n_tokens == 0 && !got.has_tail && got.position == CHAT_START);
    saved_session_done(&got);
    refuse_field(&b, 48, CHAT_AFTER_USER, "damaged");

    buffer_done(&b);
    return 0;
}
