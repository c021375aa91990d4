/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * Speed of what is no matrix product, at the shapes of Gemma 3n E4B: microseconds that one row
 * takes in each operation, alone and among many, and how much that makes of a token; attention by
 * depth and by number of rows. A figure is the best of several runs, since other programs only ever
 * make a run slower. Not a test.
 */

#include <getopt.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/backend.h"
#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"

#define HIDDEN 2048
#define STREAMS 4
#define FFN 16384
#define HEADS 8
#define HEADS_KV 2
#define HEAD_DIM 256
#define LAYERS 35
#define PLE 256
#define VOCABULARY 262144

#define MAX_ROWS 256
#define MAX_POSITIONS 8192
#define SPACE ((size_t)MAX_ROWS * FFN * sizeof(float)) /* of each array */

static double min_seconds = 0.2;

struct arrays {
    float *x, *y, *w, *u; /* SPACE each */
    int8_t *q;
    uint32_t n; /* rows of this run */
    struct kv_row rows[MAX_ROWS];
};

static const struct kv_shape kv = {HEADS_KV, HEAD_DIM, true};

static void quantize(struct backend *b, struct arrays *m, uint32_t k)
{
    struct activations x = {.n = m->n, .k = k, .f32 = m->x, .ld = k, .q = m->q, .ld_q = k};

    x.d = m->y;
    x.sum = (int32_t *)(m->y + SPACE / 2 / sizeof(float));
    b->ops->quantize(b, &x);
}

static void quantize_hidden(struct backend *b, struct arrays *m)
{
    quantize(b, m, HIDDEN);
}

static void quantize_ffn(struct backend *b, struct arrays *m)
{
    quantize(b, m, FFN);
}

static void norm(struct backend *b, struct arrays *m)
{
    b->ops->norm(b, &(struct norm_args){.n = m->n,
                                        .k = HIDDEN,
                                        .x = m->x,
                                        .ld_x = HIDDEN,
                                        .w = m->w,
                                        .eps = 1e-6f,
                                        .scale = 1,
                                        .y = m->y,
                                        .ld_y = HIDDEN});
}

static void norm_add(struct backend *b, struct arrays *m)
{
    b->ops->norm(b, &(struct norm_args){.n = m->n,
                                        .k = HIDDEN,
                                        .x = m->x,
                                        .ld_x = HIDDEN,
                                        .w = m->w,
                                        .eps = 1e-6f,
                                        .add = m->u,
                                        .ld_add = HIDDEN,
                                        .add2 = m->u + HIDDEN,
                                        .ld_add2 = HIDDEN,
                                        .scale = 0.7f,
                                        .y = m->y,
                                        .ld_y = HIDDEN});
}

static void head_norm_q(struct backend *b, struct arrays *m)
{
    b->ops->head_norm(b, &(struct head_norm_args){.n = m->n,
                                                  .n_heads = HEADS,
                                                  .head_dim = HEAD_DIM,
                                                  .x = m->y,
                                                  .ld = HEADS * HEAD_DIM,
                                                  .w = m->w,
                                                  .eps = 1e-6f,
                                                  .rope = m->u});
}

static void head_norm_v(struct backend *b, struct arrays *m)
{
    b->ops->head_norm(b, &(struct head_norm_args){.n = m->n,
                                                  .n_heads = HEADS_KV,
                                                  .head_dim = HEAD_DIM,
                                                  .x = m->y,
                                                  .ld = HEADS_KV * HEAD_DIM,
                                                  .eps = 1e-6f});
}

static void kv_store(struct backend *b, struct arrays *m)
{
    for (uint32_t i = 0; i < m->n; i++)
        m->rows[i].pos = i;
    b->ops->kv_store(b, &(struct kv_store_args){.n = m->n,
                                                .shape = kv,
                                                .k = m->x,
                                                .v = m->u,
                                                .ld = HEADS_KV * HEAD_DIM,
                                                .rows = m->rows});
}

static void gate(struct backend *b, struct arrays *m, uint32_t k, float z)
{
    b->ops->gate(b, &(struct gate_args){.n = m->n,
                                        .k = k,
                                        .gate = m->x,
                                        .up = m->u,
                                        .ld_gate = k,
                                        .ld_up = k,
                                        .z = z,
                                        .y = m->y,
                                        .ld_y = k});
}

