/* SPDX-FileCopyrightText: the llmd authors
 * SPDX-License-Identifier: Apache-2.0 */
#pragma once

/*
 * plan: what an import is going to write: every tensor of the model file in file order, with its
 * type, its layout and the rows and columns of source tensors that it is made of. Slicing
 * (gemma3n.md §8.1) is nothing but choosing these. Made before anything is read but headers (and
 * the few tensors whose type depends on their values), so that --dry-run shows all of it.
 */

#include <stdbool.h>
#include <stdint.h>

#include "backends/weight.h"
#include "base/error.h"
#include "engine/model-config.h"
#include "tools/import/source.h"

struct plan_options {
    bool has_type; /* type is wanted; else what the source has, q4 for Hugging Face */
    enum weight_type type;
    bool slice_e2b;     /* E4B to E2B: layers 20-24 go, FFN width 8192 */
    const char *layers; /* "0-19,25-34": layers to keep; NULL: all */
    const char *ffn; /* "8192", "16384x4,8192x26": widths of the kept layers; NULL: as they are */
};

/* How values get from a source tensor to the model file. */
enum conversion {
    CONVERT_QUANTS,   /* integers and scales of Q4_0 or Q8_0 carry over as they are */
    CONVERT_WORDS,    /* 16-bit numbers carry over as they are */
    CONVERT_FLOATS,   /* decoded, then rounded to the type, or exact as f32 */
    CONVERT_QUANTIZE, /* decoded, then quantised */
};

struct plan_range {
    uint32_t first, n;
};

struct plan_item {
    char *name;
    const struct source_tensor *source;
    enum weight_type type;
    enum weight_layout layout;
    uint32_t n_out, n_in;
    enum conversion conversion;
    uint32_t n_rows, n_columns; /* ranges below; their lengths sum up to n_out and n_in */
    struct plan_range *rows, *columns;
    float clip;       /* values are clipped to +-clip; 0: they are not */
    bool requantized; /* blocks of one kind became blocks of another: not what the source has */
    bool fallback;    /* the shape does not allow the type that was wanted */
    size_t bytes;
};

struct plan {
    struct model_config config; /* of the model that is written */
    size_t n_items;
    struct plan_item *items;
    uint64_t bytes;        /* of all items */
    uint64_t source_bytes; /* that will be read */
};

/* 0, -ENOMEM, -errno of reading, -EINVAL: err names the tensor or the option */
int plan_new(struct plan **ret, const struct source *s, const struct plan_options *options,
             struct error *err);
struct plan *plan_free(struct plan *p);
void plan_freep(struct plan **p);
