/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A case is repeated; the first repetition warms up and is looked into (timed_backend.h), medians
 * are of the others. What decodes is made once: a session for each to be served, filled by prefill,
 * with a mark at its depth, to which it is rewound after each repetition. Each session has tokens
 * of its own, or they would share their surviving neurons, and pages of its own.
 */

#include "tools/llm-bench/measure.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "engine/sampler.h"
#include "engine/tokenizer.h"
#include "tools/common/distribution.h"
#include "tools/common/engine-args.h"
#include "tools/llm-bench/words.h"

/* Any text; a model that has a vocabulary is compared with itself on it. */
static const char text[] =
    "The river had been rising since noon, and by the time the ferry came back there was no "
    "landing "
    "left to speak of, only a row of posts with water between them. Two farmers stood on the bank "
    "and argued about the price of hay. \"It will fall again tomorrow,\" said the older one. \"It "
    "always does when nobody needs it.\" The pilot, who had heard this every spring for nineteen "
    "years, threw them the rope and asked which of them wanted to get wet first.\n\nTo measure the "
    "depth of a well, drop a stone and count the seconds until you hear it. Multiply the square of "
    "that number by 4.9, and subtract a little for the time that the sound needs to come up. For "
    "a well of twenty metres you will count about two seconds; for one of eighty, four.";

struct bench {
    const struct bench_options *o;
    const struct model *model;
    struct engine *engine;
    struct backend *own; /* the engine's */
    struct timed_backend *timed;
    struct sampler *sampler;
    uint32_t n_threads;
    struct measurements *m;
};

/* ---- interruption, progress ---- */

static volatile sig_atomic_t is_interrupted;

static void on_interrupt(int number)
{
    (void)number;
    is_interrupted = 1; /* a second one ends the program */
}

