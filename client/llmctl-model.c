/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl model: the models that the daemon has. */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/llmctl-bus.h"
#include "client/llmctl-output.h"
#include "client/llmctl-show.h"

#define MODEL_SUFFIX ".llmd"

/* How often the progress of a copy is looked at; its end is told by a signal. */
#define PROGRESS_USEC 200000u

struct model {
    const char *name, *state, *failure, *description, *license;
    double progress;
    uint64_t bytes;
    uint32_t context_max;
    bool is_default;
};

static const struct bus_property properties[] = {
    {"Name", 's', offsetof(struct model, name)},
    {"State", 's', offsetof(struct model, state)},
    {"Progress", 'd', offsetof(struct model, progress)},
    {"Failure", 's', offsetof(struct model, failure)},
    {"SizeBytes", 't', offsetof(struct model, bytes)},
    {"Description", 's', offsetof(struct model, description)},
    {"License", 's', offsetof(struct model, license)},
    {"ContextMax", 'u', offsetof(struct model, context_max)},
    {"Default", 'b', offsetof(struct model, is_default)},
};

static int get_model(struct llm_connection *c, const char *path, struct model *ret,
                     sd_bus_message **ret_message)
{
    *ret = (struct model){.name = "", .state = "", .failure = "", .description = "", .license = ""};
    return bus_get_properties(c, path, LLM_MODEL_INTERFACE, properties, ARRAY_SIZE(properties), ret,
                              ret_message);
}

/* ---- list ---- */

static void help_list(void)
{
    puts("Usage: llmctl model list [OPTION...]\n"
         "Lists the models that the daemon has.\n"
         "\n" GLOBAL_HELP);
}

static int verb_list(int argc, char **argv)
{
    static const struct table_column columns[] = {
        {"NAME", "model", TABLE_TEXT, false},
        {"STATE", "state", TABLE_TEXT, false},
        {"SIZE", "bytes", TABLE_BYTES, false},
        {"DEFAULT", "default", TABLE_BOOL, false},
        {"DESCRIPTION", "description", TABLE_TEXT, true},
    };
    static const struct verb_options options = {.help = help_list};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    CLEANUP(table_freep) struct table *t = NULL;
    const char *name, *state, *description;
    int r, is_default, status = STATUS_FAILED;
    uint64_t bytes;

    if (next_option(&options, argc, argv, &status) == OPTION_STOP)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status == STATUS_OK)
        status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "ListModels", &m);
    if (status != STATUS_OK)
        return status;
    if (sd_bus_message_append(m, "a{sv}", 0) < 0 || table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        return complain(STATUS_FAILED, "out of memory");
    status = bus_call(c, m, &reply);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_enter_container(reply, 'a', "(sstsb)");
    while (r >= 0 && (r = sd_bus_message_read(reply, "(sstsb)", &name, &state, &bytes, &description,
                                              &is_default)) > 0) {
        table_add_text(t, name);
        table_add_text(t, state);
        table_add_number(t, bytes);
        table_add_bool(t, is_default);
        table_add_text(t, description);
    }
    return r < 0 ? complain_of_answer() : show_table(t, "model", "models");
}

/* ---- show ---- */

static void help_show(void)
{
    puts("Usage: llmctl model show NAME...\n"
         "Tells all about models.\n"
         "\n" GLOBAL_HELP);
}

