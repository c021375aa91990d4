/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The list is made by looking at the folders; a file's header is read again only when the file is
 * another one than last time. What is being installed, or failed to be, is an entry without a file.
 *
 * A model is installed by a thread of its own: it copies into a hidden file beside the place, looks
 * at the copy as a whole (header, then every hash), and renames it. So a name never stands for half
 * a model, nor for something that its giver changed while it was copied. The loop and the thread
 * share the install's atomic members; result and error are the thread's until it says `over`.
 */

#include "daemon/model-store.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/thread-signals.h"
#include "engine/model-config.h"
#include "engine/model-file.h"

#define SUFFIX ".llmd"
#define HIDDEN ".install-" /* in front of the name while it is copied */
#define NAME_BYTES_MAX 100u
#define MODELS_MAX 1000u
#define INSTALLS_MAX 4u
#define COPY_BYTES (size_t)(8u << 20)

struct install {
    struct model_store *store;
    pthread_t thread;
    char *name, *hidden, *path, *folder;
    int fd, out_fd;
    uint64_t bytes;
    atomic_size_t done;
    atomic_bool stop, over;
    int result;
    struct error error;
    model_store_done finished;
    void *userdata;
    struct install *next; /* model_store::installs */
};

struct entry {
    struct stored_model model;
    dev_t device; /* of the file that was read; 0 for none */
    ino_t inode;
    struct timespec changed;
    bool seen; /* during a refresh */
    bool has_file;
};

struct model_store {
    char *state_dir, *install_folder; /* NULL: none */
    char **folders;                   /* [n_folders], the install folder first */
    size_t n_folders;
    struct entry **entries; /* [n_entries], by name */
    size_t n_entries;
    char *default_name;
    struct install *installs;
    int wake_fd;
    sd_event_source *wake_source;
    model_store_changed changed;
    void *userdata;
};

bool model_name_valid(const char *name)
{
    size_t n = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");

    return n >= 1 && n <= NAME_BYTES_MAX && !name[n] && name[0] != '.';
}

bool model_store_is_model(const char *file)
{
    size_t n = strlen(file);

    return n > strlen(SUFFIX) && strcmp(file + n - strlen(SUFFIX), SUFFIX) == 0;
}

/* ---- entries ---- */

static void forget_description(struct stored_model *m)
{
    free(TAKE_PTR(m->failure));
    free(TAKE_PTR(m->description));
    free(TAKE_PTR(m->license));
    m->context_max = 0;
}

static void entry_free(struct entry *e)
{
    if (!e)
        return;
    forget_description(&e->model);
    free(e->model.name);
    free(e->model.path);
    free(e);
}

static void entry_freep(struct entry **e)
{
    entry_free(*e);
}

static size_t place_of(const struct model_store *s, const char *name)
{
    size_t from = 0, to = s->n_entries;

    while (from < to) {
        size_t middle = (from + to) / 2;

        if (strcmp(s->entries[middle]->model.name, name) < 0)
            from = middle + 1;
        else
            to = middle;
    }
    return from;
}

static struct entry *find_entry(const struct model_store *s, const char *name)
{
    size_t i = place_of(s, name);

    return i < s->n_entries && strcmp(s->entries[i]->model.name, name) == 0 ? s->entries[i] : NULL;
}

/* 0, -ENOMEM, -ENOSPC: too many */
static int add_entry(struct model_store *s, const char *name, struct entry **ret)
{
    CLEANUP(entry_freep) struct entry *e = calloc(1, sizeof(*e));
    struct entry **more;
    size_t i = place_of(s, name);

    if (s->n_entries >= MODELS_MAX)
        return -ENOSPC;
    more = reallocarray(s->entries, s->n_entries + 1, sizeof(struct entry *));
    if (more)
        s->entries = more;
    if (!e || !more)
        return -ENOMEM;
    e->model.name = strdup(name);
    e->model.description = strdup("");
    e->model.license = strdup("");
    if (!e->model.name || !e->model.description || !e->model.license)
        return -ENOMEM;
    memmove(&s->entries[i + 1], &s->entries[i], (s->n_entries - i) * sizeof(struct entry *));
    s->n_entries++;
    *ret = s->entries[i] = TAKE_PTR(e);
    return 0;
}

