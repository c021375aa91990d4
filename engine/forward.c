/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * One pass of the model, gemma3n.md §3 step by step; the letters in comments are its headings.
 *
 * All rows go through the layers together. Rows whose logits nobody wants only have to leave their
 * K and V behind: they are done once the last owning layer has stored them (§3.11), and from there
 * on the pass continues with the wanted rows alone. Since what a row gives never depends on its
 * neighbours (backend.h), that changes no bit of the others.
 */

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "engine/engine-internal.h"
#include "engine/model-file.h"
#include "engine/read-ahead.h"

/* Gives out pieces of the scratch allocation; with base NULL it only counts. */
struct arena {
    char *base;
    size_t used;
    bool overflow;
};

static void *take(struct arena *a, size_t rows, size_t width, size_t size)
{
    size_t bytes, end;
    void *p = a->base ? a->base + a->used : NULL;

    if (ckd_mul(&bytes, rows, width) || ckd_mul(&bytes, bytes, size) ||
        ckd_align(&bytes, bytes, WEIGHT_ALIGN) || ckd_add(&end, a->used, bytes))
        a->overflow = true;
    else
        a->used = end;
    return p;
}

static void lay_out(struct engine *e, struct arena *a)
{
    const struct model_config *c = e->config;
    struct forward_buffers *b = &e->buf;
    size_t n = e->max_rows, streams = (size_t)c->n_streams * c->hidden;
    size_t heads = (size_t)c->n_heads * c->head_dim, heads_kv = (size_t)c->n_heads_kv * c->head_dim;
    size_t ple = (size_t)c->n_layers * c->ple_width, ffn = 0, blocks = e->widest / WEIGHT_BLOCK;

    for (uint32_t l = 0; l < c->n_layers; l++)
        ffn = MAX(ffn, sparse_ffn_work_bytes(1, c->layers[l].ffn_width) / sizeof(float));

    b->h = take(a, n, streams, sizeof(float));
    b->pred = take(a, n, streams, sizeof(float));
    b->x0 = take(a, n, c->hidden, sizeof(float));
    b->xn = take(a, n, c->hidden, sizeof(float));
    b->laurel = take(a, n, c->hidden, sizeof(float));
    b->s = take(a, n, c->hidden, sizeof(float));
    b->t = take(a, n, c->hidden, sizeof(float));
    b->rank = take(a, n, c->laurel_rank, sizeof(float));
    b->q = take(a, n, heads, sizeof(float));
    b->attn = take(a, n, heads, sizeof(float));
    b->k = take(a, n, heads_kv, sizeof(float));
    b->v = take(a, n, heads_kv, sizeof(float));
    b->gate = take(a, n, MAX(ffn, ple), sizeof(float));
    b->up = take(a, n, ffn, sizeof(float));
    b->ple = take(a, n, ple, sizeof(float));
    b->ple_gate = take(a, n, c->ple_width, sizeof(float));
    b->rope[0] = take(a, n, c->head_dim, sizeof(float));
    b->rope[1] = take(a, n, c->head_dim, sizeof(float));
    b->act_q = take(a, n, e->widest, 1);
    b->act_d = take(a, n, blocks, sizeof(float));
    b->act_sum = take(a, n, blocks, sizeof(int32_t));
    b->act_low = take(a, n, ALIGN_UP((size_t)c->hidden, (size_t)64), 1);
    b->act_sum_low =
        take(a, n, ALIGN_UP((size_t)c->hidden, (size_t)64) / WEIGHT_BLOCK, sizeof(int32_t));
    b->logits = take(a, e->max_logits, c->vocab_size, sizeof(float));
    b->rows = take(a, n, 1, sizeof(*b->rows));
    b->kv_rows = take(a, n, 1, sizeof(*b->kv_rows));
    b->ids = take(a, n, 1, sizeof(*b->ids));
}

