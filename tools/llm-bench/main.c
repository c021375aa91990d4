/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llm-bench: how fast a model computes, beside what the machine would allow. The options become a
 * list of cases (measure.h), what was measured becomes tables or JSON (report.h), and is compared
 * with an earlier run (compare.h). 'serve' and 'load' are other programs in the same file.
 */

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/json.h"
#include "base/standard-fds.h"
#include "tools/common/engine-args.h"
#include "tools/common/program.h"
#include "tools/llm-bench/compare.h"
#include "tools/llm-bench/hybrid.h"
#include "tools/llm-bench/json.h"
#include "tools/llm-bench/load.h"
#include "tools/llm-bench/measure.h"
#include "tools/llm-bench/report.h"
#include "tools/llm-bench/serve.h"

static const char program[] = "llm-bench";

static const char help[] =
    "Usage: llm-bench [OPTION]... MODEL\n"
    "       llm-bench --compare OLD.json [OPTION]... MODEL|NEW.json\n"
    "       llm-bench serve [OPTION]... MODEL\n"
    "       llm-bench load [OPTION]... MODEL\n"
    "Measures how fast a model computes: prefill (reading a prompt) and decoding (one token\n"
    "for each session and step), what the time is spent on, and how near that is to what the\n"
    "machine's memory and multipliers allow. Ctrl-C ends it and shows what there is.\n"
    "With 'serve': what clients of the daemon feel; see llm-bench serve --help.\n"
    "With 'load': how long a model takes to come from the disk; see llm-bench load --help.\n"
    "\n"
    "  --prompt LIST            tokens of the prompts (128,512,2048,8192, as the context allows)\n"
    "  --depth LIST             tokens a session has before it decodes (128,2048,8192, likewise)\n"
    "  --sessions LIST          sessions served at a time, at the least depth (1,2,4,8,16)\n"
    "  --decode N               tokens to decode in a repetition (32)\n"
    "  --repetitions N          of each measurement, besides one to warm up (3)\n"
    "  --threads LIST           threads to compute with (one for each core it may use)\n"
    "  --probe MIB              memory to read for the machine's limits, 0 for none (1024)\n"
    "  --accuracy N             positions to compare with f32 activations, 0 for none (64)\n"
    "  --quick                  what takes a minute: less of each of the above\n"
    "  --compare OLD.json       also print ratios to what --json printed earlier; with NEW.json\n"
    "                           instead of a model nothing is measured\n"
    "  --json                   print a JSON object\n"
    "  --backend hybrid         a GPU reads prompts while the processor decodes, at the least\n"
    "                           depth: what each does alone, and beside the "
    "other\n" ENGINE_ARGS_HELP_MODES "  --help                   show this and exit\n"
    "  --version                show the version and exit";

struct arguments {
    struct bench_options bench;
    const char *compare, *path;
    bool json, quick, hybrid, has_others, has_prompts, has_depths, has_positions, has_probe;
};

static int by_value(const void *pa, const void *pb)
{
    const uint32_t *a = pa, *b = pb;

    return (*a > *b) - (*a < *b);
}

/* Numbers in rising order, each once. */
static int parse_list(const char *name, const char *text, uint32_t high, struct list *ret,
                      struct error *err)
{
    CLEANUP(freep) char *copy = strdup(text);
    char *rest = copy, *word;
    struct list list = {.n = 0};
    size_t n = 0;
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
    qsort(list.values, list.n, sizeof(*list.values), by_value);
    for (size_t i = 0; i < list.n; i++)
        if (i == 0 || list.values[i] != list.values[n - 1])
            list.values[n++] = list.values[i];
    list.n = n;
    *ret = list;
    return 0;
}

/* What was not given. */
static void fill_in(struct arguments *a)
{
    struct bench_options *o = &a->bench;

    a->has_prompts = o->prompts.n > 0;
    a->has_depths = o->depths.n > 0;
    if (o->prompts.n == 0)
        o->prompts =
            a->quick ? (struct list){{128, 512}, 2} : (struct list){{128, 512, 2048, 8192}, 4};
    if (o->depths.n == 0)
        o->depths = a->quick ? (struct list){{128}, 1} : (struct list){{128, 2048, 8192}, 3};
    if (o->sessions.n == 0)
        o->sessions = a->quick ? (struct list){{1, 8}, 2} : (struct list){{1, 2, 4, 8, 16}, 5};
    if (o->n_decode == 0)
        o->n_decode = a->quick ? 16 : 32;
    if (o->n_repetitions == 0)
        o->n_repetitions = a->quick ? 2 : 3;
    if (!a->has_probe) /* the processor's limits are none of a GPU's */
        o->probe_mib = o->engine.home == LANE_GPU ? 0 : a->quick ? 512 : 1024;
    if (!a->has_positions)
        o->n_positions = a->quick ? 32 : 64;
}

