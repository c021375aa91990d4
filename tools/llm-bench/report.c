/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Each part is a table whose cells serve both: columns with a heading are for people, in units they
 * read easily, columns with a field for JSON, in bytes, seconds and operations.
 */

#include "tools/llm-bench/report.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/json.h"
#include "client/table.h"
#include "engine/model-file.h"
#include "tools/llm-bench/json.h"
#include "tools/llm-bench/words.h"

/* A figure in two units: one column for people, one for JSON. add_scaled() fills both. */
#define SCALED(heading, field)              \
    {(heading), NULL, TABLE_FIGURE, false}, \
    {                                       \
        NULL, (field), TABLE_FIGURE, false  \
    }
#define NUMBER(heading, field)                  \
    {                                           \
        (heading), (field), TABLE_NUMBER, false \
    }
#define RATE(heading, field)                    \
    {                                           \
        (heading), (field), TABLE_FIGURE, false \
    }
#define SHARE(heading, field)                    \
    {                                            \
        (heading), (field), TABLE_PERCENT, false \
    }
#define NAME(heading, field)                  \
    {                                         \
        (heading), (field), TABLE_TEXT, false \
    }

static void add_known(struct table *t, double x)
{
    if (isfinite(x) && x != 0)
        table_add_double(t, x);
    else
        table_add_none(t);
}

static void add_scaled(struct table *t, double x, double scale)
{
    add_known(t, x * scale);
    add_known(t, x);
}

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static const struct limits *limits_of(const struct measurements *m, uint32_t n_threads)
{
    for (size_t i = 0; i < m->n_limits; i++)
        if (m->limits[i].n_threads == n_threads)
            return &m->limits[i];
    return &m->limits[0];
}

/* Tokens per second, were the busier of memory and multipliers busy all the time. */
static double limit_rate(const struct limits *l, const struct op_sum *s, double tokens)
{
    return ratio(tokens, MAX(limits_read_seconds(l, s), limits_multiply_seconds(l, s)));
}

/* ---- limits ---- */

static const struct table_column limit_columns[] = {
    NUMBER("THREADS", "threads"),
    {NULL, "read_bytes_per_second", TABLE_FIGURE, false},
    SCALED("READ GB/S", "read_before_median_bytes_per_second"),
    SCALED("MOST", "read_before_max_bytes_per_second"),
    SCALED("AFTERWARDS", "read_after_median_bytes_per_second"),
    SCALED("MOST", "read_after_max_bytes_per_second"),
    SCALED("INT8 GOP/S", "int8_operations_per_second"),
    SCALED("F32 GFLOP/S", "f32_operations_per_second"),
    SCALED("BF16 GFLOP/S", "bf16_operations_per_second"),
};

static int make_limits(struct table **ret, const struct measurements *m)
{
    int r = table_new(ret, limit_columns, ARRAY_SIZE(limit_columns));

    for (size_t i = 0; r == 0 && i < m->n_limits; i++) {
        const struct limits *l = &m->limits[i];
        struct probe_rate before = l->has_read ? l->read_before : (struct probe_rate){0, 0};
        struct probe_rate after = l->has_read_after ? l->read_after : (struct probe_rate){0, 0};

        if (!l->has_read)
            continue;
        table_add_number(*ret, l->n_threads);
        add_known(*ret, limits_read(l));
        add_scaled(*ret, before.median, 1e-9);
        add_scaled(*ret, before.max, 1e-9);
        add_scaled(*ret, after.median, 1e-9);
        add_scaled(*ret, after.max, 1e-9);
        for (int k = 0; k < N_PROBE_MULTIPLIERS; k++)
            add_scaled(*ret, l->has_multiplier[k] ? l->multiply[k].max : 0, 1e-9);
    }
    return r;
}

/* ---- prefill ---- */

static const struct table_column prefill_columns[] = {
    NUMBER("THREADS", "threads"),
    NUMBER("PROMPT", "prompt_tokens"),
    RATE("TOKENS/S", "tokens_per_second"),
    RATE("LEAST", "tokens_per_second_least"),
    RATE("MOST", "tokens_per_second_most"),
    SCALED("MS", "seconds"),
    SCALED("GOP/TOKEN", "operations_per_token"),
    SCALED("GOP/S", "operations_per_second"),
    SHARE("OF MUL", "multiply_share"),
    RATE("LIMIT", "limit_tokens_per_second"),
    {NULL, "repetitions", TABLE_NUMBER, false},
};

