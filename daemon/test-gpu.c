/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The device in software that machines without a GPU have: found, kept from drivers that misbehave,
 * and used from inside the sandbox that a daemon with it is in. Each test is a child, since what a
 * process has loaded it has for good; what it says comes through a pipe.
 *
 *   test-gpu BAD_DRIVER    77: there is no such device
 */

#undef NDEBUG
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "backends/vulkan/vulkan.h"
#include "base/checked.h"
#include "base/cleanup.h"
#include "base/thread-signals.h"
#include "daemon/gpu.h"
#include "daemon/landlock.h"
#include "daemon/sandbox.h"

#define NAME "LLVMpipe" /* in any case */
#define SOFTWARE_DRIVER "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json"
#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif

#define VALIDATION "/usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json"
#define VALIDATION_LIBRARY "VkLayer_khronos_validation"

#define SAID_BYTES 65536

static char folder[64], said[SAID_BYTES];
static char *bad_driver;

/* Until a few more calls. */
static char *in_folder(const char *name)
{
    static char paths[8][128];
    static unsigned n;
    char *path = paths[n++ % ARRAY_SIZE(paths)];

    snprintf(path, sizeof(paths[0]), "%s/%s", folder, name);
    return path;
}

static bool has_line(const char *path, const char *text)
{
    CLEANUP(fclosep) FILE *f = fopen(path, "re");
    char line[4096];

    assert(f);
    while (fgets(line, sizeof(line), f))
        if (strstr(line, text))
            return true;
    return false;
}

static unsigned n_threads(void)
{
    CLEANUP(closedirp) DIR *dir = opendir("/proc/self/task");
    unsigned n = 0;

    for (const struct dirent *d; (d = readdir(dir));)
        n += d->d_name[0] != '.';
    return n;
}

/* The child's status; what it says on standard error is in `said`. */
static int run(void (*child)(void))
{
    CLEANUP(closep) int fd = memfd_create("said", MFD_CLOEXEC);
    int status;
    pid_t pid;
    ssize_t n;

    assert(fd >= 0);
    fflush(NULL);
    pid = fork();
    assert(pid >= 0);
    if (pid == 0) {
        assert(dup2(fd, STDERR_FILENO) >= 0);
        child();
        _exit(0);
    }
    assert(waitpid(pid, &status, 0) == pid);
    n = pread(fd, said, sizeof(said) - 1, 0);
    assert(n >= 0);
    said[n] = 0;
    return status;
}

static void must_pass(void (*child)(void), const char *what)
{
    int status = run(child);

    if (status != 0) {
        fprintf(stderr, "%s: status %#x; it said:\n%s", what, (unsigned)status, said);
        abort();
    }
}

static struct gpu *find(const struct gpu_options *o)
{
    struct error err = {0};
    unsigned before = n_threads();
    struct gpu *g = NULL;
    int r = gpu_find(&g, o, &err);

    if (r < 0)
        fprintf(stderr, "%s\n", err.text);
    assert(r == 0 && n_threads() == before);
    if (g && !gpu_device(g)) {
        assert(gpu_failure(g)[0]);
        return gpu_free(g);
    }
    assert(!gpu_failure(g));
    return g;
}

/* ---- finding ---- */

static void not_asked_for(void)
{
    assert(!find(&(struct gpu_options){.mode = PLACE_CPU, .device = NAME}));
    if (access("/dev/dri", F_OK) < 0)
        assert(!find(&(struct gpu_options){.mode = PLACE_AUTO}));
    assert(!has_line("/proc/self/maps", "libvulkan"));
    assert(!getenv("MESA_SHADER_CACHE_DISABLE"));
}

static void by_name(void)
{
    struct gpu *g = find(&(struct gpu_options){.mode = PLACE_AUTO, .device = NAME});

    assert(g && vulkan_device_is_software(gpu_device(g)));
    gpu_free(g);
}

static void no_such_name(void)
{
    assert(!find(&(struct gpu_options){.mode = PLACE_HYBRID, .device = "no such GPU"}));
    assert(!has_line("/proc/self/maps", "libvulkan")); /* it was the child that looked */
}

