/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Calls and their errors. Names become numbers by our own table and not by sd_bus_error_add_map(),
 * which is global, knows no lock, and would keep pointing into a library that was unloaded.
 */

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
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

int llm_bus_failure(struct llm_error *err, int r, const sd_bus_error *e)
{
    int code = e->name ? bus_error_code(e->name) : -1;

    if (code <= 0) {
        if (r == -ECONNRESET || r == -ENOTCONN || r == -EPIPE || (e->name && is_departure(e->name)))
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

int llm_call_message(sd_bus *bus, sd_bus_message *m, sd_bus_message **ret, struct llm_error *err)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    int r;

    r = sd_bus_call(bus, m, 0, &e, ret);
    return r < 0 ? llm_bus_failure(err, r, &e) : 0;
}

int llm_call(sd_bus *bus, const char *destination, const char *path, const char *interface,
             const char *method, const struct llm_options *options, sd_bus_message **ret,
             struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    int r;

    r = sd_bus_message_new_method_call(bus, &m, destination, path, interface, method);
    if (r < 0)
        return llm_bus_failure(err, r, &SD_BUS_ERROR_NULL);
    r = llm_options_append(options, m);
    if (r == -EINVAL)
        return llm_error_set(err, EINVAL, "an option's text is not UTF-8 or not an object path");
    if (r < 0)
        return llm_error_set(err, -r, "the options cannot be sent: %s", strerror(-r));
    return llm_call_message(bus, m, ret, err);
}
