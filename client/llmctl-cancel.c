/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl cancel: ends requests, not sessions. */

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "client/llmctl-bus.h"

static void help(void)
{
    puts(
        "Usage: llmctl cancel SESSION...\n"
        "       llmctl cancel --all\n"
        "Ends what sessions are doing, within a step of the model; they go back to what they held\n"
        "before. A session that does nothing stays as it is.\n"
        "\n"
        "  -a, --all                      all of your sessions\n" GLOBAL_HELP);
}

static int cancel(struct llm_connection *c, const char *path)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    int status;

    status = bus_new(c, path, LLM_SESSION_INTERFACE, "Cancel", &m);
    return status == STATUS_OK ? bus_call(c, m, NULL) : status;
}

/* Like cancel(), but a session that is gone by now is no failure. */
static int cancel_listed(struct llm_connection *c, const char *path)
{
    CLEANUP(sd_bus_error_free) sd_bus_error e = SD_BUS_ERROR_NULL;
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    int r, status;

    status = bus_new(c, path, LLM_SESSION_INTERFACE, "Cancel", &m);
    if (status != STATUS_OK)
        return status;
    r = bus_try(c, m, NULL, &e);
    return r == 0 || r == -ESRCH ? STATUS_OK : status_of_call(r, &e);
}

static int cancel_all(struct llm_connection *c)
{
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL, *reply = NULL;
    const char *path;
    int r, status;

    status = bus_new(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, "ListSessions", &m);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_append(m, "a{sv}", 0);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    status = bus_call(c, m, &reply);
    if (status != STATUS_OK)
        return status;
    r = sd_bus_message_enter_container(reply, 'a', "(osussuuttu)");
    while (r >= 0 && (r = sd_bus_message_enter_container(reply, 'r', "osussuuttu")) > 0) {
        r = sd_bus_message_read_basic(reply, 'o', &path);
        if (r >= 0)
            r = sd_bus_message_skip(reply, "sussuuttu");
        if (r >= 0)
            r = sd_bus_message_exit_container(reply);
        if (r < 0)
            break;
        status = cancel_listed(c, path);
        if (status != STATUS_OK)
            return status;
    }
    return r < 0 ? complain_of_answer() : STATUS_OK;
}

int verb_cancel(int argc, char **argv)
{
    static const struct option table[] = {{"all", no_argument, NULL, 'a'}, {0}};
    static const struct verb_options options = {"a", table, help};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    char path[SESSION_PATH_MAX];
    int option, r, status = STATUS_FAILED;
    bool all = false;

    while ((option = next_option(&options, argc, argv, &status)) >= 0)
        all = true; /* the only one */
    if (option == OPTION_STOP)
        return status;
    if (all && (optind < argc || global.session))
        return usage_error("--all excludes single sessions");
    if (!all && optind == argc && !global.session)
        return usage_error("no session is named");
    for (int i = optind; i < argc; i++) {
        status = session_path(argv[i], path);
        if (status != STATUS_OK)
            return status;
    }
    if (global.session && (status = session_path(global.session, path)) != STATUS_OK)
        return status;
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status != STATUS_OK)
        return status;
    if (all)
        return cancel_all(c);
    if (global.session)
        status = cancel(c, path);
    for (int i = optind; i < argc && status != STATUS_NOT_RUNNING; i++) {
        r = session_path(argv[i], path);
        if (r == STATUS_OK)
            r = cancel(c, path);
        if (status == STATUS_OK)
            status = r; /* the first failure's */
    }
    return status;
}
