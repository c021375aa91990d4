/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * One table says which keys there are, what they accept and where their values go; reading, the
 * warnings and the comparison of two configurations walk over it. libinih cuts lines into section,
 * key and value; it is fed line by line here, because it tells its handler no line numbers, is
 * silent about what it cuts off, and takes indented lines for continuations.
 */

#include "daemon/config.h"

#include <dirent.h>
#include <errno.h>
#include <ini.h>
#include <limits.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/number.h"
#include "daemon/log.h"

#define LINE_BYTES_MAX 190u /* libinih's buffer has 200 with its own */
#define FILE_LINES_MAX 100000u
#define USERS_MAX 10000u
#define FOLDERS_MAX 64u

enum value_type {
    VALUE_TEXT, /* char *; "" is NULL */
    VALUE_FOLDERS,
    VALUE_U32,
    VALUE_BYTES,   /* uint64_t, with K, M, G, T */
    VALUE_SECONDS, /* uint64_t usec; "infinity" is 0 */
    VALUE_BOOL,
    VALUE_CPU_LEVEL, /* char *; "" or "auto" is NULL */
    VALUE_ACTIVATIONS,
    VALUE_KV_TYPE,
    VALUE_BACKEND,
    VALUE_LOG_LEVEL,
    VALUE_SANDBOX,
};

struct key {
    const char *section, *name;
    enum value_type type;
    size_t offset; /* in struct config; for limits in struct user_limits */
    uint64_t least, most;
    bool live; /* a reload applies it; else a restart is needed */
};

#define AT(member) offsetof(struct config, member)
#define LIMIT(member) offsetof(struct user_limits, member)
static const struct key keys[] = {
    {"Model", "Default", VALUE_TEXT, AT(model)},
    {"Model", "Folder", VALUE_FOLDERS, AT(model_folders)},
    {"Model", "Prefetch", VALUE_BOOL, AT(prefetch)},
    {"Engine", "Threads", VALUE_U32, AT(n_threads), 0, 4096},
    {"Engine", "PinThreads", VALUE_BOOL, AT(pin_threads)},
    {"Engine", "CpuLevel", VALUE_CPU_LEVEL, AT(cpu_level)},
    {"Engine", "Activations", VALUE_ACTIVATIONS, AT(activations)},
    {"Engine", "KvType", VALUE_KV_TYPE, AT(kv_type)},
    {"Engine", "KvBytes", VALUE_BYTES, AT(kv_bytes), 0, UINT64_C(1) << 46},
    {"Engine", "Backend", VALUE_BACKEND, AT(backend)},
    {"Engine", "Device", VALUE_TEXT, AT(device)},
    {"Engine", "UseGpuOnBattery", VALUE_BOOL, AT(gpu_on_battery)},
    {"Daemon", "Context", VALUE_U32, AT(context), 0, 1u << 24},
    {"Daemon", "IdleTimeoutSec", VALUE_SECONDS, AT(idle_usec), .live = true},
    {"Daemon", "LingerTimeoutSec", VALUE_SECONDS, AT(linger_usec), .live = true},
    {"Daemon", "LogLevel", VALUE_LOG_LEVEL, AT(log_level), .live = true},
    {"Daemon", "Sandbox", VALUE_SANDBOX, AT(sandbox)},
    {"Daemon", "MaxConnections", VALUE_U32, AT(max_connections), 1, 100000, .live = true},
};
static const struct key limit_keys[] = {
    {"Limits", "MaxSessions", VALUE_U32, LIMIT(max_sessions), 0, 1000000, true},
    {"Limits", "MaxKvBytes", VALUE_BYTES, LIMIT(max_kv_bytes), 0, UINT64_C(1) << 46, true},
    {"Limits", "MaxQueued", VALUE_U32, LIMIT(max_queued), 0, 1000000, true},
    {"Limits", "Weight", VALUE_U32, LIMIT(weight), 1, USER_WEIGHT_MAX, true},
    {"Limits", "TokensPerMinute", VALUE_U32, LIMIT(tokens_per_minute), 0, UINT32_MAX, true},
    {"Limits", "MaxConnections", VALUE_U32, LIMIT(max_connections), 0, 100000, true},
};
static const char *const sections[] = {"Model", "Engine", "Daemon", "Limits"};

