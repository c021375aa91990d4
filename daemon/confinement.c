/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What is asked for later must be ready before: libraries cannot be loaded any more (no memory can
 * be made executable), so those that the C library and OpenSSL load when first needed are loaded
 * here.
 */

#include "daemon/confinement.h"

#include <dirent.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/arguments.h"
#include "daemon/config.h"
#include "daemon/gpu.h"
#include "daemon/log.h"
#include "daemon/model-store.h"
#include "daemon/places.h"
#include "daemon/sandbox.h"

/* For the names of users in a configuration that is read again, as the C library looks them up. */
#define NO_USER "llmd-no-such-user"

static void load_libraries(const struct service *s)
{
    /* Who is nowhere is asked for everywhere. */
    if (s->scope != SCOPE_PRIVATE)
        (void)getpwnam(NO_USER);
    OPENSSL_init_crypto(OPENSSL_INIT_LOAD_CONFIG | OPENSSL_INIT_ADD_ALL_DIGESTS, NULL);
}

/* path without its last part. 0, -ENOMEM */
static int allow_folder_of(struct sandbox *b, const char *path, enum sandbox_access access)
{
    const char *slash = strrchr(path, '/');
    CLEANUP(freep)
    char *folder = slash > path ? strndup(path, (size_t)(slash - path)) : strdup(slash ? "/" : ".");

    return folder ? sandbox_allow_path(b, folder, access, NULL) : -ENOMEM;
}

static int allow_system(struct sandbox *b, const struct service *s)
{
    static const char *const files[] = {
        "/proc",                   /* start times of clients, our cgroup */
        "/sys/devices/system/cpu", /* which CPUs share a core */
        "/sys/fs/cgroup",          /* quotas */
    };
    int r = 0;

    for (size_t i = 0; i < ARRAY_SIZE(files) && r >= 0; i++)
        r = sandbox_allow_path(b, files[i], SANDBOX_READ_FILES, NULL);
    if (r < 0 || s->scope == SCOPE_PRIVATE)
        return r;
    /* Names of users: files are replaced by others, so the folder it is. */
    r = sandbox_allow_path(b, "/etc", SANDBOX_READ, NULL);
    return r < 0 ? r : sandbox_allow_path(b, "/run/systemd/userdb", SANDBOX_READ, NULL);
}

static int allow_configuration(struct sandbox *b, const struct service *s)
{
    CLEANUP(config_folders_done) struct config_folders folders = {0};
    int r;

    /* The file's folder: who edits a file often puts another one in its place. */
    if (s->arguments->config_file)
        return allow_folder_of(b, s->arguments->config_file, SANDBOX_READ);
    r = config_folders_find(&folders, s->scope);
    for (size_t i = 0; i < folders.n && r >= 0; i++)
        r = sandbox_allow_path(b, folders.paths[i], SANDBOX_READ, NULL);
    return r;
}

/* Links to elsewhere; those that are there now lead where they do. 0, -ENOMEM */
static int allow_links(struct sandbox *b, const char *folder)
{
    CLEANUP(closedirp) DIR *dir = opendir(folder);
    const struct dirent *d;
    int r = 0;

    while (dir && r >= 0 && (d = readdir(dir))) {
        CLEANUP(freep) char *path = NULL;

        if ((d->d_type != DT_LNK && d->d_type != DT_UNKNOWN) || !model_store_is_model(d->d_name))
            continue;
        if (asprintf(&path, "%s/%s", folder, d->d_name) < 0) {
            path = NULL;
            return -ENOMEM;
        }
        r = sandbox_allow_path(b, path, SANDBOX_READ_FILE, NULL);
    }
    return r;
}

/* The folders are not asked the store for: it reads what is in the files, and so comes later. */
static int allow_models(struct sandbox *b, const struct service *s, const struct places *places)
{
    const char *given[] = {s->arguments->model, s->config->model};
    CLEANUP(freep) char *installed = NULL;
    int r = 0;

    if (places->state && asprintf(&installed, "%s/models", places->state) < 0) {
        installed = NULL;
        return -ENOMEM;
    }
    if (installed)
        r = allow_links(b, installed);
    for (size_t i = 0; i < places->n_folders && r >= 0; i++) {
        r = sandbox_allow_path(b, places->folders[i], SANDBOX_READ, NULL);
        if (r >= 0)
            r = allow_links(b, places->folders[i]);
    }
    for (size_t i = 0; i < ARRAY_SIZE(given) && r >= 0; i++)
        if (given[i]) /* a name, too, may be a file of the current folder */
            r = sandbox_allow_path(b, given[i], SANDBOX_READ_FILE, NULL);
    return r;
}

