/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * fake-daemon: for tests, a daemon that answers as it is told, in a thread of its own: rightly,
 * wrongly, with errors, or not at all. It remembers the last call and the other end of the last
 * stream.
 */

#include <stddef.h>
#include <sys/types.h>

enum fake_answer {
    FAKE_RIGHT,
    FAKE_ERROR,         /* org.llmd.Llm1.Error.Busy */
    FAKE_FOREIGN_ERROR, /* one that is not in the table */
    FAKE_WRONG,         /* of a wrong type */
    FAKE_EMPTY,
    FAKE_NONE,
    FAKE_HANGUP,
};

/* How it goes in the middle of calls, as one that is killed and started again by a manager does:
 * the call is carried out, or a part of it, and not answered. */
enum fake_loss {
    FAKE_LOSE_NOTHING,
    FAKE_LOSE_ONE, /* the next call */
    FAKE_LOSE_ALL, /* every call */
};

struct fake_daemon;

/* A dbus-daemon of the test's own, on folder/bus. Its process; 0: there is no such program */
pid_t fake_bus_start(const char *folder, char *address, size_t n);

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

/* From now on. What its instance is (static; NULL: such a property is unknown), and how Adopt ends
 * (static, a whole error's name; NULL: well). */
void fake_daemon_lose(struct fake_daemon *f, enum fake_loss loss);
void fake_daemon_lose_method(struct fake_daemon *f, enum fake_loss loss, const char *member);
void fake_daemon_set_instance(struct fake_daemon *f, const char *instance);
void fake_daemon_set_adopt(struct fake_daemon *f, const char *error);
/* Tokens in each session: now, and once a call was lost. */
void fake_daemon_set_used(struct fake_daemon *f, unsigned now, unsigned then);

/* Connections that were lost and are still open at the other end, at the time of the last Adopt. */
unsigned fake_daemon_formers_at_adopt(struct fake_daemon *f);

/* Calls since this was last asked, a line each: as below, but without arguments. */
void fake_daemon_calls(struct fake_daemon *f, char *out, size_t n);

/* "MEMBER PATH ARGUMENTS" of the last call, such as "Rewind /org/llmd/Llm1/session/7 u=5". */
void fake_daemon_seen(struct fake_daemon *f, char *out, size_t n);
/* Our end of the last stream; the caller's now. */
int fake_daemon_take_stream(struct fake_daemon *f);
