/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * libedit reads its characters through read_key(), which waits as everything else here does, so
 * that Ctrl-C is an event like a key.
 *
 * Between two messages the terminal neither echoes nor gathers lines: what is typed while an answer
 * comes does not get mixed with it, and waits for the next prompt as it was typed. Whatever ends or
 * stops us puts the terminal back first.
 *
 * Each message is appended to the history's file at once, so that several chats at a time lose
 * nothing of each other's.
 */

#include "client/llmctl-editor.h"

#include <errno.h>
#include <fcntl.h>
#include <histedit.h>
#include <langinfo.h>
#include <locale.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>
#include <wchar.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/llmctl.h"
#include "ipc/buffer.h"

#define HISTORY_MESSAGES 1000
#define HISTORY_BYTES_MAX (4u << 20) /* beyond, the file is written anew with the last messages */

struct editor {
    EditLine *line;
    History *history;
    char *history_path; /* NULL: not kept */
    bool continuing;    /* the last line ended with a backslash */
    bool interrupted, had_text;
    bool colours;
};

static struct termios mode_before, mode_between;
static volatile sig_atomic_t resized, continued;

static void restore_terminal(void)
{
    tcsetattr(STDIN_FILENO, TCSANOW, &mode_before);
}

static void mute_terminal(void)
{
    tcsetattr(STDIN_FILENO, TCSANOW, &mode_between);
}

static void on_terminal_signal(int number)
{
    if (number == SIGWINCH) {
        resized = 1;
    } else {
        continued = 1;
        mute_terminal();
    }
}

static void on_end(int number)
{
    restore_terminal();
    signal(number, SIG_DFL);
    raise(number);
}

static void on_stop(int number)
{
    struct sigaction again;
    sigset_t only;

    restore_terminal();
    sigaction(number, &(struct sigaction){.sa_handler = SIG_DFL}, &again);
    sigemptyset(&only);
    sigaddset(&only, number);
    raise(number);
    sigprocmask(SIG_UNBLOCK, &only, NULL); /* here we stand still */
    sigprocmask(SIG_BLOCK, &only, NULL);
    sigaction(number, &again, NULL);
    on_terminal_signal(SIGCONT);
}

static void catch (int number, void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler}, before;

    if (sigaction(number, NULL, &before) == 0 && before.sa_handler != SIG_IGN)
        sigaction(number, &action, NULL);
}

/* ---- libedit's callbacks ---- */

static struct editor *editor_of(EditLine *line)
{
    void *e = NULL;

    el_get(line, EL_CLIENTDATA, &e);
    return e;
}

/* Between two \1 stands what has no width. */
static char *prompt(EditLine *line)
{
    static char plain[] = "> ", bold[] = "\1\033[1m\1> \1\033[0m\1", more[] = "... ";
    const struct editor *e = editor_of(line);

    if (e->continuing)
        return more;
    return e->colours ? bold : plain;
}

static bool has_text(EditLine *line)
{
    const LineInfo *info = el_line(line);

    return info && info->lastchar > info->buffer;
}