int forward_init(struct engine *e)
{
    struct arena a = {0};
    uint32_t half = e->config->head_dim / 2;
    const float theta[2] = {e->config->rope_theta, e->config->rope_theta_sliding};

    for (int i = 0; i < 2; i++) {
        e->inv_freq[i] = calloc(half, sizeof(double));
        if (!e->inv_freq[i])
            return -ENOMEM;
        for (uint32_t k = 0; k < half; k++)
            e->inv_freq[i][k] = pow((double)theta[i], -(double)k / half);
    }

    lay_out(e, &a);
    if (a.overflow)
        return -EOVERFLOW;
    e->scratch_bytes = a.used;
    e->scratch = backend_alloc(e->backend, a.used);
    if (!e->scratch)
        return -ENOMEM;
    a = (struct arena){.base = e->scratch};
    lay_out(e, &a);
    return 0;
}

void forward_done(struct engine *e)
{
    if (e->backend)
        backend_release(e->backend, e->scratch, e->scratch_bytes);
    free(e->inv_freq[0]);
    free(e->inv_freq[1]);
}

/* Rows about to meet matrices. One at a time is live: the rounded copy has one buffer. */
static struct activations rows_of(float *x, uint32_t n, uint32_t k)
{
    return (struct activations){.n = n, .k = k, .f32 = x, .ld = k};
}

/* Fills x's rounded copy if w wants one and it is not there, with the second plane if fine. */
static void round_for(struct engine *e, const struct weight *w, struct activations *x, bool fine)
{
    if (e->activations != ACTIVATIONS_INT8 || !weight_type_is_quantized(w->type) ||
        (fine ? x->q_low != NULL : x->q != NULL))
        return;
    assert(!fine || x->k <= e->config->hidden);
    x->q = e->buf.act_q;
    x->d = e->buf.act_d;
    x->sum = e->buf.act_sum;
    x->ld_q = ALIGN_UP((size_t)x->k, (size_t)64);
    x->q_low = fine ? e->buf.act_low : NULL;
    x->sum_low = fine ? e->buf.act_sum_low : NULL;
    e->backend->ops->quantize(e->backend, x);
}

/*
 * y = w x with 16 bits of x, or all of it: for Q and K. Attention scores have scale 1, so what is
 * rounded off there reaches the softmax undamped: a third of the whole mode's divergence came from
 * these two, which are 4 % of a layer (docs/performance.md).
 */
static void matmul_fine(struct engine *e, const struct weight *w, struct activations *x, float *y,
                        size_t ld_y)
{
    round_for(e, w, x, true);
    e->backend->ops->matmul(e->backend, w, x, y, ld_y);
}

/* y = w x. Rounds x once, at the first matrix that wants it rounded. */
static void matmul(struct engine *e, const struct weight *w, struct activations *x, float *y,
                   size_t ld_y)
{
    struct activations coarse;

    round_for(e, w, x, false);
    coarse = *x;
    coarse.q_low = NULL;
    e->backend->ops->matmul(e->backend, w, &coarse, y, ld_y);
}

static const float *plain(const struct weight *w)
{
    return w->data;
}

static struct router_weights router_of(const struct engine *e, const struct layer_weights *w)
{
    return (struct router_weights){plain(&w->router_norm), plain(&w->router), e->config->rms_eps};
}

/* cos and sin of every row's position, both bases; angles in double (§3.6). */
static void fill_rope(struct engine *e, uint32_t n)
{
    uint32_t half = e->config->head_dim / 2;

    for (uint32_t i = 0; i < n; i++)
        for (int kind = 0; kind < 2; kind++) {
            float *out = e->buf.rope[kind] + (size_t)i * 2 * half;

            for (uint32_t k = 0; k < half; k++) {
                double angle = e->buf.rows[i].pos * e->inv_freq[kind][k];

                out[k] = (float)cos(angle);
                out[half + k] = (float)sin(angle);
            }
        }
}