static void remove_entry(struct model_store *s, struct entry *e)
{
    size_t i = place_of(s, e->model.name);

    memmove(&s->entries[i], &s->entries[i + 1], (s->n_entries - i - 1) * sizeof(struct entry *));
    s->n_entries--;
    entry_free(e);
}

/* ---- what a file is ---- */

static const char *main_type(const struct model_file *f)
{
    size_t bytes[WEIGHT_Q4 + 1] = {0};
    enum weight_type most = WEIGHT_F32;

    for (size_t i = 0; i < model_file_n_tensors(f); i++) {
        const struct model_tensor *t = model_file_tensor(f, i);

        bytes[t->weight.type] += t->bytes;
        if (bytes[t->weight.type] > bytes[most])
            most = t->weight.type;
    }
    return weight_type_name(most);
}

/* Header and hyper-parameters; what the tensors hold is not looked at. 0, -EBADMSG, -errno */
static int check_header(const struct model_file *f, struct model_config *config, struct error *err)
{
    const char *text = model_file_metadata(f, "llmd.config");

    if (!text)
        return error_set(err, EBADMSG, "%s: not a model: it has no llmd.config",
                         model_file_path(f));
    if (model_config_parse(config, text, err) < 0)
        return error_prefix(err, EBADMSG, "%s", model_file_path(f));
    return 0;
}

static int describe(struct entry *e)
{
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    CLEANUP(freep) char *description = NULL, *license = NULL;
    struct model_config config;
    struct error err = {0};
    const char *text = NULL;
    int r;

    r = model_file_open(&f, e->model.path, &err);
    if (r >= 0)
        r = check_header(f, &config, &err);
    if (r < 0) {
        forget_description(&e->model);
        e->model.state = MODEL_FAILED;
        e->model.failure = strdup(err.text);
        e->model.description = strdup("");
        e->model.license = strdup("");
        return e->model.failure && e->model.description && e->model.license ? 0 : -ENOMEM;
    }
    text = model_file_metadata(f, "llmd.license");
    license = strdup(text ? text : "");
    if (asprintf(&description, "gemma3n, %u layers, %s, context %u", config.n_layers, main_type(f),
                 config.context_max) < 0)
        description = NULL;
    if (!license || !description)
        return -ENOMEM;
    forget_description(&e->model);
    e->model.state = MODEL_AVAILABLE;
    e->model.description = TAKE_PTR(description);
    e->model.license = TAKE_PTR(license);
    e->model.context_max = config.context_max;
    return 0;
}

/* ---- folders ---- */

static struct install *install_of(const struct model_store *s, const char *name)
{
    struct install *i = s->installs;

    while (i && strcmp(i->name, name) != 0)
        i = i->next;
    return i;
}

/* One file of a folder. 1: it came; 2: it changed; 0; -ENOMEM */
static int look_at(struct model_store *s, const char *folder, const char *file, bool removable)
{
    CLEANUP(freep) char *name = strndup(file, strlen(file) - strlen(SUFFIX)), *path = NULL;
    struct entry *e;
    struct stat st;
    int r, what = 2;

    if (!name || asprintf(&path, "%s/%s", folder, file) < 0) {
        path = NULL;
        return -ENOMEM;
    }
    if (!model_name_valid(name) || stat(path, &st) < 0 || !S_ISREG(st.st_mode))
        return 0;
    e = find_entry(s, name);
    if (e && e->seen)
        return 0; /* an earlier folder has it */
    if (!e) {
        what = 1;
        r = add_entry(s, name, &e);
        if (r < 0)
            return r == -ENOSPC ? 0 : r;
    }
    e->seen = true;
    if (e->has_file && e->device == st.st_dev && e->inode == st.st_ino &&
        e->changed.tv_sec == st.st_mtim.tv_sec && e->changed.tv_nsec == st.st_mtim.tv_nsec &&
        e->model.bytes == (uint64_t)st.st_size && strcmp(e->model.path, path) == 0)
        return 0;
    free(e->model.path);
    e->model.path = TAKE_PTR(path);
    e->model.bytes = (uint64_t)st.st_size;
    e->model.removable = removable;
    e->has_file = true;
    e->device = st.st_dev;
    e->inode = st.st_ino;
    e->changed = st.st_mtim;
    r = describe(e);
    if (r < 0)
        return r;
    if (install_of(s, name))
        e->model.state = MODEL_INSTALLING;
    return what;
}

