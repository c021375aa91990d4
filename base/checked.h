/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * Checked arithmetic, by the names and meaning of C23's <stdckdint.h>: stores a op b in *r and is
 * true when the result did not fit, whatever the three types. Every size, count and offset that
 * comes from a file, a socket or JSON goes through these.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ckd_add(r, a, b) __builtin_add_overflow((a), (b), (r))
#define ckd_sub(r, a, b) __builtin_sub_overflow((a), (b), (r))
#define ckd_mul(r, a, b) __builtin_mul_overflow((a), (b), (r))

/* *r = a rounded up to a multiple of align (a power of two); true when that overflows. */
static inline bool ckd_align(size_t *r, size_t a, size_t align)
{
    size_t t;

    if (ckd_add(&t, a, align - 1))
        return true;
    *r = t & ~(align - 1);
    return false;
}

/* True when [offset, offset + length) does not lie within [0, size). */
static inline bool range_outside(uint64_t offset, uint64_t length, uint64_t size)
{
    return offset > size || length > size - offset;
}

/* For values known to be small: never for input. */
#define ALIGN_UP(a, align) (((a) + (align)-1) & ~((__typeof__(a))(align)-1))
#define DIV_ROUND_UP(a, b) (((a) + (b)-1) / (b))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
/* Evaluate an argument twice, so that they nest without shadowing: no side effects in there. */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
