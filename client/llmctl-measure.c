/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/* llmctl measure: how many tokens a prompt has. */

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "client/llmctl-bus.h"
#include "client/llmctl-prompt.h"
#include "client/llmctl-show.h"

DEFINE_CLEANUP(struct llm_options *, llm_options_free)

static void help(void)
{
    puts("Usage: llmctl measure [OPTION...] [PROMPT...]\n"
         "Prints how many tokens a prompt has. What comes through a pipe is added to it.\n"
         "\n"
         "      --session=ID               as a continuation of this session\n"
         "      --instructions=TEXT        with instructions, as run has them\n"
         "      --raw                      the prompt as it is, without chat template\n"
         "  -n, --no-stdin                 do not read standard input\n"
         "      --model=MODEL              the model for a daemon that is started\n"
         "      --no-start                 do not start a daemon\n" GLOBAL_HELP);
}

enum {
    OPT_INSTRUCTIONS = 256,
    OPT_RAW,
    OPT_MODEL,
    OPT_NO_START,
};

struct measure {
    struct start_options start;
    const char *instructions;
    bool raw, no_stdin;
};

/* -1: go on */
static int parse_arguments(struct measure *m, int argc, char **argv)
{
    static const struct option table[] = {
        {"instructions", required_argument, NULL, OPT_INSTRUCTIONS},
        {"raw", no_argument, NULL, OPT_RAW},
        {"no-stdin", no_argument, NULL, 'n'},
        {"model", required_argument, NULL, OPT_MODEL},
        {"no-start", no_argument, NULL, OPT_NO_START},
        {0},
    };
    static const struct verb_options options = {"n", table, help};
    int c, status = STATUS_FAILED;

    while ((c = next_option(&options, argc, argv, &status)) >= 0) {
        switch (c) {
        case OPT_INSTRUCTIONS:
            m->instructions = optarg;
            break;
        case OPT_RAW:
            m->raw = true;
            break;
        case 'n':
            m->no_stdin = true;
            break;
        case OPT_MODEL:
            m->start.model = optarg;
            break;
        case OPT_NO_START:
            m->start.no_start = true;
            break;
        }
    }
    if (c == OPTION_STOP)
        return status;
    if (m->raw && m->instructions)
        return usage_error("--raw and --instructions exclude each other");
    return -1;
}

static int make_options(const struct measure *m, const struct buffer *prompt,
                        struct llm_options **ret)
{
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    char path[SESSION_PATH_MAX];
    int r, status;

    r = llm_options_new(&o);
    if (r >= 0)
        r = llm_options_set_memory(o, "prompt-fd", prompt->data, prompt->n);
    if (r >= 0 && m->raw)
        r = llm_options_set_bool(o, "raw", true);
    if (r >= 0 && m->instructions)
        r = llm_options_add_message(o, "system", m->instructions);
    if (r >= 0 && global.session) {
        status = session_path(global.session, path);
        if (status != STATUS_OK)
            return status;
        r = llm_options_set_object(o, "session", path);
    }
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    *ret = TAKE_PTR(o);
    return STATUS_OK;
}

static int print_tokens(uint32_t n)
{
    static const struct table_column columns[] = {{NULL, "tokens", TABLE_NUMBER, false}};
    CLEANUP(table_freep) struct table *t = NULL;

    if (global.json == JSON_OFF) {
        printf("%" PRIu32 "\n", n);
        return STATUS_OK;
    }
    if (table_new(&t, columns, 1) < 0)
        return complain(STATUS_FAILED, "out of memory");
    table_add_number(t, n);
    return show_record(t);
}

int verb_measure(int argc, char **argv)
{
    CLEANUP(llm_disconnectp) struct llm_connection *c = NULL;
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    CLEANUP(freep) char *model = NULL;
    struct buffer prompt = {0};
    struct measure m = {0};
    struct llm_error err;
    uint32_t n;
    int r, status;

    status = parse_arguments(&m, argc, argv);
    if (status != -1)
        return status;
    deadlines_begin(global.timeout_usec);
    status = prompt_read(&prompt, argc, argv, !m.no_stdin);
    if (status == STATUS_OK)
        status = make_options(&m, &prompt, &o);
    if (status == STATUS_OK)
        status = connect_or_start(&m.start, &c, &model);
    if (status == STATUS_OK) {
        r = llm_measure(c, o, &n, &err);
        status = r < 0 ? complain(status_of(r), "%s", err.message) : print_tokens(n);
    }
    buffer_done(&prompt);
    return status;
}