/* Stream k := t, brought to the magnitude of ref's rows (§3.4, §3.8). */
static void set_stream(struct engine *e, uint32_t n, uint32_t k, const float *ref, size_t ld_ref)
{
    e->backend->ops->rescale(e->backend, &(struct rescale_args){
                                             .n = n,
                                             .hidden = e->config->hidden,
                                             .n_streams = e->config->n_streams,
                                             .stream = k,
                                             .y = e->buf.t,
                                             .ref = ref,
                                             .ld_ref = ld_ref,
                                             .h = e->buf.h,
                                         });
}

/* §3.2 to §3.4: embedding, per-layer inputs, the other streams. */
static void begin(struct engine *e, uint32_t n)
{
    const struct model_config *c = e->config;
    const struct model_weights *w = e->weights;
    const struct backend_ops *ops = e->backend->ops;
    struct forward_buffers *b = &e->buf;
    struct activations x;
    size_t ple = (size_t)c->n_layers * c->ple_width;

    for (uint32_t i = 0; i < n; i++)
        b->ids[i] = b->rows[i].token < c->vocab_size_ple ? b->rows[i].token : 0;
    read_ahead_rows(&w->ple_embed, b->ids, n); /* read last, they have until then to arrive */

    for (uint32_t i = 0; i < n; i++)
        b->ids[i] = b->rows[i].token;
    ops->get_rows(e->backend, &w->embed, b->ids, n, sqrtf((float)c->hidden), b->x0, c->hidden);
    x = rows_of(b->x0, n, c->hidden);
    matmul(e, &w->ple_projection, &x, b->gate, ple);
    for (uint32_t k = 1; k < c->n_streams; k++) {
        matmul(e, &w->altup_projection[k - 1], &x, b->t, c->hidden);
        set_stream(e, n, k, b->x0, c->hidden);
    }

    for (uint32_t i = 0; i < n; i++)
        b->ids[i] = b->rows[i].token < c->vocab_size_ple ? b->rows[i].token : 0;
    ops->get_rows(e->backend, &w->ple_embed, b->ids, n, sqrtf((float)c->ple_width), b->ple, ple);
    ops->ple(e->backend, &(struct ple_args){
                             .n = n,
                             .n_layers = c->n_layers,
                             .width = c->ple_width,
                             .g = b->gate,
                             .e = b->ple,
                             .w = plain(&w->ple_projection_norm),
                             .g_scale = 1 / sqrtf((float)c->hidden),
                             .eps = c->rms_eps,
                             .ple = b->ple,
                         });
    backend_finish(e->backend); /* the rows below are copied by hand */
    for (uint32_t i = 0; i < n; i++)
        memcpy(b->h + (size_t)i * c->n_streams * c->hidden, b->x0 + (size_t)i * c->hidden,
               c->hidden * sizeof(float));
}

static void norm(struct engine *e, uint32_t n, const float *x, size_t ld_x, const struct weight *w,
                 float *y)
{
    e->backend->ops->norm(e->backend, &(struct norm_args){
                                          .n = n,
                                          .k = e->config->hidden,
                                          .x = x,
                                          .ld_x = ld_x,
                                          .w = plain(w),
                                          .eps = e->config->rms_eps,
                                          .scale = 1,
                                          .y = y,
                                          .ld_y = e->config->hidden,
                                      });
}

/* K and V of an owning layer (§3.6, 2). */
static void store_kv(struct engine *e, uint32_t l, uint32_t n, struct activations *x)
{
    const struct model_config *c = e->config;
    const struct layer_weights *w = &e->weights->layers[l];
    const struct backend_ops *ops = e->backend->ops;
    struct forward_buffers *b = &e->buf;
    size_t width = (size_t)c->n_heads_kv * c->head_dim;
    struct head_norm_args a = {
        .n = n,
        .n_heads = c->n_heads_kv,
        .head_dim = c->head_dim,
        .ld = width,
        .eps = c->rms_eps,
    };

    matmul_fine(e, &w->k, x, b->k, width);
    matmul(e, &w->v, x, b->v, width);
    a.x = b->v;
    ops->head_norm(e->backend, &a);
    a.x = b->k;
    a.w = plain(&w->k_norm);
    a.rope = b->rope[c->layers[l].sliding];
    ops->head_norm(e->backend, &a);
    ops->kv_store(e->backend, &(struct kv_store_args){
                                  .n = n,
                                  .shape = *kv_pool_shape(e->pool),
                                  .k = b->k,
                                  .v = b->v,
                                  .ld = width,
                                  .rows = b->kv_rows,
                              });
}

