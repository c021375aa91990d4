/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * llm-bench load: how long a model takes to come from the disk: by several ways of reading it, and
 * until a daemon that is started with nothing in memory has given its first token. A round does
 * all of it once, so that what the disk and the machine do meanwhile happens to all alike; what
 * disturbs only makes slower, so the best round counts, and the median stands beside it.
 */

#include "tools/llm-bench/load.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/json.h"
#include "client/table.h"
#include "daemon/prefetch-child.h"
#include "engine/model-file.h"
#include "engine/model.h"
#include "tools/common/engine-args.h"
#include "tools/common/program.h"
#include "tools/llm-bench/arguments.h"
#include "tools/llm-bench/json.h"
#include "tools/llm-bench/private-daemon.h"
#include "tools/llm-bench/read-methods.h"
#include "tools/llm-bench/words.h"
#include "tools/llm-bench/worker.h"

#define MAX_ROUNDS 100
#define LEAST_BYTES (256u << 20) /* of less, beginning and ending a reading take a good part */

static const char program[] = "llm-bench load";

static const char help[] =
    "Usage: llm-bench load [OPTION]... MODEL [-- LLMD-OPTION...]\n"
    "Measures how long a model takes that is not in memory: read from the disk by several\n"
    "ways, and from the start of llmd to its first token. As root the kernel is told to\n"
    "forget all that it has cached before each time, else what it has of this file; that\n"
    "slows others down for a while.\n"
    "\n"
    "  --rounds N               of all measurements (3)\n"
    "  --prompt N               words that the first token follows (16)\n"
    "  --no-start               only read, start no llmd\n"
    "  --llmd PROGRAM           the daemon to start (the one beside this program)\n"
    "  --json                   print a JSON object\n"
    "  --help                   show this and exit";

struct options {
    const char *llmd, *path;
    char *const *more;
    uint32_t n_rounds, n_words;
    bool json, no_start;
};

/* Of all rounds; n of them were measured. */
struct series {
    double values[MAX_ROUNDS];
    uint32_t n;
};

/* Seconds from the start of a process, but for the last one. */
enum moment {
    COLD_READY, /* clients are served */
    COLD_FIRST,
    WARM_READY,
    WARM_FIRST,
    WARM_REQUEST, /* from a request to its first token, in a daemon that has answered before */
    N_MOMENTS
};

struct results {
    struct read_file file;
    struct series read[N_READ_METHODS], touch[N_READ_METHODS], whole[N_READ_METHODS];
    struct series processor[N_READ_METHODS];
    uint64_t huge[N_READ_METHODS]; /* the most */
    bool is_missing[N_READ_METHODS];
    struct series moments[N_MOMENTS];
    bool is_in_memory; /* the file, before it is forgotten */
    bool everything;   /* was forgotten */
    uint64_t left;     /* the most that was not, bytes */
};

/* ---- figures ---- */

static void add(struct series *s, double x)
{
    s->values[s->n++] = x;
}

static int by_size(const void *pa, const void *pb)
{
    const double *a = pa, *b = pb;

    return (*a > *b) - (*a < *b);
}

static double least(const struct series *s)
{
    double x = s->n > 0 ? s->values[0] : 0;

    for (uint32_t i = 1; i < s->n; i++)
        x = MIN(x, s->values[i]);
    return x;
}

static double median(const struct series *s)
{
    struct series sorted = *s;

    if (s->n == 0)
        return 0;
    qsort(sorted.values, s->n, sizeof(*sorted.values), by_size);
    return (sorted.values[(s->n - 1) / 2] + sorted.values[s->n / 2]) / 2;
}

static double rate(const struct results *r, double seconds)
{
    return seconds > 0 ? (double)read_file_bytes(&r->file) / seconds : 0;
}

