/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl is-ready: for scripts and units that come after the daemon. */

#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "client/llmctl-bus.h"

static void help(void)
{
    puts("Usage: llmctl is-ready [OPTION...]\n"
         "Status 0: llmd answers requests; 1: it runs, but is not ready; 3: it does not run. "
         "Prints\n"
         "its state, not with --quiet.\n"
         "\n"
         "  -w, --wait                     wait until it has loaded its model; see --timeout\n"
         "  -q, --quiet                    print nothing\n" GLOBAL_HELP);
}

static const char *const properties_interface = "org.freedesktop.DBus.Properties";

static int on_changed(sd_bus_message *m, void *userdata, sd_bus_error *e)
{
    (void)m;
    (void)e;
    *(bool *)userdata = true;
    return 0;
}

static int get_state(struct llm_connection *c, char *out, size_t n)
{
    static const struct bus_property property = {"State", 's', 0};
    CLEANUP(sd_bus_message_unrefpp) sd_bus_message *m = NULL;
    const char *state = "";
    int status;

    status = bus_get_properties(c, LLM_ROOT_PATH, LLM_MANAGER_INTERFACE, &property, 1, &state, &m);
    if (status == STATUS_OK)
        snprintf(out, n, "%s", state);
    return status;
}

static int set_up(struct llm_connection *c, bool *changed)
{
    int status = bus_match(c, LLM_ROOT_PATH, properties_interface, "PropertiesChanged", on_changed,
                           changed);

    return status == STATUS_OK ? bus_watch_end(c) : status;
}

static int find_state(bool wait, char *out, size_t n)
{
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    bool changed;
    int status;

    status = connect_running(&c);
    if (status == STATUS_OK && wait)
        status = set_up(c, &changed);
    if (status != STATUS_OK)
        return status;
    for (;;) {
        changed = false; /* first, so that what comes meanwhile is looked at */
        status = get_state(c, out, n);
        if (status != STATUS_OK || !wait || strcmp(out, "loading") != 0)
            return status;
        status = bus_wait_again(c, &changed, -1, 0);
        if (status == BUS_AGAIN)
            status = set_up(c, &changed);
        if (status != STATUS_OK)
            return status;
    }
}

int verb_is_ready(int argc, char **argv)
{
    static const struct option table[] = {{"wait", no_argument, NULL, 'w'}, {0}};
    static const struct verb_options options = {"w", table, help};
    int option, status = STATUS_FAILED;
    char state[32];
    bool wait = false;

    while ((option = next_option(&options, argc, argv, &status)) >= 0)
        wait = true; /* the only one */
    if (option == OPTION_STOP)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);
    deadlines_begin(global.timeout_usec);
    status = find_state(wait, state, sizeof(state));
    if (status != STATUS_OK)
        return status;
    if (!global.quiet)
        puts(state);
    return strcmp(state, "ready") == 0 ? STATUS_OK : STATUS_FAILED;
}
