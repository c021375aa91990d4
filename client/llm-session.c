/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Sessions. Each method here says what becomes of it when the daemon goes in the middle of it
 * (llm-call.c): that it may be repeated as it is, or how.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "client/llm-internal.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"

DEFINE_CLEANUP(struct llm_stream *, llm_stream_free)

static void session_forget(struct llm_session *s)
{
    *(s->previous ? &s->previous->next : &s->connection->sessions) = s->next;
    if (s->next)
        s->next->previous = s->previous;
    llm_connection_unref(s->connection);
    free(s->path);
    free(s);
}

static int session_make(struct llm_session **ret, struct llm_connection *c, const char *path,
                        bool stays, struct llm_error *err)
{
    CLEANUP(freep) char *copy = strdup(path);
    struct llm_session *s = calloc(1, sizeof(*s));

    if (!s || !copy) {
        free(s);
        return llm_error_set(err, ENOMEM, "out of memory");
    }
    s->path = TAKE_PTR(copy);
    s->stays = stays;
    s->connection = c;
    c->n_refs++;
    s->next = c->sessions;
    if (s->next)
        s->next->previous = s;
    c->sessions = s;
    *ret = s;
    return 0;
}

/* From the answer to CreateSession and Fork. */
static int session_from_reply(struct llm_session **ret, struct llm_connection *c,
                              sd_bus_message *reply, const struct llm_options *options,
                              struct llm_error *err)
{
    const char *path;

    if (sd_bus_message_read(reply, "o", &path) <= 0)
        return llm_bad_answer(err);
    return session_make(ret, c, path, llm_options_is_set(options, "linger"), err);
}

int llm_session_new(struct llm_session **ret, struct llm_connection *c,
                    const struct llm_options *options, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    int r;

    r = llm_learn_instance(c, err);
    if (r >= 0)
        r = llm_call(c, NULL, "CreateSession", options, &reply, err);
    return r < 0 ? r : session_from_reply(ret, c, reply, options, err);
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

/* *ret is the answer, a variant. s: NULL, where it is not yet one */
static int get_property(struct llm_connection *c, struct llm_session *s, const char *path,
                        const char *name, sd_bus_message **ret, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    int r;

    r = llm_call_new(c, &m, path, "org.freedesktop.DBus.Properties", "Get", err);
    if (r < 0)
        return r;
    r = sd_bus_message_append(m, "ss", LLM_SESSION_INTERFACE, name);
    if (r < 0)
        return llm_bus_failure(err, r, &SD_BUS_ERROR_NULL);
    return llm_call_message(c, s, m, NULL, NULL, ret, err);
}

int llm_session_open(struct llm_session **ret, struct llm_connection *c, const char *id_or_path,
                     struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    CLEANUP(freep) char *path = NULL;
    struct llm_error e;
    int r;

    r = session_path(id_or_path, &path, err);
    if (r >= 0)
        r = llm_learn_instance(c, err);
    if (r < 0)
        return r;
    r = get_property(c, NULL, path, "State", &reply, &e);
    if (r < 0 && strcmp(e.name, SD_BUS_ERROR_UNKNOWN_OBJECT) == 0)
        return llm_error_set(err, ESRCH, "%.64s: there is no such session", id_or_path);
    if (r < 0 && err)
        *err = e;
    return r < 0 ? r : session_make(ret, c, path, /* stays= */ true, err);
}

const char *llm_session_path(const struct llm_session *s)
{
    return s->path;
}

void llm_session_free(struct llm_session *s)
{
    struct llm_connection *c = s ? s->connection : NULL;

    if (!s)
        return;
    /*
     * Not waited for: there is nothing to be done about a daemon that does not answer. One that was
     * started again since ends the session when our former connection ends and nobody adopted it.
     */
    if (!s->stays && !s->lost && c->bus)
        sd_bus_call_method_async(c->bus, NULL, c->destination ? c->owner : NULL, s->path,
                                 LLM_SESSION_INTERFACE, "Close", NULL, NULL, NULL);
    session_forget(s);
}

/* A method with what types say, and no answer. */
static int plain_call(struct llm_session *s, struct llm_error *err, llm_before_repeat before,
                      void *userdata, const char *method, const char *types, ...)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    va_list ap;
    int r;

    r = llm_call_new(s->connection, &m, s->path, LLM_SESSION_INTERFACE, method, err);
    if (r < 0)
        return r;
    va_start(ap, types);
    r = sd_bus_message_appendv(m, types, ap);
    va_end(ap);
    if (r < 0)
        return llm_bus_failure(err, r, &SD_BUS_ERROR_NULL);
    return llm_call_message(s->connection, s, m, before, userdata, NULL, err);
}