/* Of the way that took least; the disk's own rate is no way to get a model into memory. */
static double best(const struct results *r, double (*of)(const struct series *))
{
    double x = 0;

    for (int m = 0; m < N_READ_METHODS; m++)
        if (m != READ_DIRECT && r->whole[m].n > 0 && (x == 0 || of(&r->whole[m]) < x))
            x = of(&r->whole[m]);
    return x;
}

/* What llmd does here. */
static enum read_method ours(const struct results *r)
{
    return r->is_missing[READ_RING_POPULATE] ? READ_POPULATE : READ_RING_POPULATE;
}

/* The first token of a cold start against what it has to wait for: reading, or computing. */
static double start_ratio(const struct results *r, double (*of)(const struct series *))
{
    double limit = MAX(best(r, of), of(&r->moments[WARM_FIRST]));

    return limit > 0 ? of(&r->moments[COLD_FIRST]) / limit : 0;
}

/* ---- measuring ---- */

static void progress(const char *what, uint32_t round, uint32_t n_rounds)
{
    if (!isatty(STDERR_FILENO))
        return;
    if (what)
        fprintf(stderr, "\r\033[Kround %u of %u: %s", round + 1, n_rounds, what);
    else
        fputs("\r\033[K", stderr);
    fflush(stderr);
}

/*
 * What is read next gets the memory that is given up here. In a virtual machine memory that was
 * free for a while is the host's again, and dear when it is touched; so that all measurements are
 * alike, the file was in memory before each of them.
 */
static int forget(struct results *r, struct error *err)
{
    uint64_t left = 0;
    struct read_time t;
    int k = 0;

    if (!r->is_in_memory)
        k = read_file_by(READ_POPULATE, &r->file, &t, err);
    if (k == -ENOSYS)
        k = read_file_by(READ_PLAIN, &r->file, &t, err);
    if (k == 0)
        k = read_file_forget(&r->file, &r->everything, &left, err);
    r->is_in_memory = false;
    r->left = MAX(r->left, left);
    return k;
}

static int read_all_ways(struct results *r, const struct options *o, uint32_t round,
                         struct error *err)
{
    for (enum read_method m = 0; m < N_READ_METHODS; m++) {
        struct read_time t;
        int k;

        if (r->is_missing[m])
            continue;
        progress(read_method_name(m), round, o->n_rounds);
        k = forget(r, err);
        if (k == 0)
            k = read_file_by(m, &r->file, &t, err);
        if (k == -ENOSYS) {
            r->is_missing[m] = true;
            progress(NULL, 0, 0);
            fprintf(stderr, "%s: %s is left out: %s\n", program, read_method_name(m), err->text);
            continue;
        }
        if (k < 0)
            return k;
        r->is_in_memory = m != READ_DIRECT;
        add(&r->read[m], t.read);
        add(&r->touch[m], t.touch);
        add(&r->whole[m], t.read + t.touch);
        add(&r->processor[m], t.processor);
        r->huge[m] = MAX(r->huge[m], t.huge_bytes);
    }
    return 0;
}

static double seconds_between(uint64_t from, uint64_t to)
{
    return 1e-9 * (double)(to - from);
}

/* *ret_first: when its first token came. 0; -EIO: it failed, or there was no token */
static int request(const struct options *o, uint64_t *ret_started, uint64_t *ret_first,
                   struct error *err)
{
    struct worker_task task = {.kind = WORKER_ONCE,
                               .socket = private_daemon_socket(),
                               .n_words = o->n_words,
                               .n_tokens = 1};
    struct worker w;
    int r;

    r = worker_start(&w, &task, err);
    if (r < 0)
        return r;
    r = worker_wait(&w, err);
    *ret_started = atomic_load(&w.log->started_at);
    *ret_first = atomic_load(&w.log->first_at);
    worker_done(&w);
    if (r == 0 && *ret_first == 0)
        return error_set(err, EIO, "the model had nothing to say after %u word%s", o->n_words,
                         plural_s(o->n_words));
    return r;
}

