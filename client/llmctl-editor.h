/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* editor: messages typed on a terminal, with line editing and a history that outlives us. */

#include <stdbool.h>

struct editor;

/*
 * For stdin and stdout, both terminals. After deadlines_hold(). history: the file of
 * $XDG_STATE_HOME/llmd/history is read, and added to; where that cannot be, people are told and
 * there is none. 0, -ENOMEM
 */
int editor_new(struct editor **ret, bool history);
void editor_free(struct editor *e); /* NULL is allowed */

/*
 * One message; lines that end with a backslash are joined to the next one by a line feed. 1: *ret,
 * malloc'ed, in UTF-8; 0: the end of input; -EINTR: Ctrl-C, *ret_had_text whether it threw
 * something away; -errno
 */
int editor_read(struct editor *e, char **ret, bool *ret_had_text);
