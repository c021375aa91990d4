/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl: the verbs, and how a process of the command line ends. */

#include "client/llmctl.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#include "base/standard-fds.h"

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} verbs[] = {
    {"run", verb_run, "answer one prompt"},
    {"status", verb_status, "tell what the daemon does"},
};

#define N_VERBS (sizeof(verbs) / sizeof(verbs[0]))

static volatile sig_atomic_t passed; /* the status to end with, once a signal came */
static volatile sig_atomic_t held;
static const char timeout_text[] = "llmctl: no answer within the time given\n";
static sigset_t mask_while_waiting;

int complain(int status, const char *format, ...)
{
    va_list ap;

    fputs("llmctl: ", stderr);
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fputc('\n', stderr);
    return status;
}

int usage_error(const char *format, ...)
{
    va_list ap;

    fputs("llmctl: ", stderr);
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fputs("; see llmctl --help\n", stderr);
    return STATUS_USAGE;
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

static void on_signal(int signal_number)
{
    int status = signal_number == SIGALRM ? STATUS_TIMEOUT : STATUS_INTERRUPTED;

    if (held) {
        passed = status;
        return;
    }
    if (status == STATUS_TIMEOUT)
        (void)!write(STDERR_FILENO, timeout_text, sizeof(timeout_text) - 1);
    _exit(status);
}

void deadlines_begin(uint64_t timeout_usec)
{
    struct sigaction action = {.sa_handler = on_signal};
    struct itimerval timer = {
        .it_value = {(time_t)(timeout_usec / 1000000), (suseconds_t)(timeout_usec % 1000000)},
    };

    sigaction(SIGINT, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
}

void deadlines_hold(void)
{
    sigset_t block;

    sigemptyset(&block);
    sigaddset(&block, SIGINT);
    sigaddset(&block, SIGALRM);
    sigprocmask(SIG_BLOCK, &block, &mask_while_waiting);
    held = 1;
}

int deadlines_wait(int fd, short events)
{
    struct pollfd p = {.fd = fd, .events = events};

    if (ppoll(&p, 1, NULL, held ? &mask_while_waiting : NULL) < 0 && errno != EINTR)
        return complain(STATUS_FAILED, "poll: %s", strerror(errno));
    return passed;
}

static void help(void)
{
    puts("Usage: llmctl COMMAND [OPTION...]\n"
         "Talks to llmd, the local language model. Starts a private one if none runs.\n"
         "\n"
         "Commands:");
    for (size_t i = 0; i < N_VERBS; i++)
        printf("  %-10s %s\n", verbs[i].name, verbs[i].help);
    puts("\n"
         "  -h, --help     print this and exit\n"
         "      --version  print the version and exit\n"
         "\n"
         "llmctl COMMAND --help tells about one command; see also llmctl(1).");
}

int main(int argc, char **argv)
{
    int status = -1;

    standard_fds_fill();
    if (argc < 2) {
        status = usage_error("no command");
    } else if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        help();
        status = STATUS_OK;
    } else if (strcmp(argv[1], "--version") == 0) {
        puts("llmctl " LLMD_VERSION);
        status = STATUS_OK;
    } else if (argv[1][0] == '-') {
        status = usage_error("unknown option %s before the command", argv[1]);
    } else {
        const char *name = argv[1];

        argv[1] = (char[]){"llmctl"}; /* for what getopt_long() has to say */
        for (size_t i = 0; i < N_VERBS && status < 0; i++)
            if (strcmp(name, verbs[i].name) == 0)
                status = verbs[i].run(argc - 1, argv + 1);
        if (status < 0)
            status = usage_error("unknown command %s", name);
    }
    if (fflush(stdout) == EOF && status == STATUS_OK)
        status = complain(STATUS_FAILED, "cannot write: %s", strerror(errno));
    return status;
}
