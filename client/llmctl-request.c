/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "client/llmctl-request.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/number.h"

DEFINE_CLEANUP(struct llm_options *, llm_options_free)

static const struct {
    const char *name; /* on the bus and here */
    char type;        /* of a{sv}: d, u, t, b; A: as; B: b, and may be told to be no */
} generate_options[] = {
    {"max-tokens", 'u'},
    {"temperature", 'd'},
    {"top-k", 'u'},
    {"top-p", 'd'},
    {"min-p", 'd'},
    {"repetition-penalty", 'd'},
    {"presence-penalty", 'd'},
    {"frequency-penalty", 'd'},
    {"penalty-last-n", 'u'},
    {"seed", 't'},
    {"deterministic", 'B'},
    {"stop", 'A'},
    {"logprobs", 'b'},
    {"top-logprobs", 'u'},
    {"ignore-end", 'b'},
};

#define N_GENERATE_OPTIONS ARRAY_SIZE(generate_options)

enum {
    OPT_GENERATE = REQUEST_OPTION, /* and up, by place in generate_options */
    OPT_INSTRUCTIONS = REQUEST_OPTION + 0x100,
    OPT_RAW,
    OPT_MODEL,
    OPT_NO_START,
    OPT_CONTEXT,
    OPT_CLASS,
};

static const struct option own_options[] = {
    {"instructions", required_argument, NULL, OPT_INSTRUCTIONS},
    {"raw", no_argument, NULL, OPT_RAW},
    {"model", required_argument, NULL, OPT_MODEL},
    {"no-start", no_argument, NULL, OPT_NO_START},
    {"context", required_argument, NULL, OPT_CONTEXT},
    {"class", required_argument, NULL, OPT_CLASS},
};

static_assert(N_GENERATE_OPTIONS + ARRAY_SIZE(own_options) < REQUEST_N_OPTIONS, "no room");

void request_done(struct request *q)
{
    free(q->settings);
}

void request_options(struct option ret[REQUEST_N_OPTIONS])
{
    size_t n = 0;

    memset(ret, 0, REQUEST_N_OPTIONS * sizeof(ret[0]));
    for (size_t i = 0; i < N_GENERATE_OPTIONS; i++)
        ret[n++] = (struct option){
            .name = generate_options[i].name,
            .has_arg = generate_options[i].type == 'b'   ? no_argument
                       : generate_options[i].type == 'B' ? optional_argument
                                                         : required_argument,
            .val = OPT_GENERATE + (int)i,
        };
    memcpy(ret + n, own_options, sizeof(own_options));
}

static int set(struct request *q, size_t option, const char *value)
{
    struct request_setting s = {.option = option, .text = value}, *grown;
    const char *name = generate_options[option].name;
    bool number_ok = true, integer_ok = true;

    switch (generate_options[option].type) {
    case 'u':
        integer_ok = number_parse(value, UINT32_MAX, &s.integer) == 0;
        break;
    case 't':
        integer_ok = number_parse(value, UINT64_MAX, &s.integer) == 0;
        break;
    case 'd':
        number_ok = parse_double(value, &s.number);
        break;
    case 'b':
        s.integer = 1;
        break;
    case 'B':
        s.integer = !value || strcmp(value, "yes") == 0;
        if (!s.integer && strcmp(value, "no") != 0)
            return usage_error("%s is yes or no, not %s", name, value);
        break;
    case 'A':
        break;
    }
    if (!number_ok)
        return usage_error("%s wants a number, not %s", name, value);
    if (!integer_ok)
        return usage_error("%s wants a whole number, not %s", name, value);
    if (generate_options[option].type != 'A')
        for (size_t i = 0; i < q->n_settings; i++)
            if (q->settings[i].option == option) { /* the last one counts */
                q->settings[i] = s;
                return STATUS_OK;
            }
    grown = reallocarray(q->settings, q->n_settings + 1, sizeof(*grown));
    if (!grown)
        return complain(STATUS_FAILED, "out of memory");
    q->settings = grown;
    grown[q->n_settings++] = s;
    return STATUS_OK;
}

static void unset(struct request *q, size_t option)
{
    size_t n = 0;

    for (size_t i = 0; i < q->n_settings; i++)
        if (q->settings[i].option != option)
            q->settings[n++] = q->settings[i];
    q->n_settings = n;
}

int request_set(struct request *q, const char *name, const char *value)
{
    for (size_t i = 0; i < N_GENERATE_OPTIONS; i++) {
        if (strcmp(generate_options[i].name, name) != 0)
            continue;
        if (value)
            return set(q, i, value);
        unset(q, i);
        return STATUS_OK;
    }
    return -1;
}

const char *request_option_name(size_t i)
{
    return i < N_GENERATE_OPTIONS ? generate_options[i].name : NULL;
}

