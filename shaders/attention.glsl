// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0

// What is summed up for one row and one group of heads, and how two such sums become one. The
// workgroup of 256 threads holds them spread out: a thread has words of the values (two each),
// summed over those positions of each page that are its slice's; and for one slot of a page and one
// head the sum of weights. Only finish() adds up slices and slots.

#extension GL_GOOGLE_include_directive : require
#include "shaders/math.glsl"
#include "shaders/push-attention.h"

layout(local_size_x = ATTENTION_THREADS) in;

layout(constant_id = 0) const uint HALF = 1;      // pages of f16, else f32
layout(constant_id = 1) const uint MAX_DIM = 256; // 256 or 1024
layout(constant_id = 2) const uint APART = 0;     // a workgroup for each part, else one for all

const uint N_WORDS = MAX_DIM > 512 ? 2 : 1; // of a thread: ATTENTION_PART_FLOATS()

layout(buffer_reference, std430, buffer_reference_align = 8) buffer KvRows
{
    device_kv_row v[];
};

PUSH(attention_push)

shared float partial[2048];
shared float old_scale[ATTENTION_HEADS], new_scale[ATTENTION_HEADS];

struct sums {
    vec4 v[4]; // component: head; 2 N_WORDS are used
    float weights, maximum;
};

uint thread()
{
    return gl_LocalInvocationID.x;
}

uint head()
{
    return thread() % ATTENTION_HEADS;
}

// Words are spread over the threads as often as they go, columns times slices, though no more slices
// than a page has positions.
uint n_columns()
{
    uint words = push.head_dim / 2, n = ATTENTION_THREADS / KV_PAGE;

    while (n < words && n < ATTENTION_THREADS)
        n *= 2;
    return n;
}

// A row's group of heads: which, how many, whose.
struct group {
    uint row, first_head, n, head_kv;
};

group this_group()
{
    uint x = gl_WorkGroupID.x, g = x % push.n_groups;
    uint j = x / push.n_groups % push.n_heads_kv;
    uint begin = (j * push.n_heads + push.n_heads_kv - 1) / push.n_heads_kv;
    uint end = ((j + 1) * push.n_heads + push.n_heads_kv - 1) / push.n_heads_kv;
    uint first = begin + g * ATTENTION_HEADS;

    return group(x / push.n_groups / push.n_heads_kv, first,
                 first < end ? min(end - first, ATTENTION_HEADS) : 0, j);
}

// total := total and part together; the workgroup does it as one.
void merge(inout sums total, const sums part)
{
    precise float m = max(total.maximum, part.maximum);
    precise float was = exponential(total.maximum - m), is = exponential(part.maximum - m);
    precise float weights = fma(part.weights, is, total.weights * was);

    barrier(); // what the last merge left may be being read
    if (thread() < ATTENTION_HEADS) {
        old_scale[thread()] = was;
        new_scale[thread()] = is;
    }
    barrier();
    vec4 o = vec4(old_scale[0], old_scale[1], old_scale[2], old_scale[3]);
    vec4 n = vec4(new_scale[0], new_scale[1], new_scale[2], new_scale[3]);
    for (uint i = 0; i < 2 * N_WORDS; i++) {
        precise vec4 v = fma(part.v[i], n, total.v[i] * o);
        total.v[i] = v;
    }
    total.weights = weights;
    total.maximum = m;
}

// The weighted mean of the values, to where it belongs.
void finish(const sums s, const group g)
{
    uint t = thread(), columns = n_columns(), column = t % columns;
    uint slices = ATTENTION_THREADS / columns;
    uint at = g.row * push.ld + g.first_head * push.head_dim;
    precise float sum = 0;
    vec4 by;

    barrier();
    partial[t] = s.weights;
    barrier();
    if (t < 8 * ATTENTION_HEADS)
        for (uint i = 0; i < 8; i++)
            sum += partial[(t / ATTENTION_HEADS * 8 + i) * ATTENTION_HEADS + head()];
    barrier();
    if (t < 8 * ATTENTION_HEADS)
        partial[t] = sum;
    barrier();
    for (uint h = 0; h < ATTENTION_HEADS; h++) {
        precise float total = 0;

        for (uint i = 0; i < 8; i++)
            total += partial[i * ATTENTION_HEADS + h];
        by[h] = 1 / total;
    }
    for (uint w = 0; w < N_WORDS; w++) {
        uint word = column + w * ATTENTION_THREADS;

        barrier();
        for (uint i = 0; i < 8; i++)
            partial[t * 8 + i] = s.v[2 * w + i / 4][i % 4];
        barrier();
        if (t < columns && word < push.head_dim / 2)
            for (uint i = 0; i < 8; i++) {
                uint h = i % 4;
                precise float v = 0;

                for (uint k = 0; k < slices; k++)
                    v += partial[(k * columns + column) * 8 + i];
                if (h < g.n) {
                    precise float y = v * by[h];
                    Floats(push.y).v[at + h * push.head_dim + 2 * word + i / 4] = y;
                }
            }
    }
}

// Positions that the row sees.
uint first_seen(uint pos)
{
    return push.window != 0 && pos >= push.window ? pos - push.window + 1 : 0;
}

// The part's first page that the row sees; perhaps beyond its last.
uint first_page(uint pos, uint part)
{
    uint page = first_seen(pos) / KV_PAGE;

    return page + (part + ATTENTION_PARTS - page % ATTENTION_PARTS) % ATTENTION_PARTS;
}

// Where the sums of a part are kept.
uint part_at(uint part)
{
    return (gl_WorkGroupID.x * ATTENTION_PARTS + part) * ATTENTION_PART_FLOATS(N_WORDS);
}

void store_part(uint part, const sums s)
{
    uint at = part_at(part) + thread();

    for (uint i = 0; i < 8 * N_WORDS; i++)
        Floats(push.parts).v[at + i * ATTENTION_THREADS] = s.v[i / 4][i % 4];
    at += 8 * N_WORDS * ATTENTION_THREADS;
    Floats(push.parts).v[at] = s.weights;
    Floats(push.parts).v[at + ATTENTION_THREADS] = s.maximum;
}

sums load_part(uint part)
{
    uint at = part_at(part) + thread();
    sums s;

    for (uint i = 0; i < 8 * N_WORDS; i++)
        s.v[i / 4][i % 4] = Floats(push.parts).v[at + i * ATTENTION_THREADS];
    at += 8 * N_WORDS * ATTENTION_THREADS;
    s.weights = Floats(push.parts).v[at];
    s.maximum = Floats(push.parts).v[at + ATTENTION_THREADS];
    return s;
}
