/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl session: conversations that outlive the program that made them. */

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/number.h"
#include "client/llmctl-bus.h"
#include "client/llmctl-show.h"

/* What GetAll says of one. */
struct session {
    const char *label, *model, *class, *state;
    uint32_t owner, context_used, context_max, queue_position;
    bool linger;
    uint64_t created_usec, estimated_start_usec, prompt_tokens, completion_tokens, kv_bytes;
};

static const struct bus_property properties[] = {
    {"Owner", 'u', offsetof(struct session, owner)},
    {"Label", 's', offsetof(struct session, label)},
    {"Model", 's', offsetof(struct session, model)},
    {"Class", 's', offsetof(struct session, class)},
    {"Linger", 'b', offsetof(struct session, linger)},
    {"CreatedUSec", 't', offsetof(struct session, created_usec)},
    {"State", 's', offsetof(struct session, state)},
    {"ContextUsed", 'u', offsetof(struct session, context_used)},
    {"ContextMax", 'u', offsetof(struct session, context_max)},
    {"QueuePosition", 'u', offsetof(struct session, queue_position)},
    {"EstimatedStartUSec", 't', offsetof(struct session, estimated_start_usec)},
    {"PromptTokens", 't', offsetof(struct session, prompt_tokens)},
    {"CompletionTokens", 't', offsetof(struct session, completion_tokens)},
    {"KvBytes", 't', offsetof(struct session, kv_bytes)},
};

DEFINE_CLEANUP(struct llm_session *, llm_session_free)
DEFINE_CLEANUP(struct llm_options *, llm_options_free)

/* ---- list ---- */

static void help_list(void)
{
    puts("Usage: llmctl session list [OPTION...]\n"
         "Lists your sessions.\n"
         "\n"
         "  -a, --all                      everybody's; their labels stay private\n" GLOBAL_HELP);
}

static int list_sessions(struct llm_connection *c, bool all)
{
    static const struct table_column columns[] = {
        {"ID", "session", TABLE_NUMBER, false},
        {"LABEL", "label", TABLE_TEXT, true},
        {"USER", "uid", TABLE_USER, false},
        {"CLASS", "class", TABLE_TEXT, false},
        {"STATE", "state", TABLE_TEXT, false},
        {"QUEUE", "queue_position", TABLE_NUMBER, false},
        {"USED", "context_used", TABLE_NUMBER, false},
        {"CONTEXT", "context_max", TABLE_NUMBER, false},
        {"PROMPT", "prompt_tokens", TABLE_NUMBER, false},
        {"ANSWER", "completion_tokens", TABLE_NUMBER, false},
    };
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    CLEANUP(table_freep) struct table *t = NULL;
    const char *path, *label, *class, *state;
    uint32_t uid, used, most, position;
    uint64_t prompt, completion;
    int r, status;

    status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "ListSessions", &m);
    if (status != STATUS_OK)
        return status;
    r = all ? sd_bus_message_append(m, "a{sv}", 1, "all", "b", 1)
            : sd_bus_message_append(m, "a{sv}", 0);
    if (r < 0 || table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        return complain(STATUS_FAILED, "out of memory");
    status = bus_call(c, m, &reply);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_enter_container(reply, 'a', "(osussuuttu)");
    while (r >= 0 &&
           (r = sd_bus_message_read(reply, "(osussuuttu)", &path, &label, &uid, &class, &state,
                                    &used, &most, &prompt, &completion, &position)) > 0) {
        table_add_number(t, session_id(path));
        table_add_text(t, label);
        table_add_number(t, uid);
        table_add_text(t, class);
        table_add_text(t, state);
        table_add_number(t, position);
        table_add_number(t, used);
        table_add_number(t, most);
        table_add_number(t, prompt);
        table_add_number(t, completion);
    }
    if (r < 0)
        return complain_of_answer();
    return show_table(t, "session", "sessions");
}

static int verb_list(int argc, char **argv)
{
    static const struct option table[] = {{"all", no_argument, NULL, 'a'}, {0}};
    static const struct verb_options options = {"a", table, help_list};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    int option, status = STATUS_FAILED;
    bool all = false;

    while ((option = next_option(&options, argc, argv, &status)) >= 0)
        all = true; /* the only one */
    if (option == OPTION_STOP)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    return status == STATUS_OK ? list_sessions(c, all) : status;
}

/* ---- show ---- */

static void help_show(void)
{
    puts("Usage: llmctl session show ID...\n"
         "Tells all about sessions of yours.\n"
         "\n" GLOBAL_HELP);
}