static int show_model(struct llm_connection *c, const char *name)
{
    static const struct table_column columns[] = {
        {"Name", "model", TABLE_TEXT, false},
        {"State", "state", TABLE_TEXT, false},
        {"Progress", "progress", TABLE_PERCENT, false},
        {"Failure", "failure", TABLE_TEXT, false},
        {"Default", "default", TABLE_BOOL, false},
        {"Size", "bytes", TABLE_BYTES, false},
        {"Description", "description", TABLE_TEXT, false},
        {"Context", "context_max", TABLE_NUMBER, false},
        {"License", "license", TABLE_TEXT, false},
    };
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    CLEANUP(table_freep) struct table *t = NULL;
    CLEANUP(freep) char *path = NULL;
    struct model model = {.name = "", .state = "", .failure = "", .description = "", .license = ""};
    int r, status;

    if (sd_bus_path_encode(LLM_MODEL_PATH, name, &path) < 0 ||
        table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        return complain(STATUS_FAILED, "out of memory");
    status = bus_new(c, path, "org.freedesktop.DBus.Properties", "GetAll", &m);
    if (status != STATUS_OK)
        return status;
    if (sd_bus_message_append(m, "s", LLM_MODEL_INTERFACE) < 0)
        return complain(STATUS_FAILED, "out of memory");
    r = bus_try(c, m, &reply, &e);
    if (r < 0 && (sd_bus_error_has_name(&e, SD_BUS_ERROR_UNKNOWN_OBJECT) ||
                  sd_bus_error_has_name(&e, SD_BUS_ERROR_UNKNOWN_INTERFACE)))
        return complain(STATUS_FAILED, "llmd has no model %s: see llmctl model list", name);
    if (r != 0)
        return status_of_call(r, &e);
    if (bus_read_properties(reply, properties, ARRAY_SIZE(properties), &model) < 0)
        return complain_of_answer();
    table_add_text(t, model.name);
    table_add_text(t, model.state);
    table_add_double(t, model.progress);
    table_add_text(t, model.failure);
    table_add_bool(t, model.is_default);
    table_add_number(t, model.bytes);
    table_add_text(t, model.description);
    table_add_number(t, model.context_max);
    table_add_text(t, model.license);
    return show_record(t);
}

static int verb_show(int argc, char **argv)
{
    static const struct verb_options options = {.help = help_show};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    int status = STATUS_FAILED;

    if (next_option(&options, argc, argv, &status) == OPTION_STOP)
        return status;
    if (optind == argc)
        return usage_error("no model is named");
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    for (int i = optind; i < argc && status == STATUS_OK; i++)
        status = show_model(c, argv[i]);
    return status;
}

/* ---- install ---- */

static void help_install(void)
{
    puts("Usage: llmctl model install [OPTION...] FILE\n"
         "Gives the daemon a copy of a model's file, and waits until it has it.\n"
         "\n"
         "      --name=NAME                how to call it; default: the file's name without .llmd\n"
         "      --default                  the one to be loaded from now on\n"
         "      --replace                  in the place of one that has this name\n" GLOBAL_HELP);
}

enum {
    OPT_NAME = 256,
    OPT_DEFAULT,
    OPT_REPLACE,
};

struct install {
    const char *file;
    char *name; /* owned */
    bool make_default, replace;
};

static int default_name(const char *file, char **ret)
{
    const char *slash = strrchr(file, '/'), *name = slash ? slash + 1 : file;
    size_t n = strlen(name), suffix = strlen(MODEL_SUFFIX);

    if (n > suffix && strcmp(name + n - suffix, MODEL_SUFFIX) == 0)
        n -= suffix;
    *ret = strndup(name, n);
    return *ret ? STATUS_OK : complain(STATUS_FAILED, "out of memory");
}

static int open_model(const char *file, int *ret)
{
    CLEANUP(closep) int fd = open(file, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    struct stat st;

    if (fd < 0 || fstat(fd, &st) < 0)
        return complain(STATUS_FAILED, "%s: %s", file, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return complain(STATUS_FAILED, "%s: is no file that a model could be in", file);
    *ret = TAKE_FD(fd);
    return STATUS_OK;
}

static int on_changed(sd_bus_message *m, void *userdata, sd_bus_error *e)
{
    (void)m;
    (void)e;
    *(bool *)userdata = true;
    return 0;
}

static int complain_of_interruption(const struct install *in, int status)
{
    if (status == STATUS_INTERRUPTED || status == STATUS_TIMEOUT)
        note("llmd goes on copying: llmctl model show %s tells how far it is, llmctl model remove "
             "%s takes it back",
             in->name, in->name);
    return status;
}

static int wait_for_model(struct llm_connection *c, const struct install *in, const char *path,
                          bool *changed)
{
    struct model model;
    int status;

    for (;;) {
        CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;

        *changed = false; /* first, so that what comes meanwhile is looked at */
        status = get_model(c, path, &model, &m);
        if (status != STATUS_OK)
            return status;
        if (strcmp(model.state, "failed") == 0)
            return complain(STATUS_FAILED, "%s: %s", in->file,
                            model.failure[0] ? model.failure : "llmd could not install it");
        if (strcmp(model.state, "installing") != 0)
            return STATUS_OK;
        status_line("installing %s: %.0f %%", in->name, model.progress * 100);
        status = bus_wait(c, changed, -1, PROGRESS_USEC);
        if (status != STATUS_OK)
            return status;
    }
}

static int install(struct llm_connection *c, const struct install *in, int fd)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    bool changed = false;
    const char *path;
    int r, status;

    /* Before the call: it may be done before its answer is read. */
    status = bus_match(c, LLM_MODEL_PATH, NULL, NULL, on_changed, &changed);
    if (status == STATUS_OK)
        status = bus_watch_end(c);
    if (status == STATUS_OK)
        status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "InstallModel", &m);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_append(m, "hs", fd, in->name);
    if (r >= 0)
        r = sd_bus_message_open_container(m, 'a', "{sv}");
    if (r >= 0 && in->replace)
        r = sd_bus_message_append(m, "{sv}", "replace", "b", 1);
    if (r >= 0 && in->make_default)
        r = sd_bus_message_append(m, "{sv}", "default", "b", 1);
    if (r >= 0)
        r = sd_bus_message_close_container(m);
    if (r == -EINVAL)
        return complain(STATUS_FAILED, "the name is not UTF-8: give another with --name");
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    status = bus_call(c, m, &reply);
    if (status != STATUS_OK)
        return status;
    if (sd_bus_message_read(reply, "o", &path) < 0)
        return complain_of_answer();
    before_message = status_line_clear;
    status = wait_for_model(c, in, path, &changed);
    status_line_clear();
    return complain_of_interruption(in, status);
}

static int verb_install(int argc, char **argv)
{
    static const struct option table[] = {
        {"name", required_argument, NULL, OPT_NAME},
        {"default", no_argument, NULL, OPT_DEFAULT},
        {"replace", no_argument, NULL, OPT_REPLACE},
        {0},
    };
    static const struct verb_options options = {.options = table, .help = help_install};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    CLEANUP(closep) int fd = -EBADF;
    CLEANUP(freep) char *owned = NULL;
    struct install in = {0};
    int option, status = STATUS_FAILED;

    while ((option = next_option(&options, argc, argv, &status)) >= 0) {
        switch (option) {
        case OPT_NAME:
            free(owned);
            owned = strdup(optarg);
            if (!owned)
                return complain(STATUS_FAILED, "out of memory");
            break;
        case OPT_DEFAULT:
            in.make_default = true;
            break;
        case OPT_REPLACE:
            in.replace = true;
            break;
        }
    }
    if (option == OPTION_STOP)
        return status;
    if (optind == argc)
        return usage_error("no file is named");
    if (optind + 1 < argc)
        return usage_error("unexpected argument %s", argv[optind + 1]);
    in.file = argv[optind];
    if (!owned && (status = default_name(in.file, &owned)) != STATUS_OK)
        return status;
    in.name = owned;
    status = open_model(in.file, &fd);
    if (status != STATUS_OK)
        return status;
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status != STATUS_OK)
        return status;
    deadlines_hold();
    return install(c, &in, fd);
}

