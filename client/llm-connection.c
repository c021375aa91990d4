/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Connections. A scope is a list of places, asked one after the other: nobody there means that the
 * next is asked, and so does a place that fails; but then its failure, which is worth more to
 * people than "nobody", is what they are told in the end.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "client/llm-internal.h"
#include "ipc/names.h"
#include "ipc/runtime-dir.h"

static int in_runtime_dir(const char *name, char **ret, struct llm_error *err)
{
    CLEANUP(freep) char *dir = NULL;
    struct error why;
    char *path;
    int r;

    r = runtime_dir(&dir, &why);
    if (r < 0)
        return llm_error_set(err, -r, "%s", why.text);
    if (asprintf(&path, "%s/%s", dir, name) < 0)
        return llm_error_set(err, ENOMEM, "out of memory");
    *ret = path;
    return 0;
}

int llm_default_socket(char **ret, struct llm_error *err)
{
    return in_runtime_dir(LLM_PRIVATE_SOCKET, ret, err);
}

/* Root makes /run/llmd and gives it to whom the service runs as. */
static bool is_trusted(uid_t uid, const char *path)
{
    static const char system_dir[] = LLM_SYSTEM_RUNTIME_DIR "/";
    struct stat st;

    if (uid == 0 || uid == geteuid())
        return true;
    return strncmp(path, system_dir, sizeof(system_dir) - 1) == 0 &&
           lstat(LLM_SYSTEM_RUNTIME_DIR, &st) == 0 && S_ISDIR(st.st_mode) && st.st_uid == uid;
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
    if (peer_of(fd, &peer) < 0 || !is_trusted(peer.uid, path))
        return llm_error_set(err, EPERM, "%s: who listens there is neither you nor root", path);
    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0) /* as sd-bus wants it */
        return llm_error_set(err, errno, "%s: %s", path, strerror(errno));
    return TAKE_FD(fd);
}

static int open_on_socket(sd_bus **ret, const char *path, struct llm_error *err)
{
    CLEANUP(sd_bus_flush_close_unrefp) sd_bus *bus = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    int fd, r;

    fd = open_socket(path, err);
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
    if (r == -ENOTCONN || r == -EPIPE || r == -ECONNRESET)
        return llm_error_set(err, ECONNRESET, "%s: llmd has closed the connection", path);
    if (r < 0)
        return llm_bus_failure(err, r, &e);
    *ret = TAKE_PTR(bus);
    return 0;
}

/* Not installed, or switched off by the administrator. */
static bool is_nobody_name(const sd_bus_error *e)
{
    static const char *const names[] = {
        SD_BUS_ERROR_SERVICE_UNKNOWN,
        SD_BUS_ERROR_NAME_HAS_NO_OWNER,
        "org.freedesktop.systemd1.NoSuchUnit",
        "org.freedesktop.systemd1.UnitMasked",
    };

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (sd_bus_error_has_name(e, names[i]))
            return true;
    return false;
}

static const char *bus_title(enum llm_scope scope)
{
    return scope == LLM_SCOPE_SYSTEM ? "system bus" : "session bus";
}

int llm_find_owner(sd_bus *bus, enum llm_scope scope, char owner[LLM_NAME_BYTES],
                   struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *reply = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    const char *sender;
    int r;

    r = sd_bus_call_method(bus, LLM_BUS_NAME, LLM_ROOT_PATH, "org.freedesktop.DBus.Peer", "Ping",
                           &e, &reply, NULL);
    if (r < 0 && is_nobody_name(&e))
        return llm_error_set(err, ENOENT, "nobody is %s on the %s", LLM_BUS_NAME, bus_title(scope));
    if (r < 0)
        return llm_bus_failure(err, r, &e);
    sender = sd_bus_message_get_sender(reply);
    if (!sender || strlen(sender) >= LLM_NAME_BYTES)
        return llm_bad_answer(err);
    strcpy(owner, sender);
    return 0;
}

static int open_on_bus(sd_bus **ret, enum llm_scope scope, char owner[LLM_NAME_BYTES],
                       struct llm_error *err)
{
    CLEANUP(sd_bus_flush_close_unrefp) sd_bus *bus = NULL;
    const char *unique;
    int r;

    r = scope == LLM_SCOPE_SYSTEM ? sd_bus_open_system(&bus) : sd_bus_open_user(&bus);
    if (r >= 0)
        r = sd_bus_get_unique_name(bus, &unique); /* waits until the bus has taken us */
    if (r == -ENOMEM)
        return llm_error_set(err, ENOMEM, "out of memory");
    if (r < 0)
        return llm_error_set(err, ENOENT, "no %s: %s", bus_title(scope), strerror(-r));
    r = llm_find_owner(bus, scope, owner, err);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(bus);
    return 0;
}

