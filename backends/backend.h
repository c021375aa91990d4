/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * backend: what executes operations on rows of activations. It knows no model and no session.
 *
 * Every operation works on n rows, one per token of the step; rows may belong to different
 * sessions. What a row gives does not depend on which other rows are there, nor on n, nor on the
 * number of threads: sums run in an order fixed by the row alone. That is what makes a seeded
 * request reproducible, so it is part of each operation's contract and tested.
 *
 * Memory: everything that an operation is given the address of is addressed by host pointers, also
 * where a device computes. Activations, and the numbers of rows (ids), come from backend_alloc();
 * weights and KV pages lie in memory that backend_map() was told of. So a backend with a device can
 * find what lies behind an address. Structures of arguments are read during the call, but for the
 * arrays of struct kv_row: those, and the page tables that they point to, belong to the caller and
 * stay until the pass is submitted. All other arrays are the caller's and stay, untouched, until
 * backend_finish() or backend_wait() has said that all is done. `ld` is the distance between two
 * rows, in elements. Outputs never overlap inputs unless said.
 *
 * Thread: one, the engine thread. Operations may be executed asynchronously, in order, from
 * backend_submit() on; what they give is there after backend_finish(). Nothing is allocated by an
 * operation but while a pass is recorded.
 *
 * Passes: a device is not told every operation anew. What is issued between backend_begin(key),
 * where that returned true, and backend_end() is one pass, which may be kept; the next
 * backend_begin(key) may issue it again as a whole and return false: then the caller issues
 * nothing. Of a key all arguments are the same each time, values and addresses, and only what is
 * found there differs: activations, ids, struct kv_row and page tables. Outside of passes an
 * operation is one of its own.
 *
 * Numbers: inputs are finite, except that hostile model files may bring any bit pattern as weight
 * or scale: the results are then arbitrary, but nothing is read or written out of bounds. Error
 * bounds are given as |got - exact| <= bound, exact being the same formula in real arithmetic;
 * eps = 2^-24. A device may take floats below 2^-126 for zero (not halves: all of those count).
 *
 * The reference (cpu/reference.c) is the definition: plain loops, sums in double. Every other
 * implementation is tested against it, operation by operation, at odd sizes.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backends/weight.h"
#include "base/error.h"

struct backend;

#define BACKEND_MAX_STREAMS 8
#define BACKEND_MAX_HEAD_DIM 1024

/*
 * Rows that are about to meet weights. f32 is the caller's; the rounded copy is filled by
 * quantize() and used by matmul() for q4 and q8 weights when it is there: with its second plane
 * for fine activations of 16 bits, without for coarse ones of 8. Who has both chooses for each
 * product: a copy of this struct with q_low NULL is the coarse one. A device needs q and q_low at
 * multiples of 4 bytes, as it reads words.
 */
struct activations {
    uint32_t n, k; /* rows, values in a row */
    float *f32;    /* [n][ld] */
    size_t ld;
    int8_t *q;        /* [n][ld_q], NULL: f32 mode. Block b of a row: q in -127..127, */
    float *d;         /* [n][ld_q / 32]: x ~ d * q, d = max |x| / 127 over the block, */
    int32_t *sum;     /* [n][ld_q / 32]: sum of the block's q */
    size_t ld_q;      /* at least k, a multiple of 64; values from k on are zero */
    int8_t *q_low;    /* [n][ld_q] or NULL: in -127..127, x ~ d / 254 * (254 q + q_low) */
    int32_t *sum_low; /* likewise: sum of the block's q_low */
};

/* A KV page: K and V of KV_PAGE consecutive positions of one layer, n_heads_kv = the model's.
 *   K [n_heads_kv][head_dim][KV_PAGE], V [n_heads_kv][KV_PAGE][head_dim], f16 or f32
 * K is transposed so that a vector holds the same dimension of consecutive positions. */
#define KV_PAGE 64

