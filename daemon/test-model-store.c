/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* The store on folders of its own: listing, installing, every refusal, a disk that is full. */

#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "daemon/model-store.h"
#include "tests/model-builder.h"

static char folder[] = "/tmp/test-model-store-XXXXXX";
static sd_event *event;
static unsigned n_changes;
static char changed_name[128];
static enum store_change last_change;

static const char *in(const char *name)
{
    static char path[16][256];
    static unsigned i;

    i = (i + 1) % 16;
    snprintf(path[i], sizeof(path[i]), "%s/%s", folder, name);
    return path[i];
}

static void on_change(void *userdata, const char *name, enum store_change what)
{
    assert(what == STORE_CAME || what == STORE_WENT || what == STORE_CHANGED);
    last_change = what;
    assert(userdata == &n_changes);
    n_changes++;
    snprintf(changed_name, sizeof(changed_name), "%s", name);
}

struct ending {
    bool over;
    int r;
};

static void on_done(void *userdata, const char *name, int r)
{
    struct ending *e = userdata;

    (void)name;
    assert(!e->over);
    e->over = true;
    e->r = r;
}

static int wait_for(struct ending *e)
{
    while (!e->over)
        assert(sd_event_run(event, UINT64_MAX) >= 0);
    return e->r;
}

static void run(const char *command, const char *a, const char *b)
{
    char line[700];

    snprintf(line, sizeof(line), "%s '%s' %s%s%s", command, a, b ? "'" : "", b ? b : "",
             b ? "'" : "");
    assert(system(line) == 0);
}

static struct model_store *new_store(const char *state)
{
    const char *folders[] = {in("further"), in("absent")};
    struct model_store_options options = {
        .event = event,
        .state_dir = state,
        .folders = folders,
        .n_folders = 2,
        .changed = on_change,
        .userdata = &n_changes,
    };
    struct model_store *s = NULL;

    assert(model_store_new(&s, &options, NULL) == 0);
    return s;
}

static int open_model(void)
{
    int fd = open(in("source"), O_RDONLY | O_CLOEXEC);

    assert(fd >= 0);
    return fd;
}

static int install(struct model_store *s, int fd, const char *name, bool replace,
                   struct ending *ending, struct error *err)
{
    int r;

    *ending = (struct ending){0};
    err->text[0] = 0;
    r = model_store_install(s, fd, name, replace, on_done, ending, err);
    assert((r < 0) == (err->text[0] != 0));
    return r;
}

static bool has_left_overs(const char *models)
{
    char line[400];

    snprintf(line, sizeof(line), "ls -A '%s' | grep -q '^\\.install'", models);
    return system(line) == 0;
}

static void test_names(void)
{
    static const char *const bad[] = {"",    ".",        "..", ".a",          "a/b", "../a", "a b",
                                      "a\n", "\xc3\xa4", "a*", "/etc/passwd", "a:b", "-\\"};
    char name[102];

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert(!model_name_valid(bad[i]));
    memset(name, 'x', sizeof(name));
    name[101] = 0;
    assert(!model_name_valid(name));
    name[100] = 0;
    assert(model_name_valid(name) && model_name_valid("gemma-3n_E4B.q4") && model_name_valid("a"));
}

static void test_listing(void)
{
    struct model_store *s = new_store(in("state"));
    const struct stored_model *m;

    assert(model_store_n(s) == 0 && !model_store_find(s, "one") && !model_store_default(s));
    run("mkdir -p", in("further"), NULL);
    run("cp", in("source"), in("further/one.llmd"));
    run("cp", in("source"), in("further/not a name.llmd"));
    run("cp", in("source"), in("further/.hidden.llmd"));
    run("cp", in("source"), in("further/other.safetensors"));
    run("cp /etc/hostname", in("further/broken.llmd"), NULL);
    run("mkdir", in("further/folder.llmd"), NULL);
    n_changes = 0;
    assert(model_store_refresh(s) == 0 && n_changes == 2 && model_store_n(s) == 2);
    assert(strcmp(model_store_get(s, 0)->name, "broken") == 0);
    m = model_store_find(s, "broken");
    assert(m->state == MODEL_FAILED && strstr(m->failure, "broken.llmd"));
    m = model_store_find(s, "one");
    assert(m->state == MODEL_AVAILABLE && m->progress == 1 && !m->removable && m->context_max > 0);
    assert(strstr(m->description, "5 layers, f32, context ") && strcmp(m->license, "") == 0);
    assert(model_store_refresh(s) == 0 && n_changes == 2);
    assert(model_store_remove(s, "one", NULL) == -EROFS && model_store_find(s, "one"));
    assert(unlink(in("further/broken.llmd")) == 0);
    assert(model_store_refresh(s) == 0 && n_changes == 3 && strcmp(changed_name, "broken") == 0);
    assert(last_change == STORE_WENT);
    assert(!model_store_find(s, "broken"));
    model_store_free(s);
}