static int make_prefill(struct table **ret, const struct measurements *m)
{
    int r = table_new(ret, prefill_columns, ARRAY_SIZE(prefill_columns));

    for (size_t i = 0; r == 0 && i < m->n_results; i++) {
        const struct result *x = &m->results[i];
        const struct limits *l = limits_of(m, x->n_threads);
        struct op_sum total = result_total(x);
        double n = x->n_tokens, operations = total.operations_int8 + total.operations_f32;

        if (x->is_decode)
            continue;
        table_add_number(*ret, x->n_threads);
        table_add_number(*ret, x->n_tokens);
        add_known(*ret, n / x->median);
        add_known(*ret, n / x->most);
        add_known(*ret, n / x->least);
        add_scaled(*ret, x->median, 1e3);
        add_scaled(*ret, operations / n, 1e-9);
        add_scaled(*ret, operations / x->median, 1e-9);
        add_known(*ret, limits_multiply_seconds(l, &total) / x->median);
        add_known(*ret, limit_rate(l, &total, n));
        table_add_number(*ret, x->n_repetitions);
    }
    return r;
}

/* ---- decoding ---- */

static const struct table_column decode_columns[] = {
    NUMBER("THREADS", "threads"),
    NUMBER("DEPTH", "depth_tokens"),
    NUMBER("SESSIONS", "sessions"),
    RATE("TOKENS/S", "tokens_per_second"),
    RATE("LEAST", "tokens_per_second_least"),
    RATE("MOST", "tokens_per_second_most"),
    RATE("EACH", "tokens_per_second_each"),
    SCALED("MS/STEP", "seconds_per_step"),
    SCALED("MB/STEP", "bytes_per_step"),
    SCALED("GB/S", "bytes_per_second"),
    SHARE("OF READ", "read_share"),
    SCALED("GOP/S", "operations_per_second"),
    SHARE("OF MUL", "multiply_share"),
    RATE("LIMIT", "limit_tokens_per_second"),
    {NULL, "operations_per_step", TABLE_FIGURE, false},
    {NULL, "steps", TABLE_NUMBER, false},
    {NULL, "repetitions", TABLE_NUMBER, false},
};

static int make_decode(struct table **ret, const struct measurements *m)
{
    int r = table_new(ret, decode_columns, ARRAY_SIZE(decode_columns));

    for (size_t i = 0; r == 0 && i < m->n_results; i++) {
        const struct result *x = &m->results[i];
        const struct limits *l = limits_of(m, x->n_threads);
        struct op_sum total = result_total(x);
        double n = x->n_sessions, operations = total.operations_int8 + total.operations_f32;

        if (!x->is_decode)
            continue;
        table_add_number(*ret, x->n_threads);
        table_add_number(*ret, x->n_tokens);
        table_add_number(*ret, x->n_sessions);
        add_known(*ret, n / x->median);
        add_known(*ret, n / x->most);
        add_known(*ret, n / x->least);
        add_known(*ret, 1 / x->median);
        add_scaled(*ret, x->median, 1e3);
        add_scaled(*ret, total.bytes, 1e-6);
        add_scaled(*ret, total.bytes / x->median, 1e-9);
        add_known(*ret, limits_read_seconds(l, &total) / x->median);
        add_scaled(*ret, operations / x->median, 1e-9);
        add_known(*ret, limits_multiply_seconds(l, &total) / x->median);
        add_known(*ret, limit_rate(l, &total, n));
        add_known(*ret, operations);
        table_add_number(*ret, x->n_steps);
        table_add_number(*ret, x->n_repetitions);
    }
    return r;
}

/* ---- operations ---- */

static const struct table_column operation_columns[] = {
    {NULL, "phase", TABLE_TEXT, false},
    {NULL, "threads", TABLE_NUMBER, false},
    {NULL, "tokens", TABLE_NUMBER, false}, /* of the prompt, or of each session */
    {NULL, "sessions", TABLE_NUMBER, false},
    NAME("OPERATION", "operation"),
    SCALED("MS", "seconds"),
    SHARE("OF TIME", "time_share"),
    SCALED("MB", "bytes"),
    SCALED("GB/S", "bytes_per_second"),
    SHARE("OF READ", "read_share"),
    SCALED("GOP/S", "operations_per_second"),
    SHARE("OF MUL", "multiply_share"),
    {NULL, "operations", TABLE_FIGURE, false},
};