static int start(struct results *r, const struct options *o, bool cold, struct error *err)
{
    struct private_daemon_options d = {.program = o->llmd, .model = o->path, .more = o->more};
    struct error stop_err;
    uint64_t began, ready, started, first;
    int k;

    began = worker_now();
    k = private_daemon_start(&d, err);
    if (k < 0)
        return k;
    ready = worker_now();
    k = request(o, &started, &first, err);
    if (k == 0) {
        add(&r->moments[cold ? COLD_READY : WARM_READY], seconds_between(began, ready));
        add(&r->moments[cold ? COLD_FIRST : WARM_FIRST], seconds_between(began, first));
    }
    if (k == 0 && !cold) {
        k = request(o, &started, &first, err);
        if (k == 0)
            add(&r->moments[WARM_REQUEST], seconds_between(started, first));
    }
    if (private_daemon_stop(&stop_err) < 0 && k == 0) {
        *err = stop_err;
        k = -EIO;
    }
    return k;
}

static int measure(struct results *r, const struct options *o, struct error *err)
{
    int k = 0;

    for (uint32_t i = 0; k == 0 && i < o->n_rounds; i++) {
        k = read_all_ways(r, o, i, err);
        if (k < 0 || o->no_start)
            continue;
        progress("cold start", i, o->n_rounds);
        k = forget(r, err);
        if (k == 0)
            k = start(r, o, /* cold= */ true, err);
        r->is_in_memory = k == 0;
        progress("warm start", i, o->n_rounds);
        if (k == 0)
            k = start(r, o, /* cold= */ false, err);
    }
    progress(NULL, 0, 0);
    return k;
}

/* ---- the report ---- */

static const struct table_column read_columns[] = {
    {"METHOD", NULL, TABLE_TEXT, false},
    {NULL, "method", TABLE_TEXT, false},
    {"GB/S", NULL, TABLE_FIGURE, false},
    {NULL, "bytes_per_second", TABLE_FIGURE, false},
    {"MEDIAN", NULL, TABLE_FIGURE, false},
    {NULL, "bytes_per_second_median", TABLE_FIGURE, false},
    {"OF BEST", "share_of_best", TABLE_PERCENT, false},
    {"READ S", "read_seconds", TABLE_FIGURE, false},
    {"THEN S", "touch_seconds", TABLE_FIGURE, false},
    {"CPU S", "processor_seconds", TABLE_FIGURE, false},
    {"HUGE MB", NULL, TABLE_FIGURE, false},
    {NULL, "huge_bytes", TABLE_NUMBER, false},
};

static int make_reading(struct table **ret, const struct results *r)
{
    int k = table_new(ret, read_columns, ARRAY_SIZE(read_columns));

    for (int m = 0; k == 0 && m < N_READ_METHODS; m++) {
        if (r->whole[m].n == 0)
            continue;
        table_add_text(*ret, read_method_name((enum read_method)m));
        table_add_text(*ret, read_method_field((enum read_method)m));
        table_add_double(*ret, 1e-9 * rate(r, least(&r->whole[m])));
        table_add_double(*ret, rate(r, least(&r->whole[m])));
        table_add_double(*ret, 1e-9 * rate(r, median(&r->whole[m])));
        table_add_double(*ret, rate(r, median(&r->whole[m])));
        if (m == READ_DIRECT)
            table_add_none(*ret);
        else
            table_add_double(*ret, best(r, least) / least(&r->whole[m]));
        table_add_double(*ret, median(&r->read[m]));
        table_add_double(*ret, median(&r->touch[m]));
        table_add_double(*ret, median(&r->processor[m]));
        table_add_double(*ret, 1e-6 * (double)r->huge[m]);
        table_add_number(*ret, r->huge[m]);
    }
    return k;
}

static const struct table_column start_columns[] = {
    {"SECONDS", NULL, TABLE_TEXT, false},
    {NULL, "what", TABLE_TEXT, false},
    {"LEAST", "seconds_least", TABLE_FIGURE, false},
    {"MEDIAN", "seconds", TABLE_FIGURE, false},
};

