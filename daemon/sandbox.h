/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * sandbox: what a process gives up for good once it is set up: capabilities, new privileges, files
 * (landlock), system calls (seccomp, by the lists in policy/). A system call that is not allowed
 * fails with EPERM, and one line names it. For the daemon, llm-import and the daemon's children.
 *
 *   sandbox_new(&s, SANDBOX_STRICT)
 *   sandbox_allow_path(s, folder, SANDBOX_READ)
 *   sandbox_allow_calls(s, &seccomp_llmd)
 *   sandbox_enter(s, &err)
 *   sandbox_free(s)
 *
 * One thread until it has entered; those that are started later are confined with it. A process
 * enters once.
 */

#include <stdbool.h>

#include "base/error.h"
#include "daemon/seccomp-list.h"

enum sandbox_mode {
    SANDBOX_STRICT,
    SANDBOX_REPORT, /* what would be refused is done, and told of */
    SANDBOX_OFF,    /* nothing of all this */
};

enum sandbox_access {
    SANDBOX_READ, /* files and lists of what is there; as all of these, for what is below too */
    SANDBOX_READ_FILES, /* files whose names one knows */
    SANDBOX_READ_FILE,  /* this file; a folder is not opened, nor anything below it */
    SANDBOX_WRITE,      /* besides SANDBOX_READ: make, change, rename, remove files and folders */
    SANDBOX_SOCKET,     /* make sockets, remove files */
    SANDBOX_DEVICE,     /* this device: read, write, control; what is none is not there */
};

struct sandbox;

/* "strict", "report", "off". 0, -EINVAL */
int sandbox_parse_mode(const char *text, enum sandbox_mode *ret);

/* 0, -ENOMEM */
int sandbox_new(struct sandbox **ret, enum sandbox_mode mode);
struct sandbox *sandbox_free(struct sandbox *s);
void sandbox_freep(struct sandbox **s);

/*
 * What is refused goes there from then on: to standard error, in lines that begin with `program:`
 * or, where prefixes, with the journal's priority; or with fields to the journal, as messages of
 * message_id. program and message_id stay the caller's, for good.
 */
void sandbox_tell_stderr(struct sandbox *s, const char *program, bool prefixes);
void sandbox_tell_journal(struct sandbox *s, const char *program, const char *message_id);

/*
 * What is there now under that name, links followed; a folder with all below it. What is not there
 * is passed over: *ret_there (may be NULL). 0, -ENOMEM
 */
int sandbox_allow_path(struct sandbox *s, const char *path, enum sandbox_access access,
                       bool *ret_there);

/* The list stays the caller's. seccomp_process is always allowed. 0, -ENOMEM */
int sandbox_allow_calls(struct sandbox *s, const struct seccomp_list *list);

/*
 * A Unix socket that may be connected to, by the very path that is used then; "@name": one without
 * a path. For the process. 0, -ENOMEM
 */
int sandbox_allow_connect(struct sandbox *s, const char *path);

/* Unix sockets of processes outside that have no path, "@name". */
void sandbox_allow_abstract_sockets(struct sandbox *s);

/*
 * 0: *ret_lacks (may be NULL) is what the kernel does not have, in words, "" if nothing; the rest
 * is in force. -errno: the process is half confined and should end
 */
int sandbox_enter(struct sandbox *s, struct error *ret_lacks, struct error *err);
