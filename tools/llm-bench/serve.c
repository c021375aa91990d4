/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llm-bench serve: what clients of the daemon feel. Each client is a process (worker.h); this one
 * starts them, waits, and reads what they wrote. A measurement is a window of time in which a given
 * set of clients is at work.
 */

#include "tools/llm-bench/serve.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-bus.h>
#include <time.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "client/llm.h"
#include "ipc/names.h"
#include "tools/common/engine-args.h"
#include "tools/common/program.h"
#include "tools/llm-bench/arguments.h"
#include "tools/llm-bench/json.h"
#include "tools/llm-bench/private-daemon.h"
#include "tools/llm-bench/worker.h"

#define MAX_CLIENTS 16
#define N_GREEDY 7 /* sessions of one uid, against one of the other */
#define N_FIRST 5  /* repetitions of a time to the first token */

static const char program[] = "llm-bench serve";

static const char help[] =
    "Usage: llm-bench serve [OPTION]... MODEL [-- LLMD-OPTION...]\n"
    "       llm-bench serve [OPTION]... --socket PATH\n"
    "Measures what clients of llmd feel: the time between tokens with and without another's\n"
    "long prompt, shares of two users, how fast a question for the status is answered,\n"
    "tokens per second of many sessions, and the time to a first token.\n"
    "\n"
    "  --socket PATH            the daemon that listens there, instead of one of its own\n"
    "  --llmd PROGRAM           the daemon to start (the one beside this program)\n"
    "  --prompt N               tokens of the long prompt (4000, or what the context allows)\n"
    "  --seconds N              of each measurement, at least (10)\n"
    "  --uids A,B               users of the clients, as root (60001,60002)\n"
    "  --same-uid               all clients are this user's\n"
    "  --json                   print a JSON object\n"
    "  --help                   show this and exit";

struct options {
    const char *socket, *llmd, *model;
    char *const *more;
    uint32_t n_prompt, seconds, uids[2];
    bool json, same_uid;
};

/* In seconds. */
struct distribution {
    size_t n;
    double p50, p99, most;
};

struct first_token {
    uint32_t n_prompt;
    double alone, busy; /* medians */
};

struct results {
    struct llm_status status;
    bool two_uids;
    uint32_t context;                     /* tokens of a session */
    uint32_t n_prompt;                    /* of the long prompt, as counted */
    struct distribution alone, disturbed; /* between tokens */
    double prefill_rate;                  /* of the long prompts meanwhile; tokens/s */
    uint64_t n_single, n_greedy;          /* tokens of one session, and of all the others */
    struct distribution status_idle, status_busy;
    double rates[MAX_CLIENTS + 1]; /* tokens/s by number of sessions; 0: not measured */
    struct first_token first[3];
};

struct bench {
    const struct options *options;
    const char *socket;
    double words_per_token;
    struct worker status;
    struct results results;
};

static const uint32_t session_counts[] = {1, 2, 4, 8, 16};
static const uint32_t first_prompts[] = {16, 128, 512};

static void sleep_seconds(double s)
{
    struct timespec t = {.tv_sec = (time_t)s, .tv_nsec = (long)(1e9 * (s - floor(s)))};

    while (nanosleep(&t, &t) < 0 && errno == EINTR)
        ;
}

/* ---- figures ---- */

static int by_size(const void *pa, const void *pb)
{
    const uint64_t *a = pa, *b = pb;

    return (*a > *b) - (*a < *b);
}

/* Nearest rank: the smallest value that a share p of all do not pass. */
static double percentile(const uint64_t *sorted, size_t n, double p)
{
    size_t rank = (size_t)ceil(p * (double)n);

    return n > 0 ? 1e-9 * (double)sorted[MAX(rank, 1) - 1] : 0;
}

/* Of all events any part of which lies between from and to. */
static int distribute(const struct worker_log *log, uint64_t from, uint64_t to, bool is_status,
                      struct distribution *ret)
{
    uint64_t n = MIN(atomic_load(&log->n_events), WORKER_EVENTS_MAX);
    CLEANUP(freep) uint64_t *took = calloc(n + 1, sizeof(*took));
    size_t n_took = 0;

