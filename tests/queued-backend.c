/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

#undef NDEBUG
#include "tests/queued-backend.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"

enum kind {
    QUANTIZE,
    MATMUL,
    GET_ROWS,
    NORM,
    HEAD_NORM,
    KV_STORE,
    ATTENTION,
    GATE,
    SPARSE_FFN,
    ALTUP_PREDICT,
    ALTUP_CORRECT,
    STREAM_NORM,
    RESCALE,
    COPY_ROWS,
    MERGE,
    PLE,
    SOFTCAP,
};

/* An operation with copies of all structures that it was given. */
struct op {
    enum kind kind;
    struct weight w, down;
    struct activations x;
    union {
        struct norm_args norm;
        struct head_norm_args head_norm;
        struct kv_store_args kv_store;
        struct attention_args attention;
        struct gate_args gate;
        struct sparse_ffn_args sparse_ffn;
        struct altup_predict_args altup_predict;
        struct altup_correct_args altup_correct;
        struct stream_norm_args stream_norm;
        struct rescale_args rescale;
        struct copy_rows_args copy_rows;
        struct merge_args merge;
        struct ple_args ple;
        struct {
            const uint32_t *ids;
            float *y;
            size_t ld_y, n;
            float scale;
        } plain;
    };
};

/* Operations that are issued together. */
struct list {
    uint64_t key;
    struct op *ops;
    size_t n, allocated;
};

/* What was submitted: a list, and the rows of its operations as they were then. */
struct submitted {
    const struct list *list;
    struct kv_row **rows; /* [list->n] */
};

struct region {
    const char *p;
    size_t bytes;
    bool is_own; /* malloc'ed here */
};

struct queued_backend {
    struct backend base;
    struct backend_ops ops;
    struct backend *inner;
    struct queued_options options;
    struct queued_counts counts;
    struct region *regions;
    size_t n_regions;
    struct list **passes;
    size_t n_passes;
    struct list *loose;     /* operations outside of passes since the last submission */
    struct list *recording; /* or NULL */
    struct list *issued[8]; /* since the last submission, in order */
    size_t n_issued;
    struct list *spent[64]; /* loose ones that were submitted */
    size_t n_spent;
    struct submitted submitted[64];
    size_t n_submitted;
    uint32_t n_delays, n_to_loss;
    bool is_lost;
};

static struct queued_backend *queued(struct backend *b)
{
    return (struct queued_backend *)b;
}

static void *must(void *p)
{
    assert(p);
    return p;
}

/* ---- memory ---- */

static void add_region(struct queued_backend *q, const void *p, size_t bytes, bool is_own)
{
    q->regions = must(reallocarray(q->regions, q->n_regions + 1, sizeof(*q->regions)));
    q->regions[q->n_regions++] = (struct region){p, bytes, is_own};
}

/* The device finds all of it, in one piece. */
static void see(struct backend *b, const void *p, size_t bytes)
{
    const struct queued_backend *q = queued(b);

    for (size_t i = q->n_regions; i-- > 0;) {
        const struct region *r = &q->regions[i];

        if ((uintptr_t)p >= (uintptr_t)r->p && (uintptr_t)p + bytes <= (uintptr_t)r->p + r->bytes)
            return;
    }
    assert(!"memory that the backend was never told of");
}

static void see_rows(struct backend *b, const float *p, uint32_t n, size_t ld, size_t k)
{
    see(b, p, ((size_t)(n - 1) * ld + k) * sizeof(*p));
}

static void see_weight(struct backend *b, const struct weight *w)
{
    size_t bytes;

    assert(weight_size(w->type, w->layout, w->n_out, w->n_in, &bytes) == 0);
    see(b, w->data, bytes);
}

static void see_activations(struct backend *b, const struct activations *x)
{
    see_rows(b, x->f32, x->n, x->ld, x->k);
    if (x->q)
        see(b, x->q, (size_t)(x->n - 1) * x->ld_q + x->k);
}

static void *alloc(struct backend *b, size_t bytes)
{
    void *p = must(aligned_alloc(4096, ALIGN_UP(MAX(bytes, (size_t)1), (size_t)4096)));

    memset(p, 0, bytes);
    add_region(queued(b), p, bytes, true);
    return p;
}

static void release(struct backend *b, void *p, size_t bytes)
{
    struct queued_backend *q = queued(b);
    size_t i = 0;

    while (q->regions[i].p != p || !q->regions[i].is_own)
        i++;
    assert(i < q->n_regions && q->regions[i].bytes == bytes);
    if (q->is_lost) /* it may still be written to */
        return;
    q->regions[i] = q->regions[--q->n_regions];
    free(p);
}

