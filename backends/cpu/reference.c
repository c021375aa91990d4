/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The reference: every operation of backend.h as its formula reads, sums in double, one rounding
 * to float at the end. It defines what the others must give, and it is what runs on a processor for
 * which there is nothing better, so a row of weights is unpacked only once for all rows of
 * activations; nothing else is done for speed.
 */

#include <assert.h>
#include <float.h>
#include <math.h>
#include <string.h>

#include "backends/cpu/matmul.h"
#include "base/checked.h"

/* Values that a thread unpacks a row of weights into. */
struct row_scratch {
    float *x, *d;
    int8_t *q;
};

static struct row_scratch row_scratch(void *scratch, uint32_t n_in)
{
    size_t width = ALIGN_UP((size_t)n_in, (size_t)64);
    struct row_scratch s;

    s.x = scratch;
    s.d = s.x + width;
    s.q = (int8_t *)(s.d + width / WEIGHT_BLOCK);
    return s;
}

static void unpack_q4_word(const uint8_t *bytes, int8_t *q)
{
    for (int j = 0; j < 4; j++) {
        q[j] = (int8_t)((bytes[j] & 0xf) - 8);
        q[j + 4] = (int8_t)((bytes[j] >> 4) - 8);
    }
}

/* One row's integers and scales, as weight_get_row_q() gives them. */
static void unpack_row_q(const struct weight *w, uint32_t row, int8_t *q, float *d)
{
    bool q4 = w->type == WEIGHT_Q4;
    size_t quants = q4 ? w->n_in / 2 : w->n_in; /* bytes of a row */
    uint32_t n_blocks = w->n_in / WEIGHT_BLOCK;
    const uint8_t *p = w->data, *scales;
    size_t scale_step, line = 0;
    uint16_t h;

    switch (w->layout) {
    case LAYOUT_TILE16:
        p += row / WEIGHT_STRIPE * weight_stripe_bytes(w->type, w->n_in);
        scales = p + WEIGHT_STRIPE * quants + row % WEIGHT_STRIPE * 2;
        scale_step = WEIGHT_STRIPE * 2;
        p += row % WEIGHT_STRIPE * 4;
        if (q4)
            for (uint32_t k = 0; k < w->n_in; k += 8, p += 64)
                unpack_q4_word(p, q + k);
        else
            for (uint32_t k = 0; k < w->n_in; k += 4, p += 64)
                memcpy(q + k, p, 4);
        break;
    case LAYOUT_ROWS:
        p += row * weight_row_bytes(w->type, w->n_in);
        scales = p + quants;
        scale_step = 2;
        if (q4)
            for (uint32_t k = 0; k < w->n_in; k++)
                q[k] = (int8_t)((p[k / 32 * 16 + k % 16] >> k % 32 / 16 * 4 & 0xf) - 8);
        else
            memcpy(q, p, w->n_in);
        break;
    case LAYOUT_COLS:
    default:
        assert(w->layout == LAYOUT_COLS);
        line = weight_column_bytes(w->type, w->n_out);
        scale_step = weight_col_block_bytes(w->type, w->n_out);
        scales = p + row * (size_t)2;
        p += scale_step - WEIGHT_BLOCK * line; /* past the scales of a block */
        p += q4 ? row / 32 * (size_t)16 + row % 16 : row;
        for (uint32_t k = 0; k < w->n_in; k++) {
            uint8_t v = p[k / WEIGHT_BLOCK * scale_step + k % WEIGHT_BLOCK * line];

            q[k] = q4 ? (int8_t)((v >> row % 32 / 16 * 4 & 0xf) - 8) : (int8_t)v;
        }
        break;
    }
    for (uint32_t b = 0; b < n_blocks; b++, scales += scale_step) {
        memcpy(&h, scales, 2);
        d[b] = half_to_float(h);
    }
}

