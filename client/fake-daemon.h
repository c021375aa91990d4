/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * fake-daemon: for tests, a daemon that answers as it is told, in a thread of its own: rightly,
 * wrongly, with errors, or not at all. It remembers the last call and the other end of the last
 * stream.
 */

#include <stddef.h>

enum fake_answer {
    FAKE_RIGHT,
    FAKE_ERROR,         /* org.llmd.Llm1.Error.Busy */
    FAKE_FOREIGN_ERROR, /* one that is not in the table */
    FAKE_WRONG,         /* of a wrong type */
    FAKE_EMPTY,
    FAKE_NONE,
    FAKE_HANGUP,
};

struct fake_daemon;

/* Listens at a path. */
struct fake_daemon *fake_daemon_listen(const char *path);
/* Takes the name on the bus at the address. */
struct fake_daemon *fake_daemon_on_bus(const char *address);
/* Waits for its end. */
void fake_daemon_stop(struct fake_daemon *f);

/* What calls get from now on. Ping is answered whatever it is, but for FAKE_HANGUP. */
void fake_daemon_set(struct fake_daemon *f, enum fake_answer answer);
/* What the streams of Generate and Append hold; static. "": nothing, and they stay open. */
void fake_daemon_set_stream(struct fake_daemon *f, const char *text);

/* "MEMBER PATH ARGUMENTS" of the last call, such as "Rewind /org/llmd/Llm1/session/7 u=5". */
void fake_daemon_seen(struct fake_daemon *f, char *out, size_t n);
/* Our end of the last stream; the caller's now. */
int fake_daemon_take_stream(struct fake_daemon *f);
