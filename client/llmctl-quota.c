/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl quota: what a user may take, and takes. */

#include <errno.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/number.h"
#include "client/llmctl-bus.h"
#include "client/llmctl-show.h"

struct quota {
    uint32_t max_sessions, sessions, max_queued, queued, weight, tokens_per_minute;
    uint64_t max_kv_bytes, kv_bytes;
};

static const struct bus_property properties[] = {
    {"max-sessions", 'u', offsetof(struct quota, max_sessions)},
    {"sessions", 'u', offsetof(struct quota, sessions)},
    {"max-kv-bytes", 't', offsetof(struct quota, max_kv_bytes)},
    {"kv-bytes", 't', offsetof(struct quota, kv_bytes)},
    {"max-queued", 'u', offsetof(struct quota, max_queued)},
    {"queued", 'u', offsetof(struct quota, queued)},
    {"weight", 'u', offsetof(struct quota, weight)},
    {"tokens-per-minute", 'u', offsetof(struct quota, tokens_per_minute)},
};

/* A name or a number. */
static int find_user(const char *text, uint32_t *ret)
{
    const struct passwd *user = getpwnam(text);
    uint64_t n;

    if (user)
        *ret = user->pw_uid;
    else if (number_parse(text, UINT32_MAX, &n) == 0)
        *ret = (uint32_t)n;
    else
        return usage_error("there is no user %s", text);
    return STATUS_OK;
}

/* ---- show ---- */

static void help_show(void)
{
    puts("Usage: llmctl quota show [USER...]\n"
         "Tells what you may take of the daemon, and take; or what other users do.\n"
         "\n" GLOBAL_HELP);
}

static int add_quota(struct llm_connection *c, uint32_t uid, struct table *t)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    struct quota q = {0};
    int r, status;

    status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "GetQuota", &m);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_append(m, "u", uid);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    status = bus_call(c, m, &reply);
    if (status != STATUS_OK)
        return status;
    if (bus_read_properties(reply, properties, ARRAY_SIZE(properties), &q) < 0)
        return complain_of_answer();
    table_add_number(t, uid);
    table_add_number(t, q.sessions);
    table_add_number(t, q.max_sessions);
    table_add_number(t, q.queued);
    table_add_number(t, q.max_queued);
    table_add_number(t, q.kv_bytes);
    table_add_number(t, q.max_kv_bytes);
    table_add_number(t, q.weight);
    table_add_number(t, q.tokens_per_minute);
    return STATUS_OK;
}

static int verb_show(int argc, char **argv)
{
    static const struct table_column columns[] = {
        {"USER", "uid", TABLE_USER, false},
        {"SESSIONS", "sessions", TABLE_NUMBER, false},
        {"MAX", "max_sessions", TABLE_NUMBER, false},
        {"QUEUED", "queued", TABLE_NUMBER, false},
        {"MAX", "max_queued", TABLE_NUMBER, false},
        {"KV", "kv_bytes", TABLE_BYTES, false},
        {"MAX", "max_kv_bytes", TABLE_BYTES, false},
        {"WEIGHT", "weight", TABLE_NUMBER, false},
        {"TOKENS/MIN", "tokens_per_minute", TABLE_NUMBER, false},
    };
    static const struct verb_options options = {.help = help_show};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    CLEANUP(table_freep) struct table *t = NULL;
    uint32_t uid = geteuid();
    int status = STATUS_FAILED;

    if (next_option(&options, argc, argv, &status) == OPTION_STOP)
        return status;
    for (int i = optind; i < argc; i++) {
        status = find_user(argv[i], &uid);
        if (status != STATUS_OK)
            return status;
    }
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status != STATUS_OK)
        return status;
    if (table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        return complain(STATUS_FAILED, "out of memory");
    if (optind == argc)
        status = add_quota(c, uid, t);
    for (int i = optind; i < argc && status == STATUS_OK; i++) {
        status = find_user(argv[i], &uid);
        if (status == STATUS_OK)
            status = add_quota(c, uid, t);
    }
    return status == STATUS_OK ? show_table(t, "user", "users") : status;
}

/* ---- set ---- */