/* One row in float, exactly, as weight_get_row() gives it: 11 bits of a scale times 8 bits. */
static void unpack_row(const struct weight *w, uint32_t row, const struct row_scratch *s)
{
    const char *p = w->data;
    size_t size = w->type == WEIGHT_F32 ? 4 : 2, step = size, pair = 4;

    if (weight_type_is_quantized(w->type)) {
        unpack_row_q(w, row, s->q, s->d);
        for (uint32_t k = 0; k < w->n_in; k++)
            s->x[k] = s->d[k / WEIGHT_BLOCK] * (float)s->q[k];
        return;
    }
    switch (w->layout) {
    case LAYOUT_PLAIN:
        p += row * (size_t)w->n_in * size;
        break;
    case LAYOUT_TILE16:
        p += row / WEIGHT_STRIPE * weight_stripe_bytes(w->type, w->n_in) + row % WEIGHT_STRIPE * 4;
        step = 64;
        pair = 64;
        break;
    case LAYOUT_ROWS:
        p += row * weight_row_bytes(w->type, w->n_in);
        break;
    case LAYOUT_COLS:
        step = weight_column_bytes(w->type, w->n_out);
        pair = 2 * step;
        p += row * size;
        break;
    }
    for (uint32_t k = 0; k < w->n_in; k++) {
        uint16_t h;

        if (w->type == WEIGHT_F32) {
            memcpy(&s->x[k], p + k * step, 4);
            continue;
        }
        /* two of a tile's values share a word; elsewhere a pair is two steps */
        memcpy(&h, p + k / 2 * pair + k % 2 * (w->layout == LAYOUT_COLS ? step : 2), 2);
        s->x[k] = w->type == WEIGHT_F16 ? half_to_float(h) : bf16_to_float(h);
    }
}

static double dot(const float *a, const float *b, uint32_t n)
{
    double sum[4] = {0}; /* four, since one waits for its own addition */
    uint32_t i = 0;

    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++)
            sum[j] += (double)a[i + (uint32_t)j] * (double)b[i + (uint32_t)j];
    for (; i < n; i++)
        sum[0] += (double)a[i] * (double)b[i];
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}

static double mean_square(const float *x, uint32_t n)
{
    return dot(x, x, n) / n;
}

static void ref_quantize(struct backend *b, const struct activations *x)
{
    (void)b;
    for (uint32_t i = 0; i < x->n; i++) {
        const float *f = x->f32 + i * x->ld;
        int8_t *q = x->q + i * x->ld_q, *low = x->q_low ? x->q_low + i * x->ld_q : NULL;

        for (size_t block = 0; block < x->ld_q / WEIGHT_BLOCK; block++, q += WEIGHT_BLOCK) {
            size_t at = i * (x->ld_q / WEIGHT_BLOCK) + block, k = block * WEIGHT_BLOCK;
            uint32_t n = k >= x->k ? 0 : (uint32_t)MIN(x->k - k, (size_t)WEIGHT_BLOCK);
            float max = 0, d;
            int32_t sum = 0, sum_low = 0;

            for (uint32_t j = 0; j < n; j++)
                max = fmaxf(max, fabsf(f[k + j]));
            d = max / 127;
            memset(q, 0, WEIGHT_BLOCK);
            if (low)
                memset(low + k, 0, WEIGHT_BLOCK);
            if (!(d >= FLT_MIN)) /* not enough bits left for a scale */
                d = 0;
            for (uint32_t j = 0; d > 0 && j < n; j++) {
                float v = f[k + j] / d, r = rintf(v);

                if (!(r >= -127 && r <= 127)) /* only for NaN, infinity */
                    continue;
                q[j] = (int8_t)r;
                sum += q[j];
                if (low) {
                    low[k + j] = (int8_t)rintf((v - r) * FINE);
                    sum_low += low[k + j];
                }
            }
            x->d[at] = d;
            x->sum[at] = sum;
            if (low)
                x->sum_low[at] = sum_low;
        }
    }
}

static float dot_rounded(const struct activations *x, uint32_t i, const struct row_scratch *s,
                         uint32_t n_blocks)
{
    const int8_t *q = x->q + i * x->ld_q;
    const int8_t *low = x->q_low ? x->q_low + i * x->ld_q : NULL;
    const float *d = x->d + i * (x->ld_q / WEIGHT_BLOCK);
    double sum = 0;

    for (uint32_t b = 0; b < n_blocks; b++) {
        int32_t t = 0;

        for (uint32_t k = b * WEIGHT_BLOCK; k < (b + 1) * WEIGHT_BLOCK; k++)
            t += s->q[k] * (low ? FINE * q[k] + low[k] : q[k]);
        sum += (double)s->d[b] * (double)d[b] / (low ? FINE : 1) * t;
    }
    return (float)sum;
}

