/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * libllm: talking to llmd from C. A thin layer over sd-bus: connect, make a session, generate, read
 * the answer as it comes. It needs libsystemd and nothing else. examples/ask.c is a whole
 * program, libllm(3) the manual.
 *
 * Functions return 0 or a positive answer, or a negative errno; where they take a struct llm_error
 * (which may be NULL), it then holds the name and a line for people. Outputs (ret_x) are written on
 * success only. Calls of the daemon wait for its answer, which is prompt: tokens are never waited
 * for but in llm_stream_next() and llm_session_run().
 *
 * When the daemon is started again: the next call on the connection finds it out, waits some seconds
 * for its successor, connects to it (not to another scope), takes the connection's sessions back
 * and repeats itself where it had not been answered. Requests and their streams go on meanwhile by
 * themselves. What that means for a method that may have been carried out just before:
 *
 *   generate, append  are carried out once: without its answer the first one has left no trace
 *   rewind, cancel, measure, status  come to the same when they are done twice
 *   close     done or not, it is closed
 *   new, fork  may leave one session that nobody has; the daemon ends it after 10 seconds, or, one
 *             that lingers, after its time
 *   save, restore  are done again from where the file stood; what was a pipe gives -ENOTCONN
 *
 * -ESTALE (SessionLost) of a session: the new daemon does not have it; make another one. -ENOTCONN:
 * nobody came, or the daemon ended over this call again and again; the next call tries anew.
 *
 * Threads: there is no global state. A connection and the sessions made on it belong to one thread
 * at a time. Options may be read by several threads while none changes them. A stream belongs to
 * one thread at a time, and is independent of its connection and of other streams. After fork() a
 * child uses nothing of its parent's but streams' descriptors.
 *
 * Later versions add fields in the place of the reserved ones (zero until then), event types, end
 * reasons and error names: programs skip those they do not know.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LLM_EXPORT __attribute__((visibility("default")))

struct sd_bus; /* of <systemd/sd-bus.h> */

struct llm_connection;
struct llm_session;
struct llm_options;
struct llm_stream;

struct llm_error {
    char name[96]; /* such as "org.llmd.Llm1.Error.Busy"; "" for what failed on this side */
    char message[512];
};

/*
 * The positive errno for a name as errors and error events have it, the one that functions return
 * negative: EBUSY for "org.llmd.Llm1.Error.Busy". EIO for names that this version does not know.
 */
LLM_EXPORT int llm_error_number(const char *name);

/* ---- connection ---- */

enum llm_scope {
    LLM_SCOPE_ANY,     /* the first of the three that answers */
    LLM_SCOPE_SYSTEM,  /* /run/llmd/llmd.socket, else the system bus, which may start the service */
    LLM_SCOPE_USER,    /* $XDG_RUNTIME_DIR/llmd/llmd.socket, else the session bus, likewise */
    LLM_SCOPE_PRIVATE, /* llm_default_socket() */
};

/*
 * Connects to the daemon of that scope. It must be run by root, by this user, or, for the system
 * scope, by the owner of /run/llmd.
 *
 * -ENOENT, -ECONNREFUSED, -ECONNRESET: nobody serves there. A bus that is not there, or that has
 *     neither an owner nor an activation file for the name, is nobody
 * -EPERM    whoever listens there is not to be trusted
 */
LLM_EXPORT int llm_connect_scope(struct llm_connection **ret, enum llm_scope scope,
                                 struct llm_error *err);

/* The scope that answered; LLM_SCOPE_ANY for a socket that was named to llm_connect(). */
LLM_EXPORT enum llm_scope llm_connection_scope(const struct llm_connection *c);

/*
 * The connection itself, borrowed: for calls that this library has no function for. Valid until the
 * next call of this library on the connection, which may have to connect again: ask anew, and where
 * it is another one, match rules, Subscribe and the event loop are to be set up anew. Whoever
 * notices the loss first (by an event loop, or a call of sd-bus) calls llm_get_status().
 */
LLM_EXPORT struct sd_bus *llm_connection_bus(struct llm_connection *c);

/* Whom to address there: the bus name, or NULL on a socket. Static. */
LLM_EXPORT const char *llm_connection_destination(const struct llm_connection *c);

/* Where the private daemon of this user listens; malloc'ed. */
LLM_EXPORT int llm_default_socket(char **ret, struct llm_error *err);

/*
 * Connects to the daemon listening at the path; NULL: llm_default_socket(). The daemon must be
 * this user's or root's. Errors as of llm_connect_scope()
 */
LLM_EXPORT int llm_connect(struct llm_connection **ret, const char *socket_path,
                           struct llm_error *err);

/* Ends the sessions too, but lingering ones. Sessions' and options' structs stay to be freed. NULL
 * is allowed. */
LLM_EXPORT void llm_disconnect(struct llm_connection *c);