static size_t map_limit(const struct backend *b)
{
    const struct queued_backend *q = (const struct queued_backend *)b;

    return q->options.map_limit ? q->options.map_limit : SIZE_MAX;
}

static int map(struct backend *b, const void *p, size_t bytes, enum backend_memory kind)
{
    struct queued_backend *q = queued(b);

    if (bytes > map_limit(b))
        return -E2BIG;
    if (kind == BACKEND_SHARED && q->options.refuses_shared)
        return -EOPNOTSUPP;
    add_region(q, p, bytes, false);
    q->counts.n_maps++;
    *(kind == BACKEND_SHARED ? &q->counts.bytes_shared : &q->counts.bytes_weights) += bytes;
    return 0;
}

static void unmap(struct backend *b, const void *p)
{
    struct queued_backend *q = queued(b);
    size_t i = 0;

    while (i < q->n_regions && (q->regions[i].p != p || q->regions[i].is_own))
        i++;
    assert(i < q->n_regions);
    q->counts.bytes_shared -= q->regions[i].bytes;
    q->regions[i] = q->regions[--q->n_regions];
}

/* ---- lists ---- */

static struct list *new_list(uint64_t key)
{
    struct list *l = must(calloc(1, sizeof(*l)));

    l->key = key;
    return l;
}

static void free_list(struct list *l)
{
    if (l)
        free(l->ops);
    free(l);
}

static struct op *add(struct backend *b, enum kind kind)
{
    struct queued_backend *q = queued(b);
    struct list *l = q->recording;

    if (!l) {
        if (!q->loose) {
            q->loose = new_list(UINT64_MAX);
            assert(q->n_issued < ARRAY_SIZE(q->issued));
            q->issued[q->n_issued++] = q->loose;
        }
        l = q->loose;
    }
    if (l->n == l->allocated) {
        l->allocated = 2 * l->allocated + 64;
        l->ops = must(reallocarray(l->ops, l->allocated, sizeof(*l->ops)));
    }
    l->ops[l->n] = (struct op){.kind = kind};
    return &l->ops[l->n++];
}

/* ---- operations: what they will look at, and a copy of what they were told ---- */

static void quantize(struct backend *b, const struct activations *x)
{
    see_activations(b, x);
    add(b, QUANTIZE)->x = *x;
}

static void matmul(struct backend *b, const struct weight *w, const struct activations *x, float *y,
                   size_t ld_y)
{
    struct op *o = add(b, MATMUL);

    see_weight(b, w);
    see_activations(b, x);
    see_rows(b, y, x->n, ld_y, w->n_out);
    o->w = *w;
    o->x = *x;
    o->plain.y = y;
    o->plain.ld_y = ld_y;
}

static void get_rows(struct backend *b, const struct weight *w, const uint32_t *ids, uint32_t n,
                     float scale, float *y, size_t ld_y)
{
    struct op *o = add(b, GET_ROWS);

    see_weight(b, w);
    see(b, ids, n * sizeof(*ids));
    see_rows(b, y, n, ld_y, w->n_in);
    o->w = *w;
    o->plain.ids = ids;
    o->plain.n = n;
    o->plain.scale = scale;
    o->plain.y = y;
    o->plain.ld_y = ld_y;
}

static void norm(struct backend *b, const struct norm_args *a)
{
    see_rows(b, a->x, a->n, a->ld_x, a->k);
    see_rows(b, a->y, a->n, a->ld_y, a->k);
    if (a->w)
        see_rows(b, a->w, 1, 0, a->k);
    if (a->add)
        see_rows(b, a->add, a->n, a->ld_add, a->k);
    if (a->add2)
        see_rows(b, a->add2, a->n, a->ld_add2, a->k);
    add(b, NORM)->norm = *a;
}

static void head_norm(struct backend *b, const struct head_norm_args *a)
{
    see_rows(b, a->x, a->n, a->ld, (size_t)a->n_heads * a->head_dim);
    if (a->w)
        see_rows(b, a->w, 1, 0, a->head_dim);
    if (a->rope)
        see_rows(b, a->rope, a->n, a->head_dim, a->head_dim);
    add(b, HEAD_NORM)->head_norm = *a;
}

static void kv_store(struct backend *b, const struct kv_store_args *a)
{
    see_rows(b, a->k, a->n, a->ld, (size_t)a->shape.n_heads_kv * a->shape.head_dim);
    see_rows(b, a->v, a->n, a->ld, (size_t)a->shape.n_heads_kv * a->shape.head_dim);
    add(b, KV_STORE)->kv_store = *a;
}