static void matmul_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct matmul_task *t = args;
    const struct weight *w = t->w;
    const struct activations *x = t->x;
    bool rounded = x->q && weight_type_is_quantized(w->type);
    struct row_scratch s = row_scratch(scratch, w->n_in);

    for (uint32_t o = first; o < last; o++) {
        if (rounded)
            unpack_row_q(w, o, s.q, s.d);
        else
            unpack_row(w, o, &s);
        for (uint32_t i = 0; i < x->n; i++)
            t->y[i * t->ld_y + o] = rounded ? dot_rounded(x, i, &s, w->n_in / WEIGHT_BLOCK)
                                            : (float)dot(s.x, x->f32 + i * x->ld, w->n_in);
    }
}

static void ref_matmul(struct backend *b, const struct weight *w, const struct activations *x,
                       float *y, size_t ld_y)
{
    struct matmul_task t = {w, x, y, ld_y};

    assert(x->k == w->n_in && w->n_in <= cpu_backend(b)->limits.max_width);
    cpu_parallel(cpu_backend(b), w->n_out, (size_t)w->n_in * (x->n + 4), matmul_rows, &t);
}

struct get_rows_task {
    const struct weight *w;
    const uint32_t *ids;
    float scale, *y;
    size_t ld_y;
};

static void get_some_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct get_rows_task *t = args;
    struct row_scratch s = row_scratch(scratch, t->w->n_in);

    for (uint32_t i = first; i < last; i++) {
        assert(t->ids[i] < t->w->n_out);
        unpack_row(t->w, t->ids[i], &s);
        for (uint32_t k = 0; k < t->w->n_in; k++)
            t->y[i * t->ld_y + k] = s.x[k] * t->scale;
    }
}

static void ref_get_rows(struct backend *b, const struct weight *w, const uint32_t *ids, uint32_t n,
                         float scale, float *y, size_t ld_y)
{
    struct get_rows_task t = {w, ids, scale, y, ld_y};

    assert(w->n_in <= cpu_backend(b)->limits.max_width);
    cpu_parallel(cpu_backend(b), n, w->n_in, get_some_rows, &t);
}

static void norm_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct norm_args *a = args;

    (void)scratch;
    for (uint32_t i = first; i < last; i++) {
        const float *x = a->x + i * a->ld_x;
        float *y = a->y + i * a->ld_y;
        double r = 1 / sqrt(mean_square(x, a->k) + (double)a->eps);

        for (uint32_t k = 0; k < a->k; k++) {
            double v = (double)x[k] * r;

            if (a->w)
                v *= (double)a->w[k];
            if (a->add)
                v += (double)a->add[i * a->ld_add + k];
            if (a->add2)
                v += (double)a->add2[i * a->ld_add2 + k];
            y[k] = (float)(v * (double)a->scale);
        }
    }
}

static void ref_norm(struct backend *b, const struct norm_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, a->k, norm_rows, a);
}

static void head_norm_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct head_norm_args *a = args;
    uint32_t half = a->head_dim / 2;

    (void)scratch;
    for (uint32_t i = first; i < last; i++)
        for (uint32_t h = 0; h < a->n_heads; h++) {
            float *x = a->x + i * a->ld + (size_t)h * a->head_dim;
            double r = 1 / sqrt(mean_square(x, a->head_dim) + (double)a->eps);
            const float *cosine = a->rope ? a->rope + (size_t)i * a->head_dim : NULL;

            for (uint32_t k = 0; !a->rope && k < a->head_dim; k++)
                x[k] = (float)((double)x[k] * r * (double)(a->w ? a->w[k] : 1));
            for (uint32_t k = 0; a->rope && k < half; k++) {
                double u = (double)x[k] * r * (double)(a->w ? a->w[k] : 1);
                double v = (double)x[k + half] * r * (double)(a->w ? a->w[k + half] : 1);
                double c = (double)cosine[k], s = (double)cosine[half + k];

                x[k] = (float)(u * c - v * s);
                x[k + half] = (float)(v * c + u * s);
            }
        }
}

static void ref_head_norm(struct backend *b, const struct head_norm_args *a)
{
    assert(!a->rope || a->head_dim % 2 == 0);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->n_heads * a->head_dim, head_norm_rows, a);
}

static void store(void *array, size_t at, bool f16, float value)
{
    if (f16)
        ((uint16_t *)array)[at] = half_from_float(value);
    else
        ((float *)array)[at] = value;
}