static void add_operations(struct table *t, const struct measurements *m, const struct result *x)
{
    const struct limits *l = limits_of(m, x->n_threads);

    for (int c = 0; c < N_OP_CLASSES; c++) {
        const struct op_sum *s = &x->ops[c];
        double operations = s->operations_int8 + s->operations_f32;

        if (s->seconds <= 0)
            continue;
        table_add_text(t, x->is_decode ? "decode" : "prefill");
        table_add_number(t, x->n_threads);
        table_add_number(t, x->n_tokens);
        table_add_number(t, x->n_sessions);
        table_add_text(t, op_class_name((enum op_class)c));
        add_scaled(t, s->seconds, 1e3);
        add_known(t, s->seconds / x->timed);
        add_scaled(t, s->bytes, 1e-6);
        add_scaled(t, s->bytes / s->seconds, 1e-9);
        add_known(t, limits_read_seconds(l, s) / s->seconds);
        add_scaled(t, operations / s->seconds, 1e-9);
        add_known(t, limits_multiply_seconds(l, s) / s->seconds);
        add_known(t, operations);
    }
}

/* of: one case, or NULL for all. */
static int make_operations(struct table **ret, const struct measurements *m,
                           const struct result *of)
{
    int r = table_new(ret, operation_columns, ARRAY_SIZE(operation_columns));

    for (size_t i = 0; r == 0 && i < m->n_results; i++)
        if (!of || of == &m->results[i])
            add_operations(*ret, m, &m->results[i]);
    return r;
}

/* ---- scaling ---- */

static const struct table_column scaling_columns[] = {
    NAME("PHASE", "phase"),
    NUMBER("TOKENS", "tokens"),
    NUMBER("SESSIONS", "sessions"),
    NUMBER("THREADS", "threads"),
    NUMBER("AGAINST", "against_threads"),
    {"FASTER", NULL, TABLE_TEXT, false},
    {NULL, "ratio", TABLE_FIGURE, false},
};

static const struct result *same_case(const struct measurements *m, const struct result *x,
                                      uint32_t n_threads)
{
    for (size_t i = 0; i < m->n_results; i++) {
        const struct result *y = &m->results[i];

        if (y->is_decode == x->is_decode && y->n_tokens == x->n_tokens &&
            y->n_sessions == x->n_sessions && y->n_threads == n_threads)
            return y;
    }
    return NULL;
}

static int make_scaling(struct table **ret, const struct measurements *m)
{
    int r = table_new(ret, scaling_columns, ARRAY_SIZE(scaling_columns));

    for (size_t i = 0; r == 0 && i < m->n_results; i++) {
        const struct result *x = &m->results[i];
        const struct result *first = same_case(m, x, m->limits[0].n_threads);
        char text[32];

        if (!first || first->n_threads == x->n_threads)
            continue;
        table_add_text(*ret, x->is_decode ? "decode" : "prefill");
        table_add_number(*ret, x->n_tokens);
        table_add_number(*ret, x->n_sessions);
        table_add_number(*ret, x->n_threads);
        table_add_number(*ret, first->n_threads);
        snprintf(text, sizeof(text), "%.2f", first->median / x->median);
        table_add_text(*ret, text);
        add_known(*ret, first->median / x->median);
    }
    return r;
}

/* ---- for programs ---- */

static struct json_object *string(const char *text)
{
    return json_object_new_string(text ? text : "");
}

/* "model name" of the first processor; "" where the system does not tell. */
static void read_cpu(char *ret, size_t n)
{
    CLEANUP(fclosep) FILE *f = fopen("/proc/cpuinfo", "re");
    char line[512];

    snprintf(ret, n, "%s", "");
    while (f && fgets(line, sizeof(line), f))
        if (strncmp(line, "model name", 10) == 0 && strstr(line, ": ")) {
            line[strcspn(line, "\n")] = '\0';
            snprintf(ret, n, "%s", strstr(line, ": ") + 2);
            break;
        }
}

static uint64_t memory_bytes(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);

    return pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size : 0;
}

/* False when out of memory; then value is gone. */
static bool put_new(struct json_object *o, const char *key, struct json_object **ret)
{
    struct json_object *x = json_object_new_object();

    *ret = x;
    return put(o, key, x);
}