static void progress(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A line that the next one replaces; "" takes it away. */
static void progress(const char *format, ...)
{
    va_list ap;

    if (!isatty(STDERR_FILENO))
        return;
    fputs("\r\033[K", stderr);
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fflush(stderr);
}

/* ---- steps ---- */

/* Any token, the same every time: the at-th of a session. */
static uint32_t token_at(const struct bench *b, uint32_t session, uint32_t at)
{
    uint64_t x = ((uint64_t)session << 32 | at) + 1;

    x *= 0x9e3779b97f4a7c15; /* splitmix64's finisher */
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return (uint32_t)((x ^ x >> 31) % model_config(b->model)->vocab_size);
}

static int step(struct bench *b, struct step_item *items, size_t n, struct error *err)
{
    int r;

    if (is_interrupted)
        return -EINTR;
    r = engine_step(b->engine, items, n);
    for (size_t i = 0; r == 0 && i < n; i++)
        r = items[i].ret_error;
    if (r == -ENOBUFS)
        return error_set(err, ENOBUFS, "no memory left for the K and V of so many tokens");
    if (r < 0)
        return error_set(err, -r, "evaluation failed: %s", strerror(-r));
    return 0;
}

/* Tokens up to `to` for each session, as full steps as they make, one session after the other. */
static int fill(struct bench *b, struct session **sessions, uint32_t n_sessions, uint32_t to,
                enum logits_wanted wanted, struct error *err)
{
    uint32_t most = engine_max_rows(b->engine), i = 0;
    CLEANUP(freep) uint32_t *ids = calloc(most, sizeof(*ids));
    int r = 0;

    if (!ids)
        return error_set(err, ENOMEM, "out of memory");
    while (r == 0 && i < n_sessions) {
        struct step_item items[MAX_SESSIONS];
        uint32_t used = 0;
        size_t n = 0;

        while (i < n_sessions && used < most) {
            uint32_t at = session_n_tokens(sessions[i]);
            uint32_t here = MIN(to - at, most - used);
            bool ends = at + here == to;

            for (uint32_t k = 0; k < here; k++)
                ids[used + k] = token_at(b, i, at + k);
            if (here > 0)
                items[n++] = (struct step_item){.session = sessions[i],
                                                .tokens = ids + used,
                                                .n_tokens = here,
                                                .wanted = ends ? wanted : LOGITS_NONE};
            used += here;
            if (!ends)
                break;
            i++;
        }
        if (n > 0)
            r = step(b, items, n, err);
    }
    return r;
}

/* One token more for each; drawn from the logits before when that is timed. */
static int decode(struct bench *b, struct session **sessions, uint32_t n_sessions, uint32_t n_steps,
                  double *sampling, struct error *err)
{
    int r = 0;

    for (uint32_t t = 0; r == 0 && t < n_steps; t++) {
        struct step_item items[MAX_SESSIONS];
        uint32_t ids[MAX_SESSIONS];
        struct sample sample;
        double start;

        for (uint32_t i = 0; i < n_sessions; i++) {
            ids[i] = token_at(b, i, session_n_tokens(sessions[i]));
            items[i] = (struct step_item){
                .session = sessions[i], .tokens = &ids[i], .n_tokens = 1, .wanted = LOGITS_LAST};
        }
        r = step(b, items, n_sessions, err);
        start = now_seconds();
        for (uint32_t i = 0; sampling && r == 0 && i < n_sessions; i++)
            if (sampler_draw(b->sampler, items[i].ret_logits, false, &sample) < 0)
                r = error_set(err, EDOM, "the model's logits are not finite");
        if (sampling)
            *sampling += now_seconds() - start;
    }
    return r;
}

/* ---- repetitions ---- */

static int by_size(const void *pa, const void *pb)
{
    const double *a = pa, *b = pb;

    return (*a > *b) - (*a < *b);
}

/* seconds[n] of whole repetitions. */
static void summarize(struct result *res, double *seconds, uint32_t n)
{
    double steps = res->n_steps;

    qsort(seconds, n, sizeof(*seconds), by_size);
    res->n_repetitions = n;
    res->least = seconds[0] / steps;
    res->most = seconds[n - 1] / steps;
    res->median = (n % 2 ? seconds[n / 2] : (seconds[n / 2 - 1] + seconds[n / 2]) / 2) / steps;
}

/* Puts what the repetition's operations took beside the whole of it. */
static void look_into(struct bench *b, struct result *res, double seconds, double sampling)
{
    double steps = res->n_steps, known = 0;

    seconds -= timed_backend_take(b->timed, res->ops);
    for (int c = 0; c < N_OP_CLASSES; c++) {
        struct op_sum *s = &res->ops[c];

        known += s->seconds;
        *s = (struct op_sum){.seconds = s->seconds / steps,
                             .bytes = s->bytes / steps,
                             .operations_int8 = s->operations_int8 / steps,
                             .operations_f32 = s->operations_f32 / steps};
    }
    res->ops[OP_REST].seconds += MAX(seconds - known, 0) / steps;
    res->ops[OP_SAMPLING].seconds = sampling / steps;
    res->timed = seconds / steps;
}

/* Resident bytes by kind, as the kernel counts them; kept where K and V take most. */
static void look_at_memory(struct bench *b)
{
    CLEANUP(fclosep) FILE *f = fopen("/proc/self/status", "re");
    struct memory m = {0};
    unsigned long long kib;
    char line[256];

    while (f && fgets(line, sizeof(line), f)) {
        if (sscanf(line, "RssAnon: %llu kB", &kib) == 1)
            m.anonymous = kib * 1024;
        else if (sscanf(line, "RssFile: %llu kB", &kib) == 1)
            m.file = kib * 1024;
    }
    engine_memory(b->engine, &m.engine);
    m.peak = b->m->memory.peak;
    if (m.engine.kv_bytes_used >= b->m->memory.engine.kv_bytes_used)
        b->m->memory = m;
}

/*
 * Runs a case. sessions are at their depth; for a prompt there are none, each repetition makes its
 * own. A case counts when one repetition besides the first was finished.
 */
static int run_case(struct bench *b, struct result what, struct session **sessions,
                    struct error *err)
{
    CLEANUP(freep) double *seconds = calloc(b->o->n_repetitions, sizeof(*seconds));
    uint32_t n = 0;
    int r = 0;

    if (!seconds)
        return error_set(err, ENOMEM, "out of memory");
    what.n_threads = b->n_threads;
    for (uint32_t i = 0; r == 0 && i <= b->o->n_repetitions; i++) {
        CLEANUP(session_freep) struct session *s = NULL;
        double start, took, sampling = 0;

        if (what.is_decode)
            progress("%u thread%s: decoding, %u session%s of %u token%s: %u of %u", b->n_threads,
                     plural_s(b->n_threads), what.n_sessions, plural_s(what.n_sessions),
                     what.n_tokens, plural_s(what.n_tokens), i, b->o->n_repetitions);
        else
            progress("%u thread%s: reading a prompt of %u token%s: %u of %u", b->n_threads,
                     plural_s(b->n_threads), what.n_tokens, plural_s(what.n_tokens), i,
                     b->o->n_repetitions);
        if (!what.is_decode)
            r = session_new(&s, b->engine, what.n_tokens, NULL);
        if (r < 0)
            return error_set(err, -r, "cannot make a session: %s", strerror(-r));
        if (i == 0)
            engine_set_backend(b->engine, timed_backend_base(b->timed));
        start = now_seconds();
        if (what.is_decode)
            r = decode(b, sessions, what.n_sessions, what.n_steps, i == 0 ? &sampling : NULL, err);
        else
            r = fill(b, &s, 1, what.n_tokens, LOGITS_LAST, err);
        took = now_seconds() - start - sampling;
        engine_set_backend(b->engine, b->own);
        if (r == 0 && i == 0)
            look_into(b, &what, took, sampling);
        else if (r == 0)
            seconds[n++] = took;
        look_at_memory(b);
        for (uint32_t k = 0; what.is_decode && k < what.n_sessions; k++)
            session_rewind(sessions[k], what.n_tokens);
    }
    if (n > 0) {
        summarize(&what, seconds, n);
        b->m->results[b->m->n_results++] = what;
    }
    return r;
}

static bool fits(const struct bench *b, uint32_t n)
{
    return n <= model_config(b->model)->context_max;
}

static int run_prompts(struct bench *b, struct error *err)
{
    const struct list *prompts = &b->o->prompts;
    int r = 0;

    for (size_t i = 0; r == 0 && i < prompts->n; i++)
        if (fits(b, prompts->values[i]))
            r = run_case(
                b, (struct result){.n_tokens = prompts->values[i], .n_sessions = 1, .n_steps = 1},
                NULL, err);
    return r;
}

/* Every number of sessions at the least depth, every depth with the least number of sessions. */
static int run_decoding(struct bench *b, struct error *err)
{
    const struct list *depths = &b->o->depths, *counts = &b->o->sessions;
    struct session *sessions[MAX_SESSIONS] = {NULL};
    uint32_t n_made = 0, n_ctx = 0, context = model_config(b->model)->context_max;
    int r = 0;

    for (size_t d = 0; d < depths->n; d++)
        if (fits(b, depths->values[d] + b->o->n_decode))
            n_ctx = depths->values[d] + b->o->n_decode;
    for (size_t d = 0; r == 0 && d < depths->n; d++) {
        uint32_t depth = depths->values[d];

        if (depth + b->o->n_decode > context)
            continue;
        for (size_t k = 0; r == 0 && k < (d == 0 ? counts->n : 1); k++) {
            uint32_t n = counts->values[k];

            progress("%u thread%s: filling sessions", b->n_threads, plural_s(b->n_threads));
            for (; r == 0 && n_made < n; n_made++) {
                r = session_new(&sessions[n_made], b->engine,
                                n_made < counts->values[0] ? n_ctx : depth + b->o->n_decode, NULL);
                if (r < 0) {
                    error_set(err, -r, "cannot make a session: %s", strerror(-r));
                    break;
                }
            }
            if (r == 0)
                r = fill(b, sessions, n, depth, LOGITS_NONE, err);
            for (uint32_t i = 0; r == 0 && i < n; i++)
                session_set_mark(sessions[i], depth);
            if (r == 0)
                r = run_case(b,
                             (struct result){.is_decode = true,
                                             .n_tokens = depth,
                                             .n_sessions = n,
                                             .n_steps = b->o->n_decode},
                             sessions, err);
        }
        for (; n_made > counts->values[0]; n_made--) /* their pages are not needed deeper down */
            session_free(sessions[n_made - 1]);
    }
    for (uint32_t i = 0; i < n_made; i++)
        session_free(sessions[i]);
    return r;
}

/* ---- limits ---- */

static int probe_before(struct bench *b, struct probe *p, struct limits *l, struct error *err)
{
    size_t bytes = (size_t)b->o->probe_mib << 20;

    progress("%u thread%s: the machine's limits", b->n_threads, plural_s(b->n_threads));
    l->n_threads = b->n_threads;
    if (bytes == 0)
        return 0;
    if (probe_read(p, bytes, &l->read_before) < 0)
        return error_set(err, ENOMEM, "no memory of %u MiB to read; see --probe", b->o->probe_mib);
    l->has_read = true;
    for (enum probe_multiplier k = 0; k < N_PROBE_MULTIPLIERS; k++)
        l->has_multiplier[k] = probe_multiply(p, k, &l->multiply[k]) == 0;
    return 0;
}

/* The machine may have been another one by then: virtual processors are shared. */
static void probe_after(struct bench *b, struct probe *p, struct limits *l)
{
    if (!l->has_read || is_interrupted)
        return;
    progress("%u thread%s: the machine's limits", b->n_threads, plural_s(b->n_threads));
    l->has_read_after = probe_read(p, (size_t)b->o->probe_mib << 20, &l->read_after) == 0;
    for (enum probe_multiplier k = 0; k < N_PROBE_MULTIPLIERS; k++) {
        struct probe_rate again;

        if (probe_multiply(p, k, &again) == 0 && again.max > l->multiply[k].max)
            l->multiply[k] = again;
    }
}

double limits_read(const struct limits *l)
{
    return MAX(l->has_read ? l->read_before.max : 0, l->has_read_after ? l->read_after.max : 0);
}

double limits_read_seconds(const struct limits *l, const struct op_sum *s)
{
    double rate = limits_read(l);

    return rate > 0 ? s->bytes / rate : 0;
}

double limits_multiply_seconds(const struct limits *l, const struct op_sum *s)
{
    double seconds = 0;

    if (!l->has_multiplier[PROBE_F32])
        return 0;
    seconds += s->operations_f32 / l->multiply[PROBE_F32].max;
    if (l->has_multiplier[PROBE_INT8])
        seconds += s->operations_int8 / l->multiply[PROBE_INT8].max;
    return seconds;
}

struct op_sum result_total(const struct result *r)
{
    struct op_sum total = {0};

    for (int c = 0; c < N_OP_CLASSES; c++)
        if (c != OP_SAMPLING) {
            total.seconds += r->ops[c].seconds;
            total.bytes += r->ops[c].bytes;
            total.operations_int8 += r->ops[c].operations_int8;
            total.operations_f32 += r->ops[c].operations_f32;
        }
    return total;
}

/* ---- accuracy ---- */

/* Logits after each of the tokens but the first few, which say little. */
static int evaluate(struct bench *b, const struct engine_options *options, const uint32_t *ids,
                    uint32_t n, float *ret, struct error *err)
{
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(session_freep) struct session *s = NULL;
    size_t vocab_size = model_config(b->model)->vocab_size;
    int r = make_engine(&e, b->model, options, err);

    if (r < 0)
        return r;
    b->engine = e;
    r = session_new(&s, e, n, NULL);
    if (r < 0)
        return error_set(err, -r, "cannot make a session: %s", strerror(-r));
    for (uint32_t at = 0, here; r == 0 && at < n; at += here) {
        struct step_item item = {.session = s, .tokens = ids + at, .wanted = LOGITS_ALL};

        item.n_tokens = here = MIN(n - at, engine_max_logits(e));
        r = step(b, &item, 1, err);
        if (r == 0)
            memcpy(ret + at * vocab_size, item.ret_logits, here * vocab_size * sizeof(*ret));
    }
    b->engine = NULL;
    return r;
}

static void compare_rows(struct accuracy *a, const float *p, const float *q, size_t n)
{
    double kld = kl_divergence(p, q, n);
    size_t best_p = 0, best_q = 0;

    for (size_t i = 0; i < n; i++) {
        best_p = p[i] > p[best_p] ? i : best_p;
        best_q = q[i] > q[best_q] ? i : best_q;
    }
    a->mean += kld;
    a->most = MAX(a->most, kld);
    a->n_agree += best_p == best_q;
    a->n_positions++;
}

/*
 * The engine as asked against f32 activations with f32 K and V, at the best level there is: these
 * differ from float64 by less than is shown (docs/performance.md).
 */
static int run_accuracy(struct bench *b, struct error *err)
{
    const struct tokenizer *t = model_tokenizer(b->model);
    const struct model_config *c = model_config(b->model);
    uint32_t n = MIN(b->o->n_positions, c->context_max);
    CLEANUP(freep) uint32_t *ids = calloc(MAX(n, 1u), sizeof(*ids));
    CLEANUP(freep) float *p = calloc((size_t)n * c->vocab_size + 1, sizeof(*p));
    CLEANUP(freep) float *q = calloc((size_t)n * c->vocab_size + 1, sizeof(*q));
    struct engine_options definition = {.activations = ACTIVATIONS_F32, .kv_type = KV_F32};
    struct engine_options options = b->o->engine;
    struct token_array encoded = {NULL, 0, 0};
    struct accuracy a = {0};
    int r;

    if (!ids || !p || !q)
        return error_set(err, ENOMEM, "out of memory");
    if (t && tokenizer_encode(t, text, sizeof(text) - 1, &(struct encode_options){.bos = true},
                              &encoded) == 0) {
        a.is_text = true;
        n = (uint32_t)MIN((size_t)n, encoded.n);
        memcpy(ids, encoded.data, n * sizeof(*ids));
    } else {
        for (uint32_t i = 0; i < n; i++)
            ids[i] = token_at(b, 0, i);
    }
    free(encoded.data);
    options.n_threads = definition.n_threads = b->n_threads;
    options.max_logits = definition.max_logits = 16;
    options.kv_bytes = definition.kv_bytes = 0;
    progress("accuracy: %u position%s", n, plural_s(n));
    r = evaluate(b, &options, ids, n, p, err);
    if (r == 0)
        r = evaluate(b, &definition, ids, n, q, err);
    for (uint32_t i = 0; r == 0 && i < n; i++)
        compare_rows(&a, q + (size_t)i * c->vocab_size, p + (size_t)i * c->vocab_size,
                     c->vocab_size);
    if (r == 0 && a.n_positions > 0) {
        a.mean /= a.n_positions;
        b->m->accuracy = a;
    }
    return r;
}

/* ---- all of it ---- */

static uint64_t peak_bytes(void)
{
    CLEANUP(fclosep) FILE *f = fopen("/proc/self/status", "re");
    unsigned long long kib = 0;
    char line[256];

    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "VmHWM: %llu kB", &kib) == 1)
            break;
    return kib * 1024;
}

