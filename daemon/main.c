/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmd: reads its arguments, then starts up in one readable order: claim the socket, open the
 * model, start the engine, listen, say that it is ready.
 */

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <systemd/sd-daemon.h>
#include <systemd/sd-event.h>

#include "base/cleanup.h"
#include "base/standard-fds.h"
#include "daemon/authority.h"
#include "daemon/client-session.h"
#include "daemon/client.h"
#include "daemon/engine-thread.h"
#include "daemon/log.h"
#include "daemon/server.h"
#include "daemon/service.h"
#include "daemon/users.h"
#include "engine/model-file.h"
#include "engine/model.h"
#include "ipc/names.h"
#include "ipc/runtime-dir.h"

#define EXIT_USAGE 2

struct arguments {
    bool private;
    const char *model, *socket;
    struct engine_options engine;
    uint32_t context;
    uint32_t idle_sec;
    int ready_fd;
};

static void help(void)
{
    puts("Usage: llmd --private --model FILE [OPTION...]\n"
         "Serves one language model to the programs of one user.\n"
         "\n"
         "      --private             serve this user's programs on a socket, leave when idle\n"
         "      --model FILE          the model file (made by llm-import)\n"
         "      --socket PATH         listen there instead of in the runtime directory\n"
         "      --idle-timeout SEC    leave so long after the last client (default 30; 0: never)\n"
         "      --context N           most tokens of a session (default: the model's)\n"
         "      --activations TYPE    int8 (default) or f32\n"
         "      --kv TYPE             f16 or f32 (default: f32 with f32 activations)\n"
         "      --threads N           default: as many as there are cores\n"
         "      --cpu-level LEVEL     at most: reference, avx2, avx512, amx\n"
         "      --ready-fd N          write READY=1 to this descriptor when serving\n"
         "  -h, --help                print this and exit\n"
         "      --version             print the version and exit\n"
         "\n"
         "See llmd(8).");
}

static int usage_error(const char *text, const char *value)
{
    fprintf(stderr, "llmd: %s%s; see llmd --help\n", text, value);
    return EXIT_USAGE;
}

static int parse_u32(const char *text, uint32_t *ret)
{
    char *end;
    unsigned long v;

    if (text[0] < '0' || text[0] > '9')
        return -EINVAL;
    errno = 0;
    v = strtoul(text, &end, 10);
    if (errno != 0 || *end || v > UINT32_MAX)
        return -EINVAL;
    *ret = (uint32_t)v;
    return 0;
}

/* 0: go on; else exit with *ret_status. */
static int parse_arguments(int argc, char **argv, struct arguments *ret, int *ret_status)
{
    enum {
        OPT_PRIVATE = 256,
        OPT_MODEL,
        OPT_SOCKET,
        OPT_IDLE,
        OPT_CONTEXT,
        OPT_ACTIVATIONS,
        OPT_KV,
        OPT_THREADS,
        OPT_CPU_LEVEL,
        OPT_READY_FD,
        OPT_VERSION,
    };
    static const struct option options[] = {
        {"private", no_argument, NULL, OPT_PRIVATE},
        {"model", required_argument, NULL, OPT_MODEL},
        {"socket", required_argument, NULL, OPT_SOCKET},
        {"idle-timeout", required_argument, NULL, OPT_IDLE},
        {"context", required_argument, NULL, OPT_CONTEXT},
        {"activations", required_argument, NULL, OPT_ACTIVATIONS},
        {"kv", required_argument, NULL, OPT_KV},
        {"threads", required_argument, NULL, OPT_THREADS},
        {"cpu-level", required_argument, NULL, OPT_CPU_LEVEL},
        {"ready-fd", required_argument, NULL, OPT_READY_FD},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, OPT_VERSION},
        {NULL, 0, NULL, 0},
    };
    struct arguments a = {.idle_sec = 30, .ready_fd = -EBADF};
    uint32_t n;
    int c;

    *ret_status = EXIT_SUCCESS;
    while ((c = getopt_long(argc, argv, "h", options, NULL)) >= 0) {
        switch (c) {
        case OPT_PRIVATE:
            a.private = true;
            break;
        case OPT_MODEL:
            a.model = optarg;
            break;
        case OPT_SOCKET:
            a.socket = optarg;
            break;
        case OPT_IDLE:
            if (parse_u32(optarg, &a.idle_sec) < 0) {
                *ret_status = usage_error("--idle-timeout wants a number of seconds, not ", optarg);
                return 1;
            }
            break;
        case OPT_CONTEXT:
            if (parse_u32(optarg, &a.context) < 0 || a.context == 0) {
                *ret_status = usage_error("--context wants a number of tokens, not ", optarg);
                return 1;
            }
            break;
        case OPT_ACTIVATIONS:
            if (strcmp(optarg, "int8") == 0)
                a.engine.activations = ACTIVATIONS_INT8;
            else if (strcmp(optarg, "f32") == 0)
                a.engine.activations = ACTIVATIONS_F32;
            else {
                *ret_status = usage_error("--activations wants int8 or f32, not ", optarg);
                return 1;
            }
            break;
        case OPT_KV:
            if (strcmp(optarg, "f16") == 0)
                a.engine.kv_type = KV_F16;
            else if (strcmp(optarg, "f32") == 0)
                a.engine.kv_type = KV_F32;
            else {
                *ret_status = usage_error("--kv wants f16 or f32, not ", optarg);
                return 1;
            }
            break;
        case OPT_THREADS:
            if (parse_u32(optarg, &a.engine.n_threads) < 0 || a.engine.n_threads > 4096) {
                *ret_status = usage_error("--threads wants a number up to 4096, not ", optarg);
                return 1;
            }
            break;
        case OPT_CPU_LEVEL:
            a.engine.cpu_level = optarg; /* engine_new() knows which there are */
            break;
        case OPT_READY_FD:
            if (parse_u32(optarg, &n) < 0 || n > INT32_MAX || fcntl((int)n, F_GETFD) < 0) {
                *ret_status = usage_error("--ready-fd wants an open descriptor, not ", optarg);
                return 1;
            }
            a.ready_fd = (int)n;
            break;
        case 'h':
            help();
            return 1;
        case OPT_VERSION:
            puts("llmd " LLMD_VERSION);
            return 1;
        default: /* getopt_long() has said what is wrong */
            *ret_status = usage_error("wrong arguments", "");
            return 1;
        }
    }
    if (optind < argc)
        *ret_status = usage_error("unexpected argument ", argv[optind]);
    else if (!a.private)
        *ret_status = usage_error("only the private mode exists yet: --private is missing", "");
    else if (!a.model)
        *ret_status = usage_error("--model FILE is missing", "");
    *ret = a;
    return *ret_status == EXIT_SUCCESS ? 0 : 1;
}

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

