/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * op-test: what tests of operations share. Every operation runs at every level of the CPU that this
 * machine has, or on a device, against the reference, within the bounds of backend.h. Each case is
 * run by a backend of two threads over many rows, by one of a single thread, and in batches of all
 * sizes: all must give the same bits. Outputs lie between guard values, inputs at addresses that
 * are aligned to nothing but their element. Whatever does not hold ends the program.
 *
 *   test-NAME          the CPU's levels
 *   test-NAME vulkan   a Vulkan device: lavapipe, or the one named by LLMD_TEST_DEVICE. Twice: with
 *                      weights and KV pages seen where they lie, and with weights copied and pages
 *                      of the driver's. 77 without a device
 */

#include "backends/backend.h"

#define EPS 0x1p-24
#define N_MAX 33 /* rows of the largest batch */
#define N_BATCHES 7

extern const uint32_t batches[N_BATCHES];

extern struct backend *ref; /* reference, one thread */
/* The level under test with one and two threads; of a device both are the same. */
extern struct backend *one, *two;
extern bool on_device;

/* Runs tests with ref, one and two set, once for each level that the arguments name. An exit
 * status: 0, or 1 for none. With AMX_EMULATED the one level is amx with its tiles in plain C; 77:
 * the machine lacks more. */
int op_test_main(int argc, char **argv, void (*tests)(void));

/* Issues an operation and waits for what it gives: ISSUE(b, norm(b, &a)). */
#define ISSUE(b, call)      \
    do {                    \
        if (op_begin(b)) {  \
            (b)->ops->call; \
            op_end(b);      \
        }                   \
        op_finish(b);       \
    } while (0)

bool op_begin(struct backend *b);
void op_end(struct backend *b);
void op_finish(struct backend *b);

/* The operations that follow are recorded as a pass of a new key; after op_repeat() they are those
 * of the same pass again, which a device replays; after op_single() none is in a pass. */
void op_record(void);
void op_repeat(void);
void op_single(void);

/*
 * What operations are given addresses of: memory of the backend's for what they read and write; a
 * copy of weights as they are now, which stays until the level's end and, on a device that has to
 * copy it again, holds garbage by then; KV pages, all of which are taken back at once.
 */
void *op_alloc(size_t bytes);
void op_free(void *p, size_t bytes);
const void *op_weights(const void *p, size_t bytes);
void *op_page(size_t bytes);
void op_pages_free(void);

/* Devices in software are slow: case i is one that is left to another round, or to the CPU, so that
 * one in `of` remains. All are there for the CPU. */
bool op_leave_out(size_t i, size_t of);

/* Values around zero that a device may take for it (backend.h), and what sums of those make. */
double op_tiny(void);

uint32_t next_random(void); /* below 2^31 */
float uniform(void);        /* in -1..1 */

/* [n][width] values, ld apart, with everything around them marked. */
struct array {
    uint32_t *memory;
    size_t n, width, ld, total;
    float *p;
};

struct array array_new(size_t n, size_t width, size_t gap); /* ld: width + gap */
struct array array_random(size_t n, size_t width, size_t gap, float scale);
void array_free(struct array *a);
void array_mark(struct array *a);
const float *array_weights(const struct array *a); /* op_weights() */

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
    struct weight w; /* for the test itself */
    uint8_t *data;
    size_t bytes;
};

struct weight packed_weights(const struct packed *p); /* for operations: op_weights() */

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
