/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * log: what the daemon has to say to its administrator. With fields when standard error is the
 * journal; else lines there, with the journal's priority prefixes ("<6>") unless it is a terminal.
 * The only place that logs is daemon/, and no prompt or completion text is ever passed here. Any
 * thread.
 */

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <syslog.h> /* LOG_ERR, LOG_WARNING, LOG_NOTICE, LOG_INFO, LOG_DEBUG */

/* Nothing less urgent than that is logged. LOG_INFO unless told otherwise. */
void log_set_level(int priority);

void log_line(int priority, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...) log_line(LOG_ERR, __VA_ARGS__)
#define log_warning(...) log_line(LOG_WARNING, __VA_ARGS__)
#define log_notice(...) log_line(LOG_NOTICE, __VA_ARGS__)
#define log_info(...) log_line(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_line(LOG_DEBUG, __VA_ARGS__)

/* Where lines go that do not come from here: to the journal; else with or without a priority. */
bool log_goes_to_journal(void);
bool log_has_prefixes(void);

/* What a message is about: journal fields besides MESSAGE= and PRIORITY=. Zero: does not apply. */
struct log_fields {
    const char *message_id; /* LOG_ID_...: MESSAGE_ID= */
    bool has_uid;
    uid_t uid;                                 /* LLMD_UID= */
    uint64_t session, request;                 /* LLMD_SESSION=, LLMD_REQUEST= */
    uint64_t prompt_tokens, completion_tokens; /* LLMD_PROMPT_TOKENS=, LLMD_COMPLETION_TOKENS= */
    const char *model;                         /* LLMD_MODEL= */
    bool has_pressure;
    unsigned pressure; /* LLMD_PRESSURE= */
};

void log_with(int priority, const struct log_fields *fields, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* For lines that others can bring about as often as they like; zero at first. */
struct log_limit {
    uint64_t since; /* CLOCK_MONOTONIC */
    uint32_t n, n_untold;
};

/* Whether this one is to be written; *ret_untold: of so many before it was not, to be told first.
 */
bool log_limit_pass(struct log_limit *l, uint32_t *ret_untold);

/* docs/man/llmd.8 lists them. */
#define LOG_ID_READY "ebd92389b4a6494e8d71b614d9cd9918"
#define LOG_ID_STOPPING "1c390cd49aad4c4eb22b4c9167cbcc5e"
#define LOG_ID_MODEL_FAILED "b5abe3a92c1c4a2c86ad07959461f7a2"
#define LOG_ID_MODEL_CHANGED "8d2f04be2d5347e4b3d1ac5f2cf9b7a4"
#define LOG_ID_MEMORY_PRESSURE "5f1d0c4b6c0f4f5d8a0f4a6b7e92d3c1"
#define LOG_ID_GPU "edba7f406ba445d594c99716af989f4e"
#define LOG_ID_SPILL_FAILED "c7a6a2f0a2a94f1bb3f6d2f6f5f0b8ee"
#define LOG_ID_REQUEST_FINISHED "0e840b98b1e54562972e4eecb8c49a7a"
#define LOG_ID_CONNECTION_REFUSED "25f6d85b93af499997fba9d360461bfb"
#define LOG_ID_CONFIG_RELOADED "b9274fd275094381931190d18df411e7"
#define LOG_ID_CONFIG_REFUSED "c415833e3dad4b4eac72806dbea6c374"
#define LOG_ID_BUS_LOST "95f95a74f07f48ceb43ee34815281ecc"
#define LOG_ID_SANDBOX "bbeb82e44517460f9428aefdbe10ba61"
#define LOG_ID_NO_POLKIT "4745baa4799048e183bcba7100ec1cc2"
#define LOG_ID_SESSION_LOST "117750e1a02144c690cf8de94b61cf49"
#define LOG_ID_TAKEN_BACK "f4a72a4090ba41dda591dea973690f92"
