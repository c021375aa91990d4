/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef LLMD_PUSH_ATTENTION_H /* glslc knows no #pragma once */
#define LLMD_PUSH_ATTENTION_H

#include "shaders/push.h"

/* Query heads that a workgroup works on, all of one KV head's. */
#define ATTENTION_HEADS 4

/* Parts that a row's pages are divided among: page p is part p % ATTENTION_PARTS's. */
#define ATTENTION_PARTS 16

#define ATTENTION_THREADS 256

#ifdef VULKAN
#define KV_PAGE 64
#endif

/* Floats of a part's sums, of each workgroup: for each thread two values of each head for each of
 * its words (`words`), its sum of weights and its head's maximum. */
#define ATTENTION_PART_FLOATS(words) (ATTENTION_THREADS * (8 * (words) + 2))

struct attention_push {
    ADDRESS rows; /* [n] device_kv_row */
    ADDRESS q, y; /* [n][ld] floats */
    ADDRESS
        parts; /* [n][groups][ATTENTION_PARTS][ATTENTION_PART_FLOATS()], where parts are apart */
    uint ld, n_heads, n_heads_kv, head_dim, window;
    uint n_groups; /* of a KV head, each of at most ATTENTION_HEADS */
};
PUSH_FITS(attention_push);

#endif