/* Where the K and V of one row's sequence are in one layer: position p in pages[p / KV_PAGE]. */
struct kv_row {
    void *const *pages; /* entries that the row does not see may be NULL */
    uint32_t pos;       /* of the row itself */
};

struct kv_shape {
    uint32_t n_heads_kv, head_dim;
    bool f16; /* else f32 */
};

static inline size_t kv_page_bytes(const struct kv_shape *s)
{
    return (size_t)2 * KV_PAGE * s->n_heads_kv * s->head_dim * (s->f16 ? 2 : 4);
}

struct norm_args {
    uint32_t n, k;
    const float *x;
    size_t ld_x;
    const float *w; /* [k] or NULL: no weight */
    float eps;
    const float *add, *add2; /* [n] rows or NULL */
    size_t ld_add, ld_add2;
    float scale;
    float *y; /* may be x or one of the added */
    size_t ld_y;
};

struct head_norm_args {
    uint32_t n, n_heads, head_dim;
    float *x; /* [n][n_heads * head_dim], in place */
    size_t ld;
    const float *w; /* [head_dim] or NULL */
    float eps;
    const float *rope; /* [n][head_dim]: cos of the head_dim / 2 angles, then their sin; or NULL */
};

struct kv_store_args {
    uint32_t n;
    struct kv_shape shape;
    const float *k, *v; /* [n][n_heads_kv * head_dim] */
    size_t ld;
    const struct kv_row *rows; /* [n]; the page of pos exists and is this sequence's alone */
};

struct attention_args {
    uint32_t n, n_heads;
    struct kv_shape shape;
    uint32_t window;           /* positions seen, the row's own included; 0: all */
    const float *q;            /* [n][n_heads * head_dim] */
    float *out;                /* likewise */
    size_t ld;                 /* of both */
    const struct kv_row *rows; /* [n] */
};

struct gate_args {
    uint32_t n, k;
    const float *gate, *up; /* [n][k] */
    size_t ld_gate, ld_up;
    float z;  /* > 0: gate := max(gate - (mean + z * deviation), 0) over the row first (§3.7) */
    float *y; /* may be gate or up */
    size_t ld_y;
};

/*
 * The feed-forward of a layer whose gate is cut (§3.7), from the raw gate on: y = down . h with
 * h_j = gelu(g_j) (up . x)_j, g_j = max(gate_j - (mean + z * deviation), 0). Neurons with g_j = 0
 * are left out altogether: their weights are not read, so that what stands there (an infinity in a
 * hostile file) does not matter to a row that lacks them.
 */
struct sparse_ffn_args {
    const struct activations *x; /* n rows, used as by matmul(); coarse or f32 */
    float *gate;                 /* [n][up->n_out], destroyed */
    size_t ld_gate;
    float z;                        /* > 0 */
    const struct weight *up, *down; /* LAYOUT_ROWS, LAYOUT_COLS */
    void *work;                     /* sparse_ffn_work_bytes(), aligned to 64 */
    float *y;                       /* [n][down->n_out] */
    size_t ld_y;
    uint64_t *ret_neurons; /* NULL, or whose weights were read, of several rows counted once; for
                              measurements: a device leaves it alone */
};

static inline size_t sparse_ffn_work_bytes(uint32_t n, uint32_t ffn)
{
    return (size_t)n * (((size_t)ffn + 63) / 64 * 64 + 64) * 4;
}

/* The router of a layer: tanh(router . (rms(x; norm, eps) / hidden)), [n_streams]. */
struct router_weights {
    const float *norm;   /* [hidden] */
    const float *router; /* [n_streams][hidden] */
    float eps;
};

/* Streams are [n][n_streams][hidden], without gaps. */
struct altup_predict_args {
    uint32_t n, hidden, n_streams;
    struct router_weights router;
    const float *coefs; /* [n_streams^2][n_streams] */
    const float *h;
    float *pred;
};