/* Texts too long for their field are cut. */
struct llm_status {
    char version[32], state[32];
    char model[256]; /* the one loaded; "": none */
    char backend[256];
    uint32_t sessions;
    uint64_t kv_bytes_used, kv_bytes_max;
    char default_model[256];
    double load_progress; /* 0 to 1 */
    uint64_t reserved[8];
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

/* An object's path, such as llm_session_path()'s for "session". */
LLM_EXPORT int llm_options_set_object(struct llm_options *o, const char *name, const char *path);

/* Adds to a list ("stop"). */
LLM_EXPORT int llm_options_add_string(struct llm_options *o, const char *name, const char *value);

/* Adds to "messages". */
LLM_EXPORT int llm_options_add_message(struct llm_options *o, const char *role, const char *text);

/* Adds to "logit-bias". */
LLM_EXPORT int llm_options_add_logit_bias(struct llm_options *o, uint32_t token, double bias);

/* Bytes in a sealed memfd ("prompt-fd"): any size and any bytes. Also -errno of memfd_create() */
LLM_EXPORT int llm_options_set_memory(struct llm_options *o, const char *name, const void *data,
                                      size_t n);

/* ---- session ---- */

/* options: of CreateSession, or NULL */
LLM_EXPORT int llm_session_new(struct llm_session **ret, struct llm_connection *c,
                               const struct llm_options *options, struct llm_error *err);

/*
 * One of this user's that exists, wherever it was made. id_or_path: "7" or its object path
 * -EINVAL  neither of them; -ESRCH: there is none, or it is another user's
 */
LLM_EXPORT int llm_session_open(struct llm_session **ret, struct llm_connection *c,
                                const char *id_or_path, struct llm_error *err);

/* Its object path; valid as long as it. */
LLM_EXPORT const char *llm_session_path(const struct llm_session *s);

/* A copy that goes its own way. options: of Fork, or NULL. -EBUSY: while a request runs */
LLM_EXPORT int llm_session_fork(struct llm_session **ret, struct llm_session *s,
                                const struct llm_options *options, struct llm_error *err);

/* Forgets all but the first so many tokens. -EINVAL: it has fewer; -EBUSY: a request runs */
LLM_EXPORT int llm_session_rewind(struct llm_session *s, uint32_t tokens, struct llm_error *err);

/* Writes what it holds to the descriptor of a file; it stays the caller's. -EBUSY: a request runs
 */
LLM_EXPORT int llm_session_save(struct llm_session *s, int fd, struct llm_error *err);

/* Reads that into an empty session. -EPROTO: not such a file, of another model, or not empty */
LLM_EXPORT int llm_session_restore(struct llm_session *s, int fd, struct llm_error *err);

/* Ends it at the daemon and waits for that. The struct stays to be freed. */
LLM_EXPORT int llm_session_close(struct llm_session *s, struct llm_error *err);

/*
 * Frees the struct. A session made by llm_session_new() or llm_session_fork() without the option
 * linger is closed, without waiting for that; an opened or lingering one stays. NULL is allowed.
 */
LLM_EXPORT void llm_session_free(struct llm_session *s);

/*
 * Starts a request. *ret_fd: its stream, blocking; close it at any time to cancel. A daemon that is
 * started again goes on with it.
 */
LLM_EXPORT int llm_session_generate(struct llm_session *s, const struct llm_options *options,
                                    int *ret_fd, uint64_t *ret_request, struct llm_error *err);

/* Likewise, but only reads the prompt into the session: the stream has no text, and ends with the
 * reason "appended". */
LLM_EXPORT int llm_session_append(struct llm_session *s, const struct llm_options *options,
                                  int *ret_fd, uint64_t *ret_request, struct llm_error *err);

/* Ends the request that runs; its stream then ends with the reason "cancelled". */
LLM_EXPORT int llm_session_cancel(struct llm_session *s, struct llm_error *err);

/* How many tokens a prompt has. options: of Measure; with "session" as its continuation */
LLM_EXPORT int llm_measure(struct llm_connection *c, const struct llm_options *options,
                           uint32_t *ret_tokens, struct llm_error *err);

/* ---- stream ---- */

enum llm_event_type {
    LLM_DELTA,
    LLM_USAGE,
    LLM_END,
    LLM_ERROR,
    LLM_QUEUED,
    LLM_PROGRESS,
};

struct llm_alternative {
    uint32_t id;
    double logprob;
    const char *text; /* [n_text], as a delta's */
    size_t n_text;
};

struct llm_event {
    enum llm_event_type type;
    const char *text; /* delta: [n_text] UTF-8, may hold NUL */
    size_t n_text;
    bool has_token; /* delta: id, logprob and entropy are meant */
    uint32_t id;
    double logprob, entropy;
    const struct llm_alternative *top; /* delta: [n_top], the most probable first */
    size_t n_top;
    uint32_t prompt_tokens, completion_tokens, cached_tokens; /* usage */
    const char *reason;                                       /* end */
    const char *name, *message;                               /* error */
    bool has_sizes;                /* error: the two below are meant, as with ContextFull */
    uint64_t requested, available; /* tokens */
    uint32_t position;             /* queued: 1 is next */
    uint64_t estimated_usec;       /* queued: until it starts, from now; 0: not known */
    uint64_t done, total;          /* progress: tokens of the prompt */
    uint64_t reserved[8];
};

/* Takes fd. */
LLM_EXPORT int llm_stream_new(struct llm_stream **ret, int fd);
LLM_EXPORT void llm_stream_free(struct llm_stream *s);
LLM_EXPORT int llm_stream_fd(const struct llm_stream *s);

/*
 * 1: *ret, valid until the next call; 0: the stream is over, after its end or error; -EAGAIN: fd is
 * non-blocking and has nothing; -EINTR: a signal came; -EPIPE: cut without an end, for the daemon
 * died and none went on with it; -EBADMSG: not a stream of records; -errno
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
 * Generates and hands each event to the callback (NULL: to nobody). A signal does not end it.
 * 0: it ended well; the callback's negative return; the errno of an error event, which the callback
 * has seen too; -EPIPE: the daemon went away
 */
LLM_EXPORT int llm_session_run(struct llm_session *s, const struct llm_options *options,
                               llm_callback callback, void *userdata, struct llm_error *err);

#ifdef __cplusplus
}
#endif