static void attention(struct backend *b, const struct attention_args *a)
{
    see_rows(b, a->q, a->n, a->ld, (size_t)a->n_heads * a->shape.head_dim);
    see_rows(b, a->out, a->n, a->ld, (size_t)a->n_heads * a->shape.head_dim);
    add(b, ATTENTION)->attention = *a;
}

static void gate(struct backend *b, const struct gate_args *a)
{
    see_rows(b, a->gate, a->n, a->ld_gate, a->k);
    see_rows(b, a->up, a->n, a->ld_up, a->k);
    see_rows(b, a->y, a->n, a->ld_y, a->k);
    add(b, GATE)->gate = *a;
}

static void sparse_ffn(struct backend *b, const struct sparse_ffn_args *a)
{
    struct op *o = add(b, SPARSE_FFN);

    see_activations(b, a->x);
    see_weight(b, a->up);
    see_weight(b, a->down);
    see(b, a->work, sparse_ffn_work_bytes(a->x->n, a->up->n_out));
    see_rows(b, a->gate, a->x->n, a->ld_gate, a->up->n_out);
    see_rows(b, a->y, a->x->n, a->ld_y, a->down->n_out);
    o->sparse_ffn = *a;
    o->x = *a->x;
    o->w = *a->up;
    o->down = *a->down;
}

static void altup_predict(struct backend *b, const struct altup_predict_args *a)
{
    size_t streams = (size_t)a->n_streams * a->hidden, n = a->n_streams;

    see_rows(b, a->h, a->n, streams, streams);
    see_rows(b, a->pred, a->n, streams, streams);
    see_rows(b, a->coefs, 1, 0, n * n * n);
    see_rows(b, a->router.norm, 1, 0, a->hidden);
    see_rows(b, a->router.router, 1, 0, streams);
    add(b, ALTUP_PREDICT)->altup_predict = *a;
}

static void altup_correct(struct backend *b, const struct altup_correct_args *a)
{
    size_t streams = (size_t)a->n_streams * a->hidden, n = a->n_streams;

    see_rows(b, a->h, a->n, streams, streams);
    see_rows(b, a->pred, a->n, streams, streams);
    see_rows(b, a->b, a->n, a->hidden, a->hidden);
    see_rows(b, a->scaled, a->n, a->hidden, a->hidden);
    see_rows(b, a->coefs, 1, 0, n * n);
    see_rows(b, a->scale, 1, 0, a->hidden);
    see_rows(b, a->router.norm, 1, 0, a->hidden);
    see_rows(b, a->router.router, 1, 0, streams);
    add(b, ALTUP_CORRECT)->altup_correct = *a;
}

static void stream_norm(struct backend *b, const struct stream_norm_args *a)
{
    size_t streams = (size_t)a->n_streams * a->hidden;

    see_rows(b, a->x, a->n, a->hidden, a->hidden);
    see_rows(b, a->h, a->n, streams, streams);
    see_rows(b, a->w, 1, 0, a->hidden);
    add(b, STREAM_NORM)->stream_norm = *a;
}

static void rescale(struct backend *b, const struct rescale_args *a)
{
    size_t streams = (size_t)a->n_streams * a->hidden;

    see_rows(b, a->y, a->n, a->hidden, a->hidden);
    see_rows(b, a->ref, a->n, a->ld_ref, a->hidden);
    see_rows(b, a->h, a->n, streams, streams);
    add(b, RESCALE)->rescale = *a;
}

static void copy_rows(struct backend *b, const struct copy_rows_args *a)
{
    see_rows(b, a->y, a->n, a->ld_y, a->k);
    if (a->ids)
        see(b, a->ids, a->n * sizeof(*a->ids));
    else
        see_rows(b, a->x, a->n, a->ld_x, a->k);
    add(b, COPY_ROWS)->copy_rows = *a;
}

static void merge(struct backend *b, const struct merge_args *a)
{
    size_t streams = (size_t)a->n_streams * a->hidden;

    see_rows(b, a->h, a->n, streams, streams);
    see_rows(b, a->x, a->n, a->hidden, a->hidden);
    see_rows(b, a->w, 1, 0, a->hidden);
    add(b, MERGE)->merge = *a;
}

static void ple(struct backend *b, const struct ple_args *a)
{
    size_t width = (size_t)a->n_layers * a->width;

    see_rows(b, a->g, a->n, width, width);
    see_rows(b, a->e, a->n, width, width);
    see_rows(b, a->ple, a->n, width, width);
    see_rows(b, a->w, 1, 0, a->width);
    add(b, PLE)->ple = *a;
}