struct altup_correct_args {
    uint32_t n, hidden, n_streams;
    struct router_weights router;
    const float *coefs; /* [n_streams][n_streams] */
    const float *pred;
    const float *b;     /* [n][hidden]: what attention and MLP made of pred's stream 0 */
    const float *scale; /* correct_output_scale [hidden] */
    float *h;           /* corrected streams; may be pred */
    float *scaled;      /* [n][hidden]: corrected stream 0 times scale, for the PLE gate */
};

struct stream_norm_args { /* streams 1.. += rms(x; w, eps) */
    uint32_t n, hidden, n_streams;
    const float *x; /* [n][hidden] */
    const float *w;
    float eps;
    float *h;
};

struct rescale_args { /* stream[i] of h := y * rms(ref) / sqrt(max(mean(y^2), 1e-5)) (§3.4) */
    uint32_t n, hidden, n_streams, stream;
    const float *y;   /* [n][hidden] */
    const float *ref; /* [n][ld_ref], rows of hidden */
    size_t ld_ref;
    float *h;
};

struct copy_rows_args { /* y[i] = x[ids[i]] */
    uint32_t n, k;
    const float *x;
    size_t ld_x;
    const uint32_t *ids; /* [n], NULL: i */
    float *y;
    size_t ld_y;
};

struct merge_args { /* x = rms(mean over streams; w, eps) (§3.8) */
    uint32_t n, hidden, n_streams;
    const float *h;
    const float *w;
    float eps;
    float *x; /* [n][hidden] */
};

struct ple_args { /* ple = (rms(g * g_scale; w, eps) + e) * 2^-1/2, per layer (§3.3) */
    uint32_t n, n_layers, width;
    const float *g; /* [n][n_layers * width], projection, unscaled */
    const float *e; /* likewise, table rows, scaled; may be ple */
    const float *w; /* [width] */
    float g_scale, eps;
    float *ple;
};

/* One per instruction set or device; every pointer is filled. */
struct backend_ops {
    const char *name; /* "reference", "avx2", ... */

    /*
     * Fills q, d, sum of x from f32. d is max |x| / 127 rounded to float, but 0 where that is below
     * 2^-126: there q is 0 as well. Otherwise q is x / d, rounded to float and then to the nearest
     * even integer, so |x - d q| <= d (1/2 + 64 eps): near 63.5 to 126.5 the quotient's own
     * rounding, half of 2^-17, may take it to a tie and the tie to the farther side.
     *
     * With q_low, that and sum_low are filled as well: 254 times what rounding the quotient left,
     * rounded to float and then to the nearest even integer, so
     * |x - d / 254 (254 q + q_low)| <= d (1/508 + 65 eps). q, d and sum do not depend on it. All
     * CPU levels give the same bits.
     */
    void (*quantize)(struct backend *b, const struct activations *x);

    /*
     * y[n][w->n_out] = W x. Bounds, with S = sum over k of |w x|:
     *   f32 activations, any weight:   n_in * eps * S   (and far better when summed in blocks)
     *   coarse, q4 and q8 weights:     the same about the rounded activations, with the block
     *                                  sums of integers exact
     *   fine, q4 and q8 weights:       the same about x, and what quantize() may have lost: sum
     *                                  over k of |w| d (1/508 + 65 eps). Where a level has no
     *                                  kernel for the two planes it takes f32, for any n alike.
     */
    void (*matmul)(struct backend *b, const struct weight *w, const struct activations *x, float *y,
                   size_t ld_y);

    /* y[i] = row ids[i] of w times scale; ids below n_out. tile16 or rows. Exact up to one eps. */
    void (*get_rows)(struct backend *b, const struct weight *w, const uint32_t *ids, uint32_t n,
                     float scale, float *y, size_t ld_y);

    /* y = (add + add2 + rms(x; w, eps)) * scale. Bound: 16 eps (|each term|) */
    void (*norm)(struct backend *b, const struct norm_args *a);

