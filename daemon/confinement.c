/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What is asked for later must be ready before: libraries cannot be loaded any more (no memory can
 * be made executable), so those that the C library and OpenSSL load when first needed are loaded
 * here.
 */

#include "daemon/confinement.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <pwd.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/arguments.h"
#include "daemon/config.h"
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

/* In a folder of models may be links to elsewhere; those that are there now lead where they do. */
static int allow_models(struct sandbox *b, const struct service *s, const struct places *places)
{
    const char *given[] = {s->arguments->model, s->config->model};
    int r = 0;

    for (size_t i = 0; i < places->n_folders && r >= 0; i++)
        r = sandbox_allow_path(b, places->folders[i], SANDBOX_READ, NULL);
    for (size_t i = 0; i < model_store_n(s->models) && r >= 0; i++)
        r = sandbox_allow_path(b, model_store_get(s->models, i)->path, SANDBOX_READ_FILES, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(given) && r >= 0; i++)
        if (given[i]) /* a name, too, may be a file of the current folder */
            r = sandbox_allow_path(b, given[i], SANDBOX_READ_FILES, NULL);
    return r;
}

static bool is_abstract(const char *address)
{
    return address && (address[0] == '@' || strstr(address, "unix:abstract="));
}

static int allow_sockets(struct sandbox *b, const struct service *s, const struct places *places)
{
    bool abstract = is_abstract(getenv("NOTIFY_SOCKET"));
    int r;

    if (s->scope == SCOPE_USER)
        abstract = abstract || is_abstract(getenv("DBUS_SESSION_BUS_ADDRESS"));
    else if (s->scope == SCOPE_SYSTEM)
        abstract = abstract || is_abstract(getenv("DBUS_SYSTEM_BUS_ADDRESS"));
    if (abstract)
        sandbox_allow_abstract_sockets(b);
    r = allow_folder_of(b, places->socket, SANDBOX_SOCKET);
    if (r >= 0 && s->scope != SCOPE_PRIVATE)
        r = sandbox_allow_calls(b, &seccomp_llmd_bus);
    return r;
}

int confine_daemon(const struct service *s, const struct places *places, struct error *err)
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
        (r = allow_models(b, s, places)) < 0 || (r = allow_sockets(b, s, places)) < 0 ||
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