    if (!took)
        return -ENOMEM;
    for (uint64_t i = 0; i < n; i++) {
        const struct worker_event *e = &log->events[i];
        /* A call is noted with its begin, a token with its end. */
        uint64_t begin = is_status ? e->at : e->at - e->took;
        uint64_t end = is_status ? e->at + e->took : e->at;

        if (e->took > 0 && end > from && begin < to)
            took[n_took++] = e->took;
    }
    qsort(took, n_took, sizeof(*took), by_size);
    *ret = (struct distribution){
        .n = n_took,
        .p50 = percentile(took, n_took, 0.5),
        .p99 = percentile(took, n_took, 0.99),
        .most = percentile(took, n_took, 1),
    };
    return 0;
}

/* ---- clients ---- */

/* which: 0 or 1, whose client it is */
static int start(struct bench *b, struct worker *w, enum worker_kind kind, int which,
                 uint32_t n_prompt, uint32_t n_tokens, struct error *err)
{
    double words = ceil(b->words_per_token * MIN(n_prompt, b->results.context - 16));
    struct worker_task task = {
        .kind = kind,
        .socket = b->socket,
        .has_uid = b->results.two_uids,
        .uid = b->options->uids[which],
        .n_words = (uint32_t)MAX(words, 1),
        .n_tokens = n_tokens,
    };

    return worker_start(w, &task, err);
}

/* Until the daemon has noticed that all others of ours are gone. */
static int wait_quiet(struct bench *b, struct error *err)
{
    struct llm_connection *c;
    struct llm_error e;
    struct llm_status status;
    int r = llm_connect(&c, b->socket, &e);

    if (r < 0)
        return error_set(err, -r, "%s", e.message);
    while ((r = llm_get_status(c, &status, &e)) == 0 &&
           status.sessions > b->results.status.sessions)
        sleep_seconds(1e-3);
    llm_disconnect(c);
    return r < 0 ? error_set(err, -r, "%s", e.message) : 0;
}

static int still_alive(struct worker *w, size_t n, struct error *err)
{
    for (size_t i = 0; i < n; i++)
        if (atomic_load(&w[i].log->failed))
            return worker_wait(&w[i], err);
    return 0;
}

static void done(struct worker *w, size_t n)
{
    for (size_t i = 0; i < n; i++)
        worker_done(&w[i]);
}

/* How many words a token takes: two prompts, and their difference. */
static int calibrate(struct bench *b, struct error *err)
{
    static const uint32_t words[] = {16, 64};
    uint32_t tokens[2];

    for (size_t i = 0; i < ARRAY_SIZE(words); i++) {
        struct worker w = {0};
        int r;

        b->words_per_token = 1;
        r = start(b, &w, WORKER_ONCE, 0, words[i], 1, err);
        if (r == 0)
            r = worker_wait(&w, err);
        if (r == 0)
            tokens[i] = atomic_load(&w.log->prompt_tokens);
        worker_done(&w);
        if (r < 0)
            return r;
    }
    if (tokens[1] <= tokens[0])
        return error_set(err, EIO, "a longer prompt has no more tokens");
    b->words_per_token = (double)(words[1] - words[0]) / (tokens[1] - tokens[0]);
    return 0;
}

/* ---- measurements ---- */

