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

static void lay_out(struct lane *l, struct arena *a)
{
    const struct engine *e = l->engine;
    const struct model_config *c = e->config;
    struct forward_buffers *b = &l->buf;
    size_t n = l->max_rows, streams = (size_t)c->n_streams * c->hidden;
    size_t heads = (size_t)c->n_heads * c->head_dim, heads_kv = (size_t)c->n_heads_kv * c->head_dim;
    size_t ple = (size_t)c->n_layers * c->ple_width, ffn = 0, blocks = e->widest / WEIGHT_BLOCK;
    size_t hidden = ALIGN_UP((size_t)c->hidden, (size_t)64), n_rounded = n;

    for (uint32_t i = 0; i < c->n_layers; i++)
        ffn = MAX(ffn, sparse_ffn_work_bytes(1, c->layers[i].ffn_width) / sizeof(float));
    if (l->activations != ACTIVATIONS_INT8)
        n_rounded = 0;

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
    b->act_q = take(a, n_rounded, e->widest, 1);
    b->act_d = take(a, n_rounded, blocks, sizeof(float));
    b->act_sum = take(a, n_rounded, blocks, sizeof(int32_t));
    b->act_low = take(a, n_rounded, hidden, 1);
    b->act_sum_low = take(a, n_rounded, hidden / WEIGHT_BLOCK, sizeof(int32_t));
    b->logits = take(a, e->max_logits, c->vocab_size, sizeof(float));
    b->ids = take(a, n, 1, sizeof(*b->ids));
    b->ids_ple = take(a, n, 1, sizeof(*b->ids_ple));
    b->wanted = take(a, e->max_logits, 1, sizeof(*b->wanted));
    b->ple_wanted = take(a, e->max_logits, ple, sizeof(float));
    b->rope_wanted[0] = take(a, e->max_logits, c->head_dim, sizeof(float));
    b->rope_wanted[1] = take(a, e->max_logits, c->head_dim, sizeof(float));
}

static void *array(size_t n, size_t n2, size_t size)
{
    size_t total;

    return ckd_mul(&total, n, n2) ? NULL : calloc(MAX(total, (size_t)1), size);
}

int forward_init(struct lane *l)
{
    const struct engine *e = l->engine;
    struct forward_buffers *b = &l->buf;
    struct arena a = {0};

    lay_out(l, &a);
    if (a.overflow)
        return -EOVERFLOW;
    l->scratch_bytes = a.used;
    l->scratch = backend_alloc(l->backend, a.used);
    if (!l->scratch)
        return -ENOMEM;
    a = (struct arena){.base = l->scratch};
    lay_out(l, &a);
    b->rows = array(l->max_rows, 1, sizeof(*b->rows));
    b->kv_rows = array(e->config->n_layers_kv, l->max_rows, sizeof(*b->kv_rows));
    b->kv_rows_wanted = array(e->config->n_layers_kv, e->max_logits, sizeof(*b->kv_rows_wanted));
    return b->rows && b->kv_rows && b->kv_rows_wanted ? 0 : -ENOMEM;
}

void forward_done(struct lane *l)
{
    backend_release(l->backend, l->scratch, l->scratch_bytes);
    free(l->buf.rows);
    free(l->buf.kv_rows);
    free(l->buf.kv_rows_wanted);
}

/*
 * A pass while it is issued: its rows, which from keep_wanted() on are the wanted ones, and where
 * what belongs to them lies. All of it follows from how many rows there are and how many of them
 * are wanted, which is the pass's key.
 */
struct pass {
    struct lane *lane;
    const struct model_config *config;
    struct backend *backend;
    const struct backend_ops *ops;
    uint32_t n;
    float *h, *pred, *x0, *xn, *ple, *rope[2];
    const struct kv_row *kv_rows; /* [n_layers_kv][ld_kv] */
    size_t ld_kv;
};

/* Rows about to meet matrices. One at a time is live: the rounded copy has one buffer. */
static struct activations rows_of(float *x, uint32_t n, uint32_t k)
{
    return (struct activations){.n = n, .k = k, .f32 = x, .ld = k};
}

