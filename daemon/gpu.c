/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A driver is a library that somebody else chose, and it is loaded before there is a sandbox, which
 * lets no library in. So a child looks first: a driver that crashes, hangs, starts threads
 * (landlock does not reach those that are there already) or opens a card costs a GPU, and not the
 * daemon.
 *
 * The kept file is what the driver gave, behind a head of our own. Drivers know their own data by
 * its beginning, but trust what follows; the hash sees to it that this is what was written.
 */

#include "daemon/gpu.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/whole-io.h"
#include "daemon/log.h"
#include "daemon/places.h"
#include "daemon/sandbox.h"

#define PATIENCE_MSEC 20000 /* a GPU that was asleep takes a second or two */
#define RENDER_NODES "/dev/dri"
#define POWER_SUPPLIES "/sys/class/power_supply"
#define DRM_MAJOR 226
#define FIRST_RENDER_MINOR 128

#define CACHE_NAME "vulkan-cache"
#define CRASHES_NAME "vulkan-crashes"
#define CRASHES_MAX 3
#define CRASHES_SECONDS (24 * 60 * 60)
#define CACHE_BYTES_MAX ((size_t)64 << 20)
#define HASH_BYTES 32
#define SAVE_USEC UINT64_C(60000000)

struct cache_head {
    char magic[16];
    uint8_t hash[HASH_BYTES]; /* SHA-256 of all that follows */
};
static const char magic[16] = "llmd-vulkan-1\n";

struct gpu {
    struct vulkan_device *device;
    struct gpu_options options;
    struct error failure;     /* why there is no device */
    uint8_t kept[HASH_BYTES]; /* what the file has; zeros: nothing that is of use */
    bool failure_said;
    uint64_t saved_usec; /* when gpu_save_cache() last looked; 0: never */
};

/* ---- what the process has ---- */

/* Entries of a folder for which `counts` holds; 0 where it cannot be read. */
static unsigned count_in(const char *folder, bool (*counts)(const char *name))
{
    CLEANUP(closedirp) DIR *dir = opendir(folder);
    const struct dirent *d;
    unsigned n = 0;

    while (dir && (d = readdir(dir)))
        n += d->d_name[0] != '.' && counts(d->d_name);
    return n;
}

static bool is_any(const char *name)
{
    (void)name;
    return true;
}

static bool is_render_node(const char *name)
{
    return strncmp(name, "renderD", 7) == 0;
}

/* A node by which screens are set up and what others draw can be seen. */
static bool is_open_card(const char *name)
{
    struct stat st;

    return fstat(atoi(name), &st) == 0 && S_ISCHR(st.st_mode) && major(st.st_rdev) == DRM_MAJOR &&
           minor(st.st_rdev) < FIRST_RENDER_MINOR;
}

static unsigned n_threads(void)
{
    return count_in("/proc/self/task", is_any);
}

/* After a driver was loaded; before: threads then. 0, -EPERM */
static int check_process(unsigned before, struct error *err)
{
    if (before == 0)
        return error_set(err, EPERM, "/proc cannot be read, so nobody knows what a driver does");
    if (n_threads() > before)
        return error_set(err, EPERM,
                         "its driver starts threads before the daemon is in its sandbox");
    if (count_in("/proc/self/fd", is_open_card) > 0)
        return error_set(err, EPERM, "its driver keeps a card of /dev/dri open");
    return 0;
}