static int measure_latency(struct bench *b, struct error *err)
{
    struct results *results = &b->results;
    struct worker w[2] = {{0}};
    uint64_t from, middle, to, n_prompts;
    int r;

    /* The reader of long prompts begins later; who decodes goes on through both parts. */
    r = start(b, &w[0], WORKER_REPEAT, 0, 16, 0, err);
    if (r == 0)
        r = worker_wait_first(&w[0], err);
    if (r < 0)
        goto out;
    from = worker_now();
    sleep_seconds(b->options->seconds);
    middle = worker_now();
    r = start(b, &w[1], WORKER_REPEAT, 1, results->n_prompt, 1, err);
    if (r == 0)
        r = worker_wait_first(&w[1], err);
    if (r < 0)
        goto out;
    to = worker_now();
    if (to - middle < b->options->seconds * UINT64_C(1000000000)) {
        sleep_seconds(b->options->seconds - 1e-9 * (double)(to - middle));
        to = worker_now();
    }
    r = still_alive(w, ARRAY_SIZE(w), err);
    if (r < 0)
        goto out;
    middle = atomic_load(&w[1].log->began_at);
    results->n_prompt = atomic_load(&w[1].log->prompt_tokens);
    n_prompts = atomic_load(&w[1].log->n_events); /* a token each */
    results->prefill_rate = (double)n_prompts * results->n_prompt / (1e-9 * (double)(to - middle));
    r = distribute(w[0].log, from, middle, false, &results->alone);
    if (r == 0)
        r = distribute(w[0].log, middle, to, false, &results->disturbed);
    if (r < 0)
        error_set(err, -r, "out of memory");
out:
    done(w, ARRAY_SIZE(w));
    return r < 0 ? r : wait_quiet(b, err);
}

/* Tokens of n sessions within a window, the first one's apart; the others are of user `which`. */
static int measure_sessions(struct bench *b, size_t n, int which, uint64_t *ret_first,
                            uint64_t *ret_others, double *ret_seconds, struct error *err)
{
    struct worker w[MAX_CLIENTS] = {{0}};
    uint64_t before[MAX_CLIENTS] = {0}, from, others = 0;
    int r = 0;

    for (size_t i = 0; r == 0 && i < n; i++)
        r = start(b, &w[i], WORKER_REPEAT, i == 0 ? 0 : which, 16, 0, err);
    for (size_t i = 0; r == 0 && i < n; i++)
        r = worker_wait_first(&w[i], err);
    if (r == 0) {
        from = worker_now();
        for (size_t i = 0; i < n; i++)
            before[i] = atomic_load(&w[i].log->n_events);
        sleep_seconds(b->options->seconds);
        *ret_seconds = 1e-9 * (double)(worker_now() - from);
        *ret_first = atomic_load(&w[0].log->n_events) - before[0];
        for (size_t i = 1; i < n; i++)
            others += atomic_load(&w[i].log->n_events) - before[i];
        *ret_others = others;
        r = still_alive(w, n, err);
    }
    done(w, n);
    return r < 0 ? r : wait_quiet(b, err);
}

static int first_token(struct bench *b, uint32_t n_prompt, double *ret, struct error *err)
{
    uint64_t took[N_FIRST];

    for (size_t i = 0; i < N_FIRST; i++) {
        struct worker w = {0};
        int r = start(b, &w, WORKER_ONCE, 0, n_prompt, 1, err);

        if (r == 0)
            r = worker_wait(&w, err);
        if (r == 0)
            took[i] = atomic_load(&w.log->first_at) - atomic_load(&w.log->started_at);
        worker_done(&w);
        if (r < 0)
            return r;
    }
    qsort(took, N_FIRST, sizeof(*took), by_size);
    *ret = percentile(took, N_FIRST, 0.5);
    return 0;
}

static int measure_first_tokens(struct bench *b, struct error *err)
{
    struct worker w[4] = {{0}};
    int r = 0;

    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(first_prompts); i++) {
        b->results.first[i].n_prompt = first_prompts[i];
        r = first_token(b, first_prompts[i], &b->results.first[i].alone, err);
    }
    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(w); i++)
        r = start(b, &w[i], WORKER_REPEAT, 1, 16, 0, err);
    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(w); i++)
        r = worker_wait_first(&w[i], err);
    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(first_prompts); i++)
        r = first_token(b, first_prompts[i], &b->results.first[i].busy, err);
    if (r == 0)
        r = still_alive(w, ARRAY_SIZE(w), err);
    done(w, ARRAY_SIZE(w));
    return r < 0 ? r : wait_quiet(b, err);
}

static void note(const char *text)
{
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "llm-bench: %s ...\n", text);
}

