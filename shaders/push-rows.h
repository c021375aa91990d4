/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef LLMD_PUSH_ROWS_H /* glslc knows no #pragma once */
#define LLMD_PUSH_ROWS_H

#include "shaders/push.h"

/* Members are those of the operations' structures (backends/backend.h). */

struct norm_push {
    ADDRESS x, w, add, add2, y;
    uint k, ld_x, ld_add, ld_add2, ld_y;
    uint has_w, has_add, has_add2;
    float eps, scale;
};
PUSH_FITS(norm_push);

struct head_norm_push {
    ADDRESS x, w, rope;
    uint head_dim, ld, has_w, has_rope;
    float eps;
};
PUSH_FITS(head_norm_push);

struct gate_push {
    ADDRESS gate, up, y;
    uint k, ld_gate, ld_up, ld_y;
    float z;
};
PUSH_FITS(gate_push);

struct ple_push {
    ADDRESS g, e, w, ple;
    uint width;
    float eps; /* / g_scale^2 */
};
PUSH_FITS(ple_push);

struct altup_predict_push {
    ADDRESS norm, router, coefs, h, pred;
    uint hidden, n_streams;
    float eps;
};
PUSH_FITS(altup_predict_push);

struct altup_correct_push {
    ADDRESS norm, router, coefs, pred, b, scale, h, scaled;
    uint hidden, n_streams;
    float eps;
};
PUSH_FITS(altup_correct_push);

struct stream_norm_push {
    ADDRESS x, w, h;
    uint hidden, n_streams;
    float eps;
};
PUSH_FITS(stream_norm_push);

struct rescale_push {
    ADDRESS y, ref, h; /* h: the stream that is written */
    uint hidden, ld_ref, ld_h;
};
PUSH_FITS(rescale_push);

struct merge_push {
    ADDRESS h, w, x;
    uint hidden, n_streams;
    float eps; /* * n_streams^2 */
};
PUSH_FITS(merge_push);

struct copy_rows_push {
    ADDRESS x, ids, y;
    uint k, ld_x, ld_y, has_ids;
};
PUSH_FITS(copy_rows_push);

struct softcap_push {
    ADDRESS x;
    uint n;
    float c, below; /* the float below c */
};
PUSH_FITS(softcap_push);

struct kv_store_push {
    ADDRESS k, v, rows;
    uint ld, n_heads_kv, head_dim;
};
PUSH_FITS(kv_store_push);

#endif
