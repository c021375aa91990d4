/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/arguments.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/number.h"
#include "daemon/config.h"

#define SERVICE_USER "llmd" /* systemd/sysusers.d */
#define PRIVATE_IDLE_USEC UINT64_C(30000000)

static void help(void)
{
    puts("Usage: llmd [--system | --user | --private] [OPTION...]\n"
         "       llmd --check-config [FILE]\n"
         "Serves one language model to many programs, on D-Bus and on a socket.\n"
         "\n"
         "      --system              serve all users; what root and the user llmd get anyway\n"
         "      --user                serve one user's programs, on the session bus\n"
         "      --private             serve one user's programs, without a bus; leave when idle\n"
         "      --config FILE         read only this configuration\n"
         "      --check-config [FILE] say what is wrong with the configuration; status 1 if so\n"
         "      --after-stop          what the service manager runs when the service has stopped\n"
         "      --model FILE|NAME     the model (default: configured, or the only one there is)\n"
         "      --socket PATH         listen there instead of in the runtime directory\n"
         "      --no-bus              only listen on the socket\n"
         "      --idle-timeout SEC    leave so long after the last client (0: never; default: 30\n"
         "                            with --private, else configured)\n"
         "      --context N           most tokens of a session (default: the model's)\n"
         "      --activations TYPE    int8 (default) or f32\n"
         "      --kv TYPE             f16 or f32 (default: f32 with f32 activations)\n"
         "      --kv-bytes N          memory for conversations; K, M, G, T (default: a quarter)\n"
         "      --threads N           default: one for each core it may use\n"
         "      --pin-threads yes|no  whether each thread keeps to one core (yes)\n"
         "      --cpu-level LEVEL     at most: reference, avx2, avx512, amx\n"
         "      --backend WHICH       what computes: cpu, vulkan (the GPU), hybrid (both), or auto\n"
         "                            (by measurement; default)\n"
         "      --device NAME         the GPU with this in its name (default: the integrated one)\n"
         "      --calibrate           measure again how fast processor and GPU are, print\n"
         "                            that, keep it for the daemon, and exit\n"
         "      --sandbox MODE        strict (default), report what it would refuse, or off\n"
         "      --ready-fd N          write READY=1 to this descriptor when serving\n"
         "  -h, --help                print this and exit\n"
         "      --version             print the version and exit\n"
         "\n"
         "See llmd(8) and llmd.conf(5).");
}

static int usage_error(const char *text, const char *value)
{
    fprintf(stderr, "llmd: %s%s; see llmd --help\n", text, value);
    return EXIT_USAGE;
}

/* The system's daemon is started by root, or as the user that was made for it. */
static bool is_system_user(void)
{
    const struct passwd *me;

    if (geteuid() == 0)
        return true;
    me = getpwuid(geteuid());
    return me && strcmp(me->pw_name, SERVICE_USER) == 0;
}

enum {
    OPT_SYSTEM = 256,
    OPT_USER,
    OPT_PRIVATE,
    OPT_CONFIG,
    OPT_CHECK_CONFIG,
    OPT_AFTER_STOP,
    OPT_MODEL,
    OPT_SOCKET,
    OPT_NO_BUS,
    OPT_IDLE,
    OPT_CONTEXT,
    OPT_ACTIVATIONS,
    OPT_KV,
    OPT_KV_BYTES,
    OPT_THREADS,
    OPT_PIN_THREADS,
    OPT_CPU_LEVEL,
    OPT_BACKEND,
    OPT_DEVICE,
    OPT_CALIBRATE,
    OPT_READY_FD,
    OPT_SANDBOX,
    OPT_VERSION,
};

/* One with a value that is not just kept. 0, or EXIT_USAGE: it was said */
static int parse_value(struct arguments *a, int c, const char *value)
{
    uint64_t n;

    switch (c) {
    case OPT_IDLE:
        if (config_parse_seconds(value, &a->idle_usec) < 0)
            return usage_error("--idle-timeout wants a number of seconds, not ", value);
        a->has_idle = true;
        break;
    case OPT_CONTEXT:
        if (number_parse(value, UINT32_MAX, &n) < 0 || n == 0)
            return usage_error("--context wants a number of tokens, not ", value);
        a->context = (uint32_t)n;
        break;
    case OPT_ACTIVATIONS:
        if (strcmp(value, "int8") == 0)
            a->engine.activations = ACTIVATIONS_INT8;
        else if (strcmp(value, "f32") == 0)
            a->engine.activations = ACTIVATIONS_F32;
        else
            return usage_error("--activations wants int8 or f32, not ", value);
        a->has_activations = true;
        break;
    case OPT_KV:
        if (strcmp(value, "f16") == 0)
            a->engine.kv_type = KV_F16;
        else if (strcmp(value, "f32") == 0)
            a->engine.kv_type = KV_F32;
        else
            return usage_error("--kv wants f16 or f32, not ", value);
        a->has_kv_type = true;
        break;
    case OPT_KV_BYTES:
        if (number_parse_bytes(value, &a->engine.kv_bytes) < 0 || a->engine.kv_bytes == 0)
            return usage_error("--kv-bytes wants a number of bytes, as 512M or 4G, not ", value);
        break;
    case OPT_THREADS:
        if (number_parse(value, 4096, &n) < 0)
            return usage_error("--threads wants a number up to 4096, not ", value);
        a->engine.n_threads = (uint32_t)n;
        break;
    case OPT_PIN_THREADS:
        a->engine.no_pinning = strcmp(value, "no") == 0;
        if (!a->engine.no_pinning && strcmp(value, "yes") != 0)
            return usage_error("--pin-threads wants yes or no, not ", value);
        a->has_pinning = true;
        break;
    case OPT_BACKEND:
        if (placement_mode_parse(value, &a->backend) < 0)
            return usage_error("--backend wants auto, cpu, vulkan or hybrid, not ", value);
        a->has_backend = true;
        break;
    case OPT_DEVICE:
        if (!value[0])
            return usage_error("--device wants a part of a GPU's name, not nothing", value);
        a->device = value;
        break;
    case OPT_SANDBOX:
        if (sandbox_parse_mode(value, &a->sandbox) < 0)
            return usage_error("--sandbox wants strict, report or off, not ", value);
        a->has_sandbox = true;
        break;
    case OPT_READY_FD:
        if (number_parse(value, INT32_MAX, &n) < 0 || fcntl((int)n, F_GETFD) < 0)
            return usage_error("--ready-fd wants an open descriptor, not ", value);
        a->ready_fd = (int)n;
        break;
    }
    return 0;
}

