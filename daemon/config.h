/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * config: what the administrator wrote: llmd.conf and its drop-ins, read by libinih. Whatever is
 * wrong is a warning in the log, in the journal's style (file:line: ...), and leaves the value as
 * it was before; config_load() tells how many there were, for `llmd --check-config` and so that a
 * reload is refused rather than half done. Immutable after it was loaded; any thread.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/error.h"
#include "daemon/sandbox.h"
#include "daemon/service.h"
#include "daemon/users.h"
#include "engine/engine.h"
#include "engine/placement.h"

struct config {
    char *model;          /* name or file; NULL: the one kept, else the only one there is */
    char **model_folders; /* [n_model_folders], absolute, before the installed ones */
    size_t n_model_folders;
    uint32_t n_threads; /* 0: one for each core */
    bool pin_threads;   /* to a core each */
    char *cpu_level;    /* NULL: the best */
    enum activation_type activations;
    enum kv_type kv_type;
    enum placement_mode backend;
    char *device;         /* part of the GPU's name; NULL: the best that is hardware */
    bool gpu_on_battery;  /* it is used there, too */
    uint64_t kv_bytes;    /* 0: a quarter of physical memory */
    uint32_t context;     /* tokens of a session that asks for nothing else; 0: the model's */
    uint64_t idle_usec;   /* leave so long after the last client; 0: never */
    uint64_t linger_usec; /* a lingering session is closed so long after its last use; 0: never */
    int log_level;        /* LOG_ERR..LOG_DEBUG */
    bool prefetch;        /* read the model into memory before READY=1 */
    uint32_t max_connections; /* of all users together */
    enum sandbox_mode sandbox;

    struct user_limits limits; /* [Limits] */
    struct user_entry *users;  /* [n_users], by uid */
    size_t n_users;

    char **files; /* [n_files], what was read, in order */
    size_t n_files;
    uint32_t n_warnings;
};

/*
 * file: NULL: the scope's llmd.conf and drop-ins, none of which need exist; else that one, which
 * must, and no drop-ins. say: what is called with each warning; NULL: the log
 * 0: *ret, look at n_warnings; -errno: not readable
 */
typedef void (*config_warning)(const char *line);
int config_load(struct config **ret, enum service_scope scope, const char *file, config_warning say,
                struct error *err);
/* The same from these folders' llmd.conf and llmd.conf.d/, the first going before the others. */
int config_load_folders(struct config **ret, const char *const *folders, size_t n_folders,
                        config_warning say, struct error *err);
/* Where a scope's files are looked for, whether they are there or not. 0, -ENOMEM */
struct config_folders {
    const char *paths[3]; /* [n], the first going before the others */
    size_t n;
    char *owned; /* one of them */
};
int config_folders_find(struct config_folders *ret, enum service_scope scope);
void config_folders_done(struct config_folders *f);

struct config *config_free(struct config *c);
void config_freep(struct config **c);

/* The limits of a uid: its own section's, where it has none those of [Limits]. */
void config_limits(const struct config *c, uid_t uid, struct user_limits *ret);

bool config_same_limits(const struct user_limits *a, const struct user_limits *b);

/* [User ...] sections, for whoever has to set the weights of all of them. */
struct user_entry {
    uid_t uid;
    uint32_t set; /* which of limits are its own */
    struct user_limits limits;
};

/*
 * The names of what differs and is only looked at when the daemon starts, "Threads=, KvBytes=";
 * 0: nothing
 */
size_t config_need_restart(const struct config *old, const struct config *new, char *out, size_t n);

/* Also for the command line. "90", "5min", "infinity" (0). 0, -EINVAL */
int config_parse_seconds(const char *text, uint64_t *ret_usec);
