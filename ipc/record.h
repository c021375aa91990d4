/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * record: what travels through a stream, one JSON object a line:
 *
 *     {"type":"queued","position":2,"estimated_usec":1500000}
 *     {"type":"progress","done":512,"total":4000}
 *     {"type":"delta","text":"Hel"}
 *     {"type":"delta","text":"lo","id":523,"logprob":-0.25,"entropy":1.5,
 *      "top":[{"id":523,"logprob":-0.25,"text":"lo"},...]}          (on one line)
 *     {"type":"usage","prompt_tokens":12,"completion_tokens":2,"cached_tokens":0}
 *     {"type":"end","reason":"stop"}
 *     {"type":"error","name":"org.llmd.Llm1.Error.ContextFull","message":"...",
 *      "requested":9000,"available":4096}
 *
 * `end` or `error` is the last. Readers skip unknown members and unknown types, so both may be
 * added without a new version. Bytes in, structs out; no descriptor, no locale, and no JSON
 * library, because every program that links libllm would have to carry it (the tests and the fuzzer
 * hold this parser to json-c's reading).
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ipc/buffer.h"

#define RECORD_BYTES_MAX (1u << 20) /* a line longer than this is an error */
#define RECORD_TOP_MAX 64

enum record_type {
    RECORD_UNKNOWN, /* of a later version: to be skipped */
    RECORD_DELTA,
    RECORD_USAGE,
    RECORD_END,
    RECORD_ERROR,
    RECORD_QUEUED,
    RECORD_PROGRESS,
};

struct record_top {
    uint32_t id;
    double logprob;
    const char *text; /* [n_text] */
    size_t n_text;
};

struct record {
    enum record_type type;
    const char *text; /* delta: [n_text] UTF-8 in whole characters, may hold NUL and be empty */
    size_t n_text;
    bool has_token; /* delta: the four below are meant */
    uint32_t id;
    double logprob, entropy; /* nats */
    size_t n_top;
    struct record_top top[RECORD_TOP_MAX];
    uint32_t prompt_tokens, completion_tokens, cached_tokens; /* usage */
    const char *reason;            /* end: "stop", "length", "cancelled", "shutdown", ... */
    const char *name, *message;    /* error: NUL-terminated; no NUL within */
    bool has_sizes;                /* error: the two below are meant */
    uint64_t requested, available; /* tokens */
    uint32_t position;             /* queued: 1 is next */
    uint64_t estimated_usec;       /* queued: until it starts, from now; 0: not known */
    uint64_t done, total;          /* progress: tokens of the prompt */
};

/*
 * Appends the record as one line. Strings must be UTF-8 (what is not becomes U+FFFD); a logprob
 * that is not finite is written as null and read back as NaN. 0, -ENOMEM
 */
int record_write(struct buffer *out, const struct record *record);

/*
 * Reads one line, without its newline, decoding strings in place: the record points into line.
 * 0, -EBADMSG: not such an object, or a known member has a wrong type, is there twice or missing
 */
int record_parse(char *line, size_t n, struct record *ret);

/*
 * record_reader: a stream of bytes cut into records. Zero-initialised; record_reader_done() at the
 * end. One thread at a time.
 */
struct record_reader {
    struct buffer in;
    size_t used; /* bytes of `in` that records already given away occupy */
    size_t scanned;
};

void record_reader_done(struct record_reader *r);

/* Adds bytes as they came; records from record_reader_next() are then no longer valid. 0, -ENOMEM
 */
int record_reader_feed(struct record_reader *r, const void *data, size_t n);

/* 1: *ret, valid until the next feed; 0: more bytes are needed; -EBADMSG: not such a stream */
int record_reader_next(struct record_reader *r, struct record *ret);

/* Whether the bytes so far end within a record: at the end of a stream that one was cut. */
bool record_reader_partial(const struct record_reader *r);
