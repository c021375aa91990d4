/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */

/*
 * The elementwise parts and the attention of Gemma 3n for training, forward and backward; model.py
 * and fused.Plain are their definition. Built by fused.py for the machine it runs on, with -Ofast:
 * plain loops that the compiler turns into vectors. All matrices are row-major; n rows are tokens.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float from_bf16(bf16 x)
{
    union {
        uint32_t u;
        float f;
    } v = {.u = (uint32_t)x << 16};

    return v.f;
}

static inline bf16 to_bf16(float x)
{
    union {
        float f;
        uint32_t u;
    } v = {.f = x};

    return (bf16)((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}

/* y = x / sqrt(mean(x^2) + eps) * w; w may be NULL. inv [n] is kept for the way back. */
void rms(const float *x, const float *w, float *y, float *inv, long n, long d, float eps)
{
#pragma omp parallel for
    for (long i = 0; i < n; i++) {
        const float *xi = x + i * d;
        float *yi = y + i * d, s = 0;

        for (long j = 0; j < d; j++)
            s += xi[j] * xi[j];
        s = 1 / sqrtf(s / d + eps);
        inv[i] = s;
        if (w)
            for (long j = 0; j < d; j++)
                yi[j] = xi[j] * s * w[j];
        else
            for (long j = 0; j < d; j++)
                yi[j] = xi[j] * s;
    }
}

void rms_back(const float *dy, const float *x, const float *w, const float *inv, float *dx, float *dw,
              long n, long d)
{
#pragma omp parallel
    {
        float *sum = calloc(d, sizeof(*sum)), *g = malloc(d * sizeof(*g));

#pragma omp for
        for (long i = 0; i < n; i++) {
            const float *xi = x + i * d, *di = dy + i * d;
            float *o = dx + i * d, s = inv[i], dot = 0;

            for (long j = 0; j < d; j++) {
                g[j] = w ? di[j] * w[j] : di[j];
                dot += g[j] * xi[j];
                sum[j] += di[j] * xi[j] * s;
            }
            dot *= s * s / d;
            for (long j = 0; j < d; j++)
                o[j] = s * (g[j] - xi[j] * dot);
        }
        if (dw)
#pragma omp critical
            for (long j = 0; j < d; j++)
                dw[j] += sum[j];
        free(sum);
        free(g);
    }
}

/* Rotates the halves of each head, x [n][heads][d]; cos and sin [n][d/2]. sign -1 turns back. */
void rope(const float *x, const float *cosine, const float *sine, float *y, long n, long heads, long d,
          float sign)
{
    long half = d / 2;

#pragma omp parallel for
    for (long i = 0; i < n; i++)
        for (long h = 0; h < heads; h++) {
            const float *a = x + (i * heads + h) * d, *b = a + half, *c = cosine + i * half, *s = sine + i * half;
            float *o = y + (i * heads + h) * d;

            for (long j = 0; j < half; j++) {
                o[j] = a[j] * c[j] - sign * b[j] * s[j];
                o[j + half] = b[j] * c[j] + sign * a[j] * s[j];
            }
        }
}

/* pred[j] = h[j] + sum_i c[4j+i] h[i]; h [4][n][d], c [n][16]. */
void predict(const float *h, const float *c, float *pred, long n, long d)
{
    long s = n * d;

#pragma omp parallel for
    for (long i = 0; i < n; i++) {
        const float *k = c + i * 16, *x = h + i * d;
        float *y = pred + i * d;

        for (long j = 0; j < d; j++) {
            float a = x[j], b = x[j + s], e = x[j + 2 * s], f = x[j + 3 * s];

            y[j] = a + k[0] * a + k[1] * b + k[2] * e + k[3] * f;
            y[j + s] = b + k[4] * a + k[5] * b + k[6] * e + k[7] * f;
            y[j + 2 * s] = e + k[8] * a + k[9] * b + k[10] * e + k[11] * f;
            y[j + 3 * s] = f + k[12] * a + k[13] * b + k[14] * e + k[15] * f;
        }
    }
}

void predict_back(const float *dp, const float *h, const float *c, float *dh, float *dc, long n, long d)
{
    long s = n * d;

#pragma omp parallel for
    for (long i = 0; i < n; i++) {
        const float *k = c + i * 16, *x = h + i * d, *g = dp + i * d;
        float *y = dh + i * d, *o = dc + i * 16;

        for (long j = 0; j < d; j++) {
            float a = g[j], b = g[j + s], e = g[j + 2 * s], f = g[j + 3 * s];

            y[j] = a + k[0] * a + k[4] * b + k[8] * e + k[12] * f;
            y[j + s] = b + k[1] * a + k[5] * b + k[9] * e + k[13] * f;
            y[j + 2 * s] = e + k[2] * a + k[6] * b + k[10] * e + k[14] * f;
            y[j + 3 * s] = f + k[3] * a + k[7] * b + k[11] * e + k[15] * f;
        }
        for (long p = 0; p < 4; p++) {
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;

            for (long j = 0; j < d; j++) {
                float v = g[j + p * s];

                s0 += v * x[j];
                s1 += v * x[j + s];
                s2 += v * x[j + 2 * s];
                s3 += v * x[j + 3 * s];
            }
            o[4 * p] = s0;
            o[4 * p + 1] = s1;
            o[4 * p + 2] = s2;
            o[4 * p + 3] = s3;
        }
    }
}

