/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "client/llmctl-show.h"

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/number.h"
#include "client/llmctl.h"

void terminal_size(size_t *ret_columns, size_t *ret_lines)
{
    const char *columns = getenv("COLUMNS"), *lines = getenv("LINES");
    struct winsize size = {0};
    uint64_t n;

    *ret_columns = *ret_lines = 0;
    if (!isatty(STDOUT_FILENO))
        return;
    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) < 0 || size.ws_col == 0)
        size = (struct winsize){.ws_col = 80, .ws_row = 24}; /* a serial line that does not know */
    *ret_columns = columns && number_parse(columns, 10000, &n) == 0 && n > 0 ? n : size.ws_col;
    *ret_lines = lines && number_parse(lines, 10000, &n) == 0 && n > 0 ? n : size.ws_row;
}

/* ---- the pager ---- */

/* A shell command, or NULL: none is wanted. */
static const char *pager(void)
{
    static const char *const variables[] = {"LLMD_PAGER", "SYSTEMD_PAGER", "PAGER"};
    const char *command = "less";

    if (global.no_pager)
        return NULL;
    for (size_t i = 0; i < sizeof(variables) / sizeof(variables[0]); i++) {
        const char *value = getenv(variables[i]);

        if (value) {
            command = value;
            break;
        }
    }
    return command[0] && strcmp(command, "cat") != 0 ? command : NULL;
}

/* 0: shown; negative: it could not be started */
static int page(const char *command, const char *text)
{
    CLEANUP(fclosep) FILE *f = NULL;
    struct sigaction ignore = {.sa_handler = SIG_IGN}, on_interrupt, on_pipe;
    char *const argv[] = {(char[]){"sh"}, (char[]){"-c"}, strdup(command), NULL};
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t defaults;
    int ends[2], r, status;
    pid_t pid;

    if (!argv[2] || pipe2(ends, O_CLOEXEC) < 0) {
        free(argv[2]);
        return -ENOMEM;
    }
    setenv("LESS", "FRSX", /* overwrite= */ 0); /* not when it fits; cut, not wrapped */
    setenv("LESSCHARSET", "utf-8", 0);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[0], STDIN_FILENO);
    sigemptyset(&defaults);
    sigaddset(&defaults, SIGINT);
    sigaddset(&defaults, SIGPIPE);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigdefault(&attributes, &defaults);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
    /* Ctrl-C is the pager's now, and to quit before the end is no error. */
    sigaction(SIGINT, &ignore, &on_interrupt);
    sigaction(SIGPIPE, &ignore, &on_pipe);
    fflush(stdout);
    r = -posix_spawn(&pid, "/bin/sh", &actions, &attributes, argv, environ);
    close(ends[0]);
    f = fdopen(ends[1], "w");
    if (r == 0) {
        if (f) {
            fputs(text, f);
            fclose(TAKE_PTR(f));
        } else {
            close(ends[1]);
        }
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            ;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
            r = -ENOENT; /* the shell has not found it */
    }
    sigaction(SIGINT, &on_interrupt, NULL);
    sigaction(SIGPIPE, &on_pipe, NULL);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    free(argv[2]);
    return r;
}

/* ---- tables ---- */

static int complain_of_table(int r)
{
    return complain(STATUS_FAILED, "%s", r == -ENOMEM ? "out of memory" : strerror(-r));
}

static int put(const char *text, const char *pager_command)
{
    if (pager_command && page(pager_command, text) == 0)
        return STATUS_OK;
    if (fputs(text, stdout) == EOF)
        return complain(STATUS_FAILED, "cannot write: %s", strerror(errno));
    return STATUS_OK;
}

static int print_json(struct json_object *o)
{
    int status = json_print(o);

    json_object_put(o);
    return status;
}

static size_t n_lines(const char *text)
{
    size_t n = 0;

    for (; *text; text++)
        n += *text == '\n';
    return n;
}

int show_table(struct table *t, const char *singular, const char *plural)
{
    struct table_format format = {.no_legend = global.no_legend};
    CLEANUP(freep) char *text = NULL, *whole = NULL;
    size_t n = table_n_rows(t), lines;
    struct json_object *o;
    int r;

    if (global.json != JSON_OFF) {
        r = table_to_json(t, &o);
        return r < 0 ? complain_of_table(r) : print_json(o);
    }
    terminal_size(&format.width, &lines);
    format.people = format.width > 0;
    r = table_format_rows(t, &format, &text);
    if (r < 0)
        return complain_of_table(r);
    if (!format.people || format.no_legend)
        return put(text, format.people && n_lines(text) >= lines ? pager() : NULL);
    if (asprintf(&whole, "%s%s%zu %s\n", text, n > 0 ? "\n" : "", n, n == 1 ? singular : plural) <
        0) {
        whole = NULL;
        return complain_of_table(-ENOMEM);
    }
    return put(whole, n_lines(whole) >= lines ? pager() : NULL);
}

int show_record(struct table *t)
{
    struct table_format format = {0};
    CLEANUP(freep) char *text = NULL;
    struct json_object *o;
    size_t lines;
    int r;

    if (global.json != JSON_OFF) {
        r = table_row_to_json(t, 0, &o);
        return r < 0 ? complain_of_table(r) : print_json(o);
    }
    terminal_size(&format.width, &lines);
    format.people = format.width > 0;
    format.width = 0; /* nothing is cut: a line that is too long breaks */
    r = table_format_upright(t, &format, &text);
    return r < 0 ? complain_of_table(r) : put(text, NULL);
}
