/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "base/cleanup.h"
#include "client/llm-internal.h"
#include "ipc/bus-error.h"
#include "ipc/names.h"
#include "ipc/runtime-dir.h"

struct llm_connection {
    sd_bus *bus;
};

struct llm_session {
    sd_bus *bus; /* a reference */
    char *path;
};

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

/* The daemon's answer, or why there was none. */
static int bus_failure(struct llm_error *err, int r, const sd_bus_error *e)
{
    if (!err)
        return r;
    snprintf(err->name, sizeof(err->name), "%s", e->name ? e->name : "");
    snprintf(err->message, sizeof(err->message), "%s", e->message ? e->message : strerror(-r));
    return r;
}

/* ---- connection ---- */

int llm_default_socket(char **ret, struct llm_error *err)
{
    CLEANUP(freep) char *dir = NULL;
    struct error why;
    char *path;
    int r;

    r = runtime_dir(&dir, &why);
    if (r < 0)
        return llm_error_set(err, -r, "%s", why.text);
    if (asprintf(&path, "%s/%s", dir, LLM_PRIVATE_SOCKET) < 0)
        return llm_error_set(err, ENOMEM, "out of memory");
    *ret = path;
    return 0;
}

static int open_socket(const char *path, struct llm_error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CLEANUP(closep) int fd = -EBADF;
    struct peer peer;
    struct stat st;

    if (strlen(path) >= sizeof(address.sun_path))
        return llm_error_set(err, ENAMETOOLONG, "%s: the path of a socket has at most %zu bytes",
                             path, sizeof(address.sun_path) - 1);
    strcpy(address.sun_path, path);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return llm_error_set(err, errno, "socket: %s", strerror(errno));
    /* The kernel calls this a refused connection, which would mean that no daemon is there. */
    if (stat(path, &st) == 0 && !S_ISSOCK(st.st_mode))
        return llm_error_set(err, ENOTSOCK, "%s: is not a socket", path);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        return llm_error_set(err, errno, "%s: %s", path, strerror(errno));
    if (peer_of(fd, &peer) < 0 || (peer.uid != geteuid() && peer.uid != 0))
        return llm_error_set(err, EPERM, "%s: who listens there is neither you nor root", path);
    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0) /* as sd-bus wants it */
        return llm_error_set(err, errno, "%s: %s", path, strerror(errno));
    return TAKE_FD(fd);
}

int llm_connect(struct llm_connection **ret, const char *socket_path, struct llm_error *err)
{
    CLEANUP(freep) char *default_path = NULL;
    CLEANUP(sd_bus_flush_close_unrefp) sd_bus *bus = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    struct llm_connection *c;
    int fd, r;

    sd_bus_error_add_map(bus_errors); /* as often as one likes */
    if (!socket_path) {
        r = llm_default_socket(&default_path, err);
        if (r < 0)
            return r;
        socket_path = default_path;
    }
    fd = open_socket(socket_path, err);
    if (fd < 0)
        return fd;
    r = sd_bus_new(&bus);
    if (r >= 0)
        r = sd_bus_set_fd(bus, fd, fd);
    if (r < 0) {
        close(fd);
        return llm_error_set(err, -r, "%s", strerror(-r));
    }
    /* One round, so that a daemon that is just leaving is found out here. */
    if ((r = sd_bus_negotiate_fds(bus, 1)) >= 0 && (r = sd_bus_start(bus)) >= 0)
        r = sd_bus_call_method(bus, NULL, LLM_ROOT_PATH, "org.freedesktop.DBus.Peer", "Ping", &e,
                               NULL, NULL);
    if (r == -ENOTCONN || r == -EPIPE)
        r = -ECONNRESET;
    if (r < 0)
        return bus_failure(err, r, &e);

    c = calloc(1, sizeof(*c));
    if (!c)
        return llm_error_set(err, ENOMEM, "out of memory");
    c->bus = TAKE_PTR(bus);
    *ret = c;
    return 0;
}

void llm_disconnect(struct llm_connection *c)
{
    if (!c)
        return;
    sd_bus_flush_close_unref(c->bus);
    free(c);
}

static int get_string(struct llm_connection *c, const char *property, char *out, size_t n,
                      struct llm_error *err)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    CLEANUP(freep) char *value = NULL;
    int r;

    r = sd_bus_get_property_string(c->bus, NULL, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, property, &e,
                                   &value);
    if (r < 0)
        return bus_failure(err, r, &e);
    snprintf(out, n, "%s", value);
    return 0;
}

static int get_number(struct llm_connection *c, const char *property, char type, void *ret,
                      struct llm_error *err)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    int r;

    r = sd_bus_get_property_trivial(c->bus, NULL, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, property,
                                    &e, type, ret);
    return r < 0 ? bus_failure(err, r, &e) : 0;
}

