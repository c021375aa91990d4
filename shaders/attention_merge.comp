// SPDX-FileCopyrightText: the llmd authors
// SPDX-License-Identifier: Apache-2.0
#version 460

// Adds up the parts that workgroups of attention.comp have left, in the order that it has itself.

#include "shaders/attention.glsl"

void main()
{
    group g = this_group();
    uint pos = KvRows(push.rows).v[g.row].pos;
    bool is_first = true;
    sums total;

    if (g.n == 0)
        return;
    for (uint part = 0; part < ATTENTION_PARTS; part++) {
        if (first_page(pos, part) > pos / KV_PAGE)
            continue;
        sums s = load_part(part);
        if (is_first)
            total = s;
        else
            merge(total, s);
        is_first = false;
    }
    finish(total, g);
}