static void softcap(struct backend *b, float *x, size_t n, float c)
{
    struct op *o = add(b, SOFTCAP);

    see(b, x, n * sizeof(*x));
    o->plain.y = x;
    o->plain.n = n;
    o->plain.scale = c;
}

/* ---- passes ---- */

static bool begin(struct backend *b, uint64_t key)
{
    struct queued_backend *q = queued(b);

    assert(!q->recording && !q->loose && q->n_submitted == 0);
    for (size_t i = 0; i < q->n_passes; i++)
        if (q->passes[i]->key == key) {
            q->issued[q->n_issued++] = q->passes[i];
            q->counts.n_replayed++;
            return false;
        }
    q->passes = must(reallocarray(q->passes, q->n_passes + 1, sizeof(struct list *)));
    q->passes[q->n_passes++] = q->recording = new_list(key);
    q->counts.n_recorded++;
    return true;
}

static void end(struct backend *b)
{
    struct queued_backend *q = queued(b);

    assert(q->recording);
    q->issued[q->n_issued++] = q->recording;
    q->recording = NULL;
}

/* Rows and page tables as they are now; entries that the rows do not see are left out. */
static struct kv_row *copy_kv(struct backend *b, const struct kv_row *rows, uint32_t n,
                              uint32_t window, const struct kv_shape *shape, bool stores)
{
    struct kv_row *copies = must(calloc(n, sizeof(*copies)));

    for (uint32_t i = 0; i < n; i++) {
        uint32_t pos = rows[i].pos, last = pos / KV_PAGE;
        uint32_t first = stores ? last : window && pos >= window ? (pos - window + 1) / KV_PAGE : 0;
        void **pages = must(calloc(last + 1, sizeof(*pages)));

        for (uint32_t p = first; p <= last; p++) {
            pages[p] = rows[i].pages[p];
            see(b, pages[p], kv_page_bytes(shape));
        }
        copies[i] = (struct kv_row){pages, pos};
    }
    return copies;
}

static const struct kv_row *rows_of(struct op *o, uint32_t *ret_n)
{
    *ret_n = o->kind == KV_STORE ? o->kv_store.n : o->kind == ATTENTION ? o->attention.n : 0;
    return o->kind == KV_STORE ? o->kv_store.rows : o->attention.rows;
}

static int submit(struct backend *b)
{
    struct queued_backend *q = queued(b);

    if (q->n_issued > 0 && q->n_to_loss > 0 && --q->n_to_loss == 0)
        q->is_lost = true;
    for (size_t i = 0; i < q->n_issued; i++) {
        struct submitted *s = &q->submitted[q->n_submitted++];

        assert(q->n_submitted <= ARRAY_SIZE(q->submitted));
        *s = (struct submitted){q->issued[i],
                                must(calloc(q->issued[i]->n + 1, sizeof(struct kv_row *)))};
        for (size_t k = 0; k < s->list->n; k++) {
            struct op *o = &s->list->ops[k];
            uint32_t n;
            const struct kv_row *rows = rows_of(o, &n);

            if (n > 0)
                s->rows[k] =
                    copy_kv(b, rows, n, o->kind == ATTENTION ? o->attention.window : 0,
                            o->kind == ATTENTION ? &o->attention.shape : &o->kv_store.shape,
                            o->kind == KV_STORE);
        }
    }
    if (q->loose)
        q->spent[q->n_spent++] = q->loose;
    q->loose = NULL;
    q->n_issued = 0;
    return 0; /* a device that is lost may say so only when it is waited for */
}

static void execute(struct backend *inner, struct op *o, const struct kv_row *rows)
{
    const struct backend_ops *ops = inner->ops;

    switch (o->kind) {
    case QUANTIZE:
        ops->quantize(inner, &o->x);
        break;
    case MATMUL:
        ops->matmul(inner, &o->w, &o->x, o->plain.y, o->plain.ld_y);
        break;
    case GET_ROWS:
        ops->get_rows(inner, &o->w, o->plain.ids, (uint32_t)o->plain.n, o->plain.scale, o->plain.y,
                      o->plain.ld_y);
        break;
    case NORM:
        ops->norm(inner, &o->norm);
        break;
    case HEAD_NORM:
        ops->head_norm(inner, &o->head_norm);
        break;
    case KV_STORE: {
        struct kv_store_args a = o->kv_store;

        a.rows = rows;
        ops->kv_store(inner, &a);
        break;
    }
    case ATTENTION: {
        struct attention_args a = o->attention;

        a.rows = rows;
        ops->attention(inner, &a);
        break;
    }
    case GATE:
        ops->gate(inner, &o->gate);
        break;
    case SPARSE_FFN: {
        struct sparse_ffn_args a = o->sparse_ffn;

        a.x = &o->x;
        a.up = &o->w;
        a.down = &o->down;
        ops->sparse_ffn(inner, &a);
        break;
    }
    case ALTUP_PREDICT:
        ops->altup_predict(inner, &o->altup_predict);
        break;
    case ALTUP_CORRECT:
        ops->altup_correct(inner, &o->altup_correct);
        break;
    case STREAM_NORM:
        ops->stream_norm(inner, &o->stream_norm);
        break;
    case RESCALE:
        ops->rescale(inner, &o->rescale);
        break;
    case COPY_ROWS:
        ops->copy_rows(inner, &o->copy_rows);
        break;
    case MERGE:
        ops->merge(inner, &o->merge);
        break;
    case PLE:
        ops->ple(inner, &o->ple);
        break;
    case SOFTCAP:
        ops->softcap(inner, o->plain.y, o->plain.n, o->plain.scale);
        break;
    }
}