/* ---- what is being read ---- */

struct reader {
    struct config *config;
    config_warning say;
    FILE *file;
    const char *path;
    uint32_t line;
    char *buffer;
    size_t allocated;
    bool wants_value; /* the line given to libinih is no comment and no section */
    bool out_of_memory;

    char section[LINE_BYTES_MAX + 1]; /* the last one judged */
    bool skip;                        /* that section is none of ours, and that was said */
    struct user_entry *user;          /* [User ...]: its entry */
};

__attribute__((format(printf, 2, 3))) static void warn(struct reader *r, const char *format, ...)
{
    char text[1024];
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    r->config->n_warnings++;
    if (r->say) {
        char line[PATH_MAX + 1100];

        snprintf(line, sizeof(line), "%s:%u: %s", r->path, r->line, text);
        r->say(line);
    } else {
        log_warning("%s:%u: %s", r->path, r->line, text);
    }
}

/* ---- values ---- */

int config_parse_seconds(const char *text, uint64_t *ret_usec)
{
    static const struct {
        const char *name;
        uint64_t usec;
    } units[] = {{"", 1000000},     {"ms", 1000},      {"s", 1000000},
                 {"min", 60000000}, {"h", 3600000000}, {"d", 86400000000}};
    const char *end;
    uint64_t v;

    if (strcmp(text, "infinity") == 0) {
        *ret_usec = 0;
        return 0;
    }
    if (number_begin(text, &v, &end) < 0)
        return -EINVAL;
    for (size_t i = 0; i < ARRAY_SIZE(units); i++)
        if (strcmp(end, units[i].name) == 0) {
            if (ckd_mul(&v, v, units[i].usec) || v > INT64_MAX / 2)
                return -EINVAL;
            *ret_usec = v;
            return 0;
        }
    return -EINVAL;
}

static int parse_bool(const char *text, bool *ret)
{
    static const char *const words[] = {"no", "yes", "false", "true", "off", "on", "0", "1"};

    for (size_t i = 0; i < ARRAY_SIZE(words); i++)
        if (strcmp(text, words[i]) == 0) {
            *ret = i % 2;
            return 0;
        }
    return -EINVAL;
}

static const char *const log_levels[] = {[LOG_ERR] = "err",
                                         [LOG_WARNING] = "warning",
                                         [LOG_NOTICE] = "notice",
                                         [LOG_INFO] = "info",
                                         [LOG_DEBUG] = "debug"};

static int parse_log_level(const char *text, int *ret)
{
    for (size_t i = 0; i < ARRAY_SIZE(log_levels); i++)
        if (log_levels[i] && strcmp(text, log_levels[i]) == 0) {
            *ret = (int)i;
            return 0;
        }
    return -EINVAL;
}

static const char *accepted(const struct key *k, char *out, size_t n)
{
    switch (k->type) {
    case VALUE_TEXT:
        return "a name";
    case VALUE_FOLDERS:
        return "an absolute path";
    case VALUE_U32:
        snprintf(out, n, "a number from %llu to %llu", (unsigned long long)k->least,
                 (unsigned long long)k->most);
        return out;
    case VALUE_BYTES:
        return "a number of bytes, with K, M, G or T behind it for powers of 1024";
    case VALUE_SECONDS:
        return "a number of seconds, or with ms, min, h or d behind it, or infinity";
    case VALUE_BOOL:
        return "yes or no";
    case VALUE_CPU_LEVEL:
        return "auto, reference, avx2, avx512 or amx";
    case VALUE_ACTIVATIONS:
        return "int8 or f32";
    case VALUE_KV_TYPE:
        return "auto, f16 or f32";
    case VALUE_BACKEND:
        return "auto, cpu, vulkan or hybrid";
    case VALUE_LOG_LEVEL:
        return "err, warning, notice, info or debug";
    case VALUE_SANDBOX:
        return "strict, report or off";
    }
    return "";
}