int request_take(struct request *q, int c, const char *value)
{
    uint64_t integer;

    switch (c) {
    case OPT_INSTRUCTIONS:
        q->instructions = value;
        return STATUS_OK;
    case OPT_RAW:
        q->raw = true;
        return STATUS_OK;
    case OPT_MODEL:
        q->start.model = value;
        return STATUS_OK;
    case OPT_NO_START:
        q->start.no_start = true;
        return STATUS_OK;
    case OPT_CONTEXT:
        if (number_parse(value, UINT32_MAX, &integer) < 0 || integer == 0)
            return usage_error("--context wants a number of tokens, not %s", value);
        q->context = (uint32_t)integer;
        return STATUS_OK;
    case OPT_CLASS:
        if (strcmp(value, "interactive") != 0 && strcmp(value, "batch") != 0 &&
            strcmp(value, "idle") != 0)
            return usage_error("--class wants interactive, batch or idle, not %s", value);
        q->class = value;
        return STATUS_OK;
    default:
        return set(q, (size_t)(c - OPT_GENERATE), value);
    }
}

int request_check(const struct request *q)
{
    if (q->raw && q->instructions)
        return usage_error("--raw and --instructions exclude each other");
    if (global.session && (q->context || q->class || q->start.model))
        return usage_error("--session is there already: it has its own --context, --class and "
                           "--model");
    return STATUS_OK;
}

bool request_is_cut(const struct request *q, const char *reason)
{
    if (strcmp(reason, "length") != 0)
        return false;
    for (size_t i = 0; i < q->n_settings; i++)
        if (strcmp(generate_options[q->settings[i].option].name, "max-tokens") == 0)
            return false;
    return true;
}

bool request_is_deterministic(const struct request *q)
{
    bool has_seed = false;

    for (size_t i = 0; i < q->n_settings; i++) {
        const char *name = generate_options[q->settings[i].option].name;

        if (strcmp(name, "deterministic") == 0)
            return q->settings[i].integer != 0;
        has_seed = has_seed || strcmp(name, "seed") == 0;
    }
    return has_seed;
}

static int add_setting(struct llm_options *o, const struct request_setting *s)
{
    const char *name = generate_options[s->option].name;

    switch (generate_options[s->option].type) {
    case 'u':
        return llm_options_set_uint32(o, name, (uint32_t)s->integer);
    case 't':
        return llm_options_set_uint64(o, name, s->integer);
    case 'd':
        return llm_options_set_double(o, name, s->number);
    case 'b':
    case 'B':
        return llm_options_set_bool(o, name, s->integer != 0);
    default:
        return llm_options_add_string(o, name, s->text);
    }
}

int request_make(const struct request *q, const char *system, const char *prompt, size_t n,
                 struct llm_options **ret)
{
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    int r;

    r = llm_options_new(&o);
    if (r == 0 && system)
        r = llm_options_add_message(o, "system", system);
    if (r == 0 && q->raw)
        r = llm_options_set_bool(o, "raw", true);
    for (size_t i = 0; i < q->n_settings && r == 0; i++)
        r = add_setting(o, &q->settings[i]);
    if (r == 0)
        r = llm_options_set_memory(o, "prompt-fd", prompt, n);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    *ret = TAKE_PTR(o);
    return STATUS_OK;
}

int request_make_session(const struct request *q, const char *model, struct llm_options **ret)
{
    CLEANUP(llm_options_freep) struct llm_options *o = NULL;
    int r;

    r = llm_options_new(&o);
    if (r == 0 && model)
        r = llm_options_set_string(o, "model", model);
    if (r == 0 && q->context)
        r = llm_options_set_uint32(o, "context", q->context);
    if (r == 0 && q->class)
        r = llm_options_set_string(o, "class", q->class);
    if (r < 0)
        return complain(STATUS_FAILED, "%s", strerror(-r));
    *ret = TAKE_PTR(o);
    return STATUS_OK;
}

int request_connect(const struct request *q, struct llm_connection **ret_connection,
                    struct llm_session **ret_session)
{
    CLEANUP(llm_options_freep) struct llm_options *options = NULL;
    CLEANUP(freep) char *model = NULL;
    struct llm_error err;
    int r, status;

    if (global.session) { /* a daemon that is started now has none */
        status = connect_running(ret_connection);
        if (status != STATUS_OK)
            return status;
        r = llm_session_open(ret_session, *ret_connection, global.session, &err);
    } else {
        status = connect_or_start(&q->start, ret_connection, &model);
        if (status == STATUS_OK)
            status = request_make_session(q, model, &options);
        if (status != STATUS_OK)
            return status;
        r = llm_session_new(ret_session, *ret_connection, options, &err);
    }
    return r < 0 ? complain(status_of(r), "%s", err.message) : STATUS_OK;
}