static double load(const void *array, size_t at, bool f16)
{
    return (double)(f16 ? half_to_float(((const uint16_t *)array)[at])
                        : ((const float *)array)[at]);
}

/* Index of dimension k of position p in a page: K, and V, which lies behind all of K. */
static size_t k_at(const struct kv_shape *s, uint32_t head, uint32_t k, uint32_t p)
{
    return ((size_t)head * s->head_dim + k) * KV_PAGE + p % KV_PAGE;
}

static size_t v_at(const struct kv_shape *s, uint32_t head, uint32_t k, uint32_t p)
{
    return ((size_t)s->n_heads_kv * s->head_dim + (size_t)head * s->head_dim) * KV_PAGE +
           (size_t)(p % KV_PAGE) * s->head_dim + k;
}

static void ref_kv_store(struct backend *b, const struct kv_store_args *a)
{
    const struct kv_shape *s = &a->shape;

    (void)b;
    for (uint32_t i = 0; i < a->n; i++) {
        uint32_t p = a->rows[i].pos;
        void *page = a->rows[i].pages[p / KV_PAGE];

        for (uint32_t h = 0; h < s->n_heads_kv; h++)
            for (uint32_t k = 0; k < s->head_dim; k++) {
                size_t from = i * a->ld + (size_t)h * s->head_dim + k;

                store(page, k_at(s, h, k, p), s->f16, a->k[from]);
                store(page, v_at(s, h, k, p), s->f16, a->v[from]);
            }
    }
}

static double score(const struct kv_shape *s, const float *q, const struct kv_row *row,
                    uint32_t head_kv, uint32_t p)
{
    double sum = 0;

    for (uint32_t k = 0; k < s->head_dim; k++)
        sum += (double)q[k] * load(row->pages[p / KV_PAGE], k_at(s, head_kv, k, p), s->f16);
    return sum;
}

/* Items are pairs of a row and a head. Scores are computed twice instead of being kept. */
static void attention_heads(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct attention_args *a = args;
    const struct kv_shape *s = &a->shape;
    double out[BACKEND_MAX_HEAD_DIM];

    (void)scratch;
    for (uint32_t item = first; item < last; item++) {
        uint32_t i = item / a->n_heads, h = item % a->n_heads;
        uint32_t head_kv = (uint32_t)((uint64_t)h * s->n_heads_kv / a->n_heads);
        const struct kv_row *row = &a->rows[i];
        const float *q = a->q + i * a->ld + (size_t)h * s->head_dim;
        float *y = a->out + i * a->ld + (size_t)h * s->head_dim;
        uint32_t begin = a->window && row->pos >= a->window ? row->pos - a->window + 1 : 0;
        double max = -(double)INFINITY, sum = 0;

        for (uint32_t p = begin; p <= row->pos; p++)
            max = fmax(max, score(s, q, row, head_kv, p));
        memset(out, 0, sizeof(out));
        for (uint32_t p = begin; p <= row->pos; p++) {
            double e = exp(score(s, q, row, head_kv, p) - max);

            sum += e;
            for (uint32_t k = 0; k < s->head_dim; k++)
                out[k] += e * load(row->pages[p / KV_PAGE], v_at(s, head_kv, k, p), s->f16);
        }
        for (uint32_t k = 0; k < s->head_dim; k++)
            y[k] = (float)(out[k] / sum);
    }
}

static void ref_attention(struct backend *b, const struct attention_args *a)
{
    size_t cost = 0;

    assert(a->shape.head_dim <= BACKEND_MAX_HEAD_DIM && a->n_heads >= a->shape.n_heads_kv);
    for (uint32_t i = 0; i < a->n; i++)
        cost += (a->window ? MIN(a->rows[i].pos + 1, a->window) : a->rows[i].pos + 1);
    if (a->n)
        cpu_parallel(cpu_backend(b), a->n * a->n_heads, cost / a->n * a->shape.head_dim * 3,
                     attention_heads, a);
}

static double gelu(double x)
{
    const double sqrt_2_pi = 0.79788456080286535588; /* sqrt(2 / pi) */

    return 0.5 * x * (1 + tanh(sqrt_2_pi * (x + 0.044715 * x * x * x)));
}

