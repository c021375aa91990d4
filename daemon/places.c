/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/places.h"

#include <errno.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/config.h"
#include "ipc/names.h"
#include "ipc/runtime-dir.h"

/* $NAME/llmd, else what is under the home directory. 0, -ENOMEM */
static int user_place(char **ret, const char *name, const char *under_home, const char *what)
{
    const char *base = getenv(name), *home = getenv("HOME");
    int r;

    if (base && base[0] == '/') { /* the specification: relative paths are to be ignored */
        r = asprintf(ret, "%s/llmd%s", base, what);
    } else {
        if (!home || home[0] != '/') {
            const struct passwd *me = getpwuid(geteuid());

            home = me ? me->pw_dir : "";
        }
        r = asprintf(ret, "%s/%s/llmd%s", home, under_home, what);
    }
    if (r < 0)
        *ret = NULL;
    return r < 0 ? -ENOMEM : 0;
}

/* Whoever needs it says what is wrong, when it is wrong then. */
void places_make_folder(const char *folder)
{
    CLEANUP(freep) char *path = strdup(folder);

    if (!path)
        return;
    for (char *at = path + 1; (at = strchr(at, '/')); at++) {
        *at = 0;
        mkdir(path, 0755);
        *at = '/';
    }
    mkdir(path, 0755);
}

static int find_socket(struct places *p, enum service_scope scope, struct error *err)
{
    CLEANUP(freep) char *dir = NULL;
    int r;

    if (scope == SCOPE_SYSTEM) {
        if (mkdir(LLM_SYSTEM_RUNTIME_DIR, 0755) == 0)
            chmod(LLM_SYSTEM_RUNTIME_DIR, 0755); /* whatever the umask: clients must get in */
        dir = strdup(LLM_SYSTEM_RUNTIME_DIR);
    } else {
        r = runtime_dir(&dir, err);
        if (r < 0)
            return r;
    }
    if (!dir || asprintf(&p->socket, "%s/%s", dir,
                         scope == SCOPE_PRIVATE ? LLM_PRIVATE_SOCKET : LLM_SOCKET) < 0) {
        p->socket = NULL;
        return error_set(err, ENOMEM, "out of memory");
    }
    return 0;
}

static int find_state(struct places *p, enum service_scope scope)
{
    const char *given = getenv("STATE_DIRECTORY"); /* systemd's; several are divided by ':' */
    int r = 0;

    if (scope == SCOPE_PRIVATE)
        return user_place(&p->cache, "XDG_CACHE_HOME", ".cache", "");
    if (given && given[0] == '/')
        p->state = strndup(given, strcspn(given, ":"));
    else if (scope == SCOPE_SYSTEM)
        p->state = strdup(LLMD_STATEDIR);
    else
        r = user_place(&p->state, "XDG_STATE_HOME", ".local/state", "");
    if (r < 0 || !p->state)
        return -ENOMEM;
    places_make_folder(p->state);
    p->cache = strdup(p->state);
    return p->cache ? 0 : -ENOMEM;
}

/* Where the build puts the demo model: beside the daemon's folder, for one that is not installed.
 */
static char *built_folder(void)
{
    char program[4096], *slash, *folder;
    ssize_t n = readlink("/proc/self/exe", program, sizeof(program) - 1);

    if (n <= 0)
        return NULL;
    program[n] = 0;
    slash = strrchr(program, '/');
    *slash = 0;
    return asprintf(&folder, "%s/../models", program) < 0 ? NULL : folder;
}

static int find_folders(struct places *p, enum service_scope scope, const struct config *config)
{
    p->folders = calloc(config->n_model_folders + 3, sizeof(*p->folders));
    if (!p->folders)
        return -ENOMEM;
    for (size_t i = 0; i < config->n_model_folders; i++) {
        p->folders[p->n_folders] = strdup(config->model_folders[i]);
        if (!p->folders[p->n_folders++])
            return -ENOMEM;
    }
    if (scope != SCOPE_SYSTEM) {
        if (user_place(&p->folders[p->n_folders], "XDG_DATA_HOME", ".local/share", "/models") < 0)
            return -ENOMEM;
        p->n_folders++;
        p->folders[p->n_folders] = built_folder();
        if (p->folders[p->n_folders])
            p->n_folders++;
    }
    p->folders[p->n_folders] = strdup(LLMD_DATADIR "/models");
    return p->folders[p->n_folders++] ? 0 : -ENOMEM;
}

int places_find(struct places *ret, enum service_scope scope, const struct config *config,
                const char *socket, struct error *err)
{
    struct places p = {0};
    int r = 0;

    if (socket) {
        p.socket = strdup(socket);
        r = p.socket ? 0 : error_set(err, ENOMEM, "out of memory");
    } else {
        r = find_socket(&p, scope, err);
    }
    if (r >= 0 && (find_state(&p, scope) < 0 || find_folders(&p, scope, config) < 0))
        r = error_set(err, ENOMEM, "out of memory");
    if (r < 0) {
        places_done(&p);
        return r;
    }
    *ret = p;
    return 0;
}

void places_done(struct places *p)
{
    free(p->socket);
    free(p->state);
    free(p->cache);
    for (size_t i = 0; i < p->n_folders; i++)
        free(p->folders[i]);
    free(p->folders);
    *p = (struct places){0};
}
