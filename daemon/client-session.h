/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * client_session: a conversation as the daemon keeps it: whose timeline, which request runs. Knows
 * no bus (session-bus.c does). Loop thread.
 *
 * session_set: all of them, with what they share.
 */

#include <stdbool.h>
#include <stdint.h>
#include <systemd/sd-event.h>

#include "base/error.h"
#include "daemon/engine-thread.h"

struct client_session;
struct session_set;

/* changed: a request or a stream came or went; for whoever waits until all is quiet. */
typedef void (*session_set_changed)(void *userdata);

/* Borrows event. Has no engine yet. 0, -errno */
int session_set_new(struct session_set **ret, sd_event *event, session_set_changed changed,
                    void *userdata);

/*
 * Borrows the engine thread; NULL: there is none any more. No session may be open and all jobs must
 * have come back. context_max: most tokens of a session that asks for nothing else, at most the
 * model's; 0: the model's. 0, -errno: there is none now
 */
int session_set_set_engine(struct session_set *set, struct engine_thread *t, uint32_t context_max);

/* All sessions must be gone and all jobs have come back; streams that still flush are cut. */
struct session_set *session_set_free(struct session_set *set);
void session_set_freep(struct session_set **set);

uint32_t session_set_n_sessions(const struct session_set *set);
bool session_set_is_quiet(const struct session_set *set); /* neither jobs nor streams */
struct engine_thread *session_set_engine(const struct session_set *set);
const char *session_set_model_name(const struct session_set *set); /* "" without engine */

/* Whether the text names the model served: its name, or its path. */
bool session_set_serves(const struct session_set *set, const char *model);

/* No more requests; those that run end with "shutdown". */
void session_set_stop(struct session_set *set);
bool session_set_is_stopping(const struct session_set *set);
void session_set_cut_streams(struct session_set *set);

/*
 * context: tokens, 0: the default. 0, -EAGAIN: no model, -EINVAL: context above the model's, -EDQUOT, -ESHUTDOWN,
 * -ENOMEM
 */
int client_session_new(struct client_session **ret, struct session_set *set, uint32_t context,
                       struct error *err);
struct client_session *client_session_free(struct client_session *s); /* cancels its request */
void client_session_freep(struct client_session **s);

uint64_t client_session_id(const struct client_session *s);
bool client_session_is_busy(const struct client_session *s);
uint32_t client_session_context_used(const struct client_session *s);
uint32_t client_session_context_max(const struct client_session *s);

/*
 * Starts what the request asks for, which is taken over. *ret_fd: the client's end of the stream.
 * 0, -EBUSY, -ESHUTDOWN, -ENOMEM, -errno
 */
int client_session_generate(struct client_session *s, struct job_request *request, int *ret_fd,
                            uint64_t *ret_id, struct error *err);
void client_session_cancel(struct client_session *s);