static int make_start(struct table **ret, const struct results *r)
{
    static const struct {
        const char *name, *field;
    } names[N_MOMENTS] = {
        [COLD_READY] = {"cold: start to clients served", "cold_ready"},
        [COLD_FIRST] = {"cold: start to first token", "cold_first_token"},
        [WARM_READY] = {"warm: start to clients served", "warm_ready"},
        [WARM_FIRST] = {"warm: start to first token", "warm_first_token"},
        [WARM_REQUEST] = {"warm: request to first token", "warm_request"},
    };
    int k = table_new(ret, start_columns, ARRAY_SIZE(start_columns));

    for (int i = 0; k == 0 && i < N_MOMENTS; i++) {
        if (r->moments[i].n == 0)
            continue;
        table_add_text(*ret, names[i].name);
        table_add_text(*ret, names[i].field);
        table_add_double(*ret, least(&r->moments[i]));
        table_add_double(*ret, median(&r->moments[i]));
    }
    return k;
}

/* Takes t. */
static int print_table(struct table *t)
{
    static const struct table_format format = {.people = true};
    CLEANUP(freep) char *text = NULL;
    int r = table_format_rows(t, &format, &text);

    table_free(t);
    if (r == 0)
        fputs(text, stdout);
    return r;
}

static int print_report(const struct results *r, const struct options *o)
{
    struct table *t;
    int k;

    printf("model    %s, %.0f MB, of which %.0f MB are read ahead\n", o->path,
           1e-6 * (double)r->file.size, 1e-6 * (double)read_file_bytes(&r->file));
    printf("cold     %s\n\n", r->everything
                                  ? "the kernel has forgotten all files"
                                  : "the kernel has forgotten this file, not the programs");
    k = make_reading(&t, r);
    if (k == 0)
        k = print_table(t);
    if (k < 0)
        return k;
    printf("\n%s, which llmd uses, reaches %.0f %% of the best\n", read_method_name(ours(r)),
           100 * best(r, least) / least(&r->whole[ours(r)]));
    if (o->no_start)
        return 0;
    putchar('\n');
    k = make_start(&t, r);
    if (k == 0)
        k = print_table(t);
    if (k == 0)
        printf(
            "\nfirst token of a cold start against reading, or a warm start, whichever is longer: "
            "%.2f (medians: %.2f)\n",
            start_ratio(r, least), start_ratio(r, median));
    return k;
}

/* Takes t. */
static bool put_table(struct json_object *o, const char *key, int k, struct table *t)
{
    struct json_object *list = NULL;

    if (k == 0)
        k = table_to_json(t, &list);
    table_free(t);
    return k == 0 && put(o, key, list);
}

static struct json_object *model_json(const struct results *r, const struct options *o)
{
    struct json_object *model = json_object_new_object();

    if (model && put(model, "path", json_object_new_string(o->path)) &&
        put(model, "bytes", whole(r->file.size)) &&
        put(model, "read_bytes", whole(read_file_bytes(&r->file))))
        return model;
    json_object_put(model);
    return NULL;
}

static int print_json(const struct results *r, const struct options *o)
{
    CLEANUP(json_object_putp) struct json_object *top = json_object_new_object();
    struct table *t = NULL;
    const char *text;
    int k;

    if (!top || !put(top, "format", json_object_new_string("llm-bench load 1")) ||
        !put(top, "version", json_object_new_string(LLMD_VERSION)) ||
        !put(top, "model", model_json(r, o)) || !put(top, "rounds", whole(o->n_rounds)) ||
        !put(top, "everything_forgotten", json_object_new_boolean(r->everything)) ||
        !put(top, "left_in_memory_bytes", whole(r->left)))
        return -ENOMEM;
    k = make_reading(&t, r);
    if (!put_table(top, "reading", k, t) ||
        !put(top, "method", json_object_new_string(read_method_field(ours(r)))) ||
        !put(top, "share_of_best", number(best(r, least) / least(&r->whole[ours(r)]))))
        return -ENOMEM;
    if (!o->no_start) {
        k = make_start(&t, r);
        if (!put_table(top, "start", k, t) || !put(top, "prompt_words", whole(o->n_words)) ||
            !put(top, "first_token_ratio", number(start_ratio(r, least))) ||
            !put(top, "first_token_ratio_median", number(start_ratio(r, median))))
            return -ENOMEM;
    }
    text = json_object_to_json_string_ext(top,
                                          JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE);
    if (!text)
        return -ENOMEM;
    puts(text);
    return 0;
}