/* The most resident so far is what is resident now; where the system refuses, it stays. */
static void forget_peak(void)
{
    CLEANUP(fclosep) FILE *f = fopen("/proc/self/clear_refs", "we");

    if (f)
        fputs("5", f);
}

/* With one number of threads; 0: as many as the engine takes. */
static int run_with(struct bench *b, uint32_t n_threads, measure_check check, void *userdata,
                    struct error *err)
{
    CLEANUP(engine_freep) struct engine *e = NULL;
    CLEANUP(timed_backend_freep) struct timed_backend *t = NULL;
    CLEANUP(probe_freep) struct probe *p = NULL;
    struct limits *l = &b->m->limits[b->m->n_limits];
    struct engine_options options = b->o->engine;
    struct backend *cpu;
    int r;

    options.n_threads = n_threads;
    r = make_engine(&e, b->model, &options, err);
    if (r < 0)
        return r;
    b->engine = e;
    b->own = engine_backend(e);
    cpu = engine_lane_backend(e, LANE_CPU);
    b->m->n_threads = b->n_threads = cpu->vtable->n_threads(cpu);
    if (n_threads > 0 && b->n_threads != n_threads)
        return error_set(err, EINVAL, "%u threads: this process may use %u only", n_threads,
                         b->n_threads);
    if (timed_backend_new(&t, b->own, b->model) < 0)
        return error_set(err, ENOMEM, "out of memory");
    b->timed = t;
    snprintf(b->m->description, sizeof(b->m->description), "%s", engine_description(e));
    snprintf(b->m->level, sizeof(b->m->level), "%s", b->own->ops->name);
    if (b->m->n_limits == 0)
        r = check ? check(b->m, userdata, err) : 0;
    if (r == 0)
        r = probe_new(&p, cpu->ops->name, b->n_threads, !options.no_pinning, err);
    if (r == 0)
        r = probe_before(b, p, l, err);
    forget_peak();
    if (r == 0) {
        b->m->n_limits++;
        r = run_prompts(b, err);
    }
    if (r == 0)
        r = run_decoding(b, err);
    b->m->memory.peak = MAX(b->m->memory.peak, peak_bytes());
    if (r == 0)
        probe_after(b, p, l);
    b->engine = engine_free(TAKE_PTR(e)); /* before the probe: each puts the caller's mask back */
    return r;
}