static void gate_ffn(struct backend *b, struct arrays *m)
{
    gate(b, m, FFN, 0);
}

static void gate_ple(struct backend *b, struct arrays *m)
{
    gate(b, m, PLE, 0);
}

static void altup_predict(struct backend *b, struct arrays *m)
{
    b->ops->altup_predict(b, &(struct altup_predict_args){.n = m->n,
                                                          .hidden = HIDDEN,
                                                          .n_streams = STREAMS,
                                                          .router = {m->w, m->u, 1e-6f},
                                                          .coefs = m->w,
                                                          .h = m->x,
                                                          .pred = m->y});
}

static void altup_correct(struct backend *b, struct arrays *m)
{
    b->ops->altup_correct(b, &(struct altup_correct_args){.n = m->n,
                                                          .hidden = HIDDEN,
                                                          .n_streams = STREAMS,
                                                          .router = {m->w, m->u, 1e-6f},
                                                          .coefs = m->w,
                                                          .pred = m->x,
                                                          .b = m->u,
                                                          .scale = m->w,
                                                          .h = m->y,
                                                          .scaled = (float *)m->q});
}

static void stream_norm(struct backend *b, struct arrays *m)
{
    memset(m->y, 0, HIDDEN * sizeof(float)); /* what is added up must not grow without end */
    b->ops->stream_norm(b, &(struct stream_norm_args){.n = m->n,
                                                      .hidden = HIDDEN,
                                                      .n_streams = STREAMS,
                                                      .x = m->u,
                                                      .w = m->w,
                                                      .eps = 1e-6f,
                                                      .h = m->y});
}

static void rescale(struct backend *b, struct arrays *m)
{
    b->ops->rescale(b, &(struct rescale_args){.n = m->n,
                                              .hidden = HIDDEN,
                                              .n_streams = STREAMS,
                                              .stream = 1,
                                              .y = m->x,
                                              .ref = m->u,
                                              .ld_ref = HIDDEN,
                                              .h = m->y});
}

static void merge(struct backend *b, struct arrays *m)
{
    b->ops->merge(b, &(struct merge_args){.n = m->n,
                                          .hidden = HIDDEN,
                                          .n_streams = STREAMS,
                                          .h = m->x,
                                          .w = m->w,
                                          .eps = 1e-6f,
                                          .x = m->y});
}

static void ple(struct backend *b, struct arrays *m)
{
    b->ops->ple(b, &(struct ple_args){.n = m->n,
                                      .n_layers = LAYERS,
                                      .width = PLE,
                                      .g = m->x,
                                      .e = m->u,
                                      .w = m->w,
                                      .g_scale = 0.02f,
                                      .eps = 1e-6f,
                                      .ple = m->y});
}

static void softcap(struct backend *b, struct arrays *m)
{
    b->ops->softcap(b, m->y, (size_t)MIN(m->n, 16u) * VOCABULARY, 30);
}

static void get_rows(struct backend *b, struct arrays *m, uint32_t width)
{
    struct weight w = {WEIGHT_Q4, LAYOUT_ROWS, 256, width, m->q};
    uint32_t ids[MAX_ROWS];

    for (uint32_t i = 0; i < m->n; i++)
        ids[i] = i % w.n_out;
    b->ops->get_rows(b, &w, ids, m->n, 2, m->y, width);
}

static void get_rows_hidden(struct backend *b, struct arrays *m)
{
    get_rows(b, m, HIDDEN);
}

static void get_rows_ple(struct backend *b, struct arrays *m)
{
    get_rows(b, m, LAYERS * PLE);
}

static const struct {
    const char *name;
    void (*run)(struct backend *b, struct arrays *m);
    uint32_t per_token;
} operations[] = {
    {"get_rows 2048", get_rows_hidden, 1},
    {"get_rows 8960", get_rows_ple, 1},
    {"ple", ple, 1},
    {"rescale", rescale, 6},
    {"altup_predict", altup_predict, LAYERS},
    {"norm", norm, 2 * LAYERS},
    {"norm, 2 added", norm_add, 3 * LAYERS},
    {"quantize 2048", quantize_hidden, 5 * LAYERS},
    {"quantize 16384", quantize_ffn, LAYERS},
    {"head_norm q, rope", head_norm_q, LAYERS},
    {"head_norm v", head_norm_v, 20},
    {"kv_store", kv_store, 20},
    {"gate 16384", gate_ffn, LAYERS},
    {"altup_correct", altup_correct, LAYERS},
    {"gate 256", gate_ple, LAYERS},
    {"stream_norm", stream_norm, LAYERS},
    {"merge", merge, 1},
    {"softcap 262144", softcap, 1},
};