int llm_session_cancel(struct llm_session *s, struct llm_error *err)
{
    return plain_call(s, err, NULL, NULL, "Cancel", "");
}

int llm_session_close(struct llm_session *s, struct llm_error *err)
{
    int r = s->lost ? 0 : plain_call(s, err, NULL, NULL, "Close", "");

    if (r < 0 && s->lost) /* it was closed, but for the answer */
        r = 0;
    if (r >= 0)
        s->stays = true; /* nothing to close when it is freed */
    return r;
}

int llm_session_rewind(struct llm_session *s, uint32_t tokens, struct llm_error *err)
{
    return plain_call(s, err, NULL, NULL, "Rewind", "u", tokens);
}

/* ---- files ---- */

/* A file as the daemon found it. Where it stands is shared with us. */
struct file_before {
    struct llm_session *session;
    int fd;
    off_t at;      /* -1: it cannot be put back, as of a pipe */
    off_t n_bytes; /* -1: has no size of its own */
    uint32_t used; /* tokens in the session; UINT32_MAX: not known */
};

static void look_at_file(struct file_before *f, struct llm_session *s, int fd)
{
    struct stat st;

    *f = (struct file_before){.session = s, .fd = fd, .n_bytes = -1, .used = UINT32_MAX};
    f->at = lseek(fd, 0, SEEK_CUR);
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode))
        f->n_bytes = st.st_size;
}

static int put_back(const struct file_before *f, struct llm_error *err)
{
    if (f->at < 0 || lseek(f->fd, f->at, SEEK_SET) < 0)
        return llm_error_set(err, ENOTCONN,
                             "llmd went away and came back, and what it had read or written of a "
                             "pipe cannot be told");
    return 0;
}

static int before_save(void *userdata, struct llm_error *err)
{
    const struct file_before *f = userdata;
    struct stat st;

    /* Also where it is open for appending. */
    if (f->n_bytes >= 0 && fstat(f->fd, &st) == 0 && st.st_size > f->n_bytes &&
        ftruncate(f->fd, f->n_bytes) < 0)
        return llm_error_set(err, errno, "the file: %s", strerror(errno));
    return put_back(f, err);
}

int llm_session_save(struct llm_session *s, int fd, struct llm_error *err)
{
    struct file_before f;

    look_at_file(&f, s, fd);
    return plain_call(s, err, before_save, &f, "Save", "h", fd);
}

static int context_used(struct llm_session *s, uint32_t *ret, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    int r;

    r = get_property(s->connection, s, s->path, "ContextUsed", &reply, err);
    if (r < 0)
        return r;
    return sd_bus_message_read(reply, "v", "u", ret) < 0 ? llm_bad_answer(err) : 0;
}

/* A session that was empty and is so no more has been restored. */
static int before_restore(void *userdata, struct llm_error *err)
{
    const struct file_before *f = userdata;
    uint32_t used;
    int r;

    r = context_used(f->session, &used, err);
    if (r < 0)
        return r;
    return f->used == 0 && used > 0 ? 1 : put_back(f, err);
}

int llm_session_restore(struct llm_session *s, int fd, struct llm_error *err)
{
    struct file_before f;
    int r;

    look_at_file(&f, s, fd);
    r = context_used(s, &f.used, err);
    return r < 0 ? r : plain_call(s, err, before_restore, &f, "Restore", "h", fd);
}

int llm_session_fork(struct llm_session **ret, struct llm_session *s,
                     const struct llm_options *options, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    int r;

    r = llm_call(s->connection, s, "Fork", options, &reply, err);
    return r < 0 ? r : session_from_reply(ret, s->connection, reply, options, err);
}

/* ---- requests ---- */

static int request(struct llm_session *s, const char *method, const struct llm_options *options,
                   int *ret_fd, uint64_t *ret_request, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    uint64_t id;
    int fd, r;

    r = llm_call(s->connection, s, method, options, &reply, err);
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

    r = llm_call(c, NULL, "Measure", options, &reply, err);
    if (r < 0)
        return r;
    if (sd_bus_message_read(reply, "u", &n) <= 0)
        return llm_bad_answer(err);
    *ret_tokens = n;
    return 0;
}
