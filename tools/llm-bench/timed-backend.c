/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * A matrix is known by where its data lie. Which neurons of a sparse layer are left is found here
 * anew from the raw gate, by the formula and in double: the same ones, but for a gate that lies on
 * the cut to the last bit.
 *
 * K and V that several rows of a sequence see are counted once, as weights are.
 */

#include "tools/llm-bench/timed-backend.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/cleanup.h"
#include "base/clock.h"

struct role {
    const void *data;
    enum op_class c;
};

struct timed_backend {
    struct backend base;
    struct backend *inner;
    struct op_sum sums[N_OP_CLASSES];
    double counting;    /* seconds */
    struct role *roles; /* [n_roles], by data */
    size_t n_roles;
    uint8_t *left;             /* [widest ffn]: neurons that some row has */
    uint32_t n_left, n_blocks; /* of the gate that was cut last: neurons; blocks of 32 with any */
    double n_products;         /* the neurons of all its rows */
};

const char *op_class_name(enum op_class c)
{
    switch (c) {
    case OP_Q:
        return "q";
    case OP_K:
        return "k";
    case OP_V:
        return "v";
    case OP_O:
        return "o";
    case OP_GATE:
        return "gate";
    case OP_UP:
        return "up";
    case OP_DOWN:
        return "down";
    case OP_SPARSE:
        return "sparse up, down";
    case OP_HEAD:
        return "head";
    case OP_PLE:
        return "per-layer input";
    case OP_LAUREL:
        return "LAuReL";
    case OP_ALTUP:
        return "AltUp projections";
    case OP_ATTENTION:
        return "attention";
    case OP_MIXING:
        return "AltUp mixing";
    case OP_NORMS:
        return "norms, rotation";
    case OP_ACTIVATION:
        return "activation";
    case OP_ROUNDING:
        return "rounding";
    case OP_ROWS:
        return "table rows";
    case OP_SOFTCAP:
        return "softcap";
    case OP_SAMPLING:
        return "sampling, besides";
    case OP_REST:
        return "between operations";
    case N_OP_CLASSES:
        break;
    }
    return "";
}

static struct timed_backend *timed(struct backend *b)
{
    return (struct timed_backend *)b;
}

/* Runs the operation of the same name, on a device to its end, and adds its time to a class. */
#define TIMED(c, call)                                      \
    do {                                                    \
        struct backend *inner = timed(b)->inner;            \
        double start = now_seconds();                       \
                                                            \
        inner->ops->call;                                   \
        (void)backend_finish(inner);                        \
        timed(b)->sums[c].seconds += now_seconds() - start; \
    } while (0)

static int by_data(const void *pa, const void *pb)
{
    const struct role *a = pa, *b = pb;
    uintptr_t x = (uintptr_t)a->data, y = (uintptr_t)b->data;

    return (x > y) - (x < y);
}

static enum op_class class_of(const struct timed_backend *t, const struct weight *w)
{
    const struct role key = {.data = w->data};
    const struct role *r = bsearch(&key, t->roles, t->n_roles, sizeof(*t->roles), by_data);

    return r ? r->c : OP_REST;
}

/* ---- what is counted ---- */

static double weight_bytes(const struct weight *w)
{
    size_t bytes;

    return weight_size(w->type, w->layout, w->n_out, w->n_in, &bytes) == 0 ? (double)bytes : 0;
}

/* Products of a matrix with `rows` rows of x, n of its values in each. */
static void add_products(struct op_sum *s, const struct weight *w, const struct activations *x,
                         double n)
{
    if (x->q && weight_type_is_quantized(w->type))
        s->operations_int8 += 2 * n;
    else
        s->operations_f32 += 2 * n;
}

