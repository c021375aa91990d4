/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llm-bench: tokens per second, and how near to the memory's limit they come. Each case (a prompt
 * length, a number of sessions) runs once to warm up and then several times; medians are reported.
 */

#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/standard-fds.h"
#include "engine/model-file.h"
#include "tools/common/engine-args.h"
#include "tools/common/program.h"
#include "tools/llm-bench/json.h"
#include "tools/llm-bench/probe.h"
#include "tools/llm-bench/serve.h"
#include "tools/llm-bench/traffic.h"

#define MAX_SESSIONS 64
#define MAX_LIST 16

static const char help[] =
    "Usage: llm-bench [OPTION]... MODEL\n"
    "       llm-bench serve [OPTION]... MODEL\n"
    "Measures how fast a model computes: prefill (reading a prompt) and decoding (one token\n"
    "per session and step), and compares decoding with the memory's bandwidth, its limit.\n"
    "With 'serve': what clients of the daemon feel; see llm-bench serve --help.\n"
    "\n"
    "  --prompt LIST            tokens of the prompts (128,512)\n"
    "  --sessions LIST          sessions served at a time (1,2,4)\n"
    "  --decode N               tokens to decode after the prompt (32)\n"
    "  --repetitions N          of each measurement; the median counts (3)\n"
    "  --probe MIB              memory to read for the bandwidth, 0 for none (1024)\n"
    "  --json                   print a JSON object\n" ENGINE_ARGS_HELP
    "  --help                   show this and exit\n"
    "  --version                show the version and exit";

static const char program[] = "llm-bench";

struct list {
    uint32_t values[MAX_LIST];
    size_t n;
};

struct bench_options {
    struct list prompts, sessions;
    uint32_t n_decode, n_repetitions, probe_mib;
    bool json;
    struct engine_options engine;
};

/* One case; rates over all its sessions. */
struct result {
    uint32_t n_prompt, n_sessions;
    double prefill_seconds, decode_seconds; /* medians: all prompts; all steps */
    double prefill_rate, decode_rate;       /* tokens/s */
    uint64_t bytes_per_step;
};

struct memory {
    uint64_t anonymous, file; /* resident, of this process */
    struct engine_memory engine;
};

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int parse_list(const char *name, const char *text, uint32_t high, struct list *ret,
                      struct error *err)
{
    CLEANUP(freep) char *copy = strdup(text);
    char *rest = copy, *word;
    struct list list = {.n = 0};
    int r;

    if (!copy)
        return error_set(err, ENOMEM, "out of memory");
    while ((word = strsep(&rest, ","))) {
        if (list.n == MAX_LIST)
            return error_set(err, EINVAL, "%s: at most %d numbers expected", name, MAX_LIST);
        r = parse_number(name, word, 1, high, &list.values[list.n], err);
        if (r < 0)
            return r;
        list.n++;
    }
    *ret = list;
    return 0;
}

/* Any ids will do; the same every time. */
static void fill_prompt(uint32_t *ids, size_t n, uint32_t vocab_size)
{
    uint64_t state = 1;

    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        ids[i] = (uint32_t)((state >> 33) % vocab_size);
    }
}

static int step(struct engine *e, struct step_item *items, size_t n, struct error *err)
{
    int r = engine_step(e, items, n);

    for (size_t i = 0; r == 0 && i < n; i++)
        r = items[i].ret_error;
    if (r == -ENOBUFS)
        return error_set(err, ENOBUFS, "no memory left for the K and V of %zu sessions", n);
    if (r < 0)
        return error_set(err, -r, "evaluation failed: %s", strerror(-r));
    return 0;
}

/* All prompts, as full steps as they make; the sessions one after the other within a step. */
static int prefill(struct engine *e, struct session **sessions, size_t n_sessions,
                   const uint32_t *ids, uint32_t n, struct error *err)
{
    struct step_item items[MAX_SESSIONS];
    uint32_t done = 0; /* of session i */
    size_t i = 0;
    int r = 0;

    while (r == 0 && i < n_sessions) {
        uint32_t room = engine_max_rows(e);
        size_t n_items = 0;

        while (i < n_sessions && room > 0) {
            uint32_t here = MIN(n - done, room);

            done += here;
            room -= here;
            items[n_items++] = (struct step_item){.session = sessions[i],
                                                  .tokens = ids + done - here,
                                                  .n_tokens = here,
                                                  .wanted = done == n ? LOGITS_LAST : LOGITS_NONE};
            if (done == n) {
                i++;
                done = 0;
            }
        }
        r = step(e, items, n_items, err);
    }
    return r;
}