int llm_get_status(struct llm_connection *c, struct llm_status *ret, struct llm_error *err)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    struct llm_status s = {0};
    const char *backend = "";
    int r;

    if ((r = get_string(c, "Version", s.version, sizeof(s.version), err)) < 0 ||
        (r = get_string(c, "State", s.state, sizeof(s.state), err)) < 0 ||
        (r = get_string(c, "DefaultModel", s.model, sizeof(s.model), err)) < 0 ||
        (r = get_number(c, "Sessions", 'u', &s.sessions, err)) < 0 ||
        (r = get_number(c, "KvBytesUsed", 't', &s.kv_bytes_used, err)) < 0 ||
        (r = get_number(c, "KvBytesMax", 't', &s.kv_bytes_max, err)) < 0)
        return r;
    r = sd_bus_get_property(c->bus, NULL, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "Backends", &e,
                            &reply, "as");
    if (r >= 0)
        r = sd_bus_message_enter_container(reply, 'a', "s");
    if (r >= 0)
        r = sd_bus_message_read(reply, "s", &backend);
    if (r < 0)
        return bus_failure(err, r, &e);
    snprintf(s.backend, sizeof(s.backend), "%s", backend);
    *ret = s;
    return 0;
}

/* ---- session ---- */

static int call(sd_bus *bus, const char *path, const char *interface, const char *method,
                const struct llm_options *options, sd_bus_message **ret, struct llm_error *err)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL;
    int r;

    r = sd_bus_message_new_method_call(bus, &m, NULL, path, interface, method);
    if (r >= 0)
        r = llm_options_append(options, m);
    if (r == -EINVAL)
        return llm_error_set(err, EINVAL, "a text is not UTF-8");
    if (r >= 0)
        r = sd_bus_call(bus, m, 0, &e, ret);
    return r < 0 ? bus_failure(err, r, &e) : 0;
}

int llm_session_new(struct llm_session **ret, struct llm_connection *c,
                    const struct llm_options *options, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    struct llm_session *s;
    const char *path;
    int r;

    r = call(c->bus, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "CreateSession", options, &reply, err);
    if (r < 0)
        return r;
    r = sd_bus_message_read(reply, "o", &path);
    if (r < 0)
        return llm_error_set(err, -r, "the daemon's answer cannot be read");
    s = calloc(1, sizeof(*s));
    if (s)
        s->path = strdup(path);
    if (!s || !s->path) {
        free(s);
        return llm_error_set(err, ENOMEM, "out of memory");
    }
    s->bus = sd_bus_ref(c->bus);
    *ret = s;
    return 0;
}

void llm_session_free(struct llm_session *s)
{
    if (!s)
        return;
    /* Not waited for: there is nothing to be done about a daemon that does not answer. */
    sd_bus_call_method_async(s->bus, NULL, NULL, s->path, LLM_SESSION_INTERFACE, "Close", NULL,
                             NULL, NULL);
    sd_bus_unref(s->bus);
    free(s->path);
    free(s);
}

int llm_session_generate(struct llm_session *s, const struct llm_options *options, int *ret_fd,
                         uint64_t *ret_request, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    uint64_t request;
    int fd, r;

    r = call(s->bus, s->path, LLM_SESSION_INTERFACE, "Generate", options, &reply, err);
    if (r < 0)
        return r;
    r = sd_bus_message_read(reply, "ht", &fd, &request);
    if (r < 0)
        return llm_error_set(err, -r, "the daemon's answer cannot be read");
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 3); /* the first is the message's */
    if (fd < 0)
        return llm_error_set(err, errno, "%s", strerror(errno));
    *ret_fd = fd;
    if (ret_request)
        *ret_request = request;
    return 0;
}

int llm_session_cancel(struct llm_session *s, struct llm_error *err)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    int r;

    r = sd_bus_call_method(s->bus, NULL, s->path, LLM_SESSION_INTERFACE, "Cancel", &e, NULL, NULL);
    return r < 0 ? bus_failure(err, r, &e) : 0;
}

int llm_session_run(struct llm_session *s, const struct llm_options *options, llm_callback callback,
                    void *userdata, struct llm_error *err)
{
    struct llm_stream *stream;
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
        if (r < 0) {
            result = llm_error_set(err, -r, "the stream was cut: %s", strerror(-r));
            break;
        }
        if (event.type == LLM_ERROR) {
            int code = bus_error_code(event.name);

            result = llm_error_set(err, code > 0 ? code : EIO, "%s", event.message);
            if (err)
                snprintf(err->name, sizeof(err->name), "%s", event.name);
        }
        r = callback(&event, userdata);
        if (r < 0) {
            result = llm_error_set(err, -r, "stopped by the caller");
            break;
        }
    }
    llm_stream_free(stream);
    return result;
}
