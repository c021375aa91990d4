/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmd's own pthread_sigmask(), which the libraries in the process call too. A Vulkan driver that
 * computes on the processor does so in threads for which it has blocked all signals, and one of
 * them may be the first to touch a part of the model that is no longer there; blocked, that would
 * end the process, whatever model_fault.h has prepared. Blocking SIGBUS has no other effect on a
 * thread: those of one's own cannot wait, and others send none.
 *
 * It is part of the program, not of a library of ours: so the linker exports it.
 */

#include <errno.h>
#include <signal.h>

__attribute__((visibility("default"))) int pthread_sigmask(int how, const sigset_t *set,
                                                           sigset_t *old)
{
    int saved = errno, r;
    sigset_t kept;

    if (set && how != SIG_UNBLOCK) {
        kept = *set;
        sigdelset(&kept, SIGBUS);
        set = &kept;
    }
    /* The same system call; it is for the calling thread alone, on Linux. */
    r = sigprocmask(how, set, old) < 0 ? errno : 0;
    errno = saved;
    return r;
}