/* A device in software would find out by a crash. 0, -EPERM */
static int check_code(const struct vulkan_device *device, struct error *err)
{
    void *p;
    int r;

    if (!vulkan_device_is_software(device))
        return 0;
    p = mmap(NULL, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return error_set(err, errno, "%s", strerror(errno));
    r = mprotect(p, 1, PROT_READ | PROT_EXEC);
    munmap(p, 1);
    return r == 0 ? 0
                  : error_set(err, EPERM,
                              "%s makes machine code, which the service manager denies the daemon "
                              "(MemoryDenyWriteExecute=; see llmd-vulkan-software.conf)",
                              vulkan_device_name(device));
}

/* ---- looking for it ---- */

/*
 * Mesa's own cache of compiled shaders lies in the home directory and has a thread; ours is a file
 * of the daemon's. Layers that install themselves (overlays of games, recorders) are no code for
 * here. Those that a user names for his own daemon are, but a system's daemon takes neither layers
 * nor drivers from the environment's home: it may write there, and what it wrote would be loaded by
 * the next one before its sandbox.
 */
static void set_environment(enum service_scope scope)
{
    static const char *const not_the_systems[] = {"HOME",
                                                  "XDG_CONFIG_HOME",
                                                  "XDG_DATA_HOME",
                                                  "VK_INSTANCE_LAYERS",
                                                  "VK_LAYER_PATH",
                                                  "VK_ADD_LAYER_PATH",
                                                  "VK_LOADER_LAYERS_ENABLE",
                                                  "VK_IMPLICIT_LAYER_PATH",
                                                  "VK_LOADER_LAYERS_ALLOW"};

    setenv("MESA_SHADER_CACHE_DISABLE", "true", 1);
    if (scope != SCOPE_SYSTEM) {
        setenv("VK_LOADER_LAYERS_DISABLE", "~implicit~", 0);
        return;
    }
    setenv("VK_LOADER_LAYERS_DISABLE", "~all~", 1);
    for (size_t i = 0; i < ARRAY_SIZE(not_the_systems); i++)
        unsetenv(not_the_systems[i]);
}

struct trial {
    int result;
    char text[sizeof(((struct error *)NULL)->text)];
};

static _Noreturn void try_it(const struct vulkan_options *o, int fd)
{
    struct trial t = {.result = 0};
    struct vulkan_device *device;
    struct error err = {0};
    unsigned before = n_threads();
    int nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (nowhere >= 0) /* what it has to say it will say again */
        (void)!(dup2(nowhere, STDOUT_FILENO) + dup2(nowhere, STDERR_FILENO));
    t.result = vulkan_device_find(&device, o, &err);
    if (t.result >= 0)
        t.result = check_process(before, &err);
    if (t.result >= 0)
        t.result = check_code(device, &err);
    snprintf(t.text, sizeof(t.text), "%s", err.text);
    (void)!write(fd, &t, sizeof(t));
    _exit(EXIT_SUCCESS);
}

/* True: something came, or the other end is closed (POLLHUP). */
static bool comes(int fd, short events, unsigned patience_msec)
{
    struct pollfd p = {.fd = fd, .events = events};
    int n;

    do
        n = poll(&p, 1, (int)patience_msec);
    while (n < 0 && errno == EINTR);
    return n > 0;
}

/* 0: it can be had; -errno */
static int try_in_child(const struct vulkan_options *o, unsigned patience_msec, struct error *err)
{
    struct trial t = {.result = 0};
    int ends[2], status = 0;
    bool answers, ends_well;
    ssize_t n = 0;
    pid_t pid;

    if (pipe2(ends, O_CLOEXEC) < 0)
        return error_set(err, errno, "%s", strerror(errno));
    pid = fork();
    if (pid == 0)
        try_it(o, ends[1]);
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        return error_set(err, errno, "%s", strerror(errno));
    }
    answers = comes(ends[0], POLLIN, patience_msec);
    if (answers)
        n = read(ends[0], &t, sizeof(t));
    if (n != sizeof(t))
        kill(pid, SIGKILL);
    ends_well = comes(ends[0], 0, patience_msec);
    close(ends[0]);
    /* One that the kernel's part of a driver holds back does not die, and is not waited for. */
    while (ends_well && waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (answers && !ends_well)
        return error_set(err, ETIMEDOUT, "its driver keeps the process that loads it from ending");
    if (!answers)
        return error_set(err, ETIMEDOUT, "its driver does not answer for %g seconds",
                         patience_msec / 1000.0);
    if (n != sizeof(t))
        return error_set(err, EIO, "its driver ends the process that loads it (status %#x)",
                         (unsigned)status);
    t.text[sizeof(t.text) - 1] = 0;
    return t.result < 0 ? error_set(err, -t.result, "%s", t.text) : 0;
}

/* ---- the file ---- */

/* malloc'ed; NULL: there is none, or no memory */
static char *file_in_cache(const struct gpu_options *o, const char *name)
{
    char *path;

    return !o->cache_folder || asprintf(&path, "%s/%s", o->cache_folder, name) < 0 ? NULL : path;
}

static int hash_of(const void *data, size_t n, uint8_t *ret)
{
    return EVP_Digest(data, n, ret, NULL, EVP_sha256(), NULL) == 1 ? 0 : -EIO;
}

/* NULL: there is none, or it is of no use. */
static void *read_cache(struct gpu *g, size_t *ret_bytes)
{
    CLEANUP(freep) char *path = file_in_cache(&g->options, CACHE_NAME);
    CLEANUP(closep) int fd = path ? open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW) : -EBADF;
    struct cache_head head;
    uint8_t hash[HASH_BYTES];
    CLEANUP(freep) char *data = NULL;
    struct stat st;
    size_t n;

    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        return NULL;
    n = (size_t)MAX(st.st_size, (off_t)sizeof(head)) - sizeof(head);
    if (n > 0 && n <= CACHE_BYTES_MAX)
        data = malloc(n);
    if (!data || read_whole(fd, &head, sizeof(head), 0) < 0 ||
        memcmp(head.magic, magic, sizeof(magic)) != 0 ||
        read_whole(fd, data, n, sizeof(head)) < 0 || hash_of(data, n, hash) < 0 ||
        memcmp(hash, head.hash, HASH_BYTES) != 0) {
        log_notice("%s: is damaged, or of another version; what it held is compiled again", path);
        return NULL;
    }
    memcpy(g->kept, hash, HASH_BYTES);
    *ret_bytes = n;
    return TAKE_PTR(data);
}

