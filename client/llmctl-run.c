/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llmctl run: one prompt, one answer. Until the request is made, Ctrl-C and the time limit simply
 * end the process; while the answer comes they are blocked and waited for together with the
 * stream, so that the daemon is told.
 */

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "client/llmctl-answer.h"
#include "client/llmctl-output.h"
#include "client/llmctl-prompt.h"
#include "client/llmctl-request.h"
#include "client/llmctl.h"

DEFINE_CLEANUP(struct llm_options *, llm_options_free)

static void help(void)
{
    puts("Usage: llmctl run [OPTION...] [PROMPT...]\n"
         "Answers a prompt. What comes through a pipe is added to it after a newline.\n"
         "\n"
         "  llmctl run \"Why is the sky blue?\"\n"
         "  git diff | llmctl run \"Write a commit message\"\n"
         "\n" REQUEST_HELP "  -n, --no-stdin                 do not read standard input\n"
         "      --session=ID               go on with this session\n"
         "      --json                     print the stream's records instead of the text\n"
         "      --timeout=SECONDS          give up after that time\n" GLOBAL_HELP);
}

struct run {
    struct request request;
    struct buffer prompt;
    bool no_stdin;
};

/* -1: go on; else the exit status. */
static int parse_arguments(struct run *run, int argc, char **argv)
{
    struct option table[REQUEST_N_OPTIONS + 1] = {{"no-stdin", no_argument, NULL, 'n'}};
    const struct verb_options options = {.letters = "n", .options = table, .help = help};
    int c, status = STATUS_OK;

    request_options(table + 1);
    while ((c = next_option(&options, argc, argv, &status)) >= 0) {
        if (c == 'n')
            run->no_stdin = true;
        else
            status = request_take(&run->request, c, optarg);
        if (status != STATUS_OK)
            return status;
    }
    if (c == OPTION_STOP)
        return status;
    status = request_check(&run->request);
    return status == STATUS_OK ? -1 : status;
}

/* ---- the answer ---- */

static int ask(struct run *run, struct answer *a)
{
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    struct llm_connection *connection = NULL;
    struct llm_session *session = NULL;
    struct llm_error err;
    int status, fd, r;

    status = request_make(&run->request, run->request.instructions, run->prompt.data, run->prompt.n,
                          &options);
    if (status == STATUS_OK)
        status = request_connect(&run->request, &connection, &session);
    if (status == STATUS_OK) {
        r = llm_session_generate(session, options, &fd, NULL, &err);
        if (r == 0)
            status = answer_read(a, fd, NULL, NULL);
        else
            status = complain(status_of(r), "%s", answer_refusal_text(&err, a->hint));
    }
    if (status == STATUS_TIMEOUT)
        complain(status, "no answer within the time given");
    if (status == STATUS_OK && strcmp(a->reason, "cancelled") == 0)
        status = complain(STATUS_FAILED, "the request was cancelled");
    if (status == STATUS_OK && request_is_cut(&run->request, a->reason))
        note("the answer is cut: the context is full");
    llm_session_free(session);
    llm_disconnect(connection);
    return status;
}

int verb_run(int argc, char **argv)
{
    struct run run = {0};
    struct answer answer = {
        .output = ANSWER_TEXT,
        .hint = "shorten it, or ask for more with --context",
    };
    int status;

    status = parse_arguments(&run, argc, argv);
    if (status == -1) {
        deadlines_begin(global.timeout_usec);
        if (global.session)
            answer.hint = "shorten it, or go on in another session";
        if (global.json != JSON_OFF)
            answer.output = ANSWER_RECORDS;
        else if (isatty(STDOUT_FILENO))
            answer.output = ANSWER_TERMINAL;
        status = prompt_read(&run.prompt, argc, argv, !run.no_stdin);
        if (status == STATUS_OK)
            status = ask(&run, &answer);
        if (answer.newline_due) { /* a text's last line ends, as everywhere; --json has the bytes */
            int ended = output_put("\n", 1);

            status = status == STATUS_OK ? ended : status;
        }
    }
    answer_done(&answer);
    buffer_done(&run.prompt);
    request_done(&run.request);
    return status;
}
