/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * libllm-shell SOCKET|system|user: for tests, a program with one connection of libllm that does
 * what lines on its standard input say, and answers each with a line: "ok WORDS" or "error ERRNO
 * NAME". Sessions are numbered as they are made here, from 0.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/llm.h"

#define SESSIONS_MAX 64
#define TEXT_BYTES (1 << 20)

DEFINE_CLEANUP(struct llm_options *, llm_options_free)
DEFINE_CLEANUP(struct llm_stream *, llm_stream_free)

static struct llm_connection *connection;
static struct llm_session *sessions[SESSIONS_MAX];
static struct llm_error err;
static int n_sessions, stream_fd = -1;
static char text[TEXT_BYTES];

static void answer(int r, const char *words)
{
    if (r < 0)
        printf("error %d %s\n", -r, err.name);
    else
        printf("ok %s\n", words);
    fflush(stdout);
}

/* Words as they are on one line. */
static void add_text(const char *more, size_t n)
{
    size_t used = strlen(text);

    for (size_t i = 0; i < n && used + 5 < sizeof(text); i++) {
        unsigned char c = (unsigned char)more[i];

        used += (size_t)snprintf(text + used, sizeof(text) - used,
                                 c > 0x20 && c < 0x7f && c != '\\' ? "%c" : "\\x%02x", c);
    }
}

static int read_stream(void)
{
    CLEANUP(llm_stream_freep) struct llm_stream *s = NULL;
    struct llm_event e;
    int r;

    text[0] = 0;
    r = llm_stream_new(&s, TAKE_FD(stream_fd));
    if (r < 0)
        return r;
    while ((r = llm_stream_next(s, &e)) > 0) {
        if (e.type == LLM_DELTA)
            add_text(e.text, e.n_text);
        if (e.type == LLM_ERROR) {
            snprintf(err.name, sizeof(err.name), "%s", e.name);
            return -llm_error_number(e.name);
        }
    }
    return r;
}

/* "TOKENS PROMPT" */
static int start(struct llm_session *s, char *rest)
{
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    uint32_t n = (uint32_t)strtoul(rest, &rest, 10);

    if (llm_options_new(&o) < 0 || llm_options_set_string(o, "prompt", rest + (*rest == ' ')) < 0 ||
        llm_options_set_uint32(o, "max-tokens", n) < 0 ||
        llm_options_set_bool(o, "ignore-end", true) < 0 || llm_options_set_uint64(o, "seed", 7) < 0)
        return -ENOMEM;
    return llm_session_generate(s, o, &stream_fd, NULL, &err);
}

static int make(struct llm_session *from, bool linger, const char *id)
{
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    struct llm_session **s = &sessions[n_sessions];
    int r;

    if (n_sessions == SESSIONS_MAX || llm_options_new(&o) < 0 ||
        llm_options_set_bool(o, "linger", linger) < 0)
        return -ENOMEM;
    r = id     ? llm_session_open(s, connection, id, &err)
        : from ? llm_session_fork(s, from, o, &err)
               : llm_session_new(s, connection, o, &err);
    if (r >= 0)
        snprintf(text, sizeof(text), "%d %s", n_sessions++, llm_session_path(*s));
    return r;
}

static int with_file(struct llm_session *s, const char *path, bool save)
{
    CLEANUP(closep) int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    if (fd < 0)
        return -errno;
    return save ? llm_session_save(s, fd, &err) : llm_session_restore(s, fd, &err);
}

static int with_session(const char *verb, char *rest)
{
    int i = (int)strtol(rest, &rest, 10), r;
    struct llm_session *s = i < n_sessions ? sessions[i] : NULL;

    rest += *rest == ' ';
    if (!s)
        return -EINVAL;
    if (strcmp(verb, "say") == 0) {
        r = start(s, rest);
        return r < 0 ? r : read_stream();
    }
    if (strcmp(verb, "start") == 0)
        return start(s, rest);
    if (strcmp(verb, "fork") == 0)
        return make(s, false, NULL);
    if (strcmp(verb, "rewind") == 0)
        return llm_session_rewind(s, (uint32_t)strtoul(rest, NULL, 10), &err);
    if (strcmp(verb, "cancel") == 0)
        return llm_session_cancel(s, &err);
    if (strcmp(verb, "close") == 0)
        return llm_session_close(s, &err);
    if (strcmp(verb, "save") == 0 || strcmp(verb, "restore") == 0)
        return with_file(s, rest, verb[0] == 's');
    if (strcmp(verb, "free") == 0) {
        llm_session_free(s);
        sessions[i] = NULL;
        return 0;
    }
    return -EINVAL;
}

static int measure(const char *prompt)
{
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    uint32_t n;
    int r;

    if (llm_options_new(&o) < 0 || llm_options_set_string(o, "prompt", prompt) < 0)
        return -ENOMEM;
    r = llm_measure(connection, o, &n, &err);
    if (r >= 0)
        snprintf(text, sizeof(text), "%u", n);
    return r;
}

static int act(char *line)
{
    char *verb = strsep(&line, " ");
    struct llm_status status;
    int r;

    text[0] = err.name[0] = 0;
    if (strcmp(verb, "new") == 0)
        return make(NULL, line && strcmp(line, "linger") == 0, NULL);
    if (strcmp(verb, "open") == 0)
        return make(NULL, false, line);
    if (strcmp(verb, "read") == 0)
        return read_stream();
    if (strcmp(verb, "measure") == 0)
        return measure(line);
    if (strcmp(verb, "status") == 0) {
        r = llm_get_status(connection, &status, &err);
        if (r >= 0)
            snprintf(text, sizeof(text), "%u", status.sessions);
        return r;
    }
    return line ? with_session(verb, line) : -EINVAL;
}

int main(int argc, char **argv)
{
    char *line = NULL;
    size_t allocated = 0;
    ssize_t n;
    int r = -EINVAL;

    if (argc == 2)
        r = strcmp(argv[1], "system") == 0 ? llm_connect_scope(&connection, LLM_SCOPE_SYSTEM, &err)
            : strcmp(argv[1], "user") == 0 ? llm_connect_scope(&connection, LLM_SCOPE_USER, &err)
                                           : llm_connect(&connection, argv[1], &err);
    answer(r, "connected");
    while (r >= 0 && (n = getline(&line, &allocated, stdin)) > 0) {
        line[strcspn(line, "\n")] = 0;
        answer(act(line), text);
    }
    free(line);
    for (int i = 0; i < n_sessions; i++)
        llm_session_free(sessions[i]);
    closep(&stream_fd);
    llm_disconnect(connection);
    return r < 0;
}