static int decode(struct engine *e, struct session **sessions, size_t n_sessions,
                  const uint32_t *ids, uint32_t n, struct error *err)
{
    struct step_item items[MAX_SESSIONS];
    int r = 0;

    for (uint32_t t = 0; r == 0 && t < n; t++) {
        for (size_t i = 0; i < n_sessions; i++)
            items[i] = (struct step_item){
                .session = sessions[i], .tokens = ids + t, .n_tokens = 1, .wanted = LOGITS_LAST};
        r = step(e, items, n_sessions, err);
    }
    return r;
}

/* Resident bytes by kind, as the kernel counts them. */
static void read_memory(const struct engine *e, struct memory *ret)
{
    CLEANUP(fclosep) FILE *f = fopen("/proc/self/status", "re");
    unsigned long long kib;
    char line[256];

    while (f && fgets(line, sizeof(line), f)) {
        if (sscanf(line, "RssAnon: %llu kB", &kib) == 1)
            ret->anonymous = kib * 1024;
        else if (sscanf(line, "RssFile: %llu kB", &kib) == 1)
            ret->file = kib * 1024;
    }
    engine_memory(e, &ret->engine);
}

static int by_size(const void *pa, const void *pb)
{
    const double *a = pa, *b = pb;

    return (*a > *b) - (*a < *b);
}