static int set_text(char **at, const char *value)
{
    char *copy = NULL;

    if (value[0]) {
        copy = strdup(value);
        if (!copy)
            return -ENOMEM;
    }
    free(*at);
    *at = copy;
    return 0;
}

static void clear_folders(struct config *c)
{
    for (size_t i = 0; i < c->n_model_folders; i++)
        free(c->model_folders[i]);
    free(TAKE_PTR(c->model_folders));
    c->n_model_folders = 0;
}

static int add_folder(struct config *c, const char *value)
{
    char **more, *copy;

    if (!value[0]) {
        clear_folders(c); /* as systemd has it: an empty value takes back those before */
        return 0;
    }
    if (value[0] != '/' || c->n_model_folders >= FOLDERS_MAX)
        return -EINVAL;
    copy = strdup(value);
    more = reallocarray(c->model_folders, c->n_model_folders + 1, sizeof(*more));
    if (more)
        c->model_folders = more;
    if (!copy || !more) {
        free(copy);
        return -ENOMEM;
    }
    more[c->n_model_folders++] = copy;
    return 0;
}

/* 0, -EINVAL: nothing changed, -ENOMEM */
static int set_value(struct config *c, void *base, const struct key *k, const char *value)
{
    static const char *const levels[] = {"reference", "avx2", "avx512", "amx"};
    void *at = (char *)base + k->offset;
    uint64_t v;

    switch (k->type) {
    case VALUE_TEXT:
        return set_text(at, value);
    case VALUE_FOLDERS:
        return add_folder(c, value);
    case VALUE_U32:
        if (number_parse(value, k->most, &v) < 0 || v < k->least)
            return -EINVAL;
        *(uint32_t *)at = (uint32_t)v;
        return 0;
    case VALUE_BYTES:
        if (number_parse_bytes(value, &v) < 0 || v < k->least || v > k->most)
            return -EINVAL;
        *(uint64_t *)at = v;
        return 0;
    case VALUE_SECONDS:
        return config_parse_seconds(value, at);
    case VALUE_BOOL:
        return parse_bool(value, at);
    case VALUE_CPU_LEVEL:
        if (strcmp(value, "auto") == 0)
            return set_text(at, "");
        for (size_t i = 0; i < ARRAY_SIZE(levels); i++)
            if (strcmp(value, levels[i]) == 0)
                return set_text(at, value);
        return -EINVAL;
    case VALUE_ACTIVATIONS:
        if (strcmp(value, "int8") != 0 && strcmp(value, "f32") != 0)
            return -EINVAL;
        *(enum activation_type *)at = value[0] == 'i' ? ACTIVATIONS_INT8 : ACTIVATIONS_F32;
        return 0;
    case VALUE_KV_TYPE:
        if (strcmp(value, "auto") == 0)
            *(enum kv_type *)at = KV_AUTO;
        else if (strcmp(value, "f16") == 0)
            *(enum kv_type *)at = KV_F16;
        else if (strcmp(value, "f32") == 0)
            *(enum kv_type *)at = KV_F32;
        else
            return -EINVAL;
        return 0;
    case VALUE_BACKEND:
        return placement_mode_parse(value, at);
    case VALUE_LOG_LEVEL:
        return parse_log_level(value, at);
    case VALUE_SANDBOX:
        return sandbox_parse_mode(value, at);
    }
    return -EINVAL;
}

/* ---- sections and lines ---- */

static int uid_of(const char *name, uid_t *ret)
{
    const struct passwd *user;
    uint64_t v;

    if (number_parse(name, UINT64_MAX, &v) == 0) {
        if (v >= UINT32_MAX) /* (uid_t)-1 is nobody's */
            return -EINVAL;
        *ret = (uid_t)v;
        return 0;
    }
    user = getpwnam(name);
    if (!user)
        return -ESRCH;
    *ret = user->pw_uid;
    return 0;
}

