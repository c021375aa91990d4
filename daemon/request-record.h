/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * request_record: a request with a stream in memory that outlives the process (a memfd, which the
 * service manager holds too): what was asked, how far it is, and the stream's bytes.
 *
 * The file's own position, which the kernel keeps with the open file and moves with what sendfile()
 * has sent, says how much of the log the client has been given: that is true at any instruction.
 *
 * What was asked is written once. The rest changes by request_record_commit(), whole or not at all.
 * Foreign bytes when opened. Prompt text is in here: the memory is excluded from core dumps.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "engine/chat.h"
#include "engine/generation.h"

struct job_request;
struct request_record;

struct request_facts {
    uint64_t id, session;
    uid_t uid;
    uint32_t n_ctx; /* of the session: no more tokens are ever sampled */
};

/* The conversation that the request found, as session_state has it. */
struct request_before {
    uint32_t n_tokens;
    enum chat_position position;
    bool has_tail;
    uint32_t tail;
};

enum request_phase {
    REQUEST_RUNS,   /* or waits */
    REQUEST_DONE,   /* came to its end; the session goes on after it */
    REQUEST_UNDONE, /* failed or was stopped: the session is as it was before */
};

struct request_commit {
    uint32_t n_sampled;                 /* of those that request_record_add_sampled() was given */
    uint64_t log_bytes;                 /* of those that request_record_append() was given */
    struct generation_state generation; /* after them; meaningful when n_sampled > 0 */
    enum request_phase phase;
    struct request_before after;   /* REQUEST_DONE */
    struct generation_usage usage; /* when it does not run */
};

/* ---- made, by the loop ---- */

/* Nothing is committed yet. 0, -errno (-ENOSPC, -ENOMEM: there is no memory for it) */
int request_record_new(struct request_record **ret, const struct request_facts *facts,
                       const struct request_before *before, const struct job_request *request);
/* Takes fd in every case. 0; -EBADMSG: not sound, or another version's; -ENOMEM */
int request_record_open(struct request_record **ret, int fd, struct error *err);
struct request_record *request_record_free(struct request_record *r);
void request_record_freep(struct request_record **r);

const struct request_facts *request_record_facts(const struct request_record *r);
int request_record_fd(const struct request_record *r); /* borrowed */

/* What was asked; *ret is the caller's to free. 0, -EBADMSG, -ENOMEM */
int request_record_request(const struct request_record *r, struct job_request *ret,
                           struct error *err);
const struct request_before *request_record_before(const struct request_record *r);

/* ---- as it goes on; one thread at a time ---- */

/* The k-th token sampled; counts when committed. */
void request_record_add_sampled(struct request_record *r, uint32_t k, uint32_t id);
/* Bytes of the stream at offset; count when committed. 0, -errno (-ENOSPC, -ENOMEM, -EFBIG) */
int request_record_append(struct request_record *r, uint64_t offset, const void *data, size_t n);
/* Of one that has ended, what was asked is forgotten. */
void request_record_commit(struct request_record *r, const struct request_commit *c);
/*
 * Of one that was opened; *ret_sampled [n_sampled] stays the record's. False: there was none, and
 * *ret is all zeros
 */
bool request_record_last_commit(const struct request_record *r, struct request_commit *ret,
                                const uint32_t **ret_sampled);

/* Single words, each thread as it likes. */
void request_record_set_stopped(struct request_record *r, int why); /* enum job_stop */
int request_record_stopped(const struct request_record *r);
void request_record_set_replied(
    struct request_record *r); /* the caller has its end of the stream */
bool request_record_replied(const struct request_record *r);

/*
 * At work: a thread computes for it now. One that was so when its process died, time and again
 * without getting on, may be the reason.
 */
void request_record_set_working(struct request_record *r, bool working);
/* After a restart: how often in a row that has been so; progress: any number that grows. */
uint32_t request_record_count_recovery(struct request_record *r, uint64_t progress);

/* ---- the stream's bytes, loop ---- */

/* Of the log, committed before it was opened, or since then by request_record_end(). */
uint64_t request_record_log_bytes(const struct request_record *r);
/*
 * Of one that was opened, and that nobody goes on with: the last record, in the format of the
 * request; it is then REQUEST_UNDONE, if it ran. 0, -errno
 */
struct record;
int request_record_end(struct request_record *r, const struct record *last);
/*
 * Of one that could not be opened, a new one that stands for it: its log is the rest of a line of
 * which the client has the beginning, and the last record. fd stays the caller's. 0; -EBADMSG:
 * there is no telling what the client has; -errno
 */
int request_record_salvage(struct request_record **ret, int fd, const struct record *last);

/* Of the log, that the client has been given. */
uint64_t request_record_sent(const struct request_record *r);
/*
 * Sends what lies between what is sent and `end` as far as the socket takes it. 0: all of it,
 * -EAGAIN, -EPIPE, -errno
 */
int request_record_send(struct request_record *r, int socket, uint64_t end);
/* Copies from the log: for tests, which look at it and send nothing. 0, -errno */
int request_record_read(const struct request_record *r, uint64_t offset, void *data, size_t n);
