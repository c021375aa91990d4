/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * For each length of a prompt and number of sessions: the GPU reads one alone, the processor
 * decodes as many tokens alone, then both: the processor decodes from when the GPU begins to read
 * until it is done, and both rates are of that time. So what they take from each other, of the
 * memory's bandwidth above all, is the difference. Medians of the repetitions.
 */

#include "tools/llm-bench/hybrid.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/json.h"
#include "client/table.h"
#include "tools/common/engine-args.h"
#include "tools/llm-bench/json.h"

#define MAX_REPETITIONS 1000u

struct pair {
    double read, decode; /* tokens a second */
};

struct hybrid {
    const struct bench_options *o;
    struct engine *engine;
    uint32_t vocab_size, context, depth;
    struct session *reader, *writers[MAX_SESSIONS];
    uint32_t n_written;
};

static uint32_t token_at(const struct hybrid *h, uint32_t i)
{
    return (i * 7919u + 3) % h->vocab_size;
}

static int check_items(const struct step_item *items, size_t n, int r, struct error *err)
{
    for (size_t i = 0; r >= 0 && i < n; i++)
        r = items[i].ret_error;
    return r < 0 ? error_set(err, -r, "evaluation failed: %s", strerror(-r)) : 0;
}

/* One token more for each. */
static int decode_step(struct hybrid *h, uint32_t n, struct error *err)
{
    struct step_item items[MAX_SESSIONS];
    uint32_t token = token_at(h, h->n_written++);
    int r;

    for (uint32_t i = 0; i < n; i++) {
        if (session_n_tokens(h->writers[i]) == session_n_ctx(h->writers[i]))
            session_rewind(h->writers[i], h->depth);
        items[i] = (struct step_item){
            .session = h->writers[i], .tokens = &token, .n_tokens = 1, .wanted = LOGITS_LAST};
    }
    r = engine_start(h->engine, LANE_CPU, items, n);
    if (r >= 0)
        r = engine_end(h->engine, LANE_CPU);
    return check_items(items, n, r, err);
}

/* The whole prompt by the GPU; meanwhile, where n > 0, n sessions decode: *ret_decoded tokens. */
static int read_prompt(struct hybrid *h, uint32_t prompt, uint32_t n, uint32_t *ret_decoded,
                       struct error *err)
{
    uint32_t most = engine_lane_max_rows(h->engine, LANE_GPU), at = 0;
    CLEANUP(freep) uint32_t *ids = calloc(most, sizeof(*ids));
    int r = 0;

    if (!ids)
        return error_set(err, ENOMEM, "out of memory");
    session_rewind(h->reader, 0);
    while (at < prompt && r >= 0) {
        struct step_item item = {.session = h->reader,
                                 .tokens = ids,
                                 .n_tokens = MIN(most, prompt - at),
                                 .wanted = LOGITS_NONE};
        int over;

        for (uint32_t i = 0; i < item.n_tokens; i++)
            ids[i] = token_at(h, at + i);
        r = engine_start(h->engine, LANE_GPU, &item, 1);
        if (r < 0)
            return check_items(&item, 1, r, err);
        while (n > 0 && r >= 0 && engine_wait(h->engine, LANE_GPU, 0) == -ETIMEDOUT) {
            r = decode_step(h, n, err);
            *ret_decoded += n;
        }
        over = engine_end(h->engine, LANE_GPU);
        if (r >= 0)
            r = check_items(&item, 1, over, err);
        at += item.n_tokens;
    }
    return r;
}

static int by_size(const void *pa, const void *pb)
{
    const double *a = pa, *b = pb;

    return (*a > *b) - (*a < *b);
}

