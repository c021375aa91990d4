/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl chat: what begins with a slash. */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/llmctl-chat.h"

DEFINE_CLEANUP(struct llm_options *, llm_options_free)

struct command {
    const char *name, *arguments, *help;
    void (*run)(struct chat *c, char *arguments); /* "": none */
};

static void forget_marks(struct chat *c)
{
    free(c->marks);
    c->marks = NULL;
    c->n_marks = 0;
}

static void quit(struct chat *c, char *arguments)
{
    (void)arguments;
    c->leave = true;
}

static void reset(struct chat *c, char *arguments)
{
    struct llm_error err;

    (void)arguments;
    if (llm_session_rewind(c->session, 0, &err) < 0) {
        complain(STATUS_FAILED, "%s", err.message);
        return;
    }
    c->begun = false;
    forget_marks(c);
    note("a new conversation%s", c->system ? ", with the same /system text" : "");
}

static void undo(struct chat *c, char *arguments)
{
    struct llm_error err;
    uint32_t mark;

    (void)arguments;
    if (c->n_marks == 0) {
        complain(STATUS_FAILED, "there is no turn of this chat to take back");
        return;
    }
    mark = c->marks[c->n_marks - 1];
    if (llm_session_rewind(c->session, mark, &err) < 0) {
        complain(STATUS_FAILED, "%s", err.message);
        return;
    }
    c->n_marks--;
    c->begun = mark > 0;
    note("the last message and its answer are taken back");
}

/* ---- files ---- */

/* ~/ is the only thing a shell would have done with it. */
static int file_path(const char *argument, char **ret)
{
    const char *home = getenv("HOME");

    if (argument[0] == 0)
        return usage_error("a file's name is missing; see /help");
    if (strncmp(argument, "~/", 2) == 0 && home)
        return asprintf(ret, "%s%s", home, argument + 1) < 0
                   ? (*ret = NULL, complain(STATUS_FAILED, "out of memory"))
                   : STATUS_OK;
    *ret = strdup(argument);
    return *ret ? STATUS_OK : complain(STATUS_FAILED, "out of memory");
}

static void set_file(struct chat *c, char **path)
{
    free(c->file);
    c->file = TAKE_PTR(*path);
}

/* A file that is there already is written over only where it is this chat's own. */
static int put_in_place(struct chat *c, const char *temporary, const char *path)
{
    bool own = c->file && strcmp(c->file, path) == 0;

    if (own)
        return rename(temporary, path) < 0 ? -errno : 0;
    if (link(temporary, path) < 0)
        return -errno;
    unlink(temporary);
    return 0;
}

static void save(struct chat *c, char *arguments)
{
    CLEANUP(freep) char *path = NULL, *temporary = NULL;
    CLEANUP(closep) int fd = -EBADF;
    struct llm_error err;
    int r;

    if (file_path(arguments, &path) != STATUS_OK)
        return;
    if (asprintf(&temporary, "%s.XXXXXX", path) < 0) {
        temporary = NULL;
        complain(STATUS_FAILED, "out of memory");
        return;
    }
    fd = mkostemp(temporary, O_CLOEXEC); /* of mode 0600 */
    if (fd < 0) {
        complain(STATUS_FAILED, "%s: %s", path, strerror(errno));
        return;
    }
    r = llm_session_save(c->session, fd, &err);
    if (r < 0) {
        complain(STATUS_FAILED, "%s", err.message);
        unlink(temporary);
        return;
    }
    r = fsync(fd) < 0 ? -errno : put_in_place(c, temporary, path);
    if (r < 0) {
        complain(STATUS_FAILED, "%s: %s", path,
                 r == -EEXIST ? "is there already, and is not this chat's: choose another name"
                              : strerror(-r));
        unlink(temporary);
        return;
    }
    note("saved as %s", path);
    set_file(c, &path);
}

/* Into a session of its own first: when it cannot be read, the conversation is as it was. */
static void load(struct chat *c, char *arguments)
{
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    CLEANUP(freep) char *path = NULL;
    CLEANUP(closep) int fd = -EBADF;
    struct llm_session *session;
    struct llm_error err;

    if (file_path(arguments, &path) != STATUS_OK ||
        request_make_session(&c->request, c->model, &options) != STATUS_OK)
        return;
    fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (fd < 0) {
        complain(STATUS_FAILED, "%s: %s", path, strerror(errno));
        return;
    }
    if (llm_session_new(&session, c->connection, options, &err) < 0) {
        complain(STATUS_FAILED, "%s", err.message);
        return;
    }
    if (llm_session_restore(session, fd, &err) < 0) {
        complain(STATUS_FAILED, "%s: %s", path, err.message);
        llm_session_free(session);
        return;
    }
    llm_session_free(c->session);
    c->session = session;
    c->begun = true;
    forget_marks(c);
    note("the conversation of %s goes on", path);
    set_file(c, &path);
}

/* ---- how answers are made ---- */

static void set_system(struct chat *c, char *arguments)
{
    char *copy;

    if (arguments[0] == 0) {
        printf("%s\n", c->system ? c->system : "there is no /system text");
        return;
    }
    if (c->begun) {
        complain(STATUS_FAILED, "/system stands before the first message: /reset, then /system");
        return;
    }
    copy = strdup(arguments);
    if (!copy) {
        complain(STATUS_FAILED, "out of memory");
        return;
    }
    free(c->system);
    c->system = copy;
}

