/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#undef NDEBUG
#include "engine/model-fault.h"

#include <assert.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/thread-signals.h"

#define PAGES 64

static size_t page;
static int wake_fd;

struct mapped {
    int fd;
    volatile char *map;
    struct model_fault *fault;
};

/* A file full of sevens, watched or not. */
static struct mapped make(bool watched)
{
    struct mapped m = {.fd = memfd_create("model", MFD_CLOEXEC)};
    char *text = malloc(page);

    assert(m.fd >= 0 && text);
    memset(text, 7, page);
    for (int i = 0; i < PAGES; i++)
        assert(write(m.fd, text, page) == (ssize_t)page);
    free(text);
    m.map = mmap(NULL, PAGES * page, PROT_READ, MAP_SHARED, m.fd, 0);
    assert(m.map != MAP_FAILED);
    if (watched)
        assert(model_fault_watch(&m.fault, (void *)m.map, PAGES * page) == 0);
    return m;
}

static void done(struct mapped *m)
{
    model_fault_unwatch(m->fault);
    munmap((void *)m->map, PAGES * page);
    close(m->fd);
}

static uint64_t reports(void)
{
    uint64_t n;

    return read(wake_fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

static void becomes_zeros(void)
{
    struct mapped m = make(true), other = make(true);

    assert(m.map[5 * page] == 7 && other.map[5 * page] == 7);
    assert(ftruncate(m.fd, (off_t)(3 * page)) == 0);
    assert(m.map[2 * page] == 7 && !model_fault_happened(m.fault) && reports() == 0);
    assert(m.map[5 * page] == 0 && model_fault_happened(m.fault) && reports() == 1);
    /* All of it, so that there is one fault and one mapping. */
    for (size_t i = 0; i < PAGES; i++)
        assert(m.map[i * page] == 0 && other.map[i * page] == 7);
    assert(reports() == 0 && !model_fault_happened(other.fault));
    model_fault_report(m.fault); /* said once */
    assert(reports() == 0);
    model_fault_report(other.fault);
    assert(reports() == 1 && model_fault_happened(other.fault) && other.map[0] == 7);
    done(&m);
    m = make(true); /* its place in the table is as new */
    assert(!model_fault_happened(m.fault));
    done(&m);
    done(&other);
}

static void *read_all(void *userdata)
{
    struct mapped *m = userdata;
    unsigned sum = 0;

    for (int k = 0; k < 200; k++)
        for (size_t i = 0; i < PAGES; i++)
            sum += (unsigned)m->map[i * page];
    return (void *)(uintptr_t)sum;
}

/* Threads that leave signals to others, as those that compute do. */
static void in_many_threads(void)
{
    struct mapped m = make(true);
    pthread_t threads[8];
    sigset_t all, old;

    thread_signals_for_others(&all);
    assert(sigismember(&all, SIGTERM) == 1 && sigismember(&all, SIGBUS) == 0);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (int i = 0; i < 8; i++)
        assert(pthread_create(&threads[i], NULL, read_all, &m) == 0);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    assert(ftruncate(m.fd, 0) == 0);
    for (int i = 0; i < 8; i++)
        assert(pthread_join(threads[i], NULL) == 0);
    assert(m.map[0] == 0 && model_fault_happened(m.fault) && reports() == 1);
    done(&m);
}

/* What ends a child that does it; it must not come back. */
static int signal_of(void (*what)(void))
{
    int status;
    pid_t pid = fork();

    assert(pid >= 0);
    if (pid == 0) {
        struct rlimit none = {0, 0};

        setrlimit(RLIMIT_CORE, &none);
        signal(SIGALRM, SIG_DFL);
        alarm(60); /* one that hangs is wrong as well */
        what();
        _exit(0);
    }
    assert(waitpid(pid, &status, 0) == pid);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static void fault_elsewhere(void)
{
    struct mapped m = make(false);

    assert(ftruncate(m.fd, 0) == 0);
    (void)m.map[page];
}

static void fault_beside(void)
{
    struct mapped m = make(true), other = make(false);

    assert(ftruncate(other.fd, 0) == 0);
    (void)other.map[0];
    done(&m);
}

static void fault_after_unwatch(void)
{
    struct mapped m = make(true);

    model_fault_unwatch(m.fault);
    assert(ftruncate(m.fd, 0) == 0);
    (void)m.map[page];
}

static void fault_within(void)
{
    struct mapped m = make(true);

    assert(ftruncate(m.fd, 0) == 0);
    (void)m.map[page];
    raise(SIGBUS); /* sent, not a fault: whatever was asked for by that happens */
}

static void nothing(void)
{
}

static void table_is_full(void)
{
    struct model_fault *faults[65] = {NULL};
    int n = 0;

    while (n < 65 && model_fault_watch(&faults[n], "", 1) == 0)
        n++;
    assert(n == 64);
    while (n > 0)
        model_fault_unwatch(faults[--n]);
}

int main(void)
{
    page = (size_t)sysconf(_SC_PAGESIZE);
    wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    assert(wake_fd >= 0);
    signal(SIGBUS, SIG_DFL); /* a sanitizer has its own, which exits */
    assert(model_fault_handle(wake_fd) == 0);
    becomes_zeros();
    in_many_threads();
    table_is_full();
    assert(signal_of(nothing) == 0);
    assert(signal_of(fault_elsewhere) == SIGBUS);
    assert(signal_of(fault_beside) == SIGBUS);
    assert(signal_of(fault_after_unwatch) == SIGBUS);
    assert(signal_of(fault_within) == SIGBUS);
    return 0;
}
