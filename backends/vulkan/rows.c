/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The operations on rows of values. Those that sum over a row have one work group for each row, so
 * that nothing depends on how many rows there are; the others have an invocation for each value.
 */

#include <assert.h>
#include <float.h>
#include <math.h>

#include "backends/vulkan/vulkan-backend.h"
#include "base/checked.h"
#include "shaders/push-rows.h"

/* Invocations of a work group where each has a value of its own (pipelines.h) */
#define GROUP 64

static struct address row_address(struct vulkan_backend *v, const float *p, size_t k)
{
    return vulkan_rows_address(v, p, 1, k, k);
}

#define DISPATCH(v, pipeline, push, x, y) \
    vulkan_dispatch(v, pipeline, &(push), sizeof(push), x, y, 1)

static void norm(struct backend *b, const struct norm_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct norm_push push;

    if (!a->n)
        return;
    push = (struct norm_push){
        .x = vulkan_rows_address(v, a->x, a->n, a->k, a->ld_x),
        .w = row_address(v, a->w, a->k),
        .add = vulkan_rows_address(v, a->add, a->n, a->k, a->ld_add),
        .add2 = vulkan_rows_address(v, a->add2, a->n, a->k, a->ld_add2),
        .y = vulkan_rows_address(v, a->y, a->n, a->k, a->ld_y),
        .k = a->k,
        .ld_x = (uint)a->ld_x,
        .ld_add = (uint)a->ld_add,
        .ld_add2 = (uint)a->ld_add2,
        .ld_y = (uint)a->ld_y,
        .has_w = a->w != NULL,
        .has_add = a->add != NULL,
        .has_add2 = a->add2 != NULL,
        .eps = a->eps,
        .scale = a->scale,
    };
    DISPATCH(v, VULKAN_NORM, push, a->n, 1);
}

static void head_norm(struct backend *b, const struct head_norm_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct head_norm_push push;

    assert(!a->rope || a->head_dim % 2 == 0);
    if (!a->n)
        return;
    push = (struct head_norm_push){
        .x = vulkan_rows_address(v, a->x, a->n, (size_t)a->n_heads * a->head_dim, a->ld),
        .w = row_address(v, a->w, a->head_dim),
        .rope = vulkan_rows_address(v, a->rope, a->n, a->head_dim, a->head_dim),
        .head_dim = a->head_dim,
        .ld = (uint)a->ld,
        .has_w = a->w != NULL,
        .has_rope = a->rope != NULL,
        .eps = a->eps,
    };
    vulkan_writes(v, a->x, ((a->n - 1) * a->ld + (size_t)a->n_heads * a->head_dim) * sizeof(float));
    if (a->rope)
        vulkan_reads(v, a->rope, (size_t)a->n * a->head_dim * sizeof(float));
    DISPATCH(v, VULKAN_HEAD_NORM, push, a->n_heads, a->n);
}

static void gate(struct backend *b, const struct gate_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct gate_push push;

    if (!a->n)
        return;
    push = (struct gate_push){
        .gate = vulkan_rows_address(v, a->gate, a->n, a->k, a->ld_gate),
        .up = vulkan_rows_address(v, a->up, a->n, a->k, a->ld_up),
        .y = vulkan_rows_address(v, a->y, a->n, a->k, a->ld_y),
        .k = a->k,
        .ld_gate = (uint)a->ld_gate,
        .ld_up = (uint)a->ld_up,
        .ld_y = (uint)a->ld_y,
        .z = a->z,
    };
    if (a->z > 0)
        DISPATCH(v, VULKAN_GATE_CUT, push, a->n, 1);
    else
        DISPATCH(v, VULKAN_GATE, push, DIV_ROUND_UP(a->k, GROUP), a->n);
}

static void altup_predict(struct backend *b, const struct altup_predict_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    uint32_t s = a->n_streams;
    size_t row = (size_t)s * a->hidden;
    struct altup_predict_push push;

    assert(s <= BACKEND_MAX_STREAMS);
    if (!a->n)
        return;
    push = (struct altup_predict_push){
        .norm = row_address(v, a->router.norm, a->hidden),
        .router = row_address(v, a->router.router, row),
        .coefs = row_address(v, a->coefs, (size_t)s * s * s),
        .h = vulkan_rows_address(v, a->h, a->n, row, row),
        .pred = vulkan_rows_address(v, a->pred, a->n, row, row),
        .hidden = a->hidden,
        .n_streams = s,
        .eps = a->router.eps,
    };
    DISPATCH(v, s == 4 ? VULKAN_ALTUP_PREDICT_4 : VULKAN_ALTUP_PREDICT, push, a->n, 1);
}

static void altup_correct(struct backend *b, const struct altup_correct_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    uint32_t s = a->n_streams;
    size_t row = (size_t)s * a->hidden;
    struct altup_correct_push push;

    assert(s <= BACKEND_MAX_STREAMS);
    if (!a->n)
        return;
    push = (struct altup_correct_push){
        .norm = row_address(v, a->router.norm, a->hidden),
        .router = row_address(v, a->router.router, row),
        .coefs = row_address(v, a->coefs, (size_t)s * s),
        .pred = vulkan_rows_address(v, a->pred, a->n, row, row),
        .b = vulkan_rows_address(v, a->b, a->n, a->hidden, a->hidden),
        .scale = row_address(v, a->scale, a->hidden),
        .h = vulkan_rows_address(v, a->h, a->n, row, row),
        .scaled = vulkan_rows_address(v, a->scaled, a->n, a->hidden, a->hidden),
        .hidden = a->hidden,
        .n_streams = s,
        .eps = a->router.eps,
    };
    DISPATCH(v, s == 4 ? VULKAN_ALTUP_CORRECT_4 : VULKAN_ALTUP_CORRECT, push, a->n, 1);
}

