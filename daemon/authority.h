/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * authority: who may do what, by polkit where there is one. Loop thread.
 *
 * root and the daemon's own uid may do everything, at once. Otherwise polkit is asked over the
 * system bus without waiting for it. Without polkit (not installed, no system bus; always in user
 * and private mode) everybody may use the model, also in the background, and nobody else may manage
 * it or look at others' sessions; the log says so once.
 */

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <systemd/sd-bus.h>

#include "base/error.h"
#include "daemon/client-identity.h"

struct authority;

enum action {
    ACTION_USE,
    ACTION_USE_BACKGROUND,
    ACTION_MANAGE_MODELS,
    ACTION_INSPECT_SESSIONS,
    ACTION_MANAGE_QUOTAS,
    ACTION_N,
};

const char *action_name(enum action action); /* "org.llmd.Llm1.use" */

/* r: 1 yes; 0 no; 2 only after authentication, which the caller did not allow; -ECANCELED: who went
 * away; other -errno: polkit failed, to be taken as no. */
typedef void (*authority_answer)(void *userdata, int r);

/* A user or private mode, or without a system bus: own-uid rule. 0, -ENOMEM */
int authority_new(struct authority **ret, bool ask_polkit);
struct authority *authority_free(struct authority *a); /* answers what waits with -ECANCELED */

/* The system bus, NULL when it is lost. Answers what waits with -ECONNRESET. 0, -errno */
int authority_set_bus(struct authority *a, sd_bus *bus);

/*
 * answer may be called before this returns. A positive answer to ACTION_USE is remembered in *who
 * until polkit says that something changed. who must stay until answered, or authority_forget().
 * m: the method call that asks, read for whether it allows a question to the user; NULL: it does
 * not
 */
void authority_check(struct authority *a, struct client_identity *who, enum action action,
                     sd_bus_message *m, authority_answer answer, void *userdata);

/* who goes away: its checks are answered with -ECANCELED before this returns. */
void authority_forget(struct authority *a, struct client_identity *who);
