/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * prompt_thread: turns prompts into tokens outside the engine thread, so that a prompt of megabytes
 * delays nobody's tokens. Two threads, one for small prompts and one for the others, so that no
 * small one waits for a big one; among those that wait, accounts take turns.
 *
 * A job that was submitted is the prompt thread's until done() is called for it, on one of its
 * threads, or prompt_thread_withdraw() has given it back. Any thread may call in here.
 */

#include <stdbool.h>

#include "base/error.h"
#include "daemon/job.h"

struct model;
struct prompt_thread;

/* job::ids and ::position are set, or ::result and ::error. */
typedef void (*prompt_done)(struct job *j, void *userdata);

/* m must outlive it. 0, -errno */
int prompt_thread_new(struct prompt_thread **ret, const struct model *m, prompt_done done,
                      void *userdata, struct error *err);
struct prompt_thread *prompt_thread_free(struct prompt_thread *p); /* no job may be there */

/* job::position, has_tail, tail and room say where the prompt goes. */
void prompt_thread_submit(struct prompt_thread *p, struct job *j, uint64_t account);

/*
 * True: the job was waiting and is the caller's again. Else it is at work, where job::stop ends it
 * within a millisecond, or not here.
 */
bool prompt_thread_withdraw(struct prompt_thread *p, struct job *j);

/* What is certain before it is tokenised; see engine_thread_check(). */
int prompt_check(const struct model *m, const struct job_request *q, enum chat_position position,
                 uint32_t room, struct error *err);