/* Fills x's rounded copy if w wants one and it is not there, with the second plane if fine. */
static void round_for(struct pass *p, const struct weight *w, struct activations *x, bool fine)
{
    if (p->lane->activations != ACTIVATIONS_INT8 || !weight_type_is_quantized(w->type) ||
        (fine ? x->q_low != NULL : x->q != NULL))
        return;
    assert(!fine || x->k <= p->config->hidden);
    x->q = p->lane->buf.act_q;
    x->d = p->lane->buf.act_d;
    x->sum = p->lane->buf.act_sum;
    x->ld_q = ALIGN_UP((size_t)x->k, (size_t)64);
    x->q_low = fine ? p->lane->buf.act_low : NULL;
    x->sum_low = fine ? p->lane->buf.act_sum_low : NULL;
    p->ops->quantize(p->backend, x);
}

/*
 * y = w x with 16 bits of x, or all of it: for Q and K. Attention scores have scale 1, so what is
 * rounded off there reaches the softmax undamped: a third of the whole mode's divergence came from
 * these two, which are 4 % of a layer (docs/performance.md).
 */
static void matmul_fine(struct pass *p, const struct weight *w, struct activations *x, float *y,
                        size_t ld_y)
{
    round_for(p, w, x, true);
    p->ops->matmul(p->backend, w, x, y, ld_y);
}

/* y = w x. Rounds x once, at the first matrix that wants it rounded. */
static void matmul(struct pass *p, const struct weight *w, struct activations *x, float *y,
                   size_t ld_y)
{
    struct activations coarse;

    round_for(p, w, x, false);
    coarse = *x;
    coarse.q_low = NULL;
    p->ops->matmul(p->backend, w, &coarse, y, ld_y);
}

static const float *plain(const struct weight *w)
{
    return w->data;
}

static struct router_weights router_of(const struct pass *p, const struct layer_weights *w)
{
    return (struct router_weights){plain(&w->router_norm), plain(&w->router), p->config->rms_eps};
}

/* Stream k := t, brought to the magnitude of ref's rows (§3.4, §3.8). */
static void set_stream(struct pass *p, uint32_t k, const float *ref, size_t ld_ref)
{
    p->ops->rescale(p->backend, &(struct rescale_args){
                                    .n = p->n,
                                    .hidden = p->config->hidden,
                                    .n_streams = p->config->n_streams,
                                    .stream = k,
                                    .y = p->lane->buf.t,
                                    .ref = ref,
                                    .ld_ref = ld_ref,
                                    .h = p->h,
                                });
}

/* The rows of the table of per-layer embeddings. */
static void get_ple_rows(struct lane *l, struct backend *b, uint32_t n)
{
    const struct engine *e = l->engine;
    const struct model_config *c = e->config;

    b->ops->get_rows(b, &e->weights->ple_embed, l->buf.ids_ple, n, sqrtf((float)c->ple_width),
                     l->buf.ple, (size_t)c->n_layers * c->ple_width);
}

/* §3.2 to §3.4: embedding, per-layer inputs, the other streams. */
static void begin(struct pass *p)
{
    const struct model_config *c = p->config;
    const struct model_weights *w = p->lane->engine->weights;
    struct forward_buffers *b = &p->lane->buf;
    struct activations x;
    size_t ple = (size_t)c->n_layers * c->ple_width;

    p->ops->get_rows(p->backend, &w->embed, b->ids, p->n, sqrtf((float)c->hidden), p->x0,
                     c->hidden);
    x = rows_of(p->x0, p->n, c->hidden);
    matmul(p, &w->ple_projection, &x, b->gate, ple);
    for (uint32_t k = 1; k < c->n_streams; k++) {
        matmul(p, &w->altup_projection[k - 1], &x, b->t, c->hidden);
        set_stream(p, k, p->x0, c->hidden);
    }

    if (!p->lane->maps)
        get_ple_rows(p->lane, p->backend, p->n); /* last, so that they had time to arrive */
    p->ops->ple(p->backend, &(struct ple_args){
                                .n = p->n,
                                .n_layers = c->n_layers,
                                .width = c->ple_width,
                                .g = b->gate,
                                .e = p->ple,
                                .w = plain(&w->ple_projection_norm),
                                .g_scale = 1 / sqrtf((float)c->hidden),
                                .eps = c->rms_eps,
                                .ple = p->ple,
                            });
    p->ops->copy_rows(p->backend, &(struct copy_rows_args){
                                      .n = p->n,
                                      .k = c->hidden,
                                      .x = p->x0,
                                      .ld_x = c->hidden,
                                      .y = p->h,
                                      .ld_y = (size_t)c->n_streams * c->hidden,
                                  });
}