static void test_install(void)
{
    struct model_store *s = new_store(in("state"));
    CLEANUP(closep) int fd = open_model();
    struct ending ending, second;
    struct error err;
    const struct stored_model *m;
    int bad, r;

    assert(mkdir(in("state"), 0700) == 0);
    assert(install(s, fd, "../evil", false, &ending, &err) == -EINVAL);
    assert(install(s, fd, "one", false, &ending, &err) == -EEXIST); /* in the further folder */

    n_changes = 0;
    assert(lseek(fd, 7, SEEK_SET) == 7); /* where the giver's offset is does not matter */
    assert(install(s, fd, "two", false, &ending, &err) == 0 && n_changes == 1);
    assert(last_change == STORE_CAME);
    m = model_store_find(s, "two");
    assert(m->state == MODEL_INSTALLING && m->progress <= 1);
    r = install(s, fd, "two", true, &second, &err);
    assert(r == -EBUSY);
    assert(wait_for(&ending) == 0 && n_changes == 2 && last_change == STORE_CHANGED);
    m = model_store_find(s, "two");
    assert(m->state == MODEL_AVAILABLE && !m->failure && m->removable && m->context_max > 0);
    run("cmp", in("source"), m->path);
    assert(!has_left_overs(in("state/models")));

    assert(install(s, fd, "two", false, &ending, &err) == -EEXIST);
    assert(install(s, fd, "two", true, &ending, &err) == 0 && wait_for(&ending) == 0);
    assert(install(s, fd, "one", true, &ending, &err) == 0 && wait_for(&ending) == 0);
    assert(model_store_find(s, "one")->removable); /* goes before the one in the further folder */

    /* What is no model is refused at once. */
    bad = open("/dev/null", O_RDONLY | O_CLOEXEC);
    assert(install(s, bad, "three", false, &ending, &err) == -EBADMSG);
    close(bad);
    bad = open("/etc/passwd", O_RDONLY | O_CLOEXEC);
    assert(install(s, bad, "three", false, &ending, &err) == -EBADMSG);
    close(bad);
    assert(!model_store_find(s, "three") && !has_left_overs(in("state/models")));

    /* A right header and wrong weights: found in the copy; what was there stays. */
    run("cp", in("source"), in("damaged"));
    bad = open(in("damaged"), O_RDWR | O_CLOEXEC);
    assert(bad >= 0 && pwrite(bad, "damage", 6, lseek(bad, 0, SEEK_END) / 2) == 6);
    assert(install(s, bad, "three", false, &ending, &err) == 0);
    assert(wait_for(&ending) == -EBADMSG);
    m = model_store_find(s, "three");
    assert(m->state == MODEL_FAILED && m->failure && strstr(m->failure, "three"));
    assert(access(in("state/models/three.llmd"), F_OK) < 0 && !has_left_overs(in("state/models")));
    assert(install(s, bad, "two", true, &ending, &err) == 0 && wait_for(&ending) == -EBADMSG);
    m = model_store_find(s, "two");
    assert(m->state == MODEL_AVAILABLE && m->failure);
    run("cmp", in("source"), m->path);
    close(bad);
    assert(install(s, fd, "three", false, &ending, &err) == 0 && wait_for(&ending) == 0);
    assert(model_store_find(s, "three")->state == MODEL_AVAILABLE);

    assert(model_store_remove(s, "none", NULL) == -ENOENT);
    assert(model_store_remove(s, "three", NULL) == 0 && !model_store_find(s, "three"));
    assert(access(in("state/models/three.llmd"), F_OK) < 0);
    assert(model_store_remove(s, "one", NULL) == 0);
    assert(model_store_find(s, "one") && !model_store_find(s, "one")->removable);

    /* Removed while it is copied, and a store that goes while one is. */
    assert(install(s, fd, "four", false, &ending, &err) == 0);
    assert(model_store_remove(s, "four", NULL) == 0 && ending.over);
    assert(!model_store_find(s, "four") && access(in("state/models/four.llmd"), F_OK) < 0);
    assert(install(s, fd, "five", false, &ending, &err) == 0);
    model_store_free(s);
    assert(ending.over && !has_left_overs(in("state/models")));

    s = new_store(NULL);
    assert(install(s, fd, "six", false, &ending, &err) == -EROFS);
    assert(model_store_set_default(s, "one", NULL) == -EROFS);
    model_store_free(s);
}

static void test_default(void)
{
    struct model_store *s = new_store(in("state"));

    assert(model_store_set_default(s, "../two", NULL) == -EINVAL && !model_store_default(s));
    assert(model_store_set_default(s, "two", NULL) == 0);
    assert(strcmp(model_store_default(s), "two") == 0);
    model_store_free(s);
    s = new_store(in("state"));
    assert(strcmp(model_store_default(s), "two") == 0);
    model_store_free(s);

    run("printf ../../etc/passwd >", in("state/default-model"), NULL);
    s = new_store(in("state"));
    assert(!model_store_default(s));
    model_store_free(s);
}

/* On a tmpfs too small for a second copy; only where mounting is allowed. */
static bool test_full(void)
{
    struct model_store *s;
    CLEANUP(closep) int fd = open_model();
    struct ending ending;
    struct error err;
    struct stat st;
    char size[64];

    assert(mkdir(in("small"), 0700) == 0 && fstat(fd, &st) == 0);
    snprintf(size, sizeof(size), "size=%lld", (long long)st.st_size * 3 / 2);
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("tmpfs", in("small"), "tmpfs", 0, size) < 0)
        return false;
    s = new_store(in("small"));
    assert(install(s, fd, "a", false, &ending, &err) == 0 && wait_for(&ending) == 0);
    assert(install(s, fd, "b", false, &ending, &err) == -ENOSPC && strstr(err.text, "no room"));
    assert(!model_store_find(s, "b") && !has_left_overs(in("small/models")));
    model_store_free(s);
    assert(umount(in("small")) == 0);
    return true;
}

int main(void)
{
    struct model_builder b = {.type = WEIGHT_F32, .seed = 1};
    bool full;

    assert(mkdtemp(folder));
    model_builder_config(&b.config, 5, 5, 64);
    model_builder_write(&b, in("source"));
    assert(sd_event_new(&event) >= 0);
    test_names();
    test_listing();
    test_install();
    test_default();
    full = test_full();
    sd_event_unref(event);
    run("rm -rf", folder, NULL);
    if (!full)
        puts("the full disk was left out: mounting needs privileges");
    return 0;
}