static int show_session(struct llm_connection *c, const char *id)
{
    static const struct table_column columns[] = {
        {"Session", "session", TABLE_NUMBER, false},
        {"Label", "label", TABLE_TEXT, false},
        {"User", "uid", TABLE_USER, false},
        {"Model", "model", TABLE_TEXT, false},
        {"Class", "class", TABLE_TEXT, false},
        {"Lingers", "linger", TABLE_BOOL, false},
        {"Created", "created_usec", TABLE_TIME, false},
        {"State", "state", TABLE_TEXT, false},
        {"Queue position", "queue_position", TABLE_NUMBER, false},
        {"Starts in", "estimated_start_usec", TABLE_DURATION, false},
        {"Context used", "context_used", TABLE_NUMBER, false},
        {"Context", "context_max", TABLE_NUMBER, false},
        {"Prompt tokens", "prompt_tokens", TABLE_NUMBER, false},
        {"Answer tokens", "completion_tokens", TABLE_NUMBER, false},
        {"KV cache", "kv_bytes", TABLE_BYTES, false},
    };
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    CLEANUP(table_freep) struct table *t = NULL;
    struct session s = {.label = "", .model = "", .class = "", .state = ""};
    char path[SESSION_PATH_MAX];
    int status;

    status = session_path(id, path);
    if (status == STATUS_OK)
        status = bus_get_properties(c, path, LLM_SESSION_INTERFACE, properties,
                                    ARRAY_SIZE(properties), &s, &m);
    if (status != STATUS_OK)
        return status;
    if (table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        return complain(STATUS_FAILED, "out of memory");
    table_add_number(t, session_id(path));
    table_add_text(t, s.label);
    table_add_number(t, s.owner);
    table_add_text(t, s.model);
    table_add_text(t, s.class);
    table_add_bool(t, s.linger);
    table_add_number(t, s.created_usec);
    table_add_text(t, s.state);
    table_add_number(t, s.queue_position);
    if (s.queue_position > 0)
        table_add_number(t, s.estimated_start_usec);
    else
        table_add_none(t);
    table_add_number(t, s.context_used);
    table_add_number(t, s.context_max);
    table_add_number(t, s.prompt_tokens);
    table_add_number(t, s.completion_tokens);
    table_add_number(t, s.kv_bytes);
    return show_record(t);
}

static int close_session(struct llm_connection *c, const char *id)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    char path[SESSION_PATH_MAX];
    int status;

    status = session_path(id, path);
    if (status == STATUS_OK)
        status = bus_new(c, path, LLM_SESSION_INTERFACE, "Close", &m);
    return status == STATUS_OK ? bus_call(c, m, NULL) : status;
}

/* Does it for each session that is named, also after one failed; the first failure's status. */
static int for_each(int argc, char **argv, void (*help)(void),
                    int (*act)(struct llm_connection *c, const char *id))
{
    const struct verb_options options = {.help = help};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    char path[SESSION_PATH_MAX];
    int r, status = STATUS_FAILED;

    if (next_option(&options, argc, argv, &status) == OPTION_STOP)
        return status;
    if (optind == argc && !global.session)
        return usage_error("no session is named");
    for (int i = optind; i < argc; i++) {
        status = session_path(argv[i], path);
        if (status != STATUS_OK)
            return status;
    }
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status != STATUS_OK)
        return status;
    if (optind == argc)
        return act(c, global.session);
    for (int i = optind; i < argc; i++) {
        r = act(c, argv[i]);
        if (status == STATUS_OK)
            status = r;
        if (r == STATUS_NOT_RUNNING)
            break; /* nor will it be for the others */
    }
    return status;
}

static int verb_show(int argc, char **argv)
{
    return for_each(argc, argv, help_show, show_session);
}

static void help_close(void)
{
    puts("Usage: llmctl session close ID...\n"
         "Ends sessions of yours, and what they are doing.\n"
         "\n" GLOBAL_HELP);
}

static int verb_close(int argc, char **argv)
{
    return for_each(argc, argv, help_close, close_session);
}

/* ---- create, fork ---- */

static void help_create(void)
{
    puts("Usage: llmctl session create [OPTION...]\n"
         "Makes a session that stays until it is closed, and prints its number alone:\n"
         "\n"
         "  S=$(llmctl session create); llmctl run --session=$S \"My name is Ada.\"\n"
         "\n"
         "      --label=TEXT               how lists call it\n"
         "      --class=CLASS              interactive, batch or idle: who goes first\n"
         "      --context=N                tokens the conversation may hold\n"
         "      --model=MODEL              a file or a name: the model that must answer\n"
         "      --no-start                 do not start a daemon\n" GLOBAL_HELP);
}

static void help_fork(void)
{
    puts("Usage: llmctl session fork [OPTION...] ID\n"
         "Copies a session, which then goes its own way, and prints the copy's number alone.\n"
         "\n"
         "      --label=TEXT               how lists call the copy\n"
         "      --class=CLASS              interactive, batch or idle: who goes "
         "first\n" GLOBAL_HELP);
}