/* y[i] = pred[i] + k[i] (b - pred[0]); k [n][4]. */
void correct(const float *pred, const float *b, const float *k, float *y, long n, long d)
{
    long s = n * d;

#pragma omp parallel for
    for (long i = 0; i < n; i++) {
        const float *p = pred + i * d, *x = b + i * d, *c = k + i * 4;
        float *o = y + i * d;

        for (long j = 0; j < d; j++) {
            float v = x[j] - p[j];

            o[j] = p[j] + c[0] * v;
            o[j + s] = p[j + s] + c[1] * v;
            o[j + 2 * s] = p[j + 2 * s] + c[2] * v;
            o[j + 3 * s] = p[j + 3 * s] + c[3] * v;
        }
    }
}

void correct_back(const float *dy, const float *pred, const float *b, const float *k, float *dp, float *db,
                  float *dk, long n, long d)
{
    long s = n * d;

#pragma omp parallel for
    for (long i = 0; i < n; i++) {
        const float *g = dy + i * d, *p = pred + i * d, *x = b + i * d, *c = k + i * 4;
        float *o = dp + i * d, *q = db + i * d, s0 = 0, s1 = 0, s2 = 0, s3 = 0;

        for (long j = 0; j < d; j++) {
            float v = x[j] - p[j], a = g[j], e = g[j + s], f = g[j + 2 * s], h = g[j + 3 * s];
            float t = c[0] * a + c[1] * e + c[2] * f + c[3] * h;

            s0 += a * v;
            s1 += e * v;
            s2 += f * v;
            s3 += h * v;
            q[j] = t;
            o[j] = a - t;
            o[j + s] = e;
            o[j + 2 * s] = f;
            o[j + 3 * s] = h;
        }
        dk[i * 4] = s0;
        dk[i * 4 + 1] = s1;
        dk[i * 4 + 2] = s2;
        dk[i * 4 + 3] = s3;
    }
}

/* tanh gelu of t and its derivative. tanh by exp, which the vector library has on every glibc. */
static inline float gelu_tanh(float t)
{
    float u = 0.7978845608f * (t + 0.044715f * t * t * t);

    u = u > 9 ? 9 : u < -9 ? -9 : u;
    return 1 - 2 / (expf(2 * u) + 1);
}