int llm_open(const struct llm_connection *c, sd_bus **ret, char owner[LLM_NAME_BYTES],
             struct llm_error *err)
{
    return c->socket ? open_on_socket(ret, c->socket, err) : open_on_bus(ret, c->scope, owner, err);
}

static bool has_end(const char *text, const char *end)
{
    size_t n = strlen(text), n_end = strlen(end);

    return n >= n_end && strcmp(text + n - n_end, end) == 0;
}

/* Takes *socket (NULL: a bus). */
static int connection_new(struct llm_connection **ret, enum llm_scope scope, char **socket,
                          struct llm_error *err)
{
    struct llm_connection *c = calloc(1, sizeof(*c));
    int r;

    if (!c)
        return llm_error_set(err, ENOMEM, "out of memory");
    c->n_refs = 1;
    c->scope = scope;
    c->socket = TAKE_PTR(*socket);
    c->destination = c->socket ? NULL : LLM_BUS_NAME;
    c->is_private = c->socket && has_end(c->socket, "/" LLM_PRIVATE_SOCKET);
    r = llm_open(c, &c->bus, c->owner, err);
    if (r < 0) {
        llm_connection_unref(c);
        return r;
    }
    *ret = c;
    return 0;
}

/* The path must be good later as well, in whatever folder the program is then. */
static int connect_socket(struct llm_connection **ret, const char *path, enum llm_scope scope,
                          struct llm_error *err)
{
    CLEANUP(freep) char *folder = NULL, *absolute = NULL;

    if (path[0] != '/') {
        folder = getcwd(NULL, 0);
        if (!folder)
            return llm_error_set(err, errno, "%s: %s", path, strerror(errno));
    }
    if (asprintf(&absolute, "%s%s%s", folder ? folder : "", folder ? "/" : "", path) < 0) {
        absolute = NULL;
        return llm_error_set(err, ENOMEM, "out of memory");
    }
    return connection_new(ret, scope, &absolute, err);
}

static int connect_bus(struct llm_connection **ret, enum llm_scope scope, struct llm_error *err)
{
    char *nothing = NULL;

    return connection_new(ret, scope, &nothing, err);
}

int llm_connect(struct llm_connection **ret, const char *socket_path, struct llm_error *err)
{
    if (socket_path)
        return connect_socket(ret, socket_path, LLM_SCOPE_ANY, err);
    return llm_connect_scope(ret, LLM_SCOPE_PRIVATE, err);
}

/* ---- scopes ---- */

static int connect_user_socket(struct llm_connection **ret, enum llm_scope scope,
                               struct llm_error *err)
{
    CLEANUP(freep) char *path = NULL;
    int r;

    r = in_runtime_dir(scope == LLM_SCOPE_USER ? LLM_SOCKET : LLM_PRIVATE_SOCKET, &path, err);
    return r < 0 ? r : connect_socket(ret, path, scope, err);
}

static int connect_system_socket(struct llm_connection **ret, enum llm_scope scope,
                                 struct llm_error *err)
{
    return connect_socket(ret, LLM_SYSTEM_RUNTIME_DIR "/" LLM_SOCKET, scope, err);
}

static const struct place {
    enum llm_scope scope;
    int (*connect)(struct llm_connection **ret, enum llm_scope scope, struct llm_error *err);
} places[] = {
    {LLM_SCOPE_SYSTEM, connect_system_socket}, {LLM_SCOPE_SYSTEM, connect_bus},
    {LLM_SCOPE_USER, connect_user_socket},     {LLM_SCOPE_USER, connect_bus},
    {LLM_SCOPE_PRIVATE, connect_user_socket},
};

static bool is_nobody(int r)
{
    return r == -ENOENT || r == -ECONNREFUSED || r == -ECONNRESET;
}

int llm_connect_scope(struct llm_connection **ret, enum llm_scope scope, struct llm_error *err)
{
    struct llm_error nobody = {0}, failure = {0}, e;
    int result = -EINVAL;
    size_t used = 0;

    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        const struct place *p = &places[i];
        int r;

        if (scope != LLM_SCOPE_ANY && scope != p->scope)
            continue;
        r = p->connect(ret, p->scope, &e);
        if (r >= 0)
            return 0;
        if (!is_nobody(r)) {
            if (!failure.message[0]) {
                failure = e;
                result = r;
            }
            continue;
        }
        if (!failure.message[0])
            result = r;
        if (used < sizeof(nobody.message))
            used += (size_t)snprintf(nobody.message + used, sizeof(nobody.message) - used, "%s%s",
                                     used > 0 ? "; " : "", e.message);
    }
    if (!failure.message[0] && !nobody.message[0])
        return llm_error_set(err, EINVAL, "%d is not a scope", (int)scope);
    if (err)
        *err = failure.message[0] ? failure : nobody;
    return result;
}