static int print_session(const char *path)
{
    static const struct table_column columns[] = {
        {NULL, "session", TABLE_NUMBER, false},
        {NULL, "path", TABLE_TEXT, false},
    };
    CLEANUP(table_freep) struct table *t = NULL;

    if (global.json == JSON_OFF) {
        printf("%" PRIu64 "\n", session_id(path));
        return STATUS_OK;
    }
    if (table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        return complain(STATUS_FAILED, "out of memory");
    table_add_number(t, session_id(path));
    table_add_text(t, path);
    return show_record(t);
}

enum {
    OPT_LABEL = 256,
    OPT_CLASS,
    OPT_CONTEXT,
    OPT_MODEL,
    OPT_NO_START,
};

/* Reads options of both into o. -1: go on */
static int take_options(const struct verb_options *options, int argc, char **argv,
                        struct llm_options *o, struct start_options *start)
{
    int option, r, status = STATUS_FAILED;
    uint64_t n;

    r = llm_options_set_bool(o, "linger", true);
    while (r >= 0 && (option = next_option(options, argc, argv, &status)) >= 0) {
        switch (option) {
        case OPT_LABEL:
            r = llm_options_set_string(o, "label", optarg);
            break;
        case OPT_CLASS:
            r = llm_options_set_string(o, "class", optarg);
            break;
        case OPT_CONTEXT:
            if (number_parse(optarg, UINT32_MAX, &n) < 0 || n == 0)
                return usage_error("--context wants a number of tokens, not %s", optarg);
            r = llm_options_set_uint32(o, "context", (uint32_t)n);
            break;
        case OPT_MODEL:
            start->model = optarg;
            break;
        case OPT_NO_START:
            start->no_start = true;
            break;
        }
    }
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    return option == OPTION_STOP ? status : -1;
}

static int verb_create(int argc, char **argv)
{
    static const struct option table[] = {
        {"label", required_argument, NULL, OPT_LABEL},
        {"class", required_argument, NULL, OPT_CLASS},
        {"context", required_argument, NULL, OPT_CONTEXT},
        {"model", required_argument, NULL, OPT_MODEL},
        {"no-start", no_argument, NULL, OPT_NO_START},
        {0},
    };
    static const struct verb_options options = {.options = table, .help = help_create};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    CLEANUP(llm_session_freep) struct llm_session *s = NULL;
    CLEANUP(freep) char *model = NULL;
    struct start_options start = {0};
    struct llm_error err;
    int r, status;

    if (llm_options_new(&o) < 0)
        return complain(STATUS_FAILED, "out of memory");
    status = take_options(&options, argc, argv, o, &start);
    if (status >= 0)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);
    deadlines_begin(global.timeout_usec);
    status = connect_or_start(&start, &c, &model);
    if (status != STATUS_OK)
        return status;
    if (model && llm_options_set_string(o, "model", model) < 0)
        return complain(STATUS_FAILED, "out of memory");
    r = llm_session_new(&s, c, o, &err);
    if (r < 0)
        return complain(status_of(r), "%s", err.message);
    return print_session(llm_session_path(s));
}

static int verb_fork(int argc, char **argv)
{
    static const struct option table[] = {
        {"label", required_argument, NULL, OPT_LABEL},
        {"class", required_argument, NULL, OPT_CLASS},
        {0},
    };
    static const struct verb_options options = {.options = table, .help = help_fork};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    CLEANUP(llm_session_freep) struct llm_session *from = NULL, *s = NULL;
    struct start_options start = {0};
    char path[SESSION_PATH_MAX];
    struct llm_error err;
    const char *id;
    int r, status;

    if (llm_options_new(&o) < 0)
        return complain(STATUS_FAILED, "out of memory");
    status = take_options(&options, argc, argv, o, &start);
    if (status >= 0)
        return status;
    if (optind + 1 < argc)
        return usage_error("unexpected argument %s", argv[optind + 1]);
    id = optind < argc ? argv[optind] : global.session;
    if (!id)
        return usage_error("no session is named");
    status = session_path(id, path);
    if (status != STATUS_OK)
        return status;
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status != STATUS_OK)
        return status;
    r = llm_session_open(&from, c, path, &err);
    if (r == 0)
        r = llm_session_fork(&s, from, o, &err);
    if (r < 0)
        return complain(status_of(r), "%s", err.message);
    return print_session(llm_session_path(s));
}

/* ---- the verb ---- */

static void help(void);

static const struct verb verbs[] = {
    {"list", verb_list, "list your sessions"},
    {"show", verb_show, "tell all about sessions"},
    {"create", verb_create, "make one that stays, and print its number"},
    {"fork", verb_fork, "copy one"},
    {"close", verb_close, "end sessions"},
};

static const struct verb_table verb_table = {
    .what = "session command",
    .verbs = verbs,
    .n = ARRAY_SIZE(verbs),
    .help = help,
    .run = verb_list,
};

static void help(void)
{
    puts("Usage: llmctl session COMMAND [OPTION...]\n"
         "Conversations that outlive the program that made them; without a command, their list.\n"
         "\n"
         "Commands:");
    verb_table_print(&verb_table);
    puts("\n"
         "llmctl session COMMAND --help tells about one of them. See llmctl(1).");
}

int verb_session(int argc, char **argv)
{
    return verb_dispatch(&verb_table, argc, argv);
}
