/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * model_store: which model files there are, by name: NAME.llmd in the state directory's models
 * folder, to which models are installed, and in further folders, which are only read. The name of a
 * model is its file's without the suffix; where two folders have it, the first is meant. Loop
 * thread; copying is done by a thread of its own.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <systemd/sd-event.h>

#include "base/error.h"

struct model_store;

enum stored_model_state {
    MODEL_AVAILABLE,
    MODEL_INSTALLING,
    MODEL_FAILED, /* failure says why; it goes when the model is installed again or removed */
};

struct stored_model {
    char *name, *path;
    enum stored_model_state state;
    double progress; /* 0..1, of installing */
    char *failure;   /* NULL: none */
    uint64_t bytes;
    char *description; /* "gemma3n, 30 layers, q4, context 32768" */
    char *license;     /* "" when the file does not say */
    uint32_t context_max;
    bool removable; /* lies in the state directory */
};

enum store_change {
    STORE_CAME,
    STORE_WENT,
    STORE_CHANGED, /* its state, or it is another file; not for progress */
};

/* name lives until the call returns. */
typedef void (*model_store_changed)(void *userdata, const char *name, enum store_change what);

struct model_store_options {
    sd_event *event;
    const char *state_dir;      /* NULL: nothing can be installed, no default is kept */
    const char *const *folders; /* [n_folders], further ones, searched in this order */
    size_t n_folders;
    model_store_changed changed;
    void *userdata;
};

/* Folders that are not there are empty ones. 0, -errno */
int model_store_new(struct model_store **ret, const struct model_store_options *options,
                    struct error *err);
struct model_store *model_store_free(struct model_store *s); /* stops what is being installed */
void model_store_freep(struct model_store **s);

/* Whether text may be the name of a model: [A-Za-z0-9._-], no dot in front, 1..100 bytes. */
bool model_name_valid(const char *name);

/* Whether a file of that name is looked at. */
bool model_store_is_model(const char *file);

/* Looks at the folders again. 0, -ENOMEM */
int model_store_refresh(struct model_store *s);

/* Sorted by name; pointers stay until the next call that changes the store. */
size_t model_store_n(const struct model_store *s);
const struct stored_model *model_store_get(const struct model_store *s, size_t i);
const struct stored_model *model_store_find(const struct model_store *s, const char *name);

/*
 * Copies the file behind fd, which is duplicated, under that name. Returns when its header is
 * checked; the rest goes on in a thread, and done (may be NULL) is called once at its end with 0 or
 * -errno. 0; -EINVAL: name; -EBADMSG: not a model file; -EEXIST; -EBUSY: is being installed;
 * -ENOSPC; -EROFS: there is no state directory; -errno
 */
typedef void (*model_store_done)(void *userdata, const char *name, int r);
int model_store_install(struct model_store *s, int fd, const char *name, bool replace,
                        model_store_done done, void *userdata, struct error *err);

/* Also stops its installation. 0, -ENOENT, -EROFS: not in the state directory, -errno */
int model_store_remove(struct model_store *s, const char *name, struct error *err);

/* The name kept by model_store_set_default(), or NULL. It need not exist any more. */
const char *model_store_default(const struct model_store *s);
/* 0, -EROFS: there is no state directory, -errno */
int model_store_set_default(struct model_store *s, const char *name, struct error *err);
