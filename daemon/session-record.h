/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * session_record: a session in memory that outlives the process, because the service manager holds
 * it too: a memfd whose size is sealed. It has what never changes (with a check value), the
 * session's state and its owner (each in two slots, see kept.h), and the engine's session memory.
 *
 * Foreign bytes when opened: another version, or a fault, may have written them.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "daemon/saved-session.h"
#include "engine/chat.h"
#include "engine/scheduler.h"
#include "ipc/names.h"

struct session_record;

struct session_facts {
    uint64_t id;
    uid_t uid;
    uint32_t context; /* as session_new() */
    enum scheduler_class class;
    bool linger;
    uint64_t created_usec; /* CLOCK_REALTIME */
    uint8_t model[SAVED_MODEL_BYTES];
    char label[LLM_LABEL_BYTES_MAX + 1];
};

/* Whom the session ends with. Changed by the loop alone. */
enum owner_kind {
    OWNER_NONE, /* lingers, or the owner went */
    OWNER_CONNECTION,
    OWNER_NAME,
};

struct owner_name {
    enum owner_kind kind;
    uint64_t connection; /* OWNER_CONNECTION: "connection-ID" in the fd store */
    char name[256];      /* OWNER_NAME: unique name on the bus */
};

/* Between two requests. Changed by the engine thread alone, once the engine thread has it. */
struct session_state {
    uint32_t n_tokens; /* the engine's, without the tail */
    enum chat_position position;
    bool has_tail;
    uint32_t tail;
    uint64_t last_request;                     /* that ended, and is part of this state; 0: none */
    uint64_t prompt_tokens, completion_tokens; /* totals */
};

/*
 * The state of a new session, which has no tokens, is not committed: a fork's record has none until
 * there is something in it. 0, -errno
 */
int session_record_new(struct session_record **ret, const struct session_facts *facts,
                       const struct owner_name *owner, size_t engine_bytes);

struct model_config;

/*
 * Takes fd in every case. c: of the model that `model` names.
 * 0; -EBADMSG: not sound, or another version's; -ESTALE: of another model; -errno
 */
int session_record_open(struct session_record **ret, int fd, const uint8_t model[SAVED_MODEL_BYTES],
                        const struct model_config *c, struct error *err);
struct session_record *session_record_free(struct session_record *r);
void session_record_freep(struct session_record **r);

const struct session_facts *
session_record_facts(const struct session_record *r);  /* a copy of ours */
int session_record_fd(const struct session_record *r); /* borrowed */
/* Once the service manager has it, a mapping is all that is needed here. */
void session_record_close_fd(struct session_record *r);

/*
 * The engine's part, page-aligned. has_engine: the engine has made a session of it; what lies there
 * without that is half a beginning, to be cleared. 0, -errno
 */
void *session_record_memory(const struct session_record *r);
void session_record_set_has_engine(struct session_record *r);
bool session_record_has_engine(const struct session_record *r);
int session_record_clear_memory(struct session_record *r); /* with its descriptor */

/*
 * The session is over for good, whatever else is in it. The service manager may not hear that it is
 * to be forgotten: then this is what the next process goes by.
 */
void session_record_set_closed(struct session_record *r);
bool session_record_closed(const struct session_record *r);

/* Whole or not at all, wherever the process is killed. */
void session_record_commit(struct session_record *r, const struct session_state *state);
/* 0; -ENODATA: never committed; -EBADMSG */
int session_record_state(const struct session_record *r, struct session_state *ret);

void session_record_set_owner(struct session_record *r, const struct owner_name *owner);
int session_record_owner(const struct session_record *r, struct owner_name *ret); /* 0, -EBADMSG */