static void never_by_itself(void)
{
    assert(!find(&(struct gpu_options){.mode = PLACE_GPU}));
}

static void without_code(void)
{
    if (prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) < 0)
        _exit(77); /* Linux 6.3 */
    assert(!find(&(struct gpu_options){.mode = PLACE_HYBRID, .device = NAME}));
}

static void misbehaves(void)
{
    char drivers[300];

    snprintf(drivers, sizeof(drivers), "%s:%s", in_folder("bad.json"), SOFTWARE_DRIVER);
    assert(setenv("VK_ICD_FILENAMES", drivers, 1) == 0);
    assert(
        !find(&(struct gpu_options){.mode = PLACE_HYBRID, .device = NAME, .patience_msec = 2000}));
}

static void test_finding(void)
{
    static const struct {
        const char *how, *told;
    } bad[] = {{"crashes", "ends the process that loads it"},
               {"hangs", "does not answer for 2 seconds"},
               {"starts a thread", "starts threads"},
               {"stays", "keeps the process that loads it from ending"},
               {"opens a card", "keeps a card of /dev/dri open"}};
    CLEANUP(fclosep) FILE *f = fopen(in_folder("bad.json"), "we");
    int status;

    must_pass(not_asked_for, "not asked for");
    assert(!said[0]);
    must_pass(by_name, "by name");
    assert(strstr(said, "GPU: llvmpipe") && strstr(said, "(in software)"));
    must_pass(no_such_name, "no such name");
    assert(strstr(said, "no GPU is used, the processor computes: ") &&
           strstr(said, "'no such GPU'") && strstr(said, "llvmpipe"));
    must_pass(never_by_itself, "never by itself");
    assert(strstr(said, "no GPU is used") && strstr(said, "llvmpipe"));
    status = run(without_code);
    assert(WEXITSTATUS(status) == 77 || (status == 0 && strstr(said, "no GPU is used") &&
                                         strstr(said, "MemoryDenyWriteExecute=")));

    assert(f &&
           fprintf(f,
                   "{\"file_format_version\": \"1.0.0\", \"ICD\": {\"library_path\": \"%s\", "
                   "\"api_version\": \"1.2.0\"}}",
                   bad_driver) > 0 &&
           fflush(f) == 0);
    must_pass(by_name, "the driver that does nothing bad");
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        if (strcmp(bad[i].how, "opens a card") == 0 &&
            mknod(in_folder("card"), S_IFCHR | 0600, makedev(226, 0)) < 0)
            continue; /* not root */
        setenv("BAD_DRIVER", bad[i].how, 1);
        setenv("BAD_DRIVER_CARD", in_folder("card"), 1);
        must_pass(misbehaves, bad[i].how);
        if (!strstr(said, bad[i].told)) {
            fprintf(stderr, "a driver that %s: %s", bad[i].how, said);
            abort();
        }
    }
    unsetenv("BAD_DRIVER");
}

/* ---- the environment ---- */

static void put_environment(enum service_scope scope)
{
    static const char *const names[] = {"HOME", "XDG_DATA_HOME", "VK_INSTANCE_LAYERS",
                                        "VK_LAYER_PATH"};

    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        setenv(names[i], "/nonexistent", 1);
    unsetenv("VK_INSTANCE_LAYERS"); /* one that is not there is an error */
    if (scope == SCOPE_SYSTEM)
        setenv("VK_INSTANCE_LAYERS", "no_such_layer", 1);
    gpu_free(find(&(struct gpu_options){.mode = PLACE_HYBRID, .device = NAME, .scope = scope}));
    assert(strcmp(getenv("MESA_SHADER_CACHE_DISABLE"), "true") == 0);
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (strcmp(names[i], "VK_INSTANCE_LAYERS") != 0)
            assert(!!getenv(names[i]) == (scope != SCOPE_SYSTEM));
    assert(!getenv("VK_INSTANCE_LAYERS"));
    assert(strcmp(getenv("VK_LOADER_LAYERS_DISABLE"),
                  scope == SCOPE_SYSTEM ? "~all~" : "~implicit~") == 0);
}

