/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * What is refused raises SIGSYS in the thread that called; the handler tells, and the call returns
 * EPERM. So nothing outside the process takes part, and nobody in it can let a call pass: the other
 * way that the kernel has, a descriptor whose holder decides, would be within the reach of whom the
 * sandbox is for. A thread that blocks SIGSYS is killed instead, with the whole process; ours leave
 * it open. Where the machine is not one whose registers are known here, calls fail without a word.
 *
 * Report mode uses that other way: its thread is made before the filter and stays outside it, and
 * lets everything pass. It must take no lock that a waiting thread may hold: no malloc, no stdio.
 */

#include "daemon/system-call-filter.h"

#include <errno.h>

#if HAVE_SECCOMP

#include <fcntl.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "daemon/reachable-sockets.h"

#define CALLS 1024 /* numbers; more than there are */
#define QUIET_SECONDS 10
#define ARGUMENTS 6
#define PATH_BYTES 4096

#ifndef SYS_SECCOMP /* si_code; not in all headers */
#define SYS_SECCOMP 1
#endif

/* ---- telling ---- */

static const struct refusal_teller *teller;
static const char *names[CALLS];   /* NULL: unknown */
static unsigned char shown[CALLS]; /* bit mask of the arguments that the lists look at */
static _Atomic(uint64_t)
    told_at[CALLS + 1]; /* seconds + 1; 0: never; the last: of all that are no call */
static _Atomic(uint32_t) n_untold[CALLS + 1];

struct text {
    char bytes[512];
    size_t n;
};

static void put(struct text *t, const char *string)
{
    while (*string && t->n < sizeof(t->bytes))
        t->bytes[t->n++] = *string++;
}

static void put_number(struct text *t, uint64_t n, unsigned base)
{
    char digits[21];
    size_t i = sizeof(digits);

    digits[--i] = 0;
    do {
        digits[--i] = "0123456789abcdef"[n % base];
        n /= base;
    } while (n > 0);
    put(t, digits + i);
}

static void put_call(struct text *t, unsigned call)
{
    if (call < CALLS && names[call])
        put(t, names[call]);
    else
        put_number(t, call, 10);
}

/* Each call once in a while; how many there were in between comes with it. */
static bool is_to_be_told(unsigned call, uint32_t *ret_untold)
{
    struct timespec now;
    uint64_t last;

    *ret_untold = 0;
    call = MIN(call, (unsigned)CALLS);
    clock_gettime(CLOCK_MONOTONIC, &now);
    last = told_at[call];
    if ((last > 0 && (uint64_t)now.tv_sec + 1 - last < QUIET_SECONDS) ||
        !atomic_compare_exchange_strong(&told_at[call], &last, (uint64_t)now.tv_sec + 1)) {
        n_untold[call]++;
        return false;
    }
    *ret_untold = atomic_exchange(&n_untold[call], 0);
    return true;
}

static void send_message(const struct text *message, unsigned call)
{
    struct text t = {.n = 0};

    if (teller->journal_fd >= 0) {
        put(&t, "\nPRIORITY=4\nSYSLOG_IDENTIFIER=");
        put(&t, teller->program);
        put(&t, "\nMESSAGE_ID=");
        put(&t, teller->message_id);
        put(&t, "\nLLMD_SYSTEM_CALL=");
        put_call(&t, call);
        put(&t, "\n");
        struct iovec parts[] = {
            {(char *)"MESSAGE=", 8}, {(char *)message->bytes, message->n}, {t.bytes, t.n}};
        struct msghdr header = {.msg_iov = parts, .msg_iovlen = ARRAY_SIZE(parts)};

        if (sendmsg(teller->journal_fd, &header, MSG_NOSIGNAL) >= 0)
            return;
        t.n = 0;
    }
    if (teller->prefixes) {
        put(&t, "<4>");
    } else {
        put(&t, teller->program);
        put(&t, ": ");
    }
    struct iovec line[] = {{t.bytes, t.n}, {(char *)message->bytes, message->n}, {(char *)"\n", 1}};

    (void)!writev(STDERR_FILENO, line, ARRAY_SIZE(line));
}