int report_head(struct json_object **ret, const struct measurements *m, const struct model *model)
{
    CLEANUP(json_object_putp) struct json_object *o = json_object_new_object();
    const struct model_file *f = model_get_file(model);
    struct json_object *x;
    char cpu[256];
    size_t bytes;
    bool good;

    read_cpu(cpu, sizeof(cpu));
    (void)model_file_map(f, &bytes);
    good = o && put(o, "format", string(REPORT_FORMAT)) && put(o, "version", string(LLMD_VERSION));
    good = good && put_new(o, "model", &x) && put(x, "path", string(model_file_path(f))) &&
           put(x, "bytes", whole(bytes)) &&
           put(x, "header_sha256", string(model_file_metadata(f, "llmd.header_sha256")));
    good = good && put_new(o, "machine", &x) && put(x, "cpu", string(cpu)) &&
           put(x, "processors", whole((uint64_t)MAX(sysconf(_SC_NPROCESSORS_ONLN), 1L))) &&
           put(x, "memory_bytes", whole(memory_bytes()));
    good = good && put_new(o, "engine", &x) && put(x, "description", string(m->description)) &&
           put(x, "level", string(m->level)) &&
           put(x, "activations", string(m->is_f32 ? "f32" : "int8")) &&
           put(x, "kv", string(strstr(m->description, "f32 KV") ? "f32" : "f16"));
    if (!good)
        return -ENOMEM;
    *ret = TAKE_PTR(o);
    return 0;
}

/* Takes the table. */
static bool put_table(struct json_object *o, const char *key, int r, struct table *t)
{
    struct json_object *list;

    if (r == 0)
        r = table_to_json(t, &list);
    table_free(t);
    return r == 0 && put(o, key, list);
}

int report_json(struct json_object **ret, const struct measurements *m, const struct model *model,
                const struct bench_options *o)
{
    CLEANUP(json_object_putp) struct json_object *top = NULL;
    const struct accuracy *a = &m->accuracy;
    struct json_object *x;
    struct table *t = NULL;
    bool good = report_head(&top, m, model) == 0;
    int r;

    good = good && put(top, "complete", json_object_new_boolean(m->is_complete)) &&
           put(top, "repetitions", whole(o->n_repetitions));
    r = good ? make_limits(&t, m) : -ENOMEM;
    good = good && put_table(top, "limits", r, TAKE_PTR(t));
    r = good ? make_prefill(&t, m) : -ENOMEM;
    good = good && put_table(top, "prefill", r, TAKE_PTR(t));
    r = good ? make_decode(&t, m) : -ENOMEM;
    good = good && put_table(top, "decode", r, TAKE_PTR(t));
    r = good ? make_operations(&t, m, NULL) : -ENOMEM;
    good = good && put_table(top, "operations", r, TAKE_PTR(t));
    r = good ? make_scaling(&t, m) : -ENOMEM;
    good = good && put_table(top, "scaling", r, TAKE_PTR(t));
    good = good && put_new(top, "memory", &x) &&
           put(x, "anonymous_bytes", whole(m->memory.anonymous)) &&
           put(x, "file_bytes", whole(m->memory.file)) &&
           put(x, "peak_resident_bytes", whole(m->memory.peak)) &&
           put(x, "kv_bytes_used", whole(m->memory.engine.kv_bytes_used)) &&
           put(x, "kv_bytes_max", whole(m->memory.engine.kv_bytes_max)) &&
           put(x, "scratch_bytes", whole(m->memory.engine.scratch_bytes));
    if (good && a->n_positions > 0)
        good = put_new(top, "accuracy", &x) &&
               put(x, "reference", string("f32 activations, f32 KV")) &&
               put(x, "input", string(a->is_text ? "text" : "random tokens")) &&
               put(x, "positions", whole(a->n_positions)) &&
               put(x, "kld_mean_nats", number(a->mean)) &&
               put(x, "kld_max_nats", number(a->most)) &&
               put(x, "same_top_share", number(ratio(a->n_agree, a->n_positions)));
    if (!good)
        return -ENOMEM;
    *ret = TAKE_PTR(top);
    return 0;
}

/* ---- for people ---- */

/* Takes the table; nothing where it has no rows. */
static int print_table(const char *title, int r, struct table *t)
{
    static const struct table_format format = {.people = true};
    CLEANUP(freep) char *text = NULL;

    if (r == 0 && table_n_rows(t) > 0) {
        r = table_format_rows(t, &format, &text);
        if (r == 0)
            printf("\n%s\n%s", title, text);
    }
    table_free(t);
    return r;
}