/* ---- remove, default ---- */

static void help_remove(void)
{
    puts("Usage: llmctl model remove NAME...\n"
         "Deletes installed models. The one that is loaded stays: make another the default first.\n"
         "\n" GLOBAL_HELP);
}

static void help_default(void)
{
    puts("Usage: llmctl model default [NAME]\n"
         "Has a model loaded from now on: at once, or as soon as no session is open. Without a "
         "name,\n"
         "prints which it is.\n"
         "\n" GLOBAL_HELP);
}

/* A method that takes a name and options. */
static int call_with_name(struct llm_connection *c, const char *method, const char *name)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    int r, status;

    status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, method, &m);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_append(m, "sa{sv}", name, 0);
    if (r == -EINVAL)
        return complain(STATUS_FAILED, "a model's name is UTF-8, which this is not");
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    return bus_call(c, m, NULL);
}

static int verb_remove(int argc, char **argv)
{
    static const struct verb_options options = {.help = help_remove};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    int r, status = STATUS_FAILED;

    if (next_option(&options, argc, argv, &status) == OPTION_STOP)
        return status;
    if (optind == argc)
        return usage_error("no model is named");
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    for (int i = optind; i < argc && status != STATUS_NOT_RUNNING; i++) {
        r = call_with_name(c, "RemoveModel", argv[i]);
        if (status == STATUS_OK)
            status = r; /* the first failure's */
    }
    return status;
}

static int print_default(struct llm_connection *c)
{
    static const struct bus_property property = {"DefaultModel", 's', 0};
    static const struct table_column columns[] = {{NULL, "model", TABLE_TEXT, false}};
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    CLEANUP(table_freep) struct table *t = NULL;
    const char *name = "";
    int status;

    status = bus_get_properties(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, &property, 1, &name, &m);
    if (status != STATUS_OK)
        return status;
    if (!name[0])
        return complain(STATUS_FAILED,
                        "no model is the default: llmctl model install FILE --default "
                        "gives llmd one");
    if (global.json == JSON_OFF) {
        puts(name);
        return STATUS_OK;
    }
    if (table_new(&t, columns, 1) < 0)
        return complain(STATUS_FAILED, "out of memory");
    table_add_text(t, name);
    return show_record(t);
}

static int verb_default(int argc, char **argv)
{
    static const struct verb_options options = {.help = help_default};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    int status = STATUS_FAILED;

    if (next_option(&options, argc, argv, &status) == OPTION_STOP)
        return status;
    if (optind + 1 < argc)
        return usage_error("unexpected argument %s", argv[optind + 1]);
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status != STATUS_OK)
        return status;
    if (optind == argc)
        return print_default(c);
    return call_with_name(c, "SetDefaultModel", argv[optind]);
}

/* ---- the verb ---- */

static void help(void);

static const struct verb verbs[] = {
    {"list", verb_list, "list the models that the daemon has"},
    {"show", verb_show, "tell all about models"},
    {"install", verb_install, "give the daemon a model's file"},
    {"remove", verb_remove, "delete installed models"},
    {"default", verb_default, "tell or change which one is loaded"},
};

static const struct verb_table verb_table = {
    .what = "model command",
    .verbs = verbs,
    .n = ARRAY_SIZE(verbs),
    .help = help,
    .run = verb_list,
};

static void help(void)
{
    puts("Usage: llmctl model COMMAND [OPTION...]\n"
         "The models that the daemon has; without a command, their list.\n"
         "\n"
         "Commands:");
    verb_table_print(&verb_table);
    puts("\n"
         "llmctl model COMMAND --help tells about one of them. See llmctl(1).");
}

int verb_model(int argc, char **argv)
{
    return verb_dispatch(&verb_table, argc, argv);
}