bool arguments_parse(struct arguments *ret, int argc, char **argv, int *ret_status)
{
    static const struct option options[] = {
        {"system", no_argument, NULL, OPT_SYSTEM},
        {"user", no_argument, NULL, OPT_USER},
        {"private", no_argument, NULL, OPT_PRIVATE},
        {"config", required_argument, NULL, OPT_CONFIG},
        {"check-config", no_argument, NULL, OPT_CHECK_CONFIG},
        {"after-stop", no_argument, NULL, OPT_AFTER_STOP},
        {"model", required_argument, NULL, OPT_MODEL},
        {"socket", required_argument, NULL, OPT_SOCKET},
        {"no-bus", no_argument, NULL, OPT_NO_BUS},
        {"idle-timeout", required_argument, NULL, OPT_IDLE},
        {"context", required_argument, NULL, OPT_CONTEXT},
        {"activations", required_argument, NULL, OPT_ACTIVATIONS},
        {"kv", required_argument, NULL, OPT_KV},
        {"kv-bytes", required_argument, NULL, OPT_KV_BYTES},
        {"threads", required_argument, NULL, OPT_THREADS},
        {"pin-threads", required_argument, NULL, OPT_PIN_THREADS},
        {"cpu-level", required_argument, NULL, OPT_CPU_LEVEL},
        {"backend", required_argument, NULL, OPT_BACKEND},
        {"device", required_argument, NULL, OPT_DEVICE},
        {"calibrate", no_argument, NULL, OPT_CALIBRATE},
        {"sandbox", required_argument, NULL, OPT_SANDBOX},
        {"ready-fd", required_argument, NULL, OPT_READY_FD},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, OPT_VERSION},
        {NULL, 0, NULL, 0},
    };
    struct arguments a = {.ready_fd = -EBADF};
    unsigned scopes = 0;
    int c;

    *ret_status = EXIT_SUCCESS;
    while ((c = getopt_long(argc, argv, "h", options, NULL)) >= 0) {
        switch (c) {
        case OPT_SYSTEM:
            scopes |= 1u << SCOPE_SYSTEM;
            break;
        case OPT_USER:
            scopes |= 1u << SCOPE_USER;
            break;
        case OPT_PRIVATE:
            scopes |= 1u << SCOPE_PRIVATE;
            break;
        case OPT_CONFIG:
            a.config_file = optarg;
            break;
        case OPT_CHECK_CONFIG:
            a.check_config = true;
            break;
        case OPT_AFTER_STOP:
            a.after_stop = true;
            break;
        case OPT_MODEL:
            a.model = optarg;
            break;
        case OPT_SOCKET:
            a.socket = optarg;
            break;
        case OPT_NO_BUS:
            a.no_bus = true;
            break;
        case OPT_CALIBRATE:
            a.calibrate = true;
            break;
        case OPT_CPU_LEVEL:
            a.engine.cpu_level = optarg; /* engine_new() knows which there are */
            break;
        case 'h':
            help();
            return false;
        case OPT_VERSION:
            puts("llmd " LLMD_VERSION);
            return false;
        case '?': /* getopt_long() has said what is wrong */
            *ret_status = usage_error("wrong arguments", "");
            return false;
        default:
            *ret_status = parse_value(&a, c, optarg);
            if (*ret_status != EXIT_SUCCESS)
                return false;
        }
    }
    if (a.check_config && optind < argc && !a.config_file)
        a.config_file = argv[optind++];

    a.scope = SCOPE_SYSTEM;
    if (scopes == 1u << SCOPE_USER)
        a.scope = SCOPE_USER;
    else if (scopes == 1u << SCOPE_PRIVATE)
        a.scope = SCOPE_PRIVATE;
    if (a.scope == SCOPE_PRIVATE && !a.has_idle)
        a.idle_usec = PRIVATE_IDLE_USEC;
    a.has_idle = a.has_idle || a.scope == SCOPE_PRIVATE;

    if (optind < argc)
        *ret_status = usage_error("unexpected argument ", argv[optind]);
    else if (scopes & (scopes - 1))
        *ret_status = usage_error("only one of --system, --user and --private can be", "");
    else if (scopes == 0 && !a.check_config && !a.after_stop && !is_system_user())
        *ret_status = usage_error("say --user to serve your programs on the session bus, --private "
                                  "to serve them on a socket only, or --system for all users",
                                  "");
    *ret = a;
    return *ret_status == EXIT_SUCCESS;
}