/* Where the rows of layer l look for K and V. */
static void find_kv(struct engine *e, uint32_t l, uint32_t n)
{
    uint32_t source = model_config_kv_source(e->config, l);

    for (uint32_t i = 0; i < n; i++)
        e->buf.kv_rows[i] = kv_cache_row(e->buf.rows[i].kv, source, e->buf.rows[i].pos);
}

/* (b), (c) and the K and V of (d); pred, xn are then there for all n rows. Returns xn, rounded
 * if K or V wanted that. */
static struct activations layer_begin(struct engine *e, uint32_t l, uint32_t n)
{
    const struct model_config *c = e->config;
    const struct layer_weights *w = &e->weights->layers[l];
    struct forward_buffers *b = &e->buf;
    struct activations x;

    e->backend->ops->altup_predict(e->backend, &(struct altup_predict_args){
                                                   .n = n,
                                                   .hidden = c->hidden,
                                                   .n_streams = c->n_streams,
                                                   .router = router_of(e, w),
                                                   .coefs = plain(&w->predict_coefs),
                                                   .h = b->h,
                                                   .pred = b->pred,
                                               });
    norm(e, n, b->pred, (size_t)c->n_streams * c->hidden, &w->input_norm, b->xn);
    find_kv(e, l, n);
    x = rows_of(b->xn, n, c->hidden);
    if (l < c->n_layers_kv)
        store_kv(e, l, n, &x);
    return x;
}

/* (f) without its norms: t = down . (gelu(cut(gate . x)) * (up . x)) */
static void feed_forward(struct engine *e, uint32_t l, struct activations *x)
{
    const struct layer_weights *w = &e->weights->layers[l];
    const struct layer_config *layer = &e->config->layers[l];
    const struct backend_ops *ops = e->backend->ops;
    struct forward_buffers *b = &e->buf;
    size_t ffn = layer->ffn_width;
    struct activations h = rows_of(b->gate, x->n, (uint32_t)ffn);

    matmul(e, &w->gate, x, b->gate, ffn);
    if (layer->sparsity_z > 0) { /* the model checks that up and down are laid out for it */
        round_for(e, &w->up, x, false);
        ops->sparse_ffn(e->backend, &(struct sparse_ffn_args){
                                        .x = x,
                                        .gate = b->gate,
                                        .ld_gate = ffn,
                                        .z = layer->sparsity_z,
                                        .up = &w->up,
                                        .down = &w->down,
                                        .work = b->up,
                                        .y = b->t,
                                        .ld_y = e->config->hidden,
                                    });
        return;
    }
    matmul(e, &w->up, x, b->up, ffn);
    ops->gate(e->backend, &(struct gate_args){
                              .n = x->n,
                              .k = (uint32_t)ffn,
                              .gate = b->gate,
                              .up = b->up,
                              .ld_gate = ffn,
                              .ld_up = ffn,
                              .y = b->gate,
                              .ld_y = ffn,
                          });
    matmul(e, &w->down, &h, b->t, e->config->hidden);
}

