/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl: the verbs, what they say, and how a process of the command line ends. */

#include "client/llmctl.h"

#include <errno.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/standard-fds.h"
#include "client/llmctl-output.h"
#include "ipc/bus-error.h"

static const struct verb verbs[] = {
    {"run", verb_run, "answer one prompt"},
    {"chat", verb_chat, "hold a conversation"},
    {"map", verb_map, "answer many inputs with one instruction"},
    {"measure", verb_measure, "count the tokens of a prompt"},
    {"cancel", verb_cancel, "end what sessions are doing"},
    {"session", verb_session, "conversations that outlive a program"},
    {"model", verb_model, "the models that the daemon has"},
    {"quota", verb_quota, "what users may take of the daemon"},
    {"status", verb_status, "tell what the daemon does"},
    {"top", verb_top, "show what it does as it goes"},
    {"monitor", verb_monitor, "print what happens to sessions and models"},
    {"is-ready", verb_is_ready, "tell by the exit status whether it answers"},
};

#define N_VERBS (sizeof(verbs) / sizeof(verbs[0]))

static volatile sig_atomic_t passed; /* the status to end with, once a signal came */
static volatile sig_atomic_t held;
static const char timeout_text[] = "llmctl: no answer within the time given\n";
static sigset_t mask_while_waiting;

/* ---- messages and output ---- */

static void say(const char *format, va_list ap, const char *end)
    __attribute__((format(printf, 1, 0), nonnull(1)));

void (*before_message)(void), (*before_exit)(void);

static void say(const char *format, va_list ap, const char *end)
{
    if (before_message)
        before_message();
    fputs("llmctl: ", stderr);
    vfprintf(stderr, format, ap);
    fputs(end, stderr);
}

int complain(int status, const char *format, ...)
{
    va_list ap;

    va_start(ap, format);
    say(format, ap, "\n");
    va_end(ap);
    return status;
}

int usage_error(const char *format, ...)
{
    va_list ap;

    va_start(ap, format);
    say(format, ap, "; see llmctl --help\n");
    va_end(ap);
    return STATUS_USAGE;
}

void note(const char *format, ...)
{
    va_list ap;

    if (global.quiet)
        return;
    va_start(ap, format);
    say(format, ap, "\n");
    va_end(ap);
}

int status_of(int r)
{
    switch (-r) {
    case EBUSY:
    case EDQUOT:
        return STATUS_BUSY;
    case ENOTCONN:
    case ECONNRESET:
        return STATUS_NOT_RUNNING;
    default:
        return STATUS_FAILED;
    }
}

bool colours_on(int fd)
{
    const char *none = getenv("NO_COLOR"), *terminal = getenv("TERM");

    return isatty(fd) && !(none && none[0]) && terminal && strcmp(terminal, "dumb") != 0;
}

int json_print(struct json_object *o)
{
    int flags = global.json == JSON_PRETTY ? JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED
                                           : JSON_C_TO_STRING_PLAIN;
    const char *text = json_object_to_json_string_ext(o, flags | JSON_C_TO_STRING_NOSLASHESCAPE);
    int status;

    if (!text)
        return complain(STATUS_FAILED, "out of memory");
    if (fflush(stdout) == EOF)
        return complain(STATUS_FAILED, "cannot write: %s", strerror(errno));
    status = output_put(text, strlen(text));
    return status == STATUS_OK ? output_put("\n", 1) : status;
}

/* ---- interruption ---- */

static void on_signal(int signal_number)
{
    int status = signal_number == SIGALRM ? STATUS_TIMEOUT : STATUS_INTERRUPTED;

    if (held) {
        passed = status;
        return;
    }
    status_line_clear();
    if (before_exit)
        before_exit();
    if (status == STATUS_TIMEOUT)
        (void)!write(STDERR_FILENO, timeout_text, sizeof(timeout_text) - 1);
    _exit(status);
}

void deadlines_restart(uint64_t timeout_usec)
{
    struct itimerval timer = {
        .it_value = {(time_t)(timeout_usec / 1000000), (suseconds_t)(timeout_usec % 1000000)},
    };

    setitimer(ITIMER_REAL, &timer, NULL);
}