static void say_ready(struct arguments *a, const struct engine_thread *t)
{
    log_info("serving %s with %s", model_file_path(model_get_file(engine_thread_model(t))),
             engine_thread_description(t));
    sd_notify(0, "READY=1");
    if (a->ready_fd >= 0) {
        dprintf(a->ready_fd, "READY=1\n");
        close(TAKE_FD(a->ready_fd));
    }
}

static int serve(struct arguments *a, struct error *err)
{
    CLEANUP(freep) char *dir = NULL, *default_socket = NULL;
    CLEANUP(model_freep) struct model *model = NULL;
    CLEANUP(sd_event_unrefp) sd_event *event = NULL;
    CLEANUP(engine_thread_freep) struct engine_thread *engine = NULL;
    CLEANUP(users_freep) struct users *users = NULL;
    CLEANUP(session_set_freep) struct session_set *sessions = NULL;
    CLEANUP(authority_freep) struct authority *authority = NULL;
    CLEANUP(clients_freep) struct clients *clients = NULL;
    CLEANUP(server_freep) struct server *server = NULL;
    struct service service;
    struct server_options options;
    int r;

    if (!a->socket) {
        r = runtime_dir(&dir, err);
        if (r < 0)
            return r;
        if (asprintf(&default_socket, "%s/%s", dir, LLM_PRIVATE_SOCKET) < 0) {
            default_socket = NULL;
            return error_set(err, ENOMEM, "out of memory");
        }
    }

    /* Before the model is opened, so that of two daemons one gives up at once. */
    options = (struct server_options){.socket_path = a->socket ? a->socket : default_socket,
                                      .idle_usec = a->idle_sec * UINT64_C(1000000)};
    r = server_new(&server, &options, err);
    if (r < 0)
        return r;

    r = model_open(&model, a->model, err);
    if (r < 0)
        return r;
    if (a->context > model_config(model)->context_max)
        return error_set(err, EINVAL, "--context %u: the model has %u tokens at most", a->context,
                         model_config(model)->context_max);

    /* Its thread inherits the blocked signals: they are the loop's. */
    r = engine_thread_new(&engine, model, &a->engine, err);
    if (r < 0)
        return r;

    r = sd_event_default(&event);
    if (r < 0)
        return error_set(err, -r, "cannot set up the event loop: %s", strerror(-r));
    r = session_set_new(&sessions, event, server_something_went, server);
    if (r >= 0)
        r = session_set_set_engine(sessions, engine, a->context);
    if (r >= 0)
        r = users_new(&users, &user_limits_default);
    if (r >= 0)
        r = authority_new(&authority, /* ask_polkit= */ false);
    if (r >= 0)
        r = clients_new(&clients, &service);
    if (r < 0)
        return error_set(err, -r, "cannot set up the sessions: %s", strerror(-r));
    service = (struct service){.event = event,
                               .scope = SCOPE_PRIVATE,
                               .state = SERVICE_READY,
                               .model = model,
                               .engine = engine,
                               .sessions = sessions,
                               .users = users,
                               .clients = clients,
                               .authority = authority,
                               .server = server};
    r = server_start(server, &service, err);
    if (r < 0)
        return r;
    say_ready(a, engine);

    r = sd_event_loop(event);
    return r < 0 ? error_set(err, -r, "the event loop failed: %s", strerror(-r)) : 0;
}

int main(int argc, char **argv)
{
    struct arguments arguments;
    struct error err = {0};
    sigset_t signals;
    int r, status;

    standard_fds_fill();
    if (parse_arguments(argc, argv, &arguments, &status) != 0) {
        if (fflush(stdout) == EOF) {
            fprintf(stderr, "llmd: cannot write: %s\n", strerror(errno));
            status = EXIT_FAILURE;
        }
        return status;
    }
    exclude_dumps();
    umask(077);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, NULL);

    r = serve(&arguments, &err);
    if (r < 0)
        log_error("%s", err.text[0] ? err.text : strerror(-r));
    allow_leak_check();
    return r < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
