/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Sessions. On a bus they are addressed by the unique name of the daemon that has them: one that
 * was started since may have given their paths to others.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "client/llm-internal.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

struct llm_session {
    sd_bus *bus; /* a reference */
    char *path;
    char *destination; /* NULL: peer to peer */
    bool stays;        /* is not ours to close */
};

DEFINE_CLEANUP(struct llm_stream *, llm_stream_free)

static void session_forget(struct llm_session *s)
{
    sd_bus_unref(s->bus);
    free(s->path);
    free(s->destination);
    free(s);
}

/* A session that the sender of the reply has. */
static int session_make(struct llm_session **ret, sd_bus *bus, sd_bus_message *reply,
                        const char *path, bool stays, struct llm_error *err)
{
    const char *sender = sd_bus_message_get_sender(reply);
    struct llm_session *s = calloc(1, sizeof(*s));

    if (s) {
        s->bus = sd_bus_ref(bus);
        s->path = strdup(path);
        s->destination = sender ? strdup(sender) : NULL;
        s->stays = stays;
    }
    if (!s || !s->path || (sender && !s->destination)) {
        if (s)
            session_forget(s);
        return llm_error_set(err, ENOMEM, "out of memory");
    }
    *ret = s;
    return 0;
}

/* From the answer to CreateSession and Fork. */
static int session_from_reply(struct llm_session **ret, sd_bus *bus, sd_bus_message *reply,
                              const struct llm_options *options, struct llm_error *err)
{
    const char *path;

    if (sd_bus_message_read(reply, "o", &path) <= 0)
        return llm_bad_answer(err);
    return session_make(ret, bus, reply, path, llm_options_is_set(options, "linger"), err);
}

int llm_session_new(struct llm_session **ret, struct llm_connection *c,
                    const struct llm_options *options, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    int r;

    r = llm_call(c->bus, c->destination, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "CreateSession",
                 options, &reply, err);
    return r < 0 ? r : session_from_reply(ret, c->bus, reply, options, err);
}

/* "7" or a whole path; malloc'ed. */
static int session_path(const char *id_or_path, char **ret, struct llm_error *err)
{
    static const char folder[] = LLM_SESSION_PATH "/";
    const char *id = id_or_path;
    char *path;

    if (strncmp(id, folder, sizeof(folder) - 1) == 0)
        id += sizeof(folder) - 1;
    if (!*id || id[strspn(id, "0123456789")] || strlen(id) > 20)
        return llm_error_set(
            err, EINVAL, "%.64s: is not a session; its number or its path is wanted", id_or_path);
    if (asprintf(&path, "%s%s", folder, id) < 0)
        return llm_error_set(err, ENOMEM, "out of memory");
    *ret = path;
    return 0;
}

int llm_session_open(struct llm_session **ret, struct llm_connection *c, const char *id_or_path,
                     struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL, *reply = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    CLEANUP(freep) char *path = NULL;
    int r;

    r = session_path(id_or_path, &path, err);
    if (r < 0)
        return r;
    r = sd_bus_message_new_method_call(c->bus, &m, c->destination, path,
                                       "org.freedesktop.DBus.Properties", "Get");
    if (r >= 0)
        r = sd_bus_message_append(m, "ss", LLM_SESSION_INTERFACE, "State");
    if (r >= 0)
        r = sd_bus_call(c->bus, m, 0, &e, &reply);
    if (r < 0 && sd_bus_error_has_name(&e, SD_BUS_ERROR_UNKNOWN_OBJECT))
        return llm_error_set(err, ESRCH, "%.64s: there is no such session", id_or_path);
    if (r < 0)
        return llm_bus_failure(err, r, &e);
    return session_make(ret, c->bus, reply, path, /* stays= */ true, err);
}

const char *llm_session_path(const struct llm_session *s)
{
    return s->path;
}

void llm_session_free(struct llm_session *s)
{
    if (!s)
        return;
    /* Not waited for: there is nothing to be done about a daemon that does not answer. */
    if (!s->stays)
        sd_bus_call_method_async(s->bus, NULL, s->destination, s->path, LLM_SESSION_INTERFACE,
                                 "Close", NULL, NULL, NULL);
    session_forget(s);
}

