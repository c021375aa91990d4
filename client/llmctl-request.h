/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/* request: the options of run, chat and map that say how an answer is to be made. */

#include <getopt.h>

#include "client/llmctl.h"

#define REQUEST_N_OPTIONS 24  /* at most, the zeros at the end included */
#define REQUEST_OPTION 0x8000 /* values of those options are this and up; below OPTION_GLOBAL */

#define REQUEST_HELP                                                                           \
    "      --instructions=TEXT        how to answer, for the model\n"                          \
    "      --raw                      prompts as they are, without chat template\n"            \
    "      --max-tokens=N             most tokens of an answer\n"                              \
    "      --temperature=X            0: always the most probable token\n"                     \
    "      --top-k=N, --top-p=X, --min-p=X\n"                                                  \
    "      --repetition-penalty=X, --presence-penalty=X, --frequency-penalty=X\n"              \
    "      --penalty-last-n=N         tokens that the penalties look back\n"                   \
    "      --seed=N                   the same answer again\n"                                 \
    "      --deterministic[=no]       computed on one device only; default: with --seed\n"     \
    "      --stop=TEXT                end before this text; may be given several times\n"      \
    "      --logprobs                 with --json: each token's log-probability\n"             \
    "      --top-logprobs=N           and so many alternatives\n"                              \
    "      --ignore-end               go on past the end of the answer\n"                      \
    "      --context=N                tokens the conversation may hold\n"                      \
    "      --class=CLASS              interactive, batch or idle: who goes first\n"            \
    "      --model=MODEL              a file or a name: the model that must answer; for a\n"   \
    "                                 daemon that is started, default $LLMD_MODEL, else the\n" \
    "                                 installed one\n"                                         \
    "      --no-start                 do not start a daemon\n"

struct request_setting {
    size_t option; /* its place in the table */
    double number;
    uint64_t integer;
    const char *text; /* as given; borrowed */
};

struct request {
    struct start_options start;
    const char *instructions; /* NULL: none */
    const char *class;        /* NULL: the daemon's default */
    uint32_t context;         /* 0: the daemon's default */
    bool raw;
    struct request_setting *settings; /* [n_settings], owned */
    size_t n_settings;
};

void request_done(struct request *q);

/* Fills in the options, followed by zeros. */
void request_options(struct option ret[REQUEST_N_OPTIONS]);
/* Takes what next_option() gave. STATUS_OK, or a complaint was made. */
int request_take(struct request *q, int c, const char *value);
/* After the last of them, whether they go together. */
int request_check(const struct request *q);

/*
 * Sets, or with value NULL unsets, an option of Generate by its name; lists are added to. The value
 * must live as long as q. -1: there is no such option
 */
int request_set(struct request *q, const char *name, const char *value);
/* The i-th of Generate's options, or NULL. */
const char *request_option_name(size_t i);

/* Whether an answer that ended for that reason is shorter than anybody asked for. */
bool request_is_cut(const struct request *q, const char *reason);

/* Whether what is asked will be; so what goes before it should be too. */
bool request_is_deterministic(const struct request *q);

/* Options of Generate with this prompt; system: the first message, or NULL. */
int request_make(const struct request *q, const char *system, const char *prompt, size_t n,
                 struct llm_options **ret);
/* Options of CreateSession. model: or NULL */
int request_make_session(const struct request *q, const char *model, struct llm_options **ret);

/*
 * Connects, then opens the session of --session, or makes one. *ret_session and *ret_connection are
 * the caller's, also where this fails.
 */
int request_connect(const struct request *q, struct llm_connection **ret_connection,
                    struct llm_session **ret_session);