static void norm(struct pass *p, const float *x, size_t ld_x, const struct weight *w, float *y)
{
    p->ops->norm(p->backend, &(struct norm_args){
                                 .n = p->n,
                                 .k = p->config->hidden,
                                 .x = x,
                                 .ld_x = ld_x,
                                 .w = plain(w),
                                 .eps = p->config->rms_eps,
                                 .scale = 1,
                                 .y = y,
                                 .ld_y = p->config->hidden,
                             });
}

/* Where the rows of layer l look for K and V. */
static const struct kv_row *kv_rows(const struct pass *p, uint32_t l)
{
    return p->kv_rows + model_config_kv_source(p->config, l) * p->ld_kv;
}

/* K and V of an owning layer (§3.6, 2). */
static void store_kv(struct pass *p, uint32_t l, struct activations *x)
{
    const struct model_config *c = p->config;
    const struct layer_weights *w = &p->lane->engine->weights->layers[l];
    struct forward_buffers *b = &p->lane->buf;
    size_t width = (size_t)c->n_heads_kv * c->head_dim;
    struct head_norm_args a = {
        .n = p->n,
        .n_heads = c->n_heads_kv,
        .head_dim = c->head_dim,
        .ld = width,
        .eps = c->rms_eps,
    };

    matmul_fine(p, &w->k, x, b->k, width);
    matmul(p, &w->v, x, b->v, width);
    a.x = b->v;
    p->ops->head_norm(p->backend, &a);
    a.x = b->k;
    a.w = plain(&w->k_norm);
    a.rope = p->rope[c->layers[l].sliding];
    p->ops->head_norm(p->backend, &a);
    p->ops->kv_store(p->backend, &(struct kv_store_args){
                                     .n = p->n,
                                     .shape = *kv_pool_shape(p->lane->engine->pool),
                                     .k = b->k,
                                     .v = b->v,
                                     .ld = width,
                                     .rows = kv_rows(p, l),
                                 });
}

/* (b), (c) and the K and V of (d); pred, xn are then there for all n rows. Returns xn, rounded
 * if K or V wanted that. */
static struct activations layer_begin(struct pass *p, uint32_t l)
{
    const struct model_config *c = p->config;
    const struct layer_weights *w = &p->lane->engine->weights->layers[l];
    struct activations x;

    p->ops->altup_predict(p->backend, &(struct altup_predict_args){
                                          .n = p->n,
                                          .hidden = c->hidden,
                                          .n_streams = c->n_streams,
                                          .router = router_of(p, w),
                                          .coefs = plain(&w->predict_coefs),
                                          .h = p->h,
                                          .pred = p->pred,
                                      });
    norm(p, p->pred, (size_t)c->n_streams * c->hidden, &w->input_norm, p->xn);
    x = rows_of(p->xn, p->n, c->hidden);
    if (l < c->n_layers_kv)
        store_kv(p, l, &x);
    return x;
}

/* (f) without its norms: t = down . (gelu(cut(gate . x)) * (up . x)) */
static void feed_forward(struct pass *p, uint32_t l, struct activations *x)
{
    const struct layer_weights *w = &p->lane->engine->weights->layers[l];
    const struct layer_config *layer = &p->config->layers[l];
    struct forward_buffers *b = &p->lane->buf;
    size_t ffn = layer->ffn_width;
    struct activations h = rows_of(b->gate, x->n, (uint32_t)ffn);

    matmul(p, &w->gate, x, b->gate, ffn);
    if (layer->sparsity_z > 0) { /* the model checks that up and down are laid out for it */
        round_for(p, &w->up, x, false);
        p->ops->sparse_ffn(p->backend, &(struct sparse_ffn_args){
                                           .x = x,
                                           .gate = b->gate,
                                           .ld_gate = ffn,
                                           .z = layer->sparsity_z,
                                           .up = &w->up,
                                           .down = &w->down,
                                           .work = b->up,
                                           .y = b->t,
                                           .ld_y = p->config->hidden,
                                       });
        return;
    }
    matmul(p, &w->up, x, b->up, ffn);
    p->ops->gate(p->backend, &(struct gate_args){
                                 .n = x->n,
                                 .k = (uint32_t)ffn,
                                 .gate = b->gate,
                                 .up = b->up,
                                 .ld_gate = ffn,
                                 .ld_up = ffn,
                                 .y = b->gate,
                                 .ld_y = ffn,
                             });
    matmul(p, &w->down, &h, b->t, p->config->hidden);
}