static int look_into(struct model_store *s, const char *folder, bool removable, bool tell)
{
    CLEANUP(closedirp) DIR *dir = opendir(folder);
    struct dirent *d;
    int r;

    while (dir && (d = readdir(dir))) {
        size_t n = strlen(d->d_name);

        if (!model_store_is_model(d->d_name))
            continue;
        r = look_at(s, folder, d->d_name, removable);
        if (r < 0)
            return r;
        if (r > 0 && tell && s->changed) {
            d->d_name[n - strlen(SUFFIX)] = 0;
            s->changed(s->userdata, d->d_name, r == 1 ? STORE_CAME : STORE_CHANGED);
        }
    }
    return 0;
}

static int refresh(struct model_store *s, bool tell)
{
    int r = 0;

    for (size_t i = 0; i < s->n_entries; i++)
        s->entries[i]->seen = false;
    for (size_t i = 0; i < s->n_folders && r >= 0; i++)
        r = look_into(s, s->folders[i], s->install_folder && i == 0, tell);
    for (size_t i = s->n_entries; r >= 0 && i-- > 0;) {
        struct entry *e = s->entries[i];
        CLEANUP(freep) char *name = NULL;

        if (e->seen || !e->has_file)
            continue;
        if (install_of(s, e->model.name)) { /* it comes again */
            e->has_file = false;
            continue;
        }
        name = TAKE_PTR(e->model.name);
        e->model.name = strdup(name);
        if (!e->model.name) {
            e->model.name = TAKE_PTR(name);
            return -ENOMEM;
        }
        remove_entry(s, e);
        if (tell && s->changed)
            s->changed(s->userdata, name, STORE_WENT);
    }
    return r;
}

int model_store_refresh(struct model_store *s)
{
    return refresh(s, true);
}

size_t model_store_n(const struct model_store *s)
{
    return s->n_entries;
}

const struct stored_model *model_store_get(const struct model_store *s, size_t i)
{
    struct stored_model *m = &s->entries[i]->model;
    const struct install *install = install_of(s, m->name);

    m->progress = m->state == MODEL_AVAILABLE ? 1 : 0;
    if (install)
        m->progress = install->bytes > 0 ? (double)install->done / (double)install->bytes : 0;
    return m;
}

const struct stored_model *model_store_find(const struct model_store *s, const char *name)
{
    size_t i = place_of(s, name);

    return find_entry(s, name) ? model_store_get(s, i) : NULL;
}

/* ---- installing: the thread ---- */

static int copy_rest(struct install *i, struct error *err)
{
    CLEANUP(freep) char *buffer = malloc(COPY_BYTES);
    bool by_kernel = true; /* also shares blocks, where the file system can */

    if (!buffer)
        return error_set(err, ENOMEM, "out of memory");
    while (i->done < i->bytes && !i->stop) {
        size_t n = MIN(COPY_BYTES, (size_t)(i->bytes - i->done));
        off_t from = (off_t)i->done, to = (off_t)i->done;
        ssize_t got, put = 0;

        got = by_kernel ? copy_file_range(i->fd, &from, i->out_fd, &to, n, 0) : -1;
        if (got <= 0 && by_kernel && (got == 0 || errno != ENOSPC)) {
            by_kernel = false; /* file systems differ, or it cannot: whatever it is, read it */
            continue;
        }
        if (!by_kernel) {
            got = pread(i->fd, buffer, n, from);
            if (got < 0 && errno == EINTR)
                continue;
            if (got < 0)
                return error_set(err, errno, "%s: cannot be read: %s", i->name, strerror(errno));
            if (got == 0)
                return error_set(err, EBADMSG, "%s: the file became shorter while it was copied",
                                 i->name);
            while (put < got) {
                ssize_t w = pwrite(i->out_fd, buffer + put, (size_t)(got - put), to + put);

                if (w < 0 && errno == EINTR)
                    continue;
                if (w < 0) {
                    got = -1;
                    break;
                }
                put += w;
            }
        }
        if (got < 0)
            return error_set(err, errno, "%s: cannot write: %s", i->folder, strerror(errno));
        i->done += (size_t)got;
    }
    return i->stop ? -ECANCELED : 0;
}