static void systems_environment(void)
{
    put_environment(SCOPE_SYSTEM);
}

static void users_environment(void)
{
    put_environment(SCOPE_USER);
}

/* A layer that somebody names, and one of the machine's that installs itself. */
static void put_layers(enum service_scope scope)
{
    struct gpu *g;

    setenv("VK_INSTANCE_LAYERS", "VK_LAYER_KHRONOS_validation", 1);
    g = find(&(struct gpu_options){.mode = PLACE_HYBRID, .device = NAME, .scope = scope});
    assert(g);
    assert(has_line("/proc/self/maps", VALIDATION_LIBRARY) == (scope != SCOPE_SYSTEM));
    assert(!has_line("/proc/self/maps", "VkLayer_MESA_device_select"));
    gpu_free(g);
}

static void systems_layers(void)
{
    put_layers(SCOPE_SYSTEM);
}

static void private_layers(void)
{
    put_layers(SCOPE_PRIVATE);
}

/* A driver in the home directory: what a daemon that was taken over might have put there. */
static void put_driver(enum service_scope scope)
{
    char *folders[] = {in_folder(".local"), in_folder(".local/share"),
                       in_folder(".local/share/vulkan"), in_folder(".local/share/vulkan/icd.d")};
    struct gpu *g;

    for (size_t i = 0; i < ARRAY_SIZE(folders); i++)
        (void)!mkdir(folders[i], 0700);
    (void)!symlink(in_folder("bad.json"), in_folder(".local/share/vulkan/icd.d/bad.json"));
    unsetenv("VK_ICD_FILENAMES");
    unsetenv("XDG_DATA_HOME");
    setenv("HOME", folder, 1);
    setenv("BAD_DRIVER", "crashes", 1);
    g = find(&(struct gpu_options){.mode = PLACE_HYBRID, .device = NAME, .scope = scope});
    assert(!g == (scope != SCOPE_SYSTEM)); /* who has a home chooses what is in it */
    gpu_free(g);
}

static void systems_driver(void)
{
    put_driver(SCOPE_SYSTEM);
}

static void users_driver(void)
{
    put_driver(SCOPE_USER);
}

static void test_environment(void)
{
    must_pass(systems_driver, "no driver from home");
    must_pass(users_driver, "a user's driver");
    if (access(VALIDATION, F_OK) == 0) {
        must_pass(systems_layers, "no layers for the system's");
        must_pass(private_layers, "layers that a user names");
    }
    must_pass(systems_environment, "the system's environment");
    assert(strstr(said, "GPU: llvmpipe"));
    must_pass(users_environment, "a user's environment");
    assert(strstr(said, "GPU: llvmpipe"));
}

/* ---- what was compiled ---- */