static struct user_entry *find_user(const struct config *c, uid_t uid)
{
    for (size_t i = 0; i < c->n_users; i++)
        if (c->users[i].uid == uid)
            return &c->users[i];
    return NULL;
}

static struct user_entry *add_user(struct config *c, uid_t uid)
{
    struct user_entry *u = find_user(c, uid);

    if (u)
        return u;
    u = reallocarray(c->users, c->n_users + 1, sizeof(*u));
    if (!u)
        return NULL;
    c->users = u;
    u = &c->users[c->n_users++];
    *u = (struct user_entry){.uid = uid};
    return u;
}

static void enter_section(struct reader *r, const char *section)
{
    uid_t uid;

    snprintf(r->section, sizeof(r->section), "%s", section);
    r->skip = false;
    r->user = NULL;
    for (size_t i = 0; i < ARRAY_SIZE(sections); i++)
        if (strcmp(section, sections[i]) == 0)
            return;
    r->skip = true;
    if (strncmp(section, "User ", 5) == 0) {
        const char *name = section + 5 + strspn(section + 5, " ");

        if (uid_of(name, &uid) < 0) {
            warn(r,
                 "[User %s]: there is no such user; the section is ignored (accepted: the name "
                 "of a user, or a uid)",
                 name);
            return;
        }
        if (r->config->n_users >= USERS_MAX) {
            warn(r, "[User %s]: there are %u such sections already; ignored", name, USERS_MAX);
            return;
        }
        r->user = add_user(r->config, uid);
        r->skip = !r->user;
        r->out_of_memory = r->out_of_memory || !r->user;
        return;
    }
    if (section[0])
        warn(r,
             "[%s]: no such section; it is ignored (accepted: Model, Engine, Daemon, Limits, "
             "User NAME)",
             section);
    else
        warn(r, "this stands before any [Section]; ignored");
}

static void unknown_key(struct reader *r, const char *section, const char *name,
                        const struct key *table, size_t n)
{
    char known[512] = "";
    size_t at = 0;

    for (size_t i = 0; i < n; i++)
        if (strcmp(table[i].section, section) == 0)
            at += (size_t)snprintf(known + at, sizeof(known) - at, "%s%s", at ? ", " : "",
                                   table[i].name);
    warn(r, "[%s] %s=: no such key; ignored (accepted: %s)", r->section, name, known);
}

static int on_value(void *userdata, const char *section, const char *name, const char *value)
{
    struct reader *r = userdata;
    bool is_limit = r->user || strcmp(section, "Limits") == 0;
    const struct key *table = is_limit ? limit_keys : keys;
    size_t n = is_limit ? ARRAY_SIZE(limit_keys) : ARRAY_SIZE(keys);
    const char *in_table = is_limit ? "Limits" : section;
    char text[128];
    int error;

    r->wants_value = false;
    if (r->skip)
        return 1;
    for (size_t i = 0; i < n; i++) {
        const struct key *k = &table[i];
        void *base = r->config;

        if (strcmp(k->section, in_table) != 0 || strcmp(k->name, name) != 0)
            continue;
        if (is_limit)
            base = r->user ? &r->user->limits : &r->config->limits;
        error = set_value(r->config, base, k, value);
        if (error == -ENOMEM)
            r->out_of_memory = true;
        else if (error < 0)
            warn(r, "[%s] %s=%s: not understood; ignored (accepted: %s)", r->section, name, value,
                 accepted(k, text, sizeof(text)));
        else if (r->user)
            r->user->set |= 1u << i;
        return 1;
    }
    unknown_key(r, in_table, name, table, n);
    return 1;
}