/* y = gelu(shrink(g)) * u, the shrinking by mean + z deviations; rows' mean and deviation into stat [n][2]. */
#define GATE(T, NAME, LOAD, STORE)                                                                    \
    void gate_##NAME(const T *g, const T *u, T *y, float *stat, long n, long f, float z)              \
    {                                                                                                 \
        _Pragma("omp parallel for") for (long i = 0; i < n; i++)                                      \
        {                                                                                             \
            const T *gi = g + i * f, *ui = u + i * f;                                                 \
            T *yi = y + i * f;                                                                        \
            float cut = 0, floor = -INFINITY;                                                         \
                                                                                                      \
            if (z > 0) {                                                                              \
                float mean = 0, var = 0;                                                              \
                                                                                                      \
                for (long j = 0; j < f; j++)                                                          \
                    mean += LOAD(gi[j]);                                                              \
                mean /= f;                                                                            \
                for (long j = 0; j < f; j++) {                                                        \
                    float v = LOAD(gi[j]) - mean;                                                     \
                                                                                                      \
                    var += v * v;                                                                     \
                }                                                                                     \
                stat[2 * i] = mean;                                                                   \
                stat[2 * i + 1] = sqrtf(var / f);                                                     \
                cut = mean + z * stat[2 * i + 1];                                                     \
                floor = 0;                                                                            \
            }                                                                                         \
            for (long j = 0; j < f; j++) {                                                            \
                float t = LOAD(gi[j]) - cut;                                                          \
                                                                                                      \
                t = z > 0 && t < floor ? floor : t;                                                   \
                yi[j] = STORE(0.5f * t * (1 + gelu_tanh(t)) * LOAD(ui[j]));                           \
            }                                                                                         \
        }                                                                                             \
    }                                                                                                 \
                                                                                                      \
    void gate_back_##NAME(const T *dy, const T *g, const T *u, const float *stat, T *dg, T *du, long n, long f, \
                          float z)                                                                    \
    {                                                                                                 \
        _Pragma("omp parallel")                                                                       \
        {                                                                                             \
            float *d = malloc(f * sizeof(*d));                                                        \
                                                                                                      \
            _Pragma("omp for") for (long i = 0; i < n; i++)                                           \
            {                                                                                         \
                const T *gi = g + i * f, *ui = u + i * f, *yi = dy + i * f;                           \
                T *dgi = dg + i * f, *dui = du + i * f;                                               \
                float mean = 0, dev = 1, cut = 0, sum = 0;                                            \
                                                                                                      \
                if (z > 0) {                                                                          \
                    mean = stat[2 * i];                                                               \
                    dev = stat[2 * i + 1];                                                            \
                    cut = mean + z * dev;                                                             \
                }                                                                                     \
                for (long j = 0; j < f; j++) {                                                        \
                    float t = LOAD(gi[j]) - cut, on = z > 0 && t <= 0 ? 0.0f : 1.0f, th, sl;          \
                                                                                                      \
                    t *= on;                                                                          \
                    th = gelu_tanh(t);                                                                \
                    sl = 0.5f * (1 + th) +                                                            \
                         0.5f * t * (1 - th * th) * 0.7978845608f * (1 + 3 * 0.044715f * t * t);      \
                    dui[j] = STORE(LOAD(yi[j]) * 0.5f * t * (1 + th));                                \
                    d[j] = LOAD(yi[j]) * LOAD(ui[j]) * sl * on;                                       \
                    sum += d[j];                                                                      \
                }                                                                                     \
                if (z > 0)                                                                            \
                    for (long j = 0; j < f; j++)                                                      \
                        d[j] -= sum / f * (1 + z * (LOAD(gi[j]) - mean) / (dev + 1e-12f));            \
                for (long j = 0; j < f; j++)                                                          \
                    dgi[j] = STORE(d[j]);                                                             \
            }                                                                                         \
            free(d);                                                                                  \
        }                                                                                             \
    }

GATE(bf16, bf16, from_bf16, to_bf16)
GATE(float, f32, , )

/*
 * Causal attention without scale, q [b][t][nh][d], k and v [b][t][nkv][d]: position i sees first[i]..i
 * of its row. lse [b][nh][t] is the logarithm of the softmax's sum. Keys go by blocks of 16, whole
 * ones always, so that no loop has a scalar rest; what lies outside first[i]..i is masked.
 */
typedef float v16 __attribute__((vector_size(64), aligned(4)));

/* x [t][stride], d wide, to [t/16 blocks][d][16], the last block filled up with zeros. */
static float *by_blocks(const float *x, long t, long stride, long d)
{
    float *y = calloc((t + 15) / 16 * 16 * d, sizeof(*y));

    for (long i = 0; i < t; i++)
        for (long j = 0; j < d; j++)
            y[i / 16 * 16 * d + j * 16 + i % 16] = x[i * stride + j];
    return y;
}

static inline __attribute__((always_inline)) v16 products(const float *x, const float *blocks, long block, long d)
{
    const float *y = blocks + block * 16 * d;
    v16 s = {0};

    for (long e = 0; e < d; e++)
        s += x[e] * *(const v16 *)(y + 16 * e);
    return s;
}

static inline __attribute__((always_inline)) void forward_d(const float *q, const float *k, const float *v,
                                                            const int32_t *first, float *out, float *lse, long nb,
                                                            long t, long nh, long nkv, long d)
{
    long group = nh / nkv;

#pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < nb * nkv; task++) {
        long b = task / nkv, g = task % nkv;
        float *kt = by_blocks(k + (b * t * nkv + g) * d, t, nkv * d, d), *s = malloc((t + 15) / 16 * 64);

        for (long h = g * group; h < (g + 1) * group; h++)
            for (long i = 0; i < t; i++) {
                const float *qi = q + ((b * t + i) * nh + h) * d;
                float *o = out + ((b * t + i) * nh + h) * d, max = -INFINITY, sum = 0;
                long lo = first[b * t + i], begin = lo / 16, end = i / 16 + 1;

                for (long n = begin; n < end; n++)
                    *(v16 *)(s + 16 * n) = products(qi, kt, n, d);
                for (long j = 16 * begin; j < lo; j++)
                    s[j] = -1e30f;
                for (long j = i + 1; j < 16 * end; j++)
                    s[j] = -1e30f;
                for (long j = 16 * begin; j < 16 * end; j++)
                    max = s[j] > max ? s[j] : max;
                for (long j = 16 * begin; j < 16 * end; j++)
                    sum += s[j] = expf(s[j] - max);
                lse[(b * nh + h) * t + i] = max + logf(sum);
                if (d == 32) {
                    v16 a = {0}, c = {0};

                    for (long j = lo; j <= i; j++) {
                        const float *vj = v + ((b * t + j) * nkv + g) * d;

                        a += s[j] * *(const v16 *)vj;
                        c += s[j] * *(const v16 *)(vj + 16);
                    }
                    *(v16 *)o = a / sum;
                    *(v16 *)(o + 16) = c / sum;
                } else {
                    memset(o, 0, d * sizeof(float));
                    for (long j = lo; j <= i; j++)
                        for (long e = 0; e < d; e++)
                            o[e] += s[j] / sum * v[((b * t + j) * nkv + g) * d + e];
                }
            }
        free(kt);
        free(s);
    }
}