/* Which neurons the rows of a raw gate leave, by §3.7. */
static void count_left(struct timed_backend *t, const float *gate, size_t ld, uint32_t n,
                       uint32_t k, double z)
{
    double start = now_seconds();

    memset(t->left, 0, k);
    t->n_left = t->n_blocks = 0;
    t->n_products = 0;
    for (uint32_t i = 0; i < n; i++) {
        const float *x = gate + i * ld;
        double mean = 0, squares = 0, cut;

        for (uint32_t j = 0; j < k; j++)
            mean += (double)x[j];
        mean /= k;
        for (uint32_t j = 0; j < k; j++)
            squares += ((double)x[j] - mean) * ((double)x[j] - mean);
        cut = mean + z * sqrt(squares / k);
        for (uint32_t j = 0; j < k; j++)
            if ((double)x[j] > cut) {
                t->left[j] = 1;
                t->n_products++;
            }
    }
    for (uint32_t j = 0; j < k; j += WEIGHT_BLOCK) {
        uint32_t here = 0;

        for (uint32_t i = j; i < MIN(j + WEIGHT_BLOCK, k); i++)
            here += t->left[i];
        t->n_left += here;
        t->n_blocks += here > 0;
    }
    t->counting += now_seconds() - start;
}

/* Of the columns that are left, and of the scales that blocks of them share. */
static double columns_bytes(const struct timed_backend *t, const struct weight *w)
{
    size_t line = weight_column_bytes(w->type, w->n_out);
    double bytes = (double)line * t->n_left;

    if (weight_type_is_quantized(w->type))
        bytes +=
            (double)(weight_col_block_bytes(w->type, w->n_out) - WEIGHT_BLOCK * line) * t->n_blocks;
    return bytes;
}

/* ---- operations ---- */

static void quantize(struct backend *b, const struct activations *x)
{
    TIMED(OP_ROUNDING, quantize(inner, x));
}

static void matmul(struct backend *b, const struct weight *w, const struct activations *x, float *y,
                   size_t ld_y)
{
    struct timed_backend *t = timed(b);
    enum op_class c = class_of(t, w);

    TIMED(c, matmul(inner, w, x, y, ld_y));
    t->sums[c].bytes += weight_bytes(w);
    add_products(&t->sums[c], w, x, (double)x->n * w->n_out * w->n_in);
}

static void get_rows(struct backend *b, const struct weight *w, const uint32_t *ids, uint32_t n,
                     float scale, float *y, size_t ld_y)
{
    TIMED(OP_ROWS, get_rows(inner, w, ids, n, scale, y, ld_y));
    timed(b)->sums[OP_ROWS].bytes += (double)n * (double)weight_row_bytes(w->type, w->n_in);
}

static void norm(struct backend *b, const struct norm_args *a)
{
    TIMED(OP_NORMS, norm(inner, a));
    timed(b)->sums[OP_NORMS].bytes += a->w ? 4.0 * a->k : 0;
}

static void head_norm(struct backend *b, const struct head_norm_args *a)
{
    TIMED(OP_NORMS, head_norm(inner, a));
    timed(b)->sums[OP_NORMS].bytes += a->w ? 4.0 * a->head_dim : 0;
}

static void kv_store(struct backend *b, const struct kv_store_args *a)
{
    TIMED(OP_ATTENTION, kv_store(inner, a));
}

static void attention(struct backend *b, const struct attention_args *a)
{
    struct op_sum *s = &timed(b)->sums[OP_ATTENTION];
    double position = 2.0 * a->shape.n_heads_kv * a->shape.head_dim * (a->shape.f16 ? 2 : 4);

    TIMED(OP_ATTENTION, attention(inner, a));
    for (uint32_t i = 0; i < a->n; i++) {
        double seen = a->rows[i].pos + 1.0;
        bool follows = i > 0 && a->rows[i].pages == a->rows[i - 1].pages;

        if (a->window > 0)
            seen = MIN(seen, (double)a->window);
        s->bytes += position * (follows ? a->rows[i].pos - (double)a->rows[i - 1].pos : seen);
        s->operations_f32 += 4 * seen * a->n_heads * a->shape.head_dim;
    }
}

static void gate(struct backend *b, const struct gate_args *a)
{
    TIMED(OP_ACTIVATION, gate(inner, a));
}

static void sparse_ffn(struct backend *b, const struct sparse_ffn_args *a)
{
    struct timed_backend *t = timed(b);
    struct op_sum *s = &t->sums[OP_SPARSE];

    count_left(t, a->gate, a->ld_gate, a->x->n, a->up->n_out, (double)a->z);
    TIMED(OP_SPARSE, sparse_ffn(inner, a));
    s->bytes +=
        (double)weight_row_bytes(a->up->type, a->up->n_in) * t->n_left + columns_bytes(t, a->down);
    add_products(s, a->up, a->x, t->n_products * a->up->n_in);
    add_products(s, a->down, a->x, t->n_products * a->down->n_out);
}

