/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#include "daemon/options.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "engine/model.h"
#include "ipc/names.h"

struct option {
    const char *name;
    const char *signature;
    int (*read)(sd_bus_message *m, const struct option *o, void *target, struct error *err);
    size_t offset;          /* in target, for the plain ones */
    double least, most;     /* "d" */
    double gap;             /* "d": values above `least` and below this are refused */
    uint32_t most_integer;  /* "u", 0: any; "s": bytes */
    uint32_t least_integer; /* "u" */
};

#define OPTIONS_MAX 32 /* of one table */

/* ---- what every table uses ---- */

/* Walks a{sv}. The caller's message is at the array. */
static int read_options(sd_bus_message *m, const struct option *table, size_t n_table, void *target,
                        struct error *err)
{
    uint32_t seen = 0;
    int r;

    _Static_assert(OPTIONS_MAX <= 32, "seen is a set of bits");
    r = sd_bus_message_enter_container(m, 'a', "{sv}");
    if (r < 0)
        goto malformed;
    while ((r = sd_bus_message_enter_container(m, 'e', "sv")) > 0) {
        const char *name, *contents;
        size_t i = 0;
        char type;

        if ((r = sd_bus_message_read(m, "s", &name)) < 0 ||
            (r = sd_bus_message_peek_type(m, &type, &contents)) < 0)
            goto malformed;
        while (i < n_table && strcmp(table[i].name, name) != 0)
            i++;
        if (i == n_table)
            return error_set(err, EINVAL, "%s: there is no such option", name);
        if (strcmp(contents, table[i].signature) != 0)
            return error_set(err, EINVAL, "%s: has type %s, wanted is %s", name, contents,
                             table[i].signature);
        if (seen & (1u << i))
            return error_set(err, EINVAL, "%s: is given twice", name);
        seen |= 1u << i;

        if ((r = sd_bus_message_enter_container(m, 'v', contents)) < 0)
            goto malformed;
        r = table[i].read(m, &table[i], target, err);
        if (r == -EBADMSG || r == -ENXIO)
            goto malformed;
        if (r < 0)
            return r;
        if ((r = sd_bus_message_exit_container(m)) < 0 ||
            (r = sd_bus_message_exit_container(m)) < 0)
            goto malformed;
    }
    if (r < 0 || (r = sd_bus_message_exit_container(m)) < 0)
        goto malformed;
    return 0;

malformed:
    return r == -ENOMEM ? r : error_set(err, EINVAL, "the options cannot be read");
}

static int read_double(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    double v;
    int r = sd_bus_message_read(m, "d", &v);

    if (r < 0)
        return r;
    if (!(v >= o->least && v <= o->most) || (v > o->least && v < o->gap)) {
        if (o->gap > 0)
            return error_set(err, EINVAL, "%s: %g is neither %g nor within %g to %g", o->name, v,
                             o->least, o->gap, o->most);
        return error_set(err, EINVAL, "%s: %g is not within %g to %g", o->name, v, o->least,
                         o->most);
    }
    *(float *)((char *)target + o->offset) = (float)v;
    return 0;
}

static int read_u32(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    uint32_t v;
    int r = sd_bus_message_read(m, "u", &v);

    if (r < 0)
        return r;
    if (o->most_integer > 0 && v > o->most_integer)
        return error_set(err, EINVAL, "%s: %u is more than %u", o->name, v, o->most_integer);
    if (v < o->least_integer)
        return error_set(err, EINVAL, "%s: %u is less than %u", o->name, v, o->least_integer);
    *(uint32_t *)((char *)target + o->offset) = v;
    return 0;
}

static int read_u64(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    (void)err;
    return sd_bus_message_read(m, "t", (uint64_t *)((char *)target + o->offset));
}

static int read_bool(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    int v, r = sd_bus_message_read(m, "b", &v);

    (void)err;
    if (r < 0)
        return r;
    *(bool *)((char *)target + o->offset) = v;
    return 0;
}

static int read_string(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    char **place = (char **)((char *)target + o->offset);
    const char *v;
    int r = sd_bus_message_read_basic(m, o->signature[0], &v); /* "s", or "o" */

    (void)err;
    if (r < 0)
        return r;
    *place = strdup(v);
    return *place ? 0 : -ENOMEM;
}