static void work_off(struct queued_backend *q, bool does)
{
    for (size_t i = 0; i < q->n_submitted; i++) {
        struct submitted *s = &q->submitted[i];

        for (size_t k = 0; k < s->list->n; k++) {
            uint32_t n;

            if (does)
                execute(q->inner, &s->list->ops[k], s->rows[k]);
            rows_of(&s->list->ops[k], &n);
            for (uint32_t r = 0; r < n; r++)
                free((void *)s->rows[k][r].pages);
            free(s->rows[k]);
        }
        free(s->rows);
    }
    q->n_submitted = 0;
    for (size_t i = 0; i < q->n_spent; i++)
        free_list(q->spent[i]);
    q->n_spent = 0;
}

static int wait(struct backend *b, uint64_t timeout_usec)
{
    struct queued_backend *q = queued(b);

    if (q->n_delays > 0 && timeout_usec != UINT64_MAX) {
        q->n_delays--;
        return -ETIMEDOUT;
    }
    if (q->is_lost)
        return -ENODEV;
    work_off(q, true);
    return 0;
}

static const char *failure(const struct backend *b)
{
    return ((const struct queued_backend *)b)->is_lost ? "it was lost on purpose" : NULL;
}

static bool hangs(const struct backend *b)
{
    const struct queued_backend *q = (const struct queued_backend *)b;

    return q->is_lost && !q->options.lets_go;
}

static void free_backend(struct backend *b)
{
    struct queued_backend *q = queued(b);

    work_off(q, false);
    for (size_t i = 0; i < q->n_passes; i++)
        free_list(q->passes[i]);
    free_list(q->loose);
    for (size_t i = 0; i < q->n_regions; i++) {
        assert(!q->regions[i].is_own || q->is_lost); /* else it was to be released */
        if (q->regions[i].is_own)
            free((void *)q->regions[i].p);
    }
    free(q->passes);
    free(q->regions);
    backend_free(q->inner);
    free(q);
}

static size_t scratch_bytes(const struct backend *b)
{
    (void)b;
    return 0;
}

static uint32_t n_threads(const struct backend *b)
{
    (void)b;
    return 1;
}

static const struct backend_vtable vtable = {
    .alloc = alloc,
    .release = release,
    .map_limit = map_limit,
    .map = map,
    .unmap = unmap,
    .begin = begin,
    .end = end,
    .submit = submit,
    .wait = wait,
    .failure = failure,
    .hangs = hangs,
    .free = free_backend,
    .scratch_bytes = scratch_bytes,
    .n_threads = n_threads,
};

struct queued_backend *queued_backend_new(const struct backend_limits *limits,
                                          const struct queued_options *o)
{
    struct queued_backend *q = must(calloc(1, sizeof(*q)));

    assert(backend_cpu_new(&q->inner, NULL, 1, limits, NULL) == 0);
    q->options = *o;
    q->ops = (struct backend_ops){
        .name = "queued",
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
    q->base = (struct backend){.ops = &q->ops, .vtable = &vtable};
    return q;
}

struct backend *queued_backend_base(struct queued_backend *q)
{
    return &q->base;
}

void queued_backend_delay(struct queued_backend *q, uint32_t n)
{
    q->n_delays = n;
}

void queued_backend_lose(struct queued_backend *q, uint32_t n)
{
    q->n_to_loss = n;
}

void queued_backend_finish_late(struct queued_backend *q)
{
    assert(q->is_lost);
    work_off(q, true);
}

struct queued_counts queued_backend_counts(const struct queued_backend *q)
{
    return q->counts;
}