static double router_bytes(uint32_t hidden, uint32_t n_streams)
{
    return 4.0 * hidden * (1.0 + n_streams);
}

static void altup_predict(struct backend *b, const struct altup_predict_args *a)
{
    TIMED(OP_MIXING, altup_predict(inner, a));
    timed(b)->sums[OP_MIXING].bytes +=
        router_bytes(a->hidden, a->n_streams) + 4.0 * a->n_streams * a->n_streams * a->n_streams;
}

static void altup_correct(struct backend *b, const struct altup_correct_args *a)
{
    TIMED(OP_MIXING, altup_correct(inner, a));
    timed(b)->sums[OP_MIXING].bytes +=
        router_bytes(a->hidden, a->n_streams) + 4.0 * a->n_streams * a->n_streams + 4.0 * a->hidden;
}

static void stream_norm(struct backend *b, const struct stream_norm_args *a)
{
    TIMED(OP_MIXING, stream_norm(inner, a));
    timed(b)->sums[OP_MIXING].bytes += 4.0 * a->hidden;
}

static void rescale(struct backend *b, const struct rescale_args *a)
{
    TIMED(OP_MIXING, rescale(inner, a));
}

static void copy_rows(struct backend *b, const struct copy_rows_args *a)
{
    TIMED(OP_ROWS, copy_rows(inner, a));
}

static void merge(struct backend *b, const struct merge_args *a)
{
    TIMED(OP_MIXING, merge(inner, a));
    timed(b)->sums[OP_MIXING].bytes += 4.0 * a->hidden;
}

static void ple(struct backend *b, const struct ple_args *a)
{
    TIMED(OP_NORMS, ple(inner, a));
    timed(b)->sums[OP_NORMS].bytes += 4.0 * a->width;
}

static void softcap(struct backend *b, float *x, size_t n, float c)
{
    TIMED(OP_SOFTCAP, softcap(inner, x, n, c));
}

static const struct backend_ops ops = {
    .name = "timed",
    .quantize = quantize,
    .matmul = matmul,
    .get_rows = get_rows,
    .norm = norm,
    .head_norm = head_norm,
    .kv_store = kv_store,
    .attention = attention,
    .gate = gate,
    .sparse_ffn = sparse_ffn,
    .altup_predict = altup_predict,
    .altup_correct = altup_correct,
    .stream_norm = stream_norm,
    .rescale = rescale,
    .copy_rows = copy_rows,
    .merge = merge,
    .ple = ple,
    .softcap = softcap,
};
_Static_assert(sizeof(struct backend_ops) == 18 * sizeof(void *),
               "an operation that is not here is not forwarded: add it, and count it there");

/* ---- the rest of a backend ---- */

static void *forward_alloc(struct backend *b, size_t bytes)
{
    return backend_alloc(timed(b)->inner, bytes);
}

static void forward_release(struct backend *b, void *p, size_t bytes)
{
    backend_release(timed(b)->inner, p, bytes);
}

static size_t forward_map_limit(const struct backend *b)
{
    return backend_map_limit(((const struct timed_backend *)b)->inner);
}

static int forward_map(struct backend *b, const void *p, size_t bytes, enum backend_memory kind)
{
    return backend_map(timed(b)->inner, p, bytes, kind);
}

static void forward_unmap(struct backend *b, const void *p)
{
    backend_unmap(timed(b)->inner, p);
}

/* The inner one knows of no pass: of a pass that is issued again no operation would be seen. */
static bool forward_begin(struct backend *b, uint64_t key)
{
    (void)b, (void)key;
    return true;
}

static void forward_end(struct backend *b)
{
    (void)b;
}

static int forward_submit(struct backend *b)
{
    return backend_submit(timed(b)->inner);
}

static int forward_wait(struct backend *b, uint64_t timeout_usec)
{
    return backend_wait(timed(b)->inner, timeout_usec);
}

static const char *forward_failure(const struct backend *b)
{
    return backend_failure(((const struct timed_backend *)b)->inner);
}