/* ---- what has a prompt: Session.Generate, Session.Append, Manager.Measure ---- */

struct generate {
    struct job_request request;
    size_t prompt_bytes; /* of all messages */
    bool has_messages, has_text, has_fd, logprobs, has_seed, has_deterministic;
    char *text; /* of prompt or prompt-fd: [n_text] */
    size_t n_text;
    struct generation_options options; /* request.options in the making */
    bool raw;
    char *session; /* measure; owned */
};

static void generate_done(struct generate *g)
{
    if (g->text)
        explicit_bzero(g->text, g->n_text);
    free(g->text);
    free(g->session);
    job_request_done(&g->request);
}

static int charge(struct generate *g, size_t n, struct error *err)
{
    if (ckd_add(&g->prompt_bytes, g->prompt_bytes, n) || g->prompt_bytes > LLM_PROMPT_BYTES_MAX)
        return error_set(err, E2BIG, "the prompt has more than %u bytes", LLM_PROMPT_BYTES_MAX);
    return 0;
}

static int read_prompt(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    struct generate *g = target;
    const char *v;
    int r = sd_bus_message_read(m, "s", &v);

    if (r < 0)
        return r;
    if (g->has_text)
        return error_set(err, EINVAL, "%s: prompt and prompt-fd are alternatives", o->name);
    g->n_text = strlen(v);
    r = charge(g, g->n_text, err);
    if (r < 0)
        return r;
    g->text = strdup(v);
    if (!g->text)
        return -ENOMEM;
    g->has_text = true;
    return 0;
}

/*
 * A memfd is the one file whose reading never waits for anybody, so this may happen on the loop
 * thread. It is copied, so that it need not be sealed; one that shrinks meanwhile ends earlier.
 */
static int read_prompt_fd(sd_bus_message *m, const struct option *o, void *target,
                          struct error *err)
{
    struct generate *g = target;
    struct stat st;
    size_t n = 0;
    int fd, r;