/* (c) to (h). */
static void layer_end(struct pass *p, uint32_t l, struct activations *xn)
{
    const struct model_config *c = p->config;
    const struct layer_weights *w = &p->lane->engine->weights->layers[l];
    struct forward_buffers *b = &p->lane->buf;
    size_t streams = (size_t)c->n_streams * c->hidden, heads = (size_t)c->n_heads * c->head_dim;
    struct activations x;
    struct norm_args a = {
        .n = p->n,
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
    matmul_fine(p, &w->q, xn, b->q, heads);
    matmul(p, &w->laurel_left, xn, b->rank, c->laurel_rank);
    p->ops->head_norm(p->backend, &(struct head_norm_args){
                                      .n = p->n,
                                      .n_heads = c->n_heads,
                                      .head_dim = c->head_dim,
                                      .x = b->q,
                                      .ld = heads,
                                      .w = plain(&w->q_norm),
                                      .eps = c->rms_eps,
                                      .rope = p->rope[c->layers[l].sliding],
                                  });
    p->ops->attention(p->backend, &(struct attention_args){
                                      .n = p->n,
                                      .n_heads = c->n_heads,
                                      .shape = *kv_pool_shape(p->lane->engine->pool),
                                      .window = c->layers[l].sliding ? c->window : 0,
                                      .q = b->q,
                                      .out = b->attn,
                                      .ld = heads,
                                      .rows = kv_rows(p, l),
                                  });

    /* (c) LAuReL: xn + rms(right . left . xn) */
    x = rows_of(b->rank, p->n, c->laurel_rank);
    matmul(p, &w->laurel_right, &x, b->t, c->hidden);
    a.w = plain(&w->laurel_norm);
    a.add = p->xn;
    a.y = b->laurel;
    p->ops->norm(p->backend, &a);

    /* (e) s = (pred[0] + rms(o) + laurel) / sqrt(2) */
    x = rows_of(b->attn, p->n, (uint32_t)heads);
    matmul(p, &w->o, &x, b->t, c->hidden);
    a.w = plain(&w->post_attention_norm);
    a.add = p->pred;
    a.ld_add = streams;
    a.add2 = b->laurel;
    a.scale = (float)M_SQRT1_2;
    a.y = b->s;
    p->ops->norm(p->backend, &a);

    /* (f) MLP; b = s + rms(f) goes to x0 */
    norm(p, b->s, c->hidden, &w->pre_ffn_norm, p->xn);
    x = rows_of(p->xn, p->n, c->hidden);
    feed_forward(p, l, &x);
    a.w = plain(&w->post_ffn_norm);
    a.add = b->s;
    a.ld_add = c->hidden;
    a.add2 = NULL;
    a.scale = 1;
    a.y = p->x0;
    p->ops->norm(p->backend, &a);

    /* (g) correct */
    p->ops->altup_correct(p->backend, &(struct altup_correct_args){
                                          .n = p->n,
                                          .hidden = c->hidden,
                                          .n_streams = c->n_streams,
                                          .router = router_of(p, w),
                                          .coefs = plain(&w->correct_coefs),
                                          .pred = p->pred,
                                          .b = p->x0,
                                          .scale = plain(&w->correct_scale),
                                          .h = p->h,
                                          .scaled = b->s,
                                      });

    /* (h) per-layer input */
    x = rows_of(b->s, p->n, c->hidden);
    matmul(p, &w->ple_gate, &x, b->ple_gate, c->ple_width);
    p->ops->gate(p->backend, &(struct gate_args){
                                 .n = p->n,
                                 .k = c->ple_width,
                                 .gate = b->ple_gate,
                                 .up = p->ple + (size_t)l * c->ple_width,
                                 .ld_gate = c->ple_width,
                                 .ld_up = (size_t)c->n_layers * c->ple_width,
                                 .y = b->ple_gate,
                                 .ld_y = c->ple_width,
                             });
    x = rows_of(b->ple_gate, p->n, c->ple_width);
    matmul(p, &w->ple_proj, &x, b->t, c->hidden);
    p->ops->stream_norm(p->backend, &(struct stream_norm_args){
                                        .n = p->n,
                                        .hidden = c->hidden,
                                        .n_streams = c->n_streams,
                                        .x = b->t,
                                        .w = plain(&w->post_ple_norm),
                                        .eps = c->rms_eps,
                                        .h = p->h,
                                    });
}

static void copy_wanted(struct pass *p, const float *x, size_t width, float *y)
{
    p->ops->copy_rows(p->backend, &(struct copy_rows_args){
                                      .n = p->n,
                                      .k = (uint32_t)width,
                                      .x = x,
                                      .ld_x = width,
                                      .ids = p->lane->buf.wanted,
                                      .y = y,
                                      .ld_y = width,
                                  });
}

/* Keeps only wanted rows, in order, of everything layer_end() reads. */
static void keep_wanted(struct pass *p, uint32_t n_wanted)
{
    const struct model_config *c = p->config;
    struct forward_buffers *b = &p->lane->buf;
    size_t streams = (size_t)c->n_streams * c->hidden, ple = (size_t)c->n_layers * c->ple_width;
    float *h = p->h, *x0 = p->x0;

    if (n_wanted == p->n)
        return;
    p->n = n_wanted;
    if (n_wanted == 0)
        return;
    /* h and x0 are free here: each is the other one's place from now on */
    copy_wanted(p, p->pred, streams, h);
    copy_wanted(p, p->xn, c->hidden, x0);
    copy_wanted(p, p->ple, ple, b->ple_wanted);
    p->h = p->pred;
    p->pred = h;
    p->x0 = p->xn;
    p->xn = x0;
    p->ple = b->ple_wanted;
    for (int i = 0; i < 2; i++) {
        copy_wanted(p, p->rope[i], c->head_dim, b->rope_wanted[i]);
        p->rope[i] = b->rope_wanted[i];
    }
    p->kv_rows = b->kv_rows_wanted;
    p->ld_kv = p->lane->engine->max_logits;
}

/* §3.8 to §3.10. */
static void head(struct pass *p)
{
    const struct model_config *c = p->config;
    const struct model_weights *w = p->lane->engine->weights;
    struct forward_buffers *b = &p->lane->buf;
    size_t streams = (size_t)c->n_streams * c->hidden;
    struct weight rows = w->embed; /* rows that repeat <pad> are not computed (§3.9) */
    struct activations x;

    rows.n_out = c->vocab_size;
    for (uint32_t k = 1; k < c->n_streams; k++) {
        x = (struct activations){
            .n = p->n, .k = c->hidden, .f32 = p->h + (size_t)k * c->hidden, .ld = streams};
        matmul(p, &w->altup_unembed[k - 1], &x, b->t, c->hidden);
        set_stream(p, k, p->h, streams);
    }
    p->ops->merge(p->backend, &(struct merge_args){
                                  .n = p->n,
                                  .hidden = c->hidden,
                                  .n_streams = c->n_streams,
                                  .h = p->h,
                                  .w = plain(&w->final_norm),
                                  .eps = c->rms_eps,
                                  .x = b->s,
                              });
    x = rows_of(b->s, p->n, c->hidden);
    matmul(p, &rows, &x, b->logits, c->vocab_size);
    if (c->softcap > 0)
        p->ops->softcap(p->backend, b->logits, (size_t)p->n * c->vocab_size, c->softcap);
}

static void issue(struct lane *l, uint32_t n, uint32_t n_wanted)
{
    const struct model_config *c = l->engine->config;
    struct forward_buffers *b = &l->buf;
    struct pass p = {
        .lane = l,
        .config = c,
        .backend = l->backend,
        .ops = l->backend->ops,
        .n = n,
        .h = b->h,
        .pred = b->pred,
        .x0 = b->x0,
        .xn = b->xn,
        .ple = b->ple,
        .rope = {b->rope[0], b->rope[1]},
        .kv_rows = b->kv_rows,
        .ld_kv = l->max_rows,
    };

    begin(&p);
    for (uint32_t i = 0; i < c->n_layers; i++) {
        struct activations xn = layer_begin(&p, i);

        if (i == c->n_layers_kv - 1) {
            keep_wanted(&p, n_wanted);
            xn = rows_of(p.xn, p.n, c->hidden); /* other rows: to be rounded anew */
        }
        if (p.n == 0)
            return;
        layer_end(&p, i, &xn);
    }
    head(&p);
}

/* cos and sin of every row's position, both bases; angles in double (§3.6). */
static void fill_rope(struct lane *l, uint32_t n)
{
    const struct engine *e = l->engine;
    uint32_t half = e->config->head_dim / 2;

    for (uint32_t i = 0; i < n; i++)
        for (int kind = 0; kind < 2; kind++) {
            float *out = l->buf.rope[kind] + (size_t)i * 2 * half;

            for (uint32_t k = 0; k < half; k++) {
                double angle = l->buf.rows[i].pos * e->inv_freq[kind][k];

                out[k] = (float)cos(angle);
                out[half + k] = (float)sin(angle);
            }
        }
}

/* All that a pass reads and that differs from one to the next. Returns how many rows are wanted. */
static uint32_t fill(struct lane *l, uint32_t n)
{
    const struct engine *e = l->engine;
    const struct model_config *c = e->config;
    struct forward_buffers *b = &l->buf;
    uint32_t n_wanted = 0;

    fill_rope(l, n);
    for (uint32_t i = 0; i < n; i++) {
        const struct forward_row *row = &b->rows[i];

        b->ids[i] = row->token;
        b->ids_ple[i] = row->token < c->vocab_size_ple ? row->token : 0;
        for (uint32_t k = 0; k < c->n_layers_kv; k++)
            b->kv_rows[(size_t)k * l->max_rows + i] = kv_cache_row(row->kv, k, row->pos);
        if (!row->wanted)
            continue;
        assert(n_wanted < e->max_logits);
        for (uint32_t k = 0; k < c->n_layers_kv; k++)
            b->kv_rows_wanted[(size_t)k * e->max_logits + n_wanted] =
                b->kv_rows[(size_t)k * l->max_rows + i];
        b->wanted[n_wanted++] = i;
    }
    read_ahead_rows(&e->weights->ple_embed, b->ids_ple, n);
    return n_wanted;
}

int forward_start(struct lane *l, uint32_t n)
{
    uint32_t n_wanted;

    assert(n >= 1 && n <= l->max_rows);
    if (l->maps) {
        struct backend *processor = l->engine->lanes[LANE_CPU]->backend;
        int r = lane_map_pages(l);

        if (r < 0)
            return r;
        n_wanted = fill(l, n);
        get_ple_rows(l, processor, n);
        backend_finish(processor);
    } else {
        n_wanted = fill(l, n);
    }
    l->n_wanted = n_wanted;
    if (backend_begin(l->backend, n | (uint64_t)n_wanted << 32)) {
        issue(l, n, n_wanted);
        backend_end(l->backend);
    }
    return backend_submit(l->backend);
}

static bool all_finite(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return false;
    return true;
}

/* Rounding to int8 and softcap's exponential make numbers of what is none. */
static void spoil_logits(struct lane *l)
{
    const struct model_config *c = l->engine->config;

    for (uint32_t i = 0; i < l->n_wanted; i++)
        if (!all_finite(l->buf.s + (size_t)i * c->hidden, c->hidden))
            for (uint32_t k = 0; k < c->vocab_size; k++)
                l->buf.logits[(size_t)i * c->vocab_size + k] = NAN;
}

int forward_finish(struct lane *l)
{
    int r = backend_finish(l->backend);

    if (r < 0)
        return r;
    spoil_logits(l);
    return model_file_is_intact(model_get_file(l->engine->model)) ? 0 : -ENOTRECOVERABLE;
}

int forward(struct lane *l, uint32_t n)
{
    int r = forward_start(l, n);

    return r < 0 ? r : forward_finish(l);
}
