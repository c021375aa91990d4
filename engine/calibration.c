/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Every pass of a new shape is made once before it is measured, because the GPU's driver compiles,
 * and the backend writes the pass down, when it comes for the first time. Of two measurements the
 * better one counts: whatever else the machine does makes a step longer, never shorter.
 */

#include "engine/calibration.h"

#include <errno.h>
#include <stdlib.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "engine/engine-internal.h"

#define MANY 8u
#define PROBE_ROWS 8u
#define PROMPT_ROWS 256u
#define PASS_SECONDS 0.25
#define BOTH_SECONDS 0.2
#define DECODE_PASSES 16u
#define INT8_BETTER 1.15 /* than f32, which is the exact one */
#define TRY_SECONDS 20.0 /* one that took so long already is not measured twice */
#define ADD_SECONDS 2.0  /* a lane that takes longer is not taken away for a try */

/* In this order; the GPU's three a second time for other activations. */
enum section {
    CPU_PROMPT,
    CPU_ONE,
    CPU_MANY,
    GPU_PROMPT,
    GPU_ONE,
    GPU_MANY,
    BOTH_PROMPT,
    BOTH_DECODE,
    SECTIONS,
};

struct calibration {
    struct engine *engine;
    struct session *sessions[MANY];
    uint32_t n_many, n_ctx, most_rows;
    uint32_t tokens[PROMPT_ROWS];
    enum section section;
    unsigned turn;                    /* within the section */
    uint32_t rows;                    /* of the prompt's pass that is measured */
    double spent;                     /* seconds, so far */
    double best;                      /* seconds of it */
    bool tries_int8;                  /* is yet to be done */
    enum activation_type activations; /* the lane's */
    struct lane_rates exact;          /* the GPU's with f32, once int8 is being tried */
    struct calibration_result result;
};

int calibration_new(struct calibration **ret, struct engine *e, bool choose_activations)
{
    CLEANUP(calibration_freep) struct calibration *c = calloc(1, sizeof(*c));
    const struct model_config *m = model_config(engine_model(e));
    int r = 0;

    if (!c)
        return -ENOMEM;
    c->engine = e;
    c->most_rows =
        MIN(MIN(engine_lane_max_rows(e, LANE_GPU), PROMPT_ROWS), MAX(m->context_max / 2, 1u));
    c->n_ctx = MIN(m->context_max, 2 * PROMPT_ROWS);
    c->n_many = MIN(MIN(MANY, engine_max_logits(e)), engine_lane_max_rows(e, LANE_GPU));
    c->activations = c->result.gpu_activations = engine_gpu_activations(e);
    /* A backend that the pool lies in stays, with all that it was told of. */
    c->tries_int8 = choose_activations && c->activations == ACTIVATIONS_F32 && !e->pool_backend;
    for (uint32_t i = 0; i < PROMPT_ROWS; i++)
        c->tokens[i] = (i * 7919u + 3) % m->vocab_size;
    for (uint32_t i = 0; i < MANY && r >= 0; i++)
        r = session_new(&c->sessions[i], e, c->n_ctx, NULL);
    if (r < 0)
        return r;
    *ret = TAKE_PTR(c);
    return 0;
}

struct calibration *calibration_free(struct calibration *c)
{
    if (!c)
        return NULL;
    for (size_t i = 0; i < MANY; i++)
        session_free(c->sessions[i]);
    free(c);
    return NULL;
}

void calibration_freep(struct calibration **c)
{
    *c = calibration_free(*c);
}

bool calibration_give_way(struct calibration *c)
{
    bool had = false;

    for (size_t i = 0; i < MANY; i++) {
        had = had || session_kv_bytes(c->sessions[i]) > 0;
        session_rewind(c->sessions[i], 0);
    }
    return had;
}

bool calibration_may_choose(const struct engine_options *o)
{
    return o->activations != ACTIVATIONS_F32 && o->gpu_activations == ACTIVATIONS_AUTO;
}

const struct calibration_result *calibration_result(const struct calibration *c)
{
    return &c->result;
}

/* ---- passes ---- */

/* So many rows of each of the sessions [first, first + n). */
static void make_items(struct calibration *c, uint32_t first, uint32_t n, uint32_t rows,
                       struct step_item items[MANY])
{
    for (uint32_t i = 0; i < n; i++) {
        struct session *s = c->sessions[first + i];

        if (session_n_tokens(s) + rows > c->n_ctx || rows > 1)
            session_rewind(s, 0);
        items[i] = (struct step_item){.session = s,
                                      .tokens = c->tokens,
                                      .n_tokens = rows,
                                      .wanted = rows > 1 ? LOGITS_NONE : LOGITS_LAST};
    }
}