static int measure_all(struct bench *b, struct error *err)
{
    struct results *results = &b->results;
    uint64_t idle_from, busy_from, first = 0, others = 0;
    double seconds = 1;
    int r;

    r = calibrate(b, err);
    if (r == 0)
        r = start(b, &b->status, WORKER_STATUS, 0, 0, 0, err);
    if (r == 0)
        r = worker_wait_first(&b->status, err);
    if (r < 0)
        return r;
    idle_from = worker_now();
    note("nothing runs");
    sleep_seconds(MIN(b->options->seconds, 5));
    busy_from = worker_now();

    note("one decodes, then another's long prompts are read as well");
    r = measure_latency(b, err);
    if (r < 0)
        return r;
    note("one session against seven");
    r = measure_sessions(b, 1 + N_GREEDY, 1, &results->n_single, &results->n_greedy, &seconds, err);
    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(session_counts); i++) {
        note("sessions of one user");
        r = measure_sessions(b, session_counts[i], 0, &first, &others, &seconds, err);
        if (r == 0)
            results->rates[session_counts[i]] = (double)(first + others) / seconds;
    }
    if (r == 0) {
        note("first tokens");
        r = measure_first_tokens(b, err);
    }
    if (r == 0)
        r = still_alive(&b->status, 1, err);
    if (r < 0)
        return r;
    r = distribute(b->status.log, idle_from, busy_from, true, &results->status_idle);
    if (r == 0)
        r = distribute(b->status.log, busy_from, worker_now(), true, &results->status_busy);
    return r < 0 ? error_set(err, -r, "out of memory") : 0;
}

/* ---- output ---- */

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static double single_share(const struct results *r)
{
    return ratio((double)r->n_single, (double)r->n_single + (double)r->n_greedy);
}

static void print_distribution(const char *what, const struct distribution *d)
{
    printf("  %-34s %9.2f %9.2f %9.2f %9zu\n", what, 1e3 * d->p50, 1e3 * d->p99, 1e3 * d->most,
           d->n);
}

static void print_table(const struct bench *b)
{
    const struct results *r = &b->results;
    char text[64];

    printf("model    %s\n", r->status.model);
    printf("engine   %s\n", r->status.backend);
    if (r->two_uids)
        printf("users    %u and %u\n", b->options->uids[0], b->options->uids[1]);
    else
        printf("users    one only: shares are those of sessions, not of users\n");

    printf("\nms                                        p50       p99   longest     count\n");
    puts("between two tokens of one session");
    print_distribution("alone", &r->alone);
    snprintf(text, sizeof(text), "while another reads %u tokens", r->n_prompt);
    print_distribution(text, &r->disturbed);
    printf("  %-34s %8.2fx %8.2fx\n", "ratio", ratio(r->disturbed.p50, r->alone.p50),
           ratio(r->disturbed.p99, r->alone.p99));
    printf("  %-34s %9.1f tokens/s\n", "the long prompts meanwhile", r->prefill_rate);
    puts("status");
    print_distribution("idle", &r->status_idle);
    print_distribution("during all the rest", &r->status_busy);

    puts("\nshares of tokens");
    printf("  one session of one %s        %5.1f %%\n", r->two_uids ? "user   " : "session",
           100 * single_share(r));
    printf("  %d of another                    %5.1f %%\n", N_GREEDY, 100 - 100 * single_share(r));

    puts("\nsessions   tokens/s       each");
    for (size_t i = 0; i < ARRAY_SIZE(session_counts); i++)
        printf("%8u %10.1f %10.1f\n", session_counts[i], r->rates[session_counts[i]],
               r->rates[session_counts[i]] / session_counts[i]);

    puts("\nms to the first token, median    prompt     alone   beside 4");
    for (size_t i = 0; i < ARRAY_SIZE(r->first); i++)
        printf("%39u %9.1f %10.1f\n", r->first[i].n_prompt, 1e3 * r->first[i].alone,
               1e3 * r->first[i].busy);
}

static struct json_object *distribution_json(const struct distribution *d)
{
    struct json_object *o = json_object_new_object();