static void fill(float *x)
{
    for (size_t i = 0; i < SPACE / sizeof(*x); i++)
        x[i] = (float)(i * 2654435761u >> 8 & 0xfff) / 2048 - 1;
}

/* In turns of some time, so that the clock costs nothing. */
static double best_of(struct backend *b, struct arrays *m,
                      void (*run)(struct backend *b, struct arrays *m))
{
    double best = 1e9, end;
    uint32_t turns = 1;

    for (double t = 0; t < 1e-4; turns *= 2) {
        t = now_seconds();
        for (uint32_t i = 0; i < turns; i++)
            run(b, m);
        t = now_seconds() - t;
    }
    end = now_seconds() + min_seconds;
    do {
        double start = now_seconds();

        for (uint32_t i = 0; i < turns; i++)
            run(b, m);
        best = MIN(best, (now_seconds() - start) / turns);
    } while (now_seconds() < end);
    return best;
}

static void run_operations(struct backend *b, struct arrays *m)
{
    static const uint32_t batches[] = {1, 8, MAX_ROWS};
    double total[ARRAY_SIZE(batches)] = {0};

    printf("%-20s %9s", "us a row; rows:", "a token");
    for (size_t i = 0; i < ARRAY_SIZE(batches); i++)
        printf(" %8u", batches[i]);
    printf("\n");
    for (size_t o = 0; o < ARRAY_SIZE(operations); o++) {
        printf("%-20s %8ux", operations[o].name, operations[o].per_token);
        for (size_t i = 0; i < ARRAY_SIZE(batches); i++) {
            uint32_t n = m->n = batches[i];
            double t;

            if (operations[o].run == softcap)
                n = MIN(n, 16u);
            t = best_of(b, m, operations[o].run) / n * 1e6;
            total[i] += t * operations[o].per_token;
            printf(" %8.2f", t);
            fflush(stdout);
        }
        printf("\n");
    }
    printf("%-30s", "all of a token's");
    for (size_t i = 0; i < ARRAY_SIZE(batches); i++)
        printf(" %8.1f", total[i]);
    printf("\n");
}

/* Rows at the end of a sequence; the pages of n_sequences, each as deep, are what the caches see.
 */
static double attention(struct backend *b, struct arrays *m, uint32_t length, uint32_t n,
                        uint32_t n_sequences, uint32_t window, char *data)
{
    size_t page = kv_page_bytes(&kv), n_pages = MAX_POSITIONS / KV_PAGE;
    struct attention_args a = {.n = n,
                               .n_heads = HEADS,
                               .shape = kv,
                               .window = window,
                               .q = m->x,
                               .out = m->y,
                               .ld = HEADS * HEAD_DIM,
                               .rows = m->rows};
    double best = 1e9, end = now_seconds() + min_seconds;
    void **pages = calloc(n_sequences * n_pages, sizeof(*pages));

    if (!pages)
        return 0;
    for (size_t i = 0; i < n_sequences * n_pages; i++)
        pages[i] = data + i * page;
    for (uint32_t i = 0; i < 3 || now_seconds() < end; i++) {
        double start;

        for (uint32_t r = 0; r < n; r++)
            m->rows[r] = (struct kv_row){pages + i % n_sequences * n_pages, length - n + r};
        start = now_seconds();
        b->ops->attention(b, &a);
        best = MIN(best, now_seconds() - start);
    }
    free(pages);
    return best;
}