/* Each path once; report mode's thread only. */
static bool is_path_to_be_told(unsigned call, const char *path)
{
    static uint64_t told[512]; /* hashes; the oldest goes */
    static unsigned next;
    uint64_t hash = call + 1;

    while (*path)
        hash = (hash ^ (unsigned char)*path++) * UINT64_C(0x100000001b3);
    for (size_t i = 0; i < ARRAY_SIZE(told); i++)
        if (told[i] == hash)
            return false;
    told[next++ % ARRAY_SIZE(told)] = hash;
    return true;
}

/* In a signal handler, or in report mode's thread. path: what about it; NULL: the call itself */
static void tell(unsigned call, const unsigned long long *arguments, const char *verb,
                 const char *path)
{
    struct text t = {.n = 0};
    uint32_t untold = 0;
    bool any = false;

    if (path ? !is_path_to_be_told(call, path) : !is_to_be_told(call, &untold))
        return;
    put(&t, "the sandbox ");
    put(&t, verb);
    put(&t, " the system call ");
    put_call(&t, call);
    put(&t, "(");
    for (unsigned i = 0; i < ARGUMENTS && call < CALLS && !path; i++) {
        if (!(shown[call] & 1u << i))
            continue;
        put(&t, any ? ", arg" : "arg");
        put_number(&t, i, 10);
        put(&t, "=0x");
        put_number(&t, arguments[i], 16);
        any = true;
    }
    if (path)
        put(&t, path);
    put(&t, ")");
    if (untold > 0) {
        put(&t, ", and ");
        put_number(&t, untold, 10);
        put(&t, " more since the last such line");
    }
    send_message(&t, call);
}

/* What the filter knows, for later, when nothing can be looked up any more. */
static void learn_names(const struct filter_options *o)
{
    for (int i = 0; i < CALLS; i++)
        names[i] = seccomp_syscall_resolve_num_arch(SCMP_ARCH_NATIVE, i);
    for (size_t l = 0; l < o->n_lists; l++)
        for (size_t i = 0; i < o->lists[l]->n; i++) {
            const struct seccomp_rule *r = &o->lists[l]->rules[i];
            int call = seccomp_syscall_resolve_name(r->name);

            if (call < 0)
                call = r->number;
            if (call < 0 || call >= CALLS)
                continue;
            names[call] = names[call] ? names[call] : r->name;
            for (unsigned c = 0; c < r->n_conditions; c++)
                shown[call] |= (unsigned char)(1u << r->conditions[c].argument);
        }
}

/* ---- strict ---- */

#if defined(__x86_64__)
#define KNOWS_REGISTERS 1
static void get_arguments(const ucontext_t *u, unsigned long long *ret)
{
    static const int registers[ARGUMENTS] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9};

    for (unsigned i = 0; i < ARGUMENTS; i++)
        ret[i] = (unsigned long long)u->uc_mcontext.gregs[registers[i]];
}

static void set_result(ucontext_t *u, int r)
{
    u->uc_mcontext.gregs[REG_RAX] = r;
}
#elif defined(__aarch64__)
#define KNOWS_REGISTERS 1
static void get_arguments(const ucontext_t *u, unsigned long long *ret)
{
    for (unsigned i = 0; i < ARGUMENTS; i++)
        ret[i] = u->uc_mcontext.regs[i];
}

static void set_result(ucontext_t *u, int r)
{
    u->uc_mcontext.regs[0] = (uint64_t)(int64_t)r;
}
#else
#define KNOWS_REGISTERS 0
static void get_arguments(const ucontext_t *u, unsigned long long *ret)
{
    (void)u;
    memset(ret, 0, ARGUMENTS * sizeof(*ret));
}

static void set_result(ucontext_t *u, int r)
{
    (void)u;
    (void)r;
}
#endif

static void on_refused(int number, siginfo_t *info, void *context)
{
    unsigned long long arguments[ARGUMENTS];
    int saved = errno;

    (void)number;
    if (info->si_code != SYS_SECCOMP) /* somebody's kill() */
        return;
    get_arguments(context, arguments);
    if (info->si_syscall == SYS_connect) {
        socklen_t length;
        const struct sockaddr_un *known = reachable_sockets_find(
            (const void *)(uintptr_t)arguments[1], (socklen_t)arguments[2], &length);

        if (known) { /* the same, from where the filter knows it */
            int r = connect((int)arguments[0], (const struct sockaddr *)known, length);

            set_result(context, r < 0 ? -errno : 0);
            errno = saved;
            return;
        }
    }
    tell((unsigned)info->si_syscall, arguments, "refused", NULL);
    set_result(context, -EPERM);
    errno = saved;
}