    /* Per head: rms, then rotation of (i, i + head_dim / 2). Bound: 16 eps max |x'| */
    void (*head_norm)(struct backend *b, const struct head_norm_args *a);

    void (*kv_store)(struct backend *b, const struct kv_store_args *a); /* rounds to nearest even */

    /*
     * Softmax over q . k, scale 1; query head h uses KV head h * n_heads_kv / n_heads. f16 pages
     * are read exactly. What a page holds beyond the positions seen does not matter, NaN included.
     * Bound, for head_dim up to 256, with S = the largest sum of |q_k k_k| over the positions seen:
     * (2^-17 (S + 1) + 2^-22 pages) max |v|. A score summed in runs of 16 is off by 32 eps S, its
     * distance to the maximum by 2 eps S more, exp by 2^-22, and weights off by a factor 1 + delta
     * move the result by 2 delta max |v|; a page's sums of 64 bring 2^-18, adding pages 2 eps each.
     */
    void (*attention)(struct backend *b, const struct attention_args *a);

    /* y = gelu_tanh(gate) * up. Bound: 2^-18 (|exact| + |up| 2^-10), with z 2^-16. A gate that is
     * zero after the cut gives exactly 0. */
    void (*gate)(struct backend *b, const struct gate_args *a);

    /*
     * Bound, with u = up . x (off by matmul's bound B), e_j = 2^-16 (|h_j| + 2^-10 |u_j|) +
     * |gelu(g_j)| B_j and m the neurons that are left: sum of |down_j| e_j + m eps |down_j h_j|
     */
    void (*sparse_ffn)(struct backend *b, const struct sparse_ffn_args *a);

    /* Bound of these and of ple: 16 eps (sum of |each term|) of the formula written out */
    void (*altup_predict)(struct backend *b, const struct altup_predict_args *a);
    void (*altup_correct)(struct backend *b, const struct altup_correct_args *a);
    void (*stream_norm)(struct backend *b, const struct stream_norm_args *a);
    void (*rescale)(struct backend *b, const struct rescale_args *a);
    void (*copy_rows)(struct backend *b, const struct copy_rows_args *a); /* exact */
    void (*merge)(struct backend *b, const struct merge_args *a);
    void (*ple)(struct backend *b, const struct ple_args *a);

    /* x := c tanh(x / c) in place; n values. |result| < c. Bound: 2^-21 c */
    void (*softcap)(struct backend *b, float *x, size_t n, float c);
};

/*
 * The operations to use: b->ops->matmul(b, ...). What lies behind belongs to the implementation,
 * which embeds this as its first member.
 */
struct backend {
    const struct backend_ops *ops;
    const struct backend_vtable *vtable;
};

enum backend_memory {
    BACKEND_WEIGHTS, /* read only, and the same for good: a device may make a copy */
    BACKEND_SHARED,  /* both sides read and write */
};

struct backend_vtable {
    void *(*alloc)(struct backend *b, size_t bytes);
    void (*release)(struct backend *b, void *p, size_t bytes);
    size_t (*map_limit)(const struct backend *b);
    int (*map)(struct backend *b, const void *p, size_t bytes, enum backend_memory kind);
    void (*unmap)(struct backend *b, const void *p);
    bool (*begin)(struct backend *b, uint64_t key);
    void (*end)(struct backend *b);
    int (*submit)(struct backend *b);
    int (*wait)(struct backend *b, uint64_t timeout_usec);
    const char *(*failure)(const struct backend *b);
    bool (*hangs)(const struct backend *b);
    void (*free)(struct backend *b);
    size_t (*scratch_bytes)(const struct backend *b);
    uint32_t (*n_threads)(const struct backend *b);
};

/* Zeroed memory aligned to 4096 bytes, or NULL. Kept pages cost memory only when touched. */
static inline void *backend_alloc(struct backend *b, size_t bytes)
{
    return b->vtable->alloc(b, bytes);
}

static inline void backend_release(struct backend *b, void *p, size_t bytes)
{
    if (p)
        b->vtable->release(b, p, bytes);
}