static inline __attribute__((always_inline)) void back_d(const float *dout, const float *q, const float *k,
                                                         const float *v, const int32_t *first, const float *out,
                                                         const float *lse, float *dq, float *dk, float *dv, long nb,
                                                         long t, long nh, long nkv, long d)
{
    long group = nh / nkv;

#pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < nb * nkv; task++) {
        long b = task / nkv, g = task % nkv, at_kv = (b * t * nkv + g) * d;
        float *kt = by_blocks(k + at_kv, t, nkv * d, d), *vt = by_blocks(v + at_kv, t, nkv * d, d);
        float *p = malloc((t + 15) / 16 * 64), *ds = malloc((t + 15) / 16 * 64);

        for (long h = g * group; h < (g + 1) * group; h++)
            for (long i = 0; i < t; i++) {
                long at = ((b * t + i) * nh + h) * d, lo = first[b * t + i], begin = lo / 16, end = i / 16 + 1;
                const float *qi = q + at, *go = dout + at, *o = out + at;
                float *dqi = dq + at, sum = 0, l = lse[(b * nh + h) * t + i];

                for (long e = 0; e < d; e++)
                    sum += go[e] * o[e];
                for (long n = begin; n < end; n++) {
                    *(v16 *)(p + 16 * n) = products(qi, kt, n, d) - l;
                    *(v16 *)(ds + 16 * n) = products(go, vt, n, d) - sum;
                }
                for (long j = 16 * begin; j < lo; j++)
                    p[j] = -100;
                for (long j = i + 1; j < 16 * end; j++)
                    p[j] = -100;
                for (long j = 16 * begin; j < 16 * end; j++) {
                    p[j] = expf(p[j]);
                    ds[j] *= p[j];
                }
                if (d == 32) {
                    v16 g0 = *(const v16 *)go, g1 = *(const v16 *)(go + 16), q0 = *(const v16 *)qi,
                        q1 = *(const v16 *)(qi + 16), a = {0}, c = {0};

                    for (long j = lo; j <= i; j++) {
                        long kv = at_kv + j * nkv * d;

                        *(v16 *)(dv + kv) += p[j] * g0;
                        *(v16 *)(dv + kv + 16) += p[j] * g1;
                        *(v16 *)(dk + kv) += ds[j] * q0;
                        *(v16 *)(dk + kv + 16) += ds[j] * q1;
                        a += ds[j] * *(const v16 *)(k + kv);
                        c += ds[j] * *(const v16 *)(k + kv + 16);
                    }
                    *(v16 *)dqi = a;
                    *(v16 *)(dqi + 16) = c;
                } else {
                    memset(dqi, 0, d * sizeof(float));
                    for (long j = lo; j <= i; j++)
                        for (long e = 0; e < d; e++) {
                            long kv = at_kv + j * nkv * d + e;

                            dv[kv] += p[j] * go[e];
                            dk[kv] += ds[j] * qi[e];
                            dqi[e] += ds[j] * k[kv];
                        }
                }
            }
        free(kt);
        free(vt);
        free(p);
        free(ds);
    }
}

/* A head of 32 gets code of its own: its inner loops are two vectors. */
void attention(const float *q, const float *k, const float *v, const int32_t *first, float *out, float *lse,
               long nb, long t, long nh, long nkv, long d)
{
    if (d == 32)
        forward_d(q, k, v, first, out, lse, nb, t, nh, nkv, 32);
    else
        forward_d(q, k, v, first, out, lse, nb, t, nh, nkv, d);
}

void attention_back(const float *dout, const float *q, const float *k, const float *v, const int32_t *first,
                    const float *out, const float *lse, float *dq, float *dk, float *dv, long nb, long t, long nh,
                    long nkv, long d)
{
    if (d == 32)
        back_d(dout, q, k, v, first, out, lse, dq, dk, dv, nb, t, nh, nkv, 32);
    else
        back_d(dout, q, k, v, first, out, lse, dq, dk, dv, nb, t, nh, nkv, d);
}