static int run_attention(struct backend *b, struct arrays *m)
{
    static const uint32_t lengths[] = {128, 512, 2048, 8192}, batches[] = {1, 4, 16, 64, 256};
    const uint32_t n_sequences = 7; /* E4B's layers that see all positions: none stays in a cache */
    size_t bytes = n_sequences * MAX_POSITIONS / KV_PAGE * kv_page_bytes(&kv);
    uint16_t *data = backend_alloc(b, bytes);

    if (!data)
        return -1;
    for (size_t i = 0; i < bytes / 2; i++)
        data[i] = (uint16_t)(0x2800 | (i * 2654435761u >> 9 & 0x87ff));
    printf("\nattention, us a row (GFLOP/s) of a sequence's last rows:\n%-20s", "positions; rows:");
    for (size_t i = 0; i < ARRAY_SIZE(batches); i++)
        printf("     %10u", batches[i]);
    printf("\n");
    for (int w = 0; w < 2; w++)
        for (size_t l = 0; l < ARRAY_SIZE(lengths); l++) {
            uint32_t window = w ? 512 : 0;

            if (w && lengths[l] <= window)
                continue;
            printf("%-20u", lengths[l]);
            for (size_t i = 0; i < ARRAY_SIZE(batches); i++) {
                uint32_t n = batches[i];
                double seen = 0, t;

                if (n > lengths[l])
                    break;
                for (uint32_t r = 0; r < n; r++) {
                    uint32_t positions = lengths[l] - r;

                    seen += window ? MIN(positions, window) : positions;
                }
                t = attention(b, m, lengths[l], n, n_sequences, window, (char *)data);
                printf("  %7.1f (%3.0f)", t / n * 1e6, 4e-9 * HEADS * HEAD_DIM * seen / t);
                fflush(stdout);
            }
            printf("%s\n", w ? "  window 512" : "");
        }
    backend_release(b, data, bytes);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"level", required_argument, NULL, 'l'},   {"threads", required_argument, NULL, 't'},
        {"seconds", required_argument, NULL, 's'}, {"attention", no_argument, NULL, 'a'},
        {"help", no_argument, NULL, 'h'},          {0}};
    const struct backend_limits limits = {MAX_ROWS, FFN, HEADS};
    CLEANUP(backend_freep) struct backend *b = NULL;
    const char *level = NULL;
    bool only_attention = false;
    uint32_t n_threads = 0;
    struct error err = {{0}};
    struct arrays m = {0};
    void *page;
    int o;

    while ((o = getopt_long(argc, argv, "l:t:s:ah", options, NULL)) != -1)
        switch (o) {
        case 'l':
            level = optarg;
            break;
        case 't':
            n_threads = (uint32_t)strtoul(optarg, NULL, 10);
            break;
        case 's':
            min_seconds = strtod(optarg, NULL);
            break;
        case 'a':
            only_attention = true;
            break;
        case 'h':
            printf("usage: bench-ops [--level NAME] [--threads N] [--seconds PER-FIGURE] "
                   "[--attention]\n");
            return 0;
        default:
            fprintf(stderr, "Try 'bench-ops --help'.\n");
            return 2;
        }
    if (backend_cpu_new(&b, level, n_threads, &limits, &err) < 0) {
        fprintf(stderr, "bench-ops: %s\n", err.text);
        return 1;
    }
    backend_cpu_pin(b);
    m.x = backend_alloc(b, SPACE);
    m.y = backend_alloc(b, SPACE);
    m.w = backend_alloc(b, SPACE);
    m.u = backend_alloc(b, SPACE);
    m.q = backend_alloc(b, SPACE);
    page = backend_alloc(b, (size_t)MAX_ROWS / KV_PAGE * kv_page_bytes(&kv));
    if (!m.x || !m.y || !m.w || !m.u || !m.q || !page) {
        fprintf(stderr, "bench-ops: out of memory\n");
        return 1;
    }
    fill(m.x);
    fill(m.w);
    fill(m.u);
    printf("%s, %u threads\n", b->ops->name, b->vtable->n_threads(b));
    if (!only_attention) {
        void *pages[MAX_ROWS / KV_PAGE];

        for (size_t i = 0; i < ARRAY_SIZE(pages); i++)
            pages[i] = (char *)page + i * kv_page_bytes(&kv);
        for (size_t i = 0; i < MAX_ROWS; i++)
            m.rows[i].pages = pages;
        run_operations(b, &m);
    }
    if (run_attention(b, &m) < 0) {
        fprintf(stderr, "bench-ops: out of memory\n");
        return 1;
    }
    return 0;
}