    r = sd_bus_message_read(m, "h", &fd); /* the message's own */
    if (r < 0)
        return r;
    if (g->has_text)
        return error_set(err, EINVAL, "%s: prompt and prompt-fd are alternatives", o->name);
    if (fcntl(fd, F_GET_SEALS) < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        return error_set(err, EBADF, "%s: is not a memfd", o->name);
    if (st.st_size < 0 || (uint64_t)st.st_size > LLM_PROMPT_BYTES_MAX)
        return charge(g, SIZE_MAX / 2, err);
    r = charge(g, (size_t)st.st_size, err);
    if (r < 0)
        return r;
    g->text = malloc((size_t)st.st_size + 1);
    if (!g->text)
        return -ENOMEM;
    g->has_text = true;
    while (n < (size_t)st.st_size) {
        ssize_t got = pread(fd, g->text + n, (size_t)st.st_size - n, (off_t)n);

        if (got < 0)
            return error_set(err, EBADF, "%s: cannot be read: %s", o->name, strerror(errno));
        if (got == 0)
            break;
        n += (size_t)got;
        g->n_text = n;
    }
    return 0;
}

static int add_message(struct generate *g, enum chat_role role, char *text, size_t n)
{
    struct job_message *grown;

    grown = reallocarray(g->request.messages, g->request.n_messages + 1, sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    g->request.messages = grown;
    grown[g->request.n_messages++] = (struct job_message){role, text, n};
    return 0;
}

static int read_messages(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    struct generate *g = target;
    const char *role_name, *text;
    int r;

    r = sd_bus_message_enter_container(m, 'a', "(ss)");
    if (r < 0)
        return r;
    g->has_messages = true;
    while ((r = sd_bus_message_read(m, "(ss)", &role_name, &text)) > 0) {
        CLEANUP(freep) char *copy = NULL;
        enum chat_role role;
        size_t n = strlen(text);

        if (chat_role_parse(role_name, &role) < 0)
            return error_set(err, EBADF, "%s: '%.32s' is no role; there are system, user and model",
                             o->name, role_name);
        if (g->request.n_messages == LLM_MESSAGES_MAX)
            return error_set(err, E2BIG, "%s: more than %u", o->name, LLM_MESSAGES_MAX);
        r = charge(g, n, err);
        if (r < 0)
            return r;
        copy = strdup(text);
        if (!copy)
            return -ENOMEM;
        r = add_message(g, role, copy, n);
        if (r < 0)
            return r;
        copy = NULL;
    }
    return r < 0 ? r : sd_bus_message_exit_container(m);
}

static int read_format(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    struct generate *g = target;
    const char *v;
    int r = sd_bus_message_read(m, "s", &v);

    if (r < 0)
        return r;
    if (strcmp(v, "json") == 0)
        g->request.format = JOB_RECORDS;
    else if (strcmp(v, "text") == 0)
        g->request.format = JOB_TEXT;
    else
        return error_set(err, EINVAL, "%s: '%.32s' is neither json nor text", o->name, v);
    return 0;
}

static int read_stop(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    struct generate *g = target;
    const char *v;
    int r;

    r = sd_bus_message_enter_container(m, 'a', "s");
    if (r < 0)
        return r;
    g->request.stop = calloc(LLM_STOP_MAX, sizeof(char *));
    if (!g->request.stop)
        return -ENOMEM;
    while ((r = sd_bus_message_read(m, "s", &v)) > 0) {
        size_t n = strlen(v);

        if (g->request.options.n_stop == LLM_STOP_MAX)
            return error_set(err, EINVAL, "%s: more than %u texts", o->name, LLM_STOP_MAX);
        if (n == 0 || n > LLM_STOP_BYTES_MAX)
            return error_set(err, EINVAL, "%s: a text of %zu bytes; 1 to %u are allowed", o->name,
                             n, LLM_STOP_BYTES_MAX);
        g->request.stop[g->request.options.n_stop] = strdup(v);
        if (!g->request.stop[g->request.options.n_stop])
            return -ENOMEM;
        g->request.options.n_stop++;
    }
    return r < 0 ? r : sd_bus_message_exit_container(m);
}

static int read_logit_bias(sd_bus_message *m, const struct option *o, void *target,
                           struct error *err)
{
    struct generate *g = target;
    size_t n = 0;
    uint32_t id;
    double bias;
    int r;

    r = sd_bus_message_enter_container(m, 'a', "{ud}");
    if (r < 0)
        return r;
    g->request.bias = calloc(LLM_LOGIT_BIAS_MAX, sizeof(*g->request.bias));
    if (!g->request.bias)
        return -ENOMEM;
    while ((r = sd_bus_message_read(m, "{ud}", &id, &bias)) > 0) {
        if (n == LLM_LOGIT_BIAS_MAX)
            return error_set(err, EINVAL, "%s: more than %u tokens", o->name, LLM_LOGIT_BIAS_MAX);
        if (isnan(bias) || bias == (double)INFINITY)
            return error_set(err, EINVAL, "%s: %g for token %u", o->name, bias, id);
        g->request.bias[n++] = (struct logit_bias){id, (float)bias};
    }
    g->options.sampler.n_bias = n;
    return r < 0 ? r : sd_bus_message_exit_container(m);
}

static int read_seed(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    ((struct generate *)target)->has_seed = true;
    return read_u64(m, o, target, err);
}

static int read_deterministic(sd_bus_message *m, const struct option *o, void *target,
                              struct error *err)
{
    ((struct generate *)target)->has_deterministic = true;
    return read_bool(m, o, target, err);
}

#define SAMPLER(field) offsetof(struct generate, options.sampler.field)
#define OPTION(field) offsetof(struct generate, options.field)

static const struct option generate_options[] = {
    {"prompt", "s", read_prompt},
    {"prompt-fd", "h", read_prompt_fd},
    {"messages", "a(ss)", read_messages},
    {"raw", "b", read_bool, offsetof(struct generate, raw)},
    {"format", "s", read_format},
    {"max-tokens", "u", read_u32, OPTION(max_tokens)},
    {"temperature", "d", read_double, SAMPLER(temperature), .most = 100, .gap = 0.01},
    {"top-k", "u", read_u32, SAMPLER(top_k)},
    {"top-p", "d", read_double, SAMPLER(top_p), .most = 1},
    {"min-p", "d", read_double, SAMPLER(min_p), .most = 1},
    {"repetition-penalty", "d", read_double, SAMPLER(repetition_penalty), 0.01, 100},
    {"presence-penalty", "d", read_double, SAMPLER(presence_penalty), -100, 100},
    {"frequency-penalty", "d", read_double, SAMPLER(frequency_penalty), -100, 100},
    {"penalty-last-n", "u", read_u32, SAMPLER(penalty_last_n)},
    {"seed", "t", read_seed, SAMPLER(seed)},
    {"deterministic", "b", read_deterministic, offsetof(struct generate, request.deterministic)},
    {"stop", "as", read_stop},
    {"logit-bias", "a{ud}", read_logit_bias},
    {"logprobs", "b", read_bool, offsetof(struct generate, logprobs)},
    {"top-logprobs", "u", read_u32, SAMPLER(n_logprobs), .most_integer = LLM_TOP_LOGPROBS_MAX},
    {"ignore-end", "b", read_bool, OPTION(ignore_end)},
};

static const struct option append_options[] = {
    {"prompt", "s", read_prompt},
    {"prompt-fd", "h", read_prompt_fd},
    {"messages", "a(ss)", read_messages},
    {"raw", "b", read_bool, offsetof(struct generate, raw)},
    {"format", "s", read_format},
    {"deterministic", "b", read_deterministic, offsetof(struct generate, request.deterministic)},
};

static const struct option measure_options[] = {
    {"prompt", "s", read_prompt},
    {"prompt-fd", "h", read_prompt_fd},
    {"messages", "a(ss)", read_messages},
    {"raw", "b", read_bool, offsetof(struct generate, raw)},
    {"session", "o", read_string, offsetof(struct generate, session)},
};

_Static_assert(ARRAY_SIZE(generate_options) <= OPTIONS_MAX, "read_options() counts on it");
_Static_assert(LLM_TOP_LOGPROBS_MAX <= SAMPLER_MAX_LOGPROBS, "the bus promises no more");

static int combine(struct generate *g, struct error *err)
{
    int r;

    if (g->raw && g->has_messages)
        return error_set(err, EINVAL, "raw: a raw prompt has no messages");
    if (g->has_text) {
        r = add_message(g, CHAT_USER, g->text, g->n_text);
        if (r < 0)
            return r;
        g->text = NULL;
    }
    if (g->request.n_messages == 0)
        return error_set(err, EBADF, "there is no prompt: give prompt, prompt-fd or messages");

    g->request.raw = g->raw;
    if (!g->has_deterministic) /* who gives a seed wants the same again */
        g->request.deterministic = g->has_seed;
    g->options.logprobs = g->logprobs || g->options.sampler.n_logprobs > 0;
    g->options.stop = (const char *const *)g->request.stop;
    g->options.n_stop = g->request.options.n_stop;
    g->options.sampler.bias = g->request.bias;
    g->request.options = g->options;
    return 0;
}

int options_read_generate(sd_bus_message *m, const struct model_generation *defaults,
                          struct job_request *ret, struct error *err)
{
    struct generate g = {0};
    int r;

    g.options.sampler.temperature = defaults->temperature;
    g.options.sampler.top_k = defaults->top_k;
    g.options.sampler.top_p = defaults->top_p;
    if (getrandom(&g.options.sampler.seed, sizeof(g.options.sampler.seed), 0) < 0)
        return error_set(err, errno, "no random numbers: %s", strerror(errno));

    r = read_options(m, generate_options, ARRAY_SIZE(generate_options), &g, err);
    if (r == 0)
        r = combine(&g, err);
    if (r == 0) {
        *ret = g.request;
        g.request = (struct job_request){0};
    }
    generate_done(&g);
    return r;
}

int options_read_append(sd_bus_message *m, struct job_request *ret, struct error *err)
{
    struct generate g = {.request.kind = JOB_APPEND};
    int r;

    r = read_options(m, append_options, ARRAY_SIZE(append_options), &g, err);
    if (r == 0)
        r = combine(&g, err);
    if (r == 0) {
        *ret = g.request;
        g.request = (struct job_request){0};
    }
    generate_done(&g);
    return r;
}

int options_read_measure(sd_bus_message *m, struct job_request *ret, char **ret_session,
                         struct error *err)
{
    struct generate g = {.request.kind = JOB_MEASURE};
    int r;

    r = read_options(m, measure_options, ARRAY_SIZE(measure_options), &g, err);
    if (r == 0)
        r = combine(&g, err);
    if (r == 0) {
        *ret = g.request;
        g.request = (struct job_request){0};
        *ret_session = g.session;
        g.session = NULL;
    }
    generate_done(&g);
    return r;
}

/* ---- Manager.CreateSession, Session.Fork ---- */

/* People see it in lists, on terminals. */
static int read_label(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    struct session_options *s = target;
    const char *v;
    int r = sd_bus_message_read(m, "s", &v);

    if (r < 0)
        return r;
    if (strlen(v) > LLM_LABEL_BYTES_MAX)
        return error_set(err, EINVAL, "%s: %zu bytes; %u are allowed", o->name, strlen(v),
                         LLM_LABEL_BYTES_MAX);
    for (const char *c = v; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            return error_set(err, EINVAL, "%s: has a control character", o->name);
    s->label = strdup(v);
    return s->label ? 0 : -ENOMEM;
}

static int read_class(sd_bus_message *m, const struct option *o, void *target, struct error *err)
{
    struct session_options *s = target;
    const char *v;
    int r = sd_bus_message_read(m, "s", &v);

    if (r < 0)
        return r;
    if (scheduler_class_parse(v, &s->class) < 0)
        return error_set(err, EINVAL, "%s: '%.32s' is neither interactive, batch nor idle", o->name,
                         v);
    return 0;
}

static const struct option session_table[] = {
    {"model", "s", read_string, offsetof(struct session_options, model)},
    {"context", "u", read_u32, offsetof(struct session_options, context)},
    {"class", "s", read_class},
    {"label", "s", read_label},
    {"linger", "b", read_bool, offsetof(struct session_options, linger)},
};

static const struct option fork_table[] = {
    {"class", "s", read_class},
    {"label", "s", read_label},
    {"linger", "b", read_bool, offsetof(struct session_options, linger)},
};

void session_options_done(struct session_options *o)
{
    free(o->model);
    free(o->label);
    *o = (struct session_options){0};
}

int options_read_session(sd_bus_message *m, struct session_options *ret, struct error *err)
{
    struct session_options o = {0};
    int r;

    r = read_options(m, session_table, ARRAY_SIZE(session_table), &o, err);
    if (r < 0)
        session_options_done(&o);
    else
        *ret = o;
    return r;
}

int options_read_fork(sd_bus_message *m, struct session_options *io, struct error *err)
{
    return read_options(m, fork_table, ARRAY_SIZE(fork_table), io, err);
}

/* ---- the rest of the Manager ---- */

static const struct option quota_table[] = {
    {"max-sessions", "u", read_u32, offsetof(struct user_limits, max_sessions)},
    {"max-kv-bytes", "t", read_u64, offsetof(struct user_limits, max_kv_bytes)},
    {"max-queued", "u", read_u32, offsetof(struct user_limits, max_queued)},
    {"weight", "u", read_u32, offsetof(struct user_limits, weight), .least_integer = 1,
     .most_integer = USER_WEIGHT_MAX},
    {"tokens-per-minute", "u", read_u32, offsetof(struct user_limits, tokens_per_minute)},
};

int options_read_quota(sd_bus_message *m, struct user_limits *io, struct error *err)
{
    return read_options(m, quota_table, ARRAY_SIZE(quota_table), io, err);
}

static const struct option install_table[] = {
    {"replace", "b", read_bool, offsetof(struct install_options, replace)},
    {"default", "b", read_bool, offsetof(struct install_options, set_default)},
};

int options_read_install(sd_bus_message *m, struct install_options *ret, struct error *err)
{
    struct install_options o = {0};
    int r;

    r = read_options(m, install_table, ARRAY_SIZE(install_table), &o, err);
    if (r == 0)
        *ret = o;
    return r;
}

int options_read_all(sd_bus_message *m, bool *ret_all, struct error *err)
{
    static const struct option table[] = {{"all", "b", read_bool}};

    *ret_all = false;
    return read_options(m, table, ARRAY_SIZE(table), ret_all, err);
}

int options_read_none(sd_bus_message *m, struct error *err)
{
    return read_options(m, NULL, 0, NULL, err);
}