    if (o && put(o, "count", whole(d->n)) && put(o, "p50_seconds", number(d->p50)) &&
        put(o, "p99_seconds", number(d->p99)) && put(o, "longest_seconds", number(d->most)))
        return o;
    json_object_put(o);
    return NULL;
}

/* Takes o. */
static bool append(struct json_object *array, struct json_object *o, bool good)
{
    if (good && json_object_array_add(array, o) == 0)
        return true;
    json_object_put(o);
    return false;
}

static bool put_lists(struct json_object *sessions, struct json_object *first,
                      const struct results *r)
{
    for (size_t i = 0; i < ARRAY_SIZE(session_counts); i++) {
        struct json_object *o = json_object_new_object();

        if (!append(sessions, o,
                    o && put(o, "sessions", whole(session_counts[i])) &&
                        put(o, "tokens_per_second", number(r->rates[session_counts[i]]))))
            return false;
    }
    for (size_t i = 0; i < ARRAY_SIZE(r->first); i++) {
        struct json_object *o = json_object_new_object();

        if (!append(first, o,
                    o && put(o, "prompt_tokens", whole(r->first[i].n_prompt)) &&
                        put(o, "alone_seconds", number(r->first[i].alone)) &&
                        put(o, "beside_4_seconds", number(r->first[i].busy))))
            return false;
    }
    return true;
}

static int print_json(const struct bench *b)
{
    const struct results *r = &b->results;
    struct json_object *top = json_object_new_object();
    struct json_object *sessions = json_object_new_array(), *first = json_object_new_array();
    const char *text = NULL;
    bool good;

    good = top && sessions && first && put_lists(sessions, first, r) &&
           put(top, "version", json_object_new_string(LLMD_VERSION)) &&
           put(top, "model", json_object_new_string(r->status.model)) &&
           put(top, "engine", json_object_new_string(r->status.backend)) &&
           put(top, "two_uids", json_object_new_boolean(r->two_uids)) &&
           put(top, "seconds", whole(b->options->seconds)) &&
           put(top, "long_prompt_tokens", whole(r->n_prompt)) &&
           put(top, "long_prompt_tokens_per_second", number(r->prefill_rate)) &&
           put(top, "between_tokens_alone", distribution_json(&r->alone)) &&
           put(top, "between_tokens_disturbed", distribution_json(&r->disturbed)) &&
           put(top, "between_tokens_p99_ratio", number(ratio(r->disturbed.p99, r->alone.p99))) &&
           put(top, "status_idle", distribution_json(&r->status_idle)) &&
           put(top, "status_busy", distribution_json(&r->status_busy)) &&
           put(top, "share_of_one_session", number(single_share(r))) &&
           put(top, "share_of_seven_sessions", number(1 - single_share(r)));
    good = good && put(top, "throughput", json_object_get(sessions)) &&
           put(top, "first_token", json_object_get(first));
    if (good)
        text = json_object_to_json_string_ext(top, JSON_C_TO_STRING_PRETTY |
                                                       JSON_C_TO_STRING_NOSLASHESCAPE);
    if (text)
        puts(text);
    json_object_put(top);
    json_object_put(sessions);
    json_object_put(first);
    return text ? 0 : -ENOMEM;
}

/* ---- arguments ---- */

static int parse_uids(const char *text, uint32_t uids[2], struct error *err)
{
    const char *comma = strchr(text, ',');
    char first[16];
    int r;

    if (!comma || (size_t)(comma - text) >= sizeof(first))
        return error_set(err, EINVAL, "--uids wants two numbers, as in 60001,60002");
    memcpy(first, text, (size_t)(comma - text));
    first[comma - text] = 0;
    r = parse_number("--uids", first, 1, UINT32_MAX - 2, &uids[0], err);
    if (r == 0)
        r = parse_number("--uids", comma + 1, 1, UINT32_MAX - 2, &uids[1], err);
    if (r == 0 && uids[0] == uids[1])
        return error_set(err, EINVAL, "--uids wants two different users");
    return r;
}