static void help_set(void)
{
    puts("Usage: llmctl quota set USER OPTION...\n"
         "Changes what a user may take, until the daemon ends; llmd.conf(5) says what it starts\n"
         "with.\n"
         "\n"
         "      --max-sessions=N           sessions at a time\n"
         "      --max-queued=N             requests that wait at a time\n"
         "      --max-kv-bytes=SIZE        of the KV cache; K, M and G are 1024s\n"
         "      --weight=N                 share of the time, beside other users\n"
         "      --tokens-per-minute=N      0: no limit\n" GLOBAL_HELP);
}

/* Options in the order of: */
static const char *const settings[] = {
    "max-sessions", "max-queued", "max-kv-bytes", "weight", "tokens-per-minute",
};
enum {
    SETTING_KV_BYTES = 2,
    N_SETTINGS = ARRAY_SIZE(settings),
    OPT_SETTING = 256,
};

static int set_quota(struct llm_connection *c, uint32_t uid, const bool set[N_SETTINGS],
                     const uint64_t values[N_SETTINGS])
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    int r, status;

    status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "SetQuota", &m);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_append(m, "u", uid);
    if (r >= 0)
        r = sd_bus_message_open_container(m, 'a', "{sv}");
    for (size_t i = 0; i < N_SETTINGS && r >= 0; i++) {
        if (!set[i])
            continue;
        if (i == SETTING_KV_BYTES)
            r = sd_bus_message_append(m, "{sv}", settings[i], "t", values[i]);
        else
            r = sd_bus_message_append(m, "{sv}", settings[i], "u", (uint32_t)values[i]);
    }
    if (r >= 0)
        r = sd_bus_message_close_container(m);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    return bus_call(c, m, NULL);
}

static int verb_set(int argc, char **argv)
{
    struct option table[N_SETTINGS + 1] = {0};
    const struct verb_options options = {.options = table, .help = help_set};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    bool set[N_SETTINGS] = {false}, any = false;
    uint64_t values[N_SETTINGS] = {0};
    int option, status = STATUS_FAILED;
    uint32_t uid = 0; /* gcc 12 at -O3 does not see that parsing sets it */

    for (size_t i = 0; i < N_SETTINGS; i++)
        table[i] = (struct option){settings[i], required_argument, NULL, OPT_SETTING + (int)i};
    while ((option = next_option(&options, argc, argv, &status)) >= 0) {
        size_t i = (size_t)(option - OPT_SETTING);

        if (i == SETTING_KV_BYTES && number_parse_bytes(optarg, &values[i]) < 0)
            return usage_error("--%s wants a number of bytes, not %s", settings[i], optarg);
        if (i != SETTING_KV_BYTES && number_parse(optarg, UINT32_MAX, &values[i]) < 0)
            return usage_error("--%s wants a whole number, not %s", settings[i], optarg);
        set[i] = any = true;
    }
    if (option == OPTION_STOP)
        return status;
    if (optind == argc)
        return usage_error("no user is named");
    if (optind + 1 < argc)
        return usage_error("unexpected argument %s", argv[optind + 1]);
    if (!any)
        return usage_error("nothing to set is given");
    status = find_user(argv[optind], &uid);
    if (status != STATUS_OK)
        return status;
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    return status == STATUS_OK ? set_quota(c, uid, set, values) : status;
}

/* ---- the verb ---- */

static void help(void);

static const struct verb verbs[] = {
    {"show", verb_show, "tell what a user may take, and takes"},
    {"set", verb_set, "change what a user may take"},
};

static const struct verb_table verb_table = {
    .what = "quota command",
    .verbs = verbs,
    .n = ARRAY_SIZE(verbs),
    .help = help,
    .run = verb_show,
};

static void help(void)
{
    puts("Usage: llmctl quota COMMAND [OPTION...]\n"
         "What users may take of the daemon; without a command, what you may.\n"
         "\n"
         "Commands:");
    verb_table_print(&verb_table);
    puts("\n"
         "llmctl quota COMMAND --help tells about one of them. See llmctl(1).");
}

int verb_quota(int argc, char **argv)
{
    return verb_dispatch(&verb_table, argc, argv);
}
