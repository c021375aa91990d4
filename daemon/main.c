/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmd: reads its arguments and its configuration, then is a service (daemon/service.h) until that
 * ends.
 */

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "base/standard-fds.h"
#include "daemon/after-stop.h"
#include "daemon/arguments.h"
#include "daemon/calibrate.h"
#include "daemon/config.h"
#include "daemon/log.h"
#include "daemon/service.h"

#define EXIT_NOT_STARTED 3 /* as things are it never will: the units do not try again */

/* Prompts must not get into core dumps, and other processes of the user must not read them here. */
static void exclude_dumps(void)
{
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    prctl(PR_SET_DUMPABLE, 0);
}

/* LeakSanitizer looks at the process through ptrace, which needs it to be dumpable. */
static void allow_leak_check(void)
{
#ifdef __has_feature
#define HAS_ASAN __has_feature(address_sanitizer)
#elif defined(__SANITIZE_ADDRESS__)
#define HAS_ASAN 1
#else
#define HAS_ASAN 0
#endif
#if HAS_ASAN
    prctl(PR_SET_DUMPABLE, 1);
#endif
}

/* A connection, a stream and a session's memfds are descriptors, and the soft limit is for
 * select().
 */
static void allow_descriptors(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void print_warning(const char *line)
{
    fprintf(stderr, "%s\n", line);
}

/* What was read on stdout, what is wrong with it on stderr. */
static int check_config(const struct arguments *a)
{
    CLEANUP(config_freep) struct config *config = NULL;
    struct error err = {0};

    if (config_load(&config, a->scope, a->config_file, print_warning, &err) < 0) {
        fprintf(stderr, "llmd: %s\n", err.text);
        return EXIT_FAILURE;
    }
    for (size_t i = 0; i < config->n_files; i++)
        puts(config->files[i]);
    if (config->n_files == 0)
        puts("no configuration file; all values are the default ones");
    return config->n_warnings > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

static int serve(const struct arguments *a, bool *ret_started, struct error *err)
{
    CLEANUP(service_freep) struct service *service = NULL;
    struct config *config = NULL;
    int r;

    r = config_load(&config, a->scope, a->config_file, NULL, err);
    if (r < 0)
        return r;
    if (a->calibrate) {
        *ret_started = true;
        r = calibrate(a, config, err);
        config_free(config);
        return r < 0 ? r : 0;
    }
    r = service_new(&service, a, config, err);
    if (r < 0)
        return r;
    *ret_started = true;
    return service_run(service, err);
}

int main(int argc, char **argv)
{
    struct arguments arguments;
    struct error err = {0};
    bool started = false;
    sigset_t signals;
    int r, status;

    standard_fds_fill();
    if (!arguments_parse(&arguments, argc, argv, &status) ||
        (arguments.check_config && (status = check_config(&arguments), true))) {
        if (fflush(stdout) == EOF) {
            fprintf(stderr, "llmd: cannot write: %s\n", strerror(errno));
            status = EXIT_FAILURE;
        }
        return status;
    }
    if (arguments.after_stop)
        return after_stop() < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
    exclude_dumps();
    allow_descriptors();
    umask(077);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow is an error of the write */
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    sigprocmask(SIG_BLOCK, &signals, NULL);

    r = serve(&arguments, &started, &err);
    if (r < 0)
        log_error("%s", err.text[0] ? err.text : strerror(-r));
    allow_leak_check();
    if (r == 0)
        return EXIT_SUCCESS;
    return started ? EXIT_FAILURE : EXIT_NOT_STARTED;
}