static int end(struct calibration *c, enum engine_lane lane, const struct step_item *items,
               uint32_t n)
{
    int r = engine_end(c->engine, lane);

    for (uint32_t i = 0; i < n && r >= 0; i++)
        r = items[i].ret_error;
    return r;
}

/* *ret: seconds. */
static int pass(struct calibration *c, enum engine_lane lane, uint32_t n, uint32_t rows,
                double *ret)
{
    struct step_item items[MANY];
    double start;
    int r;

    make_items(c, 0, n, rows, items);
    start = now_seconds();
    r = engine_start(c->engine, lane, items, n);
    if (r >= 0)
        r = end(c, lane, items, n);
    *ret = MAX(now_seconds() - start, 1e-6);
    return r;
}

/* The GPU's pass, and the processor's one after another until that is over. *ret_rows: the
 * processor's. */
static int both(struct calibration *c, uint32_t n, const uint32_t rows[ENGINE_LANES],
                uint32_t *ret_rows, double *ret)
{
    struct step_item gpu[MANY], cpu[MANY];
    double start = now_seconds();
    int r, over;

    make_items(c, 0, n, rows[LANE_GPU], gpu);
    r = engine_start(c->engine, LANE_GPU, gpu, n);
    if (r < 0)
        return r;
    *ret_rows = 0;
    do {
        make_items(c, n, n, rows[LANE_CPU], cpu);
        r = engine_start(c->engine, LANE_CPU, cpu, n);
        if (r >= 0)
            r = end(c, LANE_CPU, cpu, n);
        if (r >= 0)
            *ret_rows += n * rows[LANE_CPU];
        over = engine_wait(c->engine, LANE_GPU, 0);
    } while (r >= 0 && over == -ETIMEDOUT && rows[LANE_CPU] == 1);
    over = end(c, LANE_GPU, gpu, n);
    *ret = MAX(now_seconds() - start, 1e-6);
    return r < 0 ? r : over;
}

/* ---- sections: 1: another turn; 0: over ---- */

static int measure_prompt(struct calibration *c, enum engine_lane lane)
{
    uint32_t probe = MIN(PROBE_ROWS, c->most_rows);
    double took;
    int r;

    if (c->turn == 0)
        c->rows = probe;
    r = pass(c, lane, 1, c->rows, &took);
    if (r < 0)
        return r;
    switch (c->turn) {
    case 0: /* to be made once */
        return 1;
    case 1: {
        double rows = probe * PASS_SECONDS / took; /* more rows take less each: it is less */

        c->rows = (uint32_t)MAX(MIN(rows, (double)c->most_rows), (double)probe);
        c->best = took;
        if (c->rows == probe) { /* slow, or of few rows: so much is enough */
            c->result.rates.lane[lane].prefill = c->rows / took;
            return 0;
        }
        c->best = 1e9;
        return 1;
    }
    case 2: /* likewise */
        return 1;
    default:
        c->best = MIN(c->best, took);
        c->result.rates.lane[lane].prefill = c->rows / c->best;
        return c->turn < 4;
    }
}

static int measure_decoding(struct calibration *c, enum engine_lane lane, uint32_t n,
                            double *ret_rate)
{
    double best = 1e9, sum = 0, took;
    unsigned i;
    int r;

    for (i = 0; i < (c->turn == 0 ? 1 : DECODE_PASSES) && sum < PASS_SECONDS; i++) {
        r = pass(c, lane, n, 1, &took);
        if (r < 0)
            return r;
        best = MIN(best, took);
        sum += took;
    }
    if (c->turn == 0)
        return 1;
    *ret_rate = n / best;
    return 0;
}

static int measure_both_prompts(struct calibration *c)
{
    uint32_t rows[ENGINE_LANES], n_cpu;
    double took, rate;
    int r;

    for (int l = 0; l < ENGINE_LANES; l++)
        rows[l] = (uint32_t)MAX(
            MIN(c->result.rates.lane[l].prefill * BOTH_SECONDS, (double)c->most_rows), 2.0);
    if (c->turn == 0) /* to be made once */
        return (r = pass(c, LANE_GPU, 1, rows[LANE_GPU], &took)) < 0 ? r : 1;
    r = both(c, 1, rows, &n_cpu, &took);
    if (r < 0)
        return r;
    rate = (rows[LANE_GPU] + n_cpu) / took;
    c->result.rates.both_prefill = MAX(c->result.rates.both_prefill, rate);
    return c->turn < 2;
}

