// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460

// Attention of one row and the heads of one KV head, page by page with a running maximum. Each part
// of the pages is summed up by itself, from its first page that the row sees to its last; then the
// parts one after the other. So whether each part has a workgroup of its own and attention_merge
// adds them up, or one does it all, a row's result depends on its position alone.
//
// What a page holds behind the positions that the row sees may be anything: scores are replaced
// before use, values not read.

#include "shaders/attention.glsl"

shared vec4 query[MAX_DIM];
shared float score[ATTENTION_THREADS], maxima[8 * ATTENTION_HEADS];
shared float weight[ATTENTION_THREADS], scale[ATTENTION_HEADS];

void load_query(const group g)
{
    uint at = g.row * push.ld + g.first_head * push.head_dim;

    for (uint k = thread(); k < push.head_dim; k += ATTENTION_THREADS) {
        vec4 q = vec4(0);

        for (uint h = 0; h < ATTENTION_HEADS; h++)
            if (h < g.n)
                q[h] = Floats(push.q).v[at + h * push.head_dim + k];
        query[k] = q;
    }
    barrier();
}

// The thread's two positions at dimension k
vec2 key(uvec2 page, uint k, uint lane)
{
    if (HALF != 0)
        return unpackHalf2x16(Words(page).v[k * 32 + lane]);
    return vec2(Floats(page).v[k * 64 + 2 * lane], Floats(page).v[k * 64 + 2 * lane + 1]);
}

// Word `at` of the page's two
vec2 value(uvec2 page, uint at)
{
    if (HALF != 0)
        return unpackHalf2x16(Words(page).v[at]);
    return vec2(Floats(page).v[2 * at], Floats(page).v[2 * at + 1]);
}

// Scores of all positions of the page. Thread: two positions and one of eight ranges of dimensions,
// in which runs of 16 are summed before they are added; what a run reads is asked for at once.
void page_scores(uvec2 page, const group g)
{
    uint lane = thread() % 32, range = thread() / 32, length = (push.head_dim + 7) / 8;
    uint begin = range * length, end = min(begin + length, push.head_dim);
    uint k_at = g.head_kv * push.head_dim;
    precise vec4 a = vec4(0), b = vec4(0);

    for (; begin < end; begin += 16) {
        precise vec4 run_a = vec4(0), run_b = vec4(0);

        if (begin + 16 <= end) {
            vec2 k[16];

            for (uint i = 0; i < 16; i++)
                k[i] = key(page, k_at + begin + i, lane);
            for (uint i = 0; i < 16; i++) {
                run_a = fma(query[begin + i], vec4(k[i].x), run_a);
                run_b = fma(query[begin + i], vec4(k[i].y), run_b);
            }
        } else {
            for (uint i = begin; i < end; i++) {
                vec2 k = key(page, k_at + i, lane);

                run_a = fma(query[i], vec4(k.x), run_a);
                run_b = fma(query[i], vec4(k.y), run_b);
            }
        }
        a += run_a;
        b += run_b;
    }
    for (uint h = 0; h < ATTENTION_HEADS; h++) {
        partial[(range * 64 + 2 * lane) * 4 + h] = a[h];
        partial[(range * 64 + 2 * lane + 1) * 4 + h] = b[h];
    }
    barrier();
}

// Scores to weights, 0 where not seen; and what the sums so far are worth now.
void page_weights(uint first, uint last, inout sums s)
{
    uint t = thread(), position = t / ATTENTION_HEADS;
    float minus_infinity = uintBitsToFloat(0xff800000u);
    bool seen = position >= first && position < last;
    precise float x = 0;

    for (uint i = 0; i < 8; i++)
        x += partial[i * 256 + t];
    score[t] = seen ? x : minus_infinity;
    barrier();
    if (t < 8 * ATTENTION_HEADS) {
        float m = minus_infinity;

        for (uint i = 0; i < 8; i++)
            m = max(m, score[(t / ATTENTION_HEADS * 8 + i) * ATTENTION_HEADS + head()]);
        maxima[t] = m;
    }
    barrier();
    float m = s.maximum;
    for (uint i = 0; i < 8; i++)
        m = max(m, maxima[i * ATTENTION_HEADS + head()]);
    precise float past = exponential(s.maximum - m), w = exponential(x - m);
    if (!seen)
        w = 0;
    precise float weights = fma(s.weights, past, w);
    s.weights = weights;
    s.maximum = m;
    weight[t] = w;
    if (t < ATTENTION_HEADS)
        scale[t] = past;
    barrier();
}