/* (c) to (h). */
static void layer_end(struct engine *e, uint32_t l, uint32_t n, struct activations *xn)
{
    const struct model_config *c = e->config;
    const struct layer_weights *w = &e->weights->layers[l];
    const struct backend_ops *ops = e->backend->ops;
    struct forward_buffers *b = &e->buf;
    size_t streams = (size_t)c->n_streams * c->hidden, heads = (size_t)c->n_heads * c->head_dim;
    struct activations x;
    struct norm_args a = {
        .n = n,
        .k = c->hidden,
        .x = b->t,
        .ld_x = c->hidden,
        .eps = c->rms_eps,
        .scale = 1,
        .ld_add = c->hidden,
        .ld_add2 = c->hidden,
        .ld_y = c->hidden,
    };

    /* (d) attention, while xn is still the live input */
    matmul_fine(e, &w->q, xn, b->q, heads);
    matmul(e, &w->laurel_left, xn, b->rank, c->laurel_rank);
    ops->head_norm(e->backend, &(struct head_norm_args){
                                   .n = n,
                                   .n_heads = c->n_heads,
                                   .head_dim = c->head_dim,
                                   .x = b->q,
                                   .ld = heads,
                                   .w = plain(&w->q_norm),
                                   .eps = c->rms_eps,
                                   .rope = b->rope[c->layers[l].sliding],
                               });
    ops->attention(e->backend, &(struct attention_args){
                                   .n = n,
                                   .n_heads = c->n_heads,
                                   .shape = *kv_pool_shape(e->pool),
                                   .window = c->layers[l].sliding ? c->window : 0,
                                   .q = b->q,
                                   .out = b->attn,
                                   .ld = heads,
                                   .rows = b->kv_rows,
                               });

    /* (c) LAuReL: xn + rms(right . left . xn) */
    x = rows_of(b->rank, n, c->laurel_rank);
    matmul(e, &w->laurel_right, &x, b->t, c->hidden);
    a.w = plain(&w->laurel_norm);
    a.add = b->xn;
    a.y = b->laurel;
    ops->norm(e->backend, &a);

    /* (e) s = (pred[0] + rms(o) + laurel) / sqrt(2) */
    x = rows_of(b->attn, n, (uint32_t)heads);
    matmul(e, &w->o, &x, b->t, c->hidden);
    a.w = plain(&w->post_attention_norm);
    a.add = b->pred;
    a.ld_add = streams;
    a.add2 = b->laurel;
    a.scale = (float)M_SQRT1_2;
    a.y = b->s;
    ops->norm(e->backend, &a);

    /* (f) MLP; b = s + rms(f) goes to x0 */
    norm(e, n, b->s, c->hidden, &w->pre_ffn_norm, b->xn);
    x = rows_of(b->xn, n, c->hidden);
    feed_forward(e, l, &x);
    a.w = plain(&w->post_ffn_norm);
    a.add = b->s;
    a.ld_add = c->hidden;
    a.add2 = NULL;
    a.scale = 1;
    a.y = b->x0;
    ops->norm(e->backend, &a);

    /* (g) correct */
    ops->altup_correct(e->backend, &(struct altup_correct_args){
                                       .n = n,
                                       .hidden = c->hidden,
                                       .n_streams = c->n_streams,
                                       .router = router_of(e, w),
                                       .coefs = plain(&w->correct_coefs),
                                       .pred = b->pred,
                                       .b = b->x0,
                                       .scale = plain(&w->correct_scale),
                                       .h = b->h,
                                       .scaled = b->s,
                                   });

    /* (h) per-layer input */
    x = rows_of(b->s, n, c->hidden);
    matmul(e, &w->ple_gate, &x, b->ple_gate, c->ple_width);
    ops->gate(e->backend, &(struct gate_args){
                              .n = n,
                              .k = c->ple_width,
                              .gate = b->ple_gate,
                              .up = b->ple + (size_t)l * c->ple_width,
                              .ld_gate = c->ple_width,
                              .ld_up = (size_t)c->n_layers * c->ple_width,
                              .y = b->ple_gate,
                              .ld_y = c->ple_width,
                          });
    x = rows_of(b->ple_gate, n, c->ple_width);
    matmul(e, &w->ple_proj, &x, b->t, c->hidden);
    ops->stream_norm(e->backend, &(struct stream_norm_args){
                                     .n = n,
                                     .hidden = c->hidden,
                                     .n_streams = c->n_streams,
                                     .x = b->t,
                                     .w = plain(&w->post_ple_norm),
                                     .eps = c->rms_eps,
                                     .h = b->h,
                                 });
}