/* ---- arguments ---- */

static int take_option(void *userdata, int option, const char *value, struct error *err)
{
    struct options *o = userdata;

    switch (option) {
    case 'r':
        return parse_number("--rounds", value, 1, MAX_ROUNDS, &o->n_rounds, err);
    case 'p':
        return parse_number("--prompt", value, 1, MODEL_MAX_CONTEXT, &o->n_words, err);
    case 'n':
        o->no_start = true;
        break;
    case 'l':
        o->llmd = value;
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
        {"rounds", required_argument, NULL, 'r'},
        {"prompt", required_argument, NULL, 'p'},
        {"no-start", no_argument, NULL, 'n'},
        {"llmd", required_argument, NULL, 'l'},
        {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    const struct arguments_form form = {program, help, long_options, take_option, o};
    bool has_more;
    int r = arguments_read(&form, argc, argv, &o->path, &o->more, &has_more);

    if (r != 0)
        return r;
    if (!o->path)
        return usage_error(program, "no MODEL given");
    if (o->no_start && (o->llmd || has_more))
        return usage_error(program, "with --no-start there is no llmd to choose or to tell");
    return 0;
}

/* Which part is read; the model is closed again, so that its pages can be forgotten. */
static int look(struct results *r, const struct options *o, struct error *err)
{
    CLEANUP(read_order_done) struct read_order order = {0};
    CLEANUP(model_freep) struct model *m = NULL;
    size_t size;
    int k = model_open(&m, o->path, err);

    if (k == 0 && model_read_order(&order, model_get_file(m), PREFETCH_PIECE_BYTES) < 0)
        k = error_set(err, ENOMEM, "out of memory");
    if (k < 0)
        return k;
    model_file_map(model_get_file(m), &size);
    r->file = (struct read_file){
        .path = o->path, .size = size, .skip_from = order.not_from, .skip_to = order.not_to};
    return 0;
}

static int run(const struct options *o, struct error *err)
{
    CLEANUP(freep) struct results *r = calloc(1, sizeof(*r));
    int k;

    if (!r)
        return error_set(err, ENOMEM, "out of memory");
    k = look(r, o, err);
    if (k == 0)
        k = measure(r, o, err);
    if (k < 0)
        return k;
    if (r->left > read_file_bytes(&r->file) / 50)
        fprintf(stderr,
                "%s: %.0f MB of the file stayed in memory, somebody else uses it: the figures are "
                "too good\n",
                program, 1e-6 * (double)r->left);
    if (read_file_bytes(&r->file) < LEAST_BYTES)
        fprintf(stderr, "%s: %.0f MB are too few to tell much of the disk: take a larger model\n",
                program, 1e-6 * (double)read_file_bytes(&r->file));
    if (o->json ? print_json(r, o) < 0 : print_report(r, o) < 0)
        return error_set(err, ENOMEM, "out of memory");
    return 0;
}

int load_main(int argc, char **argv)
{
    struct options o = {.n_rounds = 3, .n_words = 16};
    struct error err = {""};
    int r = parse_options(&o, argc, argv);

    if (r == EXIT_USAGE)
        return EXIT_USAGE;
    if (r == 0 && run(&o, &err) < 0) {
        progress(NULL, 0, 0);
        return run_error(program, "%s", err.text);
    }
    return finish_output(program);
}
