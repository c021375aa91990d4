/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Any bytes as a saved session, as they are and with the hash put right, which no fuzzer would
 * find: what is accepted is written again to the same bytes.
 */

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/saved-session.h"

#undef NDEBUG
#include <assert.h>

#define VOCAB 500u
#define TOKENS_MAX 64u
#define HASH_BYTES 32u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void try(const uint8_t *data, size_t n)
{
    static const uint8_t model[SAVED_MODEL_BYTES] = "this model";
    struct saved_session s;
    struct error err = {{0}};
    struct buffer again = {0};

    if (saved_session_read(&s, data, n, model, VOCAB, TOKENS_MAX, &err) < 0) {
        assert(err.text[0] && !strchr(err.text, '\n'));
        return;
    }
    assert(s.n_tokens <= TOKENS_MAX && (!s.has_tail || s.tail < VOCAB));
    for (uint32_t i = 0; i < s.n_tokens; i++)
        assert(s.tokens[i] < VOCAB);
    assert(saved_session_write(&again, &s) == 0);
    assert(again.n == n && memcmp(again.data, data, n) == 0);
    buffer_done(&again);
    saved_session_done(&s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    uint8_t *copy;

    try(data, n);
    if (n < HASH_BYTES)
        return 0;
    copy = malloc(n);
    assert(copy);
    memcpy(copy, data, n);
    assert(EVP_Digest(copy, n - HASH_BYTES, copy + n - HASH_BYTES, NULL, EVP_sha256(), NULL) == 1);
    try(copy, n);
    free(copy);
    return 0;
}
