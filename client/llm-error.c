/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Errors of calls. Names become numbers by our own table and not by sd_bus_error_add_map(),
 * which is global, knows no lock, and would keep pointing into a library that was unloaded.
 */

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "client/llm-internal.h"
#include "ipc/bus-error.h"

int llm_error_set(struct llm_error *err, int code, const char *format, ...)
{
    va_list ap;

    if (err) {
        err->name[0] = 0;
        va_start(ap, format);
        vsnprintf(err->message, sizeof(err->message), format, ap);
        va_end(ap);
    }
    return -code;
}

int llm_error_number(const char *name)
{
    int code = bus_error_code(name);

    return code > 0 ? code : EIO;
}

/* The names under which a broker tells that whom we talk to is no longer there. */
static bool is_departure(const char *name)
{
    return strcmp(name, SD_BUS_ERROR_SERVICE_UNKNOWN) == 0 ||
           strcmp(name, SD_BUS_ERROR_NAME_HAS_NO_OWNER) == 0 ||
           strcmp(name, SD_BUS_ERROR_NO_REPLY) == 0 || strcmp(name, SD_BUS_ERROR_DISCONNECTED) == 0;
}

bool llm_is_departure(int r, const sd_bus_error *e)
{
    if (e->name && bus_error_code(e->name) > 0)
        return false; /* the daemon's own word, whatever number goes with it */
    return r == -ECONNRESET || r == -ENOTCONN || r == -EPIPE || (e->name && is_departure(e->name));
}

int llm_bus_failure(struct llm_error *err, int r, const sd_bus_error *e)
{
    int code = e->name ? bus_error_code(e->name) : -1;

    if (code <= 0) {
        if (llm_is_departure(r, e))
            return llm_error_set(err, ENOTCONN, "llmd has gone away");
        if (r == -ETIMEDOUT)
            return llm_error_set(err, ETIMEDOUT, "llmd did not answer in time");
        if (r == -ECHILD)
            return llm_error_set(err, ECHILD,
                                 "the connection is another process's; connect after fork()");
        code = -r;
    }
    llm_error_set(err, code, "%s", e->message && e->message[0] ? e->message : strerror(code));
    if (err && e->name)
        snprintf(err->name, sizeof(err->name), "%s", e->name);
    return -code;
}

int llm_bad_answer(struct llm_error *err)
{
    return llm_error_set(err, EBADMSG, "llmd's answer cannot be read: is it of another version?");
}
