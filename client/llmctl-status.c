/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl status: what the daemon says of itself. Never starts one, never waits for the model. */

#include <stdio.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/llmctl-manager.h"
#include "client/llmctl-show.h"

static void help(void)
{
    puts("Usage: llmctl status [OPTION...]\n"
         "Tells what runs, at once, whatever it computes. Status 3 when llmd does not run.\n"
         "\n" GLOBAL_HELP);
}

static void add_known(struct table *t, bool known, uint64_t number)
{
    if (known)
        table_add_number(t, number);
    else
        table_add_none(t);
}

static int show(const struct llm_connection *c, const struct manager *m)
{
    bool short_of_memory = m->memory_pressure > 0 || m->kv_bytes_spilled > 0; /* else not shown */
    const struct table_column columns[] = {
        {"version", "version", TABLE_TEXT, false},
        {"scope", "scope", TABLE_TEXT, false},
        {"state", "state", TABLE_TEXT, false},
        {"loaded", "load_progress", TABLE_PERCENT, false},
        {"model", "model", TABLE_TEXT, false},
        {"default", "default_model", TABLE_TEXT, false},
        {"backend", "backends", TABLE_LIST, false},
        {"up for", "uptime_usec", TABLE_DURATION, false},
        {"clients", "clients", TABLE_NUMBER, false},
        {"sessions", "sessions", TABLE_NUMBER, false},
        {"running", "running", TABLE_NUMBER, false},
        {"queued", "queued", TABLE_NUMBER, false},
        {"KV cache", "kv_bytes_used", TABLE_BYTES, false},
        {"KV limit", "kv_bytes_max", TABLE_BYTES, false},
        {short_of_memory ? "short of memory" : NULL, "memory_pressure", TABLE_NUMBER, false},
        {short_of_memory ? "KV on disk" : NULL, "kv_bytes_spilled", TABLE_BYTES, false},
        {"reads tokens/s", "prefill_rate", TABLE_RATE, false},
        {"writes tokens/s", "decode_rate", TABLE_RATE, false},
        {"requests", "requests", TABLE_NUMBER, false},
        {"cancelled", "requests_cancelled", TABLE_NUMBER, false},
        {"failed", "requests_failed", TABLE_NUMBER, false},
        {"refused", "requests_refused", TABLE_NUMBER, false},
        {"tokens read", "prompt_tokens", TABLE_NUMBER, false},
        {"tokens written", "completion_tokens", TABLE_NUMBER, false},
    };
    static char *const no_backends[] = {NULL};
    CLEANUP(table_freep) struct table *t = NULL;
    bool known = m->has_statistics;

    if (table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        return complain(STATUS_FAILED, "out of memory");
    table_add_text(t, m->version);
    table_add_text(t, scope_name(c));
    table_add_text(t, m->state);
    table_add_double(t, m->load_progress);
    table_add_text(t, m->model);
    table_add_text(t, m->default_model);
    table_add_list(t, (const char *const *)(m->backends ? m->backends : no_backends));
    add_known(t, known, m->uptime_usec);
    add_known(t, known, m->clients);
    table_add_number(t, m->sessions);
    add_known(t, known, m->running);
    add_known(t, known, m->queued);
    table_add_number(t, m->kv_bytes_used);
    table_add_number(t, m->kv_bytes_max);
    add_known(t, known, m->memory_pressure);
    add_known(t, known, m->kv_bytes_spilled);
    if (known) {
        table_add_double(t, m->prefill_rate);
        table_add_double(t, m->decode_rate);
    } else {
        table_add_none(t);
        table_add_none(t);
    }
    add_known(t, known, m->requests);
    add_known(t, known, m->requests_cancelled);
    add_known(t, known, m->requests_failed);
    add_known(t, known, m->requests_refused);
    add_known(t, known, m->prompt_tokens);
    add_known(t, known, m->completion_tokens);
    return show_record(t);
}

int verb_status(int argc, char **argv)
{
    static const struct verb_options options = {.help = help};
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    struct manager m;
    int status;

    if (next_option(&options, argc, argv, &status) == OPTION_STOP)
        return status;
    if (optind < argc)
        return usage_error("unexpected argument %s", argv[optind]);
    deadlines_begin(global.timeout_usec);
    status = connect_running(&c);
    if (status == STATUS_OK)
        status = manager_get(c, &m);
    if (status != STATUS_OK)
        return status;
    status = show(c, &m);
    manager_done(&m);
    return status;
}