void deadlines_begin(uint64_t timeout_usec)
{
    struct sigaction action = {.sa_handler = on_signal}, before;

    if (sigaction(SIGINT, NULL, &before) == 0 && before.sa_handler != SIG_IGN)
        sigaction(SIGINT, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    deadlines_restart(timeout_usec);
}

void deadlines_hold(void)
{
    sigset_t block;

    if (held)
        return;
    sigemptyset(&block);
    sigaddset(&block, SIGINT);
    sigaddset(&block, SIGALRM);
    sigprocmask(SIG_BLOCK, &block, &mask_while_waiting);
    held = 1;
}

void deadlines_release(void)
{
    if (!held)
        return;
    held = 0;
    sigprocmask(SIG_SETMASK, &mask_while_waiting, NULL);
}

bool deadlines_are_held(void)
{
    return held;
}

int deadlines_poll(struct pollfd *fds, nfds_t n)
{
    if (ppoll(fds, n, NULL, held ? &mask_while_waiting : NULL) < 0) {
        if (errno != EINTR)
            return complain(STATUS_FAILED, "poll: %s", strerror(errno));
        for (nfds_t i = 0; i < n; i++)
            fds[i].revents = 0;
    }
    return passed;
}

void deadlines_clear(void)
{
    passed = STATUS_OK;
}

int deadlines_wait(int fd, short events)
{
    struct pollfd p = {.fd = fd, .events = events};

    return deadlines_poll(&p, 1);
}

/* ---- verbs ---- */

/* Insertions, deletions, replacements and swaps of neighbours that lead from one word to the other,
 * as long as both have fewer than 24 letters; else 24. */
static size_t distance(const char *a, const char *b)
{
    enum { MOST = 24 };
    size_t n = strlen(a), m = strlen(b), d[MOST][MOST];

    if (n >= MOST || m >= MOST)
        return MOST;
    for (size_t i = 0; i <= n; i++)
        for (size_t j = 0; j <= m; j++) {
            if (i == 0 || j == 0) {
                d[i][j] = i + j;
                continue;
            }
            d[i][j] = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
            d[i][j] = MIN(d[i][j], MIN(d[i - 1][j], d[i][j - 1]) + 1);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                d[i][j] = MIN(d[i][j], d[i - 2][j - 2] + 1);
        }
    return d[n][m];
}

static const struct verb *nearest(const struct verb_table *table, const char *name)
{
    const struct verb *best = NULL;
    size_t least = strlen(name) < 4 ? 2 : 3; /* so many are another word */

    for (size_t i = 0; i < table->n; i++) {
        /* A beginning says more than any number of letters that are alike. */
        size_t d = strncmp(name, table->verbs[i].name, strlen(name)) == 0
                       ? 0
                       : distance(name, table->verbs[i].name);

        if (d < least) {
            least = d;
            best = &table->verbs[i];
        }
    }
    return best;
}

int verb_dispatch(const struct verb_table *table, int argc, char **argv)
{
    /* "+": what follows the verb's name is the verb's */
    const struct verb_options options = {.letters = "+", .help = table->help};
    const struct verb *near;
    int c, first, status = STATUS_FAILED;
    char *name;

    c = next_option(&options, argc, argv, &status);
    if (c == OPTION_STOP)
        return status;
    first = optind;
    if (first >= argc)
        return table->run ? table->run(argc, argv) : usage_error("no %s is given", table->what);
    name = argv[first];
    argv[first] = argv[0]; /* for what getopt_long() has to say */
    optind = 0;            /* begin anew */
    for (size_t i = 0; i < table->n; i++)
        if (strcmp(name, table->verbs[i].name) == 0)
            return table->verbs[i].run(argc - first, argv + first);
    near = nearest(table, name);
    if (near)
        return usage_error("unknown %s %s (did you mean %s?)", table->what, name, near->name);
    return usage_error("unknown %s %s", table->what, name);
}

void verb_table_print(const struct verb_table *table)
{
    for (size_t i = 0; i < table->n; i++)
        printf("  %-10s %s\n", table->verbs[i].name, table->verbs[i].help);
}

static void help(void);

static const struct verb_table table = {
    .what = "command",
    .verbs = verbs,
    .n = N_VERBS,
    .help = help,
};

static void help(void)
{
    puts("Usage: llmctl [OPTION...] COMMAND [OPTION...]\n"
         "Talks to llmd, the local language model: the system's, else the user's, else a private\n"
         "one, which commands that need a model start.\n"
         "\n"
         "Commands:");
    verb_table_print(&table);
    puts("\n"
         "Options of all commands:\n"
         "      --system               the system's daemon only\n"
         "      --user                 the user's daemon only\n"
         "      --private              a private daemon of this user, started on demand\n"
         "      --socket=PATH          the daemon that listens there\n"
         "      --session=ID           the session that is meant, by its number\n"
         "      --json[=MODE]          JSON on standard output: short, pretty or off\n"
         "      --no-pager             do not page long lists\n"
         "      --no-legend            no headings and sums around lists\n"
         "  -q, --quiet                no notes on standard error, only errors\n"
         "      --no-ask-password      never ask for authorisation\n"
         "      --timeout=SECONDS      give up after that time\n"
         "  -h, --help                 print this and exit\n"
         "      --version              print the version and exit\n"
         "\n"
         "llmctl COMMAND --help tells about one command; see also llmctl(1).");
}

int main(int argc, char **argv)
{
    static char name[] = "llmctl"; /* what getopt_long() begins its complaints with */
    int status;

    standard_fds_fill();
    sd_bus_error_add_map(bus_errors); /* for calls of sd-bus itself; libllm needs it not */
    if (argc > 0)
        argv[0] = name;
    status = argc > 0 ? verb_dispatch(&table, argc, argv) : usage_error("no command is given");
    if (fflush(stdout) == EOF && status == STATUS_OK)
        status = complain(STATUS_FAILED, "cannot write: %s", strerror(errno));
    return status;
}
