/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * op-test: what tests of operations share. Every operation runs at every level this machine has,
 * against the reference, within the bounds of backend.h. Each case is run by a backend of two
 * threads over many rows, by one of a single thread, and in batches of all sizes: all must give
 * the same bits. Outputs lie between guard values, inputs at addresses that are aligned to nothing
 * but their element. Whatever does not hold ends the program.
 */

#include "backends/backend.h"

#define EPS 0x1p-24
#define N_MAX 33 /* rows of the largest batch */
#define N_BATCHES 7

extern const uint32_t batches[N_BATCHES];

extern struct backend *ref;       /* reference, one thread */
extern struct backend *one, *two; /* the level under test with one and two threads */

/* Runs tests with ref, one and two set, once for each level. An exit status: 0, or 1 for none.
 * With AMX_EMULATED the one level is amx with its tiles in plain C; 77: the machine lacks more. */
int op_test_levels(void (*tests)(void));

uint32_t next_random(void); /* below 2^31 */
float uniform(void);        /* in -1..1 */

/* [n][width] values, ld apart, with everything around them marked. */
struct array {
    uint32_t *memory, *copy;
    size_t n, width, ld, total;
    float *p;
};

struct array array_new(size_t n, size_t width, size_t gap); /* ld: width + gap */
struct array array_random(size_t n, size_t width, size_t gap, float scale);
void array_free(struct array *a);
void array_mark(struct array *a);

/* Only the first n rows may have been written. */
void check_guards(const struct array *a, size_t n);

/* |got - want| <= bound, and a rounding to float */
void check_near(const char *what, size_t row, size_t k, double got, double want, double bound);

/* The bits of n values are the same. */
void check_same(const char *what, const float *a, const float *b, size_t n);

/*
 * An operation with its arguments, to be run over rows first..first + n - 1 of them into y
 * ([n][ld of the array]). Results that consist of several arrays are run as several cases.
 */
typedef void (*run_rows)(struct backend *b, void *args, uint32_t first, uint32_t n, float *y);

/* Rows in batches of all sizes and single, with both thread counts, have the bits of all at once,
 * which are left in out. */
void check_batches(const char *what, run_rows run, void *args, struct array *out);

struct packed {
    struct weight w;
    uint8_t *data;
    size_t bytes;
};

/* Random values. Rows 0 and 1 hold the extremes of the type: sums of products reach the end of
 * their range. */
struct packed packed_new(enum weight_type type, enum weight_layout layout, uint32_t n_out,
                         uint32_t n_in);
void packed_free(struct packed *p);

enum rounding { ROUND_NOT, ROUND_COARSE, ROUND_FINE };

/* Activations, aligned to nothing. */
struct rows {
    struct activations a;
    struct array f32;
    char *memory, *low; /* of q, d, sum; of q_low, sum_low */
    size_t memory_bytes, low_bytes;
};

struct rows rows_new(uint32_t n, uint32_t k, enum rounding rounding);
void rows_free(struct rows *r);

/* Some rows of a special kind among random ones. */
void rows_fill(struct rows *r);

struct activations rows_from(const struct activations *a, uint32_t first, uint32_t n);
