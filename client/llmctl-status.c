/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl status: what the daemon says of itself. Never starts one. */

#include <inttypes.h>
#include <stdio.h>

#include "client/llmctl.h"

static void help(void)
{
    puts("Usage: llmctl status [OPTION...]\n"
         "Tells what runs. Status 3 when llmd does not.\n"
         "\n" GLOBAL_HELP);
}

int verb_status(int argc, char **argv)
{
    static const struct verb_options options = {.help = help};
    struct llm_connection *connection;
    struct llm_status s;
    struct llm_error err;
    int r, status;

    if (next_option(&options, argc, argv, &status) == OPTION_STOP)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);

    deadlines_begin(global.timeout_usec);
    status = connect_running(&connection);
    if (status != STATUS_OK)
        return status;
    r = llm_get_status(connection, &s, &err);
    llm_disconnect(connection);
    if (r < 0)
        return complain(status_of(r), "%s", err.message);
    printf("version   %s\n"
           "state     %s\n"
           "model     %s\n"
           "backend   %s\n"
           "sessions  %" PRIu32 "\n"
           "KV cache  %" PRIu64 " of %" PRIu64 " MiB\n",
           s.version, s.state, s.model, s.backend, s.sessions, s.kv_bytes_used >> 20,
           s.kv_bytes_max >> 20);
    return STATUS_OK;
}