static void list_settings(const struct chat *c)
{
    const char *name;

    for (size_t i = 0; (name = request_option_name(i)); i++) {
        bool any = false;

        printf("%-20s", name);
        for (size_t k = 0; k < c->request.n_settings; k++)
            if (c->request.settings[k].option == i) {
                printf(" %s", c->request.settings[k].text ? c->request.settings[k].text : "yes");
                any = true;
            }
        puts(any ? "" : " (default)");
    }
}

static void set(struct chat *c, char *arguments)
{
    char *name = arguments, *value = arguments + strcspn(arguments, " \t"), *copy = NULL, **grown;

    if (name[0] == 0) {
        list_settings(c);
        return;
    }
    if (value[0]) {
        *value++ = 0;
        value += strspn(value, " \t");
    }
    if (value[0]) {
        copy = strdup(value);
        grown = reallocarray(c->values, c->n_values + 1, sizeof(*grown));
        if (grown)
            c->values = grown;
        if (!copy || !grown) {
            free(copy);
            complain(STATUS_FAILED, "out of memory");
            return;
        }
        c->values[c->n_values++] = copy;
    }
    if (request_set(&c->request, name, copy) == -1)
        complain(STATUS_USAGE, "there is no option %s; /set lists them", name);
}

/* ---- what there is ---- */

static void measure(struct chat *c, char *arguments)
{
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    uint32_t used, most, tokens;
    struct llm_error err;
    int r;

    if (chat_context(c, &used, &most) != STATUS_OK)
        return;
    if (arguments[0] == 0) {
        printf("%" PRIu32 " of %" PRIu32 " tokens\n", used, most);
        return;
    }
    r = llm_options_new(&options);
    if (r == 0)
        r = llm_options_set_string(options, "prompt", arguments);
    if (r == 0)
        r = llm_options_set_object(options, "session", llm_session_path(c->session));
    if (r == 0 && c->request.raw)
        r = llm_options_set_bool(options, "raw", true);
    if (r < 0) {
        complain(STATUS_FAILED, "%s", strerror(-r));
        return;
    }
    if (llm_measure(c->connection, options, &tokens, &err) < 0)
        complain(STATUS_FAILED, "%s", err.message);
    else
        printf("%" PRIu32 " tokens; %" PRIu32 " are left\n", tokens, most - used);
}

static void tell_status(struct chat *c, char *arguments)
{
    struct llm_status s;
    struct llm_error err;
    uint32_t used, most;

    (void)arguments;
    if (llm_get_status(c->connection, &s, &err) < 0) {
        complain(STATUS_FAILED, "%s", err.message);
        return;
    }
    if (chat_context(c, &used, &most) != STATUS_OK)
        return;
    printf("daemon   llmd %s, %s\n"
           "model    %s\n"
           "session  %s\n"
           "context  %" PRIu32 " of %" PRIu32 " tokens, %zu turns of this chat\n",
           s.version, s.state, s.model, strrchr(llm_session_path(c->session), '/') + 1, used, most,
           c->n_marks);
}

static void help(struct chat *c, char *arguments);

static const struct command commands[] = {
    {"help", "", "these lines", help},
    {"quit", "", "leave; so does Ctrl-D", quit},
    {"reset", "", "begin a new conversation", reset},
    {"undo", "", "take the last message and its answer back", undo},
    {"save", "FILE", "write the conversation to a file", save},
    {"load", "FILE", "go on with a conversation that was saved", load},
    {"system", "[TEXT]", "how to answer, for the model; before the first message", set_system},
    {"set", "[OPTION [VALUE]]", "list the options of llmctl run, set one, or take it back", set},
    {"measure", "[TEXT]", "how many tokens the conversation has, or a message would have", measure},
    {"status", "", "daemon, model and session", tell_status},
};

static void help(struct chat *c, char *arguments)
{
    (void)c;
    (void)arguments;
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        char left[40];

        snprintf(left, sizeof(left), "/%s %s", commands[i].name, commands[i].arguments);
        printf("%-24s %s\n", left, commands[i].help);
    }
    puts("A message that begins with a slash is written with two. A line that ends with \\ goes on "
         "in\n"
         "the next. Ctrl-C cancels the answer.");
}

void chat_command(struct chat *c, char *line)
{
    size_t n = strlen(line), n_name;

    while (n > 0 && strchr(" \t\n", line[n - 1]))
        line[--n] = 0;
    line++;
    n_name = strcspn(line, " \t\n");
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        char *arguments = line + n_name;

        if (strlen(commands[i].name) != n_name || strncmp(commands[i].name, line, n_name) != 0)
            continue;
        arguments += strspn(arguments, " \t\n");
        if (arguments[0] && !commands[i].arguments[0])
            complain(STATUS_USAGE, "/%s takes no argument", commands[i].name);
        else
            commands[i].run(c, arguments);
        fflush(stdout);
        return;
    }
    complain(STATUS_USAGE,
             "unknown command /%.*s; see /help (a message that begins with a slash is written with "
             "two)",
             (int)MIN(n_name, (size_t)40), line);
}