static void catch_refusals(void)
{
    /* Not deferred: a call in here that is refused is to be an error too, not the end. */
    struct sigaction action = {.sa_sigaction = on_refused, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigset_t only;

    sigemptyset(&action.sa_mask);
    sigaction(SIGSYS, &action, NULL);
    sigemptyset(&only);
    sigaddset(&only, SIGSYS);
    pthread_sigmask(SIG_UNBLOCK, &only, NULL);
}

/* ---- report ---- */

/* Calls that landlock has a say in: where their arguments have a folder's descriptor and a path. */
struct path_call {
    int call;
    int folder, path; /* argument; folder -1: none */
    int flags;        /* argument of open()'s flags; -1: it changes the folder */
};

static const struct path_call path_calls[] = {
#ifdef SYS_open
    {SYS_open, -1, 0, 1},
#endif
#ifdef SYS_unlink
    {SYS_unlink, -1, 0, -1},  {SYS_mkdir, -1, 0, -1},    {SYS_rmdir, -1, 0, -1},
    {SYS_rename, -1, 1, -1},
#endif
    {SYS_openat, 0, 1, 2},    {SYS_unlinkat, 0, 1, -1},  {SYS_mkdirat, 0, 1, -1},
    {SYS_linkat, 2, 3, -1},   {SYS_renameat2, 2, 3, -1},
#ifdef SYS_renameat
    {SYS_renameat, 2, 3, -1},
#endif
};

static struct {
    int notify_fd;
    const struct allowed_path *paths;
    size_t n_paths;
    struct seccomp_notif *request;
    struct seccomp_notif_resp *response;
    bool listed[ARRAY_SIZE(path_calls)]; /* allowed as calls: only the path is to be looked at */
} report = {.notify_fd = -EBADF};

/* What the process has at an address, which may be none; how much of it there is. */
static size_t peek(unsigned long long address, void *ret, size_t n)
{
    struct iovec here = {ret, n}, there = {(void *)(uintptr_t)address, n};
    ssize_t got = process_vm_readv(getpid(), &here, 1, &there, 1, 0);

    return got < 0 ? 0 : (size_t)got;
}

static bool is_below(const char *path, const char *folder)
{
    size_t n = strlen(folder);

    if (n > 0 && folder[n - 1] == '/')
        return strncmp(path, folder, n) == 0;
    return strncmp(path, folder, n) == 0 && (path[n] == 0 || path[n] == '/');
}

static bool is_allowed_path(const char *path, bool changes)
{
    for (size_t i = 0; i < report.n_paths; i++)
        if ((report.paths[i].access == SANDBOX_READ_FILE || report.paths[i].access == SANDBOX_DEVICE
                 ? strcmp(path, report.paths[i].path) == 0
                 : is_below(path, report.paths[i].path)) &&
            (!changes || report.paths[i].access == SANDBOX_WRITE ||
             report.paths[i].access == SANDBOX_SOCKET || report.paths[i].access == SANDBOX_DEVICE))
            return true;
    return false;
}

/* Where a path leads, or its folder where it is not there yet. false: nobody knows */
static bool resolve(int folder_fd, char *path, bool parent, char *ret)
{
    char link[64];
    ssize_t n;
    int fd = -1;

    if (!parent)
        fd = openat(folder_fd, path, O_PATH | O_CLOEXEC);
    if (fd < 0) {
        char *slash = strrchr(path, '/');

        if (slash == path)
            path[1] = 0;
        else if (slash)
            *slash = 0;
        fd = openat(folder_fd, slash ? path : ".", O_PATH | O_CLOEXEC);
    }
    if (fd < 0)
        return false;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    n = readlink(link, ret, PATH_BYTES - 1);
    close(fd);
    if (n <= 0)
        return false;
    ret[n] = 0;
    return ret[0] == '/';
}

/* What landlock would say; a name that does not exist is no matter for it. */
static void report_path(const struct path_call *c, const struct seccomp_data *call)
{
    char path[PATH_BYTES], real[PATH_BYTES];
    struct iovec here = {path, sizeof(path) - 1},
                 there = {(void *)(uintptr_t)call->args[c->path], sizeof(path) - 1};
    size_t page = 4096 - (call->args[c->path] & 4095);
    int flags = c->flags >= 0 ? (int)call->args[c->flags] : O_RDWR;
    bool changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)) != 0;
    ssize_t n;

    /* By the kernel, to the end of its page first: the caller may have given us nonsense. */
    there.iov_len = here.iov_len = MIN(page, sizeof(path) - 1);
    n = process_vm_readv(getpid(), &here, 1, &there, 1, 0);
    if (n > 0 && !memchr(path, 0, (size_t)n)) {
        there.iov_len = here.iov_len = sizeof(path) - 1;
        n = process_vm_readv(getpid(), &here, 1, &there, 1, 0);
    }
    if (n <= 0)
        return;
    path[n] = 0;
    if (!resolve(c->folder >= 0 ? (int)call->args[c->folder] : AT_FDCWD, path, c->flags < 0, real))
        return;
    if (!is_allowed_path(real, changes))
        tell((unsigned)call->nr, call->args, "would refuse", real);
}

