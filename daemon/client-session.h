/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * client_session: a conversation as the daemon keeps it: whose timeline, which request runs, what
 * it has cost. Knows no bus (session-bus.c does). Loop thread.
 *
 * session_set: all of them, with what they share. It outlives the engine: a model is exchanged by
 * giving it another one while no session is open.
 */

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>

#include "base/error.h"
#include "daemon/engine-thread.h"
#include "daemon/session-record.h"
#include "engine/scheduler.h"

struct client_session;
struct fd_store;
struct kept_ids;
struct session_set;
struct user;
struct users;

/* changed: a session, a request or a stream came or went; for whoever waits until all is quiet. */
typedef void (*session_set_changed)(void *userdata);

/* Who tells the clients. Called where the sessions are whole; none of it may free one. */
struct session_observer {
    void (*came)(void *userdata, struct client_session *s);
    void (*goes)(void *userdata, struct client_session *s);
    void (*changed)(void *userdata, struct client_session *s); /* its state or queue position */
    /* A request with a stream has ended; j tells how. It is idle again. */
    void (*finished)(void *userdata, struct client_session *s, const struct job *j);
    void (*lanes)(void *userdata); /* engine_thread_lanes_changed() */
};

/* Borrows event. Has no engine yet. 0, -errno */
int session_set_new(struct session_set **ret, sd_event *event, session_set_changed changed,
                    void *userdata);
/* All sessions must be gone and all jobs have come back; streams that still flush are cut. */
struct session_set *session_set_free(struct session_set *set);

void session_set_observe(struct session_set *set, const struct session_observer *o, void *userdata);

/*
 * Borrows the engine thread; NULL: there is none any more. No session may be open and all jobs must
 * have come back. context_max: most tokens of a session that asks for nothing else, at most the
 * model's; 0: the model's. 0, -errno: there is none now
 */
int session_set_set_engine(struct session_set *set, struct engine_thread *t, uint32_t context_max);

/* Memory is so short that there shall be no new sessions: -ENOSR for all of them. */
void session_set_set_low_memory(struct session_set *set, bool low);

/* Where sessions and requests are kept for the next process; borrowed, NULL: nowhere. */
void session_set_keep(struct session_set *set, struct fd_store *store);

/* Lingering sessions are closed so long after their last request; 0: never. */
void session_set_linger_usec(struct session_set *set, uint64_t usec);

uint32_t session_set_n_sessions(const struct session_set *set);
bool session_set_has_jobs(const struct session_set *set); /* the engine has something of theirs */
bool session_set_is_quiet(const struct session_set *set); /* neither jobs nor streams */
struct engine_thread *session_set_engine(const struct session_set *set); /* NULL: none */
const char *session_set_model_name(const struct session_set *set);       /* "" without */

/* Whether the text names the model served: its name, or its path. */
bool session_set_serves(const struct session_set *set, const char *model);

/* No more requests; those that run end with "shutdown". */
void session_set_stop(struct session_set *set);
bool session_set_is_stopping(const struct session_set *set);
void session_set_cut_streams(struct session_set *set);
/* Also those that linger. */
void session_set_close_all(struct session_set *set);

/* Totals since the start of the daemon, over all engines there were; and what is so now. */
void session_set_get_statistics(const struct session_set *set, struct engine_statistics *ret);
uint64_t session_set_n_refused(const struct session_set *set);
void session_set_count_refused(struct session_set *set); /* a call that a quota refused */

struct client_session *session_set_find(const struct session_set *set, uint64_t id);
struct client_session *session_set_first(const struct session_set *set); /* oldest first */
struct client_session *client_session_next(const struct client_session *s);

/* Whom sessions end with: a client. Zero-initialised. */
struct session_owner {
    struct client_session *first; /* client_session::owned_next */
    struct owner_name name;       /* how the next process can find it again */
    int fd; /* OWNER_CONNECTION: its socket, borrowed; kept in the fd store while it owns any */
    bool is_kept; /* it is there */
};
void session_owner_close_all(struct session_owner *owner);

/* Gives it to another one, or to nobody (NULL): then only client_session_free() ends it. */
void client_session_set_owner(struct client_session *s, struct session_owner *owner);

/* Who it ended with in the process before this one, until it is given to somebody; NULL: nobody. */
const struct owner_name *client_session_former_owner(const struct client_session *s);