/* mean + z * deviation (§3.7) */
static double gate_cut(const float *gate, uint32_t n, double z)
{
    double mean = 0, square = 0;

    for (uint32_t k = 0; k < n; k++)
        mean += (double)gate[k];
    mean /= n;
    for (uint32_t k = 0; k < n; k++)
        square += ((double)gate[k] - mean) * ((double)gate[k] - mean);
    return mean + z * sqrt(square / n);
}

static void gate_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct gate_args *a = args;

    (void)scratch;
    for (uint32_t i = first; i < last; i++) {
        const float *gate = a->gate + i * a->ld_gate, *up = a->up + i * a->ld_up;
        float *y = a->y + i * a->ld_y;
        double cut = a->z > 0 ? gate_cut(gate, a->k, (double)a->z) : 0;

        for (uint32_t k = 0; k < a->k; k++) {
            double g = (double)gate[k];

            if (a->z > 0)
                g = g - cut > 0 ? g - cut : 0;
            y[k] = (float)(gelu(g) * (double)up[k]);
        }
    }
}

static void ref_gate(struct backend *b, const struct gate_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->k * 8, gate_rows, a);
}

/* gate := what is above the cut */
static void cut_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct sparse_ffn_args *a = args;

    (void)scratch;
    for (uint32_t i = first; i < last; i++) {
        float *gate = a->gate + i * a->ld_gate;
        double cut = gate_cut(gate, a->up->n_out, (double)a->z);

        for (uint32_t k = 0; k < a->up->n_out; k++)
            gate[k] = (double)gate[k] - cut > 0 ? (float)((double)gate[k] - cut) : 0;
    }
}

/* work [ffn][n] := gelu(gate) * (up . x), where the gate is open */
static void sparse_up_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct sparse_ffn_args *a = args;
    const struct activations *x = a->x;
    const struct weight *w = a->up;
    bool rounded = x->q && weight_type_is_quantized(w->type);
    struct row_scratch s = row_scratch(scratch, w->n_in);

    for (uint32_t j = first; j < last; j++) {
        float *h = (float *)a->work + (size_t)j * x->n;
        bool unpacked = false;

        for (uint32_t i = 0; i < x->n; i++) {
            float g = a->gate[i * a->ld_gate + j];
            double u;

            h[i] = 0;
            if (g == 0)
                continue;
            if (!unpacked && rounded)
                unpack_row_q(w, j, s.q, s.d);
            else if (!unpacked)
                unpack_row(w, j, &s);
            unpacked = true;
            u = rounded ? (double)dot_rounded(x, i, &s, w->n_in / WEIGHT_BLOCK)
                        : dot(s.x, x->f32 + i * x->ld, w->n_in);
            h[i] = (float)(gelu((double)g) * u);
        }
    }
}

static void sparse_down_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct sparse_ffn_args *a = args;
    struct row_scratch s = row_scratch(scratch, a->down->n_in);

    for (uint32_t o = first; o < last; o++) {
        unpack_row(a->down, o, &s);
        for (uint32_t i = 0; i < a->x->n; i++) {
            double sum = 0;

            for (uint32_t j = 0; j < a->down->n_in; j++)
                if (a->gate[i * a->ld_gate + j] != 0)
                    sum +=
                        (double)s.x[j] * (double)((const float *)a->work)[(size_t)j * a->x->n + i];
            a->y[i * a->ld_y + o] = (float)sum;
        }
    }
}

static void ref_sparse_ffn(struct backend *b, const struct sparse_ffn_args *a)
{
    struct cpu_backend *c = cpu_backend(b);
    uint32_t n = a->x->n, ffn = a->up->n_out;
    uint64_t neurons = 0;

    assert(a->up->layout == LAYOUT_ROWS && a->down->layout == LAYOUT_COLS && a->z > 0);
    assert(!a->x->q_low);
    assert(a->x->k == a->up->n_in && a->down->n_in == ffn &&
           MAX(ffn, a->x->k) <= c->limits.max_width);
    cpu_parallel(c, n, ffn, cut_rows, a);
    cpu_parallel(c, ffn, (size_t)a->x->k * n, sparse_up_rows, a);
    cpu_parallel(c, a->down->n_out, (size_t)ffn * (n + 4), sparse_down_rows, a);
    for (uint32_t j = 0; j < ffn; j++) {
        uint32_t i = 0;

        while (i < n && a->gate[i * a->ld_gate + j] == 0)
            i++;
        neurons += i < n;
    }
    if (a->ret_neurons)
        *a->ret_neurons = neurons;
}

