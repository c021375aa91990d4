/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* chat: a conversation, and the commands that are given in it. */

#include "client/llmctl-answer.h"
#include "client/llmctl-request.h"
#include "client/llmctl.h"

struct chat {
    struct request request;
    char *model;  /* asked for; or NULL */
    char *system; /* what the first message begins with; or NULL */
    struct llm_connection *connection;
    struct llm_session *session;
    bool begun; /* the session holds something */
    bool lost;  /* the daemon that was started since does not have it */
    bool leave;

    uint32_t *marks; /* [n_marks]: tokens before each of our turns */
    size_t n_marks;
    char **values; /* [n_values]: what /set was told, for request.settings */
    size_t n_values;
    char *file; /* saved or loaded by this chat; or NULL */
};

/* Tokens the session holds. STATUS_OK, or a complaint was made. */
int chat_context(struct chat *c, uint32_t *ret_used, uint32_t *ret_max);

/* A line that begins with a slash; it is changed. Complaints are made; the conversation goes on. */
void chat_command(struct chat *c, char *line);
