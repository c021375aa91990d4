/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Any bytes over the beginning of a session's record, and of the engine's part of it: as they are,
 * and with the check values of the head and of the slots put right, which no fuzzer would find.
 * What opens has facts within their bounds and text with an end; its state and owner are read or
 * refused, and what is committed then is what is read.
 */

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "daemon/kept.h"
#include "daemon/session-record.h"
#include "engine/engine.h"
#include "engine/model-config.h"

#undef NDEBUG
#include <assert.h>

/* struct page of session-record.c */
#define HEAD_CHECK_AT (96u + ALIGN_UP(LLM_LABEL_BYTES_MAX, 8u))
#define STATE_SEQUENCE_AT (HEAD_CHECK_AT + 8u)
#define STATE_AT (STATE_SEQUENCE_AT + 16u)
#define STATE_BYTES 40u
#define OWNER_AT (STATE_AT + 2 * (STATE_BYTES + 8))
#define OWNER_BYTES 272u

#define PAGE_BYTES 4096u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static const uint8_t model[SAVED_MODEL_BYTES] = {1, 2, 3};
static const struct model_config config = {.context_max = 100, .n_layers_kv = 2, .vocab_size = 64};

static void put_slot_right(uint8_t *page, size_t sequence_at, size_t slots_at, size_t size)
{
    uint64_t sequence, check;
    uint8_t *slot;

    memcpy(&sequence, page + sequence_at, sizeof(sequence));
    slot = page + slots_at + (sequence & 1) * (size + 8);
    check = kept_check(sequence, slot, size);
    memcpy(slot + size, &check, sizeof(check));
}

static void put_right(int fd)
{
    uint8_t page[PAGE_BYTES];
    uint64_t check;

    assert(pread(fd, page, sizeof(page), 0) == (ssize_t)sizeof(page));
    check = kept_check(0, page, HEAD_CHECK_AT);
    memcpy(page + HEAD_CHECK_AT, &check, sizeof(check));
    put_slot_right(page, STATE_SEQUENCE_AT, STATE_AT, STATE_BYTES);
    put_slot_right(page, STATE_SEQUENCE_AT + 8, OWNER_AT, OWNER_BYTES);
    assert(pwrite(fd, page, sizeof(page), 0) == (ssize_t)sizeof(page));
}

static void use(struct session_record *r)
{
    const struct session_facts *facts = session_record_facts(r);
    const struct session_state after = {.n_tokens = 1, .position = CHAT_START, .last_request = 9};
    struct session_state state;
    struct owner_name owner;

    assert(facts->id > 0 && facts->context > 0 && facts->context <= config.context_max);
    assert(memchr(facts->label, 0, sizeof(facts->label)) && facts->class <= CLASS_IDLE);
    if (session_record_state(r, &state) == 0)
        assert(state.n_tokens <= facts->context && state.position < CHAT_N_POSITIONS);
    if (session_record_owner(r, &owner) == 0)
        assert(owner.kind <= OWNER_NAME && memchr(owner.name, 0, sizeof(owner.name)));
    (void)session_record_has_engine(r);
    (void)session_record_closed(r);
    session_record_commit(r, &after);
    assert(session_record_state(r, &state) == 0 && state.last_request == 9);
    assert(session_record_clear_memory(r) == 0);
}

static void try(const uint8_t *data, size_t n, bool right)
{
    const struct session_facts facts = {.id = 7, .uid = 1000, .context = 64, .label = "fuzz"};
    const struct owner_name owner = {.kind = OWNER_NAME, .name = "bus :1.7"};
    struct session_facts made = facts;
    struct session_record *r;
    struct error err = {{0}};
    int fd;

    memcpy(made.model, model, sizeof(model));
    assert(session_record_new(&r, &made, &owner, session_memory_bytes(&config, 64)) == 0);
    session_record_commit(r, &(struct session_state){.n_tokens = 3, .position = CHAT_START});
    fd = dup(session_record_fd(r));
    assert(fd >= 0);
    session_record_free(r);
    n = MIN(n, (size_t)PAGE_BYTES);
    assert(pwrite(fd, data, n, 0) == (ssize_t)n);
    if (right)
        put_right(fd);
    if (session_record_open(&r, fd, model, &config, &err) < 0) {
        assert(err.text[0] && !strchr(err.text, '\n'));
        return;
    }
    use(r);
    session_record_free(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    try(data, n, false);
    try(data, n, true);
    return 0;
}