static void move_row(float *x, size_t width, uint32_t to, uint32_t from)
{
    if (to != from)
        memcpy(x + to * width, x + from * width, width * sizeof(*x));
}

/* Keeps only wanted rows, in order, of everything layer_end() reads; returns how many. */
static uint32_t keep_wanted(struct engine *e, uint32_t n)
{
    const struct model_config *c = e->config;
    struct forward_buffers *b = &e->buf;
    uint32_t k = 0;

    backend_finish(e->backend);
    for (uint32_t i = 0; i < n; i++) {
        if (!b->rows[i].wanted)
            continue;
        move_row(b->pred, (size_t)c->n_streams * c->hidden, k, i);
        move_row(b->xn, c->hidden, k, i);
        move_row(b->ple, (size_t)c->n_layers * c->ple_width, k, i);
        move_row(b->rope[0], c->head_dim, k, i);
        move_row(b->rope[1], c->head_dim, k, i);
        b->kv_rows[k] = b->kv_rows[i];
        b->rows[k] = b->rows[i];
        k++;
    }
    return k;
}

static bool all_finite(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return false;
    return true;
}

/* §3.8 to §3.10. */
static void head(struct engine *e, uint32_t n)
{
    const struct model_config *c = e->config;
    const struct model_weights *w = e->weights;
    const struct backend_ops *ops = e->backend->ops;
    struct forward_buffers *b = &e->buf;
    size_t streams = (size_t)c->n_streams * c->hidden;
    struct weight rows = w->embed; /* rows that repeat <pad> are not computed (§3.9) */
    struct activations x;

    rows.n_out = c->vocab_size;
    for (uint32_t k = 1; k < c->n_streams; k++) {
        x = (struct activations){
            .n = n, .k = c->hidden, .f32 = b->h + (size_t)k * c->hidden, .ld = streams};
        matmul(e, &w->altup_unembed[k - 1], &x, b->t, c->hidden);
        set_stream(e, n, k, b->h, streams);
    }
    ops->merge(e->backend, &(struct merge_args){
                               .n = n,
                               .hidden = c->hidden,
                               .n_streams = c->n_streams,
                               .h = b->h,
                               .w = plain(&w->final_norm),
                               .eps = c->rms_eps,
                               .x = b->xn,
                           });
    x = rows_of(b->xn, n, c->hidden);
    matmul(e, &rows, &x, b->logits, c->vocab_size);
    if (c->softcap > 0)
        ops->softcap(e->backend, b->logits, (size_t)n * c->vocab_size, c->softcap);
    /* Rounding to int8 and softcap's exponential make numbers of what is none. */
    for (uint32_t i = 0; i < n; i++)
        if (!all_finite(b->xn + (size_t)i * c->hidden, c->hidden))
            for (uint32_t k = 0; k < c->vocab_size; k++)
                b->logits[(size_t)i * c->vocab_size + k] = NAN;
}

int forward(struct engine *e, uint32_t n)
{
    int r;

    assert(n >= 1 && n <= e->max_rows);
    fill_rope(e, n);
    begin(e, n);
    for (uint32_t l = 0; l < e->config->n_layers; l++) {
        struct activations xn = layer_begin(e, l, n);

        if (l == e->config->n_layers_kv - 1) {
            n = keep_wanted(e, n);
            xn = rows_of(e->buf.xn, n, e->config->hidden); /* other rows: to be rounded anew */
        }
        if (n == 0)
            break;
        layer_end(e, l, n, &xn);
    }
    if (n > 0) {
        assert(n <= e->max_logits);
        head(e, n);
    }
    r = backend_finish(e->backend);
    if (r == 0 && !model_file_is_intact(model_get_file(e->model)))
        r = -ENOTRECOVERABLE;
    return r;
}