static int sync_folder(const char *folder)
{
    CLEANUP(closep) int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    return fd < 0 || fsync(fd) < 0 ? -errno : 0;
}

static int copy_and_check(struct install *i, struct error *err)
{
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    CLEANUP(closep) int fd = -EBADF;
    struct model_config config;
    int r;

    /* Says at once that the disk is too small, where the file system can tell. */
    if (fallocate(i->out_fd, 0, 0, (off_t)i->bytes) < 0 && errno == ENOSPC)
        return error_set(err, ENOSPC, "%s: no room for %llu bytes", i->folder,
                         (unsigned long long)i->bytes);
    r = copy_rest(i, err);
    if (r < 0)
        return r;
    if (fchmod(i->out_fd, 0644) < 0 || fsync(i->out_fd) < 0)
        return error_set(err, errno, "%s: cannot write: %s", i->folder, strerror(errno));
    fd = fcntl(i->out_fd, F_DUPFD_CLOEXEC, 3);
    if (fd < 0)
        return error_set(err, errno, "%s: %s", i->name, strerror(errno));
    r = model_file_open_fd(&f, TAKE_FD(fd), i->name, err);
    if (r >= 0)
        r = check_header(f, &config, err);
    if (r >= 0)
        r = model_file_verify(f, err);
    if (r < 0)
        return r;
    if (i->stop)
        return -ECANCELED;
    if (rename(i->hidden, i->path) < 0)
        return error_set(err, errno, "%s: cannot be renamed: %s", i->path, strerror(errno));
    r = sync_folder(i->folder);
    return r < 0 ? error_set(err, -r, "%s: cannot write: %s", i->folder, strerror(-r)) : 0;
}

static void *install_run(void *userdata)
{
    struct install *i = userdata;
    uint64_t one = 1;

    pthread_setname_np(pthread_self(), "install");
    i->result = copy_and_check(i, &i->error);
    if (i->result < 0)
        unlink(i->hidden);
    i->over = true;
    (void)!write(i->store->wake_fd, &one, sizeof(one)); /* full: it is readable anyway */
    return NULL;
}

/* ---- installing: the loop ---- */

static void install_free(struct install *i)
{
    if (!i)
        return;
    closep(&i->fd);
    closep(&i->out_fd);
    free(i->name);
    free(i->hidden);
    free(i->path);
    free(i->folder);
    free(i);
}

static void install_freep(struct install **i)
{
    install_free(*i);
}

/* Its thread has ended, or is told to and waited for. */
static void take_out(struct model_store *s, struct install *i)
{
    struct install **at = &s->installs;

    pthread_join(i->thread, NULL);
    while (*at != i)
        at = &(*at)->next;
    *at = i->next;
}

static void install_over(struct model_store *s, struct install *i)
{
    struct entry *e = find_entry(s, i->name);

    take_out(s, i);
    refresh(s, false); /* out of memory: it is found the next time */
    e = find_entry(s, i->name);
    if (e && i->result < 0) {
        e->model.state = e->has_file ? MODEL_AVAILABLE : MODEL_FAILED;
        free(e->model.failure);
        e->model.failure = strdup(i->error.text);
    } else if (e) {
        /* Replaced by a file of the same size within a tick: it is another one. */
        e->model.state = MODEL_AVAILABLE;
        if (describe(e) < 0)
            e->model.state = MODEL_FAILED;
    }
    if (s->changed)
        s->changed(s->userdata, i->name, STORE_CHANGED);
    if (i->finished)
        i->finished(i->userdata, i->name, i->result);
    install_free(i);
}

