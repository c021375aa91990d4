/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * From inside: each test is a child that enters a sandbox and tries things. Its exit status is what
 * it asserts, and what the sandbox says comes through a pipe.
 */

#undef NDEBUG
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/thread-signals.h"
#include "daemon/landlock.h"
#include "daemon/sandbox.h"

#define SAID_BYTES 65536

/* Requests as a GPU's driver makes them. */
#define DRM_VERSION 0xc0406400ul
#define SYNC_MERGE 0xc0303e03ul

static char folder[64]; /* with models/, state/, run/ and outside/ */

/* Until a few more calls. */
static char *in_folder(const char *name)
{
    static _Thread_local char paths[8][128];
    static _Thread_local unsigned n;
    char *path = paths[n++ % ARRAY_SIZE(paths)];

    snprintf(path, sizeof(paths[0]), "%s/%s", folder, name);
    return path;
}

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "we");

    assert(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

static int result(long r)
{
    return r < 0 ? -errno : 0;
}

static int opens(const char *path, int flags)
{
    CLEANUP(closep) int fd = open(path, flags | O_CLOEXEC, 0600);

    return result(fd);
}

/* ---- a child in a sandbox ---- */

struct run {
    int status; /* of wait() */
    char said[SAID_BYTES];
};

/* What a daemon without a GPU has not. */
static const struct seccomp_list *more_calls[2];

static void enter(enum sandbox_mode mode, const char *reachable)
{
    CLEANUP(sandbox_freep) struct sandbox *s = NULL;
    struct error lacks, err = {0};

    assert(sandbox_new(&s, mode) == 0);
    sandbox_tell_stderr(s, "test", false);
    assert(sandbox_allow_calls(s, &seccomp_llmd) == 0);
    for (size_t i = 0; i < ARRAY_SIZE(more_calls) && more_calls[i]; i++)
        assert(sandbox_allow_calls(s, more_calls[i]) == 0);
    assert(!reachable || sandbox_allow_connect(s, reachable) == 0);
    assert(sandbox_allow_path(s, in_folder("models"), SANDBOX_READ, NULL) == 0);
    assert(sandbox_allow_path(s, in_folder("state"), SANDBOX_WRITE, NULL) == 0);
    assert(sandbox_allow_path(s, in_folder("run"), SANDBOX_SOCKET, NULL) == 0);
    assert(sandbox_allow_path(s, in_folder("single"), SANDBOX_READ_FILE, NULL) == 0);
    assert(sandbox_allow_path(s, in_folder("single/link"), SANDBOX_READ_FILE, NULL) == 0);
    assert(sandbox_allow_path(s, "/proc", SANDBOX_READ_FILES, NULL) == 0);
    assert(sandbox_allow_path(s, "/dev/null", SANDBOX_DEVICE, NULL) == 0);
    assert(sandbox_allow_path(s, "/dev/full", SANDBOX_READ_FILES, NULL) == 0);
    assert(sandbox_allow_path(s, in_folder("outside"), SANDBOX_DEVICE, NULL) == 0);
    if (sandbox_enter(s, &lacks, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    assert(lacks.text[0] == 0);
}

static void run(struct run *r, void (*child)(const void *), const void *argument)
{
    int said[2];
    size_t n = 0;
    ssize_t got;
    pid_t pid;

    fflush(NULL);
    assert(pipe2(said, O_CLOEXEC) == 0);
    pid = fork();
    assert(pid >= 0);
    if (pid == 0) {
        assert(dup2(said[1], STDERR_FILENO) >= 0);
        child(argument);
        _exit(0);
    }
    close(said[1]);
    while ((got = read(said[0], r->said + n, sizeof(r->said) - 1 - n)) > 0)
        n += (size_t)got;
    r->said[n] = 0;
    close(said[0]);
    assert(waitpid(pid, &r->status, 0) == pid);
}

static unsigned lines(const struct run *r)
{
    unsigned n = 0;

    for (const char *at = r->said; (at = strchr(at, '\n')); at++)
        n++;
    return n;
}

static void must_pass(const struct run *r, const char *what)
{
    if (r->status == 0)
        return;
    fprintf(stderr, "%s: status %#x; it said:\n%s", what, (unsigned)r->status, r->said);
    abort();
}

/* ---- system calls that are refused ---- */

static int try_exec(void)
{
    char *const arguments[] = {(char *)"true", NULL};

    return result(execv("/bin/true", arguments));
}

static int try_fork(void)
{
    long pid = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);

    if (pid == 0)
        _exit(0);
    return result(pid);
}

static int try_namespace(void)
{
    return result(unshare(CLONE_NEWUSER));
}

static int try_namespace_by_clone(void)
{
    long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);

    if (pid == 0)
        _exit(0);
    return result(pid);
}

static int try_internet(void)
{
    return result(socket(AF_INET, SOCK_STREAM, 0));
}

static int try_netlink(void)
{
    return result(socket(AF_NETLINK, SOCK_RAW, 0));
}

static int connects(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    CLEANUP(closep) int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    assert(fd >= 0);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", in_folder(name));
    return result(connect(fd, (struct sockaddr *)&address, sizeof(address)));
}

static int try_connect(void)
{
    return connects("outside/socket");
}

static int try_ptrace(void)
{
    return result(ptrace(PTRACE_TRACEME, 0, NULL, NULL));
}

static int try_other_memory(void)
{
    return result(syscall(SYS_process_vm_readv, getppid(), NULL, 0, NULL, 0, 0));
}

static int try_ring(void)
{
    char parameters[256] = {0};

    return result(syscall(425, 4, parameters));
}

static int try_ring_entered(void)
{
    return result(syscall(426, 0, 0, 0, 0, NULL, 0));
}

static int try_writable_code(void)
{
    void *p =
        mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return p == MAP_FAILED ? -errno : 0;
}

static int try_code_of_a_file(void)
{
    CLEANUP(closep) int fd = open(in_folder("models/a.llmd"), O_RDONLY | O_CLOEXEC);
    void *p;

    assert(fd >= 0);
    p = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
    return p == MAP_FAILED ? -errno : 0;
}

static int try_memory_to_code(void)
{
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    assert(p != MAP_FAILED);
    return result(mprotect(p, 4096, PROT_READ | PROT_EXEC));
}

static int try_chmod(void)
{
    return result(syscall(SYS_fchmodat, AT_FDCWD, in_folder("outside/file"), 0777));
}

static int try_chown(void)
{
    return result(syscall(SYS_fchownat, AT_FDCWD, in_folder("outside/file"), 1, 1, 0));
}

static int try_setuid(void)
{
    return result(syscall(SYS_setresuid, 1, 1, 1));
}

static int try_mount(void)
{
    return result(syscall(SYS_mount, "none", "/", "tmpfs", 0, NULL));
}

static int try_signal(void)
{
    return result(kill(getppid(), SIGTERM));
}

static int try_signal_to_thread(void)
{
    return result(syscall(SYS_tgkill, getppid(), getppid(), SIGTERM));
}

static int try_bpf(void)
{
    return result(syscall(SYS_bpf, 0, NULL, 0));
}

static int try_dumpable(void)
{
    return result(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
}

static int try_limit(void)
{
    unsigned long less[2] = {64, 64};

    return result(syscall(SYS_prlimit64, 0, 7, less, NULL));
}

static int try_typing(void)
{
    char c = '\n';

    return result(ioctl(STDIN_FILENO, TIOCSTI, &c));
}

static int asks_device(int fd, unsigned long request)
{
    char data[256] = {0};

    return result(ioctl(fd, request, data));
}

static int try_drm(void)
{
    return asks_device(STDIN_FILENO, DRM_VERSION);
}

static int try_owner(void)
{
    return result(fcntl(STDIN_FILENO, F_SETOWN, getppid()));
}

static int try_lent_user(void)
{
    CLEANUP(closep) int fd = open(in_folder("state/lent"), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

    assert(fd >= 0);
    return result(fchmod(fd, 04755));
}

static int try_created_lent_user(void)
{
    CLEANUP(closep) int fd = open(in_folder("state/lent2"), O_WRONLY | O_CREAT | O_CLOEXEC, 06755);

    return result(fd);
}

static int try_others_priority(void)
{
    return result(setpriority(PRIO_PROCESS, (id_t)getppid(), 0));
}

static int try_all_priorities(void)
{
    return result(setpriority(PRIO_USER, 0, 0));
}

struct attempt {
    const char *call;
    int (*function)(void);
    bool sanitizers_do; /* so that their list has it */
};

static const struct attempt attempts[] = {
    {"execve", try_exec, false},
    {"clone", try_fork, false},
    {"unshare", try_namespace, false},
    {"clone", try_namespace_by_clone, false},
    {"socket", try_internet, false},
    {"socket", try_netlink, false},
    {"connect", try_connect, false},
    {"ptrace", try_ptrace, true},
    {"process_vm_readv", try_other_memory, false},
    {"io_uring_setup", try_ring, false},
    {"io_uring_enter", try_ring_entered, false},
    {"mmap", try_writable_code, false},
    {"mmap", try_code_of_a_file, false},
    {"mprotect", try_memory_to_code, false},
    {"fchmodat", try_chmod, false},
    {"fchownat", try_chown, false},
    {"setresuid", try_setuid, false},
    {"mount", try_mount, false},
    {"kill", try_signal, false},
    {"tgkill", try_signal_to_thread, true},
    {"bpf", try_bpf, false},
    {"prctl", try_dumpable, true},
    {"prlimit64", try_limit, true},
    {"ioctl", try_typing, true},
    {"ioctl", try_drm, true},
    {"fcntl", try_owner, false},
    {"fchmod", try_lent_user, false},
    {"openat", try_created_lent_user, true},
    {"setpriority", try_others_priority, false},
    {"setpriority", try_all_priorities, false},
};

static void refused_child(const void *argument)
{
    const struct attempt *a = argument;
    int r;

    enter(SANDBOX_STRICT, NULL);
    r = a->function();
    if (r != -EPERM) {
        fprintf(stderr, "%s: %s\n", a->call, strerror(-r));
        _exit(1);
    }
    assert(getpid() > 0 && opens(in_folder("state/after"), O_WRONLY | O_CREAT) == 0);
}

static void test_refused(void)
{
    for (size_t i = 0; i < ARRAY_SIZE(attempts); i++) {
        char wanted[80];
        struct run r;

        if (SANITIZED && attempts[i].sanitizers_do)
            continue;
        run(&r, refused_child, &attempts[i]);
        must_pass(&r, attempts[i].call);
        snprintf(wanted, sizeof(wanted), "test: the sandbox refused the system call %s(",
                 attempts[i].call);
        if (!strstr(r.said, wanted) || lines(&r) != 1) {
            fprintf(stderr, "wanted one line with '%s', got: %s", wanted, r.said);
            abort();
        }
    }
}

/* Each of these has to be possible outside, or the test above would say nothing. */
static void possible_child(const void *argument)
{
    const struct attempt *a = argument;

    _exit(a->function() == -EPERM && geteuid() == 0 ? 1 : 0);
}

static void test_possible_outside(void)
{
    for (size_t i = 0; i < ARRAY_SIZE(attempts); i++) {
        struct run r;

        if (attempts[i].function == try_signal || attempts[i].function == try_signal_to_thread ||
            attempts[i].function == try_mount || attempts[i].function == try_ring_entered ||
            attempts[i].function == try_ring || attempts[i].function == try_typing ||
            attempts[i].function == try_bpf || attempts[i].function == try_all_priorities)
            continue; /* we would feel it, or the machine may not have it */
        run(&r, possible_child, &attempts[i]);
        must_pass(&r, attempts[i].call);
    }
}

/* ---- how it is told ---- */

static void often_child(const void *argument)
{
    (void)argument;
    enter(SANDBOX_STRICT, NULL);
    for (int i = 0; i < 1000; i++)
        assert(try_internet() == -EPERM && try_bpf() == -EPERM && syscall(2000 + i) < 0);
}

static void test_few_lines(void)
{
    struct run r;

    run(&r, often_child, NULL);
    must_pass(&r, "often");
    assert(lines(&r) >= 2 && lines(&r) < 20);
    assert(strstr(r.said, " socket(arg0=0x2)") && strstr(r.said, " bpf()"));
}

static void *confined_thread(void *userdata)
{
    (void)userdata;
    assert(try_internet() == -EPERM && try_ring() == -EPERM);
    assert(opens(in_folder("outside/file"), O_RDONLY) == -EACCES);
    return NULL;
}

static void threads_child(const void *argument)
{
    sigset_t for_others, before;
    pthread_t threads[3];

    (void)argument;
    enter(SANDBOX_STRICT, NULL);
    thread_signals_for_others(&for_others);
    pthread_sigmask(SIG_SETMASK, &for_others, &before);
    for (size_t i = 0; i < ARRAY_SIZE(threads); i++)
        assert(pthread_create(&threads[i], NULL, confined_thread, NULL) == 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    for (size_t i = 0; i < ARRAY_SIZE(threads); i++)
        assert(pthread_join(threads[i], NULL) == 0);
}

static void test_threads(void)
{
    struct run r;

    run(&r, threads_child, NULL);
    must_pass(&r, "threads");
    assert(strstr(r.said, "socket"));
}

/* ---- files ---- */

static void paths_child(const void *argument)
{
    DIR *d;

    (void)argument;
    enter(SANDBOX_STRICT, NULL);
    assert(opens(in_folder("models/a.llmd"), O_RDONLY) == 0);
    assert(opens(in_folder("models/a.llmd"), O_WRONLY) == -EACCES);
    assert(opens(in_folder("models/a.llmd"), O_RDONLY | O_TRUNC) == -EACCES);
    assert(opens(in_folder("models/b.llmd"), O_WRONLY | O_CREAT) == -EACCES);
    assert(result(unlink(in_folder("models/a.llmd"))) == -EACCES);
    assert(result(rename(in_folder("models/a.llmd"), in_folder("models/b.llmd"))) == -EACCES);
    assert((d = opendir(in_folder("models"))) && closedir(d) == 0);

    assert(opens(in_folder("outside/file"), O_RDONLY) == -EACCES);
    assert(opens(in_folder("outside/new"), O_WRONLY | O_CREAT) == -EACCES);
    assert(opens(in_folder("models/../outside/file"), O_RDONLY) == -EACCES);
    assert(opens(in_folder("state/link"), O_RDONLY) == -EACCES); /* to outside/file */
    assert(result(unlink(in_folder("outside/file"))) == -EACCES);
    assert(!opendir(in_folder("outside")) && errno == EACCES);
    assert(opens("/etc/passwd", O_RDONLY) == -EACCES);
    assert(opens(in_folder("single/file"), O_RDONLY) == -EACCES);
    assert(opens(in_folder("single/link"), O_RDONLY) == 0); /* to outside/one */
    assert(opens(in_folder("outside/one"), O_WRONLY) == -EACCES);
    assert(opens("/proc/self/cgroup", O_RDONLY) == 0);

    assert(result(mkdir(in_folder("state/models"), 0700)) == 0);
    assert(opens(in_folder("state/models/x"), O_RDWR | O_CREAT | O_EXCL) == 0);
    assert(result(rename(in_folder("state/models/x"), in_folder("state/models/y"))) == 0);
    assert(opens(in_folder("state/models/y"), O_WRONLY | O_TRUNC) == 0);
    assert(result(unlink(in_folder("state/models/y"))) == 0);
    assert(result(rmdir(in_folder("state/models"))) == -EPERM);
    assert(result(rename(in_folder("state/link"), in_folder("outside/link"))) < 0);

    assert(opens(in_folder("run/file"), O_WRONLY | O_CREAT) == -EACCES);
    assert(opens(in_folder("run/lock"), O_RDWR) == -EACCES);
}

static void test_paths(void)
{
    struct run r;

    run(&r, paths_child, NULL);
    must_pass(&r, "paths");
    assert(lines(&r) == 1 && strstr(r.said, " rmdir(")); /* landlock says nothing */
}

/* ---- what a daemon does ---- */

static void *nothing(void *userdata)
{
    return userdata;
}

static void allowed_child(const void *argument)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int pair[2], fd, memory_fd;
    pthread_t thread;
    void *p;

    (void)argument;
    enter(SANDBOX_STRICT, in_folder("outside/socket"));
    assert(pthread_create(&thread, NULL, nothing, NULL) == 0 && pthread_join(thread, NULL) == 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", in_folder("run/socket"));
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    assert(listen(fd, 1) == 0);
    assert(unlink(address.sun_path) == 0 && close(fd) == 0);

    memory_fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert(memory_fd >= 0 && ftruncate(memory_fd, 1 << 16) == 0);
    assert(fcntl(memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    assert(fallocate(memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096) == 0);
    p = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    assert(p != MAP_FAILED && madvise(p, 1 << 16, MADV_DONTNEED) == 0);
    assert(munmap(p, 1 << 16) == 0 && close(memory_fd) == 0);

    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    assert(send(pair[0], "x", 1, MSG_NOSIGNAL) == 1 && close(pair[0]) == 0 && close(pair[1]) == 0);
    fd = eventfd(0, EFD_CLOEXEC);
    assert(fd >= 0 && close(fd) == 0);
    assert(prctl(PR_SET_NAME, "renamed") == 0);
    free(malloc(64 << 20));
    assert(connects("outside/socket") == 0);
}

static void reachable_child(const void *argument)
{
    (void)argument;
    enter(SANDBOX_STRICT, in_folder("outside/socket"));
    assert(connects("outside/socket") == 0 && connects("outside/socket") == 0);
    assert(connects("outside/socket2") == -EPERM && connects("outside/socke") == -EPERM);
    assert(connects("models/../outside/socket") == -EPERM); /* by its very path only */
}

static void test_reachable(void)
{
    struct run r;

    run(&r, reachable_child, NULL);
    must_pass(&r, "reachable");
    assert(lines(&r) == 1 && strstr(r.said, " connect("));
}

static void test_allowed(void)
{
    struct run r;

    run(&r, allowed_child, NULL);
    must_pass(&r, "allowed");
    if (lines(&r) != 0) {
        fprintf(stderr, "refused: %s", r.said);
        abort();
    }
}

/* ---- with a GPU ---- */

/* Two instructions' worth: return. */
static const unsigned char code[] = {
#if defined(__x86_64__)
    0xc3,
#elif defined(__aarch64__)
    0xc0,
    0x03,
    0x5f,
    0xd6,
#else
    0,
#endif
};

static void must_refuse(const char *what, int r)
{
    if (r == -EPERM)
        return;
    fprintf(stderr, "%s: %s\n", what, strerror(-r));
    abort();
}

static void gpu_child(const void *argument)
{
    const bool *runs_code = argument;
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int r;

    assert(fd >= 0 && p != MAP_FAILED);
    memcpy(p, code, sizeof(code));
    more_calls[0] = &seccomp_vulkan;
    more_calls[1] = *runs_code ? &seccomp_machine_code : NULL;
    enter(SANDBOX_STRICT, NULL);
    assert(asks_device(fd, DRM_VERSION) == -ENOTTY && asks_device(fd, SYNC_MERGE) == -ENOTTY);
    if (!SANITIZED) {
        must_refuse("typing", try_typing());
        must_refuse("another kind of request", asks_device(fd, 0xc0484601ul));
        must_refuse("a request that only begins like one", asks_device(fd, 0xc0640064ul));
    }
    r = result(mprotect(p, 4096, PROT_READ | PROT_EXEC));
    assert(r == (*runs_code ? 0 : -EPERM));
    if (r == 0) {
        void (*function)(void) = (void (*)(void))p;

        __builtin___clear_cache(p, (char *)p + sizeof(code));
        function();
    }
    must_refuse("code that can be written",
                result(mprotect(p, 4096, PROT_READ | PROT_WRITE | PROT_EXEC)));
    must_refuse("memory that begins as code", try_writable_code());
    must_refuse("a library", try_code_of_a_file());
    must_refuse("a program", try_exec());
    must_refuse("a network", try_internet());
    must_refuse("netlink, by which devices come and go", try_netlink());
}

static void test_gpu(void)
{
    for (int i = 0; i < 2; i++) {
        const bool runs_code = i == 1;
        struct run r;

        if (runs_code && code[0] == 0)
            continue;
        run(&r, gpu_child, &runs_code);
        must_pass(&r, runs_code ? "GPU in software" : "GPU");
    }
}

static void devices_child(const void *argument)
{
    const bool control_is_a_right = landlock_version() >= 5;
    int fd;

    (void)argument;
    more_calls[0] = &seccomp_vulkan;
    enter(SANDBOX_STRICT, NULL);
    fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert(fd >= 0 && asks_device(fd, DRM_VERSION) == -ENOTTY && close(fd) == 0);
    /* Another device, whatever it is called; one that may only be read. */
    assert(opens("/dev/zero", O_RDONLY) == -EACCES && opens("/dev/full", O_RDWR) == -EACCES);
    fd = open("/dev/full", O_RDONLY | O_CLOEXEC);
    assert(fd >= 0);
    assert(asks_device(fd, DRM_VERSION) == (control_is_a_right ? -EACCES : -ENOTTY));
    assert(close(fd) == 0);
    assert(!opendir("/dev") && errno == EACCES);
    /* Allowed as a device, but it is a folder. */
    assert(opens(in_folder("outside/file"), O_RDONLY) == -EACCES);
}

static void test_devices(void)
{
    struct run r;

    run(&r, devices_child, NULL);
    must_pass(&r, "devices");
    assert(lines(&r) == 0);
}

/* ---- capabilities ---- */

static void capabilities_child(const void *argument)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
    FILE *f;
    char line[256];
    unsigned n = 0;

    (void)header;
    (void)data;
    enter(SANDBOX_STRICT, NULL);
    f = fopen("/proc/self/status", "re");
    assert(f);
    while (fgets(line, sizeof(line), f)) {
        unsigned long long set;

        if (sscanf(line, "Cap%*[a-zA-Z]: %llx", &set) == 1) {
            if (strncmp(line, "CapBnd", 6) == 0 && *(const bool *)argument)
                continue; /* only who could change it has */
            assert(set == 0);
            n++;
        }
        if (strncmp(line, "NoNewPrivs:", 11) == 0) {
            assert(strtol(line + 11, NULL, 10) == 1);
            n++;
        }
        if (strncmp(line, "Seccomp:", 8) == 0) {
            assert(strtol(line + 8, NULL, 10) == 2);
            n++;
        }
    }
    fclose(f);
    assert(n >= 6);
}

static void test_capabilities(void)
{
    bool unprivileged = geteuid() != 0;
    struct run r;

    run(&r, capabilities_child, &unprivileged);
    must_pass(&r, "capabilities");
}

/* ---- other modes ---- */

static void report_child(const void *argument)
{
    (void)argument;
    enter(SANDBOX_REPORT, NULL);
    assert(try_internet() == 0);
    assert(try_memory_to_code() == 0);
    assert(opens(in_folder("models/a.llmd"), O_RDONLY) == 0);
    assert(opens(in_folder("models/a.llmd"), O_WRONLY) == 0);
    assert(opens(in_folder("outside/file"), O_RDONLY) == 0);
    assert(opens(in_folder("outside/new"), O_WRONLY | O_CREAT) == 0);
    assert(result(unlink(in_folder("outside/new"))) == 0);
    assert(opens(in_folder("nowhere/at all"), O_RDONLY) == -ENOENT);
    assert(result(open((const char *)1, O_RDONLY)) == -EFAULT);
}

static void test_report(void)
{
    struct run r;

    run(&r, report_child, NULL);
    must_pass(&r, "report");
    assert(strstr(r.said, "the sandbox would refuse the system call socket(arg0=0x2)"));
    assert(strstr(r.said, "the sandbox would refuse the system call mprotect("));
    assert(!strstr(r.said, "sandbox refused"));
    if (SANITIZED)
        return;
    assert(strstr(r.said, "outside/file)") && strstr(r.said, "models/a.llmd)"));
    assert(strstr(r.said, "unlink"));
}

static void off_child(const void *argument)
{
    (void)argument;
    enter(SANDBOX_OFF, NULL);
    assert(try_internet() == 0 && try_memory_to_code() == 0);
    assert(opens(in_folder("outside/file"), O_RDONLY) == 0);
    assert(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0);
}

static void test_off(void)
{
    struct run r;

    run(&r, off_child, NULL);
    must_pass(&r, "off");
    assert(lines(&r) == 0);
}

static void stray_child(const void *argument)
{
    (void)argument;
    enter(SANDBOX_STRICT, NULL);
    raise(SIGSYS);
    assert(try_internet() == -EPERM);
}

static void test_stray_signal(void)
{
    struct run r;

    run(&r, stray_child, NULL);
    must_pass(&r, "stray signal");
    assert(lines(&r) == 1);
}

int main(void)
{
    snprintf(folder, sizeof(folder), "/tmp/llmd-sandbox-XXXXXX");
    assert(mkdtemp(folder));
    assert(mkdir(in_folder("models"), 0700) == 0 && mkdir(in_folder("state"), 0700) == 0 &&
           mkdir(in_folder("run"), 0700) == 0 && mkdir(in_folder("outside"), 0700) == 0 &&
           mkdir(in_folder("single"), 0700) == 0);
    write_file(in_folder("single/file"), "below what is not a file");
    write_file(in_folder("outside/one"), "where a link leads");
    assert(symlink("../outside/one", in_folder("single/link")) == 0);
    write_file(in_folder("models/a.llmd"), "a model");
    write_file(in_folder("outside/file"), "not ours");
    write_file(in_folder("run/lock"), "");
    assert(symlink("../outside/file", in_folder("state/link")) == 0);

    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", in_folder("outside/socket"));
    assert(bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(fd, 100) == 0);

    if (!HAVE_SECCOMP || landlock_version() == 0) {
        puts("this kernel or this build has no landlock or no seccomp");
        return 77;
    }
    test_possible_outside();
    test_refused();
    test_few_lines();
    test_threads();
    test_paths();
    test_allowed();
    test_reachable();
    test_gpu();
    test_devices();
    test_capabilities();
    test_report();
    test_off();
    test_stray_signal();

    char command[128];
    snprintf(command, sizeof(command), "rm -r %s", folder);
    assert(system(command) == 0);
    return 0;
}