/* A method with what types say, and no answer. */
static int plain_call(struct llm_session *s, struct llm_error *err, const char *method,
                      const char *types, ...)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    va_list ap;
    int r;

    r = sd_bus_message_new_method_call(s->bus, &m, s->destination, s->path, LLM_SESSION_INTERFACE,
                                       method);
    if (r >= 0) {
        va_start(ap, types);
        r = sd_bus_message_appendv(m, types, ap);
        va_end(ap);
    }
    if (r < 0)
        return llm_bus_failure(err, r, &SD_BUS_ERROR_NULL);
    return llm_call_message(s->bus, m, NULL, err);
}

int llm_session_cancel(struct llm_session *s, struct llm_error *err)
{
    return plain_call(s, err, "Cancel", "");
}

int llm_session_close(struct llm_session *s, struct llm_error *err)
{
    int r = plain_call(s, err, "Close", "");

    if (r >= 0)
        s->stays = true; /* nothing to close when it is freed */
    return r;
}

int llm_session_rewind(struct llm_session *s, uint32_t tokens, struct llm_error *err)
{
    return plain_call(s, err, "Rewind", "u", tokens);
}

int llm_session_save(struct llm_session *s, int fd, struct llm_error *err)
{
    return plain_call(s, err, "Save", "h", fd);
}

int llm_session_restore(struct llm_session *s, int fd, struct llm_error *err)
{
    return plain_call(s, err, "Restore", "h", fd);
}

int llm_session_fork(struct llm_session **ret, struct llm_session *s,
                     const struct llm_options *options, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    int r;

    r = llm_call(s->bus, s->destination, s->path, LLM_SESSION_INTERFACE, "Fork", options, &reply,
                 err);
    return r < 0 ? r : session_from_reply(ret, s->bus, reply, options, err);
}

/* ---- requests ---- */

static int request(struct llm_session *s, const char *method, const struct llm_options *options,
                   int *ret_fd, uint64_t *ret_request, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    uint64_t id;
    int fd, r;

    r = llm_call(s->bus, s->destination, s->path, LLM_SESSION_INTERFACE, method, options, &reply,
                 err);
    if (r < 0)
        return r;
    if (sd_bus_message_read(reply, "ht", &fd, &id) <= 0)
        return llm_bad_answer(err);
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 3); /* the first is the message's */
    if (fd < 0)
        return llm_error_set(err, errno, "the stream: %s", strerror(errno));
    *ret_fd = fd;
    if (ret_request)
        *ret_request = id;
    return 0;
}

int llm_session_generate(struct llm_session *s, const struct llm_options *options, int *ret_fd,
                         uint64_t *ret_request, struct llm_error *err)
{
    return request(s, "Generate", options, ret_fd, ret_request, err);
}

int llm_session_append(struct llm_session *s, const struct llm_options *options, int *ret_fd,
                       uint64_t *ret_request, struct llm_error *err)
{
    return request(s, "Append", options, ret_fd, ret_request, err);
}

int llm_session_run(struct llm_session *s, const struct llm_options *options, llm_callback callback,
                    void *userdata, struct llm_error *err)
{
    CLEANUP(llm_stream_freep) struct llm_stream *stream = NULL;
    struct llm_event event;
    int fd, r, result = 0;

    r = llm_session_generate(s, options, &fd, NULL, err);
    if (r < 0)
        return r;
    r = llm_stream_new(&stream, fd);
    if (r < 0)
        return llm_error_set(err, ENOMEM, "out of memory");
    while ((r = llm_stream_next(stream, &event)) != 0) {
        if (r == -EINTR)
            continue;
        if (r == -EPIPE)
            return llm_error_set(err, EPIPE, "llmd went away before the answer's end");
        if (r < 0)
            return llm_error_set(err, -r, "the stream cannot be read: %s", strerror(-r));
        if (event.type == LLM_ERROR) {
            result = llm_error_set(err, llm_error_number(event.name), "%s", event.message);
            if (err)
                snprintf(err->name, sizeof(err->name), "%s", event.name);
        }
        r = callback ? callback(&event, userdata) : 0;
        if (r < 0)
            return llm_error_set(err, -r, "stopped by the caller");
    }
    return result;
}

int llm_measure(struct llm_connection *c, const struct llm_options *options, uint32_t *ret_tokens,
                struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    uint32_t n;
    int r;

    r = llm_call(c->bus, c->destination, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "Measure", options,
                 &reply, err);
    if (r < 0)
        return r;
    if (sd_bus_message_read(reply, "u", &n) <= 0)
        return llm_bad_answer(err);
    *ret_tokens = n;
    return 0;
}
