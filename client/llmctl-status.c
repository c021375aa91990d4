/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl status: what the daemon says of itself. Never starts one, never waits for the model. */

#include <stdio.h>
#include <string.h>

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

static void add_text_or_none(struct table *t, const char *text)
{
    if (text)
        table_add_text(t, text);
    else
        table_add_none(t);
}

/* A rate that was measured. */
static void add_measured(struct table *t, double rate)
{
    if (rate > 0)
        table_add_double(t, rate);
    else
        table_add_none(t);
}

/* "in use", or what keeps it from that; NULL: there is none. */
static const char *gpu_state_text(const struct manager *m, char *buf, size_t n)
{
    if (!m->gpu_state || strcmp(m->gpu_state, "none") == 0)
        return NULL;
    if (m->gpu_reason && m->gpu_reason[0])
        snprintf(buf, n, "not used: %s", m->gpu_reason);
    else
        snprintf(buf, n, "%s",
                 strcmp(m->gpu_state, "waiting") == 0 ? "waits for the model" : "in use");
    return buf;
}

static void add_lanes(struct table *t, const struct manager *m)
{
    bool known = m->gpu_state;
    char text[400];

    add_text_or_none(t, m->placement && m->placement[0] ? m->placement : NULL);
    add_text_or_none(t, m->gpu && m->gpu[0] ? m->gpu : NULL);
    add_text_or_none(t, gpu_state_text(m, text, sizeof(text)));
    add_text_or_none(t, m->gpu_state);
    add_text_or_none(t, m->gpu_reason && m->gpu_reason[0] ? m->gpu_reason : NULL);
    add_known(t, known, m->gpu_prompt_tokens);
    add_known(t, known, m->gpu_completion_tokens);
    add_known(t, known, m->cpu_prompt_tokens);
    add_known(t, known, m->cpu_completion_tokens);
    add_measured(t, m->cpu_prefill);
    add_measured(t, m->cpu_decode);
    add_measured(t, m->cpu_decode_many);
    add_measured(t, m->gpu_prefill);
    add_measured(t, m->gpu_decode);
    add_measured(t, m->gpu_decode_many);
    add_measured(t, m->both_prefill);
    add_measured(t, m->both_decode);
}

static int show(const struct llm_connection *c, const struct manager *m)
{
    bool short_of_memory = m->memory_pressure > 0 || m->kv_bytes_spilled > 0; /* else not shown */
    bool has_gpu = m->gpu_state && strcmp(m->gpu_state, "none") != 0;         /* likewise */
    const struct table_column columns[] = {
        {"version", "version", TABLE_TEXT, false},
        {"scope", "scope", TABLE_TEXT, false},
        {"state", "state", TABLE_TEXT, false},
        {"loaded", "load_progress", TABLE_PERCENT, false},
        {"model", "model", TABLE_TEXT, false},
        {"default", "default_model", TABLE_TEXT, false},
        {"backend", "backends", TABLE_LIST, false},
        {has_gpu ? "who does what" : NULL, "placement", TABLE_TEXT, false},
        {has_gpu ? "GPU" : NULL, "gpu", TABLE_TEXT, false},
        {has_gpu ? "GPU is" : NULL, NULL, TABLE_TEXT, false},
        {NULL, "gpu_state", TABLE_TEXT, false},
        {NULL, "gpu_reason", TABLE_TEXT, false},
        {has_gpu ? "read by GPU" : NULL, "gpu_prompt_tokens", TABLE_NUMBER, false},
        {has_gpu ? "written by GPU" : NULL, "gpu_completion_tokens", TABLE_NUMBER, false},
        {NULL, "cpu_prompt_tokens", TABLE_NUMBER, false},
        {NULL, "cpu_completion_tokens", TABLE_NUMBER, false},
        {NULL, "cpu_prefill_measured", TABLE_RATE, false},
        {NULL, "cpu_decode_measured", TABLE_RATE, false},
        {NULL, "cpu_decode_many_measured", TABLE_RATE, false},
        {NULL, "gpu_prefill_measured", TABLE_RATE, false},
        {NULL, "gpu_decode_measured", TABLE_RATE, false},
        {NULL, "gpu_decode_many_measured", TABLE_RATE, false},
        {NULL, "both_prefill_measured", TABLE_RATE, false},
        {NULL, "both_decode_measured", TABLE_RATE, false},
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
    add_lanes(t, m);
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