static double median(double *x, size_t n)
{
    qsort(x, n, sizeof(*x), by_size);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* Once through a case; memory is looked at when it holds most. */
static int run_once(struct engine *e, const struct bench_options *o, const struct result *what,
                    const uint32_t *ids, double *ret_prefill, double *ret_decode,
                    struct memory *memory, struct error *err)
{
    struct session *sessions[MAX_SESSIONS] = {NULL};
    uint32_t n_ctx = what->n_prompt + o->n_decode;
    double start, middle;
    struct memory m = {0};
    int r = 0;

    for (size_t i = 0; r == 0 && i < what->n_sessions; i++) {
        r = session_new(&sessions[i], e, n_ctx);
        if (r < 0)
            error_set(err, -r, "cannot make a session: %s", strerror(-r));
    }
    start = now();
    if (r == 0)
        r = prefill(e, sessions, what->n_sessions, ids, what->n_prompt, err);
    middle = now();
    if (r == 0)
        r = decode(e, sessions, what->n_sessions, ids, o->n_decode, err);
    *ret_decode = now() - middle;
    *ret_prefill = middle - start;
    read_memory(e, &m);
    if (m.engine.kv_bytes_used >= memory->engine.kv_bytes_used)
        *memory = m;
    for (size_t i = 0; i < what->n_sessions; i++)
        session_free(sessions[i]);
    return r;
}

static int run_case(struct engine *e, const struct bench_options *o, struct result *res,
                    struct memory *memory, struct error *err)
{
    const struct model *m = engine_model(e);
    uint32_t n_ids = MAX(res->n_prompt, o->n_decode);
    CLEANUP(freep) uint32_t *ids = calloc(n_ids, sizeof(*ids));
    CLEANUP(freep) double *prefill_times = calloc(o->n_repetitions, sizeof(*prefill_times));
    CLEANUP(freep) double *decode_times = calloc(o->n_repetitions, sizeof(*decode_times));
    int r;

    if (!ids || !prefill_times || !decode_times)
        return error_set(err, ENOMEM, "out of memory");
    fill_prompt(ids, n_ids, model_config(m)->vocab_size);

    r = run_once(e, o, res, ids, &prefill_times[0], &decode_times[0], memory, err); /* warm-up */
    for (uint32_t i = 0; r == 0 && i < o->n_repetitions; i++)
        r = run_once(e, o, res, ids, &prefill_times[i], &decode_times[i], memory, err);
    if (r < 0)
        return r;

    res->prefill_seconds = median(prefill_times, o->n_repetitions);
    res->decode_seconds = median(decode_times, o->n_repetitions);
    res->prefill_rate = (double)res->n_prompt * res->n_sessions / res->prefill_seconds;
    res->decode_rate = (double)o->n_decode * res->n_sessions / res->decode_seconds;
    res->bytes_per_step =
        traffic_weights(m) + res->n_sessions * traffic_session(m, res->n_prompt + o->n_decode / 2,
                                                               o->engine.kv_type == KV_F16 ? 2 : 4);
    return 0;
}

/* Bytes that decoding read in a second, as a share of what the probe could; 0 without a probe. */
static double share(const struct result *res, uint32_t n_decode, const struct probe *probe)
{
    double rate = (double)res->bytes_per_step * n_decode / res->decode_seconds;

    return probe->bytes > 0 ? rate / probe->bytes_per_second : 0;
}

static void print_table(const struct engine *e, const struct bench_options *o,
                        const struct probe *probe, const struct memory *memory,
                        const struct result *results, size_t n)
{
    const struct model *m = engine_model(e);

    printf("model      %s\n", model_file_path(model_get_file(m)));
    printf("engine     %s\n", engine_description(e));
    printf("memory     anonymous %.0f MB, file %.0f MB; KV %.1f MB of %.0f, scratch %.1f MB\n",
           1e-6 * (double)memory->anonymous, 1e-6 * (double)memory->file,
           1e-6 * (double)memory->engine.kv_bytes_used, 1e-6 * (double)memory->engine.kv_bytes_max,
           1e-6 * (double)memory->engine.scratch_bytes);
    if (probe->bytes > 0)
        printf("bandwidth  %.1f GB/s: %u threads reading %.2f GB\n", 1e-9 * probe->bytes_per_second,
               probe->n_threads, 1e-9 * (double)probe->bytes);
    printf("weights    %.3f GB for a decoding step, at most\n", 1e-9 * (double)traffic_weights(m));
    printf(
        "\n prompt  sessions  prefill tok/s  decode tok/s  each tok/s  MB/token  of bandwidth\n");
    for (size_t i = 0; i < n; i++) {
        const struct result *r = &results[i];

        printf("%7u  %8u  %13.1f  %12.2f  %10.2f  %8.1f  ", r->n_prompt, r->n_sessions,
               r->prefill_rate, r->decode_rate, r->decode_rate / r->n_sessions,
               1e-6 * (double)r->bytes_per_step / r->n_sessions);
        if (probe->bytes > 0)
            printf("%10.1f %%\n", 100 * share(r, o->n_decode, probe));
        else
            puts("           -");
    }
}

static bool put_results(struct json_object *array, const struct bench_options *o,
                        const struct probe *probe, const struct result *results, size_t n)
{
    bool good = true;

    for (size_t i = 0; good && i < n; i++) {
        const struct result *r = &results[i];
        struct json_object *x = json_object_new_object();

        if (!x || json_object_array_add(array, x) < 0) {
            json_object_put(x);
            return false;
        }
        good = put(x, "prompt_tokens", whole(r->n_prompt)) &&
               put(x, "sessions", whole(r->n_sessions)) &&
               put(x, "decode_tokens", whole(o->n_decode)) &&
               put(x, "prefill_seconds", number(r->prefill_seconds)) &&
               put(x, "prefill_tokens_per_second", number(r->prefill_rate)) &&
               put(x, "decode_seconds", number(r->decode_seconds)) &&
               put(x, "decode_tokens_per_second", number(r->decode_rate)) &&
               put(x, "bytes_per_step", whole(r->bytes_per_step)) &&
               put(x, "bytes_per_token", number((double)r->bytes_per_step / r->n_sessions));
        if (good && probe->bytes > 0)
            good = put(x, "bandwidth_share", number(share(r, o->n_decode, probe)));
    }
    return good;
}

static int print_json(const struct engine *e, const struct bench_options *o,
                      const struct probe *probe, const struct memory *memory,
                      const struct result *results, size_t n)
{
    const struct model *m = engine_model(e);
    struct json_object *top = json_object_new_object(), *usage = json_object_new_object();
    struct json_object *array = json_object_new_array();
    const char *text = NULL;
    bool good;

    good = top && put(top, "version", json_object_new_string(LLMD_VERSION)) &&
           put(top, "model", json_object_new_string(model_file_path(model_get_file(m)))) &&
           put(top, "engine", json_object_new_string(engine_description(e))) &&
           put(top, "repetitions", whole(o->n_repetitions)) &&
           put(top, "weight_bytes_per_step", whole(traffic_weights(m)));
    if (good && probe->bytes > 0)
        good = put(top, "bandwidth_bytes_per_second", number(probe->bytes_per_second)) &&
               put(top, "bandwidth_bytes_read", whole(probe->bytes)) &&
               put(top, "bandwidth_threads", whole(probe->n_threads));
    good = good && usage && put(usage, "anonymous_bytes", whole(memory->anonymous)) &&
           put(usage, "file_bytes", whole(memory->file)) &&
           put(usage, "kv_bytes_used", whole(memory->engine.kv_bytes_used)) &&
           put(usage, "kv_bytes_max", whole(memory->engine.kv_bytes_max)) &&
           put(usage, "scratch_bytes", whole(memory->engine.scratch_bytes));
    good = good && put(top, "memory", json_object_get(usage));
    good = good && array && put_results(array, o, probe, results, n);
    good = good && put(top, "results", json_object_get(array));
    if (good)
        text = json_object_to_json_string_ext(top, JSON_C_TO_STRING_PRETTY |
                                                       JSON_C_TO_STRING_NOSLASHESCAPE);
    if (text)
        puts(text);
    json_object_put(top);
    json_object_put(usage);
    json_object_put(array);
    return text ? 0 : -ENOMEM;
}

/* The model's mapping where it is large enough: what decoding reads is that. */
static int run_probe(struct probe *ret, const struct bench_options *o, const struct model *m,
                     struct error *err)
{
    size_t bytes = (size_t)o->probe_mib << 20, size;
    const void *map = model_file_map(model_get_file(m), &size);

    return probe_bandwidth(ret, size >= bytes ? map : NULL, bytes, o->engine.n_threads, err);
}

/* 0; 1: --help or --version has been answered; EXIT_USAGE: the message is printed. */
static int parse_options(struct bench_options *o, int argc, char **argv)
{
    static const struct option long_options[] = {
        {"prompt", required_argument, NULL, 'p'},
        {"sessions", required_argument, NULL, 's'},
        {"decode", required_argument, NULL, 'd'},
        {"repetitions", required_argument, NULL, 'r'},
        {"probe", required_argument, NULL, 'b'},
        {"json", no_argument, NULL, 'j'},
        ENGINE_ARGS,
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'v'},
        {NULL, 0, NULL, 0},
    };
    struct error err;
    int c, r;

    while ((c = getopt_long(argc, argv, "h", long_options, NULL)) != -1) {
        r = 0;
        switch (c) {
        case 'p':
            r = parse_list("--prompt", optarg, MODEL_MAX_CONTEXT, &o->prompts, &err);
            break;
        case 's':
            r = parse_list("--sessions", optarg, MAX_SESSIONS, &o->sessions, &err);
            break;
        case 'd':
            r = parse_number("--decode", optarg, 1, MODEL_MAX_CONTEXT, &o->n_decode, &err);
            break;
        case 'r':
            r = parse_number("--repetitions", optarg, 1, 1000, &o->n_repetitions, &err);
            break;
        case 'b':
            r = parse_number("--probe", optarg, 0, 1 << 20, &o->probe_mib, &err);
            break;
        case 'j':
            o->json = true;
            break;
        case 'h':
            puts(help);
            return 1;
        case 'v':
            puts("llm-bench " LLMD_VERSION);
            return 1;
        case '?':
            return usage_error(program, NULL);
        default:
            r = engine_args_take(&o->engine, c, optarg, &err);
        }
        if (r < 0)
            return usage_error(program, "%s", err.text);
    }
    if (optind == argc)
        return usage_error(program, "no MODEL given");
    if (optind + 1 < argc)
        return usage_error(program, "one MODEL only, '%s' is too much", argv[optind + 1]);
    return 0;
}

