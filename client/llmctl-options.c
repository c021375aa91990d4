/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl: the options of all verbs, wherever they stand. */

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/llmctl.h"

#define TIMEOUT_SECONDS_MAX 1e9

struct global_options global = {.scope = LLM_SCOPE_ANY};

enum {
    OPT_SYSTEM = OPTION_GLOBAL,
    OPT_USER,
    OPT_PRIVATE,
    OPT_SOCKET,
    OPT_SESSION,
    OPT_JSON,
    OPT_NO_PAGER,
    OPT_NO_LEGEND,
    OPT_NO_ASK_PASSWORD,
    OPT_TIMEOUT,
    OPT_VERSION,
    OPT_QUIET,
    OPT_HELP,
};

static const struct option global_table[] = {
    {"system", no_argument, NULL, OPT_SYSTEM},
    {"user", no_argument, NULL, OPT_USER},
    {"private", no_argument, NULL, OPT_PRIVATE},
    {"socket", required_argument, NULL, OPT_SOCKET},
    {"session", required_argument, NULL, OPT_SESSION},
    {"json", optional_argument, NULL, OPT_JSON},
    {"no-pager", no_argument, NULL, OPT_NO_PAGER},
    {"no-legend", no_argument, NULL, OPT_NO_LEGEND},
    {"no-ask-password", no_argument, NULL, OPT_NO_ASK_PASSWORD},
    {"timeout", required_argument, NULL, OPT_TIMEOUT},
    {"version", no_argument, NULL, OPT_VERSION},
    {"quiet", no_argument, NULL, OPT_QUIET},
    {"help", no_argument, NULL, OPT_HELP},
};

#define N_GLOBAL (sizeof(global_table) / sizeof(global_table[0]))
#define N_OPTIONS_MAX 64

bool parse_double(const char *text, double *ret)
{
    char *end;
    double v;

    errno = 0;
    v = strtod(text, &end);
    if (errno != 0 || end == text || *end != 0 || !isfinite(v))
        return false;
    *ret = v;
    return true;
}

static int set_scope(enum llm_scope scope)
{
    if (global.scope != LLM_SCOPE_ANY && global.scope != scope)
        return usage_error("--system, --user and --private exclude each other");
    global.scope = scope;
    return STATUS_OK;
}

static int set_json(const char *mode)
{
    if (!mode || strcmp(mode, "short") == 0)
        global.json = JSON_SHORT;
    else if (strcmp(mode, "pretty") == 0)
        global.json = JSON_PRETTY;
    else if (strcmp(mode, "off") == 0)
        global.json = JSON_OFF;
    else
        return usage_error("--json wants short, pretty or off, not %s", mode);
    return STATUS_OK;
}

/* STATUS_OK: go on; -1: end, and well; else the complaint's */
static int set_global(const struct verb_options *o, int c)
{
    double seconds;

    switch (c) {
    case OPT_SYSTEM:
        return set_scope(LLM_SCOPE_SYSTEM);
    case OPT_USER:
        return set_scope(LLM_SCOPE_USER);
    case OPT_PRIVATE:
        return set_scope(LLM_SCOPE_PRIVATE);
    case OPT_SOCKET:
        global.socket = optarg;
        return STATUS_OK;
    case OPT_SESSION:
        if (!optarg[0])
            return usage_error("--session wants a session's number");
        global.session = optarg;
        return STATUS_OK;
    case OPT_JSON:
        return set_json(optarg);
    case OPT_NO_PAGER:
        global.no_pager = true;
        return STATUS_OK;
    case OPT_NO_LEGEND:
        global.no_legend = true;
        return STATUS_OK;
    case OPT_NO_ASK_PASSWORD:
        global.no_ask_password = true;
        return STATUS_OK;
    case OPT_TIMEOUT:
        if (!parse_double(optarg, &seconds) || !(seconds > 0 && seconds <= TIMEOUT_SECONDS_MAX))
            return usage_error("--timeout wants a number of seconds, not %s", optarg);
        global.timeout_usec = (uint64_t)(seconds * 1e6) + 1;
        return STATUS_OK;
    case OPT_QUIET:
    case 'q':
        global.quiet = true;
        return STATUS_OK;
    case OPT_VERSION:
        puts("llmctl " LLMD_VERSION);
        return -1;
    case OPT_HELP:
    case 'h':
        o->help();
        return -1;
    default:
        return usage_error("wrong arguments"); /* getopt_long() has said which */
    }
}

static bool has(const struct option *options, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(options[i].name, name) == 0)
            return true;
    return false;
}

int next_option(const struct verb_options *o, int argc, char **argv, int *ret_status)
{
    struct option merged[N_OPTIONS_MAX] = {0};
    char letters[N_OPTIONS_MAX];
    size_t n = 0, n_own;
    int c, status;

    for (; o->options && o->options[n].name; n++) {
        if (n + N_GLOBAL + 1 >= N_OPTIONS_MAX)
            abort(); /* a verb with so many options needs a larger table */
        merged[n] = o->options[n];
    }
    n_own = n;
    for (size_t i = 0; i < N_GLOBAL; i++)
        if (!has(merged, n_own, global_table[i].name)) /* a verb may know better */
            merged[n++] = global_table[i];
    snprintf(letters, sizeof(letters), "%shq", o->letters ? o->letters : "");

    while ((c = getopt_long(argc, argv, letters, merged, NULL)) >= 0) {
        if (c != '?' && c != 'h' && c != 'q' && c < OPTION_GLOBAL)
            return c;
        status = set_global(o, c);
        if (status != STATUS_OK) {
            *ret_status = status == -1 ? STATUS_OK : status;
            return OPTION_STOP;
        }
    }
    if (global.socket && (global.scope == LLM_SCOPE_SYSTEM || global.scope == LLM_SCOPE_USER)) {
        *ret_status = usage_error("--socket excludes --system and --user");
        return OPTION_STOP;
    }
    return -1;
}