/* Started outside the filter; waits for its descriptor. */
static void *report_run(void *userdata)
{
    const int *go = userdata;

    pthread_setname_np(pthread_self(), "sandbox-report");
    if (read(*go, &report.notify_fd, sizeof(report.notify_fd)) != sizeof(report.notify_fd))
        return NULL;
    for (;;) {
        const struct seccomp_data *call = &report.request->data;
        const struct path_call *c = NULL;

        memset(report.request, 0, sizeof(*report.request));
        if (seccomp_notify_receive(report.notify_fd, report.request) < 0) {
            if (errno == EINTR || errno == ENOENT)
                continue;
            return NULL;
        }
        for (size_t i = 0; i < ARRAY_SIZE(path_calls); i++)
            if (path_calls[i].call == call->nr && report.listed[i])
                c = &path_calls[i];
        if (call->nr == SYS_connect) {
            struct sockaddr_un address = {0};
            socklen_t length;

            peek(call->args[1], &address, MIN((size_t)call->args[2], sizeof(address)));
            if (!reachable_sockets_find(&address, (socklen_t)call->args[2], &length))
                tell(SYS_connect, call->args, "would refuse", NULL);
        } else if (c)
            report_path(c, call);
        else
            tell((unsigned)call->nr, call->args, "would refuse", NULL);
        memset(report.response, 0, sizeof(*report.response));
        report.response->id = report.request->id;
        report.response->flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
        seccomp_notify_respond(report.notify_fd, report.response);
    }
}

/* ---- the filter ---- */

/* The place in path_calls of one whose path report mode looks at. */
static size_t place_in_path_calls(int call)
{
    size_t i = 0;

    while (i < ARRAY_SIZE(path_calls) && path_calls[i].call != call)
        i++;
    return i;
}

static int add_rule(scmp_filter_ctx filter, const struct seccomp_rule *rule, bool reports)
{
    struct scmp_arg_cmp conditions[ARRAY_SIZE(rule->conditions)];
    int call = seccomp_syscall_resolve_name(rule->name), r;
    size_t place;

    if (call == __NR_SCMP_ERROR)
        call = rule->number;
    if (call < 0) /* this architecture has none of that name */
        return 0;
    place = place_in_path_calls(call);
    /* LeakSanitizer stops all threads, that of report mode too, and then opens files itself. */
    if (reports && !SANITIZED && place < ARRAY_SIZE(path_calls)) {
        report.listed[place] = true;
        return 0;
    }
    for (unsigned i = 0; i < rule->n_conditions; i++) {
        const struct seccomp_condition *c = &rule->conditions[i];

        conditions[i] = SCMP_CMP64(c->argument, SCMP_CMP_MASKED_EQ, c->mask,
                                   c->is_self ? (uint64_t)getpid() : c->value);
    }
    r = seccomp_rule_add_array(filter,
                               rule->error ? SCMP_ACT_ERRNO((uint32_t)rule->error) : SCMP_ACT_ALLOW,
                               call, rule->n_conditions, conditions);
    return r == -EEXIST ? 0 : r; /* two lists have it */
}

