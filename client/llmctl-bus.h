/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Calls that libllm has no function for, as llmctl's verbs make them: waits let Ctrl-C and the time
 * limit in, failures are complained about here, and what is returned is an exit status.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <systemd/sd-bus.h>

#include "client/llmctl.h"
#include "ipc/names.h"

/* A call to be filled by sd_bus_message_append() and given to bus_call(). */
int bus_new(struct llm_connection *c, const char *path, const char *interface, const char *member,
            sd_bus_message **ret);

/* Sends it and waits. Where the daemon is started again meanwhile, it is sent again. ret may be
 * NULL. */
int bus_call(struct llm_connection *c, sd_bus_message *m, sd_bus_message **ret);
/* The same without a complaint: 0, or a negative errno and *e; status_of_call() tells of both. */
int bus_try(struct llm_connection *c, sd_bus_message *m, sd_bus_message **ret, sd_bus_error *e);
int status_of_call(int r, const sd_bus_error *e);

/* The daemon's answer does not have the shape it should. */
int complain_of_answer(void);

/*
 * Waits until a callback of this connection sets *done, a descriptor (negative: none) can be read,
 * or usec have passed (0: no limit), in which cases it returns STATUS_OK.
 */
int bus_wait(struct llm_connection *c, const bool *done, int fd, uint64_t usec);

/*
 * The same; but where the daemon is started again meanwhile, it goes on with that one and returns
 * BUS_AGAIN: what was set up, by bus_match(), bus_watch_end() and Subscribe, is to be set up anew.
 */
#define BUS_AGAIN (-1)
int bus_wait_again(struct llm_connection *c, const bool *done, int fd, uint64_t usec);

/* Has the callback called for signals of the daemon below a path (namespace); for all of them when
 * interface or member is NULL. Until the connection ends. */
int bus_match(struct llm_connection *c, const char *path_namespace, const char *interface,
              const char *member, sd_bus_message_handler_t callback, void *userdata);

/* On a bus, has waits and calls fail when the daemon of now leaves it; a socket tells of that
 * itself. */
int bus_watch_end(struct llm_connection *c);

/* ---- properties ---- */

struct bus_property {
    const char *name;
    char type;     /* s: const char *, valid as long as the message; u: uint32_t; t: uint64_t;
                      d: double; b: bool; S: char **, of as, the caller's */
    size_t offset; /* into the struct to be filled */
};

/* Reads a{sv}; unknown names are skipped, absent ones leave their field as it is. A negative errno
 */
int bus_read_properties(sd_bus_message *m, const struct bus_property *properties, size_t n,
                        void *fill);
/* All properties of an interface. *ret_message is what strings point into. */
int bus_get_properties(struct llm_connection *c, const char *path, const char *interface,
                       const struct bus_property *properties, size_t n, void *fill,
                       sd_bus_message **ret_message);

/* ---- sessions ---- */

#define SESSION_PATH_MAX 64

/* The object path of the session that an argument means: its number, or the path itself. */
int session_path(const char *id, char out[SESSION_PATH_MAX]);
/* The number in a session's path, or 0. */
uint64_t session_id(const char *path);

static inline void sd_bus_message_unrefpp(sd_bus_message **m)
{
    sd_bus_message_unref(*m);
}

static inline void llm_disconnectp(struct llm_connection **c)
{
    llm_disconnect(*c);
}
