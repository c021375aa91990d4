/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* What llmctl's verbs share. Everything here is for one short-lived process with one thread. */

#include <getopt.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "client/llm.h"

/* Exit statuses, as llmctl(1) documents them. */
enum status {
    STATUS_OK = 0,
    STATUS_FAILED = 1,
    STATUS_USAGE = 2,
    STATUS_NOT_RUNNING = 3,
    STATUS_BUSY = 75, /* EX_TEMPFAIL: busy, or a quota */
    STATUS_TIMEOUT = 124,
    STATUS_INTERRUPTED = 130,
};

/* ---- verbs ---- */

/* Each returns an exit status; argv[0] is for messages, the verb's arguments begin at argv[1]. */
int verb_chat(int argc, char **argv);
int verb_map(int argc, char **argv);
int verb_run(int argc, char **argv);
int verb_status(int argc, char **argv);
int verb_is_ready(int argc, char **argv);
int verb_session(int argc, char **argv);
int verb_model(int argc, char **argv);
int verb_measure(int argc, char **argv);
int verb_cancel(int argc, char **argv);
int verb_quota(int argc, char **argv);
int verb_top(int argc, char **argv);
int verb_monitor(int argc, char **argv);

struct verb {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help; /* one line */
};

struct verb_table {
    const char *what; /* "command", "session command": for complaints */
    const struct verb *verbs;
    size_t n;
    void (*help)(void);
    int (*run)(int argc, char **argv); /* without any verb; NULL: a usage error */
};

/* Reads global options, then runs the verb that argv names. For llmctl, and for verbs of two words.
 */
int verb_dispatch(const struct verb_table *table, int argc, char **argv);
/* "  name  help" for each, as --help has it below "Commands:". */
void verb_table_print(const struct verb_table *table);

/* ---- options ---- */

enum json_mode {
    JSON_OFF,
    JSON_SHORT, /* one line */
    JSON_PRETTY,
};

/* What every verb takes, before its name or after. Set by main() and next_option() alone. */
struct global_options {
    enum llm_scope scope;
    const char *socket; /* NULL: as the scope says */
    enum json_mode json;
    bool no_pager, no_legend, quiet, no_ask_password;
    uint64_t timeout_usec; /* 0: none; see deadlines_begin() */
    const char *session;   /* number or path; NULL: none given */
};
extern struct global_options global;

/* The end of a verb's help. */
#define GLOBAL_HELP                                          \
    "  -h, --help                     print this and exit\n" \
    "\n"                                                     \
    "llmctl --help lists the options of all commands. See llmctl(1)."

struct verb_options {
    const char *letters;          /* for getopt(), or NULL; -h and -q are taken */
    const struct option *options; /* ends with zeros, or NULL; values below OPTION_GLOBAL */
    void (*help)(void);
};

#define OPTION_GLOBAL 0x10000
#define OPTION_STOP (-2)

/*
 * getopt_long() that takes care of the global options itself. A value of the verb's own; -1: the
 * rest, from optind, are arguments; OPTION_STOP: end with *ret_status (help, or a complaint)
 */
int next_option(const struct verb_options *o, int argc, char **argv, int *ret_status);

/* Finite decimals; base/number.h has whole numbers. */
bool parse_double(const char *text, double *ret);

/* ---- messages and output ---- */

/* Called before each of the messages below, to make room for it on the terminal; or NULL. */
extern void (*before_message)(void);
/* Called when a signal ends the process; async-signal-safe; or NULL. */
extern void (*before_exit)(void);

/* "llmctl: ..." on stderr; returns the status. */
int complain(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
int usage_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same for what is no error; not with --quiet. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The status for a negative errno of libllm. */
int status_of(int r);

/* Whether colours are wanted on this descriptor: a terminal, and neither NO_COLOR nor dumb. */
bool colours_on(int fd);

struct json_object;
/* Prints it on stdout as --json wants it (JSON_OFF counts as short), and a line feed. A status */
int json_print(struct json_object *o);

/* ---- interruption ---- */

/*
 * From now on SIGINT ends the process with 130, and so does the deadline (usec; 0: none) with 124.
 * A SIGINT that the parent ignores stays ignored.
 */
void deadlines_begin(uint64_t timeout_usec);
/* The deadline anew, from now; 0: none. */
void deadlines_restart(uint64_t timeout_usec);
/* From now on both are blocked, and let in by deadlines_wait() alone... */
void deadlines_hold(void);
/* ...until here. */
void deadlines_release(void);
bool deadlines_are_held(void);
/* poll()s. 0, STATUS_INTERRUPTED, STATUS_TIMEOUT, or a complaint was made */
int deadlines_poll(struct pollfd *fds, nfds_t n);
int deadlines_wait(int fd, short events); /* the same for one */
/* Forgets an interruption that was told. */
void deadlines_clear(void);

/* ---- the daemon ---- */

struct start_options {
    const char *model; /* a file, or a name; NULL: $LLMD_MODEL, else the default one */
    bool no_start;
};

/*
 * Connects as --system, --user, --private and --socket say. Where the private daemon is meant, or
 * any and none answers, it is started. *ret_model is the model asked for, malloc'ed: for the option
 * "model" of CreateSession; NULL: any. STATUS_OK, or a status and the complaint is made.
 */
int connect_or_start(const struct start_options *o, struct llm_connection **ret, char **ret_model);
/* The same for verbs that have no use for a fresh daemon: STATUS_NOT_RUNNING where none serves. */
int connect_running(struct llm_connection **ret);
