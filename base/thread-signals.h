/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

#include <signal.h>
#include <stddef.h>

/*
 * What a thread blocks that leaves signals to others: all, but not those that its own instructions
 * raise. A fault whose signal is blocked ends the process, whatever handles that signal.
 */
static inline void thread_signals_for_others(sigset_t *ret)
{
    static const int own[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGSYS};

    sigfillset(ret);
    for (size_t i = 0; i < sizeof(own) / sizeof(own[0]); i++)
        sigdelset(ret, own[i]);
}