static int on_wake(sd_event_source *source, int fd, uint32_t revents, void *userdata)
{
    struct model_store *s = userdata;
    uint64_t n;

    (void)source;
    (void)revents;
    (void)!read(fd, &n, sizeof(n));
    for (struct install *i = s->installs; i;) {
        if (i->over) {
            install_over(s, i);
            i = s->installs; /* the callbacks may have changed the list */
        } else {
            i = i->next;
        }
    }
    return 0;
}

static int prepare(struct model_store *s, struct install *i, int fd, const char *name,
                   struct error *err)
{
    CLEANUP(model_file_freep) struct model_file *f = NULL;
    CLEANUP(closep) int check_fd = -EBADF;
    struct model_config config;
    struct statvfs vfs;
    struct stat st;
    int r;

    i->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    check_fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (i->fd < 0 || check_fd < 0)
        return error_set(err, errno, "cannot take the file: %s", strerror(errno));
    if (fstat(i->fd, &st) < 0)
        return error_set(err, errno, "cannot look at the file: %s", strerror(errno));
    if (!S_ISREG(st.st_mode))
        return error_set(err, EBADMSG, "not a model: a regular file is wanted");
    if ((fcntl(i->fd, F_GETFL) & O_ACCMODE) == O_WRONLY)
        return error_set(err, EBADMSG, "the file is not open for reading");
    i->bytes = (uint64_t)st.st_size;
    r = model_file_open_fd(&f, TAKE_FD(check_fd), name, err);
    if (r >= 0)
        r = check_header(f, &config, err);
    if (r < 0)
        return r == -ENOMEM ? r : -EBADMSG;