struct client_session_options {
    uint32_t context; /* tokens, 0: the default */
    enum scheduler_class class;
    const char *label; /* NULL: "" */
    bool linger;       /* outlives the owner */
};

/*
 * Charged to the user. 0, -EINVAL: context above the model's, -EDQUOT, -EAGAIN: no model,
 * -ESHUTDOWN, -ENOMEM
 */
int client_session_new(struct client_session **ret, struct session_set *set, struct user *user,
                       struct session_owner *owner, const struct client_session_options *options,
                       struct error *err);
struct client_session *client_session_free(struct client_session *s); /* cancels its request */

uint64_t client_session_id(const struct client_session *s);
struct user *client_session_user(const struct client_session *s);
const struct session_owner *client_session_owner(const struct client_session *s); /* or NULL */
const char *client_session_path(const struct client_session *s);                  /* on the bus */
const char *client_session_label(const struct client_session *s);
enum scheduler_class client_session_class(const struct client_session *s);
bool client_session_lingers(const struct client_session *s);
uint64_t client_session_created_usec(const struct client_session *s); /* CLOCK_REALTIME */
bool client_session_is_busy(const struct client_session *s);
uint32_t client_session_context_max(const struct client_session *s);

/* What clients see of it now. */
struct client_session_info {
    const char *state; /* static: "idle", "queued", "prefill", "decode", "paused" */
    uint32_t context_used, queue_position;
    uint64_t estimate_usec, kv_bytes;
    uint64_t prompt_tokens, completion_tokens; /* totals of all requests */
};
void client_session_get_info(const struct client_session *s, struct client_session_info *ret);

/*
 * Starts a request with a stream (generate, append), which is taken over. *ret_fd: the client's end
 * of the stream. 0, -EBUSY, -EDQUOT, -ESHUTDOWN, -ENOMEM, what engine_thread_check() says, -errno
 */
int client_session_generate(struct client_session *s, struct job_request *request, int *ret_fd,
                            uint64_t *ret_id, struct error *err);

/*
 * Starts one without a stream, which is taken over; finished is called when it is done, the session
 * and whoever asked may have gone by then. Only a measure may be asked for while another request
 * runs. 0, as above
 */
typedef void (*job_finished)(struct job *j, void *userdata);
int client_session_ask(struct client_session *s, struct job_request *request, job_finished finished,
                       void *userdata, struct error *err);

/* A measure of what stands alone. 0, as above, -EAGAIN: no model */
int session_set_measure(struct session_set *set, struct user *user, struct job_request *request,
                        job_finished finished, void *userdata, struct error *err);

/*
 * Session.Fork: asks, and when that is finished makes the session of the job's timeline; with the
 * same owner and options both times. The context is the parent's. 0, as client_session_ask() and
 * client_session_new()
 */
int client_session_fork(struct client_session *s, const struct session_owner *owner,
                        const struct client_session_options *options, job_finished finished,
                        void *userdata, struct error *err);
int client_session_new_forked(struct client_session **ret, struct client_session *s,
                              struct session_owner *owner,
                              const struct client_session_options *options, struct job *j,
                              struct error *err);

/*
 * After each client_session_generate(): whoever asked has its answer, and with it its end of the
 * stream; or will never have it. Until then the next process would take back all that the request
 * did, even when it is over: who has no answer asks again.
 */
void session_set_answered(struct session_set *set, uint64_t request_id, bool sent);

/* ---- what another process left (recovery.c) ---- */

/* Numbers given out from now on are higher. */
void session_set_reserve_ids(struct session_set *set, uint64_t session, uint64_t request);
/* Than what is in there too; and there the last ones are kept from now on. Borrowed. */
void session_set_keep_ids(struct session_set *set, struct kept_ids *ids);
const uint8_t *session_set_model_id(const struct session_set *set); /* NULL: it has none */

/* Its timeline is the engine thread's. On failure it is closed. 0, -EBADMSG, -ENOMEM */
int session_set_take_back(struct client_session **ret, struct session_set *set, struct user *user,
                          struct timeline *timeline);

/*
 * A request with a stream, whose daemon's end is fd. s: it goes on there, but for a reason to stop;
 * NULL: it is over, and the rest is sent. Takes record and fd in every case. 0, -errno
 */
int session_set_take_back_request(struct session_set *set, struct user *user,
                                  struct client_session *s, struct request_record *record, int fd,
                                  enum job_stop stop, struct error *err);

void client_session_cancel(struct client_session *s); /* of requests with a stream */