/* Two files are compared, and nothing is measured. */
static bool compares_files(const struct arguments *a)
{
    size_t n = strlen(a->path);

    return a->compare && n > 5 && strcmp(a->path + n - 5, ".json") == 0;
}

/* 0; 1: --help or --version has been answered; EXIT_USAGE: the message is printed. */
static int parse_options(struct arguments *a, int argc, char **argv)
{
    static const struct option long_options[] = {
        {"prompt", required_argument, NULL, 'p'},
        {"depth", required_argument, NULL, 'D'},
        {"sessions", required_argument, NULL, 's'},
        {"decode", required_argument, NULL, 'd'},
        {"repetitions", required_argument, NULL, 'r'},
        {"probe", required_argument, NULL, 'b'},
        {"accuracy", required_argument, NULL, 'a'},
        {"quick", no_argument, NULL, 'q'},
        {"compare", required_argument, NULL, 'c'},
        {"json", no_argument, NULL, 'j'},
        ENGINE_ARGS,
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'v'},
        {NULL, 0, NULL, 0},
    };
    struct bench_options *o = &a->bench;
    struct error err;
    int c, r;

    while ((c = getopt_long(argc, argv, "h", long_options, NULL)) != -1) {
        r = 0;
        a->has_others |= c != 'c' && c != 'j';
        switch (c) {
        case 'p':
            r = parse_list("--prompt", optarg, MODEL_MAX_CONTEXT, &o->prompts, &err);
            break;
        case 'D':
            r = parse_list("--depth", optarg, MODEL_MAX_CONTEXT, &o->depths, &err);
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
            a->has_probe = true;
            break;
        case 'a':
            r = parse_number("--accuracy", optarg, 0, 1 << 10, &o->n_positions, &err);
            a->has_positions = true;
            break;
        case 'q':
            a->quick = true;
            break;
        case 'c':
            a->compare = optarg;
            break;
        case 'j':
            a->json = true;
            break;
        case ENGINE_ARG_BACKEND:
            a->hybrid = strcmp(optarg, "hybrid") == 0;
            if (!a->hybrid)
                r = engine_args_take(&o->engine, c, optarg, &err);
            break;
        case ENGINE_ARG_THREADS:
            r = parse_list("--threads", optarg, 1024, &o->threads, &err);
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
    a->path = argv[optind];
    if (compares_files(a) && a->has_others)
        return usage_error(program, "of two files, %s and %s, nothing is measured: --json only",
                           a->compare, a->path);
    if (a->hybrid && (a->compare || o->threads.n > 1))
        return usage_error(program, "--backend hybrid: neither --compare nor more than one number "
                                    "of --threads");
    fill_in(a);
    return 0;
}

static int print_json(struct json_object *o)
{
    const char *text =
        json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE);

    if (!text)
        return -ENOMEM;
    puts(text);
    return 0;
}

/*
 * Lengths that were asked for and do not fit are an error, before anything is measured; others are
 * left out, but for the least.
 */
static int check_lengths(const struct arguments *a, const struct model *m, struct error *err)
{
    const struct bench_options *o = &a->bench;
    uint32_t most = model_config(m)->context_max;
    uint32_t prompt = o->prompts.values[a->has_prompts ? o->prompts.n - 1 : 0];
    uint32_t depth = o->depths.values[a->has_depths ? o->depths.n - 1 : 0];

    if (prompt > most)
        return error_set(err, EINVAL, "a prompt of %u tokens passes the context of %s, %u", prompt,
                         a->path, most);
    if (depth > most || o->n_decode > most - depth)
        return error_set(err, EINVAL, "a depth of %u and %u tokens more pass the context of %s, %u",
                         depth, o->n_decode, a->path, most);
    return 0;
}

struct comparison {
    const struct arguments *arguments;
    const struct model *model;
    struct json_object *old;
};

/* measure_check: refuses what could only be refused after minutes of measuring. */
static int check_comparison(const struct measurements *m, void *userdata, struct error *err)
{
    const struct comparison *c = userdata;
    const struct list *threads = &c->arguments->bench.threads;
    CLEANUP(json_object_putp) struct json_object *head = NULL;
    int has = threads->n == 0 ? compare_has_threads(c->old, m->n_threads) : 0;
    int r;

    if (report_head(&head, m, c->model) < 0)
        return error_set(err, ENOMEM, "out of memory");
    r = compare_check(c->old, head, c->arguments->compare, program, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < threads->n; i++)
        has |= compare_has_threads(c->old, threads->values[i]);
    if (!has)
        return error_set(err, EINVAL, "%s: has nothing with as many threads; see --threads",
                         c->arguments->compare);
    return 0;
}