    if (asprintf(&i->path, "%s/%s" SUFFIX, s->install_folder, name) < 0)
        i->path = NULL;
    if (asprintf(&i->hidden, "%s/" HIDDEN "%s", s->install_folder, name) < 0)
        i->hidden = NULL;
    i->folder = strdup(s->install_folder);
    i->name = strdup(name);
    if (!i->path || !i->hidden || !i->folder || !i->name)
        return error_set(err, ENOMEM, "out of memory");
    if (mkdir(s->install_folder, 0755) < 0 && errno != EEXIST)
        return error_set(err, errno, "%s: cannot be made: %s", s->install_folder, strerror(errno));
    if (statvfs(s->install_folder, &vfs) == 0 && i->bytes / vfs.f_frsize >= vfs.f_bavail)
        return error_set(err, ENOSPC, "%s: no room for %llu bytes", s->install_folder,
                         (unsigned long long)i->bytes);
    unlink(i->hidden); /* what a killed one left; this name is not being installed now */
    i->out_fd = open(i->hidden, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (i->out_fd < 0)
        return error_set(err, errno, "%s: cannot be made: %s", i->hidden, strerror(errno));
    return 0;
}

int model_store_install(struct model_store *s, int fd, const char *name, bool replace,
                        model_store_done done, void *userdata, struct error *err)
{
    CLEANUP(install_freep) struct install *i = NULL;
    struct install *started;
    struct entry *e;
    sigset_t all, old;
    size_t n = 0;
    bool came = false;
    int r;

    if (!model_name_valid(name))
        return error_set(err, EINVAL,
                         "'%.100s' cannot be the name of a model: letters, digits, '.', '_' and "
                         "'-', no '.' in front, at most %u bytes",
                         name, NAME_BYTES_MAX);
    if (!s->install_folder)
        return error_set(err, EROFS, "this daemon has no state directory to install models to");
    for (struct install *other = s->installs; other; other = other->next)
        n++;
    if (install_of(s, name))
        return error_set(err, EBUSY, "%s: is being installed", name);
    if (n >= INSTALLS_MAX)
        return error_set(err, EBUSY, "%u models are being installed already", INSTALLS_MAX);
    r = refresh(s, true);
    if (r < 0)
        return error_set(err, -r, "out of memory");
    e = find_entry(s, name);
    if (e && e->has_file && !replace)
        return error_set(err, EEXIST, "%s: there is such a model; replace it, or take another name",
                         name);

    i = calloc(1, sizeof(*i));
    if (!i)
        return error_set(err, ENOMEM, "out of memory");
    i->fd = i->out_fd = -EBADF;
    i->store = s;
    i->finished = done;
    i->userdata = userdata;
    r = prepare(s, i, fd, name, err);
    if (r < 0)
        return r;
    if (!e) {
        r = add_entry(s, name, &e);
        if (r < 0) {
            unlink(i->hidden);
            return error_set(err, -r, "%s: no room in the list of models", name);
        }
        e->model.path = strdup(i->path);
        e->model.removable = came = true;
    }
    if (!e->has_file)
        e->model.bytes = i->bytes;
    thread_signals_for_others(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = pthread_create(&i->thread, NULL, install_run, i);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r != 0) {
        unlink(i->hidden);
        if (came)
            remove_entry(s, e);
        return error_set(err, r, "cannot start a thread: %s", strerror(r));
    }
    e->model.state = MODEL_INSTALLING;
    free(TAKE_PTR(e->model.failure));
    started = TAKE_PTR(i);
    started->next = s->installs;
    s->installs = started;
    if (s->changed)
        s->changed(s->userdata, name, came ? STORE_CAME : STORE_CHANGED);
    return 0;
}

int model_store_remove(struct model_store *s, const char *name, struct error *err)
{
    struct install *i = install_of(s, name);
    struct entry *e = find_entry(s, name);

    if (!e)
        return error_set(err, ENOENT, "there is no model '%.100s'", name);
    if (e->has_file && !e->model.removable && !i)
        return error_set(err, EROFS, "%s: was not installed here; remove %s instead", name,
                         e->model.path);
    if (i) {
        i->stop = true;
        take_out(s, i);
        if (i->finished)
            i->finished(i->userdata, i->name, -ECANCELED);
        install_free(i);
        refresh(s, false); /* it may have been quicker */
        e = find_entry(s, name);
        if (e && e->has_file)
            e->model.state = MODEL_AVAILABLE;
    }
    if (e && e->has_file && e->model.removable) {
        if (unlink(e->model.path) < 0 && errno != ENOENT)
            return error_set(err, errno, "%s: cannot be removed: %s", e->model.path,
                             strerror(errno));
        sync_folder(s->install_folder); /* it is gone for us; after a crash it may be back */
    }
    if (e && (!e->has_file || e->model.removable)) {
        remove_entry(s, e);
        if (s->changed)
            s->changed(s->userdata, name, STORE_WENT);
    } else if (e && s->changed) {
        s->changed(s->userdata, name, STORE_CHANGED);
    }
    /* One of the same name in another folder is seen now. */
    return refresh(s, true) < 0 ? error_set(err, ENOMEM, "out of memory") : 0;
}

/* ---- the default ---- */

static void read_default(struct model_store *s)
{
    CLEANUP(freep) char *path = NULL;
    CLEANUP(fclosep) FILE *f = NULL;
    char line[NAME_BYTES_MAX + 3];

    if (asprintf(&path, "%s/default-model", s->state_dir) < 0) {
        path = NULL;
        return;
    }
    f = fopen(path, "re");
    if (!f || !fgets(line, sizeof(line), f))
        return;
    line[strcspn(line, "\n")] = 0;
    if (model_name_valid(line))
        s->default_name = strdup(line);
}

const char *model_store_default(const struct model_store *s)
{
    return s->default_name;
}

static int write_default(struct model_store *s, const char *name, struct error *err)
{
    CLEANUP(freep) char *path = NULL, *hidden = NULL;
    CLEANUP(closep) int fd = -EBADF;
    size_t n = strlen(name);
    int r;

    if (asprintf(&path, "%s/default-model", s->state_dir) < 0) {
        path = NULL;
        return error_set(err, ENOMEM, "out of memory");
    }
    if (asprintf(&hidden, "%s/.default-model", s->state_dir) < 0) {
        hidden = NULL;
        return error_set(err, ENOMEM, "out of memory");
    }
    fd = open(hidden, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0 || write(fd, name, n) != (ssize_t)n || write(fd, "\n", 1) != 1 || fsync(fd) < 0 ||
        rename(hidden, path) < 0) {
        r = errno;
        if (fd >= 0)
            unlink(hidden);
        return error_set(err, r, "%s: cannot be written: %s", path, strerror(r));
    }
    r = sync_folder(s->state_dir);
    return r < 0 ? error_set(err, -r, "%s: cannot be written: %s", path, strerror(-r)) : 0;
}

int model_store_set_default(struct model_store *s, const char *name, struct error *err)
{
    char *copy;
    int r;

    if (!model_name_valid(name))
        return error_set(err, EINVAL, "'%.100s' cannot be the name of a model", name);
    if (!s->state_dir)
        return error_set(err, EROFS, "this daemon has no state directory to keep that in");
    copy = strdup(name);
    if (!copy)
        return error_set(err, ENOMEM, "out of memory");
    r = write_default(s, name, err);
    if (r < 0) {
        free(copy);
        return r;
    }
    free(s->default_name);
    s->default_name = copy;
    return 0;
}

/* ---- all of it ---- */

static void remove_left_overs(const char *folder)
{
    CLEANUP(closedirp) DIR *dir = opendir(folder);
    struct dirent *d;

    while (dir && (d = readdir(dir)))
        if (strncmp(d->d_name, HIDDEN, strlen(HIDDEN)) == 0)
            unlinkat(dirfd(dir), d->d_name, 0);
}

static int add_folder(struct model_store *s, const char *folder)
{
    char *copy = strdup(folder);

    if (!copy)
        return -ENOMEM;
    s->folders[s->n_folders++] = copy;
    return 0;
}

int model_store_new(struct model_store **ret, const struct model_store_options *options,
                    struct error *err)
{
    CLEANUP(model_store_freep) struct model_store *s = calloc(1, sizeof(*s));
    int r = 0;