static void route(const struct router_weights *w, uint32_t hidden, uint32_t n_streams,
                  const float *x, double *ret)
{
    double r = 1 / sqrt(mean_square(x, hidden) + (double)w->eps);

    for (uint32_t j = 0; j < n_streams; j++) {
        const float *router = w->router + (size_t)j * hidden;
        double sum = 0;

        for (uint32_t k = 0; k < hidden; k++)
            sum += (double)router[k] * ((double)x[k] * (double)w->norm[k]);
        ret[j] = tanh(sum * r / hidden);
    }
}

static void predict_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct altup_predict_args *a = args;
    uint32_t n = a->n_streams;
    double m[BACKEND_MAX_STREAMS], c[BACKEND_MAX_STREAMS * BACKEND_MAX_STREAMS];

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *h = a->h + (size_t)row * n * a->hidden;
        float *pred = a->pred + (size_t)row * n * a->hidden;

        route(&a->router, a->hidden, n, h, m);
        for (uint32_t ji = 0; ji < n * n; ji++) {
            c[ji] = 0;
            for (uint32_t s = 0; s < n; s++)
                c[ji] += (double)a->coefs[ji * n + s] * m[s];
        }
        for (uint32_t j = 0; j < n; j++)
            for (uint32_t k = 0; k < a->hidden; k++) {
                double sum = (double)h[(size_t)j * a->hidden + k];

                for (uint32_t i = 0; i < n; i++)
                    sum += c[j * n + i] * (double)h[(size_t)i * a->hidden + k];
                pred[(size_t)j * a->hidden + k] = (float)sum;
            }
    }
}

static void ref_altup_predict(struct backend *b, const struct altup_predict_args *a)
{
    assert(a->n_streams <= BACKEND_MAX_STREAMS);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * a->n_streams * (a->n_streams + 1),
                 predict_rows, a);
}

static void correct_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct altup_correct_args *a = args;
    uint32_t n = a->n_streams;
    double m[BACKEND_MAX_STREAMS], c[BACKEND_MAX_STREAMS];

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *pred = a->pred + (size_t)row * n * a->hidden;
        const float *out = a->b + (size_t)row * a->hidden;
        float *h = a->h + (size_t)row * n * a->hidden;
        float *scaled = a->scaled + (size_t)row * a->hidden;

        route(&a->router, a->hidden, n, out, m);
        for (uint32_t i = 0; i < n; i++) {
            c[i] = 1;
            for (uint32_t s = 0; s < n; s++)
                c[i] += (double)a->coefs[i * n + s] * m[s];
        }
        for (uint32_t k = 0; k < a->hidden; k++) {
            double d = (double)out[k] - (double)pred[k];

            scaled[k] = (float)(((double)pred[k] + c[0] * d) * (double)a->scale[k]);
            for (uint32_t i = 0; i < n; i++) {
                size_t at = (size_t)i * a->hidden + k;

                h[at] = (float)((double)pred[at] + c[i] * d);
            }
        }
    }
}

static void ref_altup_correct(struct backend *b, const struct altup_correct_args *a)
{
    assert(a->n_streams <= BACKEND_MAX_STREAMS);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * (2 * a->n_streams + 1), correct_rows, a);
}

static void stream_norm_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct stream_norm_args *a = args;

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *x = a->x + (size_t)row * a->hidden;
        float *h = a->h + (size_t)row * a->n_streams * a->hidden;
        double r = 1 / sqrt(mean_square(x, a->hidden) + (double)a->eps);

        for (uint32_t i = 1; i < a->n_streams; i++)
            for (uint32_t k = 0; k < a->hidden; k++) {
                size_t at = (size_t)i * a->hidden + k;

                h[at] = (float)((double)h[at] + (double)x[k] * r * (double)a->w[k]);
            }
    }
}

static void ref_stream_norm(struct backend *b, const struct stream_norm_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * a->n_streams, stream_norm_rows, a);
}

static void rescale_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct rescale_args *a = args;

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *y = a->y + (size_t)row * a->hidden;
        float *h = a->h + ((size_t)row * a->n_streams + a->stream) * a->hidden;
        double r = sqrt(mean_square(a->ref + row * a->ld_ref, a->hidden)) /
                   sqrt(fmax(mean_square(y, a->hidden), 1e-5));

        for (uint32_t k = 0; k < a->hidden; k++)
            h[k] = (float)((double)y[k] * r);
    }
}

