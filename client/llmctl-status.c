/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl status: what the daemon says of itself. Never starts one. */

#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "client/llmctl.h"

static void help(void)
{
    puts("Usage: llmctl status [OPTION...]\n"
         "Tells what runs. Status 3 when llmd does not.\n"
         "\n"
         "      --socket PATH   where the daemon listens\n"
         "  -h, --help          print this and exit");
}

int verb_status(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket", required_argument, NULL, 's'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    struct start_options start = {.no_start = true};
    CLEANUP(freep) char *model = NULL;
    struct llm_connection *connection;
    struct llm_status s;
    struct llm_error err;
    int c, r, status;

    while ((c = getopt_long(argc, argv, "h", options, NULL)) >= 0) {
        switch (c) {
        case 's':
            start.socket = optarg;
            break;
        case 'h':
            help();
            return STATUS_OK;
        default:
            return usage_error("wrong arguments");
        }
    }
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);

    deadlines_begin(0);
    status = connect_or_start(&start, &connection, &model);
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