enum llm_scope llm_connection_scope(const struct llm_connection *c)
{
    return c->scope;
}

struct sd_bus *llm_connection_bus(struct llm_connection *c)
{
    return c->bus;
}

const char *llm_connection_destination(const struct llm_connection *c)
{
    return c->destination;
}

void llm_disconnect(struct llm_connection *c)
{
    if (!c)
        return;
    c->bus = sd_bus_flush_close_unref(c->bus);
    llm_connection_unref(c);
}

struct llm_connection *llm_connection_unref(struct llm_connection *c)
{
    if (--c->n_refs > 0)
        return NULL;
    sd_bus_flush_close_unref(c->bus);
    free(c->socket);
    free(c);
    return NULL;
}

/* ---- what the daemon tells of itself ---- */

static int read_text(sd_bus_message *m, char *out, size_t n)
{
    const char *value;
    int r;

    r = sd_bus_message_read(m, "v", "s", &value);
    if (r < 0)
        return r;
    snprintf(out, n, "%s", value);
    return 0;
}

static int read_first(sd_bus_message *m, char *out, size_t n)
{
    const char *value = "";
    int r;

    if ((r = sd_bus_message_enter_container(m, 'v', "as")) < 0 ||
        (r = sd_bus_message_enter_container(m, 'a', "s")) < 0 ||
        (r = sd_bus_message_read(m, "s", &value)) < 0)
        return r;
    snprintf(out, n, "%s", value);
    while (r > 0)
        r = sd_bus_message_read(m, "s", &value);
    if (r < 0 || (r = sd_bus_message_exit_container(m)) < 0)
        return r;
    return sd_bus_message_exit_container(m);
}

static int read_property(sd_bus_message *m, const char *name, struct llm_status *s)
{
    if (strcmp(name, "Version") == 0)
        return read_text(m, s->version, sizeof(s->version));
    if (strcmp(name, "State") == 0)
        return read_text(m, s->state, sizeof(s->state));
    if (strcmp(name, "Model") == 0)
        return read_text(m, s->model, sizeof(s->model));
    if (strcmp(name, "DefaultModel") == 0)
        return read_text(m, s->default_model, sizeof(s->default_model));
    if (strcmp(name, "Backends") == 0)
        return read_first(m, s->backend, sizeof(s->backend));
    if (strcmp(name, "LoadProgress") == 0)
        return sd_bus_message_read(m, "v", "d", &s->load_progress);
    if (strcmp(name, "Sessions") == 0)
        return sd_bus_message_read(m, "v", "u", &s->sessions);
    if (strcmp(name, "KvBytesUsed") == 0)
        return sd_bus_message_read(m, "v", "t", &s->kv_bytes_used);
    if (strcmp(name, "KvBytesMax") == 0)
        return sd_bus_message_read(m, "v", "t", &s->kv_bytes_max);
    return sd_bus_message_skip(m, "v");
}

int llm_get_status(struct llm_connection *c, struct llm_status *ret, struct llm_error *err)
{
    CLEANUP(sd_bus_message_unrefp) sd_bus_message *m = NULL, *reply = NULL;
    struct llm_status s = {0};
    const char *name;
    int r;

    r = llm_call_new(c, &m, LLM_ROOT_PATH, "org.freedesktop.DBus.Properties", "GetAll", err);
    if (r < 0)
        return r;
    r = sd_bus_message_append(m, "s", LLM_MANAGER_INTERFACE);
    if (r < 0)
        return llm_bus_failure(err, r, &SD_BUS_ERROR_NULL);
    r = llm_call_message(c, NULL, m, NULL, NULL, &reply, err);
    if (r < 0)
        return r;
    r = sd_bus_message_enter_container(reply, 'a', "{sv}");
    while (r >= 0 && (r = sd_bus_message_enter_container(reply, 'e', "sv")) > 0) {
        r = sd_bus_message_read(reply, "s", &name);
        if (r >= 0)
            r = read_property(reply, name, &s);
        if (r >= 0)
            r = sd_bus_message_exit_container(reply);
    }
    if (r < 0)
        return llm_bad_answer(err);
    *ret = s;
    return 0;
}