static void ref_rescale(struct backend *b, const struct rescale_args *a)
{
    assert(a->stream < a->n_streams);
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * 3, rescale_rows, a);
}

static void copy_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct copy_rows_args *a = args;

    (void)scratch;
    for (uint32_t row = first; row < last; row++)
        memcpy(a->y + row * a->ld_y, a->x + (a->ids ? a->ids[row] : row) * a->ld_x,
               a->k * sizeof(*a->y));
}

static void ref_copy_rows(struct backend *b, const struct copy_rows_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, a->k, copy_rows, a);
}

static void merge_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct merge_args *a = args;
    double n = a->n_streams;

    (void)scratch;
    for (uint32_t row = first; row < last; row++) {
        const float *h = a->h + (size_t)row * a->n_streams * a->hidden;
        float *x = a->x + (size_t)row * a->hidden;
        double square = 0, r = 0;

        for (int pass = 0; pass < 2; pass++) { /* the mean's square, then the result */
            for (uint32_t k = 0; k < a->hidden; k++) {
                double sum = 0;

                for (uint32_t i = 0; i < a->n_streams; i++)
                    sum += (double)h[(size_t)i * a->hidden + k];
                if (pass == 0)
                    square += sum / n * (sum / n);
                else
                    x[k] = (float)(sum / n * r * (double)a->w[k]);
            }
            r = 1 / sqrt(square / a->hidden + (double)a->eps);
        }
    }
}

static void ref_merge(struct backend *b, const struct merge_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->hidden * a->n_streams, merge_rows, a);
}

static void ple_rows(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct ple_args *a = args;

    (void)scratch;
    for (size_t i = (size_t)first * a->n_layers; i < (size_t)last * a->n_layers; i++) {
        const float *g = a->g + i * a->width, *e = a->e + i * a->width;
        float *y = a->ple + i * a->width;
        double scale = (double)a->g_scale;
        double r = scale / sqrt(mean_square(g, a->width) * scale * scale + (double)a->eps);

        for (uint32_t k = 0; k < a->width; k++)
            y[k] = (float)(((double)g[k] * r * (double)a->w[k] + (double)e[k]) * M_SQRT1_2);
    }
}

static void ref_ple(struct backend *b, const struct ple_args *a)
{
    cpu_parallel(cpu_backend(b), a->n, (size_t)a->n_layers * a->width, ple_rows, a);
}

struct softcap_task {
    float *x;
    size_t n;
    float c;
};

#define SOFTCAP_PIECE 4096 /* values of one item */

static void softcap_pieces(const void *args, uint32_t first, uint32_t last, void *scratch)
{
    const struct softcap_task *t = args;
    size_t end = MIN((size_t)last * SOFTCAP_PIECE, t->n);
    float below = nextafterf(t->c, 0); /* the tanh of a large value rounds to 1 */

    (void)scratch;
    for (size_t i = (size_t)first * SOFTCAP_PIECE; i < end; i++) {
        float v = (float)((double)t->c * tanh((double)t->x[i] / (double)t->c));

        t->x[i] = v >= t->c ? below : v <= -t->c ? -below : v;
    }
}

static void ref_softcap(struct backend *b, float *x, size_t n, float c)
{
    struct softcap_task t = {x, n, c};

    cpu_parallel(cpu_backend(b), (uint32_t)DIV_ROUND_UP(n, SOFTCAP_PIECE), SOFTCAP_PIECE * 8,
                 softcap_pieces, &t);
}

void cpu_use_reference(struct cpu_backend *c)
{
    c->reference_matmul = ref_matmul;
    c->ops = (struct backend_ops){
        .quantize = ref_quantize,
        .matmul = ref_matmul,
        .get_rows = ref_get_rows,
        .norm = ref_norm,
        .head_norm = ref_head_norm,
        .kv_store = ref_kv_store,
        .attention = ref_attention,
        .gate = ref_gate,
        .sparse_ffn = ref_sparse_ffn,
        .altup_predict = ref_altup_predict,
        .altup_correct = ref_altup_correct,
        .stream_norm = ref_stream_norm,
        .rescale = ref_rescale,
        .copy_rows = ref_copy_rows,
        .merge = ref_merge,
        .ple = ref_ple,
        .softcap = ref_softcap,
    };
}