/* The cases whose operations are shown: those that the targets of docs/performance.md are about. */
static bool is_shown(const struct measurements *m, const struct result *x)
{
    const struct result *prompt = NULL;
    uint32_t least_depth = UINT32_MAX, least = UINT32_MAX, most = 0;

    if (x->n_threads != m->limits[m->n_limits - 1].n_threads)
        return false;
    for (size_t i = 0; i < m->n_results; i++) {
        const struct result *y = &m->results[i];

        if (y->n_threads != x->n_threads)
            continue;
        if (!y->is_decode) {
            if (!prompt || (y->n_tokens <= 512 && y->n_tokens > prompt->n_tokens))
                prompt = y;
        } else if (y->n_tokens < least_depth) {
            least_depth = y->n_tokens;
        }
    }
    for (size_t i = 0; i < m->n_results; i++) {
        const struct result *y = &m->results[i];

        if (y->n_threads == x->n_threads && y->is_decode && y->n_tokens == least_depth) {
            least = MIN(least, y->n_sessions);
            most = MAX(most, y->n_sessions);
        }
    }
    if (!x->is_decode)
        return x == prompt;
    return x->n_tokens == least_depth && (x->n_sessions == least || x->n_sessions == most);
}

static const char legend[] =
    "\nLEAST, MOST: the slowest and the fastest repetition; EACH: tokens/s of one session\n"
    "MB, GB/S: what had to be read; GOP: 10^9 multiplications and additions\n"
    "OF READ, OF MUL: how much of the machine's limit of reading and of multiplying that is\n"
    "LIMIT: tokens/s if the narrower of the two were busy all the time\n";

int report_print(const struct measurements *m, const struct model *model)
{
    const struct accuracy *a = &m->accuracy;
    struct table *t = NULL;
    char cpu[256];
    int r;

    read_cpu(cpu, sizeof(cpu));
    printf("model    %s\n", model_file_path(model_get_file(model)));
    printf("engine   %s\n", m->description);
    printf("machine  %s, %ld processors, %.0f GB\n", cpu[0] ? cpu : "unknown",
           sysconf(_SC_NPROCESSORS_ONLN), 1e-9 * (double)memory_bytes());
    printf("memory   anonymous %.0f MB, file %.0f MB, peak %.0f MB; KV %.1f MB of %.0f, scratch "
           "%.1f MB\n",
           1e-6 * (double)m->memory.anonymous, 1e-6 * (double)m->memory.file,
           1e-6 * (double)m->memory.peak, 1e-6 * (double)m->memory.engine.kv_bytes_used,
           1e-6 * (double)m->memory.engine.kv_bytes_max,
           1e-6 * (double)m->memory.engine.scratch_bytes);
    if (a->n_positions > 0)
        printf("KLD      mean %.2e, most %.2e nats, same top token %.1f %%; %u position%s of %s,\n"
               "         against f32 activations and f32 KV, which differ from float64 by 2e-12\n",
               a->mean, a->most, 100 * ratio(a->n_agree, a->n_positions), a->n_positions,
               plural_s(a->n_positions), a->is_text ? "text" : "random tokens");
    r = make_limits(&t, m);
    r = print_table("Limits of the machine, measured before and afterwards", r, TAKE_PTR(t));
    if (r == 0) {
        r = make_prefill(&t, m);
        r = print_table("Prefill: reading a prompt", r, TAKE_PTR(t));
    }
    if (r == 0) {
        r = make_decode(&t, m);
        r = print_table("Decode: one token for each session and step", r, TAKE_PTR(t));
    }
    if (r == 0) {
        r = make_scaling(&t, m);
        r = print_table("Threads", r, TAKE_PTR(t));
    }
    if (r == 0 && m->n_results > 0)
        fputs(legend, stdout);
    for (size_t i = 0; r == 0 && i < m->n_results; i++) {
        const struct result *x = &m->results[i];
        char title[128];

        if (!is_shown(m, x))
            continue;
        if (x->is_decode)
            snprintf(title, sizeof(title), "A step of %u session%s at depth %u, %u thread%s",
                     x->n_sessions, plural_s(x->n_sessions), x->n_tokens, x->n_threads,
                     plural_s(x->n_threads));
        else
            snprintf(title, sizeof(title), "A prompt of %u token%s, %u thread%s", x->n_tokens,
                     plural_s(x->n_tokens), x->n_threads, plural_s(x->n_threads));
        r = make_operations(&t, m, x);
        r = print_table(title, r, TAKE_PTR(t));
    }
    return r < 0 ? -ENOMEM : 0;
}