/* libinih's fgets(): one line of the file, or an empty one in place of what it must not see. */
static char *next_line(char *out, int n, void *userdata)
{
    struct reader *r = userdata;
    char empty[] = "", unnamed[] = "[?]";
    ssize_t length;
    char *text;

    if (r->wants_value)
        warn(r, "neither a [Section], nor Key=Value, nor a comment; ignored");
    r->wants_value = false;
    errno = 0;
    length = getline(&r->buffer, &r->allocated, r->file);
    if (length < 0) {
        r->out_of_memory = r->out_of_memory || errno == ENOMEM;
        return NULL;
    }
    if (++r->line > FILE_LINES_MAX) {
        warn(r, "the file has more than %u lines; the rest is ignored", FILE_LINES_MAX);
        return NULL;
    }
    text = r->buffer;
    if (strlen(text) != (size_t)length) {
        warn(r, "the line holds a NUL byte; ignored");
        text = empty;
    }
    if (r->line == 1 && strncmp(text, "\xef\xbb\xbf", 3) == 0)
        text += 3;
    text += strspn(text, " \t");
    text[strcspn(text, "\r\n")] = 0;
    if (strlen(text) > LINE_BYTES_MAX && text[0] != '#' && text[0] != ';') {
        warn(r, "the line has more than %u bytes; ignored", LINE_BYTES_MAX);
        text = empty;
    }
    if (text[0] == '[') {
        char *end = strchr(text, ']');

        if (!end) {
            warn(r, "']' is missing; the section is ignored");
            r->skip = true;
            text = unnamed;
        } else {
            *end = 0;
            enter_section(r, text + 1);
            *end = ']';
        }
    } else if (text[0] && text[0] != '#' && text[0] != ';') {
        if (!r->section[0] && !r->skip)
            enter_section(r, "");
        r->wants_value = true;
    }
    if (text[0] == '#' || text[0] == ';')
        text = empty;
    snprintf(out, (size_t)n, "%s\n", text);
    return out;
}