static double median(double *x, uint32_t n)
{
    qsort(x, n, sizeof(*x), by_size);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* The first repetition warms up. n: sessions that decode; 0: the GPU alone. */
static int measure_reading(struct hybrid *h, uint32_t prompt, uint32_t n, struct pair *ret,
                           struct error *err)
{
    static double read[MAX_REPETITIONS], decode[MAX_REPETITIONS];

    for (uint32_t i = 0; i <= h->o->n_repetitions; i++) {
        uint32_t decoded = 0;
        double start = now_seconds(), took;
        int r = read_prompt(h, prompt, n, &decoded, err);

        if (r < 0)
            return r;
        took = now_seconds() - start;
        if (i == 0)
            continue;
        read[i - 1] = prompt / took;
        decode[i - 1] = decoded / took;
    }
    *ret = (struct pair){median(read, h->o->n_repetitions), median(decode, h->o->n_repetitions)};
    return 0;
}

static int measure_decoding(struct hybrid *h, uint32_t n, double *ret, struct error *err)
{
    static double rates[MAX_REPETITIONS];

    for (uint32_t i = 0; i <= h->o->n_repetitions; i++) {
        double start = now_seconds();

        for (uint32_t t = 0; t < h->o->n_decode; t++) {
            int r = decode_step(h, n, err);

            if (r < 0)
                return r;
        }
        if (i > 0)
            rates[i - 1] = n * h->o->n_decode / (now_seconds() - start);
    }
    *ret = median(rates, h->o->n_repetitions);
    return 0;
}

/* Those that decode have so many tokens. */
static int make_sessions(struct hybrid *h, uint32_t most, struct error *err)
{
    CLEANUP(freep) uint32_t *ids = calloc(h->depth, sizeof(*ids));
    uint32_t n_ctx = MIN(h->context, h->depth + h->o->n_decode + 64);
    int r = session_new(&h->reader, h->engine, 0, NULL);

    if (!ids)
        return error_set(err, ENOMEM, "out of memory");
    for (uint32_t i = 0; i < h->depth; i++)
        ids[i] = token_at(h, i);
    for (uint32_t i = 0; r >= 0 && i < most; i++) {
        r = session_new(&h->writers[i], h->engine, n_ctx, NULL);
        for (uint32_t at = 0; r >= 0 && at < h->depth;) {
            struct step_item item = {
                .session = h->writers[i],
                .tokens = ids + at,
                .n_tokens = MIN(h->depth - at, engine_lane_max_rows(h->engine, LANE_CPU))};

            r = engine_start(h->engine, LANE_CPU, &item, 1);
            if (r >= 0)
                r = engine_end(h->engine, LANE_CPU);
            if (r >= 0)
                r = item.ret_error;
            at += item.n_tokens;
        }
        if (r >= 0)
            session_set_mark(h->writers[i], h->depth);
    }
    return r < 0 ? error_set(err, -r, "cannot make the sessions: %s", strerror(-r)) : 0;
}

static const struct table_column columns[] = {
    {"prompt", "prompt_tokens", TABLE_NUMBER, false},
    {"sessions", "sessions", TABLE_NUMBER, false},
    {"GPU reads", "gpu_read_alone", TABLE_RATE, false},
    {"beside", "gpu_read_beside", TABLE_RATE, false},
    {"CPU decodes", "cpu_decode_alone", TABLE_RATE, false},
    {"beside", "cpu_decode_beside", TABLE_RATE, false},
};

static int run_all(struct hybrid *h, struct table *t, struct error *err)
{
    const struct list *prompts = &h->o->prompts, *sessions = &h->o->sessions;
    int r = 0;

    for (size_t p = 0; p < prompts->n; p++) {
        struct pair alone, both;

        if (prompts->values[p] > h->context)
            continue;
        r = measure_reading(h, prompts->values[p], 0, &alone, err);
        for (size_t s = 0; r >= 0 && s < sessions->n; s++) {
            uint32_t n = sessions->values[s];
            double decode = 0;

            r = measure_decoding(h, n, &decode, err);
            if (r >= 0)
                r = measure_reading(h, prompts->values[p], n, &both, err);
            if (r < 0)
                break;
            table_add_number(t, prompts->values[p]);
            table_add_number(t, n);
            table_add_double(t, alone.read);
            table_add_double(t, both.read);
            table_add_double(t, decode);
            table_add_double(t, both.decode);
        }
        if (r < 0)
            return r;
    }
    return 0;
}

static int print(const struct hybrid *h, struct table *t, bool json)
{
    CLEANUP(freep) char *text = NULL;
    int r;

    if (json) {
        CLEANUP(json_object_putp) struct json_object *o = json_object_new_object();
        struct json_object *rows = NULL;

        if (!o || !put(o, "engine", json_object_new_string(engine_description(h->engine))) ||
            !put(o, "depth", whole(h->depth)) || table_to_json(t, &rows) < 0 ||
            !put(o, "hybrid", rows))
            return -ENOMEM;
        puts(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY |
                                                   JSON_C_TO_STRING_NOSLASHESCAPE));
        return 0;
    }
    r = table_format_rows(t, &(struct table_format){.people = true}, &text);
    if (r < 0)
        return r;
    printf("%s\nTokens a second, each alone and beside the other; sessions of %u tokens.\n\n%s",
           engine_description(h->engine), h->depth, text);
    return 0;
}

static int run(struct hybrid *h, const struct model *m, bool json, struct error *err)
{
    struct engine_options options = h->o->engine;
    struct table *t = NULL;
    int r;

    options.home = LANE_GPU; /* so that it is looked for */
    if (options.kv_type == KV_AUTO && options.activations != ACTIVATIONS_F32)
        options.kv_type = KV_F16; /* as the daemon's */
    if (h->o->threads.n == 1)
        options.n_threads = h->o->threads.values[0];
    r = make_engine(&h->engine, m, &options, err);
    if (r >= 0)
        r = make_sessions(h, h->o->sessions.values[h->o->sessions.n - 1], err);
    if (r >= 0 && table_new(&t, columns, ARRAY_SIZE(columns)) < 0)
        r = error_set(err, ENOMEM, "out of memory");
    if (r >= 0)
        r = run_all(h, t, err);
    if (r >= 0 && print(h, t, json) < 0)
        r = error_set(err, ENOMEM, "out of memory");
    table_free(t);
    return r;
}

int hybrid(const struct model *m, const struct bench_options *o, bool json, struct error *err)
{
    const struct model_config *c = model_config(m);
    struct hybrid h = {.o = o,
                       .vocab_size = c->vocab_size,
                       .context = c->context_max,
                       .depth = o->depths.values[0]};
    int r = run(&h, m, json, err);

    session_free(h.reader);
    for (size_t i = 0; i < MAX_SESSIONS; i++)
        session_free(h.writers[i]);
    engine_free(h.engine);
    return r;
}