int measure(struct measurements *ret, const struct model *m, const struct bench_options *o,
            measure_check check, void *userdata, struct error *err)
{
    static const struct sampler_options defaults = {.temperature = 1, .top_k = 64, .top_p = 0.95f};
    struct bench b = {.o = o, .model = m, .m = ret};
    CLEANUP(sampler_freep) struct sampler *sampler = NULL;
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESETHAND}, before;
    int r;

    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, NULL, &before);
    if (before.sa_handler != SIG_IGN)
        sigaction(SIGINT, &action, NULL);
    r = sampler_new(&sampler, model_config(m)->vocab_size, &defaults, err);
    b.sampler = sampler;
    ret->is_f32 = o->engine.home == LANE_GPU ? o->engine.gpu_activations != ACTIVATIONS_INT8
                                             : o->engine.activations == ACTIVATIONS_F32;
    if (r == 0 && o->threads.n == 0)
        r = run_with(&b, 0, check, userdata, err);
    for (size_t i = 0; r == 0 && i < o->threads.n; i++)
        r = run_with(&b, o->threads.values[i], check, userdata, err);
    if (r == 0 && o->n_positions > 0)
        r = run_accuracy(&b, err);
    ret->is_complete = r == 0 && !is_interrupted;
    progress("%s", "");
    sigaction(SIGINT, &before, NULL);
    return r == -EINTR ? 0 : r;
}