/* 0, -errno */
static int write_cache(const struct gpu *g, const struct cache_head *head, const void *data,
                       size_t n)
{
    CLEANUP(freep) char *path = file_in_cache(&g->options, CACHE_NAME);

    return path ? replace_file(path, head, sizeof(*head), data, n) : -ENOMEM;
}

void gpu_save_cache(struct gpu *g)
{
    struct cache_head head;
    CLEANUP(freep) char *data = NULL;
    void *given = NULL;
    size_t n = 0;
    int r;

    if (!gpu_device(g) || !g->options.cache_folder ||
        vulkan_device_cache(g->device, &given, &n) < 0)
        return;
    data = given;
    g->saved_usec = now_usec();
    memcpy(head.magic, magic, sizeof(magic));
    if (n == 0 || hash_of(data, n, head.hash) < 0 || memcmp(head.hash, g->kept, HASH_BYTES) == 0)
        return;
    r = n > CACHE_BYTES_MAX ? -EFBIG : write_cache(g, &head, data, n);
    if (r >= 0)
        memcpy(g->kept, head.hash, HASH_BYTES);
    else if (!g->failure_said)
        log_warning("%s: what the GPU's driver has compiled is not kept: %s",
                    g->options.cache_folder, strerror(-r));
    g->failure_said = r < 0;
}

/* ---- processes that crashed ---- */

/* Written by a signal handler. One byte for each process that crashed with a GPU. */
static int crashes_fd = -EBADF;

static void on_crash(int number)
{
    (void)!write(crashes_fd, "x", 1);
    raise(number); /* which now ends the process */
}

