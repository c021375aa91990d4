/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The handler puts one anonymous mapping in the place of the whole model, not of the page that is
 * missing: nothing that is computed from then on is used, so there is nothing to be kept; one
 * system call is the end of it, where page by page there would be a million of them; and as many
 * mappings as there are islands of pages could pass what a process may have.
 *
 * A handler may take no lock, so what it looks at is a fixed table of atomic words. An entry is
 * published by its size, last, and withdrawn by it, first.
 */

#include "engine/model-fault.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MODELS_MAX 64 /* open at once; a daemon has two while it exchanges them */

struct model_fault {
    atomic_bool is_taken, happened;
    _Atomic(uintptr_t) start;
    atomic_size_t size; /* 0: nothing is watched */
};

static struct model_fault models[MODELS_MAX];
static atomic_int wake_fd = -EBADF;
static struct sigaction previous; /* written before the handler is there */

void model_fault_report(struct model_fault *f)
{
    uint64_t one = 1;

    if (!atomic_exchange(&f->happened, true) && wake_fd >= 0)
        (void)!write(wake_fd, &one, sizeof(one)); /* full: it is readable anyway */
}

/* Not by mmap(), which ThreadSanitizer takes for a write to all that others are reading. */
static bool map_zeros(uintptr_t start, size_t size)
{
#ifdef SYS_mmap2
    const long number = SYS_mmap2;
#else
    const long number = SYS_mmap;
#endif

    return syscall(number, start, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                   0L) == (long)start;
}

/* Whether nothing is missing any more. Async-signal-safe. */
static bool replace(uintptr_t at)
{
    for (size_t i = 0; i < MODELS_MAX; i++) {
        struct model_fault *f = &models[i];
        size_t size = atomic_load(&f->size);
        uintptr_t start = atomic_load(&f->start);

        if (size == 0 || at < start || at - start >= size)
            continue;
        if (!map_zeros(start, size))
            return false;
        model_fault_report(f);
        return true;
    }
    return false;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    int saved = errno;

    (void)context;
    /* Several threads may come here for the same model; each replaces zeros by zeros. */
    if (info->si_code <= 0 || !replace((uintptr_t)info->si_addr)) {
        sigaction(number, &previous, NULL); /* for a fault it is done again on return */
        if (info->si_code <= 0)
            raise(number);
    }
    errno = saved;
}

int model_fault_handle(int fd)
{
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_RESTART};

    if (sigaction(SIGBUS, NULL, &previous) < 0)
        return -errno;
    sigemptyset(&action.sa_mask);
    atomic_store(&wake_fd, fd);
    return sigaction(SIGBUS, &action, NULL) < 0 ? -errno : 0;
}

int model_fault_watch(struct model_fault **ret, const void *map, size_t size)
{
    for (size_t i = 0; i < MODELS_MAX; i++) {
        struct model_fault *f = &models[i];

        if (atomic_exchange(&f->is_taken, true))
            continue;
        atomic_store(&f->happened, false);
        atomic_store(&f->start, (uintptr_t)map);
        atomic_store(&f->size, size);
        *ret = f;
        return 0;
    }
    return -EMFILE;
}

void model_fault_unwatch(struct model_fault *f)
{
    if (!f)
        return;
    atomic_store(&f->size, 0);
    atomic_store(&f->is_taken, false);
}

bool model_fault_happened(const struct model_fault *f)
{
    return atomic_load(&f->happened);
}