static int measure_both_decoding(struct calibration *c)
{
    static const uint32_t rows[ENGINE_LANES] = {1, 1};
    uint32_t half = c->n_many / 2, n_cpu, n = 0;
    double took, sum = 0;
    int r;

    if (half == 0)
        return 0;
    if (c->turn == 0) /* to be made once */
        return (r = pass(c, LANE_GPU, half, 1, &took)) < 0 ? r : 1;
    for (unsigned i = 0; i < DECODE_PASSES && sum < PASS_SECONDS; i++) {
        r = both(c, half, rows, &n_cpu, &took);
        if (r < 0)
            return r;
        n += half + n_cpu;
        sum += took;
    }
    c->result.rates.both_decode = n / sum;
    return 0;
}

static int measure(struct calibration *c)
{
    struct lane_rates *cpu = &c->result.rates.lane[LANE_CPU];
    struct lane_rates *gpu = &c->result.rates.lane[LANE_GPU];

    switch (c->section) {
    case CPU_PROMPT:
        return measure_prompt(c, LANE_CPU);
    case CPU_ONE:
        return measure_decoding(c, LANE_CPU, 1, &cpu->decode);
    case CPU_MANY:
        return measure_decoding(c, LANE_CPU, c->n_many, &cpu->decode_many);
    case GPU_PROMPT: /* these are not come to without one */
        return measure_prompt(c, LANE_GPU);
    case GPU_ONE:
        return measure_decoding(c, LANE_GPU, 1, &gpu->decode);
    case GPU_MANY:
        return measure_decoding(c, LANE_GPU, c->n_many, &gpu->decode_many);
    case BOTH_PROMPT:
        return measure_both_prompts(c);
    case BOTH_DECODE:
        return measure_both_decoding(c);
    case SECTIONS:
        break;
    }
    return 0;
}

/* ---- activations ---- */

/* *ret_seconds: how long it took. 0, -ENODEV: err says why */
static int add_with(struct calibration *c, enum activation_type a, double *ret_seconds,
                    struct error *err)
{
    double start = now_seconds();
    int r;

    engine_remove_gpu(c->engine);
    engine_set_gpu_activations(c->engine, a);
    c->activations = a;
    r = engine_add_gpu(c->engine, err);
    *ret_seconds = now_seconds() - start;
    return r < 0 ? -ENODEV : 0;
}

/* Prompts count: they are what a GPU is there for first of all. */
static bool is_better(const struct lane_rates *a, const struct lane_rates *exact)
{
    return a->prefill > exact->prefill * INT8_BETTER && a->decode > exact->decode / INT8_BETTER;
}

/* The GPU alone has been measured. 1: and is to be once more; 0, -ENODEV */
static int choose_activations(struct calibration *c, struct error *err)
{
    struct lane_rates *rates = &c->result.rates.lane[LANE_GPU];
    double took;
    int r;

    if (c->tries_int8) {
        c->tries_int8 = false;
        c->exact = *rates;
        if (c->spent > TRY_SECONDS)
            return 0;
        r = add_with(c, ACTIVATIONS_INT8, &took, err);
        if (r < 0 || took < ADD_SECONDS)
            return r < 0 ? r : 1;
        *rates = (struct lane_rates){0}; /* not worth the time it takes */
    }
    if (c->activations == ACTIVATIONS_F32 || !(c->exact.prefill > 0) ||
        is_better(rates, &c->exact)) {
        c->result.gpu_activations = c->activations;
        return 0;
    }
    *rates = c->exact;
    return add_with(c, ACTIVATIONS_F32, &took, err);
}

int calibration_turn(struct calibration *c, struct error *err)
{
    double start;
    int r;

    if (c->section == SECTIONS)
        return 0;
    start = now_seconds();
    r = measure(c);
    c->spent += now_seconds() - start;
    c->turn++;
    if (r != 0)
        return r;
    c->turn = 0;
    if (c->section == GPU_MANY) {
        r = choose_activations(c, err);
        if (r < 0)
            return r;
        c->section = r > 0 ? GPU_PROMPT : BOTH_PROMPT;
        return 1;
    }
    c->section++;
    if (c->section == GPU_PROMPT && !engine_has_gpu(c->engine))
        c->section = SECTIONS;
    return c->section < SECTIONS;
}
