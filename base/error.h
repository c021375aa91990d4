/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * error: what went wrong, in one line a person can act on: what, where, what to do. Libraries fill
 * it and return a negative errno; whoever stops the error (a main(), the daemon) prints it once.
 * Never holds prompt or completion text. Every function that takes one accepts NULL.
 */
struct error {
    char text[512];
};

/*
 * Writes the message and returns -code (code > 0), for `return error_set(err, EINVAL, "...")`.
 * Control characters and invalid UTF-8 in the result, as hostile file names and fields bring
 * them, are replaced by '?', so that the message stays one line.
 */
int error_set(struct error *err, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Lets the compiler see that `return error_set(err, EINVAL, ...)` fails: it warns less in vain. */
#define error_set(err, code, ...)                                                                  \
    ({                                                                                             \
        int code_ = (code);                                                                        \
        (error_set)((err), code_, __VA_ARGS__);                                                    \
        -code_;                                                                                    \
    })

/* Puts "prefix: " before the text that is there; returns -code like error_set(). */
int error_prefix(struct error *err, int code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
