/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Scope-bound ownership. A local declared CLEANUP(foo_freep) is given to foo_freep(&local) when it
 * goes out of scope; TAKE_PTR and TAKE_FD hand it away first.
 */

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CLEANUP(fn) __attribute__((cleanup(fn)))

/* Defines fnp(T *) for a destructor fn(T) that is called on anything but NULL. */
#define DEFINE_CLEANUP(T, fn)                                                                      \
    static inline void fn##p(T *p)                                                                 \
    {                                                                                              \
        if (*p)                                                                                    \
            fn(*p);                                                                                \
    }

#define TAKE_PTR(p)                                                                                \
    ({                                                                                             \
        __typeof__(p) taken_ = (p);                                                                \
        (p) = NULL;                                                                                \
        taken_;                                                                                    \
    })

#define TAKE_FD(fd)                                                                                \
    ({                                                                                             \
        int taken_ = (fd);                                                                         \
        (fd) = -EBADF;                                                                             \
        taken_;                                                                                    \
    })

static inline void freep(void *p)
{
    free(*(void **)p);
}

/* Descriptors start at -EBADF, so any negative value means "none". */
static inline void closep(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void fclosep(FILE **f)
{
    if (*f)
        fclose(*f);
}

static inline void closedirp(DIR **d)
{
    if (*d)
        closedir(*d);
}