/*
 * Memory of the caller's that operations will be given addresses of, until backend_unmap() or until
 * the backend is freed: p need not be aligned, but the pages around are seen as well. Nothing that
 * an operation reads may cross from one such piece to another. 0; -E2BIG: more than
 * backend_map_limit() at once; -EOPNOTSUPP: BACKEND_SHARED, and the device cannot see it; -ENOMEM,
 * -ENODEV
 */
static inline int backend_map(struct backend *b, const void *p, size_t bytes,
                              enum backend_memory kind)
{
    return b->vtable->map(b, p, bytes, kind);
}

/* Takes back backend_map(b, p, ..., BACKEND_SHARED), before p is another's memory. No operation
 * that was issued and not waited for may use it. */
static inline void backend_unmap(struct backend *b, const void *p)
{
    b->vtable->unmap(b, p);
}

static inline size_t backend_map_limit(const struct backend *b)
{
    return b->vtable->map_limit(b);
}

/* See "Passes" above. Passes do not nest. */
static inline bool backend_begin(struct backend *b, uint64_t key)
{
    return b->vtable->begin(b, key);
}

static inline void backend_end(struct backend *b)
{
    b->vtable->end(b);
}

/* What was issued so far is under way, and perhaps done. 0 or -ENODEV, as backend_finish() */
static inline int backend_submit(struct backend *b)
{
    return b->vtable->submit(b);
}

/* 0: all that was submitted is done; -ETIMEDOUT: not yet; -ENODEV */
static inline int backend_wait(struct backend *b, uint64_t timeout_usec)
{
    return b->vtable->wait(b, timeout_usec);
}

/*
 * Submits, and waits. 0 or -ENODEV: the device is lost for good, out of memory, or has not answered
 * for so long that it is taken for lost; what was issued since backend_finish() or backend_wait()
 * last said 0 may have been done, in part, or not, and may be under way still: a page that it was
 * to write to must not be used for anything else.
 */
static inline int backend_finish(struct backend *b)
{
    int r = b->vtable->submit(b);

    return r < 0 ? r : b->vtable->wait(b, UINT64_MAX);
}

/* Why it answers -ENODEV, in words for people; NULL: it does not. */
static inline const char *backend_failure(const struct backend *b)
{
    return b->vtable->failure(b);
}

/* After a failure: memory that it was given may still be written to, for good. Else freeing the
 * backend puts an end to that. */
static inline bool backend_hangs(const struct backend *b)
{
    return b->vtable->hangs(b);
}

static inline struct backend *backend_free(struct backend *b)
{
    if (b)
        b->vtable->free(b);
    return NULL;
}

static inline void backend_freep(struct backend **b)
{
    backend_free(*b);
}

struct backend_limits { /* what the scratch memory must hold */
    uint32_t max_rows;
    uint32_t max_width; /* values in a row of any operation */
    uint32_t max_heads;
};

/*
 * CPU backend. level: a cap, "reference", "avx2", "avx512" or "amx", NULL for the best this machine
 * has; the name of what was chosen is ops->name. n_threads 0: one for each core this process may
 * use, within its cgroup's quota; never more than there are CPUs for it, hyper-threads included.
 * 0, -EINVAL: err names the unknown level or the one this build or machine lacks, -ENOMEM
 */
int backend_cpu_new(struct backend **ret, const char *level, uint32_t n_threads,
                    const struct backend_limits *limits, struct error *err);

/*
 * A CPU backend's threads keep to one core each from now on, the caller's thread from its next
 * operation until the backend is freed by it; a thread that it creates meanwhile inherits that, and
 * a backend that it makes meanwhile sees one core: one thread that is to have several backends
 * makes all before their first operations, and frees them in the reverse order of these. Nothing
 * happens where threads are fewer than cores: others may have chosen the same few, and the system
 * knows which are idle.
 */
void backend_cpu_pin(struct backend *b);