static int digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* The sockets of a list of D-Bus addresses, "unix:path=/a%20b,guid=...;unix:abstract=c". */
static int allow_bus(struct sandbox *b, const char *list)
{
    int r = 0;

    while (list && *list && r >= 0) {
        const char *end = strchrnul(list, ';'), *at = list;
        char path[sizeof(((struct sockaddr_un *)NULL)->sun_path) + 1];
        bool abstract = false, found = false;
        size_t n = 0;

        if (strncmp(at, "unix:", 5) == 0)
            for (at += 5; at < end && !found; at = MIN(end, strchrnul(at, ',') + 1)) {
                abstract = strncmp(at, "abstract=", 9) == 0;
                found = abstract || strncmp(at, "path=", 5) == 0;
                if (found)
                    break;
            }
        if (found) {
            if (abstract)
                path[n++] = '@';
            for (at += abstract ? 9 : 5; at < end && *at != ',' && n < sizeof(path) - 1; at++) {
                if (*at == '%' && digit(at[1]) >= 0 && digit(at[2]) >= 0) {
                    path[n++] = (char)(digit(at[1]) * 16 + digit(at[2]));
                    at += 2;
                } else {
                    path[n++] = *at;
                }
            }
            path[n] = 0;
            if (abstract)
                sandbox_allow_abstract_sockets(b);
            r = sandbox_allow_connect(b, path);
        }
        list = *end ? end + 1 : end;
    }
    return r;
}

/* As sd-bus finds them. */
static int allow_buses(struct sandbox *b, enum service_scope scope)
{
    const char *runtime = getenv("XDG_RUNTIME_DIR"), *list;
    CLEANUP(freep) char *path = NULL;
    int r;

    list = getenv(scope == SCOPE_SYSTEM ? "DBUS_SYSTEM_BUS_ADDRESS" : "DBUS_SESSION_BUS_ADDRESS");
    if (list)
        return allow_bus(b, list);
    if (scope == SCOPE_SYSTEM) {
        r = sandbox_allow_connect(b, "/run/dbus/system_bus_socket");
        return r < 0 ? r : sandbox_allow_connect(b, "/var/run/dbus/system_bus_socket");
    }
    if (!runtime)
        return 0;
    if (asprintf(&path, "%s/bus", runtime) < 0) {
        path = NULL;
        return -ENOMEM;
    }
    return sandbox_allow_connect(b, path);
}

/* Of those that the C library asks for the names of users. */
static int allow_name_services(struct sandbox *b)
{
    static const char *const paths[] = {
        "/run/systemd/userdb/io.systemd.Multiplexer",
        "/run/systemd/userdb/io.systemd.NameServiceSwitch",
        "/run/systemd/userdb/io.systemd.DynamicUser",
        "/run/systemd/userdb/io.systemd.Home",
        "/run/systemd/userdb/io.systemd.Machine",
        "/run/systemd/userdb/io.systemd.DropIn",
        "/var/run/nscd/socket",
        "/var/lib/sss/pipes/nss",
        "/var/run/nslcd/socket",
    };
    int r = 0;

    for (size_t i = 0; i < ARRAY_SIZE(paths) && r >= 0; i++)
        r = sandbox_allow_connect(b, paths[i]);
    return r;
}

static int allow_sockets(struct sandbox *b, const struct service *s, const struct places *places)
{
    const char *notify = getenv("NOTIFY_SOCKET");
    int r;

    if (notify && notify[0] == '@')
        sandbox_allow_abstract_sockets(b);
    r = allow_folder_of(b, places->socket, SANDBOX_SOCKET);
    if (r >= 0 && s->scope != SCOPE_PRIVATE)
        r = allow_buses(b, s->scope);
    if (r >= 0 && s->scope != SCOPE_PRIVATE)
        r = allow_name_services(b);
    return r;
}

int confine_daemon(const struct service *s, const struct places *places, const struct gpu *gpu,
                   struct error *err)
{
    CLEANUP(sandbox_freep) struct sandbox *b = NULL;
    enum sandbox_mode mode = s->arguments->has_sandbox ? s->arguments->sandbox : s->config->sandbox;
    struct error lacks = {0};
    int r;

    if (mode == SANDBOX_OFF) {
        log_warning("the sandbox is off: whoever takes over this process can do what its user can");
        return 0;
    }
    load_libraries(s);
    if ((r = sandbox_new(&b, mode)) < 0 || (r = sandbox_allow_calls(b, &seccomp_llmd)) < 0 ||
        (r = allow_system(b, s)) < 0 || (r = allow_configuration(b, s)) < 0 ||
        (r = allow_models(b, s, places)) < 0 || (r = gpu_allow(gpu, b)) < 0 ||
        (r = allow_sockets(b, s, places)) < 0 ||
        (places->state && (r = sandbox_allow_path(b, places->state, SANDBOX_WRITE, NULL)) < 0))
        return error_set(err, -r, "out of memory");
    if (log_goes_to_journal())
        sandbox_tell_journal(b, "llmd", LOG_ID_SANDBOX);
    else
        sandbox_tell_stderr(b, "llmd", log_has_prefixes());
    r = sandbox_enter(b, &lacks, err);
    if (r < 0)
        return error_prefix(err, -r, "the sandbox (--sandbox=off goes without)");
    if (lacks.text[0])
        log_warning("the sandbox has to go without what is missing here: %s", lacks.text);
    if (mode == SANDBOX_REPORT)
        log_warning("the sandbox is off and only reports what it would refuse");
    return 0;
}
