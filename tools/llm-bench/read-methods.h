/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* read_methods: ways to get a model file into memory, and how long each takes. */

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

enum read_method {
    READ_FAULTS,        /* each page of a mapping is touched, nothing is said about it */
    READ_FAULTS_HUGE,   /* the same with MADV_HUGEPAGE, as all mappings below */
    READ_POPULATE,      /* one thread, MADV_POPULATE_READ: what llmd does without io_uring */
    READ_RING_POPULATE, /* the same through a ring: what llmd does */
    READ_RING_WILLNEED,
    READ_RING_READ,
    READ_PLAIN,  /* read() */
    READ_DIRECT, /* reads past the page cache, through a ring: what the disk gives */
    N_READ_METHODS
};

/* All of it is read but [skip_from, skip_to), which begins and ends with a page. */
struct read_file {
    const char *path;
    uint64_t size, skip_from, skip_to;
};

struct read_time {
    double read;         /* seconds until the method says that all is read */
    double touch;        /* then, to touch every page of a new mapping; READ_DIRECT: 0 */
    double processor;    /* seconds of processor time of both, in the kernel's threads too */
    uint64_t huge_bytes; /* mapped by huge pages afterwards */
};

const char *read_method_name(enum read_method m);    /* for people */
const char *read_method_field(enum read_method m);   /* for JSON */
uint64_t read_file_bytes(const struct read_file *f); /* that are read */

/* 0, -ENOSYS: not on this machine or file system (err tells why), -errno */
int read_file_by(enum read_method m, const struct read_file *f, struct read_time *ret,
                 struct error *err);

/*
 * Has the kernel forget what is cached: everything, as root, else of this file what nobody has
 * mapped. *ret_everything; *ret_left: bytes of the file that are still there, 0 where that cannot
 * be known. 0, -errno
 */
int read_file_forget(const struct read_file *f, bool *ret_everything, uint64_t *ret_left,
                     struct error *err);