/* Those in a row, the last of which is not long ago. *ret_path: where that stands, malloc'ed */
static unsigned count_crashes(const struct gpu *g, char **ret_path)
{
    struct stat st;

    *ret_path = g->options.cache_folder ? file_in_cache(&g->options, CRASHES_NAME) : NULL;
    if (!*ret_path || lstat(*ret_path, &st) < 0 || !S_ISREG(st.st_mode) ||
        time(NULL) - st.st_mtime >= CRASHES_SECONDS)
        return 0;
    return (unsigned)MIN(st.st_size, (off_t)CRASHES_MAX);
}

/* A sanitizer that has a handler of its own keeps it. */
static void watch_crashes(const struct gpu *g, const char *path, unsigned n)
{
    static const int signals[] = {SIGSEGV, SIGILL, SIGFPE, SIGABRT};
    struct sigaction action = {.sa_handler = on_crash, .sa_flags = SA_RESETHAND | SA_NODEFER}, is;

    if (!path)
        return;
    places_make_folder(g->options.cache_folder);
    crashes_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (crashes_fd < 0)
        return;
    if (n == 0)
        (void)!ftruncate(crashes_fd, 0); /* too long ago */
    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < ARRAY_SIZE(signals); i++)
        if (sigaction(signals[i], NULL, &is) == 0 && is.sa_handler == SIG_DFL)
            sigaction(signals[i], &action, NULL);
}

void gpu_rests(struct gpu *g)
{
    if (!g)
        return;
    if (crashes_fd >= 0)
        (void)!ftruncate(crashes_fd, 0);
    if (g->saved_usec == 0 || now_usec() - g->saved_usec >= SAVE_USEC)
        gpu_save_cache(g);
}

/* ---- the whole ---- */

/* Nobody has named one: where there is no node, no driver has hardware, and none is loaded. */
static bool is_hopeless(const struct gpu_options *o)
{
    return o->mode == PLACE_AUTO && !o->device && count_in(RENDER_NODES, is_render_node) == 0;
}

static int find(struct gpu *g, struct error *err)
{
    struct vulkan_options vulkan = {.name = g->options.device};
    CLEANUP(freep) void *cache = NULL;
    CLEANUP(freep) char *crashes = NULL;
    unsigned before = n_threads(), n_crashes = count_crashes(g, &crashes);
    int r;

    if (n_crashes >= CRASHES_MAX)
        return error_set(err, ECANCELED,
                         "the last %u processes that used it have crashed; it is left alone for a "
                         "day, or until %s is removed",
                         n_crashes, crashes);
    set_environment(g->options.scope);
    r = try_in_child(&vulkan,
                     g->options.patience_msec > 0 ? g->options.patience_msec : PATIENCE_MSEC, err);
    if (r < 0)
        return r;
    cache = read_cache(g, &vulkan.cache_bytes);
    vulkan.cache = cache;
    r = vulkan_device_find(&g->device, &vulkan, err);
    if (r < 0)
        return r;
    r = check_process(before, err);
    if (r < 0) /* not so in the child */
        g->device = vulkan_device_free(g->device);
    else
        watch_crashes(g, crashes, n_crashes);
    return r;
}

int gpu_find(struct gpu **ret, const struct gpu_options *o, struct error *err)
{
    unsigned before = n_threads();
    struct gpu *g;
    int r;

    *ret = NULL;
    if (o->mode == PLACE_CPU)
        return 0;
    if (is_hopeless(o)) {
        log_debug("no GPU is used: there is no render node in " RENDER_NODES);
        return 0;
    }
    g = calloc(1, sizeof(*g));
    if (!g)
        return error_set(err, ENOMEM, "out of memory");
    g->options = *o;
    r = find(g, &g->failure);
    g->options.device = NULL; /* of a configuration that may be read again */
    if (r < 0) {
        if (!g->failure.text[0])
            error_set(&g->failure, -r, "%s", strerror(-r));
        log_line(o->mode == PLACE_AUTO && !o->device ? LOG_INFO : LOG_WARNING,
                 "no GPU is used, the processor computes: %s", g->failure.text);
        if (n_threads() > before) {
            r = error_set(err, EPERM, "%s; start llmd with --backend=cpu", g->failure.text);
            gpu_free(g);
            return r;
        }
    } else {
        log_info("GPU: %s%s", vulkan_device_name(g->device),
                 vulkan_device_is_software(g->device) ? " (in software)" : "");
    }
    *ret = g;
    return 0;
}