/* 1: *ret; 0: the end; -1: errno */
static int read_key(EditLine *line, wchar_t *ret)
{
    struct editor *e = editor_of(line);
    mbstate_t state = {0};
    size_t n;
    ssize_t r;
    char c;
    int status;

    for (;;) {
        if (continued) {
            continued = 0;
            el_set(line, EL_PREP_TERM, 0); /* it does not do again what it thinks is done */
            el_set(line, EL_PREP_TERM, 1);
            el_set(line, EL_REFRESH);
        }
        if (resized) {
            resized = 0;
            el_resize(line);
        }
        status = deadlines_wait(STDIN_FILENO, POLLIN);
        if (status != STATUS_OK) {
            deadlines_clear();
            e->interrupted = true;
            e->had_text = e->continuing || has_text(line);
            errno = EINTR;
            return -1;
        }
        if (resized || continued) /* rather than a key */
            continue;
        r = read(STDIN_FILENO, &c, 1);
        if (r < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (r <= 0)
            return (int)r;
        /* Ctrl-D is this when it came just while lines were gathered: at the start, for instance.
         */
        if (c == 0)
            c = mode_before.c_cc[VEOF] ? (char)mode_before.c_cc[VEOF] : 4;
        n = mbrtowc(ret, &c, 1, &state);
        if (n == (size_t)-2) /* there is more of it */
            continue;
        if (n == (size_t)-1) {
            state = (mbstate_t){0};
            *ret = 0xfffd;
        }
        return 1;
    }
}

/* ---- history ---- */

/* $XDG_STATE_HOME/llmd, made where it is missing; malloc'ed. */
static int make_state_dir(char **ret)
{
    CLEANUP(freep) char *path = NULL;
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    int r;

    if (!home || home[0] != '/') {
        const struct passwd *me = getpwuid(geteuid());

        home = me ? me->pw_dir : "/nonexistent";
    }
    if (state && state[0] == '/')
        r = asprintf(&path, "%s/llmd", state);
    else
        r = asprintf(&path, "%s/.local/state/llmd", home);
    if (r < 0) {
        path = NULL;
        return -ENOMEM;
    }
    for (char *p = strchr(path + 1, '/'); p; p = strchr(p + 1, '/')) {
        *p = 0;
        r = mkdir(path, 0700) < 0 && errno != EEXIST ? -errno : 0;
        *p = '/';
        if (r < 0)
            return r;
    }
    if (mkdir(path, 0700) < 0 && errno != EEXIST)
        return -errno;
    *ret = TAKE_PTR(path);
    return 0;
}

/* Ours alone, whatever it was like. */
static int open_history(const char *path, int flags)
{
    int fd = open(path, flags | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY, 0600);

    if (fd < 0)
        return -errno;
    if (fchmod(fd, 0600) < 0) {
        int r = -errno;

        close(fd);
        return r;
    }
    return fd;
}

/* Writes what the history has into a file of its own, then in the place of the old one. */
static int rewrite_history(struct editor *e)
{
    CLEANUP(freep) char *path = NULL;
    HistEvent event;
    FILE *f;
    int fd, r;

    if (asprintf(&path, "%s.XXXXXX", e->history_path) < 0) {
        path = NULL;
        return -ENOMEM;
    }
    fd = mkostemp(path, O_CLOEXEC);
    if (fd < 0)
        return -errno;
    f = fdopen(fd, "w");
    if (!f) {
        close(fd);
        unlink(path);
        return -ENOMEM;
    }
    r = history(e->history, &event, H_SAVE_FP, f) < 0 ? -EIO : 0;
    if (fclose(f) == EOF && r == 0)
        r = -errno;
    if (r == 0 && rename(path, e->history_path) < 0)
        r = -errno;
    if (r < 0)
        unlink(path);
    return r;
}

static int load_history(struct editor *e)
{
    CLEANUP(freep) char *dir = NULL;
    CLEANUP(closep) int fd = -EBADF;
    HistEvent event;
    struct stat st;
    int r;

    r = make_state_dir(&dir);
    if (r < 0)
        return r;
    if (asprintf(&e->history_path, "%s/history", dir) < 0) {
        e->history_path = NULL;
        return -ENOMEM;
    }
    fd = open_history(e->history_path, O_RDWR);
    if (fd < 0)
        return fd;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (st.st_size == 0)
        return 0;
    if (!S_ISREG(st.st_mode) || history(e->history, &event, H_LOAD, e->history_path) < 0)
        return -EBADMSG;
    return st.st_size > HISTORY_BYTES_MAX ? rewrite_history(e) : 0;
}

/* libedit has no function to write one entry: so it is the only one of another history. */
static int append_history(const char *path, const char *message)
{
    History *one = history_init();
    HistEvent event;
    FILE *f = NULL;
    int fd = -EBADF, r = -ENOMEM;

    if (one && history(one, &event, H_SETSIZE, 1) >= 0 &&
        history(one, &event, H_ENTER, message) >= 0) {
        fd = open_history(path, O_WRONLY | O_APPEND);
        r = fd < 0 ? fd : 0;
    }
    if (r == 0) {
        f = fdopen(fd, "a");
        if (!f) {
            close(fd);
            r = -ENOMEM;
        }
    }
    /* The heading is written where the file begins. */
    if (f && (fseek(f, 0, SEEK_END) < 0 || history(one, &event, H_SAVE_FP, f) < 0))
        r = -EIO;
    if (f && fclose(f) == EOF)
        r = -errno;
    if (one)
        history_end(one);
    return r;
}

static void remember(struct editor *e, const char *message)
{
    HistEvent event;
    int r;

    if (message[0] == 0 || strspn(message, " \t\n") == strlen(message))
        return;
    history(e->history, &event, H_ENTER, message);
    if (!e->history_path)
        return;
    r = append_history(e->history_path, message);
    if (r < 0) {
        note("%s: %s; the history is not kept", e->history_path, strerror(-r));
        free(e->history_path);
        e->history_path = NULL;
    }
}

/* ---- the editor ---- */

int editor_new(struct editor **ret, bool with_history)
{
    struct editor *e = calloc(1, sizeof(*e));
    HistEvent event;
    int r;

    if (!e)
        return -ENOMEM;
    /* Characters only: numbers are read and written the same everywhere. What is typed is UTF-8,
     * also where nobody said so. */
    if (!setlocale(LC_CTYPE, "") || strcmp(nl_langinfo(CODESET), "UTF-8") != 0)
        setlocale(LC_CTYPE, "C.UTF-8");
    e->colours = colours_on(STDOUT_FILENO);
    tcgetattr(STDIN_FILENO, &mode_before);
    mode_between = mode_before;
    mode_between.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
    mode_between.c_cc[VMIN] = 1;
    mode_between.c_cc[VTIME] = 0;
    e->history = history_init();
    e->line = el_init("llmctl", stdin, stdout, stderr);
    if (!e->history || !e->line) {
        editor_free(e);
        return -ENOMEM;
    }
    history(e->history, &event, H_SETSIZE, HISTORY_MESSAGES);
    history(e->history, &event, H_SETUNIQUE, 1);
    el_set(e->line, EL_CLIENTDATA, e);
    el_set(e->line, EL_PROMPT_ESC, prompt, '\1');
    el_set(e->line, EL_EDITOR, "emacs");
    el_set(e->line, EL_HIST, history, e->history);
    el_set(e->line, EL_BIND, "^R", "em-inc-search-prev", NULL);
    el_set(e->line, EL_SIGNAL, 0);
    /* Nor for the moment between a line's end and mute_terminal(). */
    el_set(e->line, EL_SETTY, "-x", "-echo", "-icanon", NULL);
    el_set(e->line, EL_GETCFN, read_key);
    el_source(e->line, NULL); /* ~/.editrc */
    if (with_history && (r = load_history(e)) < 0) {
        note("%s: %s; the history is not kept", e->history_path ? e->history_path : "history",
             strerror(-r));
        free(e->history_path);
        e->history_path = NULL;
    }
    catch (SIGWINCH, on_terminal_signal);
    catch (SIGCONT, on_terminal_signal);
    catch (SIGTERM, on_end);
    catch (SIGHUP, on_end);
    catch (SIGQUIT, on_end);
    catch (SIGTSTP, on_stop);
    before_exit = restore_terminal;
    mute_terminal();
    *ret = e;
    return 0;
}

void editor_free(struct editor *e)
{
    if (!e)
        return;
    before_exit = NULL;
    if (e->line)
        el_end(e->line);
    restore_terminal();
    if (e->history)
        history_end(e->history);
    free(e->history_path);
    free(e);
}

int editor_read(struct editor *e, char **ret, bool *ret_had_text)
{
    CLEANUP(buffer_done) struct buffer message = {0};
    const char *text;
    char *copy;
    int n;

    e->interrupted = e->continuing = false;
    continued = 0;
    do {
        /* It would draw the prompt first, and then see to the terminal. */
        el_set(e->line, EL_PREP_TERM, 1);
        errno = 0;
        text = el_gets(e->line, &n);
        mute_terminal();
        if (e->interrupted) {
            fputs("\n", stdout);
            fflush(stdout);
            *ret_had_text = e->had_text;
            return -EINTR;
        }
        if (!text || n <= 0)
            return n < 0 && errno != 0 ? -errno : 0;
        n -= text[n - 1] == '\n';
        e->continuing = n > 0 && text[n - 1] == '\\';
        if (buffer_append(&message, text, (size_t)n - e->continuing) < 0 ||
            (e->continuing && buffer_append(&message, "\n", 1) < 0))
            return -ENOMEM;
    } while (e->continuing);
    if (buffer_append(&message, "", 1) < 0)
        return -ENOMEM;
    copy = strdup(message.data);
    if (!copy)
        return -ENOMEM;
    remember(e, copy);
    *ret = copy;
    return 1;
}