static int run(const struct bench_options *o, const char *path, struct error *err)
{
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(engine_freep) struct engine *e = NULL;
    struct result results[MAX_LIST * MAX_LIST];
    struct memory memory = {0};
    struct probe probe = {0};
    size_t n = 0;
    int r;

    r = open_engine(&m, &e, path, &o->engine, err);
    for (size_t p = 0; r == 0 && p < o->prompts.n; p++) {
        uint32_t most = model_config(m)->context_max, length = o->prompts.values[p];

        if (length > most || o->n_decode > most - length)
            r = error_set(err, EINVAL,
                          "a prompt of %u tokens and %u more pass the context of %s, %u", length,
                          o->n_decode, path, most);
    }
    /* Before the cases, so that its memory is gone when theirs is counted. */
    if (r == 0 && o->probe_mib > 0)
        r = run_probe(&probe, o, m, err);
    for (size_t p = 0; r == 0 && p < o->prompts.n; p++)
        for (size_t s = 0; r == 0 && s < o->sessions.n; s++) {
            results[n] = (struct result){.n_prompt = o->prompts.values[p],
                                         .n_sessions = o->sessions.values[s]};
            r = run_case(e, o, &results[n++], &memory, err);
        }
    if (r < 0)
        return r;
    if (o->json)
        r = print_json(e, o, &probe, &memory, results, n);
    else
        print_table(e, o, &probe, &memory, results, n);
    return r < 0 ? error_set(err, -r, "out of memory") : 0;
}

int main(int argc, char **argv)
{
    struct bench_options o = {
        .prompts = {{128, 512}, 2},
        .sessions = {{1, 2, 4}, 3},
        .n_decode = 32,
        .n_repetitions = 3,
        .probe_mib = 1024,
        .engine = {.max_logits = MAX_SESSIONS},
    };
    struct error err;
    int r;

    standard_fds_fill();
    if (argc > 1 && strcmp(argv[1], "serve") == 0) {
        char subcommand[] = "llm-bench serve"; /* for what getopt_long() has to say */

        argv[1] = subcommand;
        return serve_main(argc - 1, argv + 1);
    }
    r = parse_options(&o, argc, argv);
    if (r == EXIT_USAGE)
        return EXIT_USAGE;
    if (r == 0 && run(&o, argv[optind], &err) < 0)
        return run_error(program, "%s", err.text);
    return finish_output(program);
}