struct gpu *gpu_free(struct gpu *g)
{
    if (g && g->device) {
        vulkan_device_free(g->device);
        closep(&crashes_fd);
        crashes_fd = -EBADF;
    }
    free(g);
    return NULL;
}

struct vulkan_device *gpu_device(const struct gpu *g)
{
    return g ? g->device : NULL;
}

const char *gpu_failure(const struct gpu *g)
{
    return g && !g->device ? g->failure.text : NULL;
}

/* Whether there is mains: links to what is elsewhere, which lead there now. */
static int allow_power_supplies(struct sandbox *b)
{
    CLEANUP(closedirp) DIR *dir = opendir(POWER_SUPPLIES);
    const struct dirent *d;
    int r = sandbox_allow_path(b, POWER_SUPPLIES, SANDBOX_READ, NULL);

    while (dir && r >= 0 && (d = readdir(dir))) {
        CLEANUP(freep) char *path = NULL;

        if (d->d_name[0] == '.')
            continue;
        if (asprintf(&path, POWER_SUPPLIES "/%s", d->d_name) < 0) {
            path = NULL;
            return -ENOMEM;
        }
        r = sandbox_allow_path(b, path, SANDBOX_READ_FILES, NULL);
    }
    return r;
}

/* The chosen one's node and what the kernel says of the device; where it is not known, of all. */
static int allow_node(struct sandbox *b, const char *node, unsigned minor_number)
{
    CLEANUP(freep) char *sys = NULL;
    int r = sandbox_allow_path(b, node, SANDBOX_DEVICE, NULL);

    if (r < 0 || asprintf(&sys, "/sys/dev/char/%d:%u/device", DRM_MAJOR, minor_number) < 0) {
        sys = NULL;
        return -ENOMEM;
    }
    return sandbox_allow_path(b, sys, SANDBOX_READ, NULL);
}

static int allow_nodes(struct sandbox *b, const struct vulkan_device *device)
{
    CLEANUP(closedirp) DIR *dir = opendir(RENDER_NODES);
    unsigned its_major = 0, its_minor = 0;
    bool known = vulkan_device_render_node(device, &its_major, &its_minor);
    const struct dirent *d;
    int r = 0;

    while (dir && r >= 0 && (d = readdir(dir))) {
        CLEANUP(freep) char *path = NULL;
        struct stat st;

        if (!is_render_node(d->d_name))
            continue;
        if (asprintf(&path, RENDER_NODES "/%s", d->d_name) < 0) {
            path = NULL;
            return -ENOMEM;
        }
        /* By its number, whatever a name says. */
        if (stat(path, &st) == 0 && S_ISCHR(st.st_mode) && major(st.st_rdev) == DRM_MAJOR &&
            minor(st.st_rdev) >= FIRST_RENDER_MINOR &&
            (!known || (its_major == DRM_MAJOR && its_minor == minor(st.st_rdev))))
            r = allow_node(b, path, minor(st.st_rdev));
    }
    return r;
}

int gpu_allow(const struct gpu *g, struct sandbox *b)
{
    int r;

    if (!gpu_device(g))
        return 0;
    r = g->options.cache_folder
            ? sandbox_allow_path(b, g->options.cache_folder, SANDBOX_WRITE, NULL)
            : 0;
    if (r < 0 || (r = allow_power_supplies(b)) < 0 ||
        (r = sandbox_allow_calls(b, &seccomp_vulkan)) < 0)
        return r;
    /* No node is that of a device in software, but code of the processor's is what it runs. */
    if (vulkan_device_is_software(g->device))
        return sandbox_allow_calls(b, &seccomp_machine_code);
    return allow_nodes(b, g->device);
}