static int take_option(void *userdata, int option, const char *value, struct error *err)
{
    struct options *o = userdata;

    switch (option) {
    case 's':
        o->socket = value;
        break;
    case 'l':
        o->llmd = value;
        break;
    case 'p':
        return parse_number("--prompt", value, 1, MODEL_MAX_CONTEXT, &o->n_prompt, err);
    case 't':
        return parse_number("--seconds", value, 1, 3600, &o->seconds, err);
    case 'u':
        return parse_uids(value, o->uids, err);
    case 'n':
        o->same_uid = true;
        break;
    case 'j':
        o->json = true;
        break;
    }
    return 0;
}

/* 0; 1: --help has been answered; EXIT_USAGE: the message is printed. */
static int parse_options(struct options *o, int argc, char **argv)
{
    static const struct option long_options[] = {
        {"socket", required_argument, NULL, 's'},
        {"llmd", required_argument, NULL, 'l'},
        {"prompt", required_argument, NULL, 'p'},
        {"seconds", required_argument, NULL, 't'},
        {"uids", required_argument, NULL, 'u'},
        {"same-uid", no_argument, NULL, 'n'},
        {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    const struct arguments_form form = {program, help, long_options, take_option, o};
    bool has_more;
    int r = arguments_read(&form, argc, argv, &o->model, &o->more, &has_more);

    if (r != 0)
        return r;
    if (!o->model == !o->socket)
        return usage_error(program, o->model ? "either MODEL or --socket" : "no MODEL given");
    if (o->socket && has_more)
        return usage_error(program, "options for llmd are for one that is started here");
    return 0;
}

/* Whom we measure, and how long a prompt may be: what a session holds, but for a few tokens. */
static int look(struct bench *b, struct error *err)
{
    struct llm_connection *c;
    struct llm_session *s;
    struct llm_error e = {.message = ""};
    uint32_t context = 0;
    int r = llm_connect(&c, b->socket, &e);

    if (r < 0)
        return error_set(err, -r, "%s", e.message);
    r = llm_get_status(c, &b->results.status, &e);
    if (r >= 0)
        r = llm_session_new(&s, c, NULL, &e);
    if (r >= 0) {
        r = sd_bus_get_property_trivial(llm_connection_bus(c), llm_connection_destination(c),
                                        llm_session_path(s), LLM_SESSION_INTERFACE, "ContextMax",
                                        NULL, 'u', &context);
        llm_session_free(s);
    }
    llm_disconnect(c);
    if (r < 0)
        return error_set(err, -r, "%s", e.message[0] ? e.message : strerror(-r));
    if (context < 64)
        return error_set(err, EINVAL, "sessions of %u tokens are too small to measure", context);
    b->results.context = context;
    return 0;
}

static int run(const struct options *o, struct error *err)
{
    struct bench b = {.options = o, .socket = o->socket, .results = {.n_prompt = o->n_prompt}};
    struct error stop_err;
    int r;

    b.results.two_uids = geteuid() == 0 && !o->same_uid;
    if (o->model) {
        struct private_daemon_options d = {
            .program = o->llmd,
            .model = o->model,
            .more = o->more,
            .other_users = b.results.two_uids,
        };

        r = private_daemon_start(&d, err);
        if (r < 0)
            return r;
        b.socket = private_daemon_socket();
    }
    r = look(&b, err);
    if (r == 0)
        r = measure_all(&b, err);
    worker_done(&b.status);
    if (o->model && private_daemon_stop(&stop_err) < 0 && r == 0) {
        *err = stop_err;
        r = -EIO;
    }
    if (r < 0)
        return r;
    if (!o->json)
        print_table(&b);
    else if (print_json(&b) < 0)
        return error_set(err, ENOMEM, "out of memory");
    return 0;
}

int serve_main(int argc, char **argv)
{
    struct options o = {.n_prompt = 4000, .seconds = 10, .uids = {60001, 60002}};
    struct error err;
    int r = parse_options(&o, argc, argv);

    if (r == EXIT_USAGE)
        return EXIT_USAGE;
    if (r == 0 && run(&o, &err) < 0)
        return run_error(program, "%s", err.text);
    return finish_output(program);
}