static int read_file(struct config *c, const char *path, config_warning say, struct error *err)
{
    CLEANUP(fclosep) FILE *f = fopen(path, "re");
    struct reader r = {.config = c, .say = say, .path = path, .file = f};
    struct stat st;
    int error = 0;

    if (!f)
        return error_set(err, errno, "%s: cannot be read: %s", path, strerror(errno));
    if (fstat(fileno(f), &st) < 0)
        return error_set(err, errno, "%s: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode))
        return error_set(err, EISDIR, "%s: is a folder, and should be a file", path);
    ini_parse_stream(next_line, &r, on_value, &r);
    if (ferror(f))
        error = error_set(err, EIO, "%s: cannot be read to its end", path);
    else if (r.out_of_memory)
        error = error_set(err, ENOMEM, "%s: out of memory", path);
    free(r.buffer);
    return error;
}

/* ---- files ---- */

struct drop_in {
    char *name, *path;
};

static int compare_drop_ins(const void *a, const void *b)
{
    return strcmp(((const struct drop_in *)a)->name, ((const struct drop_in *)b)->name);
}

static bool is_drop_in(const char *name)
{
    size_t n = strlen(name);

    return name[0] != '.' && n > 5 && strcmp(name + n - 5, ".conf") == 0;
}

/* Those of one folder; names that are there already mask. */
static int collect(struct drop_in **list, size_t *n, const char *folder, struct error *err)
{
    CLEANUP(freep) char *path = NULL;
    CLEANUP(closedirp) DIR *dir = NULL;
    struct dirent *e;

    if (asprintf(&path, "%s/llmd.conf.d", folder) < 0) {
        path = NULL;
        return error_set(err, ENOMEM, "out of memory");
    }
    dir = opendir(path);
    if (!dir)
        return errno == ENOENT
                   ? 0
                   : error_set(err, errno, "%s: cannot be read: %s", path, strerror(errno));
    while ((e = readdir(dir))) {
        struct drop_in *more, d = {0};
        bool masked = false;

        if (!is_drop_in(e->d_name))
            continue;
        for (size_t i = 0; i < *n; i++)
            masked = masked || strcmp((*list)[i].name, e->d_name) == 0;
        if (masked)
            continue;
        more = reallocarray(*list, *n + 1, sizeof(*more));
        if (more)
            *list = more;
        d.name = strdup(e->d_name);
        if (asprintf(&d.path, "%s/%s", path, e->d_name) < 0)
            d.path = NULL;
        if (!more || !d.name || !d.path) {
            free(d.name);
            free(d.path);
            return error_set(err, ENOMEM, "out of memory");
        }
        (*list)[(*n)++] = d;
    }
    return 0;
}

static int new_config(struct config **ret)
{
    struct config *c = calloc(1, sizeof(*c));

    if (!c)
        return -ENOMEM;
    c->linger_usec = UINT64_C(3600) * 1000000;
    c->log_level = LOG_INFO;
    c->prefetch = true;
    c->pin_threads = true;
    c->max_connections = 256;
    c->limits = user_limits_default;
    *ret = c;
    return 0;
}

static int remember_file(struct config *c, const char *path)
{
    char **more = reallocarray(c->files, c->n_files + 1, sizeof(*more));

    if (!more)
        return -ENOMEM;
    c->files = more;
    more[c->n_files] = strdup(path);
    return more[c->n_files] && ++c->n_files ? 0 : -ENOMEM;
}

static int read_one(struct config *c, const char *path, config_warning say, struct error *err)
{
    int r = read_file(c, path, say, err);

    if (r >= 0 && remember_file(c, path) < 0)
        r = error_set(err, ENOMEM, "out of memory");
    return r;
}

int config_load_folders(struct config **ret, const char *const *folders, size_t n_folders,
                        config_warning say, struct error *err)
{
    CLEANUP(config_freep) struct config *c = NULL;
    struct drop_in *drop_ins = NULL;
    size_t n_drop_ins = 0;
    int r = 0;

    if (new_config(&c) < 0)
        return error_set(err, ENOMEM, "out of memory");
    for (size_t i = 0; i < n_folders; i++) {
        CLEANUP(freep) char *path = NULL;
        struct stat st;

        if (asprintf(&path, "%s/llmd.conf", folders[i]) < 0) {
            path = NULL;
            return error_set(err, ENOMEM, "out of memory");
        }
        if (stat(path, &st) < 0 && errno == ENOENT)
            continue;
        r = read_one(c, path, say, err); /* says so, where it cannot even be looked at */
        if (r < 0)
            return r;
        break;
    }
    for (size_t i = 0; i < n_folders && r >= 0; i++)
        r = collect(&drop_ins, &n_drop_ins, folders[i], err);
    if (n_drop_ins > 0)
        qsort(drop_ins, n_drop_ins, sizeof(*drop_ins), compare_drop_ins);
    for (size_t i = 0; i < n_drop_ins; i++) {
        if (r >= 0)
            r = read_one(c, drop_ins[i].path, say, err);
        free(drop_ins[i].name);
        free(drop_ins[i].path);
    }
    free(drop_ins);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(c);
    return 0;
}

static int user_folder(char **ret)
{
    const char *base = getenv("XDG_CONFIG_HOME"), *home = getenv("HOME");
    int r;

    if (base && base[0] == '/') {
        r = asprintf(ret, "%s/llmd", base);
    } else {
        if (!home || home[0] != '/') {
            const struct passwd *me = getpwuid(geteuid());

            home = me ? me->pw_dir : "";
        }
        r = asprintf(ret, "%s/.config/llmd", home);
    }
    return r < 0 ? -ENOMEM : 0;
}

int config_folders_find(struct config_folders *ret, enum service_scope scope)
{
    struct config_folders f = {.n = 0};

    switch (scope) {
    case SCOPE_PRIVATE:
        break;
    case SCOPE_SYSTEM:
        f.paths[f.n++] = LLMD_SYSCONFDIR "/llmd";
        f.paths[f.n++] = "/run/llmd";
        f.paths[f.n++] = LLMD_LIBDIR "/llmd";
        break;
    case SCOPE_USER:
        if (user_folder(&f.owned) < 0)
            return -ENOMEM;
        f.paths[f.n++] = f.owned;
        break;
    }
    *ret = f;
    return 0;
}

void config_folders_done(struct config_folders *f)
{
    free(TAKE_PTR(f->owned));
    f->n = 0;
}

int config_load(struct config **ret, enum service_scope scope, const char *file, config_warning say,
                struct error *err)
{
    CLEANUP(config_folders_done) struct config_folders folders = {0};
    CLEANUP(config_freep) struct config *c = NULL;
    int r;

    if (file) {
        if (new_config(&c) < 0)
            return error_set(err, ENOMEM, "out of memory");
        r = read_one(c, file, say, err);
        if (r < 0)
            return r;
        *ret = TAKE_PTR(c);
        return 0;
    }
    if (config_folders_find(&folders, scope) < 0)
        return error_set(err, ENOMEM, "out of memory");
    return config_load_folders(ret, folders.paths, folders.n, say, err);
}

struct config *config_free(struct config *c)
{
    if (!c)
        return NULL;
    clear_folders(c);
    for (size_t i = 0; i < c->n_files; i++)
        free(c->files[i]);
    free(c->files);
    free(c->model);
    free(c->cpu_level);
    free(c->device);
    free(c->users);
    free(c);
    return NULL;
}

void config_freep(struct config **c)
{
    *c = config_free(*c);
}

static size_t size_of(enum value_type type)
{
    return type == VALUE_BYTES ? sizeof(uint64_t) : sizeof(uint32_t);
}

void config_limits(const struct config *c, uid_t uid, struct user_limits *ret)
{
    const struct user_entry *u = find_user(c, uid);

    *ret = c->limits;
    for (size_t i = 0; u && i < ARRAY_SIZE(limit_keys); i++)
        if (u->set & (1u << i))
            memcpy((char *)ret + limit_keys[i].offset,
                   (const char *)&u->limits + limit_keys[i].offset, size_of(limit_keys[i].type));
}

bool config_same_limits(const struct user_limits *a, const struct user_limits *b)
{
    for (size_t i = 0; i < ARRAY_SIZE(limit_keys); i++)
        if (memcmp((const char *)a + limit_keys[i].offset, (const char *)b + limit_keys[i].offset,
                   size_of(limit_keys[i].type)) != 0)
            return false;
    return true;
}

/* ---- two of them ---- */

static bool same_text(const char *a, const char *b)
{
    return a && b ? strcmp(a, b) == 0 : a == b;
}

static bool same_value(const struct config *a, const struct config *b, const struct key *k)
{
    const void *x = (const char *)a + k->offset, *y = (const char *)b + k->offset;

    switch (k->type) {
    case VALUE_TEXT:
    case VALUE_CPU_LEVEL:
        return same_text(*(char *const *)x, *(char *const *)y);
    case VALUE_FOLDERS:
        if (a->n_model_folders != b->n_model_folders)
            return false;
        for (size_t i = 0; i < a->n_model_folders; i++)
            if (strcmp(a->model_folders[i], b->model_folders[i]) != 0)
                return false;
        return true;
    case VALUE_U32:
        return *(const uint32_t *)x == *(const uint32_t *)y;
    case VALUE_BYTES:
    case VALUE_SECONDS:
        return *(const uint64_t *)x == *(const uint64_t *)y;
    case VALUE_BOOL:
        return *(const bool *)x == *(const bool *)y;
    case VALUE_ACTIVATIONS:
        return *(const enum activation_type *)x == *(const enum activation_type *)y;
    case VALUE_KV_TYPE:
        return *(const enum kv_type *)x == *(const enum kv_type *)y;
    case VALUE_BACKEND:
        return *(const enum placement_mode *)x == *(const enum placement_mode *)y;
    case VALUE_LOG_LEVEL:
        return *(const int *)x == *(const int *)y;
    case VALUE_SANDBOX:
        return *(const enum sandbox_mode *)x == *(const enum sandbox_mode *)y;
    }
    return false;
}

size_t config_need_restart(const struct config *old, const struct config *new, char *out, size_t n)
{
    size_t at = 0;

    out[0] = 0;
    for (size_t i = 0; i < ARRAY_SIZE(keys); i++) {
        if (keys[i].live || same_value(old, new, &keys[i]))
            continue;
        if (at < n)
            at += (size_t)snprintf(out + at, n - at, "%s%s=", at ? ", " : "", keys[i].name);
    }
    return at;
}