/* Fills it; 0, -errno */
static int add_rules(scmp_filter_ctx filter, const struct filter_options *o)
{
    for (size_t l = 0; l < o->n_lists; l++)
        for (size_t i = 0; i < o->lists[l]->n; i++) {
            int r = add_rule(filter, &o->lists[l]->rules[i], o->report);

            if (r < 0)
                return r;
        }
    return 0;
}

/* Where the handler cannot look at the call, all sockets have to be. 0, -errno */
static int add_connects(scmp_filter_ctx filter)
{
    const struct sockaddr_un *address;
    socklen_t length;
    int r = 0;

    if (!KNOWS_REGISTERS && reachable_sockets_get(0, &length))
        return seccomp_rule_add(filter, SCMP_ACT_ALLOW, SYS_connect, 0);
    for (size_t i = 0; r == 0 && (address = reachable_sockets_get(i, &length)); i++)
        r = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SYS_connect, 2,
                             SCMP_A1_64(SCMP_CMP_EQ, (uint64_t)(uintptr_t)address),
                             SCMP_A2_64(SCMP_CMP_EQ, (uint64_t)length));
    return r;
}

static int load_reporting(scmp_filter_ctx filter, const struct filter_options *o)
{
    static int go_fd;
    sigset_t all, before;
    pthread_t thread;
    int ends[2], fd, r;

    report.paths = o->paths;
    report.n_paths = o->n_paths;
    if (seccomp_notify_alloc(&report.request, &report.response) != 0)
        return -ENOMEM;
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -errno;
    go_fd = ends[0];
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    r = -pthread_create(&thread, NULL, report_run, &go_fd);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (r == 0) {
        r = seccomp_load(filter);
        fd = r == 0 ? seccomp_notify_fd(filter) : -1;
        if (r == 0 && write(ends[1], &fd, sizeof(fd)) < 0)
            r = -errno;
    }
    close(ends[1]);
    if (r == 0)
        pthread_detach(thread);
    else
        pthread_join(thread, NULL);
    return r;
}

int system_call_filter_enter(const struct filter_options *o, struct error *err)
{
    static scmp_filter_ctx filter; /* in report mode it is kept: the descriptor is its */
    int r;

    teller = o->teller;
    learn_names(o);
    filter = seccomp_init(o->report         ? SCMP_ACT_NOTIFY
                          : KNOWS_REGISTERS ? SCMP_ACT_TRAP
                                            : SCMP_ACT_ERRNO(EPERM));
    if (!filter)
        return error_set(err, ENOMEM, "cannot make the filter of system calls: out of memory");
    /* Calls by another architecture's table, as those of 32 bits: no program here makes any. */
    r = seccomp_attr_set(filter, SCMP_FLTATR_ACT_BADARCH,
                         o->report ? SCMP_ACT_LOG : SCMP_ACT_KILL_PROCESS);
    if (r == 0 && !o->report)
        r = seccomp_attr_set(filter, SCMP_FLTATR_CTL_TSYNC, 1);
    if (r == 0)
        r = seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2); /* a tree, not a list */
    if (r == 0)
        r = add_rules(filter, o);
    if (r == 0)
        r = reachable_sockets_seal();
    if (r == 0 && !o->report)
        r = add_connects(filter);
    if (r == 0 && !o->report)
        catch_refusals();
    if (r == 0)
        r = o->report ? load_reporting(filter, o) : seccomp_load(filter);
    if (r < 0 || !o->report)
        seccomp_release(filter);
    if (r == -EINVAL || r == -ENOSYS || r == -EACCES || r == -EOPNOTSUPP)
        return error_set(err, EOPNOTSUPP, "the kernel has no filters of system calls");
    return r < 0 ? error_set(err, -r, "cannot enter the filter of system calls: %s", strerror(-r))
                 : 0;
}

#else

int system_call_filter_enter(const struct filter_options *o, struct error *err)
{
    (void)o;
    return error_set(err, EOPNOTSUPP, "this llmd was built without libseccomp");
}

#endif