vec4 weights_at(uint p)
{
    return vec4(weight[p * 4], weight[p * 4 + 1], weight[p * 4 + 2], weight[p * 4 + 3]);
}

// Thread: its words of the values, at its slice's share of the page's positions.
void page_values(uvec2 page, const group g, uint first, uint last, inout sums s)
{
    uint columns = n_columns(), column = thread() % columns, words = push.head_dim / 2;
    uint share = 64 * columns / ATTENTION_THREADS, slice = thread() / columns;
    uint begin = max(first, slice * share), end = min(last, (slice + 1) * share);
    uint v_at = (push.n_heads_kv + g.head_kv) * push.head_dim * 32;
    precise vec4 past = vec4(scale[0], scale[1], scale[2], scale[3]);

    for (uint i = 0; i < N_WORDS; i++) {
        uint word = column + i * ATTENTION_THREADS, at = v_at + word, p = begin;
        precise vec4 a = s.v[2 * i] * past, b = s.v[2 * i + 1] * past;

        if (word >= words)
            break;
        for (; p + 8 <= end; p += 8) {
            vec2 v[8];

            for (uint k = 0; k < 8; k++)
                v[k] = value(page, at + (p + k) * words);
            for (uint k = 0; k < 8; k++) {
                a = fma(weights_at(p + k), vec4(v[k].x), a);
                b = fma(weights_at(p + k), vec4(v[k].y), b);
            }
        }
        for (; p < end; p++) {
            vec2 v = value(page, at + p * words);

            a = fma(weights_at(p), vec4(v.x), a);
            b = fma(weights_at(p), vec4(v.y), b);
        }
        s.v[2 * i] = a;
        s.v[2 * i + 1] = b;
    }
}

sums no_sums()
{
    sums s;

    for (uint i = 0; i < 2 * N_WORDS; i++)
        s.v[i] = vec4(0);
    s.weights = 0;
    s.maximum = uintBitsToFloat(0xff800000u);
    return s;
}

sums sum_part(const group g, const device_kv_row row, uint part)
{
    uint first = first_seen(row.pos), last_page = row.pos / KV_PAGE;
    sums s = no_sums();

    for (uint p = first_page(row.pos, part); p <= last_page; p += ATTENTION_PARTS) {
        uvec2 page = uvec2(Words(row.pages).v[2 * p], Words(row.pages).v[2 * p + 1]);
        uint begin = p == first / KV_PAGE ? first % KV_PAGE : 0;
        uint end = p == last_page ? row.pos % KV_PAGE + 1 : KV_PAGE;

        page_scores(page, g);
        page_weights(begin, end, s);
        page_values(page, g, begin, end, s);
    }
    return s;
}

void main()
{
    group g = this_group();
    device_kv_row row = KvRows(push.rows).v[g.row];
    uint last_page = row.pos / KV_PAGE;

    if (g.n == 0)
        return;
    if (APART != 0) {
        // from the first page's on: where a window lets a row see few, there are no more workgroups
        uint part = (first_seen(row.pos) / KV_PAGE + gl_WorkGroupID.y) % ATTENTION_PARTS;

        if (first_page(row.pos, part) > last_page)
            return;
        load_query(g);
        store_part(part, sum_part(g, row, part));
    } else {
        bool is_first = true;
        sums total;

        load_query(g);
        for (uint part = 0; part < ATTENTION_PARTS; part++) {
            if (first_page(row.pos, part) > last_page)
                continue;
            sums s = sum_part(g, row, part);
            if (is_first)
                total = s;
            else
                merge(total, s);
            is_first = false;
        }
        finish(total, g);
    }
}
