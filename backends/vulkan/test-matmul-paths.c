/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The kernels of matrix products that this device would not be given: without integer dot products,
 * and with no more threads and shared memory in a work group than every device has. All give the
 * same bits; that those are right is what backends/test-matmul.c tests. 77 without lavapipe.
 */

#undef NDEBUG

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/checked.h"
#include "base/cleanup.h"

enum { N = 70, N_OUT = 64, N_IN = 1088, LD_Q = N_IN };

static const struct {
    enum weight_type type;
    enum weight_layout layout;
} kinds[] = {
    {WEIGHT_Q4, LAYOUT_TILE16}, {WEIGHT_Q4, LAYOUT_ROWS},     {WEIGHT_Q4, LAYOUT_COLS},
    {WEIGHT_Q8, LAYOUT_TILE16}, {WEIGHT_Q8, LAYOUT_ROWS},     {WEIGHT_Q8, LAYOUT_COLS},
    {WEIGHT_F32, LAYOUT_PLAIN}, {WEIGHT_BF16, LAYOUT_TILE16},
};

static float *product(struct backend *b, const struct weight *w, const struct activations *x)
{
    float *y = backend_alloc(b, sizeof(float) * N * N_OUT);

    assert(y);
    b->ops->matmul(b, w, x, y, N_OUT);
    assert(backend_finish(b) == 0);
    return y;
}

static void check_paths(struct backend *b, struct vulkan_device *d, const struct weight *w,
                        const struct activations *x)
{
    const struct vulkan_capabilities has = d->has;
    size_t bytes = sizeof(float) * N * N_OUT;
    float *want = product(b, w, x);
    bool any = false;

    for (size_t i = 0; i < (size_t)N * N_OUT; i++)
        any |= want[i] != 0;
    assert(any);
    for (int path = 0; path < 3; path++) {
        float *got;

        if (path != 1) /* plain integers */
            d->has.dot_8 = false;
        if (path != 0) { /* no tiles */
            d->has.max_invocations = 128;
            d->has.shared_bytes = 16384;
        }
        got = product(b, w, x);
        d->has = has;
        if (memcmp(got, want, bytes) != 0) {
            fprintf(stderr, "%s %s %s: path %d gives other bits\n", weight_type_name(w->type),
                    weight_layout_name(w->layout), x->q ? "int8" : "f32", path);
            abort();
        }
        backend_release(b, got, bytes);
    }
    backend_release(b, want, bytes);
}

static void check_kind(struct backend *b, struct vulkan_device *d, enum weight_type type,
                       enum weight_layout layout, const struct activations *x)
{
    struct weight w = {type, layout, N_OUT, N_IN, NULL};
    uint8_t *data;
    size_t bytes;

    assert(weight_size(type, layout, N_OUT, N_IN, &bytes) == 0);
    data = backend_alloc(b, bytes);
    assert(data);
    for (uint32_t r = 0; r < N_OUT; r++) {
        int8_t q[N_IN];
        uint16_t scales[N_IN / WEIGHT_BLOCK];
        float f[N_IN];

        for (uint32_t k = 0; k < N_IN; k++) {
            q[k] = (int8_t)(rand() % 16 - 8);
            f[k] = (float)q[k] / 8;
        }
        for (uint32_t i = 0; i < N_IN / WEIGHT_BLOCK; i++)
            scales[i] = half_from_float((float)(rand() % 255 - 127) / 1024);
        if (weight_type_is_quantized(type))
            weight_put_row_q(&w, data, r, q, scales);
        else
            weight_put_row(&w, data, r, f);
    }
    w.data = data;
    if (weight_type_is_quantized(type))
        check_paths(b, d, &w, x);
    check_paths(b, d, &w, &(struct activations){.n = N, .k = N_IN, .f32 = x->f32, .ld = x->ld});
    backend_release(b, data, bytes);
}

/* More outputs than one dimension can have work groups for. */
static void check_many(struct backend *b)
{
    const uint32_t n_out = 65535 * WEIGHT_STRIPE + 1, n_in = 2;
    struct weight w = {WEIGHT_BF16, LAYOUT_TILE16, n_out, n_in, NULL};
    float *x = backend_alloc(b, 2 * sizeof(*x)), *y = backend_alloc(b, n_out * sizeof(*y));
    struct activations a = {.n = 1, .k = n_in, .f32 = x, .ld = n_in};
    uint8_t *data;
    size_t bytes;

    assert(weight_size(w.type, w.layout, n_out, n_in, &bytes) == 0);
    data = backend_alloc(b, bytes);
    assert(x && y && data);
    for (uint32_t r = 0; r < n_out; r++)
        weight_put_row(&w, data, r, (float[]){(float)(r % 256), (float)(r >> 8 & 0xff)});
    w.data = data;
    x[0] = 1;
    x[1] = 1024;
    b->ops->matmul(b, &w, &a, y, n_out);
    assert(backend_finish(b) == 0);
    for (uint32_t r = 0; r < n_out; r++)
        assert(y[r] == (float)(r % 256 + 1024 * (r >> 8 & 0xff)));
    backend_release(b, x, 2 * sizeof(*x));
    backend_release(b, y, n_out * sizeof(*y));
    backend_release(b, data, bytes);
}

int main(void)
{
    const struct backend_limits limits = {N, N_IN, 1};
    CLEANUP(vulkan_device_freep) struct vulkan_device *d = NULL;
    CLEANUP(backend_freep) struct backend *b = NULL;
    struct error err = {};
    struct activations x = {.n = N, .k = N_IN, .ld = N_IN, .ld_q = LD_Q};
    int r = vulkan_device_find(&d, &(struct vulkan_options){.name = "llvmpipe"}, &err);

    if (r == -ENOENT || r == -ENOSYS) {
        fprintf(stderr, "skipped: %s\n", err.text);
        return 77;
    }
    assert(r == 0 && backend_vulkan_new(&b, d, &limits, &err) == 0);
    x.f32 = backend_alloc(b, sizeof(float) * N * N_IN);
    x.q = backend_alloc(b, (size_t)N * LD_Q);
    x.d = backend_alloc(b, sizeof(float) * N * LD_Q / WEIGHT_BLOCK);
    x.sum = backend_alloc(b, sizeof(int32_t) * N * LD_Q / WEIGHT_BLOCK);
    assert(x.f32 && x.q && x.d && x.sum);
    srand(1);
    for (size_t i = 0; i < (size_t)N * N_IN; i++)
        x.f32[i] = (float)(rand() % 20001 - 10000) / 4096;
    b->ops->quantize(b, &x);
    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++)
        check_kind(b, d, kinds[i].type, kinds[i].layout, &x);
    check_many(b);
    assert(backend_finish(b) == 0);
    return 0;
}