static bool forward_hangs(const struct backend *b)
{
    return backend_hangs(((const struct timed_backend *)b)->inner);
}

static void forward_free(struct backend *b)
{
    timed_backend_free(timed(b));
}

static size_t forward_scratch_bytes(const struct backend *b)
{
    const struct backend *inner = ((const struct timed_backend *)b)->inner;

    return inner->vtable->scratch_bytes(inner);
}

static uint32_t forward_n_threads(const struct backend *b)
{
    const struct backend *inner = ((const struct timed_backend *)b)->inner;

    return inner->vtable->n_threads(inner);
}

static const struct backend_vtable vtable = {
    .alloc = forward_alloc,
    .release = forward_release,
    .map_limit = forward_map_limit,
    .map = forward_map,
    .unmap = forward_unmap,
    .begin = forward_begin,
    .end = forward_end,
    .submit = forward_submit,
    .wait = forward_wait,
    .failure = forward_failure,
    .hangs = forward_hangs,
    .free = forward_free,
    .scratch_bytes = forward_scratch_bytes,
    .n_threads = forward_n_threads,
};
_Static_assert(sizeof(struct backend_vtable) == 14 * sizeof(void *), "likewise");

/* ---- its life ---- */

static void add_role(struct timed_backend *t, const struct weight *w, enum op_class c)
{
    if (w->data)
        t->roles[t->n_roles++] = (struct role){w->data, c};
}

static void find_roles(struct timed_backend *t, const struct model *m)
{
    const struct model_config *c = model_config(m);
    const struct model_weights *w = model_weights(m);

    add_role(t, &w->embed, OP_HEAD);
    add_role(t, &w->ple_projection, OP_PLE);
    for (uint32_t i = 0; i + 1 < c->n_streams; i++) {
        add_role(t, &w->altup_projection[i], OP_ALTUP);
        add_role(t, &w->altup_unembed[i], OP_ALTUP);
    }
    for (uint32_t l = 0; l < c->n_layers; l++) {
        const struct layer_weights *y = &w->layers[l];

        add_role(t, &y->q, OP_Q);
        add_role(t, &y->k, OP_K);
        add_role(t, &y->v, OP_V);
        add_role(t, &y->o, OP_O);
        add_role(t, &y->gate, OP_GATE);
        add_role(t, &y->up, OP_UP);
        add_role(t, &y->down, OP_DOWN);
        add_role(t, &y->laurel_left, OP_LAUREL);
        add_role(t, &y->laurel_right, OP_LAUREL);
        add_role(t, &y->ple_gate, OP_PLE);
        add_role(t, &y->ple_proj, OP_PLE);
    }
    qsort(t->roles, t->n_roles, sizeof(*t->roles), by_data);
}

int timed_backend_new(struct timed_backend **ret, struct backend *inner, const struct model *m)
{
    CLEANUP(timed_backend_freep) struct timed_backend *t = calloc(1, sizeof(*t));
    const struct model_config *c = model_config(m);
    uint32_t widest = 1;

    for (uint32_t l = 0; l < c->n_layers; l++)
        widest = MAX(widest, c->layers[l].ffn_width);
    if (t) {
        t->roles = calloc(2 + 2 * MODEL_MAX_STREAMS + 11 * (size_t)c->n_layers, sizeof(*t->roles));
        t->left = calloc(widest, 1);
    }
    if (!t || !t->roles || !t->left)
        return -ENOMEM;
    t->base.ops = &ops;
    t->base.vtable = &vtable;
    t->inner = inner;
    find_roles(t, m);
    *ret = TAKE_PTR(t);
    return 0;
}

struct timed_backend *timed_backend_free(struct timed_backend *t)
{
    if (t) {
        free(t->roles);
        free(t->left);
        free(t);
    }
    return NULL;
}

void timed_backend_freep(struct timed_backend **t)
{
    timed_backend_free(*t);
}

struct backend *timed_backend_base(struct timed_backend *t)
{
    return &t->base;
}

double timed_backend_take(struct timed_backend *t, struct op_sum *ret)
{
    double counting = t->counting;

    memcpy(ret, t->sums, sizeof(t->sums));
    memset(t->sums, 0, sizeof(t->sums));
    t->counting = 0;
    return counting;
}
