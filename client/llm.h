/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * libllm: talking to llmd from C. A thin layer over sd-bus: connect, make a session, generate, read
 * the answer as it comes. It needs libsystemd and nothing else.
 *
 *     struct llm_connection *c;
 *     struct llm_session *s;
 *     struct llm_options *o;
 *     struct llm_error err;
 *
 *     if (llm_connect(&c, NULL, &err) < 0 || llm_session_new(&s, c, NULL, &err) < 0 ||
 *         llm_options_new(&o) < 0 || llm_options_set_string(o, "prompt", "Why is the sky blue?") <
 * 0 || llm_session_run(s, o, print_event, NULL, &err) < 0) fprintf(stderr, "%s\n", err.message);
 *
 * Functions return 0 or a positive answer, or a negative errno; where they take a struct llm_error
 * (which may be NULL), it then holds the name and a line for people. A connection and what hangs on
 * it belong to one thread at a time; streams are independent of it and of each other.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLM_EXPORT __attribute__((visibility("default")))

struct llm_connection;
struct llm_session;
struct llm_options;
struct llm_stream;

struct llm_error {
    char name[96]; /* such as "org.llmd.Llm1.Error.Busy"; "" for what failed on this side */
    char message[512];
};

/* ---- connection ---- */

/* Where the private daemon of this user listens; malloc'ed. */
LLM_EXPORT int llm_default_socket(char **ret, struct llm_error *err);

/*
 * Connects to the daemon listening at the path; NULL: llm_default_socket(). The daemon must be
 * this user's or root's. -ENOENT, -ECONNREFUSED, -ECONNRESET: nobody serves there
 */
LLM_EXPORT int llm_connect(struct llm_connection **ret, const char *socket_path,
                           struct llm_error *err);

/* Ends the sessions too. Sessions' and options' structs stay to be freed. NULL is allowed. */
LLM_EXPORT void llm_disconnect(struct llm_connection *c);

struct llm_status {
    char version[32], state[32], model[256], backend[256];
    uint32_t sessions;
    uint64_t kv_bytes_used, kv_bytes_max;
};
LLM_EXPORT int llm_get_status(struct llm_connection *c, struct llm_status *ret,
                              struct llm_error *err);

/* ---- options: named as in docs/dbus-api.md; the daemon checks names, types and bounds ---- */

LLM_EXPORT int llm_options_new(struct llm_options **ret);
LLM_EXPORT void llm_options_free(struct llm_options *o);

/* Each 0 or -ENOMEM; values are copied. */
LLM_EXPORT int llm_options_set_string(struct llm_options *o, const char *name, const char *value);
LLM_EXPORT int llm_options_set_double(struct llm_options *o, const char *name, double value);
LLM_EXPORT int llm_options_set_uint32(struct llm_options *o, const char *name, uint32_t value);
LLM_EXPORT int llm_options_set_uint64(struct llm_options *o, const char *name, uint64_t value);
LLM_EXPORT int llm_options_set_bool(struct llm_options *o, const char *name, bool value);

/* Adds to a list ("stop"). */
LLM_EXPORT int llm_options_add_string(struct llm_options *o, const char *name, const char *value);

/* Adds to "messages". */
LLM_EXPORT int llm_options_add_message(struct llm_options *o, const char *role, const char *text);

/* Bytes in a sealed memfd ("prompt-fd"): any size and any bytes. Also -errno of memfd_create() */
LLM_EXPORT int llm_options_set_memory(struct llm_options *o, const char *name, const void *data,
                                      size_t n);

/* ---- session ---- */

/* options: of CreateSession, or NULL */
LLM_EXPORT int llm_session_new(struct llm_session **ret, struct llm_connection *c,
                               const struct llm_options *options, struct llm_error *err);

/* Asks the daemon to close it, without waiting for that, and frees it. NULL is allowed. */
LLM_EXPORT void llm_session_free(struct llm_session *s);

/* Starts a request. *ret_fd: its stream, blocking; close it at any time to cancel. */
LLM_EXPORT int llm_session_generate(struct llm_session *s, const struct llm_options *options,
                                    int *ret_fd, uint64_t *ret_request, struct llm_error *err);

/* Ends the request that runs; its stream then ends with the reason "cancelled". */
LLM_EXPORT int llm_session_cancel(struct llm_session *s, struct llm_error *err);

/* ---- stream ---- */

enum llm_event_type {
    LLM_DELTA,
    LLM_USAGE,
    LLM_END,
    LLM_ERROR,
};

struct llm_event {
    enum llm_event_type type;
    const char *text; /* delta: [n_text] UTF-8, may hold NUL */
    size_t n_text;
    bool has_token; /* delta: id, logprob and entropy are meant */
    uint32_t id;
    double logprob, entropy;
    uint32_t prompt_tokens, completion_tokens, cached_tokens; /* usage */
    const char *reason;                                       /* end */
    const char *name, *message;                               /* error */
};

/* Takes fd. */
LLM_EXPORT int llm_stream_new(struct llm_stream **ret, int fd);
LLM_EXPORT void llm_stream_free(struct llm_stream *s);
LLM_EXPORT int llm_stream_fd(const struct llm_stream *s);

/*
 * 1: *ret, valid until the next call; 0: the stream is over, after its end or error; -EAGAIN: fd is
 * non-blocking and has nothing; -EINTR: a signal came; -EPIPE: cut without an end; -EBADMSG: not a
 * stream of records; -errno
 */
LLM_EXPORT int llm_stream_next(struct llm_stream *s, struct llm_event *ret);

/*
 * Shows the stream's bytes, as they are read and before they are understood. A negative return is
 * llm_stream_next()'s. To pass records on without taking them apart.
 */
typedef int (*llm_tap)(const void *data, size_t n, void *userdata);
LLM_EXPORT void llm_stream_tap(struct llm_stream *s, llm_tap tap, void *userdata);

/* A negative return ends the request. */
typedef int (*llm_callback)(const struct llm_event *event, void *userdata);

/*
 * Generates and hands each event to the callback. 0: it ended well; the callback's negative
 * return; the errno of an error event, which the callback has seen too
 */
LLM_EXPORT int llm_session_run(struct llm_session *s, const struct llm_options *options,
                               llm_callback callback, void *userdata, struct llm_error *err);

#ifdef __cplusplus
}
#endif