static void stream_norm(struct backend *b, const struct stream_norm_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    size_t row = (size_t)a->n_streams * a->hidden;
    struct stream_norm_push push;

    if (!a->n || a->n_streams < 2)
        return;
    push = (struct stream_norm_push){
        .x = vulkan_rows_address(v, a->x, a->n, a->hidden, a->hidden),
        .w = row_address(v, a->w, a->hidden),
        .h = vulkan_rows_address(v, a->h, a->n, row, row),
        .hidden = a->hidden,
        .n_streams = a->n_streams,
        .eps = a->eps,
    };
    DISPATCH(v, VULKAN_STREAM_NORM, push, a->n, 1);
}

static void rescale(struct backend *b, const struct rescale_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    size_t row = (size_t)a->n_streams * a->hidden;
    struct rescale_push push;

    assert(a->stream < a->n_streams);
    if (!a->n)
        return;
    push = (struct rescale_push){
        .y = vulkan_rows_address(v, a->y, a->n, a->hidden, a->hidden),
        .ref = vulkan_rows_address(v, a->ref, a->n, a->hidden, a->ld_ref),
        .h = vulkan_rows_address(v, a->h + (size_t)a->stream * a->hidden, a->n, a->hidden, row),
        .hidden = a->hidden,
        .ld_ref = (uint)a->ld_ref,
        .ld_h = (uint)row,
    };
    DISPATCH(v, VULKAN_RESCALE, push, a->n, 1);
}

static void copy_rows(struct backend *b, const struct copy_rows_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct copy_rows_push push;

    if (!a->n)
        return;
    push = (struct copy_rows_push){
        /* which rows ids name is known to the device alone: it is one piece of memory anyway */
        .x = vulkan_rows_address(v, a->x, a->ids ? 1 : a->n, a->k, a->ld_x),
        .ids = vulkan_address(v, a->ids, a->ids ? a->n * sizeof(*a->ids) : 0),
        .y = vulkan_rows_address(v, a->y, a->n, a->k, a->ld_y),
        .k = a->k,
        .ld_x = (uint)a->ld_x,
        .ld_y = (uint)a->ld_y,
        .has_ids = a->ids != NULL,
    };
    DISPATCH(v, VULKAN_COPY_ROWS, push, DIV_ROUND_UP(a->k, GROUP), a->n);
}

static void merge(struct backend *b, const struct merge_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    size_t row = (size_t)a->n_streams * a->hidden;
    struct merge_push push;

    if (!a->n)
        return;
    push = (struct merge_push){
        .h = vulkan_rows_address(v, a->h, a->n, row, row),
        .w = row_address(v, a->w, a->hidden),
        .x = vulkan_rows_address(v, a->x, a->n, a->hidden, a->hidden),
        .hidden = a->hidden,
        .n_streams = a->n_streams,
        .eps = a->eps * (float)a->n_streams * (float)a->n_streams,
    };
    DISPATCH(v, VULKAN_MERGE, push, a->n, 1);
}

static void ple(struct backend *b, const struct ple_args *a)
{
    struct vulkan_backend *v = vulkan_backend(b);
    double scale = (double)a->g_scale;
    size_t row = (size_t)a->n_layers * a->width;
    struct ple_push push;

    if (!a->n)
        return;
    push = (struct ple_push){
        .g = vulkan_rows_address(v, a->g, a->n, row, row),
        .e = vulkan_rows_address(v, a->e, a->n, row, row),
        .w = row_address(v, a->w, a->width),
        .ple = vulkan_rows_address(v, a->ple, a->n, row, row),
        .width = a->width,
        .eps = (float)fmin((double)a->eps / (scale * scale), (double)FLT_MAX),
    };
    DISPATCH(v, VULKAN_PLE, push, a->n_layers, a->n);
}

#define SOFTCAP_GROUPS 4096 /* each invocation goes on to the value as many further */

static void softcap(struct backend *b, float *x, size_t n, float c)
{
    struct vulkan_backend *v = vulkan_backend(b);
    struct softcap_push push = {.c = c, .below = nextafterf(c, 0)};
    size_t piece = (size_t)1 << 30; /* so that positions have 32 bits */

    for (size_t done = 0; done < n; done += piece) {
        push.n = (uint)MIN(n - done, piece);
        push.x = row_address(v, x + done, push.n);
        DISPATCH(v, VULKAN_SOFTCAP, push,
                 MIN(DIV_ROUND_UP(push.n, GROUP), (uint32_t)SOFTCAP_GROUPS), 1);
    }
}

void vulkan_use_rows(struct backend_ops *ops)
{
    ops->norm = norm;
    ops->head_norm = head_norm;
    ops->gate = gate;
    ops->altup_predict = altup_predict;
    ops->altup_correct = altup_correct;
    ops->stream_norm = stream_norm;
    ops->rescale = rescale;
    ops->copy_rows = copy_rows;
    ops->merge = merge;
    ops->ple = ple;
    ops->softcap = softcap;
    ops->kv_store = vulkan_kv_store;
}