/* Two files, nothing measured. */
static int compare_files(const struct arguments *a, struct error *err)
{
    CLEANUP(json_object_putp) struct json_object *old = NULL;
    CLEANUP(json_object_putp) struct json_object *fresh = NULL;
    CLEANUP(json_object_putp) struct json_object *list = NULL;
    int r = compare_read(&old, a->compare, err);

    if (r == 0)
        r = compare_read(&fresh, a->path, err);
    if (r == 0)
        r = compare_check(old, fresh, a->compare, program, err);
    if (r == 0)
        r = compare_make(&list, old, fresh, a->compare, err);
    if (r < 0)
        return r;
    r = a->json ? print_json(list) : compare_print(list, a->compare);
    return r < 0 ? error_set(err, ENOMEM, "out of memory") : 0;
}

/* 0; 1: interrupted, and told */
static int run(const struct arguments *a, struct error *err)
{
    const struct bench_options *o = &a->bench;
    CLEANUP(json_object_putp) struct json_object *old = NULL;
    CLEANUP(json_object_putp) struct json_object *top = NULL;
    CLEANUP(json_object_putp) struct json_object *list = NULL;
    CLEANUP(model_freep) struct model *m = NULL;
    CLEANUP(freep) struct measurements *found = calloc(1, sizeof(*found));
    struct comparison c = {.arguments = a};
    struct error why = {""};
    int r = 0, outcome; /* of measuring and comparing: what was measured is shown in any case */

    if (!found)
        return error_set(err, ENOMEM, "out of memory");
    if (a->compare)
        r = compare_read(&old, a->compare, err);
    if (r == 0)
        r = model_open(&m, a->path, err);
    if (r == 0)
        r = check_lengths(a, m, err);
    if (r < 0)
        return r;
    if (a->hybrid)
        return hybrid(m, o, a->json, err);
    c.old = old;
    c.model = m;
    outcome = measure(found, m, o, old ? check_comparison : NULL, &c, &why);
    if (outcome < 0 && found->n_results == 0)
        return error_set(err, -outcome, "%s", why.text);
    r = report_json(&top, found, m, o) < 0 ? error_set(err, ENOMEM, "out of memory") : 0;
    if (r == 0 && outcome == 0 && old && found->n_results > 0) {
        outcome = compare_make(&list, old, top, a->compare, &why);
        if (outcome == -EINVAL && !found->is_complete)
            outcome = 0; /* no wonder */
        if (list && !put(top, "comparison", json_object_get(list)))
            r = error_set(err, ENOMEM, "out of memory");
    }
    if (r < 0)
        return r;
    if (a->json)
        r = print_json(top);
    else
        r = report_print(found, m);
    if (r == 0 && list && !a->json)
        r = compare_print(list, a->compare);
    if (r < 0)
        return error_set(err, ENOMEM, "out of memory");
    if (outcome < 0)
        return error_set(err, -outcome, "%s", why.text);
    return found->is_complete ? 0 : 1;
}

int main(int argc, char **argv)
{
    struct arguments a = {.bench.engine = {.max_logits = MAX_SESSIONS}};
    struct error err = {""};
    int r, status;

    standard_fds_fill();
    if (argc > 1 && strcmp(argv[1], "serve") == 0) {
        char subcommand[] = "llm-bench serve"; /* for what getopt_long() has to say */

        argv[1] = subcommand;
        return serve_main(argc - 1, argv + 1);
    }
    if (argc > 1 && strcmp(argv[1], "load") == 0) {
        char subcommand[] = "llm-bench load";

        argv[1] = subcommand;
        return load_main(argc - 1, argv + 1);
    }
    r = parse_options(&a, argc, argv);
    if (r == EXIT_USAGE)
        return EXIT_USAGE;
    if (r == 1)
        return finish_output(program);
    r = compares_files(&a) ? compare_files(&a, &err) : run(&a, &err);
    if (r < 0) {
        finish_output(program); /* what was measured before */
        return run_error(program, "%s", err.text);
    }
    status = finish_output(program);
    if (r == 1) { /* the shell is to know */
        fprintf(stderr, "%s: interrupted: this is what there was\n", program);
        signal(SIGINT, SIG_DFL);
        raise(SIGINT);
    }
    return status;
}