static void compute(struct gpu *g)
{
    const struct backend_limits limits = {.max_rows = 1, .max_width = 64, .max_heads = 1};
    CLEANUP(backend_freep) struct backend *b = NULL;
    struct error err = {0};
    float *x;

    if (backend_vulkan_new(&b, gpu_device(g), &limits, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    x = backend_alloc(b, 64 * sizeof(*x));
    assert(x);
    for (int i = 0; i < 64; i++)
        x[i] = (float)(i - 32);
    b->ops->softcap(b, x, 64, 30.0f);
    assert(backend_finish(b) == 0);
    for (int i = 0; i < 64; i++)
        assert(fabsf(x[i] - 30.0f * tanhf((float)(i - 32) / 30.0f)) < 1e-4f);
    backend_release(b, x, 64 * sizeof(*x));
}

static const struct gpu_options *with_cache(void)
{
    static struct gpu_options o = {.mode = PLACE_HYBRID, .device = NAME};

    o.cache_folder = in_folder("cache/llmd");
    return &o;
}

static void compiles_and_keeps(void)
{
    struct gpu *g = find(with_cache());

    compute(g);
    gpu_save_cache(g);
    gpu_free(g);
}

/* Nothing new: the file is not touched. */
static void has_it_already(void)
{
    struct gpu *g = find(with_cache());
    struct stat before, after;

    assert(stat(in_folder("cache/llmd/vulkan-cache"), &before) == 0);
    compute(g);
    gpu_save_cache(g);
    gpu_free(g);
    assert(stat(in_folder("cache/llmd/vulkan-cache"), &after) == 0);
    assert(before.st_ino == after.st_ino);
}

static void cannot_keep(void)
{
    struct gpu *g = find(with_cache());

    assert(rename(in_folder("cache/llmd"), in_folder("cache/away")) == 0);
    compute(g);
    gpu_save_cache(g);
    gpu_save_cache(g);
    gpu_free(g);
    assert(rename(in_folder("cache/away"), in_folder("cache/llmd")) == 0);
}

static ino_t inode(void)
{
    struct stat st;

    assert(stat(in_folder("cache/llmd/vulkan-cache"), &st) == 0);
    assert((st.st_mode & 07777) == 0600 && st.st_size > 48);
    return st.st_ino;
}

static void test_cache(void)
{
    const char *path = in_folder("cache/llmd/vulkan-cache");
    struct stat st;
    ino_t first;
    int fd;

    must_pass(compiles_and_keeps, "keeps");
    first = inode();
    must_pass(has_it_already, "has it already");
    assert(inode() == first && !strstr(said, "damaged"));

    /* A bit that flipped, somewhere in the driver's own data. */
    fd = open(path, O_RDWR | O_CLOEXEC);
    char c;
    assert(fd >= 0 && pread(fd, &c, 1, 60) == 1 && (c ^= 4, pwrite(fd, &c, 1, 60) == 1));
    close(fd);
    must_pass(compiles_and_keeps, "damaged");
    assert(inode() != first && strstr(said, "is damaged"));
    first = inode();
    must_pass(has_it_already, "written anew");

    assert(truncate(path, 20) == 0);
    must_pass(compiles_and_keeps, "cut");
    assert(inode() != first && strstr(said, "is damaged") && truncate(path, (off_t)1 << 40) == 0);
    must_pass(compiles_and_keeps, "huge");
    assert(stat(path, &st) == 0 && st.st_size < 64 << 20 && strstr(said, "is damaged"));

    assert(unlink(path) == 0);
    must_pass(cannot_keep, "cannot be kept");
    const char *told = strstr(said, "is not kept: No such file");
    assert(told && !strstr(told + 1, "is not kept"));
}

/* ---- crashes ---- */

static void crashes(void)
{
    assert(find(with_cache()));
    abort();
}

static void is_killed(void)
{
    assert(find(with_cache()));
    raise(SIGKILL);
}

static void rests_and_crashes(void)
{
    struct gpu *g = find(with_cache());

    assert(g);
    gpu_rests(g);
    abort();
}

static void is_left_alone(void)
{
    assert(!find(with_cache()));
}

static void is_used(void)
{
    struct gpu *g = find(with_cache());

    assert(g);
    gpu_free(g);
}

static void must_crash(void (*child)(void), int signal_number)
{
    int status = run(child);

    if (WIFSIGNALED(status) && WTERMSIG(status) == signal_number && strstr(said, "GPU: llvmpipe") &&
        !strstr(said, "Assertion"))
        return;
    fprintf(stderr, "status %#x; it said:\n%s", (unsigned)status, said);
    abort();
}

static void test_crashes(void)
{
    const char *path = in_folder("cache/llmd/vulkan-crashes");
    const struct timespec past[] = {{.tv_sec = time(NULL) - 25 * 60 * 60},
                                    {.tv_sec = time(NULL) - 25 * 60 * 60}};

    must_crash(crashes, SIGABRT);
    must_crash(is_killed, SIGKILL); /* which says nothing of a driver */
    must_crash(crashes, SIGABRT);
    must_pass(is_used, "after two");
    must_crash(rests_and_crashes, SIGABRT); /* the first again */
    must_crash(crashes, SIGABRT);
    must_crash(crashes, SIGABRT);
    must_pass(is_left_alone, "after three");
    assert(strstr(said, "no GPU is used") && strstr(said, "the last 3 processes") &&
           strstr(said, "vulkan-crashes"));
    must_pass(is_left_alone, "still");

    assert(utimensat(AT_FDCWD, path, past, 0) == 0);
    must_crash(crashes, SIGABRT); /* the first */
    must_pass(is_used, "a day later");
    must_crash(crashes, SIGABRT);
    must_crash(crashes, SIGABRT);
    must_pass(is_left_alone, "again");
    assert(unlink(path) == 0);
    must_pass(is_used, "by hand");
}

/* ---- inside ---- */

static int result(long r)
{
    return r < 0 ? -errno : 0;
}

static int opens(const char *path, int flags)
{
    CLEANUP(closep) int fd = open(path, flags | O_CLOEXEC);

    return result(fd);
}

/* Tries what must not be, and ends by a crash, which is noted from there too. */
static void inside(void)
{
    CLEANUP(sandbox_freep) struct sandbox *s = NULL;
    struct gpu *g = find(with_cache());
    sigset_t for_others;
    struct error lacks, err = {0};
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    assert(g && sandbox_new(&s, SANDBOX_STRICT) == 0);
    sandbox_tell_stderr(s, "test", false);
    assert(sandbox_allow_calls(s, &seccomp_llmd) == 0);
    assert(sandbox_allow_path(s, "/proc", SANDBOX_READ_FILES, NULL) == 0);
    assert(sandbox_allow_path(s, "/sys/devices/system/cpu", SANDBOX_READ_FILES, NULL) == 0);
    assert(gpu_allow(g, s) == 0);
    assert(sandbox_enter(s, &lacks, &err) == 0 && !lacks.text[0]);
    thread_signals_for_others(&for_others); /* as the engine thread */
    pthread_sigmask(SIG_SETMASK, &for_others, NULL);

    compute(g);
    gpu_save_cache(g);
    assert(opens(in_folder("cache/llmd/vulkan-cache"), O_RDONLY) == 0);
    assert(opens(in_folder("card"), O_RDWR) == -EACCES || geteuid() != 0);
    assert(opens("/etc/passwd", O_RDONLY) == -EACCES && opens("/dev/null", O_RDWR) == -EACCES);
    assert(opens(in_folder("bad.json"), O_RDONLY) == -EACCES);
    fprintf(stderr, "so far\n");
    assert(result(socket(AF_INET, SOCK_STREAM, 0)) == -EPERM);
    assert(result(mprotect(p, 4096, PROT_READ | PROT_WRITE | PROT_EXEC)) == -EPERM);
    abort();
}

static void test_inside(void)
{
    const char *crashes_path = in_folder("cache/llmd/vulkan-crashes");
    struct stat st;

    must_crash(inside, SIGABRT);
    assert(stat(crashes_path, &st) == 0 && st.st_size == 1);
    const char *end = strstr(said, "so far\n"), *refused = strstr(said, "the sandbox refused");
    if (!end || !refused || refused < end) {
        fprintf(stderr, "inside it said:\n%s", said);
        abort();
    }
}

static void is_there(void)
{
    struct vulkan_device *d = NULL;
    struct error err = {0};

    if (vulkan_device_find(&d, &(struct vulkan_options){.name = NAME}, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        _exit(77);
    }
    vulkan_device_free(d);
}

int main(int argc, char **argv)
{
    char command[128];

    assert(argc == 2);
    bad_driver = realpath(argv[1], NULL); /* as the loader wants it */
    assert(bad_driver);
    setenv("VK_ICD_FILENAMES", SOFTWARE_DRIVER, 1);
    if (WEXITSTATUS(run(is_there)) == 77) {
        fputs(said, stdout);
        return 77;
    }
    snprintf(folder, sizeof(folder), "/tmp/llmd-gpu-XXXXXX");
    assert(mkdtemp(folder));
    test_finding();
    test_environment();
    test_cache();
    test_crashes();
    if (landlock_version() > 0 && HAVE_SECCOMP)
        test_inside();
    snprintf(command, sizeof(command), "rm -r %s", folder);
    assert(system(command) == 0);
    free(bad_driver);
    return 0;
}