    if (!s)
        return error_set(err, ENOMEM, "out of memory");
    s->wake_fd = -EBADF;
    s->changed = options->changed;
    s->userdata = options->userdata;
    s->folders = calloc(options->n_folders + 1, sizeof(*s->folders));
    if (!s->folders)
        return error_set(err, ENOMEM, "out of memory");
    if (options->state_dir) {
        s->state_dir = strdup(options->state_dir);
        if (asprintf(&s->install_folder, "%s/models", options->state_dir) < 0)
            s->install_folder = NULL;
        if (!s->state_dir || !s->install_folder || add_folder(s, s->install_folder) < 0)
            return error_set(err, ENOMEM, "out of memory");
        remove_left_overs(s->install_folder);
        read_default(s);
    }
    for (size_t i = 0; i < options->n_folders && r >= 0; i++)
        r = add_folder(s, options->folders[i]);
    if (r >= 0)
        r = refresh(s, false);
    if (r < 0)
        return error_set(err, -r, "out of memory");
    s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->wake_fd < 0)
        return error_set(err, errno, "eventfd: %s", strerror(errno));
    r = sd_event_add_io(options->event, &s->wake_source, s->wake_fd, EPOLLIN, on_wake, s);
    if (r < 0)
        return error_set(err, -r, "cannot set up the event loop: %s", strerror(-r));
    *ret = TAKE_PTR(s);
    return 0;
}

struct model_store *model_store_free(struct model_store *s)
{
    if (!s)
        return NULL;
    for (struct install *i = s->installs; i; i = i->next)
        i->stop = true;
    while (s->installs) {
        struct install *i = s->installs;

        take_out(s, i);
        if (i->finished)
            i->finished(i->userdata, i->name, -ECANCELED);
        install_free(i);
    }
    sd_event_source_disable_unref(s->wake_source);
    closep(&s->wake_fd);
    for (size_t i = 0; i < s->n_entries; i++)
        entry_free(s->entries[i]);
    free(s->entries);
    for (size_t i = 0; i < s->n_folders; i++)
        free(s->folders[i]);
    free(s->folders);
    free(s->default_name);
    free(s->install_folder);
    free(s->state_dir);
    free(s);
    return NULL;
}

void model_store_freep(struct model_store **s)
{
    *s = model_store_free(*s);
}
